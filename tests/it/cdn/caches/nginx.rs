//! Debian's nginx as a cache before shields, with an agent that unlinks what it has cached.
//!
//! Its cache drops queries: `$scheme$host$uri` is the key. nginx has no purge of its own, but each cached object is a file
//! that begins with nginx's own header, the key and the header of the answer; where the file is gone, nginx fetches anew,
//! whatever it still knows of it in memory. What it was fetching meanwhile is found when the agent looks again.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};

use keyshield::keys::EdgeSecret;
use percent_encoding::percent_decode_str;
use tempfile::TempDir;

use super::agent::{AgentHandle, Purge, TOKEN};
use crate::daemon::Daemon;
use crate::harness::free_port;

const KEY: &[u8] = b"\nKEY: ";
const SCHEME: &str = "http";

/// A running nginx and its agent.
pub struct Nginx {
    pub agent: AgentHandle,
    port: u16,
    // Before the folder: fields are dropped in order.
    _server: Daemon,
    _dir: TempDir,
}

impl Nginx {
    /// Before these shields, in pull mode.
    pub fn start(backends: &[SocketAddr]) -> Self {
        Self::start_with(backends, None)
    }

    /// In push mode: key URIs are answered by the agent, from what it holds, and never by the shields.
    pub fn start_push(backends: &[SocketAddr], secret: EdgeSecret) -> Self {
        Self::start_with(backends, Some(secret))
    }

    fn start_with(backends: &[SocketAddr], secret: Option<EdgeSecret>) -> Self {
        // In memory where there is such a folder.
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let dir = tempfile::Builder::new().prefix("nginx-cache").tempdir_in(place).unwrap();
        let port = free_port();
        let cache = dir.path().join("cache");
        std::fs::create_dir(&cache).unwrap();
        let is_push = secret.is_some();
        let agent = AgentHandle::start(secret, Box::new(move |purge| unlink(&cache, purge)));
        let at = |name: &str| dir.path().join(name).display().to_string();
        let (settings, errors) = (at("nginx.conf"), at("error.log"));
        let keys = is_push.then(|| agent.address());
        std::fs::write(&settings, configuration(dir.path(), port, backends, keys)).unwrap();
        let command = ["/usr/sbin/nginx", "-e", &errors, "-c", &settings];
        let server = Daemon::start(&command, "TERM", dir.path().join("server.log"));
        server.wait_until(|| TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { agent, port, _server: server, _dir: dir }
    }

    /// As players have it.
    pub fn edge_url(&self) -> String {
        format!("{SCHEME}://127.0.0.1:{}", self.port)
    }

    pub fn agent_url(&self) -> String {
        self.agent.url()
    }

    /// What the agent's calls need.
    pub fn token(&self) -> &'static str {
        TOKEN
    }
}

fn configuration(dir: &Path, port: u16, backends: &[SocketAddr], keys: Option<SocketAddr>) -> String {
    let dir = dir.display();
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {dir}/{kind};\n"))
        .collect();
    let servers: String = backends.iter().map(|at| format!("server {at} max_fails=0;\n")).collect();
    let keys = keys.map_or(String::new(), |at| {
        format!("location /api/hls/keys/ {{ proxy_cache off; proxy_pass http://{at}; }}\n")
    });
    format!(
        "daemon off;\nmaster_process off;\npid {dir}/pid;\nerror_log {dir}/error.log warn;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\naccess_log off;\n{temporary}\
         proxy_cache_path {dir}/cache levels=1:2 keys_zone=objects:8m inactive=1h use_temp_path=off;\n\
         upstream nodes {{\n{servers}keepalive 32;\n}}\n\
         server {{\nlisten 127.0.0.1:{port};\n\
         proxy_http_version 1.1;\nproxy_set_header Connection \"\";\nproxy_set_header Host $http_host;\n\
         add_header X-Cache $upstream_cache_status always;\n\
         {keys}\
         location / {{\n\
         proxy_pass http://nodes;\n\
         proxy_cache objects;\nproxy_cache_key $scheme$host$uri;\n\
         proxy_cache_lock on;\nproxy_cache_lock_timeout 20s;\n\
         }}\n}}\n}}\n"
    )
}

/// Takes away the files of what is to go.
fn unlink(cache: &Path, purge: &Purge) -> Result<(), String> {
    for file in files(cache).map_err(|error| format!("{}: {error}", cache.display()))? {
        // One that has gone meanwhile was nginx's to take.
        let Ok(object) = std::fs::read(&file) else { continue };
        if Cached::read(&object).is_some_and(|cached| cached.is_meant_by(purge)) {
            match std::fs::remove_file(&file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(format!("{}: {error}", file.display()));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// What a cache file says of its object.
#[derive(Debug, PartialEq, Eq)]
struct Cached {
    /// As `$uri` has it: decoded, without a query.
    path: String,
    tags: Vec<String>,
}

impl Cached {
    fn read(object: &[u8]) -> Option<Self> {
        let find = |from: usize, what: &[u8]| {
            object[from..].windows(what.len()).position(|bytes| bytes == what).map(|at| from + at)
        };
        let key_at = find(0, KEY)? + KEY.len();
        let key_end = find(key_at, b"\n")?;
        let head_end = find(key_end, b"\r\n\r\n")?;
        let key = String::from_utf8_lossy(&object[key_at..key_end]);
        let host_and_path = key.strip_prefix(SCHEME)?;
        let path = host_and_path[host_and_path.find('/')?..].to_owned();
        let head = String::from_utf8_lossy(&object[key_end..head_end]);
        let headers = head.lines().filter_map(|line| line.split_once(':'));
        let tags = headers.filter(|(name, _)| name.eq_ignore_ascii_case("surrogate-key"));
        let tags = tags.flat_map(|(_, tags)| tags.split_whitespace().map(str::to_owned)).collect();
        Some(Self { path, tags })
    }

    fn is_meant_by(&self, purge: &Purge) -> bool {
        let decoded = |path: &str| percent_decode_str(path).decode_utf8_lossy().into_owned();
        // It knows no query, so whatever the query is, this is the object.
        let is_path = |path: &String| decoded(path.split('?').next().unwrap_or_default()) == self.path;
        purge.tags.iter().any(|tag| self.tags.contains(tag))
            || purge.paths.iter().any(is_path)
            || purge.prefixes.iter().any(|prefix| self.path.starts_with(&decoded(prefix)))
    }
}
