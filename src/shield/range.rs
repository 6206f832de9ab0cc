//! The Range header of a request, against a body whose length is known.
//!
//! One `bytes` range is answered (RFC 9110 §14.2); several at once, other units and what does not parse are
//! ignored, as the RFC allows, and get the whole body.

use std::ops::Range;

/// What a request asks for of a body of known length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    Whole,
    /// Never empty, within the body.
    Part(Range<u64>),
    /// 416: the range lies outside the body.
    Unsatisfiable,
}

pub(super) fn wanted(header: Option<&str>, total: u64) -> Wanted {
    let Some(spec) = header.and_then(single_range) else { return Wanted::Whole };
    let range = match spec {
        Spec::From(first) => first..total,
        Spec::FromTo(first, last) => first..total.min(last.saturating_add(1)),
        Spec::Last(0) => return Wanted::Unsatisfiable,
        Spec::Last(count) => total.saturating_sub(count)..total,
    };
    if range.start >= total { Wanted::Unsatisfiable } else { Wanted::Part(range) }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spec {
    From(u64),
    FromTo(u64, u64),
    Last(u64),
}

fn single_range(header: &str) -> Option<Spec> {
    let (unit, spec) = header.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = spec.trim().split_once('-')?;
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // A number beyond u64 is beyond every body.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    match (first.trim(), last.trim()) {
        ("", last) => Some(Spec::Last(number(last)?)),
        (first, "") => Some(Spec::From(number(first)?)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Spec::FromTo(first, last))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(header: &str, expected: Wanted) {
        assert_eq!(wanted(Some(header), 1000), expected, "{header}");
    }

    #[test]
    fn one_range_is_cut_to_the_body() {
        check("bytes=0-0", Wanted::Part(0..1));
        check("bytes=0-499", Wanted::Part(0..500));
        check("bytes=500-", Wanted::Part(500..1000));
        check("bytes=-100", Wanted::Part(900..1000));
        check("bytes=-5000", Wanted::Part(0..1000));
        check("bytes=990-5000", Wanted::Part(990..1000));
        check("Bytes = 1 - 2", Wanted::Part(1..3));
        check("bytes=0-99999999999999999999999", Wanted::Part(0..1000));
    }

    #[test]
    fn a_range_outside_the_body_is_unsatisfiable() {
        check("bytes=1000-", Wanted::Unsatisfiable);
        check("bytes=1000-2000", Wanted::Unsatisfiable);
        check("bytes=-0", Wanted::Unsatisfiable);
    }

    #[test]
    fn what_is_not_one_byte_range_gets_the_whole() {
        for header in ["bytes=0-1,5-6", "items=0-1", "bytes=5-4", "bytes", "bytes=", "bytes=a-b", "bytes=-"] {
            check(header, Wanted::Whole);
        }
        assert_eq!(wanted(None, 1000), Wanted::Whole);
    }
}
