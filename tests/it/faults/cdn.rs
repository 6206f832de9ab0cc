//! A CDN in push mode before a shield that is killed: what it holds must come to be what the shield wants it to hold.
//!
//! It is an agent alone, which outlives the shield and is its own edge: there is no cache behind it, so a purge is a call
//! that is counted. What caches make of purges is tested with real ones.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::session::{Died, Session};
use crate::cdn::caches::{AgentHandle, TOKEN};
use crate::harness::{get, pause, wait_at_most};

/// A purge is repeated seconds after the revocation, and then the edge is asked.
const SETTLED_WITHIN: Duration = Duration::from_secs(25);
const EDGE_SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// The CDN, and what the configuration says of it.
pub fn start() -> (AgentHandle, String) {
    let agent = AgentHandle::start(Some(EDGE_SECRET.parse().unwrap()), Box::new(|_| Ok(())));
    let url = agent.url();
    let config = format!(
        "[cdn]\nedge_secret = \"{EDGE_SECRET}\"\ncustom_token = \"{TOKEN}\"\n\
         [[cdns]]\nname = \"edge\"\nkind = \"custom\"\nmode = \"push\"\nedge_url = \"{url}\"\n\
         [cdns.custom]\napi_url = \"{url}\"\n"
    );
    (agent, config)
}

impl Session {
    fn agent_of_cdn(&self) -> &AgentHandle {
        self.cdn.as_ref().expect("its scenario has one")
    }

    /// Waits until the CDN has shown every key that it should have.
    pub fn wait_until_delivered(&mut self) -> Result<(), Died> {
        wait_at_most(SETTLED_WITHIN, "a CDN in step", || match self.cdn_status() {
            Ok(status) => (status["status"] == "in-sync" && status["keysVerified"] != 0).then_some(Ok(())),
            Err(Died) => Some(Err(Died)),
        })
    }

    /// Waits until the CDN has let go of all that was taken back, and gives the incidents.
    pub fn wait_until_let_go(&mut self) -> Result<Vec<Value>, Died> {
        wait_at_most(SETTLED_WITHIN, "the end of every incident", || match self.incidents() {
            Ok(all) => all.iter().all(|incident| incident["status"] == "complete").then_some(Ok(all)),
            Err(Died) => Some(Err(Died)),
        })
    }

    fn cdn_status(&mut self) -> Result<Value, Died> {
        let (status, mut body) = self.call("GET", "cdns", Value::Null)?;
        assert_eq!(status, 200, "{body}");
        Ok(body["cdns"][0].take())
    }

    fn incidents(&mut self) -> Result<Vec<Value>, Died> {
        let (status, body) = self.call("GET", "incidents?limit=1000", Value::Null)?;
        assert_eq!(status, 200, "{body}");
        Ok(body["incidents"].as_array().expect("incidents").clone())
    }

    /// The keys that the CDN should have.
    fn wanted_at_edge(&mut self) -> Result<BTreeSet<String>, Died> {
        let mut wanted = BTreeSet::new();
        for id in self.running() {
            let (status, body) = self.control("GET", &format!("{id}/keys?limit=1000"), Value::Null)?;
            assert_eq!(status, 200, "{id}: {body}");
            let is_wanted = |key: &&Value| {
                ["pre-active", "active", "deactivated"].contains(&key["state"].as_str().expect("a state"))
            };
            let keys = body["keys"].as_array().expect("keys").iter().filter(is_wanted);
            wanted.extend(keys.map(|key| key["keyId"].as_str().expect("an ID").to_owned()));
        }
        Ok(wanted)
    }

    /// The edge comes to have all keys that are in use or wait, and none else; revocations are worked off.
    pub fn check_cdn(&mut self) -> Result<(), Died> {
        if self.cdn.is_none() {
            return Ok(());
        }
        let incidents = self.wait_until_let_go()?;
        let streams = &self.memory.streams;
        let revoked: BTreeSet<_> = streams.values().flat_map(|stream| stream.revoked.clone()).collect();
        assert!(revoked.is_empty() || !incidents.is_empty(), "a revocation without an incident");
        for incident in &incidents {
            let at_edge = &incident["cdns"][0];
            assert!(at_edge["status"] == "complete" && at_edge["purges"] != 0, "{incident}");
            let purged = self.agent_of_cdn().purged();
            for key in incident["revokedKeyIds"].as_array().expect("keys") {
                let tag = format!("keyshield-key-{}", key.as_str().expect("an ID"));
                assert!(purged.iter().any(|purge| purge.tags.contains(&tag)), "{tag} was never purged");
            }
        }
        let wanted = self.wait_for_the_edge()?;
        self.check_edge(&wanted, &revoked);
        Ok(())
    }

    /// Waits until the edge has what it should, and nothing else, and gives that.
    fn wait_for_the_edge(&mut self) -> Result<BTreeSet<String>, Died> {
        let started = Instant::now();
        loop {
            let (wanted, status) = (self.wanted_at_edge()?, self.cdn_status()?);
            let held: BTreeSet<_> = self.agent_of_cdn().stored().into_iter().map(|(key, _)| key).collect();
            if held == wanted && status["status"] == "in-sync" {
                return Ok(wanted);
            }
            let log = || self.shield().logged();
            assert!(started.elapsed() < SETTLED_WITHIN, "{status}: {wanted:?}, has {held:?}\n{}", log());
            pause(Duration::from_millis(20));
        }
    }

    /// What players get of the edge.
    fn check_edge(&self, wanted: &BTreeSet<String>, revoked: &BTreeSet<String>) {
        let edge = self.agent_of_cdn().url();
        for (path, bytes) in &self.memory.keys {
            let answer = get(&format!("{edge}{path}"));
            let is_wanted = path.rsplit('/').next().is_some_and(|id| wanted.contains(id));
            match is_wanted {
                true => assert!(answer.status == 200 && answer.body == *bytes, "{path}: {}", answer.status),
                false => assert_eq!(answer.status, 404, "{path} should not be at the edge"),
            }
        }
        for path in revoked {
            assert_eq!(get(&format!("{edge}{path}")).status, 404, "{path} was taken back");
        }
    }
}
