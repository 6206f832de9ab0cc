//! Keys: what they are, how they are kept, when a segment gets which one.
//!
//! Pure. Random bytes and the present time come in as arguments; plans go out as values with their
//! reasons, and the engine carries them out. Deliberately absent: storage, clocks, randomness, and any
//! knowledge of playlist text or HTTP.

mod derive;
mod envelope;
mod ids;
mod policy;
mod schedule;
mod secret;
mod sweep;
mod time;

pub use derive::{Iv, IvMode, LinkMac, Place, Resource};
pub use envelope::{Context, EnvelopeError, NONCE_LEN, SEAL_OVERHEAD, open, seal};
pub use ids::{DekId, DekVersion, IdError, KeyId, MediaSequenceNumber, Ordinal, StreamId};
pub use policy::{KeyMethod, Policy, PolicyError};
pub use schedule::{Boundary, Edge, Marks, PlaylistWindow, Reason, Schedule, Situation, plan};
pub use secret::{CONTENT_SECRET_LEN, ContentKey, ContentSecrets, DataEncryptionKey, LinkKey, SecretError};
pub use sweep::{KeyFacts, KeyOp, KeyState, RenditionFacts, StreamFacts, sweep};
pub use time::Timestamp;
