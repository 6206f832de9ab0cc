//! A key of AWS KMS. Credentials are the SDK's matter: none stands in a configuration.

use super::super::ConfigError;
use super::super::checks::{between, field, private_url, secs};
use super::super::raw::RawAws;
use crate::kms::{AwsSettings, KeyArn, Limits, is_alias, is_key_id, is_label};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsConfig {
    pub settings: AwsSettings,
    pub limits: Limits,
}

pub(super) fn aws(raw: &RawAws) -> Result<AwsConfig, ConfigError> {
    let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    let key = key(&raw.key)?;
    let region = given(&raw.region);
    if region.as_deref().is_some_and(|region| !is_label(region)) {
        return Err(field("kms.aws.region", &raw.region, "must be a region such as eu-west-1"));
    }
    if let (Some(region), Ok(arn)) = (&region, key.parse::<KeyArn>())
        && arn.region() != region
    {
        let why =
            format!("the key in kms.aws.key is in {}: leave this empty, or name a key here", arn.region());
        return Err(field("kms.aws.region", region, &why));
    }
    // Requests to encrypt have keys in them.
    let endpoint = given(&raw.endpoint).map(|url| private_url("kms.aws.endpoint", &url)).transpose()?;
    let limits = Limits {
        timeout: secs("kms.aws.timeout_secs", raw.timeout_secs, 1..=60)?,
        max_concurrent: between("kms.aws.max_concurrent", raw.max_concurrent, 1..=1_024)?,
    };
    Ok(AwsConfig { settings: AwsSettings { region, key, endpoint }, limits })
}

/// A name alone is that of an alias.
fn key(text: &str) -> Result<String, ConfigError> {
    let alias = format!("alias/{text}");
    if is_key_id(text) || is_alias(text) || text.parse::<KeyArn>().is_ok() {
        return Ok(text.to_owned());
    }
    if !text.starts_with("alias/") && is_alias(&alias) {
        return Ok(alias);
    }
    Err(field("kms.aws.key", text, "must be a key's ID or ARN, or an alias"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "1234abcd-12ab-34cd-56ef-1234567890ab";

    fn raw(key: &str, region: &str) -> RawAws {
        RawAws { key: key.into(), region: region.into(), ..RawAws::default() }
    }

    #[test]
    fn a_key_is_named_by_its_id_its_arn_or_an_alias() {
        let arn = format!("arn:aws:kms:eu-west-1:111122223333:key/{ID}");
        let mrk = format!("mrk-{}", "0a".repeat(16));
        for key in [ID, &arn, &mrk, "alias/video", "arn:aws:kms:eu-west-1:111122223333:alias/video"] {
            assert_eq!(aws(&raw(key, "")).unwrap().settings.key, key);
        }
        assert_eq!(aws(&raw("hls-encryption-keys", "")).unwrap().settings.key, "alias/hls-encryption-keys");
        for bad in ["", "alias/", "a b", "alias/ä", "arn:aws:kms:eu-west-1:1:key/x"] {
            let error = aws(&raw(bad, "")).unwrap_err().to_string();
            assert!(error.starts_with("kms.aws.key"), "{error}");
        }
    }

    #[test]
    fn a_region_is_one_and_that_of_the_keys_arn() {
        let arn = format!("arn:aws:kms:eu-west-1:111122223333:key/{ID}");
        assert_eq!(aws(&raw("k", "us-east-1")).unwrap().settings.region.as_deref(), Some("us-east-1"));
        assert_eq!(aws(&raw("k", "")).unwrap().settings.region, None);
        assert!(aws(&raw(&arn, "eu-west-1")).is_ok());
        for (key, region) in [(arn.as_str(), "us-east-1"), ("k", "evil.example/")] {
            let error = aws(&raw(key, region)).unwrap_err().to_string();
            assert!(error.starts_with("kms.aws.region"), "{error}");
        }
    }

    #[test]
    fn an_endpoint_is_private_and_limits_are_limits() {
        for (change, named) in [
            ((|raw| raw.endpoint = "http://kms.example".into()) as fn(&mut RawAws), "kms.aws.endpoint"),
            (|raw| raw.timeout_secs = 0, "kms.aws.timeout_secs"),
            (|raw| raw.max_concurrent = 0, "kms.aws.max_concurrent"),
        ] {
            let mut raw = RawAws::default();
            change(&mut raw);
            let error = aws(&raw).unwrap_err().to_string();
            assert!(error.starts_with(named), "{error}");
        }
    }
}
