//! Tokens that keyshield makes itself: 256 random bits, kept by their hash alone.
//!
//! A fast hash does, because there is nothing to guess: it hides a token from whoever reads the configuration,
//! and no dictionary holds 256 random bits.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};
use zeroize::Zeroizing;

use super::AccessToken;
use crate::entropy;

/// By this searches for leaked secrets know a token.
const PREFIX: &str = "ks_";

/// A fresh token.
pub fn new_token() -> Zeroizing<String> {
    let bytes = entropy::random::<32>();
    Zeroizing::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&bytes[..])))
}

/// What is kept of a token: SHA-256 of the whole text, its prefix too.
pub fn hash_token(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

/// The entry of a token. All are compared, in constant time: how long it takes tells nothing about the hashes.
pub(super) fn find<'t>(tokens: &'t [AccessToken], presented: &str) -> Option<&'t AccessToken> {
    let hash = hash_token(presented);
    let (mut found, mut index) = (Choice::from(0), 0_u64);
    for (at, token) in (0_u64..).zip(tokens) {
        let equal = token.sha256.ct_eq(&hash);
        index.conditional_assign(&at, equal);
        found |= equal;
    }
    let index = usize::try_from(index).ok().filter(|_| bool::from(found))?;
    tokens.get(index)
}

#[cfg(test)]
mod tests {
    use super::super::Role;
    use super::*;

    #[test]
    fn every_token_is_found_by_itself_alone() {
        let secrets: Vec<_> = (0..3).map(|_| new_token()).collect();
        let entry = |(at, token): (usize, &Zeroizing<String>)| AccessToken {
            name: format!("t{at}"),
            role: Role::Viewer,
            sha256: hash_token(token),
        };
        let tokens: Vec<_> = secrets.iter().enumerate().map(entry).collect();
        for (at, secret) in secrets.iter().enumerate() {
            assert_eq!(find(&tokens, secret).unwrap().name, format!("t{at}"));
        }
        for other in ["", "ks_", &secrets[0][..45], new_token().as_str()] {
            assert_eq!(find(&tokens, other), None, "{other}");
        }
        assert_eq!(find(&[], &secrets[0]), None);
    }

    #[test]
    fn a_token_is_256_random_bits_in_characters_that_headers_and_shells_bear() {
        let token = new_token();
        assert_eq!(token.len(), PREFIX.len() + 43);
        assert!(token.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)));
        assert_ne!(*token, *new_token());
        // By sha256sum.
        assert_eq!(
            hex::encode(hash_token("ks_example")),
            "64bcd98b47ebebb9179ab0867bcfe2a36f7ce395279347ca4e35b6956bb5f3b4"
        );
    }
}
