//! `keyshield rewrite`: a playlist as the shield would serve it, under throw-away keys.

use std::collections::BTreeMap;

use anyhow::Context;
use sha2::{Digest, Sha256};

use crate::entropy;
use crate::hls::{
    BaseUrl, CipherKey, Kind, MediaRewrite, Mount, Mounts, PeriodKey, Playlist, Surroundings,
    VariableSources, rewrite_media, rewrite_multivariant,
};
use crate::keys::{
    DekId, KeyId, LinkKey, Marks, MediaSequenceNumber, Ordinal, Policy, Schedule, Situation, plan,
};

/// How a playlist is to be rewritten.
#[derive(Debug, Clone)]
pub struct RewriteOptions {
    /// Where the playlist would lie.
    pub url: String,
    /// Other origins that its URIs may name.
    pub allowed: Vec<String>,
    /// As an origin's `query_params`.
    pub query_params: Vec<String>,
    /// Fixed sample keys instead of random ones: the same input gives the same output.
    pub seed: Option<u64>,
    pub policy: Policy,
}

/// Rewrites a playlist.
///
/// # Errors
/// What the shield would refuse too, with its line.
pub fn rewrite(input: &[u8], options: &RewriteOptions) -> anyhow::Result<String> {
    let mounts = mounts(options)?;
    let from = mounts.place_of(&options.url)?;
    let playlist = Playlist::parse(input)?;
    let keys = SampleKeys::new(options.seed);
    let (dek, clear) = keys.clear_init();
    let surroundings = Surroundings {
        mounts: &mounts,
        from: &from,
        is_protected: &|_| true,
        on_encrypted: options.policy.on_encrypted,
        variables: VariableSources { query: from.query.as_deref(), imported: None },
        key_uri_base: "/api/hls/keys/",
        clear: (dek, &clear),
    };
    match playlist.kind() {
        Kind::Multivariant => Ok(rewrite_multivariant(&playlist, &surroundings, None)?),
        Kind::Media => media(&playlist, &keys, surroundings, options),
    }
}

/// The URL's own site at the root, and the others beside it.
fn mounts(options: &RewriteOptions) -> anyhow::Result<Mounts> {
    let site = |url: &str| -> anyhow::Result<BaseUrl> {
        let parsed = url::Url::parse(url).with_context(|| format!("{url:?} is not an absolute URL"))?;
        Ok(BaseUrl::parse(&parsed.origin().ascii_serialization())?)
    };
    let mut origins = vec![vec![site(&options.url)?]];
    for url in &options.allowed {
        let site = site(url)?;
        // One host by http and by https is one origin with two addresses.
        let same = |bases: &&mut Vec<BaseUrl>| bases.iter().any(|base| base.host() == site.host());
        match origins.iter_mut().find(same) {
            Some(bases) => bases.push(site),
            None => origins.push(vec![site]),
        }
    }
    let mount = |(number, bases): (usize, Vec<BaseUrl>)| match number {
        0 => Mount::new("sample".into(), "/", bases, false),
        number => Mount::new(format!("origin-{number}"), &format!("/origin-{number}"), bases, false),
    };
    let mut mounts = origins.into_iter().enumerate().map(mount).collect::<Result<Vec<_>, _>>()?;
    for mount in &mut mounts {
        mount.query_params.clone_from(&options.query_params);
    }
    Ok(Mounts::new(mounts)?)
}

fn media(
    playlist: &Playlist<'_>,
    keys: &SampleKeys,
    surroundings: Surroundings<'_>,
    options: &RewriteOptions,
) -> anyhow::Result<String> {
    let facts = playlist.media_facts()?;
    let planned = plan(
        &facts.window(),
        Situation {
            unmade: None,
            schedule: &Schedule::default(),
            edge: None,
            policy: &options.policy,
            marks: Marks { head: Ordinal::FIRST, forced: Ordinal::FIRST },
            siblings: &[],
            state_of: &|_| None,
            is_idle: false,
        },
    );
    let schedule = Schedule::from_rows(0, planned.into_iter().map(|(boundary, _)| boundary).collect());
    let by_ordinal: BTreeMap<_, _> =
        schedule.boundaries().iter().map(|b| (b.ordinal, keys.key(b.ordinal))).collect();
    let policy = &options.policy;
    let key_at = |msn: MediaSequenceNumber| {
        let (id, link) = by_ordinal.get(&schedule.ordinal_at(msn)?)?;
        let cipher = CipherKey { id: *id, method: policy.key_method, iv_mode: policy.iv_mode, link };
        Some(PeriodKey { signer: (*id, link), cipher, successor: None })
    };
    let rendition = &surroundings.from.path;
    let rewritten = rewrite_media(
        playlist,
        &MediaRewrite {
            surroundings,
            rendition,
            encrypt_init_sections: policy.encrypt_init_sections,
            subtitles: policy.subtitles,
            key_at: &key_at,
        },
    );
    Ok(rewritten?)
}

/// Keys that encrypt nothing: names and link keys out of a seed.
struct SampleKeys([u8; 32]);

impl SampleKeys {
    fn new(seed: Option<u64>) -> Self {
        match seed {
            Some(seed) => Self(Sha256::digest(seed.to_be_bytes()).into()),
            None => Self(*entropy::random()),
        }
    }

    fn derive<const N: usize>(&self, label: &str, number: u32) -> [u8; N] {
        let mut hash = Sha256::new();
        hash.update(self.0);
        hash.update(label);
        hash.update(number.to_be_bytes());
        let hash = hash.finalize();
        std::array::from_fn(|i| hash[i])
    }

    fn key(&self, ordinal: Ordinal) -> (KeyId, LinkKey) {
        let id = KeyId::from_bytes(self.derive("key ID", ordinal.0));
        (id, LinkKey::from_bytes(self.derive("link key", ordinal.0)))
    }

    fn clear_init(&self) -> (DekId, LinkKey) {
        let id = DekId::from_bytes(self.derive("DEK ID", 0));
        (id, LinkKey::from_bytes(self.derive("clear init", 0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(seed: Option<u64>) -> RewriteOptions {
        RewriteOptions {
            url: "https://origin.example/live/720p.m3u8".into(),
            allowed: vec!["https://ads.example".into()],
            query_params: Vec::new(),
            seed,
            policy: Policy { segments_per_key: 2, ..Policy::default() },
        }
    }

    const INPUT: &[u8] = b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\na.ts\n#EXTINF:4,\nb.ts\n\
                           #EXTINF:4,\nhttps://ads.example/c.ts\n#EXT-X-ENDLIST\n";

    #[test]
    fn a_seed_gives_the_same_output_again_and_none_does_not() {
        let seeded = rewrite(INPUT, &options(Some(1))).unwrap();
        assert_eq!(rewrite(INPUT, &options(Some(1))).unwrap(), seeded);
        assert_ne!(rewrite(INPUT, &options(Some(2))).unwrap(), seeded);
        assert_ne!(rewrite(INPUT, &options(None)).unwrap(), rewrite(INPUT, &options(None)).unwrap());
    }

    #[test]
    fn keys_change_as_the_policy_says_and_other_origins_are_mounted() {
        let output = rewrite(INPUT, &options(Some(1))).unwrap();
        let keys: std::collections::BTreeSet<_> =
            output.lines().filter_map(|line| line.split("keys/").nth(1)?.split('"').next()).collect();
        assert_eq!(keys.len(), 2, "{output}");
        assert!(output.contains("/origin-1/~"), "{output}");
    }

    #[test]
    fn a_refusal_names_the_line() {
        let error = rewrite(b"#EXTM3U\n#EXTINF:4,\nhttps://evil.example/a.ts\n", &options(None)).unwrap_err();
        assert!(format!("{error:#}").contains("line 3"), "{error:#}");
        assert_eq!(format!("{error:#}").matches("not an allowed origin").count(), 1, "said once");
    }

    #[test]
    fn a_host_by_http_and_by_https_is_one_origin() {
        let allowed = vec!["https://ads.example".into(), "http://ads.example".into()];
        let options = RewriteOptions { allowed, ..options(Some(1)) };
        let input = b"#EXTM3U\n#EXTINF:4,\nhttps://ads.example/a.ts\n#EXTINF:4,\nhttp://ads.example/a.ts\n";
        let output = rewrite(input, &options).unwrap();
        assert_eq!(output.lines().filter(|line| line.starts_with("/origin-1/~")).count(), 2, "{output}");
    }
}
