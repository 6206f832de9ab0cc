//! Keys at the edge of a CDN: sealed for its store, proven by a check value, given out against a token.
//!
//! What an edge store holds can be listed by whoever may use the vendor's API, so it holds no key that can be read:
//! a key is sealed under an *edge secret* that the code at the edge has and its store has not. The format is made for
//! the least able of three languages (a CloudFront function has HMAC alone, Fastly's VCL no binary strings): text,
//! hexadecimal, and HMAC under keys that are text themselves. Encrypt-then-MAC with independent keys
//! (draft-mcgrew-aead-aes-cbc-hmac-sha2 is built so), a nonce for every sealing.
//!
//! ```text
//! 1:{cipher}:{stream}:{nonce}:{ciphertext}:{tag}        nonce, ciphertext, tag: lower-case hex
//! tag        = HMAC-SHA-256(MAC key, "{key ID}:1:{cipher}:{stream}:{nonce}:{ciphertext}")
//! cipher ctr: AES-256-CTR, the nonce is the first counter block
//! cipher hmac: key ⊕ HMAC-SHA-256(encryption key as hex text, nonce as hex text), cut to the key's length
//! ```

use aes::Aes256;
use ctr::Ctr128BE;
use ctr::cipher::{KeyIvInit, StreamCipher};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use std::fmt;
use std::str::FromStr;
use subtle::ConstantTimeEq;
use thiserror::Error;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::ids::{KeyId, StreamId};
use super::secret::ContentKey;
use super::time::Timestamp;

/// The header that names the key that an answer is, or was encrypted under.
pub const KEY_HEADER: &str = "keyshield-key";
/// The header that says who answered for a key: `edge`, out of its own store, or [`SERVED_BY_SHIELD`].
pub const SERVED_BY_HEADER: &str = "keyshield-served-by";
/// See [`SERVED_BY_HEADER`].
pub const SERVED_BY_SHIELD: &str = "shield";

/// Bytes of a nonce; the caller draws them at random, new for every sealing.
pub const EDGE_NONCE_LEN: usize = 16;

/// The longest key that is sealed, in bytes.
const MAX_KEY_LEN: usize = 32;

/// Why an edge secret or a sealed key is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EdgeError {
    #[error("an edge secret is 64 hexadecimal digits, such as `openssl rand -hex 32` prints")]
    BadSecret,
    #[error("this is not a sealed key of this version")]
    BadFormat,
    #[error("a sealed key was changed, moved to another key ID, or sealed under another secret")]
    BadTag,
}

/// What seals keys for one CDN, and is known to the code at its edge.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct EdgeSecret([u8; 32]);

impl fmt::Debug for EdgeSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EdgeSecret(redacted)")
    }
}

impl FromStr for EdgeSecret {
    type Err = EdgeError;

    fn from_str(text: &str) -> Result<Self, EdgeError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text.trim(), &mut bytes).map_err(|_| EdgeError::BadSecret)?;
        Ok(Self(bytes))
    }
}

impl EdgeSecret {
    /// For encryption, as 64 hex digits: what the code at the edge is given.
    pub fn encryption_key(&self) -> Zeroizing<String> {
        self.derived("keyshield edge encryption 1")
    }

    /// For the tags of sealed keys, as 64 hex digits, whose text is the HMAC key: what the code at the edge is given.
    pub fn mac_key(&self) -> Zeroizing<String> {
        self.derived("keyshield edge authentication 1")
    }

    /// For viewers' tokens, as 64 hex digits, whose text is the HMAC key: what the code at the edge is given.
    pub fn token_key(&self) -> Zeroizing<String> {
        self.derived("keyshield edge tokens 1")
    }

    /// Tells secrets apart without telling what they are: 16 hex digits.
    pub fn fingerprint(&self) -> String {
        self.derived("keyshield edge fingerprint 1")[..16].to_owned()
    }

    fn derived(&self, label: &str) -> Zeroizing<String> {
        Zeroizing::new(hex::encode(hmac(&self.0, &[label])))
    }
}

/// How a sealed key is encrypted: by what the language at the edge has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EdgeCipher {
    /// AES-256-CTR.
    Ctr,
    /// HMAC-SHA-256 as the keystream.
    Hmac,
}

impl EdgeCipher {
    fn name(self) -> &'static str {
        match self {
            EdgeCipher::Ctr => "ctr",
            EdgeCipher::Hmac => "hmac",
        }
    }
}

/// A key as an edge store holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedKey {
    pub key: KeyId,
    /// The format of this file; at most 300 characters.
    pub text: String,
}

/// Seals a key for the edge.
pub fn seal_for_edge(
    secret: &EdgeSecret,
    cipher: EdgeCipher,
    (stream, id): (&StreamId, KeyId),
    content: &ContentKey,
    nonce: &[u8; EDGE_NONCE_LEN],
) -> SealedKey {
    let mut bytes = Zeroizing::new(content.expose().to_vec());
    encrypt(secret, cipher, nonce, &mut bytes);
    let head = format!("1:{}:{stream}:{}:{}", cipher.name(), hex::encode(nonce), hex::encode(&*bytes));
    let tag = tag(secret, id, &head);
    SealedKey { key: id, text: format!("{head}:{tag}") }
}

/// The reverse of [`seal_for_edge`], as the code at the edge does it: the stream and the key.
///
/// # Errors
/// What is no sealed key, or not this one.
pub fn open_at_edge(
    secret: &EdgeSecret,
    sealed: &SealedKey,
) -> Result<(StreamId, Zeroizing<Vec<u8>>), EdgeError> {
    let (head, given) = sealed.text.rsplit_once(':').ok_or(EdgeError::BadFormat)?;
    let expected = tag(secret, sealed.key, head);
    if !bool::from(expected.as_bytes().ct_eq(given.as_bytes())) {
        return Err(EdgeError::BadTag);
    }
    let parts: Vec<_> = head.split(':').collect();
    let ["1", cipher, stream, nonce, ciphertext] = parts[..] else { return Err(EdgeError::BadFormat) };
    let cipher = match cipher {
        "ctr" => EdgeCipher::Ctr,
        "hmac" => EdgeCipher::Hmac,
        _ => return Err(EdgeError::BadFormat),
    };
    let mut bytes = [0; EDGE_NONCE_LEN];
    hex::decode_to_slice(nonce, &mut bytes).map_err(|_| EdgeError::BadFormat)?;
    let mut key = Zeroizing::new(hex::decode(ciphertext).map_err(|_| EdgeError::BadFormat)?);
    if key.len() > MAX_KEY_LEN {
        return Err(EdgeError::BadFormat);
    }
    encrypt(secret, cipher, &bytes, &mut key);
    Ok((stream.parse().map_err(|_| EdgeError::BadFormat)?, key))
}

/// Both ways: what is added is taken away by adding it again.
fn encrypt(secret: &EdgeSecret, cipher: EdgeCipher, nonce: &[u8; EDGE_NONCE_LEN], bytes: &mut [u8]) {
    let key = secret.encryption_key();
    match cipher {
        EdgeCipher::Ctr => {
            let mut raw = Zeroizing::new([0; 32]);
            hex::decode_to_slice(&*key, &mut *raw).expect("it was written as 64 hex digits");
            Ctr128BE::<Aes256>::new((&*raw).into(), nonce.into()).apply_keystream(bytes);
        }
        EdgeCipher::Hmac => {
            let stream = Zeroizing::new(hmac(key.as_bytes(), &[&hex::encode(nonce)]));
            bytes.iter_mut().zip(stream.iter()).for_each(|(byte, key)| *byte ^= key);
        }
    }
}

fn tag(secret: &EdgeSecret, id: KeyId, head: &str) -> String {
    hex::encode(hmac(secret.mac_key().as_bytes(), &[&id.to_string(), ":", head]))
}

/// Shows that somebody has a key without showing the key: 64 bits of an HMAC under it, 16 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckValue([u8; 8]);

impl CheckValue {
    /// HMAC-SHA-256 under the key's lower-case hex text, over "keyshield check {key ID}", cut.
    pub fn of(id: KeyId, content: &ContentKey) -> Self {
        let key = Zeroizing::new(hex::encode(content.expose()));
        let mac = hmac(key.as_bytes(), &["keyshield check ", &id.to_string()]);
        Self(std::array::from_fn(|i| mac[i]))
    }
}

impl fmt::Display for CheckValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl FromStr for CheckValue {
    type Err = EdgeError;

    fn from_str(text: &str) -> Result<Self, EdgeError> {
        let mut bytes = [0; 8];
        hex::decode_to_slice(text.trim(), &mut bytes).map_err(|_| EdgeError::BadFormat)?;
        Ok(Self(bytes))
    }
}

/// What a viewer's token is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenScope {
    Stream(StreamId),
    AllStreams,
}

impl fmt::Display for TokenScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TokenScope::Stream(stream) => f.write_str(stream.as_str()),
            TokenScope::AllStreams => f.write_str("*"),
        }
    }
}

/// What a viewer shows to the code at the edge, in the query parameter `token` of a key URI:
/// `{expires}~{scope}~{mac}`. `expires`: seconds since 1970; `scope`: a stream ID or `*`; `mac`: HMAC-SHA-256 over
/// what stands before it, in hex, under the token key's text.
pub fn viewer_token(secret: &EdgeSecret, scope: &TokenScope, expires: Timestamp) -> String {
    let head = format!("{}~{scope}", expires.as_unix_millis() / 1_000);
    let mac = hex::encode(hmac(secret.token_key().as_bytes(), &[&head]));
    format!("{head}~{mac}")
}

fn hmac(key: &[u8], parts: &[&str]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    parts.iter().for_each(|part| mac.update(part.as_bytes()));
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{CONTENT_SECRET_LEN, ContentSecrets, KeyMethod};

    fn secret() -> EdgeSecret {
        "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff".parse().unwrap()
    }

    fn content(method: KeyMethod) -> ContentKey {
        let random: [u8; CONTENT_SECRET_LEN] = std::array::from_fn(|i| i as u8);
        ContentSecrets::from_random(method, &random).content
    }

    fn sealed(cipher: EdgeCipher, method: KeyMethod) -> SealedKey {
        let (stream, id) = ("ch1.hd".parse().unwrap(), KeyId::from_bytes([0xab; 16]));
        seal_for_edge(&secret(), cipher, (&stream, id), &content(method), &[7; EDGE_NONCE_LEN])
    }

    #[test]
    fn what_is_sealed_opens_and_shows_nothing() {
        for cipher in [EdgeCipher::Ctr, EdgeCipher::Hmac] {
            for method in KeyMethod::ALL {
                let sealed = sealed(cipher, method);
                assert!(sealed.text.len() <= 300 && !sealed.text.contains("000102030405"), "{}", sealed.text);
                let (stream, key) = open_at_edge(&secret(), &sealed).unwrap();
                assert_eq!((stream.as_str(), &key[..]), ("ch1.hd", content(method).expose()));
            }
        }
    }

    #[test]
    fn what_was_changed_or_moved_does_not_open() {
        let good = sealed(EdgeCipher::Ctr, KeyMethod::Aes128);
        for at in 0..good.text.len() {
            let mut text = good.text.clone().into_bytes();
            text[at] = if text[at] == b'0' { b'1' } else { b'0' };
            let bad = SealedKey { text: String::from_utf8(text).unwrap(), ..good.clone() };
            assert!(open_at_edge(&secret(), &bad).is_err(), "{}", bad.text);
        }
        let moved = SealedKey { key: KeyId::from_bytes([1; 16]), ..good };
        assert_eq!(open_at_edge(&secret(), &moved), Err(EdgeError::BadTag));
    }

    /// The code at the edges is tested against the same values (`tests/it/edge`).
    #[test]
    fn the_formats_are_what_the_edges_read() {
        let expected = |cipher| sealed(cipher, KeyMethod::Aes128).text;
        let head = format!("1:ctr:ch1.hd:{}:", "07".repeat(16));
        assert!(expected(EdgeCipher::Ctr).starts_with(&head), "{}", expected(EdgeCipher::Ctr));
        assert!(expected(EdgeCipher::Hmac).starts_with("1:hmac:ch1.hd:"));
        let id = KeyId::from_bytes([0xab; 16]);
        let check = CheckValue::of(id, &content(KeyMethod::Aes128));
        assert_eq!(check.to_string().parse(), Ok(check));
        assert_eq!(check.to_string().len(), 16);
        let token = viewer_token(
            &secret(),
            &TokenScope::Stream("ch1".parse().unwrap()),
            Timestamp::from_unix_millis(1_800_000_000_999),
        );
        assert!(token.starts_with("1800000000~ch1~") && token.len() == 15 + 64, "{token}");
    }

    #[test]
    fn a_secret_is_read_from_hex_and_never_shown() {
        assert_eq!("abc".parse::<EdgeSecret>(), Err(EdgeError::BadSecret));
        assert_eq!(format!("{:?}", secret()), "EdgeSecret(redacted)");
        let keys = [secret().encryption_key(), secret().mac_key(), secret().token_key()];
        assert!(keys[0] != keys[1] && keys[1] != keys[2] && keys[0] != keys[2]);
    }
}
