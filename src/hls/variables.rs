//! EXT-X-DEFINE: variables, and what stands for them (D22 §4.3, §4.4.2.3).
//!
//! A URI that names a variable must be known to be linked, so it goes out with the value in its place; players that
//! know no variables profit. Everything else keeps its references, and its definitions. A reference to what is not
//! defined is refused wherever a player would refuse it.
//!
//! The value of QUERYPARAM comes from whoever asks. It may only have characters that cannot lead to another
//! directory or host.

use std::borrow::Cow;
use std::collections::BTreeMap;

use quick_m3u8::tag::UnknownTag;

use super::attributes::Attributes;
use super::error::{PlaylistError, Problem};
use super::playlist::{Content, Line, Playlist};

/// More variables than this in one playlist are refused.
const MAX_VARIABLES: usize = 1_000;
/// A line that grows beyond this when variables are put in is refused.
const MAX_SUBSTITUTED: usize = 16_384;

/// Variables with their values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Variables(BTreeMap<String, String>);

/// Where a playlist's variables come from besides itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct VariableSources<'a> {
    /// The playlist's own query, as far as the origin gets it.
    pub query: Option<&'a str>,
    /// Those of the Multivariant Playlist.
    pub imported: Option<&'a Variables>,
}

impl Variables {
    /// Those that Media Playlists can import from a Multivariant Playlist. One that is to come from a query is left
    /// out where the query lacks it: each viewer's has another value, and whose it should be, nobody can say.
    ///
    /// # Errors
    /// The first definition that is wrong.
    pub fn importable(playlist: &Playlist<'_>, sources: VariableSources<'_>) -> Result<Self, PlaylistError> {
        let is_missing = |tag: UnknownTag<'_>| {
            let name = Attributes::of(tag).ok().and_then(|attributes| attributes.quoted("QUERYPARAM"));
            name.is_some_and(|name| query_param(name, sources.query).is_err())
        };
        Self::of(playlist, sources, is_missing)
    }

    fn of(
        playlist: &Playlist<'_>,
        sources: VariableSources<'_>,
        is_left_out: impl Fn(UnknownTag<'_>) -> bool,
    ) -> Result<Self, PlaylistError> {
        let mut variables = Self::default();
        for (number, line) in (1..).zip(&playlist.lines) {
            if let Content::Tag(tag) = line.content
                && tag.name() == "-X-DEFINE"
                && !is_left_out(tag)
            {
                variables.define(tag, sources).map_err(|problem| problem.at(number))?;
            }
        }
        Ok(variables)
    }

    /// Takes in what an EXT-X-DEFINE says.
    ///
    /// # Errors
    /// [`Problem::BadTag`] for a definition that is malformed, doubled, or whose source lacks the value.
    pub(super) fn define(
        &mut self,
        tag: UnknownTag<'_>,
        sources: VariableSources<'_>,
    ) -> Result<(), Problem> {
        let attributes = Attributes::of(tag)?;
        let (name, value) = match ["NAME", "IMPORT", "QUERYPARAM"].map(|name| attributes.quoted(name)) {
            [Some(name), None, None] => (name, attributes.required("VALUE")?.to_owned()),
            [None, Some(name), None] => {
                let value = sources.imported.and_then(|imported| imported.0.get(name));
                let missing =
                    || attributes.bad(format!("the Multivariant Playlist of the stream defines no {name:?}"));
                (name, value.ok_or_else(missing)?.clone())
            }
            [None, None, Some(name)] => {
                (name, query_param(name, sources.query).map_err(|why| attributes.bad(why))?)
            }
            _ => return Err(attributes.bad("it has not one of NAME, IMPORT and QUERYPARAM".into())),
        };
        if name.is_empty() || !name.bytes().all(is_name_byte) {
            return Err(attributes.bad(format!("{name:?} is no name of a variable")));
        }
        if self.0.len() >= MAX_VARIABLES {
            return Err(attributes.bad(format!("more than {MAX_VARIABLES} variables")));
        }
        if self.0.insert(name.to_owned(), value).is_some() {
            return Err(attributes.bad(format!("{name:?} is defined twice")));
        }
        Ok(())
    }

    /// The text with the values in the places of the variables.
    ///
    /// # Errors
    /// [`Problem::UndefinedVariable`], and [`Problem::BadUri`] for a text that grows too long.
    pub(super) fn substitute<'t>(&self, text: &'t str) -> Result<Cow<'t, str>, Problem> {
        let mut out = String::new();
        let mut rest = text;
        while let Some((before, name, behind)) = next_reference(rest) {
            let value =
                self.0.get(name).ok_or_else(|| Problem::UndefinedVariable { name: name.to_owned() })?;
            out.push_str(before);
            out.push_str(value);
            if out.len() > MAX_SUBSTITUTED {
                let why = format!("it is longer than {MAX_SUBSTITUTED} bytes when its variables are put in");
                return Err(Problem::BadUri { uri: text.chars().take(200).collect(), why });
            }
            rest = behind;
        }
        if out.is_empty() && rest.len() == text.len() {
            return Ok(Cow::Borrowed(text));
        }
        out.push_str(rest);
        Ok(Cow::Owned(out))
    }

    /// # Errors
    /// [`Problem::UndefinedVariable`] for a line with a reference to what is not defined, where variables count:
    /// in URI lines and quoted strings.
    pub(super) fn check(&self, line: &Line<'_>) -> Result<(), Problem> {
        if !line.text.contains("{$") {
            return Ok(());
        }
        match line.content {
            Content::Uri => self.substitute(line.text).map(|_| ()),
            Content::Tag(tag) if tag.name() != "INF" => match Attributes::of(tag) {
                Ok(attributes) => {
                    attributes.quoted_values().try_for_each(|value| self.substitute(value).map(|_| ()))
                }
                // Not every tag has attributes.
                Err(_) => Ok(()),
            },
            _ => Ok(()),
        }
    }
}

/// The text before the first `{$name}`, the name, and the text behind it.
fn next_reference(text: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    while let Some(at) = text[from..].find("{$").map(|at| from + at) {
        let name_at = at + 2;
        let name_len = text[name_at..].bytes().take_while(|b| is_name_byte(*b)).count();
        let end = name_at + name_len;
        if name_len > 0 && text[end..].starts_with('}') {
            return Some((&text[..at], &text[name_at..end], &text[end + 1..]));
        }
        from = name_at;
    }
    None
}

/// D22 §4.3.
fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

fn query_param(name: &str, query: Option<&str>) -> Result<String, String> {
    let pairs = query.unwrap_or_default().split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let Some((_, value)) = pairs.into_iter().find(|(known, _)| *known == name) else {
        return Err(format!(
            "the playlist's URL has no parameter {name:?} that its origin gets (query_params of the origin)"
        ));
    };
    let decoded = percent_encoding::percent_decode_str(value).decode_utf8_lossy();
    let is_harmless = |c: char| c.is_ascii_alphanumeric() || "-_~.".contains(c);
    if !decoded.chars().all(is_harmless) || decoded.contains("..") {
        return Err(format!(
            "the value of the parameter {name:?} has other characters than A-Z a-z 0-9 - _ ~ ."
        ));
    }
    Ok(decoded.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(lines: &str, sources: VariableSources<'_>) -> Result<Variables, PlaylistError> {
        let text = format!("#EXTM3U\n{lines}");
        Variables::of(&Playlist::parse(text.as_bytes()).unwrap(), sources, |_| false)
    }

    fn defined() -> Variables {
        variables(
            "#EXT-X-DEFINE:NAME=\"host\",VALUE=\"a.example\"\n#EXT-X-DEFINE:NAME=\"x_1\",VALUE=\"\"",
            VariableSources::default(),
        )
        .unwrap()
    }

    #[test]
    fn values_take_the_places_of_their_variables() {
        let substitute = |text| defined().substitute(text).unwrap().into_owned();
        assert_eq!(substitute("https://{$host}/{$x_1}seg.ts"), "https://a.example/seg.ts");
        assert_eq!(substitute("{$x_1}"), "");
        assert_eq!(substitute("no {reference} {$ here} {$"), "no {reference} {$ here} {$");
    }

    #[test]
    fn what_is_not_defined_is_named() {
        let undefined = Problem::UndefinedVariable { name: "other".into() };
        assert_eq!(defined().substitute("{$host}/{$other}"), Err(undefined));
    }

    #[test]
    fn a_media_playlist_imports_from_the_multivariant_one() {
        let imported = defined();
        let sources = VariableSources { imported: Some(&imported), query: None };
        let ours = variables("#EXT-X-DEFINE:IMPORT=\"host\"", sources).unwrap();
        assert_eq!(ours.substitute("{$host}").unwrap(), "a.example");
        let error = variables("#EXT-X-DEFINE:IMPORT=\"nothing\"", sources).unwrap_err();
        assert_eq!(error.line, 2);
        assert!(
            error.to_string().contains("EXT-X-DEFINE") || error.problem.to_string().contains("EXT-X-DEFINE")
        );
    }

    #[test]
    fn a_query_parameter_is_harmless_or_refused() {
        let define = "#EXT-X-DEFINE:QUERYPARAM=\"t\"";
        let with = |query| variables(define, VariableSources { query: Some(query), imported: None });
        assert_eq!(with("a=1&t=x%2D7").unwrap().substitute("{$t}").unwrap(), "x-7");
        for bad in ["", "a=1", "t=../x", "t=%2e%2e", "t=a%2Fb", "t=a{$b}", "t=%0A"] {
            assert!(with(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_definition_that_is_wrong_is_refused_with_its_line() {
        for bad in [
            "#EXT-X-DEFINE:NAME=\"a\"",
            "#EXT-X-DEFINE:NAME=\"a b\",VALUE=\"\"",
            "#EXT-X-DEFINE:VALUE=\"x\"",
            "#EXT-X-DEFINE:NAME=\"a\",VALUE=\"x\",IMPORT=\"a\"",
        ] {
            assert_eq!(variables(bad, VariableSources::default()).unwrap_err().line, 2, "{bad}");
        }
        let twice = "#EXT-X-DEFINE:NAME=\"a\",VALUE=\"x\"\n#EXT-X-DEFINE:NAME=\"a\",VALUE=\"x\"";
        assert_eq!(variables(twice, VariableSources::default()).unwrap_err().line, 3);
    }
}
