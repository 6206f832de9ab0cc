//! Who wraps the data encryption keys: the local master key file.
//!
//! Deliberately absent: the content keys, which are wrapped under a DEK without any call (`keys::seal`).

mod local;

pub use local::{LocalKms, MasterKeyError};
