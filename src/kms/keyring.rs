//! Several providers at once: one wraps, the others are held for what they wrapped, and to go over to.
//!
//! The ID of the key that wrapped something begins with its provider's name, by which it is found again. Each provider
//! stands behind a guard of its own, so that one that is away costs those that are there nothing.

use std::sync::Arc;

use async_trait::async_trait;

use super::{Cause, KeyDescription, Kms, KmsError, WrappedKey};
use crate::keys::{Context, DataEncryptionKey};

/// A provider by its name: `local`, `vault`.
#[derive(Debug, Clone)]
pub struct Held {
    pub provider: &'static str,
    pub kms: Arc<dyn Kms>,
}

/// All providers that are held.
#[derive(Debug, Clone)]
pub struct Keyring {
    wraps: Held,
    also: Vec<Held>,
}

impl Keyring {
    /// `wraps` is for new keys. No two may have one name.
    pub fn new(wraps: Held, also: Vec<Held>) -> Self {
        Self { wraps, also }
    }

    /// One provider, and no other.
    pub fn of(provider: &'static str, kms: Arc<dyn Kms>) -> Self {
        Self::new(Held { provider, kms }, Vec::new())
    }

    /// The one that wraps new keys.
    pub fn wraps(&self) -> &Held {
        &self.wraps
    }

    /// Those that are held besides.
    pub fn also(&self) -> &[Held] {
        &self.also
    }

    /// All of them; the one that wraps is the first.
    pub fn held(&self) -> impl Iterator<Item = &Held> {
        std::iter::once(&self.wraps).chain(&self.also)
    }

    pub fn by_name(&self, provider: &str) -> Option<&Held> {
        self.held().find(|held| held.provider == provider)
    }

    /// Whose key has this ID.
    pub fn holder_of(&self, kek_id: &str) -> Option<&Held> {
        self.by_name(provider_of(kek_id))
    }
}

/// What the ID of a key begins with.
fn provider_of(kek_id: &str) -> &str {
    kek_id.split_once(':').map_or(kek_id, |(provider, _)| provider)
}

#[async_trait]
impl Kms for Keyring {
    async fn generate_data_key(
        &self,
        context: &Context<'_>,
    ) -> Result<(DataEncryptionKey, WrappedKey), KmsError> {
        self.wraps.kms.generate_data_key(context).await
    }

    async fn wrap(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
        self.wraps.kms.wrap(context, key).await
    }

    async fn unwrap(
        &self,
        context: &Context<'_>,
        wrapped: &WrappedKey,
    ) -> Result<DataEncryptionKey, KmsError> {
        match self.holder_of(&wrapped.kek_id) {
            Some(held) => held.kms.unwrap(context, wrapped).await,
            None => Err(KmsError {
                provider: "keyring",
                key: wrapped.kek_id.clone(),
                cause: Cause::NotHeld(provider_of(&wrapped.kek_id).to_owned()),
            }),
        }
    }

    async fn describe(&self) -> Result<KeyDescription, KmsError> {
        self.wraps.kms.describe().await
    }

    fn version_of(&self, wrapped: &WrappedKey) -> Option<u64> {
        self.holder_of(&wrapped.kek_id)?.kms.version_of(wrapped)
    }

    fn is_current(&self, wrapped: &WrappedKey, now: &KeyDescription) -> bool {
        self.wraps.kms.is_current(wrapped, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{DekId, DekVersion, StreamId};

    /// Its keys are its name's, and it opens what bears it.
    #[derive(Debug)]
    struct Named(&'static str, Option<u64>);

    #[async_trait]
    impl Kms for Named {
        async fn generate_data_key(
            &self,
            context: &Context<'_>,
        ) -> Result<(DataEncryptionKey, WrappedKey), KmsError> {
            let key = DataEncryptionKey::from_bytes([1; 32]);
            let wrapped = self.wrap(context, &key).await?;
            Ok((key, wrapped))
        }

        async fn wrap(&self, _: &Context<'_>, _: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
            Ok(wrapped(&format!("{}:key", self.0), self.1))
        }

        async fn unwrap(&self, _: &Context<'_>, wrapped: &WrappedKey) -> Result<DataEncryptionKey, KmsError> {
            assert!(wrapped.kek_id.starts_with(self.0), "{} was asked for {wrapped:?}", self.0);
            Ok(DataEncryptionKey::from_bytes([self.0.len() as u8; 32]))
        }

        async fn describe(&self) -> Result<KeyDescription, KmsError> {
            Ok(KeyDescription { kek_id: format!("{}:key", self.0), version: self.1 })
        }

        fn version_of(&self, wrapped: &WrappedKey) -> Option<u64> {
            wrapped.bytes[..].try_into().ok().map(u64::from_be_bytes)
        }
    }

    fn wrapped(kek_id: &str, version: Option<u64>) -> WrappedKey {
        let bytes = version.map_or(Vec::new(), |version| version.to_be_bytes().to_vec());
        WrappedKey { kek_id: kek_id.into(), bytes }
    }

    fn keyring() -> Keyring {
        let held = |provider, version| Held { provider, kms: Arc::new(Named(provider, version)) };
        Keyring::new(held("wall", Some(2)), vec![held("cellar", None)])
    }

    fn context(stream: &StreamId) -> Context<'_> {
        Context::Dek { stream, dek: DekId::from_bytes([1; 16]), version: DekVersion(1) }
    }

    #[tokio::test]
    async fn the_first_wraps_and_what_another_wrapped_is_opened_by_that_one() {
        let (keyring, stream) = (keyring(), "ch1".parse().unwrap());
        let (key, new) = keyring.generate_data_key(&context(&stream)).await.unwrap();
        assert_eq!(new.kek_id, "wall:key");
        assert_eq!(keyring.wrap(&context(&stream), &key).await.unwrap().kek_id, "wall:key");
        assert_eq!(keyring.describe().await.unwrap().kek_id, "wall:key");
        assert_eq!(keyring.unwrap(&context(&stream), &new).await.unwrap().expose()[0], 4);
        let old = wrapped("cellar:old:key", None);
        assert_eq!(keyring.unwrap(&context(&stream), &old).await.unwrap().expose()[0], 6);
    }

    #[tokio::test]
    async fn what_nobody_here_wrapped_says_what_to_add() {
        let (keyring, stream) = (keyring(), "ch1".parse().unwrap());
        let foreign = wrapped("vault:transit/k", None);
        let error = keyring.unwrap(&context(&stream), &foreign).await.unwrap_err();
        assert!(error.is_about_what_was_wrapped() && !error.is_retryable());
        let text = error.to_string();
        assert!(text.contains("vault:transit/k") && text.contains("name \"vault\" in kms.also"), "{text}");
    }

    #[test]
    fn what_is_wrapped_by_another_key_or_version_is_not_current() {
        let keyring = keyring();
        let now = KeyDescription { kek_id: "wall:key".into(), version: Some(2) };
        let is_current = |kek_id: &str, version| keyring.is_current(&wrapped(kek_id, version), &now);
        assert!(is_current("wall:key", Some(2)));
        assert!(!is_current("wall:key", Some(1)));
        assert!(!is_current("wall:old", Some(2)));
        assert!(!is_current("cellar:key", Some(2)));
        assert!(is_current("wall:key", None), "whoever does not tell versions has one");
    }
}
