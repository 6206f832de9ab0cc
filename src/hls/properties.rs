//! What holds for every playlist, however odd: nothing panics, nothing of others' is lost, and m3u8-rs, a parser
//! that shares no code with ours, sees the same segments behind as before.

use proptest::prelude::*;

use super::tests::around;
use super::*;
use crate::keys::{IvMode, KeyId, KeyMethod, LinkKey, MediaSequenceNumber, OnEncrypted, Subtitles};

fn rewrite(input: &[u8], iv_mode: IvMode, encrypt_init_sections: bool) -> Result<String, PlaylistError> {
    let link = LinkKey::from_bytes([1; 32]);
    let playlist = Playlist::parse(input)?;
    around(|around| {
        let key_at = |msn: MediaSequenceNumber| {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&(msn.0 / 3).to_be_bytes());
            let id = KeyId::from_bytes(id);
            let cipher = CipherKey { id, method: KeyMethod::Aes128, iv_mode, link: &link };
            Some(PeriodKey { signer: (id, &link), cipher, successor: None })
        };
        if playlist.kind() == Kind::Multivariant {
            return rewrite_multivariant(&playlist, around, None);
        }
        let on_encrypted = [OnEncrypted::Reject, OnEncrypted::Pass, OnEncrypted::Rekey][input.len() % 3];
        rewrite_media(
            &playlist,
            &MediaRewrite {
                surroundings: Surroundings { on_encrypted, ..*around },
                rendition: "/live/ch1/720p.m3u8",
                encrypt_init_sections,
                subtitles: Subtitles::Encrypt,
                key_at: &key_at,
            },
        )
    })
}

/// Lines that a playlist may have, in any order: right ones, odd ones and wrong ones.
fn any_line() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("#EXTINF:4.0,".to_owned()),
        Just("#EXTINF:4.0,title, \"quoted\"".to_owned()),
        Just("#EXT-X-DISCONTINUITY".to_owned()),
        Just("#EXT-X-GAP".to_owned()),
        Just("#EXT-X-ENDLIST".to_owned()),
        Just("#EXT-X-KEY:METHOD=NONE".to_owned()),
        Just("#EXT-X-MAP:URI=\"init.mp4\",X-ODD=1".to_owned()),
        Just("#EXT-X-MAP:".to_owned()),
        Just("#EXT-X-KEY:METHOD=AES-128,URI=\"k\"".to_owned()),
        Just("#EXT-X-KEY:METHOD=SAMPLE-AES,URI=\"k\",KEYFORMAT=\"x\"".to_owned()),
        Just("#EXT-X-BYTERANGE:10@5".to_owned()),
        Just("#EXT-X-BYTERANGE:10".to_owned()),
        Just("#EXT-X-I-FRAMES-ONLY".to_owned()),
        Just("#EXT-X-SKIP:SKIPPED-SEGMENTS=3".to_owned()),
        Just("#EXT-X-PART-INF:PART-TARGET=0.5".to_owned()),
        Just("#EXT-X-PART:DURATION=0.5,URI=\"p.mp4\"".to_owned()),
        Just("#EXT-X-PART:DURATION=0.5,BYTERANGE=\"7@1\",URI=\"p.mp4\"".to_owned()),
        Just("#EXT-X-PRELOAD-HINT:TYPE=PART,URI=\"p.mp4\",BYTERANGE-START=7".to_owned()),
        Just("#EXT-X-RENDITION-REPORT:URI=\"../a.m3u8\",LAST-MSN=1".to_owned()),
        Just("#EXT-X-DEFINE:NAME=\"v\",VALUE=\"x\"".to_owned()),
        Just("{$v}/{$w}.ts".to_owned()),
        Just("#EXT-X-VERSION:1".to_owned()),
        Just("#EXT-X-VERSION:x".to_owned()),
        Just("#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID=\"a\",NAME=\"b\",URI=\"a.m3u8\"".to_owned()),
        Just("#EXT-X-STREAM-INF:BANDWIDTH=1".to_owned()),
        Just("#EXT".to_owned()),
        Just("#EXT:".to_owned()),
        (any::<u64>()).prop_map(|n| format!("#EXT-X-MEDIA-SEQUENCE:{n}")),
        "#EXT-X-[A-Z-]{1,12}:[ -~]{0,30}",
        "[a-z/.?=&~%:#]{0,20}",
        "\\PC{0,20}",
        Just(String::new()),
    ]
}

/// A Media Playlist as a packager could have made it.
fn right_playlist() -> impl Strategy<Value = String> {
    let segment =
        (0..4_u8, "[a-z]{1,8}(/[a-z]{1,8})?\\.(ts|m4s)(\\?[a-z]=[0-9])?").prop_map(|(extra, uri)| {
            let extra =
                ["", "#EXT-X-DISCONTINUITY\n", "#EXT-X-BITRATE:1000\n", "# a comment\n"][usize::from(extra)];
            format!("{extra}#EXTINF:4.000,\n{uri}\n")
        });
    (0..1_000_000_u64, proptest::collection::vec(segment, 0..30), any::<bool>()).prop_map(
        |(msn, segments, ended)| {
            let end = if ended { "#EXT-X-ENDLIST\n" } else { "" };
            format!(
                "#EXTM3U\n#EXT-X-VERSION:4\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:{msn}\n{}{end}",
                segments.concat()
            )
        },
    )
}

fn media(text: &str) -> m3u8_rs::MediaPlaylist {
    m3u8_rs::parse_media_playlist_res(text.as_bytes()).expect("m3u8-rs reads it")
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = rewrite(&bytes, IvMode::Segment, false);
        let _ = rewrite(&[b"#EXTM3U\n", &bytes[..]].concat(), IvMode::Segment, true);
    }

    #[test]
    fn no_lines_make_it_panic(lines in proptest::collection::vec(any_line(), 0..30), encrypt in any::<bool>()) {
        let text = format!("#EXTM3U\n{}", lines.join("\n"));
        for mode in [IvMode::Segment, IvMode::Period, IvMode::Sequence] {
            let _ = rewrite(text.as_bytes(), mode, encrypt);
        }
    }

    #[test]
    fn no_path_makes_a_link_panic(path in "\\PC{0,60}") {
        let _ = LinkedPath::parse(&path);
        let _ = normalized_path(&path);
    }

    #[test]
    fn m3u8_rs_sees_the_same_segments_behind(input in right_playlist()) {
        let (before, output) = (media(&input), rewrite(input.as_bytes(), IvMode::Segment, false).unwrap());
        let after = media(&output);
        prop_assert_eq!(after.media_sequence, before.media_sequence);
        prop_assert_eq!(after.end_list, before.end_list);
        prop_assert_eq!(after.segments.len(), before.segments.len());
        for (before, after) in before.segments.iter().zip(&after.segments) {
            prop_assert_eq!(before.duration, after.duration);
            prop_assert_eq!(before.discontinuity, after.discontinuity);
            prop_assert!(after.key.as_ref().is_some_and(|key| key.iv.is_some()), "each has its KEY");
            let file = |uri: &str| uri.split('?').next().unwrap().rsplit('/').next().unwrap().to_owned();
            prop_assert_eq!(file(&before.uri), file(&after.uri));
        }
    }

    #[test]
    fn what_is_left_when_our_lines_are_taken_out_is_what_came_in(input in right_playlist()) {
        let output = rewrite(input.as_bytes(), IvMode::Segment, false).unwrap();
        let is_uri = |line: &&str| !line.starts_with('#');
        let ours = |line: &&str| line.starts_with("#EXT-X-KEY:");
        let kept: Vec<_> = output.lines().filter(|l| !ours(l) && !is_uri(l)).collect();
        let came: Vec<_> = input.lines().filter(|l| !is_uri(l)).collect();
        prop_assert_eq!(kept, came);
    }
}
