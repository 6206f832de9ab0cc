//! AES-256-GCM as HLS has it: IV ‖ ciphertext ‖ tag.
//!
//! After draft-pantos-hls-rfc8216bis-22 §4.4.4.4: the segment begins with its 16-byte IV and ends with the 16-byte
//! tag. A player can use nothing of it before it has the tag, and the IV depends on the whole plaintext
//! ([`crate::keys::LinkKey::gcm_iv`]), so there are no chunks here.

use aes::Aes256;
use aes_gcm::aead::AeadInOut;
use aes_gcm::aead::consts::U16;
use aes_gcm::{AesGcm, KeyInit};
use bytes::{Bytes, BytesMut};

use crate::keys::{ContentKey, Iv};

/// How much longer a sealed segment is than its plaintext: the IV and the tag.
pub const GCM_OVERHEAD: u64 = 32;

/// Seals one Media Segment under a key of 32 bytes.
///
/// # Panics
/// With a key of another length: the method and the length of a content key go together.
pub fn seal_segment(key: &ContentKey, iv: Iv, plaintext: &[u8]) -> Bytes {
    let cipher =
        AesGcm::<Aes256, U16>::new_from_slice(key.expose()).expect("a key of AES-256-GCM has 32 bytes");
    let mut out = BytesMut::with_capacity(plaintext.len() + GCM_OVERHEAD as usize);
    out.extend_from_slice(&iv.0);
    out.extend_from_slice(plaintext);
    let tag = cipher.encrypt_inout_detached(&iv.0.into(), b"", (&mut out[16..]).into());
    // NIST SP 800-38D §5.2.1.1: a plaintext may have 64 GiB, and segments are bounded far below.
    out.extend_from_slice(&tag.expect("a segment is shorter than 64 GiB"));
    out.freeze()
}

#[cfg(test)]
mod tests {
    use aes_gcm::aead::Aead;

    use super::*;
    use crate::keys::{CONTENT_SECRET_LEN, ContentSecrets, KeyMethod};

    fn key() -> ContentKey {
        ContentSecrets::from_random(KeyMethod::Aes256Gcm, &[7; CONTENT_SECRET_LEN]).content
    }

    #[test]
    fn a_sealed_segment_is_its_iv_its_ciphertext_and_its_tag() {
        let plaintext = vec![0x47; 188 * 3 + 1];
        let sealed = seal_segment(&key(), Iv([9; 16]), &plaintext);
        assert_eq!(sealed.len() as u64, plaintext.len() as u64 + GCM_OVERHEAD);
        assert_eq!(sealed[..16], [9; 16]);
        let cipher = AesGcm::<Aes256, U16>::new_from_slice(&[7; 32]).unwrap();
        assert_eq!(cipher.decrypt(&[9; 16].into(), &sealed[16..]).unwrap(), plaintext);
    }

    #[test]
    fn openssl_gives_the_same_for_an_iv_of_16_bytes() {
        let sealed = seal_segment(&key(), Iv([9; 16]), b"keyshield");
        assert_eq!(hex::encode(&sealed[16..]), OPENSSL);
    }

    /// What OpenSSL gives for the same key, IV and plaintext: ciphertext and tag.
    const OPENSSL: &str = "a9eff446071f511b33bdd91ef4d385a1cb1d3124e3f8587d7e";
}
