//! Keys in a KeyValueStore: all of a call or none, at a version of the whole store.
//!
//! Whoever writes names the version (ETag) that it read, and is refused when another wrote meanwhile; it then reads
//! anew. So a node writes one batch at a time and remembers the version that the last one left. Deliberately absent:
//! reading keys back here. What the edge has is asked at the edge.

use std::time::Duration;

use aws_sdk_cloudfrontkeyvaluestore::error::ProvideErrorMetadata;
use aws_sdk_cloudfrontkeyvaluestore::types::{DeleteKeyRequestListItem, PutKeyRequestListItem};
use tokio::time::sleep;

use super::super::{CdnError, CdnFault};
use super::errors::Call;
use super::{CloudFront, KEYS_PER_CALL};
use crate::entropy;
use crate::keys::{KeyId, SealedKey};

const DESCRIBE: &str = "cloudfront-keyvaluestore:DescribeKeyValueStore";
const UPDATE: &str = "cloudfront-keyvaluestore:UpdateKeys";
const GET: &str = "cloudfront-keyvaluestore:GetKey";

/// The longest value, in bytes.
const MAX_VALUE: usize = 1_024;
/// How often a batch is tried when others write at the same time.
const ATTEMPTS: u32 = 8;
/// The longest pause before the second attempt; it doubles for each that follows.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// # Errors
/// What is no ARN of a KeyValueStore, and how one looks.
pub(super) fn check_arn(arn: &str) -> Result<(), CdnError> {
    let parts: Vec<_> = arn.splitn(6, ':').collect();
    let is_one = matches!(parts[..], ["arn", partition, "cloudfront", "", account, resource]
        if partition.starts_with("aws")
            && account.len() == 12
            && account.bytes().all(|b| b.is_ascii_digit())
            && resource.strip_prefix("key-value-store/").is_some_and(|id| !id.is_empty()));
    if is_one {
        return Ok(());
    }
    let what = format!(
        "key_value_store_arn {arn:?} is no ARN of a KeyValueStore: they look like \
         arn:aws:cloudfront::123456789012:key-value-store/1a2b3c4d-…"
    );
    Err(CdnError::new(CdnFault::Invalid, what))
}

enum Written {
    /// And the version that the store has now.
    Yes(Option<String>),
    /// Another wrote meanwhile.
    TooLate(CdnError),
    /// A key that was to be deleted is not there.
    Missing(CdnError),
}

impl CloudFront {
    /// Stores and deletes keys.
    pub(super) async fn update_store(&self, puts: &[SealedKey], deletes: &[KeyId]) -> Result<(), CdnError> {
        if let Some(key) = puts.iter().find(|key| key.text.len() > MAX_VALUE) {
            let what =
                format!("sealed key {} has {} bytes; a value has at most 1 KB", key.key, key.text.len());
            return Err(CdnError::new(CdnFault::Invalid, what));
        }
        for batch in puts.chunks(KEYS_PER_CALL) {
            self.write(batch, &[]).await?;
        }
        for batch in deletes.chunks(KEYS_PER_CALL) {
            self.write(&[], batch).await?;
        }
        Ok(())
    }

    async fn write(&self, puts: &[SealedKey], deletes: &[KeyId]) -> Result<(), CdnError> {
        let mut known = self.version.lock().await;
        let (mut deletes, mut pause, mut attempt) = (deletes.to_vec(), FIRST_PAUSE, 1);
        loop {
            let version = match known.take() {
                Some(version) => version,
                None => self.store_version().await?,
            };
            match self.try_to_write(version, puts, &deletes).await? {
                Written::Yes(version) => {
                    *known = version;
                    return Ok(());
                }
                Written::TooLate(error) | Written::Missing(error) if attempt == ATTEMPTS => {
                    return Err(error);
                }
                Written::TooLate(_) => {
                    // Those who were refused together do not come back together.
                    let share = f64::from(u16::from_be_bytes(*entropy::random())) / f64::from(u16::MAX);
                    sleep(pause.mul_f64(0.5 + share / 2.0)).await;
                    pause *= 2;
                }
                // DeleteKey refuses a key that is not there; whether UpdateKeys does is not documented.
                Written::Missing(_) => {
                    deletes = self.those_that_are_there(&deletes).await?;
                    if deletes.is_empty() {
                        return Ok(());
                    }
                }
            }
            attempt += 1;
        }
    }

    async fn try_to_write(
        &self,
        version: String,
        puts: &[SealedKey],
        deletes: &[KeyId],
    ) -> Result<Written, CdnError> {
        let arn = &self.settings.key_value_store_arn;
        let call = Call::new(UPDATE, arn);
        let mut request = self.clients().await.store.update_keys().kvs_arn(arn).if_match(version);
        for key in puts {
            let put = PutKeyRequestListItem::builder().key(key.key.to_string()).value(&key.text).build();
            request = request.puts(put.map_err(|_| call.incomplete())?);
        }
        for key in deletes {
            let delete = DeleteKeyRequestListItem::builder().key(key.to_string()).build();
            request = request.deletes(delete.map_err(|_| call.incomplete())?);
        }
        match request.send().await {
            Ok(updated) => Ok(Written::Yes(Some(updated.e_tag).filter(|tag| !tag.is_empty()))),
            Err(error) => match error.code() {
                Some("ConflictException") => Ok(Written::TooLate(call.failed(&error))),
                Some("ResourceNotFoundException") if !deletes.is_empty() => {
                    Ok(Written::Missing(call.failed(&error)))
                }
                _ => Err(call.failed(&error)),
            },
        }
    }

    /// The store's version, for the next write.
    pub(super) async fn store_version(&self) -> Result<String, CdnError> {
        let arn = &self.settings.key_value_store_arn;
        let request = self.clients().await.store.describe_key_value_store().kvs_arn(arn);
        let described = request.send().await.map_err(|error| Call::new(DESCRIBE, arn).failed(&error))?;
        Ok(described.e_tag)
    }

    async fn those_that_are_there(&self, keys: &[KeyId]) -> Result<Vec<KeyId>, CdnError> {
        let arn = &self.settings.key_value_store_arn;
        let mut there = Vec::new();
        for key in keys {
            let request = self.clients().await.store.get_key().kvs_arn(arn).key(key.to_string());
            match request.send().await {
                Ok(_) => there.push(*key),
                Err(error) if error.code() == Some("ResourceNotFoundException") => {}
                Err(error) => return Err(Call::new(GET, arn).failed(&error)),
            }
        }
        Ok(there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arn_is_told_from_what_is_none() {
        assert!(check_arn("arn:aws:cloudfront::123456789012:key-value-store/1a2b").is_ok());
        for wrong in [
            "",
            "1a2b",
            "arn:aws:cloudfront::123456789012:distribution/E1",
            "arn:aws:cloudfront:us-east-1:123456789012:key-value-store/1a2b",
            "arn:aws:s3::123456789012:key-value-store/1a2b",
            "arn:aws:cloudfront::1234:key-value-store/1a2b",
            "arn:aws:cloudfront::123456789012:key-value-store/",
        ] {
            let error = check_arn(wrong).unwrap_err();
            assert!(error.what.contains("look like arn:aws:cloudfront::"), "{wrong}: {error}");
        }
    }
}
