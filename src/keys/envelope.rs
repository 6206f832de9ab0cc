//! The envelope: AES-256-GCM with the context bound in.
//!
//! A wrapped secret is `nonce (12) ‖ ciphertext ‖ tag (16)`. What it belongs to is not stored beside it but
//! authenticated with it: every part of the context goes into the AAD behind its length, so that no two
//! different contexts give the same bytes, and a row moved to another stream or ordinal does not open.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use thiserror::Error;
use zeroize::Zeroizing;

use super::ids::{DekId, DekVersion, KeyId, Ordinal, StreamId};

/// Bytes of random nonce that [`seal`] needs (NIST SP 800-38D §8.2.2).
pub const NONCE_LEN: usize = 12;
/// How much longer than its plaintext a wrapped secret is.
pub const SEAL_OVERHEAD: usize = NONCE_LEN + 16;

/// What a wrapped secret belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Context<'a> {
    /// A stream's DEK, wrapped by the KMS's key.
    Dek { stream: &'a StreamId, dek: DekId, version: DekVersion },
    /// A content key and its link key, wrapped by the stream's DEK.
    Content { stream: &'a StreamId, key: KeyId, ordinal: Ordinal, version: DekVersion },
}

impl Context<'_> {
    /// The additional authenticated data: every part behind its length (u32, big endian).
    pub fn aad(&self) -> Vec<u8> {
        let mut aad = Vec::with_capacity(96);
        let mut put = |part: &[u8]| {
            aad.extend_from_slice(&(part.len() as u32).to_be_bytes());
            aad.extend_from_slice(part);
        };
        match self {
            Context::Dek { stream, dek, version } => {
                put(b"keyshield/1 dek");
                put(stream.as_str().as_bytes());
                put(dek.as_bytes());
                put(&version.0.to_be_bytes());
            }
            Context::Content { stream, key, ordinal, version } => {
                put(b"keyshield/1 content");
                put(stream.as_str().as_bytes());
                put(key.as_bytes());
                put(&ordinal.0.to_be_bytes());
                put(&version.0.to_be_bytes());
            }
        }
        aad
    }

    /// The same parts by their names and in words, for a KMS that shows them to operators and lets policies ask for them.
    /// No two different contexts have the same.
    pub fn named_parts(&self) -> Vec<(&'static str, String)> {
        let (purpose, stream, version) = match self {
            Context::Dek { stream, version, .. } => ("dek", stream, version),
            Context::Content { stream, version, .. } => ("content", stream, version),
        };
        let mut parts = vec![
            ("purpose", purpose.to_owned()),
            ("stream", stream.to_string()),
            ("version", version.0.to_string()),
        ];
        match self {
            Context::Dek { dek, .. } => parts.push(("dek", hex::encode(dek.as_bytes()))),
            Context::Content { key, ordinal, .. } => {
                parts.push(("key", hex::encode(key.as_bytes())));
                parts.push(("ordinal", ordinal.0.to_string()));
            }
        }
        parts
    }
}

/// Why a wrapped secret did not open. Says nothing about the bytes themselves.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EnvelopeError {
    #[error("the wrapped secret is {found} bytes long, too short to be one")]
    TooShort { found: usize },
    #[error("the wrapped secret does not open: another wrapping key, another context, or changed bytes")]
    NotAuthentic,
}

/// Wraps `plaintext` under a 256-bit key. The nonce must be fresh random bytes.
pub fn seal(key: &[u8; 32], nonce: [u8; NONCE_LEN], context: &Context<'_>, plaintext: &[u8]) -> Vec<u8> {
    let aad = context.aad();
    let sealed = Aes256Gcm::new(key.into())
        .encrypt(&Nonce::from(nonce), Payload { msg: plaintext, aad: &aad })
        // AES-GCM refuses only plaintexts beyond 64 GiB; secrets have at most 64 bytes.
        .expect("a secret is far below AES-GCM's length limit");
    [&nonce[..], &sealed].concat()
}

/// Unwraps what [`seal`] made under the same key and context.
///
/// # Errors
/// [`EnvelopeError`] when the bytes are too short, or do not authenticate.
pub fn open(
    key: &[u8; 32],
    context: &Context<'_>,
    sealed: &[u8],
) -> Result<Zeroizing<Vec<u8>>, EnvelopeError> {
    let Some((nonce, body)) = sealed.split_first_chunk::<NONCE_LEN>() else {
        return Err(EnvelopeError::TooShort { found: sealed.len() });
    };
    let aad = context.aad();
    Aes256Gcm::new(key.into())
        .decrypt(&Nonce::from(*nonce), Payload { msg: body, aad: &aad })
        .map(Zeroizing::new)
        .map_err(|_| EnvelopeError::NotAuthentic)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(id: &str) -> StreamId {
        id.parse().unwrap()
    }

    fn content(stream: &StreamId, ordinal: u32) -> Context<'_> {
        let key = KeyId::from_bytes([3; 16]);
        Context::Content { stream, key, ordinal: Ordinal(ordinal), version: DekVersion(1) }
    }

    #[test]
    fn opens_only_under_its_own_key_and_context() {
        let (ch1, ch2) = (stream("ch1"), stream("ch2"));
        let sealed = seal(&[1; 32], [9; NONCE_LEN], &content(&ch1, 4), b"secret");
        assert_eq!(sealed.len(), 6 + SEAL_OVERHEAD);
        assert_eq!(&open(&[1; 32], &content(&ch1, 4), &sealed).unwrap()[..], b"secret");

        let not_authentic = Err(EnvelopeError::NotAuthentic);
        assert_eq!(open(&[2; 32], &content(&ch1, 4), &sealed), not_authentic);
        assert_eq!(open(&[1; 32], &content(&ch2, 4), &sealed), not_authentic);
        assert_eq!(open(&[1; 32], &content(&ch1, 5), &sealed), not_authentic);
        let dek = Context::Dek { stream: &ch1, dek: DekId::from_bytes([3; 16]), version: DekVersion(1) };
        assert_eq!(open(&[1; 32], &dek, &sealed), not_authentic);
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let ch1 = stream("ch1");
        let sealed = seal(&[1; 32], [9; NONCE_LEN], &content(&ch1, 4), b"secret");
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            let opened = open(&[1; 32], &content(&ch1, 4), &changed);
            assert_eq!(opened, Err(EnvelopeError::NotAuthentic), "byte {at}");
        }
        let too_short = Err(EnvelopeError::TooShort { found: 5 });
        assert_eq!(open(&[1; 32], &content(&ch1, 4), &sealed[..5]), too_short);
    }

    #[test]
    fn no_two_contexts_share_their_authenticated_data() {
        let (a, b) = (stream("ab"), stream("a"));
        assert_ne!(content(&a, 1).aad(), content(&b, 1).aad());
    }

    #[test]
    fn every_part_of_a_context_is_in_its_words() {
        let (a, b) = (stream("a"), stream("b"));
        let dek = |stream, id, version| Context::Dek {
            stream,
            dek: DekId::from_bytes([id; 16]),
            version: DekVersion(version),
        };
        let words = [
            dek(&a, 3, 1).named_parts(),
            dek(&b, 3, 1).named_parts(),
            dek(&a, 4, 1).named_parts(),
            dek(&a, 3, 2).named_parts(),
            content(&a, 1).named_parts(),
            content(&a, 2).named_parts(),
        ];
        let different: std::collections::BTreeSet<_> = words.iter().collect();
        assert_eq!(different.len(), words.len(), "{words:?}");
        let expected = [
            ("purpose", "dek"),
            ("stream", "a"),
            ("version", "1"),
            ("dek", "03030303030303030303030303030303"),
        ];
        assert_eq!(words[0], expected.map(|(name, value)| (name, value.to_owned())));
    }
}
