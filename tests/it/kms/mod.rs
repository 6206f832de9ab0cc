//! Providers of wrapping keys: one suite for all, what is each one's own, and a shield that depends on one.
//!
//! Deliberately absent: what surrounds a provider (`kms/guard.rs` tests that on a stopped clock).

#[cfg(feature = "kms-aws")]
mod aws;
#[cfg(feature = "kms-azure")]
mod azure;
#[cfg(feature = "kms-vault")]
pub(crate) mod bao;
#[cfg(feature = "kms-aws")]
pub(crate) mod clouds;
#[cfg(feature = "kms-gcp")]
mod gcp;
#[cfg(any(feature = "kms-azure", feature = "kms-gcp"))]
mod stubs;
#[cfg(feature = "kms-vault")]
pub(crate) mod vault;

use std::path::Path;

use keyshield::keys::{Context, DataEncryptionKey, DekId, DekVersion, KeyId, Ordinal, StreamId};
use keyshield::kms::{Kms, KmsError, LocalKms, WrappedKey};
use keyshield::store::{Location, Store};
use tempfile::TempDir;

use crate::control_api::tokens;
use crate::harness::{Keys, Running, Segment, fetch_segments, get, openssl_decrypt};
use crate::origin::{Answer, Origin};
use crate::sessions::{contains, spellings};

const PLAYLIST: &str = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:10\n\
    #EXTINF:4,\nseg_10.ts\n#EXTINF:4,\nseg_11.ts\n#EXTINF:4,\nseg_12.ts\n";

fn stream(id: &str) -> StreamId {
    id.parse().unwrap()
}

fn context(stream: &StreamId, version: u32) -> Context<'_> {
    Context::Dek { stream, dek: DekId::from_bytes([7; 16]), version: DekVersion(version) }
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

fn refused(outcome: Result<DataEncryptionKey, KmsError>, what: &str) {
    let error = outcome.expect_err(what);
    assert!(error.is_about_what_was_wrapped() && !error.is_retryable(), "{what}: {error}");
}

/// Where a server that stands for a provider in these tests falls short of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gap {
    /// Its ciphertext is not authenticated.
    OpensChangedBytes,
}

/// What every provider must do.
async fn conforms(kms: &dyn Kms) {
    conforms_but_for(kms, &[]).await;
}

/// As [`conforms`], but for what the server cannot do; when it can, the exception is to go.
async fn conforms_but_for(kms: &dyn Kms, gaps: &[Gap]) {
    let (ch1, ch2) = (stream("ch1"), stream("ch2"));
    let here = context(&ch1, 1);
    let (key, wrapped) = kms.generate_data_key(&here).await.unwrap();
    assert_eq!(kms.unwrap(&here, &wrapped).await.unwrap().expose(), key.expose());
    assert_eq!(kms.describe().await.unwrap().kek_id, wrapped.kek_id);
    assert!(!contains(&wrapped.bytes, key.expose()));

    let again = kms.wrap(&here, &key).await.unwrap();
    assert_ne!(again.bytes, wrapped.bytes, "every wrapping is another");
    assert_eq!(kms.unwrap(&here, &again).await.unwrap().expose(), key.expose());
    let (other, _) = kms.generate_data_key(&here).await.unwrap();
    assert_ne!(other.expose(), key.expose());

    for wrapped in [&wrapped, &again] {
        refused(kms.unwrap(&context(&ch2, 1), wrapped).await, "another stream");
        refused(kms.unwrap(&context(&ch1, 2), wrapped).await, "another version");
        let dek = DekId::from_bytes([8; 16]);
        let another = Context::Dek { stream: &ch1, dek, version: DekVersion(1) };
        refused(kms.unwrap(&another, wrapped).await, "another key's ID");
        let (id, version) = (KeyId::from_bytes([7; 16]), DekVersion(1));
        let content = Context::Content { stream: &ch1, key: id, ordinal: Ordinal(0), version };
        refused(kms.unwrap(&content, wrapped).await, "another purpose");

        let mut changed = wrapped.clone();
        let at = changed.bytes.len() - 8;
        changed.bytes[at] = if changed.bytes[at] == b'A' { b'B' } else { b'A' };
        match gaps.contains(&Gap::OpensChangedBytes) {
            true => {
                assert!(kms.unwrap(&here, &changed).await.is_ok(), "this server opens no changed bytes now")
            }
            false => refused(kms.unwrap(&here, &changed).await, "changed bytes"),
        }
        let cut = WrappedKey { bytes: wrapped.bytes[..at].to_vec(), ..wrapped.clone() };
        refused(kms.unwrap(&here, &cut).await, "bytes cut off");
        let foreign = WrappedKey { kek_id: "abacus:key".into(), ..wrapped.clone() };
        refused(kms.unwrap(&here, &foreign).await, "another provider's");
    }
}

#[test]
fn a_master_key_file_conforms() {
    let dir = tempfile::tempdir().unwrap();
    run(conforms(&LocalKms::open(&dir.path().join("master.key")).unwrap()));
}

fn media() -> Vec<u8> {
    (0..50_001_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

pub(crate) fn origin() -> Origin {
    Origin::start(|request| match request.target.ends_with(".m3u8") {
        true => Answer::ok(PLAYLIST),
        false => Answer::ok(media()),
    })
}

/// A shield's configuration with what is given for its KMS, and streams of these names.
fn config(dir: &Path, kms: &str, origin: &Origin, streams: &[&str]) -> String {
    let (dir, url) = (dir.display(), origin.url());
    let streams: String = streams
        .iter()
        .map(|id| format!("[[streams]]\nid = \"{id}\"\nplaylist_url = \"{url}/{id}/index.m3u8\"\n"))
        .collect();
    format!(
        "[store]\ndatabase = \"{dir}/keyshield.db\"\n{kms}[keys]\nsweep_interval_millis = 50\n{}\
         [[origins]]\nname = \"main\"\nurls = [\"{url}\"]\n{streams}",
        tokens()
    )
}

pub(crate) fn check_plays(shield: &Running, id: &str) -> Vec<Segment> {
    let segments = fetch_segments(&shield.at(&format!("/{id}/index.m3u8")));
    for segment in &segments {
        let key = Keys::default().get(&segment.key_url);
        assert!(openssl_decrypt(&get(&segment.url).body, &key, &segment.iv) == media(), "{segment:?}");
    }
    segments
}

/// Without the address, which is another after a restart.
fn paths(segments: &[Segment]) -> Vec<(String, String)> {
    let path = |url: &str| url::Url::parse(url).unwrap().path().to_owned();
    segments.iter().map(|segment| (path(&segment.url), path(&segment.key_url))).collect()
}

/// The first stream's DEK, by the KMS.
fn unwrapped(dir: &Path, kms: &dyn Kms, id: &str) -> Vec<u8> {
    let id = stream(id);
    run(async {
        let store = Store::open(&Location::Sqlite(dir.join("keyshield.db")), 1).await.unwrap();
        let stored = store.load(std::slice::from_ref(&id)).await.unwrap().remove(0);
        store.close().await;
        let dek = &stored.deks[0];
        let wrapped = WrappedKey { kek_id: dek.kek_id.clone(), bytes: dek.wrapped.clone() };
        let context = Context::Dek { stream: &id, dek: dek.id, version: dek.version };
        kms.unwrap(&context, &wrapped).await.unwrap().expose().to_vec()
    })
}

/// A shield that wraps by a provider, and what its tests need to know of that.
struct Site<'a> {
    dir: TempDir,
    /// `[kms]` with the provider's section.
    section: String,
    environment: Vec<(&'a str, &'a str)>,
    /// What the shield proves itself by, which is not to be logged.
    credentials: Vec<Vec<u8>>,
    /// Another way to the same key.
    kms: &'a dyn Kms,
}

/// What every shield must do, whoever wraps its keys. With everything logged that can be.
fn plays_survives_a_restart_and_keeps_no_key_in_clear(site: Site<'_>) {
    let origin = origin();
    let config = config(site.dir.path(), &site.section, &origin, &["ch1"]) + "[log]\nfilter = \"trace\"\n";
    let shield = Running::serve_under(site.dir, &config, &site.environment);
    let before = check_plays(&shield, "ch1");
    assert_eq!(shield.metric("keyshield_kms_up"), 1.0);

    let dir = shield.kill();
    let shield = Running::serve_under(dir, &config, &site.environment);
    assert_eq!(paths(&check_plays(&shield, "ch1")), paths(&before));
    let logged = shield.logged();
    for secret in &site.credentials {
        assert!(!contains(logged.as_bytes(), secret), "a secret is logged");
    }

    let dir = shield.kill();
    let dek = unwrapped(dir.path(), site.kms, "ch1");
    let mut searched = 0;
    // Logs among them.
    for file in std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().path()) {
        let text = std::fs::read(&file).unwrap();
        searched += text.len();
        for (spelling, needle) in spellings(&dek) {
            assert!(!contains(&text, &needle), "{} holds the DEK as {spelling}", file.display());
        }
    }
    assert!(searched > 10_000, "the database was searched");
}

#[test]
fn a_shield_on_a_master_key_file_plays_survives_a_restart_and_keeps_no_key_in_clear() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keyshield.master");
    let kms = LocalKms::open(&file).unwrap();
    let section = format!("[kms]\nmaster_key_file = \"{}\"\n", file.display());
    plays_survives_a_restart_and_keeps_no_key_in_clear(Site {
        dir,
        section,
        environment: Vec::new(),
        credentials: Vec::new(),
        kms: &kms,
    });
}
