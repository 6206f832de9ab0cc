//! A load balancer that is not ours: Debian's nginx, one process, sharing requests out in turn.
//!
//! It keeps nobody with one node, caches nothing and tries nothing twice: what a node answers is what the player
//! gets, and the next request of that player goes to the next node.

use std::fmt::Write;
use std::net::TcpStream;
use std::path::Path;

use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::harness::free_port;

/// A running nginx.
pub struct Nginx {
    pub url: String,
    // Before the folder: fields are dropped in order.
    _server: Daemon,
    _dir: TempDir,
}

impl Nginx {
    /// One that stands before these URLs.
    pub fn before(nodes: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("nginx").tempdir().unwrap();
        let port = free_port();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let (settings, errors) = (at("nginx.conf"), at("error.log"));
        std::fs::write(&settings, configuration(dir.path(), port, nodes)).unwrap();
        let command = ["/usr/sbin/nginx", "-e", &errors, "-c", &settings];
        let server = Daemon::start(&command, "TERM", dir.path().join("server.log"));
        server.wait_until(|| TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { url: format!("http://127.0.0.1:{port}"), _server: server, _dir: dir }
    }

    pub fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }
}

fn configuration(dir: &Path, port: u16, nodes: &[&str]) -> String {
    let dir = dir.display();
    let mut text = format!(
        "daemon off;\nmaster_process off;\npid {dir}/pid;\nerror_log {dir}/error.log warn;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\naccess_log off;\n"
    );
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        writeln!(text, "{kind}_temp_path {dir}/{kind};").unwrap();
    }
    text.push_str("upstream nodes {\n");
    for node in nodes {
        let address = node.strip_prefix("http://").expect("a node's URL");
        // A node that fails once is asked again all the same.
        writeln!(text, "server {address} max_fails=0;").unwrap();
    }
    write!(
        text,
        "keepalive 64;\n}}\n\
         server {{\nlisten 127.0.0.1:{port};\n\
         location / {{\n\
         proxy_pass http://nodes;\nproxy_http_version 1.1;\nproxy_set_header Connection \"\";\n\
         proxy_set_header Host $http_host;\nproxy_next_upstream off;\n\
         }}\n}}\n}}\n"
    )
    .unwrap();
    text
}

#[test]
fn requests_go_to_the_nodes_in_turn_and_failures_are_not_hidden() {
    use crate::harness::get;
    use crate::origin::{Answer, Origin};

    let good = Origin::start(|_| Answer::ok("good"));
    let bad = Origin::start(|_| Answer::status(503));
    let nginx = Nginx::before(&[&good.url(), &bad.url()]);
    let answers: Vec<u16> = (0..10).map(|n| get(&nginx.at(&format!("/{n}?q=1"))).status).collect();
    assert_eq!(answers.iter().filter(|status| **status == 200).count(), 5, "{answers:?}");
    assert!(answers.windows(2).all(|pair| pair[0] != pair[1]), "{answers:?}");
    let mut targets = [good.targets(), bad.targets()].concat();
    targets.sort();
    assert_eq!(targets, (0..10).map(|n| format!("/{n}?q=1")).collect::<Vec<_>>());
}
