//! The HTTP shell of the sample origin: a request's path and the caller's clock in, a response out.
//!
//! [`origin`](super::origin) decides; this only puts it into HTTP. Every response may be read by
//! any web page (`Access-Control-Allow-Origin: *`), as a public media origin allows; a player page
//! can so be pointed at the origin and at the shield in turn. GET and HEAD are answered, another
//! method is a 405, and axum writes Content-Length.
//!
//! Deliberately absent: a listener, a clock and logging; they are the caller's.

use axum::Router;
use axum::http::header::{ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::origin::resource;
use super::timeline::UnixMillis;

/// The sample origin as a router of two trees, `/demo/…` (live) and `/vod/…`; other paths are free.
///
/// `now_ms` is asked once per request for the wall clock in milliseconds since the Unix epoch. The
/// live stream follows it: the newest segment is number `now_ms / 2000 - 1`.
pub fn router(now_ms: impl Fn() -> u64 + Clone + Send + Sync + 'static) -> Router {
    let serve = move |uri: Uri| {
        let now = UnixMillis(now_ms());
        async move { respond(uri.path(), now) }
    };
    Router::new().route("/demo/{*path}", get(serve.clone())).route("/vod/{*path}", get(serve))
}

fn respond(path: &str, now: UnixMillis) -> Response {
    let allow_any_page = (ACCESS_CONTROL_ALLOW_ORIGIN, "*");
    match resource(path, now) {
        Some(found) => {
            let headers =
                [allow_any_page, (CONTENT_TYPE, found.content_type), (CACHE_CONTROL, found.cache_control)];
            (headers, found.body).into_response()
        }
        // Not to be stored: a segment that is asked for too early exists a moment later.
        None => {
            let headers = [allow_any_page, (CACHE_CONTROL, "no-store")];
            (StatusCode::NOT_FOUND, headers, "not found\n").into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{Method, Request};
    use tower::ServiceExt;

    use super::*;

    async fn request(method: Method, uri: &str) -> Response {
        let request = Request::builder().method(method).uri(uri).body(Body::empty()).unwrap();
        router(|| 1_800_000_000_000).oneshot(request).await.unwrap()
    }

    #[tokio::test]
    async fn a_response_says_what_it_carries() {
        for (uri, content_type, cache_control) in [
            ("/demo/master.m3u8", "application/vnd.apple.mpegurl", "no-store"),
            ("/demo/360p/live.m3u8?_=1", "application/vnd.apple.mpegurl", "no-store"),
            ("/demo/360p/899999999.m4s", "video/mp4", "public, max-age=3600, immutable"),
            ("/vod/audio/init.mp4", "audio/mp4", "public, max-age=3600, immutable"),
        ] {
            let response = request(Method::GET, uri).await;
            assert_eq!(response.status(), StatusCode::OK, "{uri}");
            assert_eq!(response.headers()[CONTENT_TYPE], content_type);
            assert_eq!(response.headers()[CACHE_CONTROL], cache_control);
            assert_eq!(response.headers()[ACCESS_CONTROL_ALLOW_ORIGIN], "*");
            let length: usize = response.headers()["content-length"].to_str().unwrap().parse().unwrap();
            let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
            assert_eq!(body.len(), length);
        }
    }

    #[tokio::test]
    async fn what_is_not_served_is_refused() {
        for uri in ["/", "/demo/none", "/demo/360p/900000000.m4s", "/other/master.m3u8"] {
            assert_eq!(request(Method::GET, uri).await.status(), StatusCode::NOT_FOUND, "{uri}");
        }
        let early = request(Method::GET, "/demo/360p/900000000.m4s").await;
        assert_eq!(early.headers()[CACHE_CONTROL], "no-store");
        assert_eq!(request(Method::HEAD, "/demo/master.m3u8").await.status(), StatusCode::OK);
        let post = request(Method::POST, "/demo/master.m3u8").await;
        assert_eq!(post.status(), StatusCode::METHOD_NOT_ALLOWED);
    }
}
