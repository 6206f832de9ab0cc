//! A stream's data encryption key, renewed because an operator asks.
//!
//! The same as what time does (`supply`): content keys that are made from then on are under the new one.

use super::Operator;
use super::operator::{OperatorError, RenewedDek};
use super::worker::WorkerError;
use crate::keys::StreamId;
use crate::store::DekRow;

impl Operator {
    /// Gives a stream a new data encryption key. Where another node did so at the same time, that one's is it.
    ///
    /// # Errors
    /// [`OperatorError::NoStream`], [`OperatorError::Stopped`], and [`OperatorError::Failed`] with the KMS's reason.
    pub async fn rotate_dek(&self, id: &StreamId, actor: &str) -> Result<RenewedDek, OperatorError> {
        let core = &self.core;
        let stream = core.running(id).await?;
        if stream.known.read().dek().is_none() {
            return Err(OperatorError::NotReady);
        }
        let renewed = core.renew_deks(std::slice::from_ref(&stream)).await;
        renewed.map_err(|error| match error {
            WorkerError::Kms(error) => OperatorError::Failed(error.to_string()),
            error => OperatorError::of_change(error),
        })?;
        let known = stream.known.read();
        let dek = known.dek().ok_or(OperatorError::NotReady)?;
        let DekRow { id: dek, version, kek_id, created_at, .. } = dek.row.clone();
        tracing::info!(stream = %id, actor, %dek, version = version.0, "data encryption key renewed on demand");
        Ok(RenewedDek { id: dek, version, kek_id, created_at })
    }
}
