//! What the origin has encrypted already, and what becomes of it.
//!
//! EXT-X-KEY says so, for every segment and init section behind it, until the next one of the same KEYFORMAT or one of
//! METHOD=NONE (D22 §4.4.4.4). Only what any HLS client can decrypt without a licence is encrypted anew: METHOD=AES-128
//! with a key by its URI. SAMPLE-AES and DRM are left or refused, and never encrypted a second time.

use super::attributes::Attributes;
use super::error::Problem;
use crate::keys::{Iv, MediaSequenceNumber, OnEncrypted};

/// How the origin has encrypted what follows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Encryption<'p> {
    Clear,
    /// METHOD=AES-128: decrypted by the key at `uri`, and encrypted anew.
    Rekeyed {
        uri: &'p str,
        iv: Option<[u8; 16]>,
    },
    /// Left as it is.
    Kept,
}

impl<'p> Encryption<'p> {
    /// What holds behind an EXT-X-KEY.
    ///
    /// # Errors
    /// [`Problem::AlreadyEncrypted`] or [`Problem::NotRekeyable`] for what is not to be, or cannot be, served, and
    /// [`Problem::BadTag`].
    pub(super) fn behind(key: &Attributes<'p>, on_encrypted: OnEncrypted) -> Result<Self, Problem> {
        let method = key.unquoted("METHOD").ok_or_else(|| key.bad("it has no METHOD".into()))?;
        match on_encrypted {
            _ if method == "NONE" => Ok(Encryption::Clear),
            OnEncrypted::Reject => Err(Problem::AlreadyEncrypted { method: method.to_owned() }),
            OnEncrypted::Pass => Ok(Encryption::Kept),
            OnEncrypted::Rekey => Self::rekeyed(key, method),
        }
    }

    fn rekeyed(key: &Attributes<'p>, method: &str) -> Result<Self, Problem> {
        let not = |why: String| Err(Problem::NotRekeyable { why });
        if method != "AES-128" {
            return not(format!("METHOD={method}"));
        }
        match key.quoted("KEYFORMAT") {
            None | Some("identity") => {}
            Some(format) => return not(format!("KEYFORMAT={format:?}")),
        }
        let iv = key.unquoted("IV").map(|text| read_iv(text).ok_or_else(|| key.bad("its IV is none".into())));
        Ok(Encryption::Rekeyed { uri: key.required("URI")?, iv: iv.transpose()? })
    }

    /// The IV of a segment, which is its number when no KEY says another one (D22 §5.2).
    pub(super) fn iv_of(iv: Option<[u8; 16]>, msn: Option<MediaSequenceNumber>) -> Result<[u8; 16], Problem> {
        let of_number = || msn.map(|msn| Iv::of_sequence(msn).0);
        // D22 §4.4.4.5: the KEY of an init section must have one.
        iv.or_else(of_number).ok_or_else(|| Problem::NotRekeyable {
            why: "an encrypted init section or file of I-frames whose EXT-X-KEY has no IV".into(),
        })
    }
}

/// `0x` and up to 32 hex digits, big endian.
fn read_iv(text: &str) -> Option<[u8; 16]> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"))?;
    if digits.is_empty() || digits.len() > 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(digits, 16).ok().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use quick_m3u8::custom_parsing::tag;

    use super::*;

    fn behind(attributes: &'static str, on: OnEncrypted) -> Result<Encryption<'static>, Problem> {
        let line: &'static str = format!("#EXT-X-KEY:{attributes}").leak();
        Encryption::behind(&Attributes::of(tag::parse(line).unwrap().parsed).unwrap(), on)
    }

    #[test]
    fn only_aes_128_is_encrypted_anew() {
        let iv = Some(*b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x02");
        assert_eq!(
            behind("METHOD=AES-128,URI=\"k\",IV=0x102", OnEncrypted::Rekey),
            Ok(Encryption::Rekeyed { uri: "k", iv })
        );
        for drm in [
            "METHOD=SAMPLE-AES,URI=\"skd://x\"",
            "METHOD=AES-128,URI=\"k\",KEYFORMAT=\"com.apple.streamingkeydelivery\"",
            "METHOD=AES-256-GCM,URI=\"k\"",
        ] {
            assert!(matches!(behind(drm, OnEncrypted::Rekey), Err(Problem::NotRekeyable { .. })), "{drm}");
            assert_eq!(behind(drm, OnEncrypted::Pass), Ok(Encryption::Kept));
            assert!(matches!(behind(drm, OnEncrypted::Reject), Err(Problem::AlreadyEncrypted { .. })));
        }
    }

    #[test]
    fn a_key_without_a_uri_or_with_half_an_iv_is_bad() {
        for bad in ["METHOD=AES-128", "METHOD=AES-128,URI=\"k\",IV=12", "METHOD=AES-128,URI=\"k\",IV=0x"] {
            assert!(matches!(behind(bad, OnEncrypted::Rekey), Err(Problem::BadTag { .. })), "{bad}");
        }
        // What may be clear is not left as it is for a tag that does not say what it is.
        for bad in ["URI=\"k\"", "METHOD=\"NONE\""] {
            assert!(matches!(behind(bad, OnEncrypted::Pass), Err(Problem::BadTag { .. })), "{bad}");
        }
    }
}
