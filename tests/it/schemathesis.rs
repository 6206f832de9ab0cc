//! The control API against its own description, by schemathesis: an independent judge of both.
//!
//! It makes requests that fit the description and requests that do not, chains them (initialize, rotate, delete
//! …), and compares every answer with the description. What schemas cannot say, namely which playlists there
//! are, is put into its copy of the description first; `tests/tools/schemathesis.toml` has its settings.

use std::process::Command;

use serde_json::{Value, json};

use crate::cdn::caches::{AgentHandle, TOKEN};
use crate::control_api::tokens;
use crate::harness::{Running, get, repository};
use crate::origin::{Answer, Origin};

/// Requests for each operation in a round; a chain counts as one.
const EXAMPLES: &str = "40";
/// Seconds, which it fills with rounds.
const MAX_TIME: &str = "60";
const PLAYLIST: &str = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\na.ts\n#EXTINF:4,\nb.ts\n";

#[test]
fn every_answer_is_as_the_description_says() {
    let origin = Origin::start(|_| Answer::ok(PLAYLIST));
    // So that there are CDNs and incidents to answer of.
    let agent = AgentHandle::start(None, Box::new(|_| Ok(())));
    let config = format!(
        "[[origins]]\nname = \"main\"\nurls = [\"{}\"]\n[cdn]\ncustom_token = \"{TOKEN}\"\n\
         [[cdns]]\nname = \"own\"\nkind = \"custom\"\nedge_url = \"{1}\"\n[cdns.custom]\napi_url = \"{1}\"\n{2}",
        origin.url(),
        agent.url(),
        tokens()
    );
    let shield = Running::serve(&config);
    let served = get(&format!("{}/api/hls/openapi.json", shield.control));
    assert_eq!((served.status, served.header("content-type")), (200, Some("application/json")));
    let description = shield.dir().join("openapi.json");
    let mut document: Value = serde_json::from_slice(&served.body).unwrap();
    name_what_is_there(&mut document, &origin.url());
    std::fs::write(&description, document.to_string()).unwrap();

    let ran = Command::new(repository("tests/tools/.venv/bin/schemathesis"))
        .arg("--config-file")
        .arg(repository("tests/tools/schemathesis.toml"))
        .arg("run")
        .arg(&description)
        .args(["--url", &shield.control, "--header", "Authorization: Bearer ks_admin"])
        .args(["--max-examples", EXAMPLES, "--max-time", MAX_TIME, "--continue-on-failure", "--no-color"])
        .current_dir(shield.dir())
        .output()
        .expect("scripts/bootstrap.sh test installs schemathesis");
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{said}{}\n{}", String::from_utf8_lossy(&ran.stderr), shield.logged());
    println!("{said}");
}

/// A few playlists and prefixes, so that streams do begin, meet again and get in one another's way; and the KMS that is
/// held.
fn name_what_is_there(document: &mut Value, origin: &str) {
    let schemas = &mut document["components"]["schemas"];
    let playlists: Vec<_> =
        ["/a/main.m3u8", "/a/b/main.m3u8", "/c/main.m3u8"].map(|p| format!("{origin}{p}")).into();
    for request in ["InitializeRequest", "UpdateRequest"] {
        schemas[request]["properties"]["playlistUrl"] = json!({"type": "string", "enum": playlists});
    }
    schemas["RewrapRequest"]["properties"]["to"] = json!({"type": "string", "enum": ["local"]});
    schemas["RewrapRequest"]["examples"][0]["to"] = json!("local");
    schemas["InitializeRequest"]["examples"][0]["playlistUrl"] = json!(playlists[0]);
    schemas["InitializeRequest"]["properties"]["pathPrefix"] = json!({"type": "string", "enum": ["/"]});
    schemas["CdnEndpoint"] =
        json!({"type": "string", "enum": ["https://cdn1.example.com", "http://[::1]:8080/x"]});
}
