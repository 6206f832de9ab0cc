//! Where alerts are told to.

use super::ConfigError;
use super::checks::secret_url;
use super::raw::RawAlerts;
use crate::alert::WebhookUrl;

/// The webhook, if there is one.
pub(super) fn webhook(raw: &RawAlerts) -> Result<Option<WebhookUrl>, ConfigError> {
    match raw.webhook_url.as_str() {
        "" => Ok(None),
        url => secret_url("alerts.webhook_url", url).map(|url| Some(WebhookUrl::new(url))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_webhook_is_reached_by_tls_and_never_shown() {
        let of = |url: &str| webhook(&RawAlerts { webhook_url: url.into() });
        assert_eq!(of("").unwrap(), None);
        let shown = format!("{:?}", of("https://chat.example/hooks/secret").unwrap().unwrap());
        assert!(!shown.contains("secret"), "{shown}");
        assert!(of("http://127.0.0.1:9000/secret").is_ok());
        for bad in ["http://chat.example/secret", "hooks/secret", "https://user:secret@chat.example/"] {
            let error = of(bad).unwrap_err().to_string();
            assert!(error.starts_with("alerts.webhook_url") && !error.contains("secret"), "{error}");
        }
        let raw = format!("{:?}", RawAlerts { webhook_url: "https://chat.example/secret".into() });
        assert!(raw.contains("chat.example") && !raw.contains("secret"), "{raw}");
    }
}
