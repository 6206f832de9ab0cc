//! Names and numbers, a type for each.
//!
//! A key ID and an ordinal must not be mistaken for one another, nor a DEK's ID for a key's; so each is a
//! type with one way in (parsing) and one way out (`Display`).

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Why a piece of text is not the ID it should be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdError {
    #[error("a {what} is 32 lower-case hex digits")]
    NotHex { what: &'static str },
    #[error("a stream ID is 1 to 128 of the characters A-Z a-z 0-9 . _ - and does not begin with a dot")]
    BadStreamId,
}

const ID_LEN: usize = 16;

fn parse_id(text: &str, what: &'static str) -> Result<[u8; ID_LEN], IdError> {
    let lower = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let mut bytes = [0; ID_LEN];
    // `decode_to_slice` takes upper case too; one key must have one spelling, or caches hold it twice.
    if !lower || hex::decode_to_slice(text, &mut bytes).is_err() {
        return Err(IdError::NotHex { what });
    }
    Ok(bytes)
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; ID_LEN]);

        impl $name {
            /// Bytes in the ID; the caller draws them at random.
            pub const LEN: usize = ID_LEN;

            pub const fn from_bytes(bytes: [u8; ID_LEN]) -> Self {
                Self(bytes)
            }

            pub const fn as_bytes(&self) -> &[u8; ID_LEN] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                parse_id(text, $what).map(Self)
            }
        }
    };
}

random_id! {
    /// Names a content key: 128 random bits, public (it stands in key URIs and segment links).
    KeyId, "key ID"
}

random_id! {
    /// Names a data encryption key: 128 random bits, public (it stands in the links of clear init sections).
    DekId, "DEK ID"
}

random_id! {
    /// Names an incident. Its first 48 bits are the time in milliseconds, so that IDs sort by it.
    IncidentId, "incident ID"
}

impl IncidentId {
    /// An ID of this moment, the rest of it at random.
    pub fn at(now: super::time::Timestamp, random: [u8; ID_LEN]) -> Self {
        let mut bytes = random;
        bytes[..6].copy_from_slice(&now.as_unix_millis().to_be_bytes()[2..]);
        Self(bytes)
    }
}

/// A DEK's place among its stream's DEKs: 1, 2, 3 …
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DekVersion(pub u32);

/// A stream's name, chosen by its operator.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(String);

impl StreamId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for StreamId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if text.is_empty() || text.len() > 128 || text.starts_with('.') || !text.bytes().all(legal) {
            return Err(IdError::BadStreamId);
        }
        Ok(Self(text.to_owned()))
    }
}

/// A content key's place in its stream: 0, 1, 2 …
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ordinal(pub u32);

impl Ordinal {
    pub const FIRST: Ordinal = Ordinal(0);

    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Ordinal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A Media Segment's number in its Media Playlist (RFC 8216 §3).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MediaSequenceNumber(pub u64);

impl MediaSequenceNumber {
    /// The number `count` segments further on.
    pub fn plus(self, count: u64) -> Self {
        Self(self.0.saturating_add(count))
    }

    pub fn minus(self, count: u64) -> Self {
        Self(self.0.saturating_sub(count))
    }
}

impl fmt::Display for MediaSequenceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_as_written_and_has_one_spelling() {
        let id = KeyId::from_bytes([0xab; 16]);
        assert_eq!(id.to_string().parse(), Ok(id));
        let upper = id.to_string().to_uppercase();
        assert_eq!(upper.parse::<KeyId>(), Err(IdError::NotHex { what: "key ID" }));
        assert!("abcd".parse::<KeyId>().is_err());
    }

    #[test]
    fn a_stream_id_cannot_climb_out_of_a_path() {
        assert!("ch1".parse::<StreamId>().is_ok());
        for bad in ["", "..", ".hidden", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert_eq!(bad.parse::<StreamId>(), Err(IdError::BadStreamId), "{bad:?}");
        }
    }
}
