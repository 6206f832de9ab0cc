//! A master key file on this machine.
//!
//! One master key a line, `{id}:{64 hex digits}`; the first wraps, all unwrap. The file is made with mode 0600
//! on the first start, and one that others may read is refused: whoever has it and the database has every key.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use thiserror::Error;
use zeroize::Zeroizing;

use super::{Cause, KeyDescription, Kms, KmsError, WrappedKey, named_by};
use crate::entropy;
use crate::fault;
use crate::keys::{Context, DataEncryptionKey, EnvelopeError, NONCE_LEN, open, seal};

const PROVIDER: &str = "local";

/// Why the master key file cannot be used.
#[derive(Debug, Error)]
pub enum MasterKeyError {
    #[error("cannot {what} the master key file {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "the master key file {path} may be read by others (mode {mode:04o}); run: chmod 600 {path}",
        path = path.display()
    )]
    TooOpen { path: PathBuf, mode: u32 },
    #[error(
        "the master key file {path}, line {line}: expected ID:64-HEX-DIGITS (the ID of letters, digits and -)",
        path = path.display()
    )]
    BadLine { path: PathBuf, line: usize },
    #[error("the master key file {path} holds no key", path = path.display())]
    Empty { path: PathBuf },
}

struct MasterKey {
    id: String,
    key: Zeroizing<[u8; 32]>,
}

/// The keys of one master key file.
pub struct LocalKms {
    /// Never empty; the first wraps.
    keys: Vec<MasterKey>,
}

impl std::fmt::Debug for LocalKms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| &key.id)).finish()
    }
}

impl LocalKms {
    /// Reads the file, making it with one random key if it is not there.
    ///
    /// # Errors
    /// A file that cannot be read or made, that others may read, or whose lines are not keys.
    pub fn open(path: &Path) -> Result<Self, MasterKeyError> {
        match Self::create(path) {
            Ok(()) => tracing::info!(path = %path.display(), "made a master key file: back it up"),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(MasterKeyError::Io { what: "make", path: path.to_owned(), source }),
        }
        Self::read(path)
    }

    /// Reads the file, which must be there: what is held for its old keys is of no use with a new one.
    ///
    /// # Errors
    /// A file that cannot be read, that others may read, or whose lines are not keys.
    pub fn read(path: &Path) -> Result<Self, MasterKeyError> {
        let io = |what| move |source| MasterKeyError::Io { what, path: path.to_owned(), source };
        let mode = fs::metadata(path).map_err(io("read"))?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(MasterKeyError::TooOpen { path: path.to_owned(), mode });
        }
        let text = Zeroizing::new(fs::read_to_string(path).map_err(io("read"))?);
        let keys = text
            .lines()
            .enumerate()
            .map(|(at, line)| (at + 1, line.trim()))
            .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
            .map(|(line, text)| {
                MasterKey::parse(text).ok_or_else(|| MasterKeyError::BadLine { path: path.to_owned(), line })
            })
            .collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() {
            return Err(MasterKeyError::Empty { path: path.to_owned() });
        }
        Ok(Self { keys })
    }

    /// Makes the file with one random key. It gets its name only when it is whole and on disk.
    fn create(path: &Path) -> io::Result<()> {
        if path.exists() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let draft = path.with_extension(format!("new-{}", hex::encode(&entropy::random::<8>()[..])));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
        let id = hex::encode(&entropy::random::<4>()[..]);
        let key = Zeroizing::new(hex::encode(&entropy::random::<32>()[..]));
        let written = writeln!(file, "# keyshield master keys: the first wraps, all unwrap")
            .and_then(|()| writeln!(file, "{id}:{}", &*key))
            .and_then(|()| file.sync_all())
            .inspect(|()| fault::point("master key: written, no name"))
            // A link, not a rename: it fails where another process was first, instead of taking its place.
            .and_then(|()| fs::hard_link(&draft, path));
        fault::point("master key: named, draft there");
        fs::remove_file(&draft)?;
        fault::point("master key: made");
        written?;
        match path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }

    /// The ID of the key that wraps, as it is stored.
    fn kek_id(&self) -> String {
        format!("{PROVIDER}:{}", self.keys[0].id)
    }
}

#[async_trait]
impl Kms for LocalKms {
    async fn wrap(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
        let bytes = seal(&self.keys[0].key, *entropy::random::<NONCE_LEN>(), context, key.expose());
        Ok(WrappedKey { kek_id: self.kek_id(), bytes })
    }

    async fn unwrap(
        &self,
        context: &Context<'_>,
        wrapped: &WrappedKey,
    ) -> Result<DataEncryptionKey, KmsError> {
        let failed = |cause| KmsError { provider: PROVIDER, key: wrapped.kek_id.clone(), cause };
        let id = named_by(PROVIDER, &wrapped.kek_id);
        let master = self.keys.iter().find(|key| Some(key.id.as_str()) == id);
        let master = master.ok_or_else(|| failed(Cause::Foreign))?;
        let plaintext =
            open(&master.key, context, &wrapped.bytes).map_err(|error| failed(Cause::Envelope(error)))?;
        let bytes: &[u8; DataEncryptionKey::LEN] = plaintext[..]
            .try_into()
            .map_err(|_| failed(Cause::Envelope(EnvelopeError::TooShort { found: plaintext.len() })))?;
        Ok(DataEncryptionKey::from_bytes(*bytes))
    }

    async fn describe(&self) -> Result<KeyDescription, KmsError> {
        Ok(KeyDescription { kek_id: self.kek_id(), version: None })
    }
}

impl MasterKey {
    fn parse(line: &str) -> Option<Self> {
        let (id, digits) = line.split_once(':')?;
        let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        let mut key = Zeroizing::new([0; 32]);
        hex::decode_to_slice(digits.trim(), &mut key[..]).ok()?;
        (!id.is_empty() && id.bytes().all(legal)).then(|| Self { id: id.to_owned(), key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{DekId, DekVersion, StreamId};

    fn context(stream: &StreamId) -> Context<'_> {
        Context::Dek { stream, dek: DekId::from_bytes([1; 16]), version: DekVersion(1) }
    }

    fn file(dir: &tempfile::TempDir, text: &str) -> PathBuf {
        let path = dir.path().join("master.key");
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        path
    }

    #[tokio::test]
    async fn the_file_is_made_for_its_owner_alone_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        let stream: StreamId = "ch1".parse().unwrap();
        let kms = LocalKms::open(&path).unwrap();
        let (dek, wrapped) = kms.generate_data_key(&context(&stream)).await.unwrap();

        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left behind");
        let again = LocalKms::open(&path).unwrap();
        let unwrapped = again.unwrap(&context(&stream), &wrapped).await.unwrap();
        assert_eq!(unwrapped.expose(), dek.expose());
    }

    #[tokio::test]
    async fn the_first_key_wraps_and_all_unwrap() {
        let dir = tempfile::tempdir().unwrap();
        let stream: StreamId = "ch1".parse().unwrap();
        let (old, new) = ("01".repeat(32), "02".repeat(32));
        let before = LocalKms::open(&file(&dir, &format!("old:{old}\n"))).unwrap();
        let (_, wrapped) = before.generate_data_key(&context(&stream)).await.unwrap();

        let after = LocalKms::open(&file(&dir, &format!("# rolled\nnew:{new}\nold:{old}\n"))).unwrap();
        assert_eq!(after.describe().await.unwrap().kek_id, "local:new");
        assert!(after.unwrap(&context(&stream), &wrapped).await.is_ok());

        let gone = LocalKms::open(&file(&dir, &format!("new:{new}\n"))).unwrap();
        let error = gone.unwrap(&context(&stream), &wrapped).await.unwrap_err();
        assert_eq!((error.key.as_str(), error.cause), ("local:old", Cause::Foreign));
    }

    #[test]
    fn a_file_that_is_only_held_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        let error = LocalKms::read(&path).unwrap_err().to_string();
        assert!(error.contains("master.key") && !path.exists(), "{error}");
    }

    #[test]
    fn a_file_that_others_may_read_is_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, &format!("a:{}\n", "01".repeat(32)));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = LocalKms::open(&path).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_line_that_is_no_key_is_named_but_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let error = LocalKms::open(&file(&dir, "\nsecretsecret\n")).unwrap_err().to_string();
        assert!(error.contains("line 2") && !error.contains("secretsecret"), "{error}");
        assert!(matches!(LocalKms::open(&file(&dir, "# none\n")), Err(MasterKeyError::Empty { .. })));
    }
}
