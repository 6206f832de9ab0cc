//! A POP of Fastly: runs over HTTP the VCL that is active in the stub, with the stub's dictionaries. What goes on is
//! fetched from an origin, where there is one, and kept unless `vcl_fetch` says otherwise, whatever its Cache-Control
//! says: that is how Fastly's caches do it, but for `max-age`, which is not kept to here.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::response::Response;
use http::Request;
use parking_lot::Mutex;

use super::fastly_stub::{Account, Kept, Stub};
use super::served::{Answers, Served};
use super::vcl::{self, Outcome};

/// The time at this POP, in seconds since 1970.
pub const NOW: i64 = 1_800_000_000;

/// The running POP.
pub struct Pop {
    pub server: Served,
    pub log: Arc<Mutex<Vec<String>>>,
}

#[derive(Clone)]
struct State {
    account: Arc<Mutex<Account>>,
    log: Arc<Mutex<Vec<String>>>,
    origin: Option<String>,
    visits: i64,
}

impl Pop {
    pub fn start(stub: &Stub, origin: Option<&str>) -> Self {
        Self::behind(stub, origin, 0)
    }

    /// Behind so many others of the same service: 1 is what a shield POP is.
    pub fn behind(stub: &Stub, origin: Option<&str>, visits: i64) -> Self {
        let log = Arc::<Mutex<Vec<String>>>::default();
        let state = State {
            account: stub.account.clone(),
            log: log.clone(),
            origin: origin.map(str::to_owned),
            visits,
        };
        Self { server: Served::start(state), log }
    }
}

impl Answers for State {
    fn answer(&self, request: Request<Bytes>) -> Response {
        let (program, dictionaries) = {
            let account = self.account.lock();
            let version = account.versions.iter().find(|version| version.is_active).unwrap();
            let items = |id: &str| account.items[id].clone().into_iter().collect::<HashMap<_, _>>();
            let named = version.dictionaries.iter().map(|it| (it.name.clone(), items(&it.id)));
            (version.program().unwrap(), named.collect::<HashMap<_, _>>())
        };
        let edge = vcl::Edge { program: &program, dictionaries: &dictionaries, now: NOW };
        let method = request.method().as_str();
        let seen = vcl::Request {
            method: if method == "PURGE" { "FASTLYPURGE" } else { method }.to_owned(),
            path: request.uri().path().to_owned(),
            query: request.uri().query().unwrap_or_default().to_owned(),
            headers: request
                .headers()
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().to_owned()))
                .collect(),
            visits: self.visits,
        };
        let (outcome, log) =
            edge.run(&seen).unwrap_or_else(|why| panic!("{} {}: {why}", seen.method, seen.path));
        self.log.lock().extend(log);
        match outcome {
            Outcome::Answered(synthetic) => {
                let mut answer = Response::builder().status(synthetic.status as u16);
                for (name, value) in synthetic.headers {
                    answer = answer.header(name, value);
                }
                // The server of this POP leaves the body out of an answer to HEAD.
                answer.body(Body::from(synthetic.body)).unwrap()
            }
            Outcome::GoesOn => self.goes_on(&edge, &seen, &request),
        }
    }
}

impl State {
    /// From the cache, or from the origin.
    fn goes_on(&self, edge: &vcl::Edge<'_>, seen: &vcl::Request, request: &Request<Bytes>) -> Response {
        let Some(origin) = &self.origin else {
            return Response::builder().status(404).header("x-from", "nobody").body(Body::empty()).unwrap();
        };
        let url = request.uri().path_and_query().unwrap().to_string();
        let kept = self.account.lock().kept.get(&url).cloned();
        let answer = kept.unwrap_or_else(|| {
            let fetched = fetch(&format!("{origin}{url}"));
            if edge.keeps(seen, &fetched.headers).unwrap() {
                self.account.lock().kept.insert(url, fetched.clone());
            }
            fetched
        });
        let mut response = Response::builder().status(answer.status);
        for (name, value) in &answer.headers {
            response = response.header(name, value);
        }
        response.body(Body::from(answer.body)).unwrap()
    }
}

fn fetch(url: &str) -> Kept {
    let agent =
        ureq::Agent::new_with_config(ureq::Agent::config_builder().http_status_as_error(false).build());
    let mut fetched = agent.get(url).call().unwrap();
    let of_the_connection = ["transfer-encoding", "connection", "content-length"];
    let text = |value: &http::HeaderValue| value.to_str().unwrap().to_owned();
    let headers = fetched.headers().iter().map(|(name, value)| (name.to_string(), text(value)));
    Kept {
        status: fetched.status().as_u16(),
        headers: headers.filter(|(name, _)| !of_the_connection.contains(&name.as_str())).collect(),
        body: fetched.body_mut().read_to_vec().unwrap(),
    }
}
