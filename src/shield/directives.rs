//! Delivery directives: what a low-latency player tells the server in a playlist's query (D22 §6.2.5).
//!
//! They go on to the origin, which knows what it has and blocks until there is more. They are part of what a playlist
//! is kept under, in one spelling, so that any number of players who wait for the same are one request to the origin.

use super::reply::Refusal;

/// `_HLS_msn`, `_HLS_part` and `_HLS_skip`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Directives {
    /// Answer when this Media Sequence Number, or a later one, is there.
    pub(super) msn: Option<u64>,
    /// … and of it this part.
    pub(super) part: Option<u64>,
    pub(super) skip: Skip,
}

/// Whether segments that the player has already may be left out (D22 §6.2.5.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Skip {
    #[default]
    No,
    Segments,
    /// Date ranges too.
    SegmentsAndDateRanges,
}

impl Directives {
    /// Reads them out of a query.
    ///
    /// # Errors
    /// [`Refusal::BadDirective`] for what is no number, and a part of no segment (D22 §6.2.5.2).
    pub(super) fn of(query: &str) -> Result<Self, Refusal> {
        let mut directives = Self::default();
        for (name, value) in query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, ""))) {
            let number =
                || value.parse().map_err(|_| Refusal::BadDirective("_HLS_msn and _HLS_part are numbers"));
            match name {
                "_HLS_msn" => directives.msn = Some(number()?),
                "_HLS_part" => directives.part = Some(number()?),
                "_HLS_skip" if value == "YES" => directives.skip = Skip::Segments,
                "_HLS_skip" if value == "v2" => directives.skip = Skip::SegmentsAndDateRanges,
                _ => {}
            }
        }
        if directives.part.is_some() && directives.msn.is_none() {
            return Err(Refusal::BadDirective("_HLS_part says nothing without _HLS_msn"));
        }
        Ok(directives)
    }

    /// The whole playlist, when the same is there.
    pub(super) fn without_skip(self) -> Self {
        Self { skip: Skip::No, ..self }
    }

    /// As a query; empty when there are none.
    pub(super) fn to_query(self) -> String {
        let number = |name: &str, value: Option<u64>| value.map(|value| format!("{name}={value}"));
        let skip = match self.skip {
            Skip::No => None,
            Skip::Segments => Some("_HLS_skip=YES".to_owned()),
            Skip::SegmentsAndDateRanges => Some("_HLS_skip=v2".to_owned()),
        };
        let all = [number("_HLS_msn", self.msn), number("_HLS_part", self.part), skip];
        all.into_iter().flatten().collect::<Vec<_>>().join("&")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(query: &str, expected: &str) {
        assert_eq!(Directives::of(query).unwrap().to_query(), expected, "{query}");
    }

    #[test]
    fn directives_have_one_spelling() {
        check("", "");
        check("token=x&CMCD=y", "");
        check("_HLS_part=2&token=x&_HLS_msn=0812", "_HLS_msn=812&_HLS_part=2");
        check("_HLS_skip=YES", "_HLS_skip=YES");
        check("_HLS_skip=v2&_HLS_msn=1", "_HLS_msn=1&_HLS_skip=v2");
        check("_HLS_skip=NO&_HLS_report=a.m3u8", "");
    }

    #[test]
    fn what_makes_no_sense_is_a_bad_request() {
        for bad in ["_HLS_part=1", "_HLS_msn=x", "_HLS_msn=-1", "_HLS_msn=", "_HLS_msn=1&_HLS_part=x"] {
            assert_eq!(Directives::of(bad).unwrap_err().status(), http::StatusCode::BAD_REQUEST, "{bad}");
        }
    }
}
