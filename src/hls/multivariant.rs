//! A Multivariant Playlist as the shield publishes it.
//!
//! Paths of the shield are the paths of the origin, so relative URIs stay as they are. What changes is what
//! names an origin by its host or its root: it is led through that origin's mount. What is neither a playlist nor media
//! (session data, the steering manifest, keys of an origin that encrypts by itself) is linked, so that it can be
//! fetched at all; where it lies at no allowed origin, it is the player's own business and stays.

use quick_m3u8::tag::IntoInnerTag;
use quick_m3u8::tag::hls::SessionKey as SessionKeyTag;

use super::attributes::{Attributes, Edits};
use super::encrypted::Encryption;
use super::error::{PlaylistError, Problem};
use super::linker::{Surroundings, Target};
use super::playlist::{Content, Line, Playlist};
use super::variables::Variables;
use crate::keys::{KeyId, KeyMethod, OnEncrypted, Place};

/// A key that players may load before a Media Playlist names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionKey {
    pub id: KeyId,
    pub method: KeyMethod,
}

/// Rewrites a Multivariant Playlist.
///
/// # Errors
/// The first line with a URI that leads to no allowed origin, what is encrypted already, and variables that are not
/// defined.
pub fn rewrite_multivariant(
    playlist: &Playlist<'_>,
    around: &Surroundings<'_>,
    session_key: Option<SessionKey>,
) -> Result<String, PlaylistError> {
    let mut out = String::with_capacity(playlist.lines.len() * 96);
    if playlist.byte_order_mark {
        out.push('\u{feff}');
    }
    let mut variables = Variables::default();
    // Before the first line that is about renditions.
    let mut session_key = session_key;
    for (number, line) in (1..).zip(&playlist.lines) {
        if is_about_renditions(line)
            && let Some(key) = session_key.take()
        {
            out.push_str(&session_key_line(key, around));
            out.push_str(if line.ending.is_empty() { "\n" } else { line.ending });
        }
        let rewritten = match line.content {
            Content::Tag(tag) if tag.name() == "-X-DEFINE" => {
                variables.define(tag, around.variables).map(|()| Rewritten::Same)
            }
            _ => variables.check(line).and_then(|()| rewrite_line(line, &variables, around)),
        };
        match rewritten.map_err(|problem| problem.at(number))? {
            Rewritten::Same => out.push_str(line.text),
            Rewritten::As(text) => out.push_str(&text),
            Rewritten::Gone => continue,
        }
        out.push_str(line.ending);
    }
    Ok(out)
}

/// What becomes of a line.
enum Rewritten {
    Same,
    As(String),
    Gone,
}

fn rewrite_line(
    line: &Line<'_>,
    variables: &Variables,
    around: &Surroundings<'_>,
) -> Result<Rewritten, Problem> {
    let tag = match line.content {
        Content::Uri => {
            let plain = variables.substitute(line.text)?;
            let mapped =
                playlist_uri(&plain, around)?.or_else(|| (plain != line.text).then(|| plain.into_owned()));
            return Ok(mapped.map_or(Rewritten::Same, Rewritten::As));
        }
        Content::Tag(tag) => tag,
        Content::Other => return Ok(Rewritten::Same),
    };
    let name = match tag.name() {
        "-X-CONTENT-STEERING" => "SERVER-URI",
        "-X-MEDIA" | "-X-I-FRAME-STREAM-INF" | "-X-SESSION-DATA" | "-X-SESSION-KEY" => "URI",
        _ => return Ok(Rewritten::Same),
    };
    let attributes = Attributes::of(tag)?;
    if tag.name() == "-X-SESSION-KEY" {
        // What is encrypted anew is not decrypted by the origin's keys.
        match Encryption::behind(&attributes, around.on_encrypted)? {
            Encryption::Kept => {}
            _ if around.on_encrypted == OnEncrypted::Rekey => return Ok(Rewritten::Gone),
            _ => return Err(attributes.bad("METHOD=NONE names no key (D22 §4.4.6.5)".into())),
        }
    }
    let Some(uri) = attributes.quoted(name) else { return Ok(Rewritten::Same) };
    let plain = variables.substitute(uri)?;
    let by = match tag.name() {
        "-X-MEDIA" | "-X-I-FRAME-STREAM-INF" => playlist_uri(&plain, around)?,
        "-X-SESSION-DATA" => linked(&plain, Place::SessionData, around)?,
        "-X-SESSION-KEY" => linked(&plain, Place::OriginKey, around)?,
        _ => linked(&plain, Place::Steering, around)?,
    };
    let Some(by) = by.or_else(|| (plain != uri).then(|| plain.into_owned())) else {
        return Ok(Rewritten::Same);
    };
    let mut edits = Edits::of(line.text);
    edits.replace(uri, by);
    Ok(Rewritten::As(edits.apply()))
}

/// The link of what lies at an origin and is served as it is.
fn linked(uri: &str, place: Place, around: &Surroundings<'_>) -> Result<Option<String>, Problem> {
    if !around.leads_to_an_origin(uri) {
        return Ok(None);
    }
    around.clear(uri, &Target::as_it_is(place), None).map(Some)
}

fn is_about_renditions(line: &Line<'_>) -> bool {
    let tags = ["-X-STREAM-INF", "-X-MEDIA", "-X-I-FRAME-STREAM-INF"];
    line.content == Content::Uri || line.tag_name().is_some_and(|name| tags.contains(&name))
}

/// D22 §4.4.6.5: METHOD is that of the EXT-X-KEY tags with the same URI; their IVs are their own.
fn session_key_line(key: SessionKey, around: &Surroundings<'_>) -> String {
    let uri = format!("{}{}", around.key_uri_base, key.id);
    let tag = SessionKeyTag::builder().with_method(key.method.name()).with_uri(uri).finish();
    String::from_utf8_lossy(tag.into_inner().value()).into_owned()
}

/// The shield's path for the URI of a playlist that names its origin by host or root; `None` where the URI can stay.
pub(super) fn playlist_uri(uri: &str, around: &Surroundings<'_>) -> Result<Option<String>, Problem> {
    let reference = uri.split(['?', '#']).next().unwrap_or_default();
    let bad = |why: String| Problem::BadUri { uri: reference.chars().take(200).collect(), why };
    let to = around.mounts.resolve(around.from, uri).map_err(|error| bad(error.to_string()))?;
    if !(around.is_protected)(&to) {
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
    use crate::hls::tests::{around, around_at};

    fn rewrite(input: &str, around: &Surroundings<'_>) -> Result<String, PlaylistError> {
        rewrite_multivariant(&Playlist::parse(input.as_bytes()).unwrap(), around, None)
    }

    /// With the links' components, whose MACs `keys::derive` pins, cut short.
    fn check_with(change: impl FnOnce(&mut Surroundings<'_>), input: &str, expected: &str) {
        around(|around| {
            let mut around = *around;
            change(&mut around);
            let mut shown = rewrite(input, &around).unwrap();
            while let Some(at) = shown.find('~') {
                let len = shown[at..].find('/').unwrap();
                let place = shown[at..at + len].split('.').nth(1).unwrap().to_owned();
                shown.replace_range(at..at + len, &format!("LINK-{place}"));
            }
            assert_eq!(shown, expected);
        });
    }

    fn check(input: &str, expected: &str) {
        check_with(|_| {}, input, expected);
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

    fn refusal(input: &str) -> PlaylistError {
        around(|around| rewrite(input, around).unwrap_err())
    }

    fn refused(uri: &str) -> String {
        refusal(&format!("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{uri}\n")).to_string()
    }

    #[test]
    fn a_host_that_is_not_allowed_is_refused_with_its_line() {
        let error =
            refusal("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nhttps://evil.example/a.m3u8?token=s3cret\n");
        assert_eq!(error.line, 3);
        let shown = format!("{error} {}", error.problem);
        assert!(shown.contains("evil.example") && !shown.contains("s3cret"), "{shown}");
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
        let input = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n/base/live/720p.m3u8\n";
        let output = around_at("/based/live/master.m3u8", |around| rewrite(input, around)).unwrap();
        assert!(output.ends_with("\n/based/live/720p.m3u8\n"), "{output}");
    }

    #[test]
    fn session_data_and_the_steering_manifest_are_linked_or_somebody_elses() {
        check(
            "#EXTM3U\n#EXT-X-SESSION-DATA:DATA-ID=\"a\",URI=\"meta/a.json\",X-ODD=1\n\
             #EXT-X-SESSION-DATA:DATA-ID=\"b\",VALUE=\"b\"\n\
             #EXT-X-SESSION-DATA:DATA-ID=\"c\",URI=\"https://data.example/c.json\"\n\
             #EXT-X-CONTENT-STEERING:SERVER-URI=\"/steer?v=1\",PATHWAY-ID=\"a\"\n",
            "#EXTM3U\n#EXT-X-SESSION-DATA:DATA-ID=\"a\",URI=\"meta/LINK-data/a.json\",X-ODD=1\n\
             #EXT-X-SESSION-DATA:DATA-ID=\"b\",VALUE=\"b\"\n\
             #EXT-X-SESSION-DATA:DATA-ID=\"c\",URI=\"https://data.example/c.json\"\n\
             #EXT-X-CONTENT-STEERING:SERVER-URI=\"/LINK-steering/steer?_oq=dj0x.MAC\",PATHWAY-ID=\"a\"\n"
                .replace("MAC", &mac_of_steer())
                .as_str(),
        );
    }

    /// The MAC of a query is not what this test is about.
    fn mac_of_steer() -> String {
        let input = "#EXTM3U\n#EXT-X-CONTENT-STEERING:SERVER-URI=\"/steer?v=1\"\n";
        let output = around(|around| rewrite(input, around)).unwrap();
        output.split("_oq=dj0x.").nth(1).unwrap().split('"').next().unwrap().to_owned()
    }

    #[test]
    fn variables_are_put_into_uris_and_stay_everywhere_else() {
        check(
            "#EXTM3U\n#EXT-X-DEFINE:NAME=\"cdn\",VALUE=\"https://audio.example/pool\"\n\
             #EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID=\"a\",NAME=\"{$cdn}\",URI=\"{$cdn}/en.m3u8\"\n\
             #EXT-X-DEFINE:NAME=\"dir\",VALUE=\"v\"\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{$dir}/720p.m3u8\n",
            "#EXTM3U\n#EXT-X-DEFINE:NAME=\"cdn\",VALUE=\"https://audio.example/pool\"\n\
             #EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID=\"a\",NAME=\"{$cdn}\",URI=\"/audio/en.m3u8\"\n\
             #EXT-X-DEFINE:NAME=\"dir\",VALUE=\"v\"\n#EXT-X-STREAM-INF:BANDWIDTH=1\nv/720p.m3u8\n",
        );
        let error = refusal("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1,NAME=\"{$none}\"\na.m3u8\n");
        assert_eq!((error.line, error.problem), (2, Problem::UndefinedVariable { name: "none".into() }));
    }

    #[test]
    fn session_keys_of_the_origin_go_the_way_of_its_keys() {
        let input = "#EXTM3U\n#EXT-X-SESSION-KEY:METHOD=AES-128,URI=\"k.bin\"\n\
                     #EXT-X-SESSION-KEY:METHOD=AES-128,URI=\"https://drm.example/k\"\n";
        let with = |on: OnEncrypted, input: &str, expected: &str| {
            check_with(|around| around.on_encrypted = on, input, expected);
        };
        let linked = input.replace("\"k.bin\"", "\"LINK-key/k.bin\"");
        with(OnEncrypted::Pass, input, &linked);
        with(OnEncrypted::Rekey, input, "#EXTM3U\n");
        assert!(matches!(refusal(input).problem, Problem::AlreadyEncrypted { .. }));
    }

    #[test]
    fn a_key_to_preload_stands_before_the_renditions() {
        let input = "#EXTM3U\r\n#EXT-X-VERSION:6\r\n#EXT-X-STREAM-INF:BANDWIDTH=1\r\na.m3u8\r\n";
        let key = SessionKey { id: KeyId::from_bytes([7; 16]), method: KeyMethod::Aes128 };
        let playlist = Playlist::parse(input.as_bytes()).unwrap();
        let output = around(|around| rewrite_multivariant(&playlist, around, Some(key))).unwrap();
        let expected = format!(
            "#EXT-X-VERSION:6\r\n#EXT-X-SESSION-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{}\"\r\n#EXT-X-STREAM-INF",
            "07".repeat(16)
        );
        assert!(output.contains(&expected), "{output}");
    }
}
