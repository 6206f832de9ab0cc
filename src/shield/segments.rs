//! Segments and init sections behind links.
//!
//! A link carries all that is needed but the key: no playlist has to be known. Once its MAC is right, the
//! bytes are a flow: fetched and encrypted once, read by everyone who asks. An init section that is served
//! in clear takes the same way without the cipher.

use std::ops::Range;
use std::sync::Arc;

use http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_RANGE, ORIGIN, RANGE,
    TRANSFER_ENCODING,
};
use http::{HeaderName, Method, StatusCode, Version};
use pingora::http::ResponseHeader;
use pingora::proxy::Session;
use sha2::{Digest, Sha256};

use super::fill::Fill;
use super::flow::{Flow, FlowKey};
use super::range::{Wanted, wanted};
use super::reply::{KEY, Refusal, add_cors, names_etag, tags};
use super::service::Shield;
use super::upstream::OriginError;
use crate::engine::{ClearInitSigner, EngineError, LiveKey};
use crate::hls::{Link, LinkedPath, Mount, OriginKey, OriginPath, canonical_path, read_successor};
use crate::keys::{DekId, KeyId, LinkKey, Ordinal, Place, StreamId};

const KEY_REVOKED: &str = "the segment's key was revoked while it was sent";

/// Who signed a link: a content key, or the signer of what is served as it is.
pub(super) enum Signer {
    Key(Arc<LiveKey>),
    Clear(Arc<ClearInitSigner>),
}

/// What a segment is encrypted under.
struct Cipher {
    key: Arc<LiveKey>,
    /// `false`: this is for the one who asks, mostly a player that holds an older playlist, and for nobody after it.
    is_for_all: bool,
}

impl Cipher {
    /// The key for a request whose link `signer` signed: the signer itself until it is revoked. After that, for
    /// a request that names a successor (`r`) or comes after the transition, the key that has taken its place; for
    /// one from an older playlist, the key that this playlist named (docs/design/010).
    async fn choose(shield: &Shield, signer: &Arc<LiveKey>, asked: Option<Ordinal>) -> Result<Self, Refusal> {
        let named = match asked {
            Some(asked) => shield.engine.successor(signer, asked).await?,
            None => None,
        };
        let Some(revoked) = signer.revoked() else {
            // Nobody may keep this for an `r` that no playlist has named yet.
            return Ok(Self { key: Arc::clone(signer), is_for_all: asked.is_none() });
        };
        let chain = shield.engine.successors(signer);
        let in_force = chain.last().filter(|key| key.revoked().is_none()).ok_or(Refusal::LinkKeyGone)?;
        let is_unknown = asked.is_some() && named.is_none();
        let (named, revoked) = match &named {
            Some(named) => (named, named.revoked()),
            None => (signer, Some(revoked)),
        };
        let is_transitional = revoked.is_some_and(|r| shield.clock.now() < r.transition_until);
        let key = if is_transitional { named } else { in_force };
        Ok(Self { key: Arc::clone(key), is_for_all: !is_transitional && !is_unknown })
    }

    /// Whether caches may keep what is under it. The key may have been taken back since it was chosen.
    fn may_be_kept(&self) -> bool {
        self.is_for_all && self.key.revoked().is_none()
    }
}

impl Signer {
    fn link_key(&self) -> &LinkKey {
        match self {
            Signer::Key(key) => &key.secrets.link,
            Signer::Clear(signer) => &signer.link,
        }
    }

    fn stream(&self) -> &StreamId {
        match self {
            Signer::Key(key) => &key.stream,
            Signer::Clear(signer) => &signer.stream,
        }
    }
}

/// A flow and what its answer says besides its bytes.
pub(super) struct Opened {
    /// `None` when the client has the bytes already: the origin need not be asked then.
    flow: Option<Arc<Flow>>,
    etag: String,
    stream: StreamId,
    cipher: Option<Cipher>,
    place: Place,
}

impl Opened {
    fn key(&self) -> Option<&Arc<LiveKey>> {
        self.cipher.as_ref().map(|cipher| &cipher.key)
    }

    fn keys(&self) -> &[KeyId] {
        self.key().map_or(&[], |key| std::slice::from_ref(&key.id))
    }

    fn may_be_kept(&self) -> bool {
        self.cipher.as_ref().is_none_or(Cipher::may_be_kept)
    }
}

/// A link that the shield wrote, and where it leads.
pub(super) struct Checked<'a> {
    pub(super) signer: Signer,
    pub(super) mount: &'a Mount,
    pub(super) path: String,
    pub(super) origin_query: Option<String>,
    pub(super) origin_key: Option<OriginKey>,
}

/// Checks a link, and what stands behind it.
///
/// # Errors
/// [`Refusal`] for a link that this shield did not write for this path, or whose key is gone.
pub(super) async fn check<'a>(
    shield: &'a Shield,
    linked: &LinkedPath,
    query: &str,
) -> Result<Checked<'a>, Refusal> {
    let link = &linked.link;
    if !shield.engine.status().ready {
        return Err(EngineError::NotReady.into());
    }
    let signer = if link.place.is_served_as_it_is() {
        shield.engine.clear_init_signer(DekId::from_bytes(link.signer)).await.map(Signer::Clear)
    } else {
        shield.engine.key(KeyId::from_bytes(link.signer)).await.map(Signer::Key)
    };
    let signer = signer.ok_or(Refusal::LinkKeyGone)?;
    let path = canonical_path(&linked.path).map_err(|error| Refusal::BadPath(error.to_string()))?;
    let OriginPath { mount, path, .. } = shield.settings.mounts.locate(&path).ok_or(Refusal::ForgedLink)?;
    let resource = link.resource(&mount.origin, &path);
    if signer.link_key().link_mac(&resource) != link.mac {
        return Err(Refusal::ForgedLink);
    }
    let origin_query = Link::read_origin_query(query, &resource, signer.link_key())?;
    let origin_key = Link::read_origin_key(query, &resource, signer.link_key())?;
    Ok(Checked { signer, mount, path, origin_query, origin_key })
}

/// Checks a link and opens its flow.
///
/// # Errors
/// As [`check`].
pub(super) async fn open(
    shield: &Shield,
    linked: &LinkedPath,
    query: Option<&str>,
    if_none_match: Option<&str>,
) -> Result<Opened, Refusal> {
    let query = query.unwrap_or_default();
    let Checked { signer, mount, path, origin_query, origin_key } = check(shield, linked, query).await?;
    let cipher = match &signer {
        Signer::Key(key) => Some(Cipher::choose(shield, key, read_successor(query)).await?),
        Signer::Clear(_) => None,
    };
    // As the key that encrypts would sign it: what is under another key is another representation.
    let link = match &cipher {
        Some(Cipher { key, .. }) => {
            let link = Link { signer: *key.id.as_bytes(), ..linked.link };
            Link::to_resource(&link.resource(&mount.origin, &path), &key.secrets.link)
        }
        None => linked.link,
    };
    // What a link leads to under one key never changes, so its proof is a strong validator. An origin's query may
    // lead elsewhere, and its key to another plaintext: they are part of it.
    let mut etag = hex::encode(link.mac.0);
    if origin_query.is_some() || origin_key.is_some() {
        let mut hash = Sha256::new();
        hash.update(origin_query.as_deref().unwrap_or_default());
        if let Some(key) = &origin_key {
            hash.update([0]);
            hash.update(&key.reference);
            hash.update(key.iv);
        }
        etag.push_str(&hex::encode(&hash.finalize()[..4]));
    }
    let etag = format!("\"{etag}\"");
    let (stream, place) = (signer.stream().clone(), link.place);
    // There are caches that keep what they have for as long again after any 304: under a key that was taken back there
    // is none.
    let may_be_kept = cipher.as_ref().is_none_or(Cipher::may_be_kept);
    if may_be_kept && if_none_match.is_some_and(|tags| names_etag(tags, &etag)) {
        return Ok(Opened { flow: None, etag, stream, cipher, place });
    }
    let key = FlowKey {
        signer: link.signer,
        place,
        range: link.range,
        origin: mount.origin.clone(),
        path: path.clone(),
        query: origin_query.clone(),
        origin_key: origin_key.clone(),
    };
    let flow = shield.flows.get_or_fill(key, |writer| {
        let fill = Fill {
            upstream: shield.upstream.clone(),
            mounts: shield.settings.mounts.clone(),
            mount: mount.clone(),
            path,
            query: origin_query,
            link,
            key: cipher.as_ref().map(|cipher| Arc::clone(&cipher.key)),
            origin_key,
            origin_keys: shield.origin_keys.clone(),
            max_bytes: shield.settings.max_segment_bytes,
            timeout: shield.settings.segment_timeout,
            metrics: shield.metrics.clone(),
        };
        async move { fill.run(&writer).await }
    })?;
    Ok(Opened { flow: Some(flow), etag, stream, cipher, place })
}

/// Answers a request out of an opened flow. Returns the body bytes that were sent.
///
/// # Errors
/// A flow that breaks off after the header was sent: the connection must be aborted, so that nobody takes
/// the part for the whole. One that fails before is a [`Refusal`].
pub(super) async fn answer(session: &mut Session, shield: &Shield, opened: &Opened) -> Result<Sent, Refusal> {
    let request = session.req_header();
    let text = |name: HeaderName| request.headers.get(name).and_then(|v| v.to_str().ok());
    let is_head = request.method == Method::HEAD;
    let range = text(RANGE).filter(|_| !is_head);
    // RFC 9110 §13.1.5: without a match, If-Range makes the range void.
    let range = range.filter(|_| text(IF_RANGE).is_none_or(|tag| tag == opened.etag)).map(str::to_owned);
    let version = request.version;
    let origin = request.headers.get(ORIGIN).cloned();

    let head = match &opened.flow {
        Some(flow) => flow.head().await?,
        None => Arc::default(),
    };
    let mut total = head.total;
    if let Some(flow) = &opened.flow
        && total.is_none()
        && (range.is_some() || version < Version::HTTP_11)
    {
        // A length that the origin does not say is known when the body is whole. A range needs it, and so does
        // HTTP/1.0, where a body without one ends with the connection, whole or not.
        total = Some(flow.complete_len().await?);
    }
    let part = match total {
        Some(total) => wanted(range.as_deref(), total),
        None => Wanted::Whole,
    };
    let (status, bytes) = match &part {
        _ if opened.flow.is_none() => (StatusCode::NOT_MODIFIED, 0..0),
        Wanted::Whole => (StatusCode::OK, 0..total.unwrap_or(u64::MAX)),
        Wanted::Part(range) => (StatusCode::PARTIAL_CONTENT, range.clone()),
        Wanted::Unsatisfiable => (StatusCode::RANGE_NOT_SATISFIABLE, 0..0),
    };
    let may_be_kept = opened.may_be_kept();
    let build = || -> pingora::Result<ResponseHeader> {
        let mut header = ResponseHeader::build(status, Some(12))?;
        header.insert_header(ETAG, &opened.etag)?;
        header.insert_header(ACCEPT_RANGES, "bytes")?;
        let max_age = shield.settings.segment_max_age.as_secs();
        let cache_control = match status {
            StatusCode::RANGE_NOT_SATISFIABLE => "no-store".to_owned(),
            _ if !may_be_kept => "no-store".to_owned(),
            // As keys of our own.
            _ if opened.place == Place::OriginKey => {
                format!("private, max-age={}", shield.settings.key_max_age.as_secs())
            }
            _ => format!("public, max-age={max_age}, immutable"),
        };
        header.insert_header(CACHE_CONTROL, cache_control)?;
        for (name, value) in tags(&opened.stream, opened.keys()) {
            header.insert_header(name, value)?;
        }
        if let Some(key) = opened.key() {
            header.insert_header(KEY, key.id.to_string())?;
        }
        add_cors(&mut header, origin.as_ref(), &shield.settings.cors_origins)?;
        match (status, total) {
            (StatusCode::NOT_MODIFIED, _) => {}
            (StatusCode::RANGE_NOT_SATISFIABLE, Some(total)) => {
                header.insert_header(CONTENT_RANGE, format!("bytes */{total}"))?;
                header.insert_header(CONTENT_LENGTH, "0")?;
            }
            (StatusCode::PARTIAL_CONTENT, Some(total)) => {
                let (first, last) = (bytes.start, bytes.end - 1);
                header.insert_header(CONTENT_RANGE, format!("bytes {first}-{last}/{total}"))?;
                header.insert_header(CONTENT_LENGTH, (bytes.end - bytes.start).to_string())?;
            }
            (_, Some(total)) => header.insert_header(CONTENT_LENGTH, total.to_string())?,
            (_, None) if version == Version::HTTP_11 && !is_head => {
                header.insert_header(TRANSFER_ENCODING, "chunked")?
            }
            (_, None) => {}
        }
        if let Some(content_type) = &head.content_type {
            header.insert_header(CONTENT_TYPE, content_type)?;
        }
        Ok(header)
    };
    // Only header values that cannot be written fail here: the origin's Content-Type came as a header.
    let header =
        build().map_err(|error| OriginError::BrokeOff { origin: "header".into(), why: error.to_string() })?;
    let no_body = is_head || bytes.is_empty();
    let mut sent = 0;
    // What caches may keep under a key, its revocation concerns.
    let kept_under = opened.key().filter(|_| may_be_kept);
    let outcome = async {
        session.write_response_header(Box::new(header), no_body).await?;
        let Some(flow) = opened.flow.as_ref().filter(|_| !no_body) else { return Ok(()) };
        send_body(session, flow, bytes, kept_under, &mut sent).await
    }
    .await;
    if let Some(key) = kept_under
        && outcome.is_ok()
        && !is_head
        && status != StatusCode::RANGE_NOT_SATISFIABLE
    {
        key.served(session.req_header().uri.path(), shield.clock.now());
    }
    Ok(Sent { status, bytes: sent, outcome })
}

/// Sends the bytes of a flow, and counts them in `sent`. `kept_under`: the key whose revocation breaks the answer off,
/// because caches were told that they may keep it.
async fn send_body(
    session: &mut Session,
    flow: &Arc<Flow>,
    bytes: Range<u64>,
    kept_under: Option<&Arc<LiveKey>>,
    sent: &mut u64,
) -> pingora::Result<()> {
    let mut reader = flow.read(bytes.clone());
    let sending = async {
        loop {
            let chunk = reader.next().await;
            // Where neither the origin nor the reader is ever waited for, the revocation is not heard of below.
            if kept_under.is_some_and(|key| key.breaks_off()) {
                return abort(KEY_REVOKED);
            }
            match chunk {
                Ok(Some(chunk)) => {
                    *sent += chunk.len() as u64;
                    let last = bytes.end != u64::MAX && *sent == bytes.end - bytes.start;
                    session.write_response_body(Some(chunk), last).await?;
                    if last {
                        return Ok(());
                    }
                }
                Ok(None) if bytes.end == u64::MAX => {
                    return session.write_response_body(None, true).await;
                }
                // Complete, but shorter than the origin's Content-Length said: never well-formed.
                Ok(None) => return abort("the segment is shorter than announced"),
                Err(error) => {
                    tracing::warn!(%error, "segment broke off, aborting the answer");
                    return abort("the segment broke off");
                }
            }
        }
    };
    let Some(key) = kept_under else { return sending.await };
    tokio::select! {
        biased;
        outcome = sending => outcome,
        () = key.broken_off() => abort(KEY_REVOKED),
    }
}

/// What became of an answer whose header was sent.
pub(super) struct Sent {
    pub(super) status: StatusCode,
    pub(super) bytes: u64,
    /// An error aborts the connection.
    pub(super) outcome: pingora::Result<()>,
}

fn abort(why: &'static str) -> pingora::Result<()> {
    pingora::Error::e_explain(pingora::ErrorType::ConnectionClosed, why)
        .map_err(|e: pingora::BError| e.into_up())
}
