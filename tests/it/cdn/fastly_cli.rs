//! The stub of Fastly's API as an independent client sees it: the Fastly CLI reads what the connector wrote, and the
//! connector what the CLI wrote.

use std::process::Command;

use keyshield::cdn::{Cdn, DeliveryMode, Fastly};
use keyshield::keys::KeyMethod;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::fastly::{code, edge, key_id, run, sealed, settings};
use super::fastly_stub::{SERVICE, Stub, TOKEN};
use crate::harness::repository;

/// The CLI, at a home of its own.
struct Cli {
    api: String,
    home: TempDir,
}

impl Cli {
    fn new(stub: &Stub) -> Self {
        Self { api: stub.server.url.clone(), home: tempfile::tempdir().unwrap() }
    }

    /// What it prints; what it says is wrong.
    fn run(&self, arguments: &str, more: &[&str]) -> Result<String, String> {
        let output = Command::new(repository("tests/edge/node_modules/@fastly/cli-linux-x64/fastly"))
            .arg("service")
            .args(arguments.split(' '))
            .args(more)
            .args(["--service-id", SERVICE, "--non-interactive"])
            .env_clear()
            .env("HOME", self.home.path())
            .env("FASTLY_API_TOKEN", TOKEN)
            .env("FASTLY_API_ENDPOINT", &self.api)
            .env("FASTLY_ACCOUNT_ENDPOINT", &self.api)
            // Whatever else it would like to know: it asks nobody beyond this machine.
            .envs([("HTTPS_PROXY", "http://127.0.0.1:9"), ("HTTP_PROXY", "http://127.0.0.1:9")])
            .env("NO_PROXY", "127.0.0.1")
            .output()
            .expect("the Fastly CLI is installed");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stdout) + &text(&output.stderr)),
        }
    }

    fn json(&self, arguments: &str) -> Value {
        let printed = self.run(arguments, &["--json"]).unwrap();
        serde_json::from_str(&printed).unwrap_or_else(|_| panic!("{arguments}: {printed}"))
    }
}

fn names(list: &Value, name: &str) -> Vec<String> {
    list.as_array().unwrap().iter().map(|one| one[name].as_str().unwrap().to_owned()).collect()
}

#[test]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn the_fastly_cli_sees_what_the_connector_does_and_the_other_way_round() {
    run(async {
        let stub = Stub::start();
        let cli = Cli::new(&stub);
        let connector = |id: &str| {
            let edge = edge("https://cdn.example.com");
            Fastly::new(settings(&stub, id), DeliveryMode::Push, edge).unwrap()
        };
        let deployed = connector("").deploy(Some(&code())).await.unwrap().dictionary_id.unwrap();
        let (fastly, id) = (connector(&deployed), deployed.as_str());
        let keys = [sealed(1, "ch1", KeyMethod::Aes128), sealed(2, "ch1", KeyMethod::Aes256)];
        fastly.put_keys(&keys).await.unwrap();

        // Items.
        let listed = cli.json(&format!("dictionary-entry list --dictionary-id {id}"));
        assert_eq!(names(&listed, "ItemKey"), keys.each_ref().map(|key| key.key.to_string()));
        assert_eq!(names(&listed, "ItemValue"), keys.each_ref().map(|key| key.text.clone()));
        let (third, text) = (key_id(3).to_string(), sealed(3, "ch1", KeyMethod::Aes128).text);
        let at = format!("dictionary-entry create --dictionary-id {id} --key {third}");
        cli.run(&at, &["--value", &text]).unwrap();
        assert!(cli.run(&at, &["--value", &text]).unwrap_err().contains("Duplicate"));
        cli.run(&format!("dictionary-entry delete --dictionary-id {id} --key {}", key_id(2)), &[]).unwrap();
        assert_eq!(stub.items("keyshield_keys").len(), 2);
        fastly.delete_keys(&[key_id(2), key_id(3)]).await.unwrap();
        let listed = cli.json(&format!("dictionary-entry list --dictionary-id {id}"));
        assert_eq!(names(&listed, "ItemKey"), [key_id(1).to_string()]);

        // Batches and their limit.
        let file = cli.home.path().join("batch.json");
        let batch = |items: usize| {
            let item = |n| json!({"op": "upsert", "item_key": format!("k{n}"), "item_value": "v"});
            let items: Vec<_> = (0..items).map(item).collect();
            std::fs::write(&file, json!({"items": items}).to_string()).unwrap();
            let path = file.display().to_string();
            cli.run(&format!("dictionary-entry update --dictionary-id {id}"), &["--file", &path])
        };
        batch(2).unwrap();
        assert!(batch(1_001).is_err());
        assert_eq!(stub.items("keyshield_keys").len(), 3);

        // Versions, snippets, dictionaries.
        let snippets = cli.json("vcl snippet list --version active");
        let ours =
            ["keyshield_settings", "keyshield_code", "keyshield_recv", "keyshield_error", "keyshield_fetch"];
        assert_eq!(names(&snippets, "Name"), ours);
        assert!(names(&snippets, "Content")[1].contains("sub keyshield_recv"));
        let dictionaries = cli.json("dictionary list --version active");
        assert_eq!(names(&dictionaries, "Name"), ["keyshield_keys", "keyshield_secrets"]);
        let secrets = dictionaries[1]["DictionaryID"].as_str().unwrap();
        assert!(cli.run("dictionary-entry list --dictionary-id", &[secrets]).is_err(), "it is private");
        let snippet = ["--name", "x", "--type", "recv", "--content", "log \"x\";"];
        assert!(cli.run("vcl snippet create --version 2", &snippet).is_err(), "an active version is locked");
        cli.run("version clone --version active", &[]).unwrap();
        cli.run("vcl snippet create --version 3", &snippet).unwrap();
        cli.run("version validate --version 3", &[]).unwrap();
        cli.run("version activate --version 3", &[]).unwrap();
        assert_eq!((stub.active().number, stub.active().snippets.len()), (3, 6));
        assert!(
            !fastly.deploy(Some(&code())).await.unwrap().is_new,
            "somebody else's snippet is no change of ours"
        );

        // Purges.
        cli.run("purge --key keyshield-stream-ch1", &[]).unwrap();
        std::fs::write(&file, "keyshield-key-1\nkeyshield-key-2\n").unwrap();
        cli.run("purge --file", &[&file.display().to_string()]).unwrap();
        cli.run("purge --url", &["http://cdn.example.com/live/ch1/720p.m3u8"]).unwrap();
        let account = stub.account.lock();
        assert_eq!(account.purged_tags, ["keyshield-stream-ch1", "keyshield-key-1", "keyshield-key-2"]);
        assert!(
            account.purged_urls[0].ends_with("cdn.example.com/live/ch1/720p.m3u8"),
            "{:?}",
            account.purged_urls
        );
    });
}
