//! Segment encryption: bytes in, bytes out.
//!
//! Pure. Under AES-128 and AES-256 a segment is one CBC chain with PKCS#7 padding that begins anew with each
//! segment (RFC 8216 §4.3.2.4), chunk in, chunk out; under AES-256-GCM it is sealed whole. Deliberately absent: where
//! bytes come from, who waits for them, and which key a segment gets.

mod decrypt;
mod gcm;
mod segment;

pub use decrypt::{PaddingError, SegmentDecryptor};
pub use gcm::{GCM_OVERHEAD, seal_segment};
pub use segment::{SegmentEncryptor, ciphertext_len};
