//! `keyshield inspect URL`: what a playlist is, its renditions, its keys and its problems.
//!
//! Two parsers look at each playlist: quick-m3u8, by which the shield rewrites, and m3u8-rs, as a judge that
//! shares none of its code. What the shield itself would refuse is listed as a problem too.

use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http::StatusCode;
use serde::Serialize;

use super::rewrite::{RewriteOptions, rewrite};
use crate::hls::{BaseUrl, Kind, Mount, Playlist, looks_like_a_playlist};
use crate::keys::Policy;
use crate::shield::upstream::{OriginRequest, Timeouts, Upstream};
use crate::telemetry::Metrics;

/// More renditions than this are not fetched.
const MAX_CHILDREN: usize = 50;
const MAX_BYTES: usize = 16 << 20;
const TIMEOUTS: Timeouts = Timeouts {
    connect: Duration::from_secs(5),
    read: Duration::from_secs(10),
    idle: Duration::from_secs(30),
};

/// What was found at one URL.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Inspection {
    url: String,
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    media: Option<MediaInspection>,
    keys: Vec<KeyInspection>,
    problems: Vec<String>,
    renditions: Vec<Inspection>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct MediaInspection {
    /// `live`, `EVENT` or `VOD`.
    presentation: &'static str,
    target_duration_secs: u64,
    media_sequence: u64,
    segments: usize,
    duration_secs: f64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct KeyInspection {
    method: String,
    uri: Option<String>,
}

/// Fetches and looks at a playlist, and at the playlists that it names.
///
/// # Errors
/// A URL that cannot be fetched. What is wrong with a playlist is a problem in the result, not an error.
pub async fn inspect(url: &str) -> anyhow::Result<Inspection> {
    let (status, body) = fetch_url(url, MAX_BYTES).await?;
    if !status.is_success() {
        bail!("{url} answered {status}");
    }
    let (mut inspection, children) = look_at(url, &body);
    if children.len() > MAX_CHILDREN {
        let skipped = children.len() - MAX_CHILDREN;
        inspection.problems.push(format!("{skipped} further renditions were not looked at"));
    }
    for child in children.into_iter().take(MAX_CHILDREN) {
        inspection.renditions.push(match fetch_url(&child, MAX_BYTES).await {
            Ok((status, body)) if status.is_success() => look_at(&child, &body).0,
            Ok((status, _)) => Inspection::failed(child, format!("it answered {status}")),
            Err(error) => Inspection::failed(child, format!("{error:#}")),
        });
    }
    Ok(inspection)
}

/// One GET, without the shield's allow-list: the operator named the URL.
pub(super) async fn fetch_url(url: &str, limit: usize) -> anyhow::Result<(StatusCode, Bytes)> {
    let parsed = url::Url::parse(url).with_context(|| format!("{url:?} is not an absolute URL"))?;
    let base = BaseUrl::parse(&parsed.origin().ascii_serialization())?;
    let mount = Mount::new("inspected".into(), "/", vec![base], false)?;
    let upstream = Upstream::new(TIMEOUTS, 4, None, Metrics::new());
    let request = OriginRequest { query: parsed.query(), ..OriginRequest::to(&mount, parsed.path()) };
    let mut response = upstream.fetch(request).await?;
    let status = response.header.status;
    Ok((status, response.body(limit).await?))
}

impl Inspection {
    fn failed(url: String, problem: String) -> Self {
        Self {
            url,
            kind: None,
            media: None,
            keys: Vec::new(),
            problems: vec![problem],
            renditions: Vec::new(),
        }
    }

    /// Whether anything was found wrong, here or below.
    pub fn has_problems(&self) -> bool {
        !self.problems.is_empty() || self.renditions.iter().any(Self::has_problems)
    }

    /// For people.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        self.write(&mut text, "");
        text
    }

    fn write(&self, out: &mut String, indent: &str) {
        // Writing to memory does not fail.
        let _ = writeln!(out, "{indent}{}", self.url);
        let _ = writeln!(out, "{indent}  {}", self.kind.unwrap_or("not a playlist"));
        if let Some(media) = &self.media {
            let _ = writeln!(
                out,
                "{indent}  {}, {} segments from Media Sequence Number {}, {:.1} s, Target Duration {} s",
                media.presentation,
                media.segments,
                media.media_sequence,
                media.duration_secs,
                media.target_duration_secs,
            );
        }
        for key in &self.keys {
            let uri = key.uri.as_deref().unwrap_or("no URI");
            let _ = writeln!(out, "{indent}  key: {} {uri}", key.method);
        }
        for problem in &self.problems {
            let _ = writeln!(out, "{indent}  problem: {problem}");
        }
        for rendition in &self.renditions {
            rendition.write(out, &format!("{indent}    "));
        }
    }
}

/// Looks at one playlist; returns the URLs of those that it names too.
fn look_at(url: &str, body: &[u8]) -> (Inspection, Vec<String>) {
    let mut inspection = Inspection::failed(url.to_owned(), String::new());
    inspection.problems.clear();
    if !looks_like_a_playlist(body) {
        inspection.problems.push("the first line is not #EXTM3U".into());
        return (inspection, Vec::new());
    }
    let playlist = match Playlist::parse(body) {
        Ok(playlist) => playlist,
        Err(error) => {
            inspection.problems.push(error.to_string());
            return (inspection, Vec::new());
        }
    };
    inspection.kind = Some(playlist.kind().name());
    inspection.keys =
        playlist.key_tags().into_iter().map(|(method, uri)| KeyInspection { method, uri }).collect();
    if playlist.kind() == Kind::Media {
        match playlist.media_facts() {
            Ok(facts) => {
                let presentation = match facts.playlist_type.as_deref() {
                    _ if facts.ended => "VOD",
                    Some("EVENT") => "EVENT",
                    _ => "live",
                };
                inspection.media = Some(MediaInspection {
                    presentation,
                    target_duration_secs: facts.target_duration_secs,
                    media_sequence: facts.media_sequence.0,
                    segments: facts.segments,
                    duration_secs: facts.duration_secs,
                });
            }
            Err(error) => inspection.problems.push(error.to_string()),
        }
    }
    if m3u8_rs::parse_playlist_res(body).is_err() {
        inspection.problems.push("m3u8-rs, a second parser, does not accept it".into());
    }
    let options = RewriteOptions {
        url: url.to_owned(),
        allowed: Vec::new(),
        query_params: Vec::new(),
        seed: Some(0),
        policy: Policy::default(),
    };
    if let Err(error) = rewrite(body, &options) {
        inspection.problems.push(format!("keyshield would refuse it: {error:#}"));
    }
    let children = match url::Url::parse(url) {
        Ok(base) => playlist
            .child_uris()
            .into_iter()
            .filter_map(|uri| base.join(uri).ok())
            .map(String::from)
            .collect(),
        Err(_) => Vec::new(),
    };
    (inspection, children)
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "https://origin.example/live/master.m3u8";

    #[test]
    fn a_multivariant_playlist_names_its_renditions_by_their_urls() {
        let body = b"#EXTM3U\n#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID=\"a\",NAME=\"en\",URI=\"a/en.m3u8\"\n\
                     #EXT-X-STREAM-INF:BANDWIDTH=1,AUDIO=\"a\"\n720p.m3u8\n";
        let (inspection, children) = look_at(URL, body);
        assert_eq!(inspection.kind, Some("Multivariant Playlist"));
        assert_eq!(inspection.problems, Vec::<String>::new());
        let at = |path: &str| format!("https://origin.example/live/{path}");
        assert_eq!(children, [at("720p.m3u8"), at("a/en.m3u8")]);
    }

    #[test]
    fn keys_and_what_the_shield_would_refuse_are_listed() {
        let body = b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:7\n\
                     #EXT-X-KEY:METHOD=AES-128,URI=\"k1\"\n#EXTINF:4,\na.ts\n#EXTINF:4,\nb.ts\n";
        let (inspection, _) = look_at(URL, body);
        let text = inspection.to_text();
        assert!(text.contains("live, 2 segments from Media Sequence Number 7, 8.0 s"), "{text}");
        assert!(text.contains("key: AES-128 k1"), "{text}");
        assert!(text.contains("already encrypted"), "{text}");
        assert!(inspection.has_problems());
        let json = serde_json::to_value(&inspection).unwrap();
        assert_eq!(json["media"]["mediaSequence"], 7);
    }

    #[test]
    fn what_is_no_playlist_is_said_to_be_none() {
        let (inspection, _) = look_at(URL, b"<html>");
        assert!(inspection.to_text().contains("not a playlist"));
    }
}
