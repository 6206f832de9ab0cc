//! What this shield itself is known by to a KMS or a CDN.

use std::fmt;
use std::path::PathBuf;

use zeroize::Zeroizing;

/// A text that is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(redacted)")
    }
}

/// Where a secret is: files are read anew for every call, so that whoever rotates one need not restart anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    Text(Secret),
    File(PathBuf),
}

impl Credential {
    /// # Errors
    /// A file that cannot be read, or is empty.
    pub fn read(&self) -> Result<Secret, String> {
        match self {
            Credential::Text(secret) => Ok(secret.clone()),
            Credential::File(path) => {
                let text = std::fs::read_to_string(path).map(Zeroizing::new);
                let text = text.map_err(|error| format!("cannot read {}: {error}", path.display()))?;
                match text.trim() {
                    "" => Err(format!("{} is empty", path.display())),
                    text => Ok(Secret::new(text.to_owned())),
                }
            }
        }
    }
}
