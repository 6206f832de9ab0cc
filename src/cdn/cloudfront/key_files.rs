//! The private keys of signed URLs: a folder of files that only their owner reads.
//!
//! ```text
//! K2JCJMDEHXQW5F.pem   a private key, by the ID that CloudFront gave its public key
//! signing              the ID of the key that signs
//! rotation.json        how far a rotation is, while there is one
//! new-….pem            a key that CloudFront has not named yet
//! rotation.lock        held while somebody takes a step
//! ```
//!
//! Every file is written whole beside its name and then takes it, so that a crash leaves the old one or the new one.
//! Files are read anew for every signature: whoever rotates, need not restart whoever signs.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use p256::SecretKey;
use p256::pkcs8::{EncodePrivateKey, EncodePublicKey, LineEnding};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

use super::super::{CdnError, CdnFault};
use crate::entropy;

const SIGNING: &str = "signing";
const ROTATION: &str = "rotation.json";
const LOCK: &str = "rotation.lock";

/// The folder.
#[derive(Debug, Clone)]
pub(super) struct KeyFiles {
    directory: PathBuf,
}

fn bad(path: &Path, why: &dyn std::fmt::Display) -> CdnError {
    CdnError::new(CdnFault::Invalid, format!("{}: {why}", path.display()))
}

/// IDs are parts of file names.
fn is_id(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

impl KeyFiles {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// The ID of the key that signs; `None` before there is one.
    pub(super) fn signing(&self) -> Result<Option<String>, CdnError> {
        let Some(bytes) = self.read(SIGNING)? else { return Ok(None) };
        let id = String::from_utf8_lossy(&bytes).trim().to_owned();
        match is_id(&id) {
            true => Ok(Some(id)),
            false => Err(bad(&self.path(SIGNING), &"it holds no ID of a public key")),
        }
    }

    pub(super) fn set_signing(&self, id: &str) -> Result<(), CdnError> {
        self.write(SIGNING, format!("{id}\n").as_bytes())
    }

    /// A private key, PEM.
    pub(super) fn private_key(&self, id: &str) -> Result<Zeroizing<Vec<u8>>, CdnError> {
        let name = format!("{id}.pem");
        self.read(&name)?.ok_or_else(|| bad(&self.path(&name), &"there is no such private key"))
    }

    /// Makes a key under a name of its own, unless that was done, and gives the public part, PEM.
    pub(super) fn make_new(&self, reference: &str) -> Result<String, CdnError> {
        let name = format!("new-{reference}.pem");
        if self.read(&name)?.is_none() {
            let pem = generated().to_pkcs8_pem(LineEnding::LF);
            let pem = pem.map_err(|error| bad(&self.path(&name), &error))?;
            self.write(&name, pem.as_bytes())?;
        }
        self.public_key_of(&name)
    }

    /// Gives what was made the name that CloudFront knows it by.
    pub(super) fn name_new(&self, reference: &str, id: &str) -> Result<(), CdnError> {
        if !is_id(id) {
            return Err(bad(&self.directory, &format!("{id:?} is no ID of a public key")));
        }
        let (from, to) = (self.path(&format!("new-{reference}.pem")), self.path(&format!("{id}.pem")));
        match fs::rename(&from, &to) {
            Ok(()) => self.settle(),
            Err(error) if error.kind() == ErrorKind::NotFound && to.exists() => Ok(()),
            Err(error) => Err(bad(&from, &error)),
        }
    }

    /// Whether there is a private key for an ID.
    pub(super) fn has(&self, id: &str) -> bool {
        self.path(&format!("{id}.pem")).exists()
    }

    pub(super) fn remove_key(&self, id: &str) -> Result<(), CdnError> {
        self.remove(&format!("{id}.pem"))
    }

    pub(super) fn rotation<T: DeserializeOwned>(&self) -> Result<Option<T>, CdnError> {
        let Some(bytes) = self.read(ROTATION)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| bad(&self.path(ROTATION), &error))
    }

    pub(super) fn set_rotation(&self, rotation: &impl Serialize) -> Result<(), CdnError> {
        let text = serde_json::to_vec_pretty(rotation).map_err(|error| bad(&self.path(ROTATION), &error))?;
        self.write(ROTATION, &text)
    }

    pub(super) fn end_rotation(&self) -> Result<(), CdnError> {
        self.remove(ROTATION)
    }

    /// Held as long as what it gives: one step at a time. The system lets go of it when a process ends.
    pub(super) fn lock(&self) -> Result<Held, CdnError> {
        fs::create_dir_all(&self.directory).map_err(|error| bad(&self.directory, &error))?;
        let path = self.path(LOCK);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|error| bad(&path, &error))?;
        match file.try_lock() {
            Ok(()) => Ok(Held(file)),
            Err(_) => {
                let what = format!("{}: another process rotates this key group now", path.display());
                Err(CdnError::new(CdnFault::Away, what))
            }
        }
    }

    fn public_key_of(&self, name: &str) -> Result<String, CdnError> {
        let path = self.path(name);
        let pem = self.read(name)?.ok_or_else(|| bad(&path, &"it went away"))?;
        let text = std::str::from_utf8(&pem).map_err(|error| bad(&path, &error))?;
        let key = <SecretKey as p256::pkcs8::DecodePrivateKey>::from_pkcs8_pem(text);
        let public = key.map_err(|error| bad(&path, &error))?.public_key();
        public.to_public_key_pem(LineEnding::LF).map_err(|error| bad(&path, &error))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn read(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, CdnError> {
        match fs::read(self.path(name)) {
            Ok(bytes) => Ok(Some(Zeroizing::new(bytes))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(bad(&self.path(name), &error)),
        }
    }

    /// As a file of its owner's alone (0600).
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), CdnError> {
        let path = self.path(name);
        let written = || {
            let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
            file.write_all(bytes)?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|error| error.error)
        };
        written().map_err(|error| bad(&path, &error))?;
        self.settle()
    }

    fn remove(&self, name: &str) -> Result<(), CdnError> {
        match fs::remove_file(self.path(name)) {
            Ok(()) => self.settle(),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(bad(&self.path(name), &error)),
        }
    }

    /// Names are written to the disk too.
    fn settle(&self) -> Result<(), CdnError> {
        let synced = File::open(&self.directory).and_then(|directory| directory.sync_all());
        synced.map_err(|error| bad(&self.directory, &error))
    }
}

/// Of the curve P-256, which CloudFront takes, and whose signatures make URLs shorter than RSA's.
fn generated() -> SecretKey {
    loop {
        // All but one in 2³² draws are below the curve's order.
        if let Ok(key) = SecretKey::from_slice(&*entropy::random::<32>()) {
            return key;
        }
    }
}

/// The right to take a step.
#[derive(Debug)]
pub(super) struct Held(File);

impl Drop for Held {
    fn drop(&mut self) {
        // By its word and not by closing it: a process that is being started may have the file for a moment too.
        let _ = self.0.unlock();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn files() -> (tempfile::TempDir, KeyFiles) {
        let dir = tempfile::tempdir().unwrap();
        let files = KeyFiles::new(dir.path().to_owned());
        (dir, files)
    }

    #[test]
    fn a_key_is_made_once_and_is_its_owners_alone() {
        let (dir, files) = files();
        let public = files.make_new("ab").unwrap();
        assert!(public.starts_with("-----BEGIN PUBLIC KEY-----"), "{public}");
        assert_eq!(files.make_new("ab").unwrap(), public);
        files.name_new("ab", "K1").unwrap();
        files.name_new("ab", "K1").unwrap();
        let mode = fs::metadata(dir.path().join("K1.pem")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(files.private_key("K1").unwrap().starts_with(b"-----BEGIN PRIVATE KEY-----"));
        assert!(files.name_new("ab", "../K1").is_err());
    }

    #[test]
    fn one_rotates_at_a_time() {
        let (_dir, files) = files();
        let held = files.lock().unwrap();
        assert!(files.lock().unwrap_err().what.contains("another process"));
        drop(held);
        assert!(files.lock().is_ok());
    }
}
