//! Requests to origins, over pingora's connector: pooled, timed out, retried once, failed over.
//!
//! An origin has one or more addresses, tried in their order; the next one is taken when one cannot be
//! reached, times out or answers 5xx. A reused connection that turns out to be dead is replaced once by a
//! fresh one. A body whose length the origin does not prove (neither Content-Length nor chunked nor HTTP/2)
//! is refused, because nobody could tell when it was cut off.
//!
//! Deliberately absent: caching, and redirects, which would lead away from the allow-list.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HOST, RANGE, TRANSFER_ENCODING,
    USER_AGENT,
};
use http::{HeaderName, StatusCode, Version};
use parking_lot::Mutex;
use pingora::connectors::ConnectorOptions;
use pingora::connectors::http::Connector;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::ALPN;
use pingora::protocols::http::client::HttpSession;
use pingora::upstreams::peer::{HttpPeer, Peer};
use thiserror::Error;

use crate::hls::{BaseUrl, Mount};
use crate::keys::ByteRange;
use crate::telemetry::Metrics;

/// How long a resolved address is used before it is asked for again.
const DNS_TTL: Duration = Duration::from_secs(5);
const AGENT: &str = concat!("keyshield/", env!("CARGO_PKG_VERSION"));

/// Time limits towards origins.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For DNS, TCP and TLS together.
    pub connect: Duration,
    /// Between two reads of one answer.
    pub read: Duration,
    /// How long an unused connection is kept.
    pub idle: Duration,
}

/// Why an origin gave no usable answer. Holds no query, which may be a token.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OriginError {
    #[error("origin {origin}: {address} cannot be reached: {why}")]
    Unreachable { origin: String, address: String, why: String },
    #[error("origin {origin}: {address} did not answer in time")]
    TimedOut { origin: String, address: String },
    #[error("origin {origin}: the answer broke off: {why}")]
    BrokeOff { origin: String, why: String },
    #[error(
        "origin {origin}: the answer has neither Content-Length nor chunks, so nobody could tell if it was cut off"
    )]
    Unframed { origin: String },
    #[error("origin {origin}: the answer is longer than {limit} bytes")]
    TooLong { origin: String, limit: u64 },
    #[error("origin {origin}: the answer has Content-Encoding {encoding:?}, which was not asked for")]
    Encoded { origin: String, encoding: String },
    #[error("origin {origin}: the gzip answer is damaged")]
    BadGzip { origin: String },
    #[error("origin {origin} answered {status}")]
    Status { origin: String, status: StatusCode },
    #[error("origin {origin}: bytes {} to {} were asked for, and it gave {given}", .range.offset, .range.end().saturating_sub(1))]
    WrongRange { origin: String, range: ByteRange, given: String },
    #[error("origin {origin}: what it encrypted cannot be decrypted: {why}")]
    Undecryptable { origin: String, why: String },
}

impl OriginError {
    /// The whole of an answer took too long, whatever came meanwhile.
    pub fn out_of_time(mount: &Mount) -> Self {
        OriginError::TimedOut { origin: mount.origin.clone(), address: mount.bases()[0].to_string() }
    }

    pub fn is_timeout(&self) -> bool {
        matches!(self, OriginError::TimedOut { .. })
    }

    /// What a stranger may read: the origin's name and what went wrong, without addresses.
    pub fn public(&self) -> String {
        match self {
            OriginError::Unreachable { origin, .. } => format!("origin {origin} cannot be reached"),
            OriginError::TimedOut { origin, .. } => format!("origin {origin} did not answer in time"),
            OriginError::BrokeOff { origin, .. } => format!("the answer of origin {origin} broke off"),
            other => other.to_string(),
        }
    }

    /// The origin's own 4xx, which is passed on as it is.
    pub fn client_error(&self) -> Option<StatusCode> {
        match self {
            OriginError::Status { status, .. } if status.is_client_error() => Some(*status),
            _ => None,
        }
    }
}

/// The client side of the shield. Clones share the pool.
#[derive(Clone)]
pub struct Upstream {
    inner: Arc<Inner>,
}

type HostPort = (String, u16);

struct Inner {
    connector: Connector,
    timeouts: Timeouts,
    metrics: Metrics,
    /// At most one entry for each address of an origin.
    addresses: Mutex<HashMap<HostPort, (Instant, Vec<SocketAddr>)>>,
}

/// What is asked of an origin.
#[derive(Debug, Clone, Copy)]
pub struct OriginRequest<'a> {
    pub mount: &'a Mount,
    /// Below the mount.
    pub path: &'a str,
    pub query: Option<&'a str>,
    pub accept_gzip: bool,
    /// Only these bytes; an origin may give the whole file all the same.
    pub range: Option<ByteRange>,
    /// How much longer than usual the origin may think: it blocks until there is something new.
    pub patience: Duration,
}

impl<'a> OriginRequest<'a> {
    /// For the whole of what is at a path, as it is.
    pub fn to(mount: &'a Mount, path: &'a str) -> Self {
        Self { mount, path, query: None, accept_gzip: false, range: None, patience: Duration::ZERO }
    }
}

/// An origin's answer, its body not read yet.
pub struct OriginResponse {
    upstream: Upstream,
    origin: String,
    peer: HttpPeer,
    /// Gone when it was given back to the pool.
    session: Option<HttpSession>,
    pub header: ResponseHeader,
    content_length: Option<u64>,
    received: u64,
}

impl Upstream {
    /// `ca_file` replaces the system's certificate authorities for https origins.
    pub fn new(timeouts: Timeouts, pool_size: usize, ca_file: Option<String>, metrics: Metrics) -> Self {
        let mut options = ConnectorOptions::new(pool_size);
        options.ca_file = ca_file;
        let connector = Connector::new(Some(options));
        let inner = Inner { connector, timeouts, metrics, addresses: Mutex::default() };
        Self { inner: Arc::new(inner) }
    }

    /// Asks the origin's addresses in turn.
    ///
    /// # Errors
    /// The last address's failure. An answer of 5xx by the last address is an answer.
    pub async fn fetch(&self, request: OriginRequest<'_>) -> Result<OriginResponse, OriginError> {
        let origin = &request.mount.origin;
        let mut last = None;
        for base in request.mount.bases() {
            let answer = self.fetch_from(base, &request).await;
            let outcome = match &answer {
                Ok(response) => format!("{}xx", response.header.status.as_u16() / 100),
                Err(_) => "error".to_owned(),
            };
            self.inner.metrics.origin_requests.with_label_values(&[origin.as_str(), &outcome]).inc();
            match &answer {
                Ok(response) if !response.header.status.is_server_error() => return answer,
                Ok(response) => {
                    tracing::warn!(%origin, address = %base, status = %response.header.status, "origin failed");
                }
                Err(error) => tracing::warn!(%origin, %error, "origin failed"),
            }
            last = Some(answer);
        }
        // `Mount` has at least one address.
        last.unwrap_or_else(|| {
            let address = String::new();
            Err(OriginError::Unreachable { origin: origin.clone(), address, why: "it has none".into() })
        })
    }

    /// The peer for a base address, for the proxy's own way.
    ///
    /// # Errors
    /// A host that does not resolve.
    pub async fn peer(&self, mount: &Mount, base: &BaseUrl) -> Result<HttpPeer, OriginError> {
        let addresses = self.resolve(mount, base).await?;
        // `resolve` gives at least one.
        Ok(self.peer_at(base, addresses[0]))
    }

    async fn fetch_from(
        &self,
        base: &BaseUrl,
        request: &OriginRequest<'_>,
    ) -> Result<OriginResponse, OriginError> {
        let mut last = None;
        for address in self.resolve(request.mount, base).await? {
            let peer = self.peer_at(base, address);
            let answer = match self.attempt(base, &peer, request).await {
                Err(Attempt::DeadReuse(_)) => {
                    self.inner.metrics.origin_retries.inc();
                    // Another group has a pool of its own: this connection is certainly a fresh one.
                    let fresh = HttpPeer { group_key: u64::MAX, ..peer };
                    self.attempt(base, &fresh, request).await
                }
                answer => answer,
            };
            match answer {
                Ok(response) => return Ok(response),
                Err(Attempt::DeadReuse(error) | Attempt::Failed(error)) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| OriginError::Unreachable {
            origin: request.mount.origin.clone(),
            address: base.to_string(),
            why: "its host has no address".into(),
        }))
    }

    async fn attempt(
        &self,
        base: &BaseUrl,
        peer: &HttpPeer,
        request: &OriginRequest<'_>,
    ) -> Result<OriginResponse, Attempt> {
        let origin = &request.mount.origin;
        let failed = |error: pingora::BError| describe(origin, base, &error);
        let (mut session, reused) = self
            .inner
            .connector
            .get_http_session(peer)
            .await
            .map_err(|error| Attempt::Failed(failed(error)))?;
        session.set_read_timeout(peer.options.read_timeout.map(|timeout| timeout + request.patience));
        session.set_write_timeout(peer.options.write_timeout);
        let header = header_for(base, request).map_err(|error| Attempt::Failed(failed(error)))?;
        let exchange = async {
            session.write_request_header(Box::new(header)).await?;
            session.finish_request_body().await?;
            loop {
                session.read_response_header().await?;
                let informational = |header: &ResponseHeader| header.status.is_informational();
                if !session.response_header().is_some_and(informational) {
                    return Ok(());
                }
            }
        };
        if let Err(error) = exchange.await {
            let error: pingora::BError = error;
            let timed_out = is_timeout(&error);
            let error = failed(error);
            return Err(if reused && !timed_out {
                Attempt::DeadReuse(error)
            } else {
                Attempt::Failed(error)
            });
        }
        let broke_off =
            || Attempt::Failed(OriginError::BrokeOff { origin: origin.clone(), why: "no header".into() });
        let header = session.response_header().cloned().ok_or_else(broke_off)?;
        let content_length =
            header.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.trim().parse().ok());
        Ok(OriginResponse {
            upstream: self.clone(),
            origin: origin.clone(),
            peer: peer.clone(),
            session: Some(session),
            header,
            content_length,
            received: 0,
        })
    }

    async fn resolve(&self, mount: &Mount, base: &BaseUrl) -> Result<Vec<SocketAddr>, OriginError> {
        let key = (base.host().to_owned(), base.port());
        if let Some((at, addresses)) = self.inner.addresses.lock().get(&key)
            && at.elapsed() < DNS_TTL
        {
            return Ok(addresses.clone());
        }
        let unreachable = |why: String| OriginError::Unreachable {
            origin: mount.origin.clone(),
            address: base.to_string(),
            why,
        };
        let looked_up =
            tokio::time::timeout(self.inner.timeouts.connect, tokio::net::lookup_host(key.clone()))
                .await
                .map_err(|_| unreachable("its host did not resolve in time".into()))?;
        let addresses: Vec<_> = looked_up.map_err(|error| unreachable(error.to_string()))?.collect();
        if addresses.is_empty() {
            return Err(unreachable("its host has no address".into()));
        }
        self.inner.addresses.lock().insert(key, (Instant::now(), addresses.clone()));
        Ok(addresses)
    }

    fn peer_at(&self, base: &BaseUrl, address: SocketAddr) -> HttpPeer {
        let timeouts = self.inner.timeouts;
        let mut peer = HttpPeer::new(address, base.is_https(), base.host().to_owned());
        peer.options.connection_timeout = Some(timeouts.connect);
        peer.options.total_connection_timeout = Some(timeouts.connect);
        peer.options.read_timeout = Some(timeouts.read);
        peer.options.write_timeout = Some(timeouts.read);
        peer.options.idle_timeout = Some(timeouts.idle);
        if base.is_https() {
            peer.options.alpn = ALPN::H2H1;
        }
        peer
    }
}

/// How one attempt on one connection failed.
enum Attempt {
    /// The connection came from the pool and was dead: a fresh one may do.
    DeadReuse(OriginError),
    Failed(OriginError),
}

fn header_for(base: &BaseUrl, request: &OriginRequest<'_>) -> Result<RequestHeader, pingora::BError> {
    let path = base.full_path(request.path);
    let target = match request.query {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    let mut header = RequestHeader::build("GET", target.as_bytes(), Some(4))?;
    header.insert_header(HOST, base.authority())?;
    header.insert_header(USER_AGENT, AGENT)?;
    header.insert_header(ACCEPT_ENCODING, if request.accept_gzip { "gzip" } else { "identity" })?;
    if let Some(range) = request.range {
        header.insert_header(RANGE, format!("bytes={}-{}", range.offset, range.end().saturating_sub(1)))?;
    }
    Ok(header)
}

fn is_timeout(error: &pingora::Error) -> bool {
    use pingora::ErrorType::{ConnectTimedout, ReadTimedout, TLSHandshakeTimedout, WriteTimedout};
    matches!(error.etype(), ConnectTimedout | ReadTimedout | TLSHandshakeTimedout | WriteTimedout)
}

fn describe(origin: &str, base: &BaseUrl, error: &pingora::Error) -> OriginError {
    let (origin, address) = (origin.to_owned(), base.to_string());
    if is_timeout(error) {
        OriginError::TimedOut { origin, address }
    } else {
        OriginError::Unreachable { origin, address, why: error.to_string() }
    }
}

impl OriginResponse {
    /// The answer itself, if it is a 200.
    ///
    /// # Errors
    /// [`OriginError::Status`] for any other status; a redirect is one, because it is not followed.
    pub fn ok(self) -> Result<Self, OriginError> {
        if self.header.status == StatusCode::OK {
            return Ok(self);
        }
        Err(OriginError::Status { origin: self.origin.clone(), status: self.header.status })
    }

    /// The answer itself, if it is the part `range` of a file, or the whole of one in which the part lies.
    ///
    /// # Errors
    /// [`OriginError::Status`], and [`OriginError::WrongRange`] for another part.
    pub fn partial(self, range: ByteRange) -> Result<Self, OriginError> {
        // Passed on as it is, it would speak of a Range that the player did not send.
        if self.header.status == StatusCode::RANGE_NOT_SATISFIABLE {
            let given = "416, which says that there are none".to_owned();
            return Err(OriginError::WrongRange { origin: self.origin, range, given });
        }
        if self.header.status != StatusCode::PARTIAL_CONTENT {
            return self.ok();
        }
        let given = self.header_text(CONTENT_RANGE).unwrap_or("another part").to_owned();
        let wanted = format!("bytes {}-{}/", range.offset, range.end().saturating_sub(1));
        if given.starts_with(&wanted) {
            return Ok(self);
        }
        Err(OriginError::WrongRange { origin: self.origin, range, given })
    }

    /// The answer itself, if its end can be told from its breaking off.
    ///
    /// # Errors
    /// [`OriginError::Unframed`].
    pub fn framed(self) -> Result<Self, OriginError> {
        // Any transfer coding but chunked ends with the connection (RFC 9112 §6.3).
        let framed = match self.header.headers.get(TRANSFER_ENCODING) {
            Some(coding) => coding.to_str().is_ok_and(|coding| coding.trim().eq_ignore_ascii_case("chunked")),
            None => self.content_length.is_some() || self.header.version == Version::HTTP_2,
        };
        if framed { Ok(self) } else { Err(OriginError::Unframed { origin: self.origin.clone() }) }
    }

    /// The body's length, when the origin says it.
    pub fn content_length(&self) -> Option<u64> {
        self.content_length.filter(|_| !self.header.headers.contains_key(TRANSFER_ENCODING))
    }

    pub fn header_text(&self, name: HeaderName) -> Option<&str> {
        self.header.headers.get(name)?.to_str().ok()
    }

    pub fn encoding(&self) -> Option<&str> {
        self.header_text(CONTENT_ENCODING).filter(|encoding| !encoding.eq_ignore_ascii_case("identity"))
    }

    /// The next bytes of the body; `None` at its proven end.
    ///
    /// # Errors
    /// [`OriginError::BrokeOff`] when the body ends before its end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, OriginError> {
        let Some(session) = &mut self.session else { return Ok(None) };
        let broke_off = |why: String| OriginError::BrokeOff { origin: self.origin.clone(), why };
        match session.read_response_body().await {
            Ok(Some(bytes)) => {
                self.received += bytes.len() as u64;
                Ok(Some(bytes))
            }
            Ok(None) => {
                if self.content_length().is_some_and(|length| length != self.received) {
                    return Err(broke_off("it is shorter than its Content-Length".into()));
                }
                self.release().await;
                Ok(None)
            }
            Err(error) if is_timeout(&error) => Err(broke_off("no bytes came in time".into())),
            Err(error) => Err(broke_off(error.to_string())),
        }
    }

    /// The whole body, of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`Self::chunk`], and [`OriginError::TooLong`].
    pub async fn body(&mut self, limit: usize) -> Result<Bytes, OriginError> {
        // What was read before does not count.
        let limit_in_all = self.received.saturating_add(limit as u64);
        let origin = self.origin.clone();
        let too_long = move || OriginError::TooLong { origin: origin.clone(), limit: limit_in_all };
        if self.content_length().is_some_and(|length| length > limit_in_all) {
            return Err(too_long());
        }
        let mut body = BytesMut::new();
        while let Some(chunk) = self.chunk().await? {
            if body.len() + chunk.len() > limit {
                return Err(too_long());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body.freeze())
    }

    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Gives the connection back. One of the group for dead connections is closed instead.
    async fn release(&mut self) {
        let Some(mut session) = self.session.take() else { return };
        if let HttpSession::H1(h1) = &mut session {
            h1.respect_keepalive();
        }
        if self.peer.group_key == 0 {
            let idle = self.peer.idle_timeout();
            self.upstream.inner.connector.release_http_session(session, &self.peer, idle).await;
        }
    }
}
