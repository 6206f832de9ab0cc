//! Fetching one segment and encrypting it into its flow.
//!
//! Bytes go from the origin through what undoes the origin's encryption, if there is one, and through ours into the
//! flow, as they come. AES-256-GCM is the exception: its IV depends on the whole plaintext, so nothing goes out before
//! everything has come in (docs/design/011).

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http::header::CONTENT_TYPE;

use super::flow::{FlowError, FlowHead, FlowWriter};
use super::origin_keys::OriginKeys;
use super::upstream::{OriginError, OriginRequest, OriginResponse, Upstream};
use crate::cipher::{GCM_OVERHEAD, SegmentDecryptor, SegmentEncryptor, ciphertext_len, seal_segment};
use crate::engine::LiveKey;
use crate::hls::{Link, Mount, Mounts, OriginKey};
use crate::keys::{ByteRange, Iv, KeyMethod};
use crate::telemetry::Metrics;

/// One segment that is to be filled.
pub(super) struct Fill {
    pub(super) upstream: Upstream,
    pub(super) mounts: Mounts,
    pub(super) mount: Mount,
    pub(super) path: String,
    pub(super) query: Option<String>,
    /// As the key that encrypts would sign it.
    pub(super) link: Link,
    /// `None` for what is served as the origin has it.
    pub(super) key: Option<Arc<LiveKey>>,
    /// How the origin has encrypted it.
    pub(super) origin_key: Option<OriginKey>,
    pub(super) origin_keys: OriginKeys,
    pub(super) max_bytes: u64,
    pub(super) timeout: Duration,
    pub(super) metrics: Metrics,
}

impl Fill {
    pub(super) async fn run(self, writer: &FlowWriter) -> Result<(), FlowError> {
        let fetched = tokio::time::timeout(self.timeout, self.fetch(writer)).await;
        Ok(fetched.unwrap_or_else(|_| Err(OriginError::out_of_time(&self.mount)))?)
    }

    async fn fetch(&self, writer: &FlowWriter) -> Result<(), OriginError> {
        let mut decryptor = match &self.origin_key {
            Some(key) => {
                let bytes = self.origin_keys.get(&self.upstream, &self.mounts, &key.reference).await?;
                Some(SegmentDecryptor::new(&bytes, Iv(key.iv)))
            }
            None => None,
        };
        let mut body = self.open().await?;
        let mut encryption = self.encryption();
        // How much padding the origin's encryption has is known at the end.
        let length = body.length.filter(|_| decryptor.is_none());
        let content_type = body.response.header_text(CONTENT_TYPE).map(str::to_owned);
        writer.head(FlowHead { content_type, total: length.map(|length| encryption.length_of(length)) });

        while let Some(chunk) = body.chunk().await? {
            let plain = match &mut decryptor {
                Some(decryptor) => decryptor.update(&chunk).freeze(),
                None => chunk,
            };
            self.take(plain, &mut encryption, writer);
        }
        if let Some(decryptor) = decryptor {
            let undecryptable = |error: crate::cipher::PaddingError| OriginError::Undecryptable {
                origin: self.mount.origin.clone(),
                why: error.to_string(),
            };
            self.take(decryptor.finish().map_err(undecryptable)?.into(), &mut encryption, writer);
        }
        self.finish(encryption, writer)
    }

    async fn open(&self) -> Result<Body, OriginError> {
        let request = OriginRequest {
            query: self.query.as_deref(),
            range: self.link.range,
            ..OriginRequest::to(&self.mount, &self.path)
        };
        let response = self.upstream.fetch(request).await?;
        let response = match self.link.range {
            Some(range) => response.partial(range)?,
            None => response.ok()?,
        };
        let response = response.framed()?;
        let origin = response.origin().to_owned();
        if let Some(encoding) = response.encoding() {
            let encoding = encoding.to_owned();
            return Err(OriginError::Encoded { origin, encoding });
        }
        // Of a whole file that comes in place of a part, only the part counts, and what stands before it.
        let is_whole = response.header.status == StatusCode::OK;
        let length = match self.link.range {
            Some(range) => Some(range.length),
            None => response.content_length(),
        };
        if length.is_some_and(|length| length > self.max_bytes) {
            return Err(OriginError::TooLong { origin, limit: self.max_bytes });
        }
        let skip = self.link.range.filter(|_| is_whole).map_or(0, |range| range.offset);
        Ok(Body { response, range: self.link.range, skip, taken: 0, length, max_bytes: self.max_bytes })
    }

    fn encryption(&self) -> Encryption {
        match &self.key {
            None => Encryption::None,
            Some(key) if key.method == KeyMethod::Aes256Gcm => Encryption::Gcm(BytesMut::new()),
            Some(key) => {
                let resource = self.link.resource(&self.mount.origin, &self.path);
                let iv = key.secrets.link.iv(key.iv_mode, &resource);
                Encryption::Cbc(Box::new(SegmentEncryptor::new(&key.secrets.content, iv)))
            }
        }
    }

    fn take(&self, plain: Bytes, encryption: &mut Encryption, writer: &FlowWriter) {
        if self.key.is_some() {
            self.metrics.plaintext_bytes.inc_by(plain.len() as u64);
        }
        match encryption {
            Encryption::None => writer.append(plain),
            Encryption::Cbc(encryptor) => writer.append(encryptor.update(&plain)),
            Encryption::Gcm(whole) => whole.extend_from_slice(&plain),
        }
    }

    fn finish(&self, encryption: Encryption, writer: &FlowWriter) -> Result<(), OriginError> {
        match (encryption, &self.key) {
            (Encryption::Cbc(encryptor), _) => writer.append(encryptor.finish()),
            (Encryption::Gcm(whole), Some(key)) => {
                let resource = self.link.resource(&self.mount.origin, &self.path);
                let iv = key.secrets.link.gcm_iv(&resource, &whole);
                let sealed = seal_segment(&key.secrets.content, iv, &whole);
                // A key of this method has the length that the cipher wants; without one, nothing goes out.
                writer.append(sealed.ok_or_else(|| OriginError::out_of_time(&self.mount))?);
            }
            (Encryption::None | Encryption::Gcm(_), _) => {}
        }
        Ok(())
    }
}

/// Our encryption, under way.
enum Encryption {
    None,
    /// With its key schedule, which is by far the largest.
    Cbc(Box<SegmentEncryptor>),
    /// The plaintext, until it is whole.
    Gcm(BytesMut),
}

impl Encryption {
    fn length_of(&self, plaintext_len: u64) -> u64 {
        match self {
            Encryption::None => plaintext_len,
            Encryption::Cbc(_) => ciphertext_len(plaintext_len),
            Encryption::Gcm(_) => plaintext_len + GCM_OVERHEAD,
        }
    }
}

/// The origin's bytes: those of the part, if it is one.
struct Body {
    response: OriginResponse,
    range: Option<ByteRange>,
    /// What is still to be left out, because the origin gives the whole file.
    skip: u64,
    taken: u64,
    /// As far as it is known.
    length: Option<u64>,
    max_bytes: u64,
}

impl Body {
    async fn chunk(&mut self) -> Result<Option<Bytes>, OriginError> {
        loop {
            if self.range.is_some_and(|range| self.taken == range.length) && self.skip == 0 {
                // So that the connection can be given back; what follows in a whole file is not waited for.
                if self.response.content_length() == self.length {
                    self.response.chunk().await?;
                }
                return Ok(None);
            }
            let Some(mut chunk) = self.response.chunk().await? else {
                return match self.range {
                    None => Ok(None),
                    Some(range) => Err(OriginError::WrongRange {
                        origin: self.response.origin().to_owned(),
                        range,
                        given: format!("only {} of them", self.taken),
                    }),
                };
            };
            let skipped = self.skip.min(chunk.len() as u64);
            self.skip -= skipped;
            // Both are at most the chunk's length, which is a usize.
            let _ = chunk.split_to(skipped as usize);
            if let Some(range) = self.range {
                chunk.truncate((range.length - self.taken).min(chunk.len() as u64) as usize);
            }
            self.taken += chunk.len() as u64;
            if self.taken > self.max_bytes {
                let origin = self.response.origin().to_owned();
                return Err(OriginError::TooLong { origin, limit: self.max_bytes });
            }
            if !chunk.is_empty() {
                return Ok(Some(chunk));
            }
        }
    }
}
