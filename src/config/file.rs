//! The configuration file: its values, and the line of each.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use toml::de::{DeTable, DeValue, Error};
use toml::{Spanned, Table};

use super::ConfigError;
use super::schema::{self, Fault, Misfit, join};

/// A file that has known keys and values of their kinds.
pub(super) struct ConfigFile {
    pub(super) values: Table,
    lines: BTreeMap<String, usize>,
}

impl ConfigFile {
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(path, &text)
    }

    /// # Errors
    /// What is wrong and stands first.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let syntax = |error: Error| ConfigError::Syntax {
            path: path.to_owned(),
            line: line(text, error.span().unwrap_or_default()),
            // Some have a second line.
            why: error.message().replace('\n', ", "),
        };
        let document = DeTable::parse(text).map_err(syntax)?;
        let mut lines = BTreeMap::new();
        lines_of_table(document.get_ref(), "", text, &mut lines);
        let file = Self { values: text.parse().map_err(syntax)?, lines };
        let misfits = schema::get().misfits(&file.values);
        match misfits.into_iter().min_by_key(|misfit| file.line(&misfit.key)) {
            None => Ok(file),
            Some(Misfit { key, fault }) => {
                let (path, line) = (path.to_owned(), file.line(&key));
                Err(match fault {
                    Fault::Unknown { hint } => ConfigError::UnknownInFile { path, key, line, hint },
                    Fault::Kind { why } => ConfigError::Syntax { path, line, why: format!("{key} {why}") },
                })
            }
        }
    }

    /// The line at which a key stands.
    pub(super) fn line(&self, key: &str) -> usize {
        self.lines.get(key).copied().unwrap_or(1)
    }
}

fn line(text: &str, span: Range<usize>) -> usize {
    let before = text.as_bytes().get(..span.start).unwrap_or_default();
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

fn lines_of_table(table: &DeTable<'_>, path: &str, text: &str, lines: &mut BTreeMap<String, usize>) {
    for (key, value) in table {
        let name = join(path, key.get_ref());
        lines.insert(name.clone(), line(text, key.span()));
        lines_of_value(value, &name, text, lines);
    }
}

fn lines_of_value(value: &Spanned<DeValue<'_>>, path: &str, text: &str, lines: &mut BTreeMap<String, usize>) {
    match value.get_ref() {
        DeValue::Table(table) => lines_of_table(table, path, text, lines),
        DeValue::Array(elements) => {
            for (at, element) in elements.iter().enumerate() {
                let name = format!("{path}[{at}]");
                lines.insert(name.clone(), line(text, element.span()));
                lines_of_value(element, &name, text, lines);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ConfigFile, String> {
        ConfigFile::parse(Path::new("k.toml"), text).map_err(|error| error.to_string())
    }

    fn check(text: &str, expected: &str) {
        assert_eq!(parse(text).err().as_deref(), Some(expected), "{text}");
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line_and_the_one_that_was_meant() {
        check(
            "[shield]\nlisten = \"127.0.0.1:1\"\nlisen = 1\n",
            "k.toml: unknown key shield.lisen, line 3; did you mean shield.listen?",
        );
        check("\n[sheild]\nthreads = 1\n", "k.toml: unknown key sheild, line 2; did you mean shield?");
        check(
            "shield.theads = 1\n",
            "k.toml: unknown key shield.theads, line 1; did you mean shield.threads?",
        );
    }

    #[test]
    fn keys_inside_lists_and_nested_tables_are_known_too() {
        check(
            "[[origins]]\nname = \"a\"\n[[origins]]\n\nurl = []\n",
            "k.toml: unknown key origins[1].url, line 5; did you mean origins[1].urls?",
        );
        check(
            "[[streams]]\nsource = \"a\"\n",
            "k.toml: unknown key streams[0].source, line 2; known here: id, playlist_url, path_prefix, policy",
        );
        check(
            "[[streams]]\n[streams.policy]\nsegment_per_key = 1\n",
            "k.toml: unknown key streams[0].policy.segment_per_key, line 3; \
             did you mean streams[0].policy.segments_per_key?",
        );
        check(
            "[[control.tokens]]\nrole = \"admin\"\nsha265 = \"\"\n",
            "k.toml: unknown key control.tokens[0].sha265, line 3; did you mean control.tokens[0].sha256?",
        );
        check(
            "[control.jwt]\nisuer = \"\"\n",
            "k.toml: unknown key control.jwt.isuer, line 2; did you mean control.jwt.issuer?",
        );
    }

    #[test]
    fn a_key_in_the_wrong_section_is_found_in_the_right_one() {
        check(
            "[shield]\nmax_connections = 3\n",
            "k.toml: unknown key shield.max_connections, line 2; did you mean store.max_connections?",
        );
    }

    #[test]
    fn what_is_like_no_key_is_told_the_keys_that_there_are() {
        check("[log]\nx = 1\n", "k.toml: unknown key log.x, line 2; known here: format, filter");
    }

    #[test]
    fn of_several_faults_the_first_is_named() {
        let error =
            parse("[upstream]\npol_size = 1\n[control]\nlistn = 1\n[log]\nformat = 1\n").err().unwrap();
        assert!(error.contains("upstream.pol_size, line 2"), "{error}");
        let error = parse("[log]\nformat = 1\n[control]\nlistn = 1\n").err().unwrap();
        assert!(error.contains("line 2: log.format"), "{error}");
    }

    #[test]
    fn a_value_of_another_kind_is_named_with_its_line() {
        for (text, expected) in [
            ("[shield]\nthreads = \"x\"\n", "line 2: shield.threads must be a whole number, not a text"),
            ("[shield]\nthreads = -1\n", "line 2: shield.threads must not be negative"),
            ("\nshield = 1\n", "line 2: shield must be a table, not a whole number"),
            ("[log]\nformat = 1\n", "line 2: log.format must be a text, not a whole number"),
            ("[shield]\ncors_origins = [\n \"*\",\n 1]\n", "line 4: shield.cors_origins[1] must be a text"),
            ("[[origins]]\npass_through = 0\n", "line 2: origins[0].pass_through must be true or false"),
            (
                "[policy]\nrotation_interval_minutes = \"1\"\n",
                "line 2: policy.rotation_interval_minutes must be a number",
            ),
        ] {
            let error = parse(text).err().unwrap();
            assert!(error.starts_with(&format!("k.toml, {expected}")), "{error}");
        }
        assert!(parse("[policy]\nrotation_interval_minutes = 1\n").is_ok());
    }

    #[test]
    fn what_is_not_toml_is_one_line_with_its_place() {
        for text in [
            "[shield]\nlisten = \n",
            "[shield]\na = 1\na = 1\n",
            "[shield]\nthreads = 99999999999999999999\n",
        ] {
            let error = parse(text).err().unwrap();
            assert!(error.starts_with("k.toml, line "), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
