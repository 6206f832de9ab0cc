//! Reading a tag's attribute list, and replacing one value in place.
//!
//! quick-m3u8 finds the attributes; a changed value is spliced into the line it came from. Its own setters
//! would write the tag anew from the attributes they know and lose the others (see
//! docs/design/001-splice-instead-of-rebuild.md).

use quick_m3u8::tag::{AttributeValue, UnknownTag};

use super::error::Problem;

/// One attribute of a tag, as it stands in the line.
pub(super) struct Attributes<'a> {
    tag: UnknownTag<'a>,
    list: Vec<(&'a str, AttributeValue<'a>)>,
}

impl<'a> Attributes<'a> {
    /// # Errors
    /// [`Problem::BadTag`] when the tag has no well-formed attribute list (D22 §4.2).
    pub(super) fn of(tag: UnknownTag<'a>) -> Result<Self, Problem> {
        let bad = |why: String| Problem::BadTag { tag: format!("EXT{}", tag.name()), why };
        let value = tag.value().ok_or_else(|| bad("its attributes are missing".into()))?;
        let list = value
            .try_as_ordered_attribute_list()
            .map_err(|error| bad(format!("bad attribute list: {error}")))?;
        Ok(Self { tag, list: list.into_iter().collect() })
    }

    /// A quoted-string attribute's value; `None` when it is absent or not quoted.
    pub(super) fn quoted(&self, name: &str) -> Option<&'a str> {
        self.find(name).and_then(|value| value.quoted())
    }

    /// An enumerated-string attribute's value; `None` when it is absent, quoted or not UTF-8.
    pub(super) fn unquoted(&self, name: &str) -> Option<&'a str> {
        self.find(name)?.unquoted()?.try_as_utf_8().ok()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// The line with the quoted value `of`, which came from [`Self::quoted`], replaced by `by`.
    pub(super) fn splice(line: &str, of: &str, by: &str) -> String {
        // `of` is a slice of `line`, so that its place follows from the addresses and not from a search,
        // which would find another attribute with the same value.
        let start = (of.as_ptr() as usize).wrapping_sub(line.as_ptr() as usize);
        assert!(start + of.len() <= line.len(), "the value is a slice of its line");
        [&line[..start], by, &line[start + of.len()..]].concat()
    }

    fn find(&self, name: &str) -> Option<&AttributeValue<'a>> {
        self.list.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    pub(super) fn tag_name(&self) -> String {
        format!("EXT{}", self.tag.name())
    }
}
