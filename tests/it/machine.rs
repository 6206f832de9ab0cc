//! What tests share of the machine: its ports, and its time. The benches share it too.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// How long anything that should happen at once may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

/// A port that is free, and that nobody gets by chance: each is given once, and they lie below those that the kernel
/// takes for outgoing connections.
pub fn free_port() -> u16 {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id() * 131;
    loop {
        let at = first.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(10_000 + at % 20_000).expect("below 30,000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Lets real time pass, where real time is what is tested or another process is waited for.
#[expect(clippy::disallowed_methods, reason = "the one place, see above")]
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}
