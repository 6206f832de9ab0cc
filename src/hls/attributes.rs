//! Reading a tag's attribute list, and changing single attributes in place.
//!
//! quick-m3u8 finds the attributes; what changes is spliced into the line it came from. Its own setters
//! would write the tag anew from the attributes they know and lose the others (see
//! docs/design/001-splice-instead-of-rebuild.md).

use std::ops::Range;

use quick_m3u8::tag::{AttributeValue, UnknownTag};

use super::error::Problem;

/// A tag's attributes, as they stand in the line.
pub(super) struct Attributes<'a> {
    tag: UnknownTag<'a>,
    list: Vec<(&'a str, AttributeValue<'a>)>,
}

impl<'a> Attributes<'a> {
    /// # Errors
    /// [`Problem::BadTag`] when the tag has no well-formed attribute list (D22 §4.2).
    pub(super) fn of(tag: UnknownTag<'a>) -> Result<Self, Problem> {
        let bad = |why: String| Problem::BadTag { tag: tag_name(&tag), why };
        let value = tag.value().ok_or_else(|| bad("its attributes are missing".into()))?;
        let list = value
            .try_as_ordered_attribute_list()
            .map_err(|error| bad(format!("bad attribute list: {error}")))?;
        Ok(Self { tag, list: list.into_iter().collect() })
    }

    /// A quoted-string attribute's value; `None` when it is absent or not quoted.
    pub(super) fn quoted(&self, name: &str) -> Option<&'a str> {
        self.find(name).and_then(|(_, value)| value.quoted())
    }

    /// As [`Self::quoted`], of an attribute that must be there.
    ///
    /// # Errors
    /// [`Problem::BadTag`].
    pub(super) fn required(&self, name: &str) -> Result<&'a str, Problem> {
        self.quoted(name).ok_or_else(|| self.bad(format!("it has no {name}")))
    }

    /// An enumerated-string attribute's value; `None` when it is absent, quoted or not UTF-8.
    pub(super) fn unquoted(&self, name: &str) -> Option<&'a str> {
        self.find(name)?.1.unquoted()?.try_as_utf_8().ok()
    }

    /// A decimal-integer attribute's value; `None` when it is absent.
    ///
    /// # Errors
    /// [`Problem::BadTag`] when it is something else.
    pub(super) fn decimal(&self, name: &str) -> Result<Option<u64>, Problem> {
        if self.find(name).is_none() {
            return Ok(None);
        }
        let number = self.unquoted(name).and_then(|text| text.parse().ok());
        number.map(Some).ok_or_else(|| self.bad(format!("{name} is not a decimal integer")))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// The attributes' names with their quoted values.
    pub(super) fn quoted_values(&self) -> impl Iterator<Item = &'a str> {
        self.list.iter().filter_map(|(_, value)| value.quoted())
    }

    pub(super) fn bad(&self, why: String) -> Problem {
        Problem::BadTag { tag: tag_name(&self.tag), why }
    }

    fn find(&self, name: &str) -> Option<&(&'a str, AttributeValue<'a>)> {
        self.list.iter().find(|(known, _)| *known == name)
    }
}

/// A tag's name as it stands in the playlist, without the `#`.
pub(super) fn tag_name(tag: &UnknownTag<'_>) -> String {
    format!("EXT{}", tag.name())
}

/// Changes to one line, each at the place of what it changes.
pub(super) struct Edits<'l> {
    line: &'l str,
    made: Vec<(Range<usize>, String)>,
}

impl<'l> Edits<'l> {
    pub(super) fn of(line: &'l str) -> Self {
        Self { line, made: Vec::new() }
    }

    /// Puts `by` in the place of `value`, which is a slice of the line.
    pub(super) fn replace(&mut self, value: &str, by: impl Into<String>) {
        self.made.push((self.place_of(value), by.into()));
    }

    /// Takes an attribute out, with the comma that parts it from the others.
    pub(super) fn remove(&mut self, attributes: &Attributes<'_>, name: &str) {
        let Some((name, value)) = attributes.find(name) else { return };
        let mut place = self.place_of(name);
        place.end = match (value.quoted(), value.unquoted()) {
            (Some(quoted), _) => self.place_of(quoted).end + 1,
            (_, Some(unquoted)) => unquoted.try_as_utf_8().map_or(place.end, |text| self.place_of(text).end),
            _ => place.end,
        };
        let before = &self.line[..place.start];
        if before.trim_end().ends_with(',') {
            place.start = before.trim_end().len() - 1;
        } else if let Some(behind) = self.line[place.end..].strip_prefix(',') {
            place.end = self.line.len() - behind.len();
        }
        self.made.push((place, String::new()));
    }

    /// The changed line.
    pub(super) fn apply(mut self) -> String {
        self.made.sort_by_key(|(place, _)| place.start);
        let mut out = String::with_capacity(self.line.len() + 64);
        let mut at = 0;
        for (place, by) in self.made {
            out.push_str(&self.line[at..place.start.max(at)]);
            out.push_str(&by);
            at = place.end.max(at);
        }
        out.push_str(&self.line[at..]);
        out
    }

    /// Where a slice of the line lies in it. Its place follows from the addresses and not from a search, which
    /// would find another attribute with the same value.
    fn place_of(&self, slice: &str) -> Range<usize> {
        let start = (slice.as_ptr() as usize).wrapping_sub(self.line.as_ptr() as usize);
        assert!(start + slice.len() <= self.line.len(), "the value is a slice of its line");
        start..start + slice.len()
    }
}

#[cfg(test)]
mod tests {
    use quick_m3u8::custom_parsing::tag;

    use super::*;

    fn check(line: &str, edit: impl FnOnce(&mut Edits<'_>, &Attributes<'_>), expected: &str) {
        let attributes = Attributes::of(tag::parse(line).unwrap().parsed).unwrap();
        let mut edits = Edits::of(line);
        edit(&mut edits, &attributes);
        assert_eq!(edits.apply(), expected);
    }

    #[test]
    fn attributes_change_and_go_where_they_stand() {
        check(
            "#EXT-X-MAP:URI=\"a\",BYTERANGE=\"1@0\",X=\"a\"",
            |edits, attributes| {
                edits.replace(attributes.quoted("X").unwrap(), "b");
                edits.remove(attributes, "BYTERANGE");
            },
            "#EXT-X-MAP:URI=\"a\",X=\"b\"",
        );
        check(
            "#EXT-X-PRELOAD-HINT:BYTERANGE-START=1,BYTERANGE-LENGTH=2,URI=\"a\"",
            |edits, attributes| {
                edits.remove(attributes, "BYTERANGE-LENGTH");
                edits.remove(attributes, "X");
            },
            "#EXT-X-PRELOAD-HINT:BYTERANGE-START=1,URI=\"a\"",
        );
        check(
            "#EXT-X-MAP:BYTERANGE=\"1\",URI=\"a\"",
            |edits, attributes| edits.remove(attributes, "BYTERANGE"),
            "#EXT-X-MAP:URI=\"a\"",
        );
    }

    #[test]
    fn neighbours_that_both_go_leave_no_comma() {
        check(
            "#EXT-X-PRELOAD-HINT:TYPE=PART,URI=\"a\",BYTERANGE-START=1,BYTERANGE-LENGTH=2",
            |edits, attributes| {
                edits.remove(attributes, "BYTERANGE-START");
                edits.remove(attributes, "BYTERANGE-LENGTH");
            },
            "#EXT-X-PRELOAD-HINT:TYPE=PART,URI=\"a\"",
        );
    }
}
