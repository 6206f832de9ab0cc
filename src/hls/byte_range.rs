//! Byte ranges as playlists write them: `<n>[@<o>]` (D22 §4.4.4.2).

use super::error::Problem;
use crate::keys::ByteRange;

/// What a range without an offset follows: the last range, and the file it lies in.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct LastRange<'p> {
    last: Option<(&'p str, u64)>,
}

impl<'p> LastRange<'p> {
    /// Reads the range of `tag` into the file `uri`, and remembers it. `otherwise` is the offset of one that has
    /// none and follows nothing.
    ///
    /// # Errors
    /// [`Problem::BadTag`] for what is no range, is empty, or follows nothing.
    pub(super) fn read(
        &mut self,
        (tag, text): (&str, &str),
        uri: &'p str,
        otherwise: Option<u64>,
    ) -> Result<ByteRange, Problem> {
        let bad = |why: String| Problem::BadTag { tag: tag.to_owned(), why };
        let (length, offset) = match text.trim().split_once('@') {
            Some((length, offset)) => (length, Some(offset)),
            None => (text.trim(), None),
        };
        let number = |text: &str| text.parse::<u64>().map_err(|_| bad(format!("{text:?} is no number")));
        let length = number(length)?;
        // D22 §4.4.4.2: without an offset it begins where the one before ended, in the same file.
        let follows = || self.last.filter(|(file, _)| *file == uri).map(|(_, end)| end).or(otherwise);
        let offset = match offset {
            Some(offset) => number(offset)?,
            None => follows().ok_or_else(|| {
                bad(format!("{text:?} has no offset, and no range of the same file stands before it"))
            })?,
        };
        let end = offset.checked_add(length).filter(|_| length > 0);
        let end = end.ok_or_else(|| bad(format!("{text:?} is no range of bytes")))?;
        self.last = Some((uri, end));
        Ok(ByteRange { offset, length })
    }

    /// Nothing stands before what comes now.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_without_an_offset_goes_on_in_the_same_file() {
        let mut last = LastRange::default();
        let mut read = |text, uri| last.read(("EXT-X-BYTERANGE", text), uri, None);
        assert_eq!(read("10@5", "a"), Ok(ByteRange { offset: 5, length: 10 }));
        assert_eq!(read("3", "a"), Ok(ByteRange { offset: 15, length: 3 }));
        assert!(read("3", "b").unwrap_err().to_string().contains("no offset"));
        assert_eq!(read("3@0", "b"), Ok(ByteRange { offset: 0, length: 3 }));
        assert!(read("3", "a").is_err(), "the one before lies in another file");
    }

    #[test]
    fn what_is_no_range_says_so() {
        for bad in ["", "x", "0@0", "1@", "-1@0", "1@18446744073709551615", "1@2@3"] {
            let read = LastRange::default().read(("EXT-X-BYTERANGE", bad), "a", None);
            assert!(matches!(read, Err(Problem::BadTag { .. })), "{bad}");
        }
    }
}
