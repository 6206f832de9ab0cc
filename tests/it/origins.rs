//! Origins that fail: the next address, stale playlists, dead connections, https.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::harness::{Running, fetch_segments, free_port, get, pause, wait_for};
use crate::origin::{Answer, Origin};

const PLAYLIST: &str = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:10\n#EXTINF:1,\nseg_10.ts\n";

fn config(urls: &[&str], more: &str) -> String {
    format!(
        "{more}[[origins]]\nname = \"main\"\nurls = {urls:?}\n\
         [[streams]]\nid = \"live\"\nplaylist_url = \"{}/live/index.m3u8\"\n",
        urls[0]
    )
}

#[test]
fn the_next_address_is_asked_when_one_is_down_or_fails() {
    let dead = format!("http://127.0.0.1:{}", free_port());
    let failing = Origin::start(|_| Answer::status(500));
    let well = Origin::start(|request| match request.target.as_str() {
        "/live/index.m3u8" => Answer::ok(PLAYLIST),
        _ => Answer::ok("media"),
    });
    let shield = Running::serve(&config(&[&dead, &failing.url(), &well.url()], ""));
    let segment = fetch_segments(&shield.at("/live/index.m3u8")).remove(0);
    assert_eq!(get(&segment.url).status, 200);
    assert_eq!(failing.count("/live/seg_10.ts"), 1);
    assert_eq!(well.count("/live/seg_10.ts"), 1);
}

#[test]
fn what_is_passed_through_goes_to_the_next_address_too() {
    let dead = format!("http://127.0.0.1:{}", free_port());
    let well = Origin::start(|_| Answer::ok("poster"));
    let config = config(&[&dead, &well.url()], "").replace("urls", "pass_through = true\nurls");
    let shield = Running::serve(&config);
    let got = shield.get("/poster.jpg");
    assert_eq!((got.status, got.text().as_str()), (200, "poster"));
}

#[test]
fn a_slow_origin_does_not_keep_those_waiting_who_could_have_a_stale_playlist() {
    let slow = Arc::new(AtomicBool::new(false));
    let gate = crate::origin::Gate::new();
    let (held, is_slow) = (gate.clone(), Arc::clone(&slow));
    let origin = Origin::start(move |_| {
        let gate = is_slow.load(Ordering::SeqCst).then(|| (10, held.clone()));
        Answer { gate, ..Answer::ok(PLAYLIST) }
    });
    let shield = Running::serve(&config(&[&origin.url()], "[playlists]\ntimeout_secs = 3\n"));
    let good = shield.get("/live/index.m3u8").body;
    slow.store(true, Ordering::SeqCst);
    wait_for("a stale playlist", || {
        assert_eq!(shield.get("/live/index.m3u8").body, good);
        (shield.metric("keyshield_stale_playlists_total") > 0.0).then_some(())
    });
    gate.open();
}

#[test]
fn a_playlist_that_is_just_being_written_is_not_taken_for_its_end() {
    let broken = Arc::new(AtomicBool::new(false));
    let now = Arc::clone(&broken);
    let origin = Origin::start(move |_| match now.load(Ordering::SeqCst) {
        false => Answer::ok(PLAYLIST),
        true => Answer::ok(""),
    });
    let shield = Running::serve(&config(&[&origin.url()], ""));
    let good = shield.get("/live/index.m3u8").body;
    broken.store(true, Ordering::SeqCst);
    wait_for("a stale playlist", || {
        let got = shield.get("/live/index.m3u8");
        assert_eq!((got.status, &got.body), (200, &good));
        (shield.metric("keyshield_stale_playlists_total") > 0.0).then_some(())
    });
}

#[test]
fn when_every_address_fails_the_answer_says_so() {
    let dead = format!("http://127.0.0.1:{}", free_port());
    let shield = Running::serve(&config(&[&dead], ""));
    let got = shield.get("/live/index.m3u8");
    assert_eq!(got.status, 502);
    assert!(got.problem().contains("origin main cannot be reached"), "{}", got.problem());
    // Where the origin is, is nobody's business: it stands in the log.
    assert!(!got.problem().contains("127.0.0.1") && shield.logged().contains(&dead), "{}", got.problem());
}

#[test]
fn an_origin_that_keeps_silent_is_a_504() {
    let gate = crate::origin::Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |_| {
        held.pass();
        Answer::ok(PLAYLIST)
    });
    let shield = Running::serve(&config(&[&origin.url()], "[upstream]\nread_timeout_secs = 1\n"));
    let got = shield.get("/live/index.m3u8");
    assert_eq!(got.status, 504);
    assert!(got.problem().contains("in time"), "{}", got.problem());
    gate.open();
}

#[test]
fn the_last_good_playlist_is_served_while_the_origin_fails_but_not_when_it_takes_it_away() {
    let status = Arc::new(AtomicUsize::new(200));
    let now = Arc::clone(&status);
    let origin = Origin::start(move |_| match now.load(Ordering::SeqCst) {
        200 => Answer::ok(PLAYLIST),
        status => Answer::status(u16::try_from(status).unwrap()),
    });
    let shield = Running::serve(&config(&[&origin.url()], ""));
    let good = shield.get("/live/index.m3u8");
    assert_eq!(good.status, 200);

    status.store(503, Ordering::SeqCst);
    let stale = || shield.metric("keyshield_stale_playlists_total");
    wait_for("a stale playlist", || {
        let got = shield.get("/live/index.m3u8");
        assert_eq!((got.status, got.body), (200, good.body.clone()));
        (stale() > 0.0).then_some(())
    });

    status.store(404, Ordering::SeqCst);
    wait_for("the end of a playlist that was taken away", || {
        (shield.get("/live/index.m3u8").status == 404).then_some(())
    });
}

#[test]
fn a_crowd_asking_for_a_missing_segment_is_one_request() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/live/index.m3u8" => Answer::ok(PLAYLIST),
        _ => Answer::status(404),
    });
    let shield = Running::serve(&config(&[&origin.url()], ""));
    let segment = fetch_segments(&shield.at("/live/index.m3u8")).remove(0);
    let crowd: Vec<_> = (0..10)
        .map(|_| {
            let url = segment.url.clone();
            std::thread::spawn(move || get(&url).status)
        })
        .collect();
    for one in crowd {
        assert_eq!(one.join().unwrap(), 404);
    }
    assert_eq!(origin.count("/live/seg_10.ts"), 1);
}

#[test]
fn a_connection_that_died_in_the_pool_costs_one_retry_and_no_error() {
    // Answers one request a connection, says it will answer more, and then resets when the next one comes.
    let served = Arc::new(AtomicBool::new(false));
    let origin = resetting_origin(Arc::clone(&served));
    let url = format!("http://127.0.0.1:{origin}");
    let shield = Running::serve(&config(&[&url], ""));
    for _ in 0..5 {
        let got = shield.get("/live/index.m3u8");
        assert_eq!(got.status, 200, "{}", String::from_utf8_lossy(&got.body));
        // Beyond the playlist's freshness, so that the next one is fetched.
        pause(Duration::from_millis(300));
    }
    assert!(served.load(Ordering::SeqCst));
    assert!(shield.metric("keyshield_origin_retries_total") >= 1.0, "no connection was reused and dead");
}

/// A raw listener: the second request on any connection is met with a closed socket.
fn resetting_origin(served: Arc<AtomicBool>) -> u16 {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().take(100) {
            let (Ok(mut stream), served) = (stream, Arc::clone(&served)) else { continue };
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                if stream.read(&mut buffer).unwrap_or(0) == 0 {
                    return;
                }
                let _ =
                    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{PLAYLIST}", PLAYLIST.len());
                served.store(true, Ordering::SeqCst);
                // Waits for the next request, and closes instead of answering.
                let _ = stream.read(&mut buffer);
            });
        }
    });
    port
}

/// `openssl s_server` with a certificate of its own authority.
struct HttpsOrigin {
    server: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl HttpsOrigin {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("live")).unwrap();
        std::fs::write(dir.path().join("live/index.m3u8"), PLAYLIST).unwrap();
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
            .args([
                "-keyout",
                "key.pem",
                "-out",
                "cert.pem",
                "-days",
                "2",
                "-subj",
                "/CN=keyshield test origin",
            ])
            .args(["-addext", "subjectAltName=IP:127.0.0.1"])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .current_dir(dir.path())
            .output()
            .expect("openssl is installed");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let port = free_port();
        let server = Command::new("openssl")
            .args(["s_server", "-quiet", "-HTTP", "-key", "key.pem", "-cert", "cert.pem"])
            .args(["-accept", &port.to_string()])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("openssl s_server", || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
        Self { server, port, dir }
    }
}

impl Drop for HttpsOrigin {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[test]
fn https_origins_are_verified_against_the_authorities() {
    let origin = HttpsOrigin::start();
    let url = format!("https://127.0.0.1:{}", origin.port);
    // `-HTTP` sends the file as it is: it has to hold the whole answer.
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{PLAYLIST}",
        PLAYLIST.len()
    );
    std::fs::write(origin.dir.path().join("live/index.m3u8"), answer).unwrap();
    let ca = origin.dir.path().join("cert.pem");
    let trusting = format!("[upstream]\nca_file = \"{}\"\n", ca.display());
    let shield = Running::serve(&config(&[&url], &trusting));
    assert_eq!(fetch_segments(&shield.at("/live/index.m3u8")).len(), 1);

    let doubting = Running::serve(&config(&[&url], ""));
    let got = doubting.get("/live/index.m3u8");
    assert_eq!(got.status, 502);
    assert!(got.problem().contains("cannot be reached"), "{}", got.problem());
}
