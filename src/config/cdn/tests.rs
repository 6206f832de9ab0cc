//! What of `[cdn]` and `[[cdns]]` is taken, and what is refused in whose name.

use super::super::raw::RawConfig;
use super::*;

const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const CUSTOM: &str = "[[cdns]]\nname = \"a\"\nkind = \"custom\"\nedge_url = \"https://cdn.example\"\n\
                      [cdns.custom]\napi_url = \"https://api.example/\"\n";

fn parse(text: &str) -> Result<(CdnRules, Vec<CdnConfig>), String> {
    let raw: RawConfig = toml::from_str(text).map_err(|error| error.to_string())?;
    let checked = || Ok((rules(&raw.cdn)?, cdns(&raw.cdns, &raw.cdn)?));
    checked().map_err(|error: ConfigError| error.to_string())
}

fn one(text: &str) -> CdnConfig {
    parse(text).unwrap().1.remove(0)
}

fn refused(text: &str, named: &str, why: &str) {
    let error = parse(text).unwrap_err();
    assert!(error.starts_with(named) && error.contains(why), "{error}");
    assert!(!error.contains("sesame"), "{error}");
}

/// An entry of a kind, with lines of its own and of its vendor's table.
fn entry_of(kind: &str, own: &str, table: &str) -> String {
    format!(
        "[cdn]\ncloudflare_api_token = \"cf.sesame\"\nfastly_api_token = \"fastly.sesame\"\n\
         [[cdns]]\nname = \"a\"\nkind = \"{kind}\"\nedge_url = \"https://cdn.example\"\n{own}\n\
         [cdns.{kind}]\n{table}\n"
    )
}

#[test]
fn without_anything_there_is_no_cdn_and_rules_are_the_guides() {
    let (rules, cdns) = parse("").unwrap();
    assert_eq!((rules.sync_timeout, rules.retry_attempts), (Duration::from_secs(30), 3));
    assert!(rules.endpoints.is_empty() && cdns.is_empty());
}

#[test]
fn an_endpoint_is_a_host_or_a_url_and_is_called_by_it() {
    let text = "[cdn]\nendpoints = [\"cdn1.example.com\", \"https://cdn2.example.com:8443/a/\", \
                \"http://127.0.0.1:9000\"]\n";
    let endpoints = parse(text).unwrap().0.endpoints;
    assert_eq!(endpoints[0].as_str(), "https://cdn1.example.com/");
    let names: Vec<_> = endpoints.iter().map(endpoint_name).collect();
    assert_eq!(names, ["cdn1.example.com", "cdn2.example.com:8443/a", "127.0.0.1:9000"]);
    for (bad, why) in [
        ("http://cdn.example", "https://"),
        ("", "absolute URL"),
        ("https://cdn.example/?token=sesame", "query"),
        ("https://user:sesame@cdn.example", "password"),
    ] {
        refused(&format!("[cdn]\nendpoints = [\"{bad}\"]\n"), "cdn.endpoints", why);
    }
    let twice = "[cdn]\nendpoints = [\"cdn.example\", \"https://cdn.example\"]\n";
    refused(twice, "cdn.endpoints", "there already");
}

#[test]
fn pull_mode_needs_neither_secret_nor_store() {
    for (kind, table) in [
        ("cloudflare", "zone_id = \"0a1b\""),
        ("fastly", "service_id = \"SU1Z\""),
        ("custom", "api_url = \"https://api.example\""),
    ] {
        let cdn = one(&entry_of(kind, "", table));
        assert_eq!((cdn.mode, cdn.secret, cdn.vendor.kind()), (DeliveryMode::Pull, None, kind));
    }
}

#[test]
fn push_mode_needs_a_secret_and_where_keys_are_stored() {
    let with_secret = "mode = \"push\"\nedge_secret_file = \"edge.secret\"";
    let missing = |kind, table, named: &str| refused(&entry_of(kind, with_secret, table), named, "push mode");
    missing("cloudflare", "zone_id = \"0a1b\"\naccount_id = \"0c\"", "cdns[0].cloudflare.namespace_id");
    // Fastly's comes by a deployment, which needs a configuration.
    assert_eq!(one(&entry_of("fastly", with_secret, "service_id = \"SU1Z\"")).mode, DeliveryMode::Push);
    let api = "api_url = \"https://api.example\"";
    refused(&entry_of("custom", "mode = \"push\"", api), "cdns[0].edge_secret_file", "openssl rand -hex 32");

    let own = one(&entry_of("custom", with_secret, api));
    assert_eq!(own.secret, Some(Credential::File("edge.secret".into())));
    let shared = format!("[cdn]\nedge_secret = \"{SECRET}\"\n{CUSTOM}")
        .replace("edge_url", "mode = \"push\"\nedge_url");
    assert!(matches!(one(&shared).secret, Some(Credential::Text(_))));
    refused("[cdn]\nedge_secret = \"sesame\"\n", "cdn.edge_secret", "64 hexadecimal digits");
}

#[test]
fn a_token_is_the_entrys_own_or_that_of_its_kind() {
    let table = "zone_id = \"0a1b\"\naccount_id = \"0c\"\npurges_per_minute = 30";
    let CdnVendor::Cloudflare(settings) = one(&entry_of("cloudflare", "", table)).vendor else {
        panic!("it is Cloudflare")
    };
    assert_eq!(settings.token, Credential::Text(Secret::new("cf.sesame".into())));
    assert_eq!((settings.purges_per_minute, settings.timeout), (30, Duration::from_secs(30)));
    let own = one(&entry_of("fastly", "token_file = \"t\"", "service_id = \"SU1Z\"")).vendor;
    assert!(matches!(own, CdnVendor::Fastly(fastly) if fastly.token == Credential::File("t".into())));
    let CdnVendor::Custom(custom) = one(CUSTOM).vendor else { panic!("it is of an own kind") };
    assert_eq!((custom.token, custom.api_url.as_str()), (None, "https://api.example"));
    let none = entry_of("cloudflare", "", table).replace("cf.sesame", "");
    refused(&none, "cdns[0].token_file", "CLOUDFLARE_API_TOKEN");
}

#[test]
fn an_entry_has_the_table_of_its_kind_and_no_other() {
    refused(&CUSTOM.replace("[cdns.custom]", "[cdns.fastly]"), "cdns[0].fastly", "kind \"custom\"");
    refused(
        "[[cdns]]\nname = \"a\"\nkind = \"custom\"\nedge_url = \"https://cdn.example\"\n",
        "cdns[0].custom",
        "[cdns.custom]",
    );
    refused(&CUSTOM.replace("\"custom\"", "\"akamai\""), "cdns[0].kind", "cloudfront, cloudflare");
}

#[test]
fn names_are_short_plain_and_each_there_once() {
    refused(&format!("{CUSTOM}{CUSTOM}"), "cdns[1].name = \"a\"", "there already");
    let endpoint = format!("[cdn]\nendpoints = [\"a\"]\n{CUSTOM}");
    refused(&endpoint, "cdns[0].name", "there already");
    for bad in ["", "a b", "é", &"a".repeat(65)] {
        refused(&CUSTOM.replace("name = \"a\"", &format!("name = \"{bad}\"")), "cdns[0].name", "letters");
    }
    let many: String =
        (0..17).map(|at| CUSTOM.replace("name = \"a\"", &format!("name = \"a{at}\""))).collect();
    refused(&many, "cdns:", "16 at most");
}

#[test]
fn what_goes_into_requests_is_checked() {
    let custom = |from: &str, to: &str, named: &str| {
        refused(&CUSTOM.replace(from, to), named, "");
    };
    custom("https://cdn.example", "http://cdn.example", "cdns[0].edge_url");
    custom("https://cdn.example", "https://cdn.example?a=b", "cdns[0].edge_url");
    custom("https://api.example/", "http://api.example/", "cdns[0].custom.api_url");
    custom("edge_url", "mode = \"both\"\nedge_url", "cdns[0].mode");
    let id = |kind, table, named| refused(&entry_of(kind, "", table), named, "ID");
    id("cloudflare", "zone_id = \"a/b\"", "cdns[0].cloudflare.zone_id");
    id("cloudflare", "", "cdns[0].cloudflare.zone_id");
    id("fastly", "service_id = \"..\"", "cdns[0].fastly.service_id");
    let none = entry_of("cloudflare", "", "zone_id = \"0a\"\npurges_per_minute = 0");
    refused(&none, "cdns[0].cloudflare.purges_per_minute", "between");
    refused("[cdn]\nsync_timeout_millis = 0\n", "cdn.sync_timeout_millis", "between 1 and 600000");
    refused("[cdn]\nretry_attempts = 101\n", "cdn.retry_attempts", "between 1 and 100");
}

#[test]
fn neither_secrets_nor_tokens_are_shown() {
    let text = format!("[cdn]\nedge_secret = \"{SECRET}\"\ncustom_token = \"sesame\"\n{CUSTOM}");
    let raw: RawConfig = toml::from_str(&text).unwrap();
    let shown = format!("{raw:?} {:?}", one(&text));
    assert!(!shown.contains("sesame") && !shown.contains(SECRET), "{shown}");
}

#[cfg(not(feature = "cdn-cloudfront"))]
#[test]
fn a_kind_that_is_not_built_in_names_its_feature() {
    refused(&entry_of("cloudfront", "", "distribution_id = \"E1\""), "cdns[0].kind", "cdn-cloudfront");
}

#[cfg(feature = "cdn-cloudfront")]
mod cloudfront {
    use super::*;

    const ARN: &str = "arn:aws:cloudfront::111122223333:key-value-store/8b2f5a3c-0000-4000-8000-000000000000";

    fn of(own: &str, table: &str) -> String {
        entry_of("cloudfront", own, &format!("distribution_id = \"E2QWRUHAPOMQZL\"\n{table}"))
    }

    fn settings(own: &str, table: &str) -> crate::cdn::CloudFrontSettings {
        match one(&of(own, table)).vendor {
            CdnVendor::CloudFront(settings) => settings,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_distribution_is_enough_to_pull_and_a_store_is_named_by_its_arn() {
        let pull = settings("", "");
        assert_eq!((pull.has_cache_tags, pull.signer), (false, None));
        let own = "mode = \"push\"\nedge_secret_file = \"s\"";
        assert_eq!(settings(own, &format!("key_value_store_arn = \"{ARN}\"")).key_value_store_arn, ARN);
        for bad in ["", "8b2f5a3c", "arn:aws:s3::1:key-value-store/a", "arn:aws:cloudfront::1:function/a"] {
            let text = of(own, &format!("key_value_store_arn = \"{bad}\""));
            refused(&text, "cdns[0].cloudfront.key_value_store_arn", "KeyValueStore");
        }
        refused(&of("token_file = \"t\"", ""), "cdns[0].token_file", "SDK");
        refused(&of("", "endpoint = \"http://aws.example\""), "cdns[0].cloudfront.endpoint", "https://");
    }

    #[test]
    fn a_signer_has_a_group_a_directory_and_a_longest_life() {
        let both = "signer_key_group_id = \"a-1\"\nsigner_directory = \"/keys\"";
        let signer = settings("", both).signer.unwrap();
        assert_eq!((signer.key_group_id.as_str(), signer.longest_life), ("a-1", Duration::from_secs(86_400)));
        let (group, directory) = both.split_once('\n').unwrap();
        refused(&of("", group), "cdns[0].cloudfront.signer_directory", "signer_key_group_id");
        refused(&of("", directory), "cdns[0].cloudfront.signer_key_group_id", "signer_directory");
        let short = of("", "signer_longest_life_secs = 1");
        refused(&short, "cdns[0].cloudfront.signer_longest_life_secs", "between");
    }
}
