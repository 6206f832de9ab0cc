//! A network between two processes that a test can cut: a TCP proxy on loopback.
//!
//! Plain threads, two a connection. A cut wire closes what is open and refuses what is new; a silent one keeps
//! connections and takes new ones, but carries nothing: what was sent meanwhile arrives after the mending, as it
//! would over a network that lost packets for a while.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use parking_lot::{Condvar, Mutex};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Condition {
    Whole,
    Silent,
    Cut,
    /// The wire is dropped.
    Gone,
}

struct State {
    condition: Condition,
    /// Both ends of what is open, and of what has ended since the last cut.
    open: Vec<TcpStream>,
    carried: usize,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// A wire to an address.
pub struct Wire {
    /// Where its near end is.
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

impl Wire {
    pub fn to(far: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = State { condition: Condition::Whole, open: Vec::new(), carried: 0 };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let wire = Self { address, shared: Arc::clone(&shared) };
        thread::spawn(move || {
            for near in listener.incoming().filter_map(Result::ok) {
                match shared.state.lock().condition {
                    Condition::Gone => return,
                    Condition::Cut => drop(near),
                    Condition::Whole | Condition::Silent => {
                        let shared = Arc::clone(&shared);
                        thread::spawn(move || shared.carry(&near, far));
                    }
                }
            }
        });
        wire
    }

    /// Closes every connection, and every new one at once.
    pub fn cut(&self) {
        self.shared.set(Condition::Cut);
    }

    /// Carries nothing more, and closes nothing.
    pub fn silence(&self) {
        self.shared.set(Condition::Silent);
    }

    pub fn mend(&self) {
        self.shared.set(Condition::Whole);
    }

    /// How many connections it has carried, open ones among them.
    pub fn carried(&self) -> usize {
        self.shared.state.lock().carried
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.set(Condition::Gone);
        // Wakes the accept loop.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn set(&self, condition: Condition) {
        let mut state = self.state.lock();
        state.condition = condition;
        if matches!(condition, Condition::Cut | Condition::Gone) {
            for end in state.open.drain(..) {
                // It may have ended by itself.
                let _ = end.shutdown(Shutdown::Both);
            }
        }
        self.changed.notify_all();
    }

    /// Whether the wire is whole, once it is not silent any more.
    fn wait_while_silent(&self) -> bool {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |state| state.condition == Condition::Silent);
        state.condition == Condition::Whole
    }

    fn carry(&self, near: &TcpStream, far: SocketAddr) {
        if !self.wait_while_silent() {
            return;
        }
        let Ok(far) = TcpStream::connect(far) else { return };
        {
            let mut state = self.state.lock();
            if state.condition == Condition::Cut || state.condition == Condition::Gone {
                return;
            }
            state.carried += 1;
            state.open.extend([near, &far].map(|end| end.try_clone().unwrap()));
        }
        thread::scope(|scope| {
            scope.spawn(|| self.pump(near, &far));
            self.pump(&far, near);
        });
    }

    fn pump(&self, mut from: &TcpStream, mut to: &TcpStream) {
        let _ = to.set_nodelay(true);
        let mut buffer = [0; 16_384];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if !self.wait_while_silent() || to.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A server that sends back what it gets.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().map(Result::unwrap) {
                thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
            }
        });
        address
    }

    fn connect(wire: &Wire) -> TcpStream {
        let stream = TcpStream::connect(wire.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        stream
    }

    /// What comes back for one byte: `None` at the connection's end.
    fn echoed(mut stream: &TcpStream, byte: u8) -> std::io::Result<Option<u8>> {
        stream.write_all(&[byte])?;
        read(stream)
    }

    fn read(mut stream: &TcpStream) -> std::io::Result<Option<u8>> {
        let mut back = [0];
        Ok((stream.read(&mut back)? == 1).then_some(back[0]))
    }

    #[test]
    fn a_cut_ends_what_is_open_and_what_is_new_until_it_is_mended() {
        let wire = Wire::to(echo());
        let before = connect(&wire);
        assert_eq!(echoed(&before, 1).unwrap(), Some(1));
        wire.cut();
        assert!(!matches!(echoed(&before, 2), Ok(Some(_))));
        assert!(!matches!(echoed(&connect(&wire), 3), Ok(Some(_))));
        wire.mend();
        assert_eq!(echoed(&connect(&wire), 4).unwrap(), Some(4));
        assert_eq!(wire.carried(), 2);
    }

    #[test]
    fn a_silent_wire_delivers_when_it_is_mended() {
        let wire = Wire::to(echo());
        let before = connect(&wire);
        assert_eq!(echoed(&before, 1).unwrap(), Some(1));
        wire.silence();
        assert!(echoed(&before, 2).is_err(), "nothing comes in time");
        let during = connect(&wire);
        assert!(echoed(&during, 3).is_err(), "nothing comes in time");
        wire.mend();
        assert_eq!(read(&before).unwrap(), Some(2));
        assert_eq!(read(&during).unwrap(), Some(3));
    }
}
