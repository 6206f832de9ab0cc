//! Media Playlists in and out.

use super::*;
use crate::hls::error::Problem;
use crate::hls::tests::around;
use crate::keys::{IvMode, OnEncrypted};

/// Rewrites with ordinal 0 up to MSN 101 and ordinal 1 from there on.
fn rewrite(input: &str, change: impl FnOnce(&mut MediaRewrite<'_>)) -> Result<String, PlaylistError> {
    rewrite_where(Keys::default(), input, change)
}

fn rewrite_in(
    mode: IvMode,
    input: &str,
    change: impl FnOnce(&mut MediaRewrite<'_>),
) -> Result<String, PlaylistError> {
    rewrite_where(Keys { mode, ..Keys::default() }, input, change)
}

/// What is special about the keys of a test.
#[derive(Default)]
struct Keys {
    mode: IvMode,
    method: KeyMethod,
    /// Ordinal 0 was revoked, and the key of ordinal 1 has taken its place; it is called 7.
    revoked: bool,
}

fn rewrite_where(
    keys: Keys,
    input: &str,
    change: impl FnOnce(&mut MediaRewrite<'_>),
) -> Result<String, PlaylistError> {
    let links = [LinkKey::from_bytes([1; 32]), LinkKey::from_bytes([2; 32])];
    around(|around| {
        let key_at = |msn: MediaSequenceNumber| {
            let ordinal = usize::from(msn.0 > 101);
            let id = |ordinal: usize| KeyId::from_bytes([ordinal as u8; 16]);
            let in_force = if keys.revoked { 1 } else { ordinal };
            Some(PeriodKey {
                signer: (id(ordinal), &links[ordinal]),
                cipher: CipherKey {
                    id: id(in_force),
                    method: keys.method,
                    iv_mode: keys.mode,
                    link: &links[in_force],
                },
                successor: keys.revoked.then_some(Ordinal(7)),
            })
        };
        let mut rewrite = MediaRewrite {
            surroundings: *around,
            rendition: "/live/ch1/720p.m3u8",
            encrypt_init_sections: false,
            subtitles: Subtitles::Encrypt,
            key_at: &key_at,
        };
        change(&mut rewrite);
        rewrite_media(&Playlist::parse(input.as_bytes()).unwrap(), &rewrite)
    })
}

/// Compares with what changes from run to run of the derivation cut out: MACs and IVs, which
/// `keys::derive` pins. `{0}` and `{1}` stand for the key IDs, `{d}` for the DEK's.
fn check(input: &str, change: impl FnOnce(&mut MediaRewrite<'_>), expected: &str) {
    check_output(&rewrite(input, change).unwrap(), expected);
}

fn check_output(output: &str, expected: &str) {
    let mut shown = String::new();
    for line in output.split_inclusive('\n') {
        let line = line
            .replace(&"00".repeat(16), "{0}")
            .replace(&"01".repeat(16), "{1}")
            .replace(&"dd".repeat(16), "{d}");
        let line = match line.split_once("IV=0x") {
            Some((before, after)) => format!("{before}IV={}", &after[32..]),
            None => line,
        };
        match line.find("~{").map(|at| (at, line[at..].find('/').unwrap_or(0))) {
            Some((at, len)) => {
                let link = &line[at..at + len];
                let without_mac = link.rsplit_once('.').unwrap().0;
                shown.push_str(&[&line[..at], without_mac, &line[at + len..]].concat());
            }
            None => shown.push_str(&line),
        }
    }
    assert_eq!(shown, expected);
}

fn refused(input: &str) -> PlaylistError {
    rewrite(input, |_| {}).unwrap_err()
}

const LIVE: &str = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:6\n#EXT-X-MEDIA-SEQUENCE:101\n\
    #EXTINF:6.000,\nseg_101.ts\n\
    #EXT-X-PROGRAM-DATE-TIME:2026-01-01T00:00:06Z\n#EXTINF:6.000,title, with comma\nseg_102.ts\n";

#[test]
fn a_live_playlist_names_a_key_before_every_segment() {
    check(
        LIVE,
        |_| {},
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:6\n#EXT-X-MEDIA-SEQUENCE:101\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{0}\",IV=\n\
         #EXTINF:6.000,\n~{0}.101/seg_101.ts\n\
         #EXT-X-PROGRAM-DATE-TIME:2026-01-01T00:00:06Z\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{1}\",IV=\n\
         #EXTINF:6.000,title, with comma\n~{1}.102/seg_102.ts\n",
    );
}

#[test]
fn period_mode_names_a_key_once_a_period() {
    let input = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-MEDIA-SEQUENCE:100\n\
                 #EXTINF:6,\na.ts\n#EXTINF:6,\nb.ts\n#EXTINF:6,\nc.ts\n";
    check_output(
        &rewrite_in(IvMode::Period, input, |_| {}).unwrap(),
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-MEDIA-SEQUENCE:100\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{0}\",IV=\n\
         #EXTINF:6,\n~{0}.100/a.ts\n#EXTINF:6,\n~{0}.101/b.ts\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{1}\",IV=\n\
         #EXTINF:6,\n~{1}.102/c.ts\n",
    );
}

#[test]
fn a_version_that_is_missing_or_too_low_is_raised_and_no_further() {
    check(
        "#EXTM3U\r\n#EXTINF:6,\r\na.ts\r\n",
        |_| {},
        "#EXTM3U\r\n#EXT-X-VERSION:2\r\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{0}\",IV=\r\n\
         #EXTINF:6,\r\n~{0}.0/a.ts\r\n",
    );
    let low = rewrite("#EXTM3U\n#EXT-X-VERSION:1\n#EXTINF:6,\na.ts\n", |_| {}).unwrap();
    assert!(low.starts_with("#EXTM3U\n#EXT-X-VERSION:2\n#EXT-X-KEY"), "{low}");
}

#[test]
fn a_version_is_raised_for_what_the_playlist_has_and_only_where_an_iv_was_written() {
    let fmp4 = "#EXTM3U\n#EXT-X-MAP:URI=\"i.mp4\"\n#EXTINF:6.5,\na.m4s\n";
    let output = rewrite(fmp4, |_| {}).unwrap();
    assert!(output.starts_with("#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-MAP"), "{output}");
    let low = "#EXTM3U\n#EXT-X-VERSION:1\r\n#EXTINF:6,\na.ts\n";
    assert!(rewrite(low, |_| {}).unwrap().starts_with("#EXTM3U\n#EXT-X-VERSION:2\r\n#EXT-X-KEY"));
    let gcm = Keys { method: KeyMethod::Aes256Gcm, ..Keys::default() };
    assert!(rewrite_where(gcm, low, |_| {}).unwrap().starts_with("#EXTM3U\n#EXT-X-VERSION:1\r\n#EXT-X-KEY"));
    let subtitles = "#EXTM3U\n#EXTINF:6,\na.vtt\n";
    let output = rewrite(subtitles, |rewrite| rewrite.subtitles = Subtitles::Clear).unwrap();
    assert!(output.starts_with("#EXTM3U\n#EXTINF"), "{output}");
}

const FMP4: &str = "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-MEDIA-SEQUENCE:100\n\
    #EXT-X-MAP:URI=\"init.mp4\",X-ODD=1\n#EXTINF:6,\na.m4s\n\
    #EXT-X-DISCONTINUITY\n#EXT-X-MAP:URI=\"../ads/init.mp4\"\n#EXTINF:6,\nb.m4s\n";

#[test]
fn clear_init_sections_stand_under_no_key() {
    check(
        FMP4,
        |_| {},
        "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-MEDIA-SEQUENCE:100\n\
         #EXT-X-MAP:URI=\"~{d}.clear/init.mp4\",X-ODD=1\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{0}\",IV=\n\
         #EXTINF:6,\n~{0}.100/a.m4s\n\
         #EXT-X-DISCONTINUITY\n#EXT-X-KEY:METHOD=NONE\n\
         #EXT-X-MAP:URI=\"../ads/~{d}.clear/init.mp4\"\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{0}\",IV=\n\
         #EXTINF:6,\n~{0}.101/b.m4s\n",
    );
}

#[test]
fn encrypted_init_sections_have_a_key_of_their_own_before_them() {
    check(
        FMP4,
        |rewrite| rewrite.encrypt_init_sections = true,
        "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-MEDIA-SEQUENCE:100\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{0}\",IV=\n\
         #EXT-X-MAP:URI=\"~{0}.init/init.mp4\",X-ODD=1\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{0}\",IV=\n\
         #EXTINF:6,\n~{0}.100/a.m4s\n\
         #EXT-X-DISCONTINUITY\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{0}\",IV=\n\
         #EXT-X-MAP:URI=\"../ads/~{0}.init/init.mp4\"\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{0}\",IV=\n\
         #EXTINF:6,\n~{0}.101/b.m4s\n",
    );
}

#[test]
fn a_gap_links_nothing() {
    let input = "#EXTM3U\n#EXT-X-VERSION:8\n#EXT-X-GAP\n#EXTINF:6,\nmissing.ts\n#EXTINF:6,\na.ts\n";
    check(
        input,
        |_| {},
        "#EXTM3U\n#EXT-X-VERSION:8\n#EXT-X-GAP\n#EXTINF:6,\nmissing.ts\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{0}\",IV=\n#EXTINF:6,\n~{0}.1/a.ts\n",
    );
}

#[test]
fn a_range_behind_a_gap_follows_the_gaps() {
    let output = rewrite(
        "#EXTM3U\n#EXT-X-VERSION:8\n#EXTINF:6,\n#EXT-X-BYTERANGE:10@0\na.ts\n\
         #EXT-X-GAP\n#EXTINF:6,\n#EXT-X-BYTERANGE:20\na.ts\n\
         #EXTINF:6,\n#EXT-X-BYTERANGE:40\na.ts\n",
        |_| {},
    )
    .unwrap();
    assert!(output.contains(".2.30-40."), "{output}");
    assert!(!output.contains("BYTERANGE"), "what stays would follow a range that is not there: {output}");
}

#[test]
fn the_key_of_a_parent_stands_before_a_first_part_that_is_a_gap() {
    check(
        "#EXTM3U\n#EXT-X-VERSION:9\n#EXT-X-PART:DURATION=1,GAP=YES,BYTERANGE=\"7@0\",URI=\"data:,x\"\n\
         #EXT-X-PART:DURATION=1,GAP=YES,BYTERANGE=\"7@0\",URI=\"a.ts\"\n\
         #EXT-X-PART:DURATION=1,BYTERANGE=\"7\",URI=\"a.ts\"\n",
        |rewrite| rewrite.rendition = "r",
        "#EXTM3U\n#EXT-X-VERSION:9\n#EXT-X-PART:DURATION=1,GAP=YES,URI=\"data:,x\"\n\
         #EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{0}\",IV=\n\
         #EXT-X-PART:DURATION=1,GAP=YES,URI=\"a.ts\"\n\
         #EXT-X-PART:DURATION=1,URI=\"~{0}.0-454349e422f0.7-7/a.ts\"\n",
    );
}

const I_FRAMES: &str = "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-I-FRAMES-ONLY\n\
    #EXT-X-MAP:URI=\"a.mp4\",BYTERANGE=\"20@0\"\n\
    #EXTINF:6,\n#EXT-X-BYTERANGE:10@20\na.mp4\n#EXTINF:6,\n#EXT-X-BYTERANGE:10\na.mp4\n";

#[test]
fn i_frames_are_ranges_of_a_file_and_segments_of_their_own_where_nothing_reaches_into_a_file() {
    let output = rewrite(I_FRAMES, |_| {}).unwrap();
    let frames =
        |text: &str| text.lines().filter(|l| l.contains("~00")).map(str::to_owned).collect::<Vec<_>>();
    assert!(output.contains("#EXT-X-BYTERANGE:10@20\n~") && output.contains(".iframes."), "{output}");
    assert_eq!(frames(&output)[0], frames(&output)[1], "one file");

    let gcm = || Keys { method: KeyMethod::Aes256Gcm, ..Keys::default() };
    let output = rewrite_where(gcm(), I_FRAMES, |_| {}).unwrap();
    assert!(frames(&output)[0].contains(".0.20-10.") && frames(&output)[1].contains(".1.30-10."), "{output}");
    assert!(!output.contains("BYTERANGE"), "{output}");

    let without_map = I_FRAMES.replace("#EXT-X-MAP:URI=\"a.mp4\",BYTERANGE=\"20@0\"\n", "");
    assert!(rewrite(&without_map, |_| {}).is_ok());
    let error = rewrite_where(gcm(), &without_map, |_| {}).unwrap_err();
    assert!(matches!(error.problem, Problem::BadTag { .. }), "{error:?}");
}

#[test]
fn a_file_of_i_frames_is_encrypted_anew_only_by_an_iv_of_its_own() {
    let encrypted = |iv: &str| {
        let key = format!("#EXT-X-I-FRAMES-ONLY\n#EXT-X-KEY:METHOD=AES-128,URI=\"k\"{iv}\n");
        I_FRAMES.replace("#EXT-X-I-FRAMES-ONLY\n", &key).replace("#EXT-X-MAP", "# no map")
    };
    let rekey = |rewrite: &mut MediaRewrite<'_>| rewrite.surroundings.on_encrypted = OnEncrypted::Rekey;
    let output = rewrite(&encrypted(",IV=0x01"), rekey).unwrap();
    let files: Vec<_> = output.lines().filter(|line| line.contains(".iframes.k.")).collect();
    assert_eq!((files.len(), files[0]), (2, files[1]));
    let error = rewrite(&encrypted(""), rekey).unwrap_err();
    assert!(matches!(error.problem, Problem::NotRekeyable { .. }), "{error:?}");
}

#[test]
fn segments_whose_encryption_was_skipped_are_not_taken_to_be_clear() {
    let skip = |lines: &str| format!("#EXTM3U\n#EXT-X-VERSION:9\n#EXT-X-SKIP:SKIPPED-SEGMENTS=2\n{lines}");
    let [rekey, pass] = [OnEncrypted::Rekey, OnEncrypted::Pass]
        .map(|on| move |lines: &str| rewrite(&skip(lines), |rewrite| rewrite.surroundings.on_encrypted = on));
    for lines in [
        "#EXTINF:6,\na.ts\n",
        "#EXT-X-MAP:URI=\"i.mp4\"\n",
        "#EXT-X-PART:DURATION=1,URI=\"a.ts\"\n",
        "#EXT-X-PRELOAD-HINT:TYPE=PART,URI=\"a.ts\"\n",
    ] {
        for error in [rekey(lines).unwrap_err(), pass(lines).unwrap_err()] {
            assert_eq!((error.line, error.problem), (4, Problem::UnknownEncryption), "{lines}");
        }
        assert!(rewrite(&skip(lines), |_| {}).is_ok(), "{lines}");
    }
    let told = "#EXT-X-KEY:METHOD=AES-128,URI=\"k\",IV=0x01\n#EXTINF:6,\na.ts\n";
    assert!(rekey(told).unwrap().contains(".2.k."));
    assert!(pass(told).unwrap().contains(".clear."));
}

#[test]
fn a_key_of_method_none_is_ours_to_leave_out() {
    let output = rewrite("#EXTM3U\n#EXT-X-KEY:METHOD=NONE\n#EXTINF:6,\na.ts\n#EXT-X-ENDLIST", |_| {});
    let output = output.unwrap();
    assert!(!output.contains("METHOD=NONE"), "{output}");
    assert!(output.ends_with("\n#EXT-X-ENDLIST"), "{output}");
}

#[test]
fn an_origins_query_goes_behind_the_link() {
    let output = rewrite("#EXTM3U\n#EXTINF:6,\na.ts?sig=1%2F2\n", |_| {}).unwrap();
    let uri = output.lines().last().unwrap();
    assert!(uri.contains("/a.ts?_oq=") && !uri.contains("sig"), "{uri}");
}

#[test]
fn a_revoked_period_keeps_its_paths_and_names_its_successor() {
    let input = "#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:6,\na.ts\n";
    let links_now = rewrite_where(Keys { revoked: true, ..Keys::default() }, input, |_| {}).unwrap();
    check_output(
        &links_now,
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/{1}\",IV=\n\
         #EXTINF:6,\n~{0}.0/a.ts?r=7\n",
    );
    let links_before = rewrite(input, |_| {}).unwrap();
    let path = |text: &str| text.lines().last().unwrap().split('?').next().unwrap().to_owned();
    assert_eq!(path(&links_now), path(&links_before), "a published path never changes");

    let signed = "#EXTM3U\n#EXTINF:6,\na.ts?sig=1\n";
    let output = rewrite_where(Keys { revoked: true, ..Keys::default() }, signed, |_| {}).unwrap();
    assert!(output.contains("?_oq=") && output.ends_with("&r=7\n"), "{output}");
}

#[test]
fn references_that_players_would_encode_differently_become_plain_paths() {
    let output = rewrite("#EXTM3U\n#EXTINF:6,\nmy seg.ts\n", |_| {}).unwrap();
    let uri = output.lines().last().unwrap();
    assert!(uri.starts_with("/live/ch1/~") && uri.ends_with("/my%20seg.ts"), "{uri}");
}

#[test]
fn other_allowed_origins_are_linked_through_their_mount() {
    let output = rewrite("#EXTM3U\n#EXTINF:6,\nhttps://origin.example/x/a.ts\n", |_| {}).unwrap();
    assert!(output.lines().last().unwrap().starts_with("/x/~"), "{output}");
}

#[test]
fn what_cannot_be_rewritten_rightly_is_refused_with_its_line() {
    let media = |middle: &str| format!("#EXTM3U\n{middle}\n#EXTINF:6,\na.ts\n");
    let encrypted = refused(&media("#EXT-X-KEY:METHOD=SAMPLE-AES,URI=\"skd://x\""));
    assert_eq!(encrypted.problem, Problem::AlreadyEncrypted { method: "SAMPLE-AES".into() });
    for tag in [
        "#EXT-X-BYTERANGE:100",
        "#EXT-X-BYTERANGE:x@0",
        "#EXT-X-MAP:BANDWIDTH=1",
        "#EXT-X-MAP:URI=\"x",
        "#EXT-X-MAP:URI=\"i.mp4\",BYTERANGE=\"0@0\"",
        "#EXT-X-PART:DURATION=1",
        "#EXT-X-SKIP:SKIPPED-SEGMENTS=x",
        "#EXT-X-DEFINE:NAME=\"a\"",
        "#EXT-X-DEFINE:IMPORT=\"a\"",
    ] {
        let error = rewrite(&media(tag), |_| {}).expect_err(tag);
        assert!(matches!(error.problem, Problem::BadTag { .. }), "{tag}: {error:?}");
        assert_eq!(error.line, 2, "{tag}");
    }
    let undefined = refused("#EXTM3U\n#EXTINF:6,\n{$host}/a.ts\n");
    assert_eq!((undefined.line, undefined.problem), (3, Problem::UndefinedVariable { name: "host".into() }));
}

#[test]
fn a_segment_whose_plaintext_could_be_fetched_is_refused() {
    let error = refused("#EXTM3U\n#EXTINF:6,\nhttps://open.example/a.ts\n");
    assert_eq!(error.line, 3);
    assert!(error.problem.to_string().contains("pass_through"), "{}", error.problem);
}

#[test]
fn a_segment_without_a_key_is_refused() {
    let error = rewrite(LIVE, |rewrite| rewrite.key_at = &|_| None).unwrap_err();
    assert_eq!((error.line, error.problem), (6, Problem::NoKey { msn: 101 }));
}

/// By what is asked and written, not by a clock: each segment costs what each costs in a short playlist.
#[test]
fn a_vod_of_100_000_segments_is_rewritten_and_costs_no_more_for_each() {
    let cost = |segments: usize| {
        let mut input =
            "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:6\n#EXT-X-PLAYLIST-TYPE:VOD\n".to_owned();
        for number in 0..segments {
            input.push_str(&format!("#EXTINF:6.000,\nseg_{number:06}.ts\n"));
        }
        input.push_str("#EXT-X-ENDLIST\n");
        let (link, asked) = (LinkKey::from_bytes([1; 32]), std::cell::Cell::new(0));
        let output = around(|around| {
            let key_at = |_| {
                asked.set(asked.get() + 1);
                let id = KeyId::from_bytes([0; 16]);
                let cipher =
                    CipherKey { id, method: KeyMethod::Aes128, iv_mode: IvMode::Segment, link: &link };
                Some(PeriodKey { signer: (id, &link), cipher, successor: None })
            };
            let rewrite = MediaRewrite {
                surroundings: *around,
                rendition: "/live/ch1/720p.m3u8",
                encrypt_init_sections: false,
                subtitles: Subtitles::Encrypt,
                key_at: &key_at,
            };
            rewrite_media(&Playlist::parse(input.as_bytes()).unwrap(), &rewrite).unwrap()
        });
        let count = |what: &str| output.lines().filter(|line| line.contains(what)).count();
        assert_eq!((count("#EXT-X-KEY"), count("/seg_")), (segments, segments));
        (asked.get(), output.len())
    };
    let ((few_asked, few_bytes), (many_asked, many_bytes)) = (cost(1_000), cost(100_000));
    assert_eq!(many_asked, 100 * few_asked);
    // The numbers in the links have up to two digits more.
    assert!(many_bytes <= 102 * few_bytes, "{many_bytes} bytes, {few_bytes} of a hundredth");
}
