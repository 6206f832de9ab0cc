//! A webhook that alerts are posted to, and that remembers them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use serde_json::Value;

/// Where alerts are posted to.
pub struct Receiver {
    pub url: String,
    notices: Arc<Mutex<Vec<Value>>>,
}

impl Receiver {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/hook/secret-of-the-webhook", listener.local_addr().unwrap());
        let notices = Arc::<Mutex<Vec<Value>>>::default();
        let received = Arc::clone(&notices);
        thread::spawn(move || {
            for stream in listener.incoming().filter_map(Result::ok) {
                let mut reader = BufReader::new(&stream);
                let mut length = 0;
                for line in reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty())
                {
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                received.lock().push(serde_json::from_slice(&body).unwrap());
                let answer = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n";
                (&stream).write_all(answer).unwrap();
            }
        });
        Self { url, notices }
    }

    /// The first notice that an alert was raised, or resolved.
    pub fn has(&self, alert: &str, status: &str) -> Option<Value> {
        let notices = self.notices.lock();
        notices.iter().find(|notice| notice["alert"] == alert && notice["status"] == status).cloned()
    }
}
