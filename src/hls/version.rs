//! EXT-X-VERSION of a playlist into which IVs were written.
//!
//! An origin's version stands unless it is too low for an IV; then it becomes what the playlist needs as it is served,
//! and no more (D22 §8). What the origin itself should have said with tags of its own is its business: only when the
//! line is ours does it count too.

use quick_m3u8::tag::IntoInnerTag;
use quick_m3u8::tag::hls::Version;

use super::attributes::Attributes;
use super::playlist::{Content, Playlist, value_text};

/// An EXT-X-KEY with an IV needs at least this version.
pub(super) const WITH_IV: u64 = 2;

/// The line that says what `playlist` needs, with IVs in it.
pub(super) fn line_for(playlist: &Playlist<'_>) -> String {
    let is_i_frames_only = playlist.lines.iter().any(|line| line.tag_name() == Some("-X-I-FRAMES-ONLY"));
    let needed = playlist.lines.iter().map(|line| {
        let Content::Tag(tag) = line.content else { return WITH_IV };
        let has = |name| Attributes::of(tag).is_ok_and(|attributes| attributes.has(name));
        match tag.name() {
            "INF" if value_text(&tag).split(',').next().is_some_and(|secs| secs.contains('.')) => 3,
            "-X-I-FRAMES-ONLY" => 4,
            "-X-KEY" if has("KEYFORMAT") || has("KEYFORMATVERSIONS") => 5,
            "-X-MAP" if is_i_frames_only => 5,
            "-X-MAP" => 6,
            "-X-DEFINE" if has("QUERYPARAM") => 11,
            "-X-DEFINE" => 8,
            "-X-SKIP" => 9,
            _ => WITH_IV,
        }
    });
    let version = Version::new(needed.max().unwrap_or(WITH_IV));
    String::from_utf8_lossy(version.into_inner().value()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(lines: &str, expected: &str) {
        let text = format!("#EXTM3U\n{lines}");
        assert_eq!(
            line_for(&Playlist::parse(text.as_bytes()).unwrap()),
            format!("#EXT-X-VERSION:{expected}")
        );
    }

    #[test]
    fn the_version_is_what_the_tags_need_and_no_higher() {
        check("#EXTINF:6,1.5\na.ts\n", "2");
        check("#EXTINF:6.0,\na.ts\n", "3");
        check("#EXTINF:6,\n#EXT-X-BYTERANGE:1@0\na.ts\n", "2");
        check("#EXT-X-I-FRAMES-ONLY\n", "4");
        check("#EXT-X-KEY:METHOD=SAMPLE-AES,URI=\"k\",KEYFORMAT=\"x\"\n", "5");
        check("#EXT-X-I-FRAMES-ONLY\n#EXT-X-MAP:URI=\"i\"\n", "5");
        check("#EXT-X-MAP:URI=\"i\"\n", "6");
        check("#EXT-X-DEFINE:NAME=\"a\",VALUE=\"b\"\n#EXT-X-MAP:URI=\"i\"\n", "8");
        check("#EXT-X-SKIP:SKIPPED-SEGMENTS=1\n", "9");
        check("#EXT-X-DEFINE:QUERYPARAM=\"a\"\n", "11");
    }
}
