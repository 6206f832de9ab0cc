//! Keys: what they are, how they are kept, when a segment gets which one.
//!
//! Pure. Random bytes and the present time come in as arguments; plans go out as values with their
//! reasons, and the engine carries them out. Deliberately absent: storage, clocks, randomness, and any
//! knowledge of playlist text or HTTP.

mod delivery;
mod derive;
mod edge;
mod envelope;
#[cfg(test)]
mod histories;
mod ids;
mod lifecycle;
mod plan;
mod policy;
mod schedule;
mod secret;
mod sweep;
mod time;

pub use delivery::{CdnSet, belongs_at_edges};
pub use derive::{ByteRange, Iv, IvMode, LinkMac, Place, RenditionTag, Resource};
pub use edge::{
    CheckValue, EDGE_NONCE_LEN, EdgeCipher, EdgeError, EdgeSecret, KEY_HEADER, SERVED_BY_HEADER,
    SERVED_BY_SHIELD, SealedKey, TokenScope, open_at_edge, seal_for_edge, viewer_token,
};
pub use envelope::{Context, EnvelopeError, NONCE_LEN, SEAL_OVERHEAD, open, seal};
pub use ids::{DekId, DekVersion, IdError, IncidentId, KeyId, MediaSequenceNumber, Ordinal, StreamId};
pub use lifecycle::{KeyState, TRANSITIONS, Transition};
pub use plan::{Situation, plan};
pub use policy::{KeyMethod, NO_IV_MODE, OnEncrypted, Policy, PolicyError, Subtitles, SyncPolicy};
pub use schedule::{Boundary, Edge, Marks, PlaylistWindow, Reason, Schedule};
pub use secret::{CONTENT_SECRET_LEN, ContentKey, ContentSecrets, DataEncryptionKey, LinkKey, SecretError};
pub use sweep::{
    KeyFacts, KeyOp, OVERDUE_AFTER, REPORT_INTERVAL, REPORT_SLACK, RenditionFacts, StreamFacts, sweep,
};
pub use time::Timestamp;
