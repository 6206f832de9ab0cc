//! The example of docs/cdn-custom.md, run as it stands there: its VCL in varnish, its agent in Python.

use std::net::TcpStream;
use std::time::Duration;

use keyshield::cdn::{Cdn, CdnFault, CustomCdn, CustomSettings, DeliveryMode, Edge, EdgeSettings, Purge};
use keyshield::rest::{Credential, Secret};
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::harness::{free_port, get, repository, wait_for};
use crate::origin::{Answer, Origin};

const TOKEN: &str = "token-of-the-example";
const TIMEOUT: Duration = Duration::from_secs(10);

/// The block of code in that language.
fn example(language: &str) -> String {
    let page = std::fs::read_to_string(repository("docs/cdn-custom.md")).unwrap();
    let blocks: Vec<_> = page.split(&format!("```{language}\n")).collect();
    assert_eq!(blocks.len(), 2, "one block of {language}");
    blocks[1].split("\n```").next().unwrap().to_owned() + "\n"
}

struct Example {
    edge_url: String,
    agent_url: String,
    // Before the folder: fields are dropped in order.
    _agent: Daemon,
    _varnish: Daemon,
    _dir: TempDir,
}

impl Example {
    fn start(origin: &Origin) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (port, ban_port, agent_port) = (free_port(), free_port(), free_port());
        let at = |name: &str| dir.path().join(name).display().to_string();
        let (vcl, script, name) = (at("keyshield.vcl"), at("agent.py"), at("varnish"));
        let backend = |text: String| text.replace("\"8080\"", &format!("\"{}\"", origin.address.port()));
        std::fs::write(&vcl, backend(example("vcl"))).unwrap();
        std::fs::write(&script, example("python")).unwrap();
        let (players, bans) =
            (format!("players=127.0.0.1:{port},HTTP"), format!("agent=127.0.0.1:{ban_port},HTTP"));
        let varnish = ["/usr/sbin/varnishd", "-F", "-j", "none", "-T", "none", "-n", &name, "-f", &vcl];
        let listens = ["-a", &players, "-a", &bans, "-p", "default_ttl=0", "-s", "malloc,16m"];
        let varnish =
            Daemon::start(&[&varnish[..], &listens].concat(), "TERM", dir.path().join("varnish.log"));
        let environment = [
            ("AGENT_TOKEN", TOKEN.to_owned()),
            ("AGENT_PORT", agent_port.to_string()),
            ("VARNISH_PORT", ban_port.to_string()),
        ];
        let environment = environment.map(|(name, value)| format!("{name}={value}"));
        let python = repository("tests/tools/.venv/bin/python").display().to_string();
        let mut agent = vec!["env"];
        agent.extend(environment.iter().map(String::as_str));
        agent.extend([&python, &script].map(String::as_str));
        let agent = Daemon::start(&agent, "TERM", dir.path().join("agent.log"));
        let listens = |port: u16| TcpStream::connect(("127.0.0.1", port)).is_ok();
        varnish.wait_until(|| listens(port) && listens(ban_port));
        agent.wait_until(|| listens(agent_port));
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        Self { edge_url: url(port), agent_url: url(agent_port), _agent: agent, _varnish: varnish, _dir: dir }
    }

    fn cdn(&self, token: &str) -> CustomCdn {
        let (url, key_path) = (self.edge_url.parse().unwrap(), "/api/hls/keys/".to_owned());
        let edge = EdgeSettings { url, key_path, is_store: false, ca_file: None, timeout: TIMEOUT };
        let token = Some(Credential::Text(Secret::new(token.to_owned())));
        let settings =
            CustomSettings { api_url: self.agent_url.clone(), token, ca_file: None, timeout: TIMEOUT };
        CustomCdn::new(settings, DeliveryMode::Pull, Edge::new(edge).unwrap()).unwrap()
    }

    fn is_cached(&self, path: &str) -> bool {
        // Two numbers: of this request, and of the one that fetched it.
        let answer = get(&format!("{}{path}", self.edge_url));
        answer.header("x-varnish").is_some_and(|numbers| numbers.contains(' '))
    }
}

#[test]
fn the_example_of_the_documentation_purges_by_tag_and_by_path() {
    let origin = Origin::start(|request| {
        Answer::ok("bytes")
            .header("Cache-Control", "public, max-age=604800")
            .header("Surrogate-Key", format!("stream tag{}", request.target.replace('/', "-")))
    });
    let example = Example::start(&origin);
    let cdn = example.cdn(TOKEN);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let cached = || ["/a.ts", "/b.ts", "/c.ts"].map(|path| example.is_cached(path));
    wait_for("hits", || (cached() == [true; 3]).then_some(()));
    let purge = |purge: Purge| runtime.block_on(cdn.purge(&purge)).unwrap();

    runtime.block_on(cdn.health()).unwrap();
    purge(Purge { tags: vec!["tag-a.ts".into(), "other".into()], ..Purge::default() });
    assert_eq!(cached(), [false, true, true]);
    purge(Purge { paths: vec!["/b.ts".into()], ..Purge::default() });
    assert_eq!(cached(), [true, false, true]);

    let refused = runtime.block_on(example.cdn("another").health()).unwrap_err();
    assert_eq!(refused.fault, CdnFault::Refused, "{refused}");
}
