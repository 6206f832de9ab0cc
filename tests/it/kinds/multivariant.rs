//! Multivariant Playlists: session data, the steering manifest, variables.

use serde_json::{Value, json};

use super::{config_of, media, served};
use crate::harness::{Answer as Got, Running, get};
use crate::ll_playlist::attribute;
use crate::origin::{Answer, Origin, Seen};

const MASTER: &str = "/live/index.m3u8";
const QUERY_PARAMS: &str = "query_params = [\"dir\", \"t\"]\n";

/// What an origin answers besides its playlists.
fn others(request: &Seen) -> Answer {
    let target = request.target.as_str();
    if target.starts_with("/steer") {
        let reload =
            if target.starts_with("/steer/next") { "again.json" } else { "/steer/next.json?session=9" };
        let manifest = json!({"VERSION": 1, "TTL": 10, "RELOAD-URI": reload, "PATHWAY-PRIORITY": ["b", "a"]});
        return Answer::ok(manifest.to_string()).header("Content-Type", "application/json");
    }
    match target {
        "/meta/titles.json?lang=en" => {
            Answer::ok("{\"title\":\"x\"}").header("Content-Type", "application/json")
        }
        _ => Answer::ok(media(target, 5_000)),
    }
}

fn start(
    settings: &str,
    playlist: impl Fn(&str) -> Option<String> + Send + Sync + 'static,
) -> (Origin, Running) {
    let origin = Origin::start(move |request| match playlist(&request.target) {
        Some(text) => Answer::ok(text),
        None => others(request),
    });
    let shield = Running::serve(&config_of(&origin, settings, ""));
    (origin, shield)
}

/// The absolute URL in an attribute of the only line of a playlist that begins with a tag.
fn url_in(shield: &Running, text: &str, tag: &str, name: &str) -> String {
    let line = text.lines().find(|line| line.starts_with(tag)).unwrap_or_else(|| panic!("{tag} in {text}"));
    let base = url::Url::parse(&shield.at(MASTER)).unwrap();
    base.join(&attribute(line, name).unwrap()).unwrap().to_string()
}

const BESIDES: &str = "#EXTM3U\n#EXT-X-VERSION:9\n\
    #EXT-X-SESSION-DATA:DATA-ID=\"titles\",URI=\"/meta/titles.json?lang=en\"\n\
    #EXT-X-SESSION-DATA:DATA-ID=\"who\",VALUE=\"somebody\"\n\
    #EXT-X-SESSION-DATA:DATA-ID=\"there\",URI=\"https://data.example/x.json\"\n\
    #EXT-X-CONTENT-STEERING:SERVER-URI=\"/steer/first.json?session=8\",PATHWAY-ID=\"a\"\n\
    #EXT-X-STREAM-INF:BANDWIDTH=1,PATHWAY-ID=\"a\"\n720p.m3u8\n";

fn besides(target: &str) -> Option<String> {
    (target == MASTER).then(|| BESIDES.to_owned())
}

#[test]
fn session_data_is_fetched_through_its_link_and_not_otherwise() {
    for settings in ["", "pass_through = true\n"] {
        let (_origin, shield) = start(settings, besides);
        let text = shield.get(MASTER).text();
        for line in BESIDES.lines().filter(|line| line.contains("who") || line.contains("there")) {
            assert!(text.contains(line), "{line} is not ours to change:\n{text}");
        }
        let data = get(&url_in(&shield, &text, "#EXT-X-SESSION-DATA:DATA-ID=\"titles\"", "URI"));
        assert_eq!((data.status, data.text().as_str()), (200, "{\"title\":\"x\"}"));
        assert_eq!(data.header("content-type"), Some("application/json"));
        assert_eq!(data.header("cache-control"), Some("public, max-age=10"), "it may change");
    }
}

fn manifest(got: &Got) -> Value {
    assert_eq!(got.status, 200, "{got:?}");
    assert_eq!(got.header("content-type"), Some("application/json"));
    assert_eq!(got.header("cache-control"), Some("no-store"));
    serde_json::from_slice(&got.body).unwrap()
}

#[test]
fn a_steering_server_is_told_what_players_say_and_is_asked_every_time() {
    for settings in ["", "pass_through = true\n"] {
        let (origin, shield) = start(settings, besides);
        let text = shield.get(MASTER).text();
        let url = url_in(&shield, &text, "#EXT-X-CONTENT-STEERING", "SERVER-URI");
        let told = "_HLS_pathway=\"a\"&_HLS_throughput=5140000".replace('"', "%22");
        let first = manifest(&get(&format!("{url}&{told}&token=viewer")));
        assert_eq!(first["PATHWAY-PRIORITY"], json!(["b", "a"]));
        let asked = format!("/steer/first.json?session=8&{told}");
        assert_eq!(origin.count(&asked), 1, "{:?}", origin.targets());
        manifest(&get(&format!("{url}&{told}")));
        assert_eq!(origin.count(&asked), 2);

        // As often as a player follows RELOAD-URI, it stays behind the shield.
        let follow = |at: &str, manifest: &Value| {
            let base = url::Url::parse(at).unwrap();
            base.join(manifest["RELOAD-URI"].as_str().unwrap()).unwrap().to_string()
        };
        let next = follow(&url, &first);
        let second = manifest(&get(&format!("{next}&_HLS_pathway=%22b%22")));
        assert_eq!(
            origin.count("/steer/next.json?session=9&_HLS_pathway=%22b%22"),
            1,
            "{:?}",
            origin.targets()
        );
        let again = follow(&next, &second);
        manifest(&get(&again));
        assert_eq!(origin.count("/steer/again.json"), 1, "{:?}", origin.targets());
    }
}

#[test]
fn links_of_what_is_no_media_lead_nowhere_else() {
    let (_origin, shield) = start("", besides);
    let text = shield.get(MASTER).text();
    let steering = url_in(&shield, &text, "#EXT-X-CONTENT-STEERING", "SERVER-URI");
    let data = url_in(&shield, &text, "#EXT-X-SESSION-DATA:DATA-ID=\"titles\"", "URI");
    for changed in [
        steering.replace("/steer/", "/live/"),
        steering.replace("first.json", "720p.m3u8"),
        steering.replace(".steering.", ".clear."),
        data.replace(".data.", ".clear."),
        data.replace("titles.json", "seg.ts"),
        data.replace("_oq=", "_oq=A"),
    ] {
        assert_eq!(get(&changed).status, 403, "{changed}");
    }
}

#[test]
fn a_steering_server_that_fails_or_talks_nonsense_is_an_error() {
    let origin = Origin::start(|request| match request.target.as_str() {
        MASTER => Answer::ok(BESIDES.replace("first.json?session=8", "gone.json")),
        "/steer/gone.json" => Answer::status(410),
        target if target.ends_with("v=1") => Answer::ok("<html>"),
        _ => Answer::status(404),
    });
    let shield = Running::serve(&config_of(&origin, "", ""));
    let url = url_in(&shield, &shield.get(MASTER).text(), "#EXT-X-CONTENT-STEERING", "SERVER-URI");
    // D22 §7.2: 410 tells players to stop asking.
    assert_eq!(get(&url).status, 410);
    let got = get(&format!("{url}?_HLS_v=1"));
    assert_eq!(got.status, 502);
    assert!(got.problem().contains("not a JSON object"), "{}", got.problem());
}

/// A Multivariant Playlist whose variables lead to `/live/{dir}/`, and a Media Playlist that uses them.
fn with_variables(target: &str) -> Option<String> {
    match target.split('?').next().unwrap() {
        MASTER => Some(
            "#EXTM3U\n#EXT-X-VERSION:11\n#EXT-X-DEFINE:NAME=\"where\",VALUE=\"media/7\"\n\
             #EXT-X-DEFINE:NAME=\"sig\",VALUE=\"t=1\"\n\
             #EXT-X-STREAM-INF:BANDWIDTH=1\n{$where}.m3u8?{$sig}\n"
                .to_owned(),
        ),
        "/live/media/7.m3u8" => Some(
            "#EXTM3U\n#EXT-X-VERSION:11\n#EXT-X-TARGETDURATION:4\n#EXT-X-DEFINE:IMPORT=\"where\"\n\
             #EXT-X-DEFINE:NAME=\"n\",VALUE=\"1\"\n#EXT-X-MAP:URI=\"/live/{$where}/init.mp4\"\n\
             #EXTINF:4,title {$n}\n/live/{$where}/{$n}.m4s\n"
                .to_owned(),
        ),
        "/live/undefined.m3u8" => Some(
            "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXT-X-DEFINE:IMPORT=\"other\"\n#EXTINF:4,\n{$other}.ts\n"
                .to_owned(),
        ),
        "/live/unknown.m3u8" => Some("#EXTM3U\n#EXTINF:4,\n{$nobody}.ts\n".to_owned()),
        _ => None,
    }
}

#[test]
fn a_media_playlist_imports_variables_whether_or_not_anybody_asked_for_the_multivariant_playlist() {
    let (origin, shield) = start(QUERY_PARAMS, with_variables);
    let check = |shield: &Running| {
        let got = served(shield, "/live/media/7.m3u8?t=1");
        assert!(got.text.contains("#EXTINF:4,title {$n}\n"), "no variables there (D22 §4.3):\n{}", got.text);
        assert!(got.init_sections[0].plain() == media("/live/media/7/init.mp4", 5_000));
        assert!(got.segments[0].plain() == media("/live/media/7/1.m4s", 5_000));
        got.text
    };
    let before = check(&shield);
    assert_eq!(origin.count(MASTER), 1, "by the shield, for its variables");
    let master = shield.get(MASTER).text();
    assert!(master.ends_with("\nmedia/7.m3u8?t=1\n"), "{master}");
    let again = Running::serve_in(shield.kill(), &config_of(&origin, QUERY_PARAMS, ""));
    assert_eq!(check(&again), before);
}

#[test]
fn a_variable_that_nobody_defines_is_a_502_with_its_line() {
    let (_origin, shield) = start(QUERY_PARAMS, with_variables);
    for (path, reason) in [
        (
            "/live/undefined.m3u8",
            "line 3: EXT-X-DEFINE: the Multivariant Playlist of the stream defines no \"other\"",
        ),
        ("/live/unknown.m3u8", "line 3: the variable \"nobody\" is not defined"),
    ] {
        let got = shield.get(path);
        assert_eq!(got.status, 502, "{path}");
        assert!(got.problem().contains(reason), "{}", got.problem());
    }
}

/// A Multivariant Playlist that takes a directory from its own query, and defines another variable.
fn with_query(target: &str) -> Option<String> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    match path {
        MASTER => Some(
            "#EXTM3U\n#EXT-X-VERSION:11\n#EXT-X-DEFINE:QUERYPARAM=\"dir\"\n\
             #EXT-X-DEFINE:NAME=\"name\",VALUE=\"v\"\n\
             #EXT-X-STREAM-INF:BANDWIDTH=1\n{$dir}/720p.m3u8\n"
                .to_owned(),
        ),
        "/live/own.m3u8" => Some(format!(
            "#EXTM3U\n#EXT-X-VERSION:11\n# asked with {query}\n#EXT-X-DEFINE:QUERYPARAM=\"dir\"\n\
             #EXTINF:4,\n{{$dir}}/1.ts\n"
        )),
        "/live/imports.m3u8" => {
            Some("#EXTM3U\n#EXT-X-DEFINE:IMPORT=\"name\"\n#EXTINF:4,\n{$name}/1.ts\n".to_owned())
        }
        "/live/imports-dir.m3u8" => {
            Some("#EXTM3U\n#EXT-X-DEFINE:IMPORT=\"dir\"\n#EXTINF:4,\n{$dir}/1.ts\n".to_owned())
        }
        _ => None,
    }
}

#[test]
fn a_query_parameter_becomes_a_variable_where_the_origin_gets_it() {
    let (origin, shield) = start(QUERY_PARAMS, with_query);
    let master = shield.get(&format!("{MASTER}?dir=east-1&token=viewer")).text();
    assert!(master.ends_with("\neast-1/720p.m3u8\n"), "{master}");
    assert_eq!(origin.count(&format!("{MASTER}?dir=east-1")), 1);
    let got = served(&shield, "/live/own.m3u8?dir=west_2");
    assert!(got.segments[0].plain() == media("/live/west_2/1.ts", 5_000), "{}", got.text);
}

#[test]
fn a_value_that_would_lead_elsewhere_is_refused() {
    let (origin, shield) = start(QUERY_PARAMS, with_query);
    let harmful =
        ["..", "%2e%2e", "a%2Fb", "a/b", "%2F%2Fevil.example", "http:", "a%0Ab", "{$x}", "%22", "%25"];
    for value in harmful {
        for path in [MASTER, "/live/own.m3u8"] {
            let got = shield.get(&format!("{path}?dir={}", value.replace('{', "%7B").replace('}', "%7D")));
            assert_eq!(got.status, 502, "{path} {value}");
            assert!(got.problem().contains("other characters than"), "{}", got.problem());
        }
    }
    let missing = shield.get("/live/own.m3u8?token=x");
    assert_eq!(missing.status, 502);
    assert!(missing.problem().contains("line 4: EXT-X-DEFINE") && missing.problem().contains("query_params"));
    // One that the origin does not get is none.
    let (_other, unlisted) = start("", with_query);
    assert_eq!(unlisted.get("/live/own.m3u8?dir=a").status, 502);
    assert!(origin.targets().iter().all(|target| !target.ends_with(".ts")));
}

#[test]
fn what_a_viewers_query_defines_keeps_nobody_from_importing_the_rest() {
    let (_origin, shield) = start(QUERY_PARAMS, with_query);
    assert!(served(&shield, "/live/imports.m3u8").segments[0].plain() == media("/live/v/1.ts", 5_000));
    // Which viewer's it would be, nobody can say.
    let got = shield.get("/live/imports-dir.m3u8");
    assert_eq!(got.status, 502);
    assert!(got.problem().contains("line 2: EXT-X-DEFINE"), "{}", got.problem());
}
