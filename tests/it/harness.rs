//! Starting the shield, asking it, and looking at what it published.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use url::Url;

pub use crate::machine::{SOON, free_port, pause};

/// The shield's binary, as cargo built it.
pub const KEYSHIELD: &str = env!("CARGO_BIN_EXE_keyshield");

/// An environment variable. What begins with KEYSHIELD_ is the product's: not one of those.
#[expect(clippy::disallowed_methods, reason = "it sets a test, not the product")]
pub fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// So many seconds as an environment variable says.
pub fn secs_from(name: &str, default: u64) -> Duration {
    Duration::from_secs(variable(name).map_or(default, |secs| secs.parse().expect("a number of seconds")))
}

/// Waits until `done` gives something, and says what did not happen otherwise.
pub fn wait_for<T>(what: &str, done: impl FnMut() -> Option<T>) -> T {
    wait_at_most(SOON, what, done)
}

/// As [`wait_for`], with a limit of one's own.
pub fn wait_at_most<T>(limit: Duration, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(started.elapsed() < limit, "{what} did not happen within {limit:?}");
        pause(Duration::from_millis(20));
    }
}

/// An answer, read to its end.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("text")
    }

    /// The reason in a problem+json body.
    pub fn problem(&self) -> String {
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{self:?}");
        let body: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        assert_eq!(body["status"], self.status);
        body["detail"].as_str().unwrap().to_owned()
    }
}

/// Asks, and keeps connections for what is asked next.
pub fn agent() -> ureq::Agent {
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(SOON)).max_redirects(0);
    config.build().into()
}

/// Asks with headers; an error when the answer breaks off.
pub fn try_ask(method: &str, url: &str, headers: &[(&str, &str)]) -> Result<Answer, ureq::Error> {
    try_ask_by(&agent(), method, url, headers)
}

/// As [`try_ask`], over the connections of an agent.
pub fn try_ask_by(
    agent: &ureq::Agent,
    method: &str,
    url: &str,
    headers: &[(&str, &str)],
) -> Result<Answer, ureq::Error> {
    let mut request = ureq::http::Request::builder().method(method).uri(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut response = agent.run(request.body(()).unwrap())?;
    let headers = response
        .headers()
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
        .collect();
    let mut body = Vec::new();
    response.body_mut().as_reader().read_to_end(&mut body).map_err(ureq::Error::Io)?;
    Ok(Answer { status: response.status().as_u16(), headers, body })
}

pub fn ask(method: &str, url: &str, headers: &[(&str, &str)]) -> Answer {
    try_ask(method, url, headers).unwrap_or_else(|error| panic!("{method} {url}: {error}"))
}

pub fn get(url: &str) -> Answer {
    ask("GET", url, &[])
}

/// A process that is killed, by its ID, when it goes out of scope.
pub struct Running {
    child: Child,
    dir: TempDir,
    pub url: String,
    pub control: String,
    pub origin: String,
}

impl Running {
    /// `keyshield serve` with a configuration to which listeners, database and master key are added.
    pub fn serve(config: &str) -> Self {
        Self::serve_in(tempfile::tempdir().unwrap(), config)
    }

    /// As [`Self::serve`], on the state of an earlier process.
    pub fn serve_in(dir: TempDir, config: &str) -> Self {
        let state = format!(
            "[store]\ndatabase = \"{0}/keyshield.db\"\n[kms]\nmaster_key_file = \"{0}/keyshield.master\"\n\
             [keys]\nsweep_interval_millis = 50\n",
            dir.path().display()
        );
        Self::serve_with(dir, &(state + config))
    }

    /// `keyshield serve` with a configuration to which only listeners are added.
    pub fn serve_with(dir: TempDir, config: &str) -> Self {
        Self::serve_under(dir, config, &[])
    }

    /// As [`Self::serve_with`], under environment variables.
    pub fn serve_under(dir: TempDir, config: &str, environment: &[(&str, &str)]) -> Self {
        let mut running = Self::launch(dir, config, environment);
        running.wait_until_ready();
        running
    }

    /// As [`Self::serve_under`], without waiting until it is ready: it may never be.
    pub fn launch(dir: TempDir, config: &str, environment: &[(&str, &str)]) -> Self {
        Self::launch_at(free_port(), dir, config, environment)
    }

    /// As [`Self::serve_with`], on a port that was known before, because something stands before it.
    pub fn serve_at(port: u16, dir: TempDir, config: &str) -> Self {
        let mut running = Self::launch_at(port, dir, config, &[]);
        running.wait_until_ready();
        running
    }

    fn launch_at(port: u16, dir: TempDir, config: &str, environment: &[(&str, &str)]) -> Self {
        let control_port = free_port();
        let listeners = format!(
            "[shield]\nlisten = \"127.0.0.1:{port}\"\nshutdown_grace_secs = 0\n\
             [control]\nlisten = \"127.0.0.1:{control_port}\"\n"
        );
        let file = dir.path().join("keyshield.toml");
        std::fs::write(&file, listeners + config).unwrap();
        let mut command = Command::new(KEYSHIELD);
        command.arg("serve").arg("--config").arg(file).envs(environment.iter().copied());
        Self::spawn(command, dir, port, control_port, 0)
    }

    /// `keyshield demo`, with everything logged that can be.
    pub fn demo() -> Self {
        Self::demo_in(tempfile::tempdir().unwrap(), free_port())
    }

    pub fn demo_in(dir: TempDir, origin_port: u16) -> Self {
        Self::demo_with(dir, origin_port, &[])
    }

    /// As [`Self::demo_in`], under environment variables.
    pub fn demo_with(dir: TempDir, origin_port: u16, environment: &[(&str, &str)]) -> Self {
        let (port, control_port) = (free_port(), free_port());
        let mut command = Command::new(KEYSHIELD);
        command.args(["demo", "--log", "trace"]);
        command.args(["--listen", &format!("127.0.0.1:{port}")]);
        command.args(["--control-listen", &format!("127.0.0.1:{control_port}")]);
        command.args(["--origin-listen", &format!("127.0.0.1:{origin_port}")]);
        command.arg("--data").arg(dir.path().join("data"));
        command.envs(environment.iter().copied());
        let mut running = Self::spawn(command, dir, port, control_port, origin_port);
        running.wait_until_ready();
        running
    }

    fn spawn(mut command: Command, dir: TempDir, port: u16, control_port: u16, origin_port: u16) -> Self {
        let log = |name: &str| File::options().create(true).append(true).open(dir.path().join(name)).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(log("stdout.log"))
            .stderr(log("stderr.log"))
            .spawn()
            .expect("keyshield starts");
        Self {
            child,
            dir,
            url: format!("http://127.0.0.1:{port}"),
            control: format!("http://127.0.0.1:{control_port}"),
            origin: format!("http://127.0.0.1:{origin_port}"),
        }
    }

    pub fn wait_until_ready(&mut self) {
        let started = Instant::now();
        loop {
            if self.is_ready() {
                return;
            }
            let ended = self.ended();
            assert!(
                ended.is_none() && started.elapsed() < SOON,
                "keyshield is not ready ({ended:?}): {}",
                self.logged()
            );
            pause(Duration::from_millis(20));
        }
    }

    pub fn is_ready(&self) -> bool {
        let health = format!("{}/api/hls/health", self.control);
        try_ask("GET", &health, &[]).is_ok_and(|answer| answer.status == 200)
    }

    /// The process's ID.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn at(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    pub fn get(&self, path: &str) -> Answer {
        get(&self.at(path))
    }

    /// Everything that it printed and logged so far.
    pub fn logged(&self) -> String {
        let read = |name: &str| {
            let bytes = std::fs::read(self.dir.path().join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        read("stdout.log") + &read("stderr.log")
    }

    /// A metric's value: the sum over its labels.
    pub fn metric(&self, name: &str) -> f64 {
        let text = get(&format!("{}/metrics", self.control)).text();
        let named = text
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])));
        named.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// Kills it with SIGKILL and gives back its folder.
    pub fn kill(mut self) -> TempDir {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let empty = tempfile::tempdir().unwrap();
        std::mem::replace(&mut self.dir, empty)
    }

    /// Sends a signal and waits for the end.
    pub fn stop(&mut self, signal: &str) -> Option<i32> {
        let id = self.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
        wait_for("the end of keyshield", || self.child.try_wait().unwrap()).code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One segment as a served playlist names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub msn: u64,
    /// Absolute.
    pub url: String,
    /// Absolute.
    pub key_url: String,
    /// 32 hex digits.
    pub iv: String,
    /// The URI's last component, as the origin named it.
    pub name: String,
}

/// The segments of a served Media Playlist. Each must have its key before it.
pub fn segments(playlist_url: &str, text: &str) -> Vec<Segment> {
    let base = Url::parse(playlist_url).unwrap();
    let attribute = |line: &str, name: &str| {
        let at = line.find(&format!("{name}=")).expect("the attribute") + name.len() + 1;
        line[at..].trim_start_matches('"').split(['"', ',']).next().unwrap().to_owned()
    };
    let mut msn = 0;
    let mut key = None;
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(first) = line.strip_prefix("#EXT-X-MEDIA-SEQUENCE:") {
            msn = first.parse().unwrap();
        } else if line.starts_with("#EXT-X-KEY:METHOD=NONE") {
            key = None;
        } else if line.starts_with("#EXT-X-KEY:") {
            let iv = attribute(line, "IV").strip_prefix("0x").expect("hex").to_owned();
            assert_eq!(iv.len(), 32, "{line}");
            key = Some((base.join(&attribute(line, "URI")).unwrap().to_string(), iv));
        } else if !line.is_empty() && !line.starts_with('#') {
            let (key_url, iv) = key.clone().unwrap_or_else(|| panic!("no KEY before {line}"));
            let url = base.join(line).unwrap();
            let name = url.path().rsplit('/').next().unwrap().to_owned();
            found.push(Segment { msn, url: url.to_string(), key_url, iv, name });
            msn += 1;
        }
    }
    found
}

/// Fetches a playlist and its segments.
pub fn fetch_segments(playlist_url: &str) -> Vec<Segment> {
    let answer = get(playlist_url);
    assert_eq!(answer.status, 200, "{playlist_url}: {}", String::from_utf8_lossy(&answer.body));
    segments(playlist_url, &answer.text())
}

/// Keys by their URL, each fetched once.
#[derive(Default)]
pub struct Keys(pub BTreeMap<String, Vec<u8>>);

impl Keys {
    pub fn get(&mut self, url: &str) -> Vec<u8> {
        let fetch = || {
            let answer = get(url);
            assert_eq!((answer.status, answer.body.len()), (200, 16), "{url}");
            assert_eq!(answer.header("content-type"), Some("application/octet-stream"));
            answer.body
        };
        self.0.entry(url.to_owned()).or_insert_with(fetch).clone()
    }
}

/// Decrypts with the `openssl` command line: none of our own code.
pub fn openssl_decrypt(ciphertext: &[u8], key: &[u8], iv: &str) -> Vec<u8> {
    let cipher = if key.len() == 16 { "-aes-128-cbc" } else { "-aes-256-cbc" };
    let mut child = Command::new("openssl")
        .args(["enc", "-d", cipher, "-K", &hex::encode(key), "-iv", iv])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl is installed");
    let mut stdin = child.stdin.take().unwrap();
    let input = ciphertext.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A file of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
