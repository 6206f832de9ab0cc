//! Segment encryption: bytes in, bytes out.
//!
//! Pure. A segment is one AES-CBC chain with PKCS#7 padding that begins anew with each segment (RFC 8216
//! §4.3.2.4). Deliberately absent: where bytes come from, who waits for them, and which key a segment gets.

mod segment;

pub use segment::{SegmentEncryptor, ciphertext_len};
