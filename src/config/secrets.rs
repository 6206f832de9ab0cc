//! What of a secret may be shown: enough to tell one from another, nothing to use.

/// A URL without its password and, of the web, without the values of its query, which may be a token. Works on text that is no valid URL too: a password with a stray `/` or `#` is what
/// makes it invalid, and the error about that must not show it.
pub fn masked_url(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let rest = match rest.rsplit_once('@') {
        Some((user, place)) => match user.split_once(':') {
            Some((name, _)) => format!("{name}:***@{place}"),
            None => format!("{user}@{place}"),
        },
        None => rest.to_owned(),
    };
    let Some((place, query)) = rest.split_once('?') else { return format!("{scheme}://{rest}") };
    let is_of_the_web = ["http", "https"].iter().any(|of| scheme.eq_ignore_ascii_case(of));
    let query: Vec<_> =
        query.split('&').map(|parameter| masked_parameter(parameter, is_of_the_web)).collect();
    format!("{scheme}://{place}?{}", query.join("&"))
}

/// libpq takes a password among the parameters too; the others say how to connect.
fn masked_parameter(parameter: &str, always: bool) -> String {
    match parameter.split_once('=') {
        Some((name, _)) if always || name.to_ascii_lowercase().contains("password") => format!("{name}=***"),
        // Nobody knows what a value without a name is.
        None if always => "***".to_owned(),
        _ => parameter.to_owned(),
    }
}

/// Of a webhook's URL, where it leads to: its path is a secret too.
pub(super) fn masked_webhook(text: &str) -> String {
    let place = url::Url::parse(text).map(|url| url.origin().ascii_serialization());
    match place {
        Ok(place) => format!("{place}/***"),
        Err(_) if text.is_empty() => String::new(),
        Err(_) => "***".to_owned(),
    }
}

/// The first eight digits of a hash.
pub(super) fn masked_hash(text: &str) -> String {
    format!("{}…", text.chars().take(8).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_webhook_its_host_is_shown() {
        assert_eq!(masked_webhook("https://chat.example/hooks/secret?a=secret"), "https://chat.example/***");
        assert_eq!((masked_webhook(""), masked_webhook("secret")), (String::new(), "***".to_owned()));
    }

    #[test]
    fn passwords_are_masked_wherever_they_stand() {
        for (text, shown) in [
            ("keyshield.db", "keyshield.db"),
            ("postgres://user:secret@db.example/keys", "postgres://user:***@db.example/keys"),
            (
                "postgresql://user:secret@db:5432/keys?sslmode=require",
                "postgresql://user:***@db:5432/keys?sslmode=require",
            ),
            ("postgres://user@db/keys", "postgres://user@db/keys"),
            ("postgres://db/keys", "postgres://db/keys"),
            ("postgres:///keys?host=/run&password=secret", "postgres:///keys?host=/run&password=***"),
            ("postgres://user:sec/r?e#t@db/keys", "postgres://user:***@db/keys"),
            ("postgres://user:sec@ret@db/keys", "postgres://user:***@db/keys"),
            (
                "https://o.example/a.m3u8?token=secret&quality=high",
                "https://o.example/a.m3u8?token=***&quality=***",
            ),
            ("HTTP://o.example/a.m3u8?secret", "HTTP://o.example/a.m3u8?***"),
            ("https://o.example/a.m3u8", "https://o.example/a.m3u8"),
        ] {
            assert_eq!(masked_url(text), shown);
        }
    }

    #[test]
    fn a_hash_is_cut_to_its_beginning() {
        assert_eq!(masked_hash(&"0123456789abcdef".repeat(4)), "01234567…");
    }
}
