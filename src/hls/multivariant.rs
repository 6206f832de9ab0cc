//! A Multivariant Playlist as the shield publishes it.
//!
//! Paths of the shield are the paths of the origin, so relative URIs stay as they are. What changes is what
//! names an origin by its host or its root: it is led through that origin's mount. Deliberately absent: keys,
//! which only Media Playlists name.

use super::attributes::Attributes;
use super::error::{PlaylistError, Problem};
use super::mounts::{Mounts, Place as OriginPath};
use super::playlist::{Content, Playlist};

/// Rewrites a Multivariant Playlist that lies at `from`.
///
/// # Errors
/// The first line with a URI that leads to no allowed origin, and what is encrypted or variable already.
pub fn rewrite_multivariant(
    playlist: &Playlist<'_>,
    mounts: &Mounts,
    from: &OriginPath<'_>,
    is_protected: &dyn Fn(&OriginPath<'_>) -> bool,
) -> Result<String, PlaylistError> {
    let mut out = String::with_capacity(playlist.lines.len() * 96);
    if playlist.byte_order_mark {
        out.push('\u{feff}');
    }
    for (number, line) in (1..).zip(&playlist.lines) {
        let text = match line.content {
            Content::Uri => mapped(line.text, mounts, from, is_protected),
            Content::Tag(tag) => match tag.name() {
                "-X-MEDIA" | "-X-I-FRAME-STREAM-INF" => Attributes::of(tag).and_then(|attributes| {
                    let Some(uri) = attributes.quoted("URI") else { return Ok(None) };
                    let mapped = mapped(uri, mounts, from, is_protected)?;
                    Ok(mapped.map(|by| Attributes::splice(line.text, uri, &by)))
                }),
                "-X-SESSION-KEY" => {
                    Err(Problem::AlreadyEncrypted { method: "in EXT-X-SESSION-KEY".to_owned() })
                }
                "-X-DEFINE" => Err(Problem::Unsupported { tag: "EXT-X-DEFINE" }),
                _ => Ok(None),
            },
            Content::Other => Ok(None),
        }
        .map_err(|problem| problem.at(number))?;
        out.push_str(text.as_deref().unwrap_or(line.text));
        out.push_str(line.ending);
    }
    Ok(out)
}

/// The shield's path for a URI that names its origin by host or root; `None` where the URI can stay.
fn mapped(
    uri: &str,
    mounts: &Mounts,
    from: &OriginPath<'_>,
    is_protected: &dyn Fn(&OriginPath<'_>) -> bool,
) -> Result<Option<String>, Problem> {
    let reference = uri.split(['?', '#']).next().unwrap_or_default();
    let bad = |why: String| Problem::BadUri { uri: reference.chars().take(200).collect(), why };
    let to = mounts.resolve(from, uri).map_err(|error| bad(error.to_string()))?;
    if !is_protected(&to) {
        return Err(bad("it lies outside every stream and would not be encrypted; widen path_prefix".into()));
    }
    if let Some(param) = to.query.as_deref().and_then(|query| to.mount.unknown_param(query)) {
        let origin = &to.mount.origin;
        return Err(bad(format!(
            "its query parameter {param:?} would not be sent on; add it to query_params of origin {origin:?}"
        )));
    }
    let path = to.mount.shield_path(&to.path);
    let names_its_host = reference.split('/').next().is_some_and(|first| first.contains(':'));
    let is_rooted = reference.starts_with('/');
    if !names_its_host && (!is_rooted || reference == path) {
        return Ok(None);
    }
    Ok(Some(match to.query {
        Some(query) => format!("{path}?{query}"),
        None => path,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hls::mounts::{BaseUrl, Mount};

    fn mounts() -> Mounts {
        let mount = |origin: &str, path, url| {
            let bases = vec![BaseUrl::parse(url).unwrap()];
            let mut mount = Mount::new(origin.to_owned(), path, bases, false).unwrap();
            mount.query_params = vec!["t".into()];
            mount
        };
        Mounts::new(vec![
            mount("main", "/", "https://origin.example"),
            mount("audio", "/audio", "https://audio.example/pool"),
            mount("based", "/based", "https://based.example/base"),
        ])
        .unwrap()
    }

    fn check(input: &str, expected: &str) {
        let mounts = mounts();
        let from = mounts.locate("/live/ch1/master.m3u8").unwrap();
        let playlist = Playlist::parse(input.as_bytes()).unwrap();
        assert_eq!(
            rewrite_multivariant(&playlist, &mounts, &from, &|to| !to.path.starts_with("/open/")).unwrap(),
            expected
        );
    }

    #[test]
    fn relative_uris_and_unknown_attributes_stay_byte_for_byte() {
        let input = "#EXTM3U\r\n#EXT-X-VERSION:6\r\n\r\n# made by a packager\r\n\
            #EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID=\"a\",NAME=\"en\",X-ODD=0x1F,URI=\"audio/en.m3u8?t=1\"\r\n\
            #EXT-X-STREAM-INF:BANDWIDTH=1280000,X-NEW=\"1,2\",AUDIO=\"a\"\r\n720p/index.m3u8\r\n\
            #EXT-X-SOMETHING-NEW:1,2,3";
        check(input, input);
    }

    #[test]
    fn uris_with_a_host_go_through_their_origins_mount() {
        check(
            "#EXTM3U\n\
             #EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID=\"a\",URI=\"https://audio.example/pool/en.m3u8?t=1\",NAME=\"en\"\n\
             #EXT-X-STREAM-INF:BANDWIDTH=1\nhttps://origin.example/live/ch1/720p.m3u8\n\
             #EXT-X-STREAM-INF:BANDWIDTH=2\n/live/ch1/1080p.m3u8\n",
            "#EXTM3U\n\
             #EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID=\"a\",URI=\"/audio/en.m3u8?t=1\",NAME=\"en\"\n\
             #EXT-X-STREAM-INF:BANDWIDTH=1\n/live/ch1/720p.m3u8\n\
             #EXT-X-STREAM-INF:BANDWIDTH=2\n/live/ch1/1080p.m3u8\n",
        );
    }

    #[test]
    fn a_value_that_occurs_twice_is_replaced_only_as_the_uri() {
        check(
            "#EXTM3U\n#EXT-X-MEDIA:TYPE=AUDIO,NAME=\"https://origin.example/a.m3u8\",GROUP-ID=\"g\",URI=\"https://origin.example/a.m3u8\"\n",
            "#EXTM3U\n#EXT-X-MEDIA:TYPE=AUDIO,NAME=\"https://origin.example/a.m3u8\",GROUP-ID=\"g\",URI=\"/a.m3u8\"\n",
        );
    }

    #[test]
    fn a_host_that_is_not_allowed_is_refused_with_its_line() {
        let mounts = mounts();
        let from = mounts.locate("/live/ch1/master.m3u8").unwrap();
        let input = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nhttps://evil.example/a.m3u8?token=s3cret\n";
        let playlist = Playlist::parse(input.as_bytes()).unwrap();
        let error = rewrite_multivariant(&playlist, &mounts, &from, &|to| !to.path.starts_with("/open/"))
            .unwrap_err();
        assert_eq!(error.line, 3);
        let shown = format!("{error} {}", error.problem);
        assert!(shown.contains("evil.example") && !shown.contains("s3cret"), "{shown}");
    }

    fn refused(uri: &str) -> String {
        let mounts = mounts();
        let from = mounts.locate("/live/ch1/master.m3u8").unwrap();
        let input = format!("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{uri}\n");
        let playlist = Playlist::parse(input.as_bytes()).unwrap();
        let protected = |to: &OriginPath<'_>| !to.path.starts_with("/open/");
        rewrite_multivariant(&playlist, &mounts, &from, &protected).unwrap_err().to_string()
    }

    #[test]
    fn a_rendition_outside_every_stream_would_play_in_clear_and_is_refused() {
        assert!(refused("/open/audio.m3u8").contains("outside every stream"));
    }

    #[test]
    fn a_query_that_would_not_be_sent_on_is_refused_by_its_parameter() {
        let why = refused("720p.m3u8?t=1&sig=s3cret");
        assert!(why.contains("\"sig\"") && why.contains("query_params") && !why.contains("s3cret"), "{why}");
    }

    #[test]
    fn a_root_relative_uri_loses_its_origins_base_path() {
        let mounts = mounts();
        let from = mounts.locate("/based/live/master.m3u8").unwrap();
        let input = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n/base/live/720p.m3u8\n";
        let playlist = Playlist::parse(input.as_bytes()).unwrap();
        let output = rewrite_multivariant(&playlist, &mounts, &from, &|_| true).unwrap();
        assert!(output.ends_with("\n/based/live/720p.m3u8\n"), "{output}");
    }
}
