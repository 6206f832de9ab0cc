//! What a request asks for, told from its path alone.

use super::reply::Refusal;
use super::settings::ShieldSettings;
use crate::engine::{Engine, Stream};
use crate::hls::{LinkedPath, MountError, OriginPath, canonical_path, normalized_path, without_params};
use std::sync::Arc;

const KEY_PATH: &str = "/api/hls/keys/";
/// Behind a key's path: what proves the key without giving it.
const CHECK: &str = "/check";

/// Where a request goes.
#[derive(Debug)]
pub(super) enum Route<'a> {
    Key { id: &'a str },
    KeyCheck { id: &'a str },
    Segment { linked: LinkedPath },
    Playlist { stream: Arc<Stream>, place: OriginPath<'a> },
    PassThrough { place: OriginPath<'a> },
}

/// Finds the route of a path.
///
/// # Errors
/// [`Refusal`] for a path that could be read two ways, that belongs to nobody, or with a malformed link.
pub(super) fn route<'a>(
    path: &'a str,
    settings: &'a ShieldSettings,
    engine: &Engine,
) -> Result<Route<'a>, Refusal> {
    // The guide's path always; a configured one too, where it is a path and not a CDN's URL.
    let key_id = path.strip_prefix(KEY_PATH).or_else(|| path.strip_prefix(&settings.key_uri_base));
    if let Some(id) = key_id {
        return Ok(match id.strip_suffix(CHECK) {
            Some(id) => Route::KeyCheck { id },
            None => Route::Key { id },
        });
    }
    if let Some(linked) = LinkedPath::parse(path)? {
        return Ok(Route::Segment { linked });
    }
    // One spelling a path, or each would be a playlist of its own.
    let bad = |error: MountError| Refusal::BadPath(error.to_string());
    let path = canonical_path(path).map_err(bad)?;
    let place = settings.mounts.locate(&path).ok_or(Refusal::NoStream)?;
    // Compared as the origin would read it: `/live/%C3%A4/` is `/live/ä/`.
    let plain = normalized_path(&place.path).map_err(bad)?;
    if let Some(stream) = engine.stream_at(&place.mount.origin, &plain) {
        return if stream.is_running() {
            Ok(Route::Playlist { stream, place })
        } else {
            Err(Refusal::Stopped)
        };
    }
    if !place.mount.pass_through {
        return Err(Refusal::NoStream);
    }
    // What the origin may take for a path of a stream does not go to it.
    let cut = without_params(&plain);
    let is_like = |path: &str| engine.is_like_a_streams(&place.mount.origin, path);
    if plain.contains('%') || normalized_path(&cut).is_err() || is_like(&plain) || is_like(&cut) {
        return Err(Refusal::BadPath("the path could be read as one of a stream".into()));
    }
    Ok(Route::PassThrough { place })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::hls::{BaseUrl, Mount, Mounts};
    use crate::telemetry::Metrics;

    fn check(path: &str, expected: &str) {
        let mount = |origin: &str, at: &str, url: &str, pass_through| {
            Mount::new(origin.into(), at, vec![BaseUrl::parse(url).unwrap()], pass_through).unwrap()
        };
        let mounts = Mounts::new(vec![
            mount("main", "/", "http://main.example", true),
            mount("shut", "/shut", "http://shut.example", false),
        ])
        .unwrap();
        let (engine, _seat) = Engine::new(Clock::System, Metrics::new());
        engine.know("one", "main", "/live/ch1/");
        engine.know("sub", "main", "/live/ch1/sub/");
        let settings = ShieldSettings { key_uri_base: "/k/".into(), ..ShieldSettings::for_tests(mounts) };
        let found = match route(path, &settings, &engine) {
            Ok(Route::Key { id }) => format!("key {id}"),
            Ok(Route::KeyCheck { id }) => format!("check {id}"),
            Ok(Route::Segment { linked }) => format!("segment {}", linked.path),
            Ok(Route::Playlist { stream, place }) => format!("{} {}", stream.id, place.path),
            Ok(Route::PassThrough { place }) => format!("through {}", place.path),
            Err(refusal) => refusal.status().as_u16().to_string(),
        };
        assert_eq!(found, expected, "{path}");
    }

    #[test]
    fn the_longest_prefix_owns_a_path() {
        check("/live/ch1/master.m3u8", "one /live/ch1/master.m3u8");
        check("/live/ch1/sub/a.m3u8", "sub /live/ch1/sub/a.m3u8");
        check("/live/ch2/master.m3u8", "through /live/ch2/master.m3u8");
        check("/shut/a.m3u8", "404");
    }

    #[test]
    fn no_spelling_of_an_encrypted_path_is_passed_through() {
        check("/live/%63h1/seg.ts", "one /live/ch1/seg.ts");
        check("/live/%63%681/seg.ts", "one /live/ch1/seg.ts");
        check("/LIVE/ch1/seg.ts", "400");
        check("/live/%2563h1/seg.ts", "400");
        check("/x/..;/live/ch1/seg.ts", "400");
        check("/live;x/ch1/seg.ts", "400");
        check("/%%36%31", "400");
        check("//live/ch1/seg.ts", "400");
        check("/live//ch1/seg.ts", "400");
        check("/x/../live/ch1/seg.ts", "400");
        check("/x/%2e%2e/live/ch1/seg.ts", "400");
        check("/live%2Fch1/seg.ts", "400");
        check("/live\\ch1/seg.ts", "400");
    }

    #[test]
    fn keys_and_links_are_told_first() {
        check("/api/hls/keys/abc", "key abc");
        check("/k/abc", "key abc");
        check("/api/hls/keys/abc/check", "check abc");
        check("/k/abc/check", "check abc");
        check("/k/abc/check/", "key abc/check/");
        let id = "ab".repeat(16);
        check(&format!("/live/ch1/~{id}.7.AAAAAAAAAAAAAAAA/s.ts"), "segment /live/ch1/s.ts");
        check(&format!("/live/ch1/~{id}.7.bad/s.ts"), "403");
        check("/live/ch1/~bob/s.ts", "one /live/ch1/~bob/s.ts");
    }
}
