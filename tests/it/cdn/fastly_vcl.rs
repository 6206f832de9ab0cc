//! The VCL of `edge/fastly`: judged by a linter of Fastly's dialect that others wrote, and run for what players ask.

use std::collections::HashMap;
use std::process::Command;

use keyshield::cdn::{Cdn, FastlyEdgeCode, KeySeen, Purge};
use keyshield::keys::{KeyId, KeyMethod, Timestamp, TokenScope, viewer_token};

use super::fastly::{KEY_PATH, code, content, deployed, edge, key_id, run, sealed, secret};
use super::fastly_edge::{NOW, Pop};
use super::fastly_stub::Stub;
use super::vcl::Program;
use crate::harness::repository;

/// An answer of the edge.
struct Answer {
    status: u16,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(String::as_str).unwrap_or_default()
    }

    fn problem(&self) -> serde_json::Value {
        assert_eq!(self.header("content-type"), "application/problem+json");
        serde_json::from_slice(&self.body).unwrap()
    }
}

fn ask_with(method: &str, pop: &Pop, path: &str, headers: &[(&str, &str)]) -> Answer {
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).allow_non_standard_methods(true).build();
    let mut request = http::Request::builder().method(method).uri(format!("{}{path}", pop.server.url));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut answer = ureq::Agent::new_with_config(config).run(request.body(()).unwrap()).unwrap();
    let text = |value: &http::HeaderValue| value.to_str().unwrap().to_owned();
    Answer {
        status: answer.status().as_u16(),
        headers: answer.headers().iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
        body: answer.body_mut().read_to_vec().unwrap(),
    }
}

fn get(pop: &Pop, path: &str) -> Answer {
    ask_with("GET", pop, path, &[])
}

fn uri(id: KeyId) -> String {
    format!("{KEY_PATH}{id}")
}

/// A shield that knows no key, and one that has revoked this one.
struct Origin;

impl super::served::Answers for &'static Origin {
    fn answer(&self, request: http::Request<axum::body::Bytes>) -> axum::response::Response {
        let path = request.uri().path();
        let status = if path.starts_with(KEY_PATH) { 410 } else { 200 };
        let kept = if path.contains("fresh") { "no-store" } else { "max-age=60" };
        let answer = axum::response::Response::builder()
            .status(status)
            .header("x-from", "shield")
            .header("cache-control", kept)
            .header("surrogate-key", format!("keyshield-stream-ch1 keyshield-key-{}", key_id(1)))
            .header("keyshield-key", key_id(1).to_string());
        answer.body("from the shield".into()).unwrap()
    }
}

fn origin() -> super::served::Served {
    super::served::Served::start(&Origin)
}

async fn with_keys(stub: &Stub, pop: &Pop, code: &FastlyEdgeCode) -> keyshield::cdn::Fastly {
    let fastly = deployed(stub, pop, code).await;
    let keys = [sealed(1, "ch1", KeyMethod::Aes128), sealed(2, "ch2", KeyMethod::Aes256)];
    fastly.put_keys(&keys).await.unwrap();
    fastly
}

/// All of a service's VCL in one file, with what Fastly itself puts around it.
fn whole(stub: &Stub) -> String {
    let version = stub.active();
    let mut text = String::from("backend shield { .host = \"127.0.0.1\"; .port = \"80\"; }\n");
    for dictionary in &version.dictionaries {
        text.push_str(&format!("table {} {{ }}\n", dictionary.name));
    }
    let mut snippets = version.snippets;
    snippets.sort_by_key(|snippet| snippet.priority.parse::<u32>().unwrap());
    let at = |place: &str| {
        let there = snippets.iter().filter(|it| it.place == place).map(|it| it.content.clone());
        there.collect::<Vec<_>>().join("\n")
    };
    format!(
        "{text}{}\nsub vcl_recv {{\n{}\n#FASTLY recv\nset req.backend = shield;\nreturn(lookup);\n}}\n\
         sub vcl_error {{\n{}\n#FASTLY error\nreturn(deliver);\n}}\n\
         sub vcl_fetch {{\n{}\n#FASTLY fetch\nreturn(deliver);\n}}\n",
        at("init"),
        at("recv"),
        at("error"),
        at("fetch")
    )
}

/// Errors and warnings.
fn lint(text: &str) -> (u64, u64, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("main.vcl");
    std::fs::write(&file, text).unwrap();
    let falco = repository("tests/edge/node_modules/falco-js/bin/falco-linux-amd64");
    let output = Command::new(falco).arg("-json").arg(&file).output().expect("falco is installed");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let judged: serde_json::Value =
        serde_json::from_str(&told).unwrap_or_else(|_| panic!("falco says {told}"));
    let parse_errors = judged["ParseErrors"].as_object().map_or(0, serde_json::Map::len) as u64;
    let said = format!("{} {}", judged["LintErrors"], judged["ParseErrors"]);
    (judged["Errors"].as_u64().unwrap() + parse_errors, judged["Warnings"].as_u64().unwrap(), said)
}

#[test]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn a_linter_of_fastlys_dialect_finds_nothing() {
    run(async {
        let stub = Stub::start();
        let pop = Pop::start(&stub, None);
        deployed(&stub, &pop, &code()).await;
        let text = whole(&stub);
        let (errors, warnings, said) = lint(&text);
        assert_eq!((errors, warnings), (0, 0), "{said}");
        // That it would find something.
        for (right, wrong) in [
            ("digest.secure_is_equal(", "digest.secure_is_same("),
            ("error 663 \"keyshield\";", "synthetic \"\";"),
            ("set var.is_check = true;", "set var.is_check = \"true\";"),
            ("obj.http.Keyshield-Key", "beresp.http.Keyshield-Key"),
            ("keyshield_origins, \"*\"", "keyshield_others, \"*\""),
        ] {
            assert!(text.contains(right), "{right}");
            assert!(lint(&text.replacen(right, wrong, 1)).0 > 0, "{wrong}");
        }
    });
}

#[test]
fn what_the_interpreter_does_not_know_it_refuses() {
    let program = |recv: &str| Program::new(&[], [recv, "", ""], &["known".into()]).map(|_| ());
    assert_eq!(program("if (table.contains(known, \"a\")) { log \"b\"; }"), Ok(()));
    for (bad, why) in [
        ("call nobody;", "no subroutine"),
        ("esi;", "unknown statement"),
        ("log randomstr(4);", "unknown function"),
        ("log std.strlen(\"a\", \"b\");", "does not take"),
        ("log table.lookup(other, \"a\");", "no table"),
        ("log \"100%\";", "in some strings"),
        ("log \"a\"", "is missing"),
        ("if (\"a\" ~ \"(\") { log \"b\"; }", "unclosed"),
    ] {
        assert!(program(bad).unwrap_err().contains(why), "{bad}: {:?}", program(bad));
    }
}

#[test]
fn a_key_is_given_out_with_the_headers_of_the_shield() {
    run(async {
        let stub = Stub::start();
        let pop = Pop::start(&stub, None);
        with_keys(&stub, &pop, &code()).await;
        for (n, stream, method) in [(1, "ch1", KeyMethod::Aes128), (2, "ch2", KeyMethod::Aes256)] {
            let id = key_id(n);
            let answer = get(&pop, &uri(id));
            assert_eq!((answer.status, &answer.body[..]), (200, content(method).expose()));
            for (name, value) in [
                ("content-type", "application/octet-stream"),
                ("cache-control", "private, max-age=300"),
                ("x-content-type-options", "nosniff"),
                ("surrogate-key", &format!("keyshield-stream-{stream} keyshield-key-{id}")),
                ("cache-tag", &format!("keyshield-stream-{stream},keyshield-key-{id}")),
                ("keyshield-key", &id.to_string()),
                ("keyshield-served-by", "edge"),
                ("access-control-allow-origin", "*"),
                ("access-control-expose-headers", "Accept-Ranges, Age, Content-Length, Content-Range, ETag"),
            ] {
                assert_eq!(answer.header(name), value, "{name}");
            }
            let head = ask_with("HEAD", &pop, &uri(id), &[]);
            assert_eq!((head.status, head.body.len()), (200, 0));
            assert_eq!(head.header("content-length"), content(method).expose().len().to_string());
            let check = get(&pop, &format!("{}/check", uri(id)));
            assert_eq!((check.status, check.header("content-type")), (200, "text/plain"));
            assert_eq!(
                (check.header("cache-control"), check.header("keyshield-served-by")),
                ("no-store", "edge")
            );
        }
        assert!(edge(&pop.server.url).gives_out(key_id(1)).await.unwrap());
        assert!(pop.log.lock().is_empty());
    });
}

#[test]
fn what_is_not_in_the_store_goes_on_to_the_shield() {
    run(async {
        let stub = Stub::start();
        let shield = origin();
        let pop = Pop::start(&stub, Some(&shield.url));
        let fastly = with_keys(&stub, &pop, &code()).await;
        for path in ["/live/ch1/720p.m3u8?r=1", "/", "/api/hls/key/", "/live/api/hls/keys/x"] {
            assert_eq!(get(&pop, path).header("x-from"), "shield", "{path}");
        }
        let odd = [
            uri(key_id(9)),
            format!("{KEY_PATH}ABCD"),
            uri(key_id(1)).to_uppercase(),
            format!("{}/x", uri(key_id(1))),
        ];
        for path in odd {
            assert_eq!(get(&pop, &path).header("x-from"), "shield", "{path}");
        }
        // A key that was taken back: the store has it no more, and the shield says why.
        fastly.delete_keys(&[key_id(1)]).await.unwrap();
        let gone = get(&pop, &uri(key_id(1)));
        assert_eq!((gone.status, gone.header("x-from")), (410, "shield"));
        assert!(!edge(&pop.server.url).gives_out(key_id(1)).await.unwrap());
        // Asked for its check value, the edge speaks for itself.
        assert_eq!(fastly.verify(key_id(1)).await, Ok(KeySeen::Missing));
        let missing = get(&pop, &format!("{}/check", uri(key_id(1))));
        assert_eq!((missing.status, missing.header("keyshield-served-by")), (404, "edge"));
        assert_eq!(
            (missing.header("cache-control"), missing.problem()["status"].as_u64()),
            ("no-store", Some(404))
        );
    });
}

#[test]
fn a_record_that_was_changed_or_moved_is_never_served() {
    run(async {
        let stub = Stub::start();
        let shield = origin();
        let pop = Pop::start(&stub, Some(&shield.url));
        with_keys(&stub, &pop, &code()).await;
        let (id, good) = (key_id(1), sealed(1, "ch1", KeyMethod::Aes128).text);
        let dictionary =
            stub.active().dictionaries.into_iter().find(|it| it.name == "keyshield_keys").unwrap().id;
        let put = |n: u8, text: &str| {
            let mut account = stub.account.lock();
            account.items.get_mut(&dictionary).unwrap().insert(key_id(n).to_string(), text.to_owned());
        };
        let mut bad: Vec<String> = Vec::new();
        for at in (0..good.len()).step_by(3) {
            let mut text = good.clone().into_bytes();
            text[at] = if text[at] == b'1' { b'2' } else { b'1' };
            bad.push(String::from_utf8(text).unwrap());
        }
        bad.extend([
            good[..good.len() - 1].to_owned(),
            format!("{good}0"),
            good.replace(":ctr:", ":hmac:"),
            String::new(),
        ]);
        for text in bad.iter().filter(|text| **text != good) {
            put(1, text);
            assert_eq!(get(&pop, &uri(id)).header("x-from"), "shield", "{text}");
            assert_eq!(get(&pop, &format!("{}/check", uri(id))).status, 404, "{text}");
        }
        put(1, &good);
        assert_eq!(get(&pop, &uri(id)).status, 200);
        pop.log.lock().clear();
        put(3, &good);
        assert_eq!(get(&pop, &uri(key_id(3))).header("x-from"), "shield", "moved to another ID");
        let log = pop.log.lock().join("\n");
        assert!(log.contains(&key_id(3).to_string()) && !log.contains(&good), "{log}");
    });
}

#[test]
fn a_key_that_needs_a_token_is_given_out_for_a_good_one_alone() {
    run(async {
        let stub = Stub::start();
        let shield = origin();
        let pop = Pop::start(&stub, Some(&shield.url));
        with_keys(&stub, &pop, &FastlyEdgeCode { needs_token: true, ..code() }).await;
        let of = |scope: &str, expires: i64| {
            let scope = match scope {
                "*" => TokenScope::AllStreams,
                stream => TokenScope::Stream(stream.parse().unwrap()),
            };
            viewer_token(&secret(), &scope, Timestamp::from_unix_millis(expires * 1_000))
        };
        let with = |token: &str| get(&pop, &format!("{}?token={token}", uri(key_id(1)))).status;
        let good = of("ch1", NOW + 60);
        for token in [&good, &of("ch1", NOW), &of("*", NOW + 60), &of("*", NOW + 60).replace('*', "%2A")] {
            assert_eq!(with(token), 200, "{token}");
        }
        assert_eq!(get(&pop, &format!("{}?a=b&token={good}&CMCD=x", uri(key_id(1)))).status, 200);
        assert_eq!(ask_with("HEAD", &pop, &format!("{}?token={good}", uri(key_id(1))), &[]).status, 200);
        let late = good.replacen(&(NOW + 60).to_string(), &(NOW + 61).to_string(), 1);
        let other = good.replacen("ch1", "*", 1);
        let cut = &good[..good.len() - 1];
        for token in
            ["", "x", &of("ch1", NOW - 1), &of("ch2", NOW + 60), &late, &other, cut, &format!("{good}0")]
        {
            assert_eq!(with(token), 403, "{token}");
        }
        let refused = get(&pop, &uri(key_id(1)));
        assert_eq!((refused.status, refused.problem()["status"].as_u64()), (403, Some(403)));
        assert_eq!(
            (refused.header("cache-control"), refused.header("access-control-allow-origin")),
            ("no-store", "*")
        );

        // Before going on, too; there, nothing says which stream the key is of.
        assert_eq!(get(&pop, &uri(key_id(9))).status, 403);
        assert_eq!(get(&pop, &format!("{}?token={}", uri(key_id(9)), of("ch1", NOW - 1))).status, 403);
        assert_eq!(get(&pop, &format!("{}?token={good}", uri(key_id(9)))).header("x-from"), "shield");
        // The check value is no key, and media has its own rules.
        assert_eq!(get(&pop, &format!("{}/check", uri(key_id(1)))).status, 200);
        assert_eq!(get(&pop, "/live/ch1/720p.m3u8").header("x-from"), "shield");

        let elsewhere = FastlyEdgeCode { key_path: "/k/".into(), needs_token: true, ..code() };
        with_keys(&stub, &pop, &elsewhere).await;
        for path in [KEY_PATH, "/k/"] {
            let at = |token: &str| get(&pop, &format!("{path}{}?token={token}", key_id(1))).status;
            assert_eq!(
                (at("x"), at(&good)),
                (403, 200),
                "the shield answers at both paths, so both need a token"
            );
        }

        let behind = Pop::behind(&stub, Some(&shield.url), 1);
        assert_eq!(get(&behind, &uri(key_id(1))).status, 200, "the POP next to the viewer has checked");

        // A key for tokens that was lost does not open the door.
        let secrets =
            stub.active().dictionaries.into_iter().find(|it| it.name == "keyshield_secrets").unwrap().id;
        stub.account.lock().items.get_mut(&secrets).unwrap().remove("token_key");
        assert_eq!(with(&good), 403);
        stub.account.lock().items.get_mut(&secrets).unwrap().clear();
        assert_eq!(
            get(&pop, &format!("{}/check", uri(key_id(1)))).status,
            404,
            "without secrets there are no keys"
        );
    });
}

#[test]
fn what_must_not_be_kept_is_not_and_what_is_kept_goes_by_a_purge() {
    run(async {
        let stub = Stub::start();
        let shield = origin();
        let pop = Pop::start(&stub, Some(&shield.url));
        let kept = || {
            let mut kept: Vec<_> = stub.account.lock().kept.keys().cloned().collect();
            kept.sort();
            kept
        };
        get(&pop, "/live/fresh.ts");
        assert_eq!(kept(), ["/live/fresh.ts"], "so it is without the code");
        stub.account.lock().kept.clear();
        let fastly = with_keys(&stub, &pop, &code()).await;
        for path in ["/live/fresh.ts", "/live/seg_1.ts", "/live/seg_1.ts?r=1"] {
            assert_eq!(get(&pop, path).status, 200);
        }
        assert_eq!(kept(), ["/live/seg_1.ts", "/live/seg_1.ts?r=1"]);
        assert!(fastly.has_cached("/live/seg_1.ts", key_id(1)).await.unwrap());
        let purge = |tag: String| Purge { tags: vec![tag], ..Purge::default() };
        fastly.purge(&purge(format!("keyshield-key-{}", key_id(2)))).await.unwrap();
        assert_eq!(kept().len(), 2);
        fastly.purge(&purge(format!("keyshield-key-{}", key_id(1)))).await.unwrap();
        assert!(kept().is_empty());
    });
}

#[test]
fn methods_and_origins_are_those_of_the_shield() {
    run(async {
        let stub = Stub::start();
        let pop = Pop::start(&stub, None);
        let listed = FastlyEdgeCode { cors_origins: vec!["https://a.example".into()], ..code() };
        with_keys(&stub, &pop, &listed).await;
        let id = key_id(1);
        let preflight = ask_with("OPTIONS", &pop, &uri(id), &[("origin", "https://a.example")]);
        assert_eq!((preflight.status, preflight.body.len()), (204, 0));
        assert_eq!(preflight.header("access-control-allow-methods"), "GET, HEAD, OPTIONS");
        assert_eq!(preflight.header("access-control-allow-headers"), "*, Authorization, Range");
        assert_eq!(preflight.header("access-control-max-age"), "86400");
        assert_eq!(preflight.header("access-control-allow-origin"), "https://a.example");
        assert_eq!(preflight.header("vary"), "Origin");
        for asked in ["https://b.example", "https://a.example.evil", "*"] {
            let answer = ask_with("GET", &pop, &uri(id), &[("origin", asked)]);
            assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, ""), "{asked}");
            assert_eq!(answer.header("vary"), "Origin");
        }
        let refused = ask_with("DELETE", &pop, &uri(id), &[]);
        assert_eq!((refused.status, refused.header("allow")), (405, "GET, HEAD, OPTIONS"));
        assert_eq!(refused.problem()["title"], "Method Not Allowed");
        // A purge by URL is a request too, and not for this code.
        assert_eq!(ask_with("PURGE", &pop, &uri(id), &[]).header("x-from"), "nobody");
    });
}
