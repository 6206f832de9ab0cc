//! The data plane as a pingora proxy: requests in, routes asked, answers out.

use std::ops::Deref;
use std::sync::Arc;

use async_trait::async_trait;
use http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_MAX_AGE, IF_NONE_MATCH,
};
use http::{Method, StatusCode};
use pingora::apps::HttpServerOptions;
use pingora::http::RequestHeader;
use pingora::prelude::{HttpPeer, ProxyHttp};
use pingora::proxy::{HttpProxy, Session, http_proxy_service_with_name};
use pingora::server::configuration::ServerConf;
use pingora::services::listening::Service;

use super::directives::Directives;
use super::flow::Flows;
use super::origin_keys::OriginKeys;
use super::pass_through::PassThrough;
use super::playlists::{self, Playlists};
use super::publish::{Imports, imports};
use super::reply::{ALLOWED_METHODS, Refusal, Reply, names_etag, send};
use super::route::{Route, route};
use super::settings::ShieldSettings;
use super::upstream::Upstream;
use super::{documents, keys, segments};
use crate::clock::Clock;
use crate::engine::{Engine, Stream};
use crate::hls::{OriginPath, normalized_path};
use crate::telemetry::Metrics;

/// The data plane. Clones share everything.
#[derive(Clone)]
pub struct Shield(Arc<Parts>);

impl Deref for Shield {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// Everything that a request may need.
pub struct Parts {
    pub(super) engine: Engine,
    pub(super) upstream: Upstream,
    pub(super) settings: ShieldSettings,
    pub(super) flows: Flows,
    pub(super) playlists: Playlists,
    pub(super) origin_keys: OriginKeys,
    pub(super) imports: Imports,
    pub(super) metrics: Metrics,
    pub(super) clock: Clock,
}

impl Shield {
    pub fn new(
        settings: ShieldSettings,
        engine: Engine,
        upstream: Upstream,
        clock: Clock,
        metrics: Metrics,
    ) -> Self {
        let flows = Flows::new(settings.flow_cache_bytes, settings.max_filling_flows, metrics.clone());
        let playlists = Playlists::new(settings.playlist_cache_bytes, settings.stale_if_error);
        Self(Arc::new(Parts {
            engine,
            upstream,
            settings,
            flows,
            playlists,
            origin_keys: OriginKeys::new(),
            imports: imports(),
            metrics,
            clock,
        }))
    }
}

impl Shield {
    /// The stream that a place belongs to.
    pub(super) fn owner(&self, place: &OriginPath<'_>) -> Option<Arc<Stream>> {
        let plain = normalized_path(&place.path).ok()?;
        self.engine.stream_at(&place.mount.origin, &plain)
    }
}

/// The data plane as a service of a pingora server, HTTP/1.1 and HTTP/2 in clear text.
pub fn service(conf: &Arc<ServerConf>, shield: Shield) -> Service<HttpProxy<Shield>> {
    let mut service = http_proxy_service_with_name(conf, shield, "data plane");
    if let Some(proxy) = service.app_logic_mut() {
        let mut options = HttpServerOptions::default();
        options.h2c = true;
        proxy.server_options = Some(options);
    }
    service
}

/// What is noted of one request, for metrics and logs.
#[derive(Debug, Default)]
pub struct RequestNotes {
    kind: &'static str,
    pass_through: Option<PassThrough>,
    status: u16,
    bytes: u64,
}

impl RequestNotes {
    fn kind(&self) -> &'static str {
        if self.kind.is_empty() { "other" } else { self.kind }
    }
}

#[async_trait]
impl ProxyHttp for Shield {
    type CTX = RequestNotes;

    fn new_ctx(&self) -> RequestNotes {
        RequestNotes::default()
    }

    async fn request_filter(&self, session: &mut Session, notes: &mut RequestNotes) -> pingora::Result<bool> {
        let reply = match self.handle(session, notes).await {
            Ok(Handled::Sent(outcome)) => return outcome.map(|()| true),
            Ok(Handled::PassThrough) => return Ok(false),
            Ok(Handled::Reply(reply)) => reply,
            Err(refusal) => {
                let path = session.req_header().uri.path();
                tracing::debug!(status = %refusal.status(), path, %refusal, "refused");
                Reply::from(&refusal)
            }
        };
        notes.status = reply.status.as_u16();
        notes.bytes = reply.body.len() as u64;
        send(session, reply, &self.settings.cors_origins).await?;
        Ok(true)
    }

    async fn upstream_peer(
        &self,
        _session: &mut Session,
        notes: &mut RequestNotes,
    ) -> pingora::Result<Box<HttpPeer>> {
        let refused = |why: String| pingora::Error::explain(pingora::ErrorType::ConnectError, why).into_up();
        let to = notes.pass_through.as_ref().ok_or_else(|| refused("nothing is passed through".into()))?;
        let peer = to.peer(&self.upstream).await.map_err(|error| refused(error.to_string()))?;
        Ok(Box::new(peer))
    }

    fn fail_to_connect(
        &self,
        _session: &mut Session,
        _peer: &HttpPeer,
        notes: &mut RequestNotes,
        mut error: Box<pingora::Error>,
    ) -> Box<pingora::Error> {
        // Nothing was sent yet: the next address may answer.
        error.set_retry(notes.pass_through.as_mut().is_some_and(PassThrough::try_next));
        error
    }

    async fn upstream_request_filter(
        &self,
        _session: &mut Session,
        request: &mut RequestHeader,
        notes: &mut RequestNotes,
    ) -> pingora::Result<()> {
        match &notes.pass_through {
            Some(to) => to.rewrite(request),
            None => Ok(()),
        }
    }

    async fn logging(&self, session: &mut Session, error: Option<&pingora::Error>, notes: &mut RequestNotes) {
        let written = session.response_written().map_or(0, |header| header.status.as_u16());
        let status = if notes.status == 0 { written } else { notes.status };
        let bytes = if notes.pass_through.is_some() { session.body_bytes_sent() as u64 } else { notes.bytes };
        let kind = notes.kind();
        let status_label = if error.is_some() { "aborted".to_owned() } else { status.to_string() };
        self.metrics.responses.with_label_values(&[kind, &status_label]).inc();
        self.metrics.response_bytes.with_label_values(&[kind]).inc_by(bytes);
        let request = session.req_header();
        // The path, never the query: it may hold a viewer's token.
        tracing::debug!(kind, status, bytes, method = %request.method, path = request.uri.path(), "answered");
    }

    fn suppress_error_log(&self, _session: &Session, notes: &RequestNotes, _error: &pingora::Error) -> bool {
        // What went wrong with a segment or a playlist was logged where it did.
        notes.pass_through.is_none()
    }
}

/// What became of a request.
enum Handled {
    Reply(Reply),
    /// The answer was written; an error aborts the connection.
    Sent(pingora::Result<()>),
    PassThrough,
}

impl Shield {
    async fn handle(&self, session: &mut Session, notes: &mut RequestNotes) -> Result<Handled, Refusal> {
        let request = session.req_header();
        match request.method {
            Method::GET | Method::HEAD => {}
            Method::OPTIONS => return Ok(Handled::Reply(preflight())),
            _ => return Err(Refusal::Method),
        }
        let (path, query) = (request.uri.path().to_owned(), request.uri.query().map(str::to_owned));
        match route(&path, &self.settings, &self.engine)? {
            Route::Key { id } => {
                notes.kind = "key";
                keys::serve(id, &self.engine, &self.settings).await.map(Handled::Reply)
            }
            Route::KeyCheck { id } => {
                notes.kind = "key";
                Ok(Handled::Reply(keys::check(id, &self.engine).await))
            }
            Route::Segment { linked } if linked.link.place.is_a_document() => {
                notes.kind = "document";
                documents::serve(self, &linked, query.as_deref().unwrap_or_default())
                    .await
                    .map(Handled::Reply)
            }
            Route::Segment { linked } => {
                notes.kind = "segment";
                let known = request.headers.get(IF_NONE_MATCH).and_then(|value| value.to_str().ok());
                let opened = segments::open(self, &linked, query.as_deref(), known).await?;
                let sent = segments::answer(session, self, &opened).await?;
                notes.status = sent.status.as_u16();
                notes.bytes = sent.bytes;
                Ok(Handled::Sent(sent.outcome))
            }
            Route::Playlist { stream, mut place } => {
                notes.kind = "playlist";
                // What the origin does not ask for (tokens, CMCD) must not multiply playlists.
                place.query = query.as_deref().and_then(|query| place.mount.playlist_query(query));
                let directives = Directives::of(query.as_deref().unwrap_or_default())?;
                let reply = playlists::serve(self, &stream, &place, directives).await?;
                Ok(Handled::Reply(not_modified(session.req_header(), reply)))
            }
            Route::PassThrough { mut place } => {
                notes.kind = "pass_through";
                place.query = query;
                notes.pass_through = Some(PassThrough::to(&place));
                Ok(Handled::PassThrough)
            }
        }
    }
}

/// A 304 in place of a playlist that the client already has.
fn not_modified(request: &RequestHeader, reply: Reply) -> Reply {
    let etag = reply.headers.iter().find(|(name, _)| name == http::header::ETAG).map(|(_, tag)| tag);
    let asked = request.headers.get(IF_NONE_MATCH).and_then(|value| value.to_str().ok());
    match (etag, asked) {
        (Some(etag), Some(asked)) if names_etag(asked, etag) => {
            Reply { status: StatusCode::NOT_MODIFIED, body: Default::default(), ..reply }
        }
        _ => reply,
    }
}

/// The answer to a CORS preflight: the same for every path, so that a browser may keep it.
fn preflight() -> Reply {
    Reply::empty(StatusCode::NO_CONTENT)
        .with(ACCESS_CONTROL_ALLOW_METHODS, ALLOWED_METHODS)
        .with(ACCESS_CONTROL_ALLOW_HEADERS, "*, Authorization, Range")
        .with(ACCESS_CONTROL_MAX_AGE, "86400")
}
