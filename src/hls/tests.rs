//! What the tests of this room share: origins, and a playlist's surroundings among them.

use super::mounts::{BaseUrl, Mount, Mounts};
use super::{OriginPath, Surroundings, VariableSources};
use crate::keys::{DekId, LinkKey, OnEncrypted};

/// Origins of several kinds: at the root, elsewhere, below a base path, with `pass_through`.
pub(super) fn mounts() -> Mounts {
    let mount = |origin: &str, path, url, pass_through| {
        let bases = vec![BaseUrl::parse(url).unwrap()];
        let mut mount = Mount::new(origin.to_owned(), path, bases, pass_through).unwrap();
        mount.query_params = vec!["t".into()];
        mount
    };
    Mounts::new(vec![
        mount("main", "/", "https://origin.example", false),
        mount("audio", "/audio", "https://audio.example/pool", false),
        mount("based", "/based", "https://based.example/base", false),
        mount("open", "/open", "https://open.example", true),
    ])
    .unwrap()
}

pub(super) const DEK: DekId = DekId::from_bytes([0xdd; 16]);

/// Calls with the surroundings of a playlist in `/live/ch1/`, at an origin without `pass_through`.
pub(super) fn around<T>(call: impl FnOnce(&Surroundings<'_>) -> T) -> T {
    around_at("/live/ch1/720p.m3u8", call)
}

/// As [`around`], of a playlist at a path of the shield.
pub(super) fn around_at<T>(path: &str, call: impl FnOnce(&Surroundings<'_>) -> T) -> T {
    let (mounts, clear) = (mounts(), LinkKey::from_bytes([1; 32]));
    let from = mounts.locate(path).unwrap();
    // As in a stream that owns all but one directory, and nothing at the open origin.
    let is_protected = |to: &OriginPath<'_>| !to.path.starts_with("/open/") && to.mount.origin != "open";
    call(&Surroundings {
        mounts: &mounts,
        from: &from,
        is_protected: &is_protected,
        on_encrypted: OnEncrypted::Reject,
        variables: VariableSources::default(),
        key_uri_base: "/api/hls/keys/",
        clear: (DEK, &clear),
    })
}
