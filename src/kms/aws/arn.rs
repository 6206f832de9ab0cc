//! The name of a key in AWS, as it is stored with what the key wrapped: `arn:aws:kms:eu-west-1:111122223333:key/…`.
//!
//! What is stored may have been changed, and its region goes into a host's name: so every part is looked at.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The ARN of a key, or of an alias of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyArn {
    text: String,
    /// Where in the text the region is, and where the resource begins.
    region: std::ops::Range<usize>,
    resource: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("must be of the form arn:PARTITION:kms:REGION:ACCOUNT:key/ID")]
pub struct NotAnArn;

impl FromStr for KeyArn {
    type Err = NotAnArn;

    fn from_str(text: &str) -> Result<Self, NotAnArn> {
        let mut parts = text.splitn(6, ':');
        let mut part = || parts.next().ok_or(NotAnArn);
        let (arn, partition, service, region, account, resource) =
            (part()?, part()?, part()?, part()?, part()?, part()?);
        let is_key = resource.strip_prefix("key/").is_some_and(is_key_id);
        let is_well = arn == "arn"
            && service == "kms"
            && is_label(partition)
            && is_label(region)
            && account.len() == 12
            && account.bytes().all(|byte| byte.is_ascii_digit())
            && (is_key || is_alias(resource));
        if !is_well {
            return Err(NotAnArn);
        }
        let begins = text.len() - resource.len();
        let ends = begins - account.len() - 2;
        Ok(Self { text: text.to_owned(), region: ends - region.len()..ends, resource: begins })
    }
}

impl KeyArn {
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn region(&self) -> &str {
        &self.text[self.region.clone()]
    }

    /// The key's ID; `None` for an alias.
    pub fn key_id(&self) -> Option<&str> {
        self.text[self.resource..].strip_prefix("key/")
    }

    /// The same key's replica in another region, where the key is one of many regions.
    pub fn in_region(&self, region: &str) -> Option<Self> {
        let is_multi_region = self.key_id()?.starts_with("mrk-");
        let text = format!("{}{region}{}", &self.text[..self.region.start], &self.text[self.region.end..]);
        text.parse().ok().filter(|_| is_multi_region)
    }
}

impl fmt::Display for KeyArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What a region or a partition is called.
pub(crate) fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// `1234abcd-12ab-34cd-56ef-1234567890ab`, or `mrk-` and 32 hexadecimal digits, in groups or not.
pub(crate) fn is_key_id(text: &str) -> bool {
    let is_hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_grouped = |text: &str| {
        let lengths = [8, 4, 4, 4, 12];
        let groups: Vec<_> = text.split('-').collect();
        groups.len() == lengths.len()
            && groups.iter().zip(lengths).all(|(group, length)| group.len() == length && is_hex(group))
    };
    match text.strip_prefix("mrk-") {
        Some(digits) => is_grouped(digits) || digits.len() == 32 && is_hex(digits),
        None => is_grouped(text),
    }
}

/// `alias/…`
pub(crate) fn is_alias(text: &str) -> bool {
    let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || b"/_-".contains(&byte);
    text.len() <= 256
        && text.strip_prefix("alias/").is_some_and(|name| !name.is_empty() && name.bytes().all(is_legal))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";

    #[test]
    fn an_arn_says_where_its_key_is() {
        let arn: KeyArn = KEY.parse().unwrap();
        assert_eq!((arn.region(), arn.as_str()), ("eu-west-1", KEY));
        assert_eq!(arn.key_id(), Some("1234abcd-12ab-34cd-56ef-1234567890ab"));
        assert_eq!(arn.in_region("us-east-1"), None, "it is in one region alone");
        let alias: KeyArn = "arn:aws-us-gov:kms:us-gov-west-1:111122223333:alias/a/b_c".parse().unwrap();
        assert_eq!((alias.region(), alias.key_id()), ("us-gov-west-1", None));
    }

    #[test]
    fn a_key_of_many_regions_has_the_same_name_in_each() {
        let arn = KEY.replace("1234abcd-12ab-34cd-56ef-1234567890ab", &format!("mrk-{}", "0a".repeat(16)));
        let there = arn.parse::<KeyArn>().unwrap().in_region("us-east-1").unwrap();
        assert_eq!(there.as_str(), arn.replace("eu-west-1", "us-east-1"));
        assert_eq!(there.region(), "us-east-1");
    }

    #[test]
    fn what_could_lead_elsewhere_is_no_arn() {
        for (part, other) in [
            ("arn:", "urn:"),
            (":kms:", ":s3:"),
            ("eu-west-1", ""),
            ("eu-west-1", "evil.example/"),
            ("eu-west-1", "EU"),
            ("111122223333", "1111"),
            ("key/", "grant/"),
            ("1234abcd-", "1234abcd-1"),
            ("1234abcd", "1234abcx"),
            (":key/", "/key/"),
            ("567890ab", "567890ab/x"),
        ] {
            assert_eq!(KEY.replacen(part, other, 1).parse::<KeyArn>(), Err(NotAnArn), "{part} → {other}");
        }
        assert!(
            "".parse::<KeyArn>().is_err()
                && "arn:aws:kms:eu-west-1:111122223333:alias/".parse::<KeyArn>().is_err()
        );
    }
}
