//! `keyshield token`: a fresh token for the control API.

use std::fmt::Write;

use crate::control::{Role, hash_token, new_token};

/// The token, and the entry of the configuration that lets it in. Nothing keeps the token itself. `name` has no
/// character that TOML would have escaped.
pub fn token(name: &str, role: Role) -> String {
    let token = new_token();
    let mut out = String::new();
    // Writing to memory does not fail.
    let _ = writeln!(out, "# For its holder, shown once: send it as Authorization: Bearer <token>");
    let _ = writeln!(out, "{}\n", *token);
    let _ = writeln!(out, "# For keyshield.toml");
    let _ = writeln!(out, "[[control.tokens]]");
    let _ = writeln!(out, "name = \"{name}\"");
    let _ = writeln!(out, "role = \"{role}\"");
    let _ = writeln!(out, "sha256 = \"{}\"", hex::encode(hash_token(&token)));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_lets_in_the_token_and_does_not_hold_it() {
        let text = token("ci", Role::Operator);
        let (head, entry) = text.split_once("[[control.tokens]]").unwrap();
        let secret = head.lines().find(|line| line.starts_with("ks_")).unwrap();
        assert!(entry.contains("name = \"ci\"\nrole = \"operator\"\n"), "{entry}");
        assert!(entry.contains(&hex::encode(hash_token(secret))) && !entry.contains(secret));
    }
}
