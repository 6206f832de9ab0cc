//! A scripted origin: answers by a closure, cuts off, waits at a gate, counts.
//!
//! Plain HTTP/1.1 over threads, written by hand because misbehaving is the point: no server library lets a
//! test send half a body and close.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;

use parking_lot::Mutex;

/// What an origin does with one request.
#[derive(Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    pub framing: Framing,
    /// Sends this much of the body, then waits for the gate.
    pub gate: Option<(usize, Gate)>,
    /// Closes the connection after this much of the body.
    pub cut_after: Option<usize>,
}

#[derive(Clone, Copy, Default, PartialEq)]
pub enum Framing {
    #[default]
    ContentLength,
    Chunked,
    /// Neither: the end of the connection is the end of the body.
    Close,
}

impl Answer {
    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self { status: 200, body: body.into(), ..Self::default() }
    }

    pub fn status(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// Holds answers back until it is opened; opening it twice is an error of the test.
#[derive(Clone)]
pub struct Gate {
    /// None where it opens by itself.
    open: Option<Sender<()>>,
    pass: Arc<dyn Fn() + Send + Sync>,
}

impl Gate {
    pub fn new() -> Self {
        let (open, opened) = channel::<()>();
        let opened = Mutex::new(opened);
        let pass = move || {
            // A test that failed drops its end: the thread goes on to its own end.
            let _ = opened.lock().recv();
        };
        Self { open: Some(open), pass: Arc::new(pass) }
    }

    /// One that is open when `wait` returns.
    pub fn after(wait: impl Fn() + Send + Sync + 'static) -> Self {
        Self { open: None, pass: Arc::new(wait) }
    }

    pub fn open(&self) {
        let open = self.open.as_ref().expect("it does not open by itself");
        open.send(()).expect("the gate is there");
    }

    /// Waits until it is open.
    pub fn pass(&self) {
        (self.pass)();
    }
}

/// One request as the origin saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub target: String,
    pub headers: HashMap<String, String>,
    #[cfg_attr(
        not(feature = "kms-aws"),
        allow(dead_code, reason = "some builds have no test that reads it")
    )]
    pub body: Vec<u8>,
}

/// A running origin. Stops when dropped.
pub struct Origin {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    stopped: Arc<AtomicBool>,
}

impl Origin {
    pub fn start(answer: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        Self::start_with(answer, true)
    }

    /// One that remembers no request, for many of them.
    pub fn forgetful(answer: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        Self::start_with(answer, false)
    }

    fn start_with(answer: impl Fn(&Seen) -> Answer + Send + Sync + 'static, remembers: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, stopped) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let origin = Self { address, seen: Arc::clone(&seen), stopped: Arc::clone(&stopped) };
        let answer = Arc::new(answer);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(stream), answer, seen) = (stream, Arc::clone(&answer), Arc::clone(&seen)) else {
                    continue;
                };
                thread::spawn(move || {
                    // A peer that goes away in the middle is one of the things that are tested.
                    let _ = converse(&stream, &*answer, remembers.then_some(&*seen));
                });
            }
        });
        origin
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Every request target so far.
    pub fn targets(&self) -> Vec<String> {
        self.seen.lock().iter().map(|seen| seen.target.clone()).collect()
    }

    pub fn count(&self, target: &str) -> usize {
        self.targets().iter().filter(|t| *t == target).count()
    }

    /// Every request for a target so far.
    pub fn asked(&self, target: &str) -> Vec<Seen> {
        self.seen.lock().iter().filter(|seen| seen.target == target).cloned().collect()
    }

    pub fn last(&self, target: &str) -> Seen {
        let seen = self.seen.lock();
        seen.iter().rev().find(|seen| seen.target == target).expect("it was asked for").clone()
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes the accept loop.
        let _ = TcpStream::connect(self.address);
    }
}

fn converse(
    stream: &TcpStream,
    answer: &(dyn Fn(&Seen) -> Answer + Send + Sync),
    seen: Option<&Mutex<Vec<Seen>>>,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut headers = HashMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let request = Seen { target, headers, body };
        if let Some(seen) = seen {
            seen.lock().push(request.clone());
        }
        let answer = answer(&request);
        respond(stream, &answer)?;
        if answer.framing == Framing::Close || answer.cut_after.is_some() {
            return Ok(());
        }
    }
}

fn respond(mut stream: &TcpStream, answer: &Answer) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} Scripted\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    match answer.framing {
        Framing::ContentLength => head.push_str(&format!("Content-Length: {}\r\n", answer.body.len())),
        Framing::Chunked => head.push_str("Transfer-Encoding: chunked\r\n"),
        Framing::Close => head.push_str("Connection: close\r\n"),
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    let mut send = |bytes: &[u8]| match answer.framing {
        Framing::Chunked if !bytes.is_empty() => {
            stream.write_all(format!("{:x}\r\n", bytes.len()).as_bytes())?;
            stream.write_all(bytes)?;
            stream.write_all(b"\r\n")
        }
        _ => stream.write_all(bytes),
    };
    let end = answer.cut_after.unwrap_or(answer.body.len());
    let first = answer.gate.as_ref().map_or(end, |(at, _)| *at).min(end);
    send(&answer.body[..first])?;
    if let Some((_, gate)) = &answer.gate {
        gate.pass();
    }
    send(&answer.body[first..end])?;
    if answer.framing == Framing::Chunked && answer.cut_after.is_none() {
        stream.write_all(b"0\r\n\r\n")?;
    }
    stream.flush()
}
