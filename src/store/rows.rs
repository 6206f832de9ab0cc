//! Rows as the engine sees them, and the reading of each.

use std::time::Duration;

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::StoreError;
use crate::keys::{
    Boundary, DekId, DekVersion, Edge, IvMode, KeyId, KeyMethod, KeyState, MediaSequenceNumber, Ordinal,
    Timestamp,
};

/// A wrapped data encryption key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DekRow {
    pub id: DekId,
    pub version: DekVersion,
    /// Which key of the KMS wraps it.
    pub kek_id: String,
    pub wrapped: Vec<u8>,
    pub created_at: Timestamp,
}

/// A wrapped content key with its link key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    pub id: KeyId,
    pub ordinal: Ordinal,
    pub dek: DekId,
    pub method: KeyMethod,
    pub iv_mode: IvMode,
    /// Empty once the key is destroyed.
    pub wrapped: Vec<u8>,
    pub state: KeyState,
    pub created_at: Timestamp,
    pub activated_at: Option<Timestamp>,
    /// Whether time or an operator promoted it: every rendition must go over to it.
    pub forced: bool,
    pub deactivated_at: Option<Timestamp>,
}

/// A boundary with its place in its rendition's list and the window that it was planned from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoundaryRow {
    pub rendition: String,
    pub boundary: Boundary,
    pub edge: Edge,
}

/// What a restart must know of a rendition besides its boundaries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenditionRow {
    pub rendition: String,
    pub ended: bool,
    pub keeps_all: bool,
    pub longest_playlist: Duration,
}

/// All that is kept of one stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredStream {
    /// In the order of their versions.
    pub deks: Vec<DekRow>,
    /// In the order of their ordinals.
    pub keys: Vec<KeyRow>,
    /// By rendition, then in order.
    pub boundaries: Vec<BoundaryRow>,
    pub renditions: Vec<RenditionRow>,
}

fn unreadable(what: &'static str, value: impl ToString) -> StoreError {
    StoreError::Unreadable { what, value: value.to_string() }
}

fn unsigned<T: TryFrom<i64>>(row: &SqliteRow, column: &'static str) -> Result<T, StoreError> {
    let value: i64 = row.try_get(column)?;
    T::try_from(value).map_err(|_| unreadable(column, value))
}

fn time(row: &SqliteRow, column: &'static str) -> Result<Timestamp, StoreError> {
    Ok(Timestamp::from_unix_millis(row.try_get(column)?))
}

fn optional_time(row: &SqliteRow, column: &'static str) -> Result<Option<Timestamp>, StoreError> {
    Ok(row.try_get::<Option<i64>, _>(column)?.map(Timestamp::from_unix_millis))
}

fn id<T: std::str::FromStr>(row: &SqliteRow, column: &'static str) -> Result<T, StoreError> {
    let text: String = row.try_get(column)?;
    text.parse().map_err(|_| unreadable(column, text))
}

impl DekRow {
    pub(super) fn read(row: &SqliteRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: id(row, "id")?,
            version: DekVersion(unsigned(row, "version")?),
            kek_id: row.try_get("kek_id")?,
            wrapped: row.try_get("wrapped")?,
            created_at: time(row, "created_at")?,
        })
    }
}

impl KeyRow {
    pub(super) fn read(row: &SqliteRow) -> Result<Self, StoreError> {
        let method: String = row.try_get("method")?;
        let iv_mode: String = row.try_get("iv_mode")?;
        let state: String = row.try_get("state")?;
        let activated_for: Option<String> = row.try_get("activated_for")?;
        Ok(Self {
            id: id(row, "id")?,
            ordinal: Ordinal(unsigned(row, "ordinal")?),
            dek: id(row, "dek_id")?,
            method: KeyMethod::from_name(&method).ok_or_else(|| unreadable("method", method))?,
            iv_mode: IvMode::from_name(&iv_mode).ok_or_else(|| unreadable("iv_mode", iv_mode))?,
            wrapped: row.try_get("wrapped")?,
            state: KeyState::from_name(&state).ok_or_else(|| unreadable("state", state))?,
            created_at: time(row, "created_at")?,
            activated_at: optional_time(row, "activated_at")?,
            forced: activated_for.as_deref() == Some(super::sqlite::FORCED),
            deactivated_at: optional_time(row, "deactivated_at")?,
        })
    }
}

impl BoundaryRow {
    pub(super) fn read(row: &SqliteRow) -> Result<Self, StoreError> {
        Ok(Self {
            rendition: row.try_get("rendition")?,
            boundary: Boundary {
                epoch: unsigned(row, "epoch")?,
                ordinal: Ordinal(unsigned(row, "ordinal")?),
                first: MediaSequenceNumber(unsigned(row, "first_msn")?),
            },
            edge: Edge {
                first: MediaSequenceNumber(unsigned(row, "edge_first")?),
                end: MediaSequenceNumber(unsigned(row, "edge_end")?),
            },
        })
    }
}

impl RenditionRow {
    pub(super) fn read(row: &SqliteRow) -> Result<Self, StoreError> {
        Ok(Self {
            rendition: row.try_get("rendition")?,
            ended: row.try_get("ended")?,
            keeps_all: row.try_get("keeps_all")?,
            longest_playlist: Duration::from_millis(unsigned(row, "longest_playlist_millis")?),
        })
    }
}
