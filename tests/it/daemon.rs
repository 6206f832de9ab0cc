//! Servers that the tests need and did not write. Each ends with its owner, and with this process, however that
//! ends: a shell stands between that stops the server, by its process ID, when the pipe from here closes.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::machine::{SOON, pause};

/// Starts `"$@"` and waits for the end of its own standard input.
const WATCH: &str = r#"
signal=$1
shift
"$@" &
server=$!
read -r _
kill -s "$signal" "$server"
wait "$server"
"#;

/// A server, stopped when dropped.
pub struct Daemon {
    name: String,
    shell: Child,
    log: PathBuf,
}

impl Daemon {
    /// Runs a command line, whose end `signal` brings about, with its output in the file `log`.
    pub fn start(command: &[&str], signal: &str, log: PathBuf) -> Self {
        let output = File::create(&log).unwrap();
        let shell = Command::new("sh")
            .args(["-c", WATCH, "sh", signal])
            .args(command)
            .stdin(Stdio::piped())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .expect("there is a shell");
        Self { name: command[0].to_owned(), shell, log }
    }

    /// Waits until the server serves, and shows what it logged when it does not.
    pub fn wait_until(&self, mut serves: impl FnMut() -> bool) {
        let started = Instant::now();
        while !serves() {
            let logged = || std::fs::read_to_string(&self.log).unwrap_or_default();
            assert!(started.elapsed() < SOON, "{} does not serve: {}", self.name, logged());
            pause(std::time::Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Closes the pipe.
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

/// What to put before the command line of a program that refuses to be root: root lends it a folder, and runs it as
/// a user and group of Debian's.
pub fn as_user(folder: &Path, [user, group]: [&str; 2]) -> Vec<String> {
    if std::fs::metadata(folder).unwrap().uid() != 0 {
        return Vec::new();
    }
    let lent = Command::new("chown").arg(format!("{user}:{group}")).arg(folder).status();
    assert!(lent.is_ok_and(|status| status.success()), "{} is lent to {user}", folder.display());
    ["setpriv".to_owned(), format!("--reuid={user}"), format!("--regid={group}"), "--clear-groups".to_owned()]
        .into()
}
