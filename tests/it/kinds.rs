//! The kinds of playlists and media that HLS has, through the real process: byte ranges, I-frames, AES-256-GCM, what
//! its origin has encrypted, subtitles, variables, session data, steering, and what live playlists do at their worst.
//!
//! What must come out are the origin's bytes. They are compared with what openssl, or RustCrypto in the test, makes of
//! the answers; ciphertext of origins is made by RustCrypto too. Nothing here uses the shield's own cipher.

mod gcm;
mod i_frames;
mod live;
mod multivariant;
mod pass;
mod ranges;
mod rekey;
mod rekey_failures;
mod sessions;
mod subtitles;

use aes::cipher::block_padding::Pkcs7;
use aes::cipher::{BlockModeEncrypt, KeyIvInit};
use aes::{Aes128, Aes256};
use aes_gcm::aead::Aead;
use aes_gcm::aead::consts::U16;
use aes_gcm::{AesGcm, KeyInit};
use url::Url;

use crate::harness::{Answer as Got, Running, get, openssl_decrypt, try_ask};
use crate::ll_playlist::attribute;
use crate::origin::{Answer, Origin};

/// The stream `live` over everything below `/live/` of an origin, with settings of its policy.
fn config(origin: &Origin, policy: &str) -> String {
    config_of(origin, "", policy)
}

/// As [`config`], with settings of the origin too.
fn config_of(origin: &Origin, settings: &str, policy: &str) -> String {
    let url = origin.url();
    format!(
        "[[origins]]\nname = \"main\"\nurls = [\"{url}\"]\n{settings}\
         [[streams]]\nid = \"live\"\nplaylist_url = \"{url}/live/index.m3u8\"\n[streams.policy]\n{policy}"
    )
}

/// Bytes that look like media and differ from one name to another.
fn media(name: &str, len: usize) -> Vec<u8> {
    let seed = name.bytes().fold(7_u32, |seed, byte| seed.wrapping_mul(31).wrapping_add(u32::from(byte)));
    let byte = |at: usize| ((at as u32).wrapping_add(seed).wrapping_mul(2_654_435_761) >> 13) as u8;
    (0..len).map(byte).collect()
}

/// AES-128 as an origin does it: CBC with PKCS#7 padding.
fn encrypt(plain: &[u8], key: &[u8; 16], iv: [u8; 16]) -> Vec<u8> {
    let mut buffer = [plain, &[0; 16]].concat();
    let chain = cbc::Encryptor::<Aes128>::new(key.into(), &iv.into());
    chain.encrypt_padded::<Pkcs7>(&mut buffer, plain.len()).unwrap().to_vec()
}

/// The IV of a segment without one (RFC 8216 §5.2).
fn iv_of_msn(msn: u64) -> [u8; 16] {
    u128::from(msn).to_be_bytes()
}

/// The EXT-X-KEY that stands before something.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    method: String,
    /// Absolute.
    url: String,
    /// 32 hex digits.
    iv: Option<String>,
}

/// A Media Segment or an init section as a served playlist names it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Item {
    msn: u64,
    /// Absolute.
    url: String,
    key: Option<Key>,
}

impl Item {
    fn fetch(&self) -> Got {
        let got = get(&self.url);
        assert_eq!(got.status, 200, "{}: {}", self.url, String::from_utf8_lossy(&got.body));
        got
    }

    /// Its bytes as a player has them.
    fn plain(&self) -> Vec<u8> {
        self.decrypt(&self.fetch().body)
    }

    fn decrypt(&self, bytes: &[u8]) -> Vec<u8> {
        let Some(Key { method, url, iv }) = &self.key else { return bytes.to_vec() };
        let key = get(url);
        assert_eq!(key.status, 200, "{url}");
        match (method.as_str(), iv) {
            ("AES-128", Some(iv)) => openssl_decrypt(bytes, &key.body, iv),
            ("AES-256-GCM", None) => {
                let cipher = AesGcm::<Aes256, U16>::new_from_slice(&key.body).unwrap();
                let iv: [u8; 16] = bytes[..16].try_into().unwrap();
                cipher.decrypt(&iv.into(), &bytes[16..]).expect("the tag is right")
            }
            other => panic!("{other:?} of {}", self.url),
        }
    }

    /// The ID of its key.
    fn key_id(&self) -> &str {
        self.key.as_ref().unwrap().url.rsplit('/').next().unwrap()
    }

    /// Its URL without the part that names the host.
    fn path(&self) -> String {
        Url::parse(&self.url).unwrap()[url::Position::BeforePath..].to_owned()
    }
}

/// A served Media Playlist.
#[derive(Debug, Clone)]
struct Served {
    text: String,
    segments: Vec<Item>,
    init_sections: Vec<Item>,
}

fn served(shield: &Running, path: &str) -> Served {
    let got = shield.get(path);
    assert_eq!(got.status, 200, "{path}: {}", String::from_utf8_lossy(&got.body));
    read(&shield.at(path), &got.text())
}

fn read(playlist_url: &str, text: &str) -> Served {
    let base = Url::parse(playlist_url).unwrap();
    let absolute = |uri: &str| base.join(uri).unwrap().to_string();
    let (mut msn, mut key) = (0, None);
    let mut served = Served { text: text.to_owned(), segments: Vec::new(), init_sections: Vec::new() };
    for line in text.trim_start_matches('\u{feff}').lines() {
        if let Some(first) = line.strip_prefix("#EXT-X-MEDIA-SEQUENCE:") {
            msn = first.parse().unwrap();
        } else if line.starts_with("#EXT-X-KEY:") {
            let method = attribute(line, "METHOD").unwrap();
            let iv = attribute(line, "IV").map(|iv| iv.strip_prefix("0x").expect("hex").to_owned());
            assert!(iv.as_ref().is_none_or(|iv| iv.len() == 32), "{line}");
            key = (method != "NONE").then(|| Key {
                url: absolute(&attribute(line, "URI").unwrap()),
                method,
                iv,
            });
        } else if line.starts_with("#EXT-X-MAP:") {
            let url = absolute(&attribute(line, "URI").unwrap());
            served.init_sections.push(Item { msn, url, key: key.clone() });
        } else if !line.is_empty() && !line.starts_with('#') {
            served.segments.push(Item { msn, url: absolute(line), key: key.clone() });
            msn += 1;
        }
    }
    served
}

/// What fails to give all of something: an error, or an answer that breaks off.
#[derive(Debug, PartialEq)]
enum Failure {
    Status(u16),
    BrokeOff,
}

fn failure(url: &str) -> Failure {
    match try_ask("GET", url, &[]) {
        Err(_) => Failure::BrokeOff,
        Ok(got) if got.status >= 400 => Failure::Status(got.status),
        Ok(got) => panic!("{url}: {} with {} bytes", got.status, got.body.len()),
    }
}

/// What an origin answers that knows ranges.
fn part_of(file: &[u8], range: Option<&String>) -> Answer {
    let Some((first, last)) = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-')) else {
        return Answer::ok(file);
    };
    let first: usize = first.parse().unwrap();
    let last = last.parse::<usize>().unwrap().min(file.len().saturating_sub(1));
    if first > last {
        return Answer::status(416).header("Content-Range", format!("bytes */{}", file.len()));
    }
    let answer = Answer { status: 206, ..Answer::ok(&file[first..=last]) };
    answer.header("Content-Range", format!("bytes {first}-{last}/{}", file.len()))
}
