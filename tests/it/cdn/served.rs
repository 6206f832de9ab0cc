//! An HTTP server in this process, in a thread of its own, that ends with its owner.

use std::net::TcpListener;
use std::thread::JoinHandle;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::response::Response;
use tokio::sync::oneshot;

/// A running server.
pub struct Served {
    pub url: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Answers a request that was read to its end.
pub trait Answers: Send + Sync + 'static {
    fn answer(&self, request: http::Request<Bytes>) -> Response;
}

const MAX_BODY_BYTES: usize = 4 << 20;

impl Served {
    /// Answers with `answers` at a free port.
    pub fn start<A: Answers + Clone>(answers: A) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let router = Router::new().fallback(handle::<A>).with_state(answers);
                tokio::select! {
                    served = axum::serve(listener, router) => served.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        Self { url, stop: Some(stop), thread: Some(thread) }
    }
}

async fn handle<A: Answers + Clone>(State(answers): State<A>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, MAX_BODY_BYTES).await.unwrap();
    // What is answered may wait for another server.
    tokio::task::spawn_blocking(move || answers.answer(http::Request::from_parts(parts, body))).await.unwrap()
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.stop.take().map(|stop| stop.send(()));
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
