//! The other direction: a segment that its origin has encrypted under AES-128-CBC, chunk in, chunk out.
//!
//! For streams that are encrypted anew. The last block is kept back until it is known to be the last, because its
//! padding is no plaintext.

use aes::Aes128;
use aes::cipher::block_padding::Pkcs7;
use aes::cipher::{Block, BlockModeDecrypt, KeyIvInit};
use bytes::BytesMut;
use cbc::Decryptor;
use thiserror::Error;

use crate::keys::Iv;

const BLOCK: usize = 16;

/// What was decrypted is not what was encrypted: another key, another IV, or a body that is not encrypted at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("it does not decrypt under the key and IV that its playlist names")]
pub struct PaddingError;

/// Decrypts one Media Segment under AES-128-CBC with PKCS#7 padding (RFC 8216 §4.3.2.4).
pub struct SegmentDecryptor {
    chain: Decryptor<Aes128>,
    /// What may belong to the last block: at most one.
    rest: BytesMut,
}

impl SegmentDecryptor {
    pub fn new(key: &[u8; 16], iv: Iv) -> Self {
        Self { chain: Decryptor::new(key.into(), &iv.0.into()), rest: BytesMut::with_capacity(BLOCK) }
    }

    /// Takes the next bytes of ciphertext and gives back the plaintext that is known with them.
    pub fn update(&mut self, ciphertext: &[u8]) -> BytesMut {
        self.rest.extend_from_slice(ciphertext);
        // At least one byte stays, and so the last block, whole.
        let whole = self.rest.len().saturating_sub(1) / BLOCK * BLOCK;
        let mut out = self.rest.split_to(whole);
        let (blocks, _) = Block::<Aes128>::slice_as_chunks_mut(&mut out);
        self.chain.decrypt_blocks(blocks);
        out
    }

    /// Ends the segment: the last bytes, without their padding.
    ///
    /// # Errors
    /// [`PaddingError`] when the ciphertext is not whole blocks, or the padding is none.
    pub fn finish(mut self) -> Result<Vec<u8>, PaddingError> {
        let last = self.chain.decrypt_padded::<Pkcs7>(&mut self.rest);
        last.map(<[u8]>::to_vec).map_err(|_| PaddingError)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cipher::SegmentEncryptor;
    use crate::keys::{CONTENT_SECRET_LEN, ContentSecrets, KeyMethod};

    fn encrypt(plaintext: &[u8]) -> Vec<u8> {
        let key = ContentSecrets::from_random(KeyMethod::Aes128, &[7; CONTENT_SECRET_LEN]).content;
        let mut encryptor = SegmentEncryptor::new(&key, Iv([3; 16]));
        [encryptor.update(plaintext), encryptor.finish()].concat()
    }

    fn decrypt(chunks: &[&[u8]]) -> Result<Vec<u8>, PaddingError> {
        let mut decryptor = SegmentDecryptor::new(&[7; 16], Iv([3; 16]));
        let mut out = Vec::new();
        for chunk in chunks {
            out.extend_from_slice(&decryptor.update(chunk));
        }
        out.extend_from_slice(&decryptor.finish()?);
        Ok(out)
    }

    #[test]
    fn what_is_not_whole_blocks_or_not_padded_is_refused() {
        let ciphertext = encrypt(b"some plaintext of more than one block");
        assert_eq!(decrypt(&[&ciphertext[..ciphertext.len() - 1]]), Err(PaddingError));
        assert_eq!(decrypt(&[&ciphertext[..32]]), Err(PaddingError));
        assert_eq!(decrypt(&[]), Err(PaddingError));
    }

    proptest! {
        #[test]
        fn any_split_gives_the_plaintext_back(
            plaintext in proptest::collection::vec(any::<u8>(), 0..500),
            cut in 0.0..1.0_f64,
        ) {
            let ciphertext = encrypt(&plaintext);
            let (head, tail) = ciphertext.split_at((cut * ciphertext.len() as f64) as usize);
            prop_assert_eq!(decrypt(&[head, tail]).unwrap(), plaintext);
        }
    }
}
