//! Secrets: types of their own that clear their memory and cannot be printed.
//!
//! Nothing here implements `Display` or `Serialize`, `Debug` shows the type's name alone, and the bytes are
//! overwritten on drop. Bytes leave by one method a type, whose name says so, which makes every place that
//! touches raw key bytes easy to find.

use std::fmt;

use thiserror::Error;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::policy::KeyMethod;

/// Why a secret could not be made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SecretError {
    #[error("unwrapped secrets have {found} bytes, {expected} were expected")]
    WrongLength { expected: usize, found: usize },
}

macro_rules! redacted {
    ($name:ident) => {
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(redacted)"))
            }
        }
    };
}

/// What encrypts Media Segments: 16 bytes for AES-128, 32 for AES-256 and AES-256-GCM.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct ContentKey {
    bytes: [u8; 32],
    len: usize,
}
redacted!(ContentKey);

impl ContentKey {
    /// The key's raw octets, as the key endpoint serves them (RFC 8216 §5.1).
    pub fn expose(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// A content key's companion: signs segment links and derives IVs, and never leaves the shield.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct LinkKey([u8; 32]);
redacted!(LinkKey);

impl LinkKey {
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub(super) fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Wraps the content keys of one stream; is itself wrapped by the KMS.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct DataEncryptionKey([u8; 32]);
redacted!(DataEncryptionKey);

impl DataEncryptionKey {
    pub const LEN: usize = 32;

    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// For the KMS, which wraps it.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Random bytes that one content key with its link key is made of.
pub const CONTENT_SECRET_LEN: usize = 64;

/// A content key with its link key: generated, wrapped, unwrapped and destroyed together.
#[derive(Debug, Clone)]
pub struct ContentSecrets {
    pub content: ContentKey,
    pub link: LinkKey,
}

impl ContentSecrets {
    /// Both secrets from random bytes: the first 32 for the content key (a shorter key takes their head),
    /// the last 32 for the link key.
    pub fn from_random(method: KeyMethod, random: &[u8; CONTENT_SECRET_LEN]) -> Self {
        let mut bytes = [0; 32];
        let len = method.key_len();
        bytes[..len].copy_from_slice(&random[..len]);
        let mut link = [0; 32];
        link.copy_from_slice(&random[32..]);
        Self { content: ContentKey { bytes, len }, link: LinkKey(link) }
    }

    /// The plaintext that goes into an envelope: content key ‖ link key.
    pub fn to_plaintext(&self) -> Zeroizing<Vec<u8>> {
        let mut plaintext = Zeroizing::new(Vec::with_capacity(CONTENT_SECRET_LEN));
        plaintext.extend_from_slice(self.content.expose());
        plaintext.extend_from_slice(self.link.expose());
        plaintext
    }

    /// The reverse of [`Self::to_plaintext`].
    ///
    /// # Errors
    /// [`SecretError::WrongLength`] when the bytes are not a key of `method` and a link key.
    pub fn from_plaintext(method: KeyMethod, plaintext: &[u8]) -> Result<Self, SecretError> {
        let len = method.key_len();
        let expected = len + 32;
        if plaintext.len() != expected {
            return Err(SecretError::WrongLength { expected, found: plaintext.len() });
        }
        let mut random = Zeroizing::new([0; CONTENT_SECRET_LEN]);
        random[..len].copy_from_slice(&plaintext[..len]);
        random[32..].copy_from_slice(&plaintext[len..]);
        Ok(Self::from_random(method, &random))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_shows_no_byte_of_a_secret() {
        let secrets = ContentSecrets::from_random(KeyMethod::Aes128, &[0xa5; CONTENT_SECRET_LEN]);
        let dek = DataEncryptionKey::from_bytes([0xa5; 32]);
        let shown = format!("{secrets:?} {dek:?}");
        assert!(!shown.contains("a5") && !shown.contains("165"), "{shown}");
    }

    #[test]
    fn secrets_survive_the_way_through_their_plaintext() {
        for method in KeyMethod::ALL {
            let random: [u8; CONTENT_SECRET_LEN] = std::array::from_fn(|i| i as u8);
            let secrets = ContentSecrets::from_random(method, &random);
            assert_eq!(secrets.content.expose().len(), method.key_len());
            let again = ContentSecrets::from_plaintext(method, &secrets.to_plaintext()).unwrap();
            assert_eq!(again.content.expose(), secrets.content.expose());
            assert_eq!(again.link.expose(), secrets.link.expose());
        }
    }

    #[test]
    fn a_plaintext_of_another_method_is_refused() {
        let random = [7; CONTENT_SECRET_LEN];
        let long = ContentSecrets::from_random(KeyMethod::Aes256, &random).to_plaintext();
        let refused = ContentSecrets::from_plaintext(KeyMethod::Aes128, &long).unwrap_err();
        assert_eq!(refused, SecretError::WrongLength { expected: 48, found: 64 });
    }
}
