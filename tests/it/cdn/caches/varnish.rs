//! Debian's varnish before shields, with an agent that turns purges into bans.

use std::net::{SocketAddr, TcpStream};

use keyshield::keys::EdgeSecret;
use tempfile::TempDir;

use super::agent::{AgentHandle, Purge, TOKEN};
use crate::daemon::Daemon;
use crate::harness::{SOON, free_port, try_ask_by};

const VCL: &str = include_str!("varnish.vcl");

const PARAMETERS: &[&str] = &[
    // What does not say how long it may be kept is not kept.
    "default_ttl=0",
    "thread_pools=1",
    "thread_pool_min=20",
    // A ban is a header: of a hundred tags, or of the longest path.
    "http_req_hdr_len=64k",
    "http_req_size=128k",
    "workspace_client=512k",
];

/// A running varnish and its agent.
pub struct Varnish {
    pub agent: AgentHandle,
    port: u16,
    // Before the folder: fields are dropped in order.
    _server: Daemon,
    _dir: TempDir,
}

impl Varnish {
    /// Before these shields, in pull mode.
    pub fn start(backends: &[SocketAddr]) -> Self {
        Self::start_with(backends, None)
    }

    /// In push mode: key URIs are answered by the agent, from what it holds, and never by the shields.
    pub fn start_push(backends: &[SocketAddr], secret: EdgeSecret) -> Self {
        Self::start_with(backends, Some(secret))
    }

    fn start_with(backends: &[SocketAddr], secret: Option<EdgeSecret>) -> Self {
        let dir = tempfile::Builder::new().prefix("varnish").tempdir().unwrap();
        let (port, agent_port) = (free_port(), free_port());
        let is_push = secret.is_some();
        let agent = AgentHandle::start(secret, Box::new(move |purge| ban(agent_port, purge)));
        let vcl = dir.path().join("cache.vcl");
        std::fs::write(&vcl, filled_in(backends, is_push.then(|| agent.address()))).unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let (listen, bans) =
            (format!("players=127.0.0.1:{port},HTTP"), format!("agent=127.0.0.1:{agent_port},HTTP"));
        let (name, vcl) = (at("varnish"), at("cache.vcl"));
        let mut command = vec!["/usr/sbin/varnishd", "-F", "-j", "none", "-n", &name, "-f", &vcl];
        command.extend(["-a", &listen, "-a", &bans, "-T", "none", "-s", "malloc,128m"]);
        PARAMETERS.iter().for_each(|parameter| command.extend(["-p", parameter]));
        let server = Daemon::start(&command, "TERM", dir.path().join("server.log"));
        server.wait_until(|| {
            [port, agent_port].iter().all(|port| TcpStream::connect(("127.0.0.1", *port)).is_ok())
        });
        Self { agent, port, _server: server, _dir: dir }
    }

    /// As players have it.
    pub fn edge_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn agent_url(&self) -> String {
        self.agent.url()
    }

    /// What the agent's calls need.
    pub fn token(&self) -> &'static str {
        TOKEN
    }
}

fn filled_in(backends: &[SocketAddr], keys: Option<SocketAddr>) -> String {
    let backend = |name: &str, at: SocketAddr| {
        format!("backend {name} {{ .host = \"{}\"; .port = \"{}\"; }}\n", at.ip(), at.port())
    };
    let mut declared: String =
        backends.iter().enumerate().map(|(n, at)| backend(&format!("node{n}"), *at)).collect();
    let directed: String =
        (0..backends.len()).map(|n| format!("    nodes.add_backend(node{n});\n")).collect();
    let mut to_keys = "";
    if let Some(at) = keys {
        declared += &backend("keys", at);
        to_keys = "    if (req.url ~ \"^/api/hls/keys/\") {\n        set req.backend_hint = keys;\n        return (pass);\n    }\n";
    }
    // The words stand for themselves on lines of their own; the comment names them too.
    let fill = |vcl: String, word: &str, by: &str| vcl.replace(&format!("\n{word}\n"), &format!("\n{by}\n"));
    let vcl = fill(VCL.to_owned(), "BACKENDS", &declared);
    let vcl = fill(vcl, "DIRECTED", &directed);
    fill(vcl, "KEYS", to_keys)
}

fn ban(port: u16, purge: &Purge) -> Result<(), String> {
    let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(SOON));
    // BAN is varnish's own.
    let agent: ureq::Agent = config.allow_non_standard_methods(true).build().into();
    for expression in expressions(purge) {
        let banned = try_ask_by(&agent, "BAN", &format!("http://127.0.0.1:{port}/"), &[("ban", &expression)]);
        match banned {
            Ok(answer) if answer.status == 200 => {}
            Ok(answer) => return Err(format!("{expression}: {}", String::from_utf8_lossy(&answer.body))),
            Err(error) => return Err(format!("varnish: {error}")),
        }
    }
    Ok(())
}

/// Bans as varnish reads them. They look at objects alone, never at requests, so that varnish can carry them out by
/// itself and forget them.
fn expressions(purge: &Purge) -> Vec<String> {
    let mut expressions = Vec::new();
    if !purge.tags.is_empty() {
        let tags: Vec<_> = purge.tags.iter().map(|tag| escaped(tag)).collect();
        expressions.push(format!(r"obj.http.surrogate-key ~ (^|\s)({})(\s|$)", tags.join("|")));
    }
    for path in &purge.paths {
        // A path without a query takes it with every query.
        let end = if path.contains('?') { "$" } else { r"(\?|$)" };
        expressions.push(format!("obj.http.x-url ~ ^{}{end}", escaped(path)));
    }
    for prefix in &purge.prefixes {
        expressions.push(format!("obj.http.x-url ~ ^{}", escaped(prefix)));
    }
    expressions
}

/// A text as a regular expression that matches it alone.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if r".+*?()|[]{}^$\".contains(character) {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}
