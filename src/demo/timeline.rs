//! Where the clip stands at a given time: Media Sequence Numbers, frames and decode times.
//!
//! Everything is arithmetic on the wall clock. Segment `n` covers the two seconds from `2n` after
//! the Unix epoch, may be served once they are over, and holds every frame that starts in them. So
//! the media timeline *is* Unix time: a decode time and an EXT-X-PROGRAM-DATE-TIME name the same
//! instant, audio and video agree without an offset, and nothing has to be remembered over a
//! restart. A clip of twelve segments then repeats by `n mod 12`.
//!
//! An AAC frame does not divide two seconds. Counting frames, not seconds, keeps the sum exact: an
//! audio segment starts with the first frame at or after `2n`, which shares 1,125 frames a loop out
//! as 94, 94, 94, 93.
//!
//! Deliberately absent: time zones and leap seconds (Unix time has neither), and any reading of a
//! clock.

use std::ops::Range;

use crate::keys::MediaSequenceNumber;

/// Length of a segment on the wall clock.
pub(super) const SEGMENT_MS: u64 = 2_000;
/// Segments in one loop of the clip.
pub(super) const LOOP_SEGMENTS: u64 = 12;
/// Segments that a live playlist lists.
pub(super) const WINDOW_SEGMENTS: u64 = 8;
/// Segments behind the live window that are still served (60 s), for players that are late.
pub(super) const KEPT_SEGMENTS: u64 = 30;

/// Milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UnixMillis(pub u64);

/// How one rendition divides time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Timing {
    /// Ticks a second, as the Media Initialization Section says.
    pub timescale: u64,
    /// Ticks that one frame lasts.
    pub ticks_per_frame: u64,
    /// Frames in one loop of the clip.
    pub frames_per_loop: u64,
}

impl Timing {
    /// Frames before segment `msn`, counted from the Unix epoch.
    fn frames_before(self, msn: MediaSequenceNumber) -> u64 {
        msn.0.saturating_mul(self.frames_per_loop).div_ceil(LOOP_SEGMENTS)
    }

    /// Decode time of the segment's first frame, in ticks since the Unix epoch.
    pub(super) fn decode_time(self, msn: MediaSequenceNumber) -> u64 {
        self.frames_before(msn).saturating_mul(self.ticks_per_frame)
    }

    /// The segment's duration in ticks.
    pub(super) fn duration(self, msn: MediaSequenceNumber) -> u64 {
        self.decode_time(MediaSequenceNumber(msn.0.saturating_add(1))) - self.decode_time(msn)
    }

    /// The instant of the segment's first frame, to the millisecond below.
    pub(super) fn start(self, msn: MediaSequenceNumber) -> UnixMillis {
        UnixMillis(self.decode_time(msn).saturating_mul(1_000) / self.timescale)
    }
}

/// The segments that a live playlist lists at `now`; the end is exclusive and is the segment that
/// is still being "recorded". Shorter than the window only in the first seconds of 1970.
pub(super) fn live_window(now: UnixMillis) -> Range<u64> {
    let end = now.0 / SEGMENT_MS;
    end.saturating_sub(WINDOW_SEGMENTS)..end
}

/// The segments that are served at `now`: the live window and [`KEPT_SEGMENTS`] behind it.
pub(super) fn live_segments(now: UnixMillis) -> Range<u64> {
    let window = live_window(now);
    window.start.saturating_sub(KEPT_SEGMENTS)..window.end
}

/// Writes an instant as RFC 3339 in UTC with milliseconds: `2027-01-15T08:00:00.000Z`.
pub(super) fn rfc3339(at: UnixMillis) -> String {
    let (secs, ms) = (at.0 / 1_000, at.0 % 1_000);
    let (days, second_of_day) = (secs / 86_400, secs % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (second_of_day / 3_600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

/// Year, month and day of the Gregorian calendar, `days` after 1970-01-01.
///
/// Counts from 1 March of year 0, so that a leap day is the last day of its year and months have
/// a regular rhythm: five of them take 153 days.
fn civil_date(days: u64) -> (u64, u64, u64) {
    const DAYS_FROM_YEAR_0: u64 = 719_468;
    const DAYS_IN_400_YEARS: u64 = 146_097;
    let days = days + DAYS_FROM_YEAR_0;
    let (era, day_of_era) = (days / DAYS_IN_400_YEARS, days % DAYS_IN_400_YEARS);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let months_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * months_from_march + 2) / 5 + 1;
    let month = (months_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIDEO: Timing = Timing { timescale: 12_800, ticks_per_frame: 512, frames_per_loop: 600 };
    const AUDIO: Timing = Timing { timescale: 48_000, ticks_per_frame: 1_024, frames_per_loop: 1_125 };

    #[test]
    fn a_segment_is_listed_once_it_is_over() {
        assert_eq!(live_window(UnixMillis(1_800_000_001_999)), 899_999_992..900_000_000);
        assert_eq!(live_window(UnixMillis(1_800_000_002_000)), 899_999_993..900_000_001);
        assert_eq!(live_segments(UnixMillis(1_800_000_002_000)), 899_999_963..900_000_001);
    }

    #[test]
    fn a_clock_at_either_end_does_no_harm() {
        assert_eq!(live_window(UnixMillis(0)), 0..0);
        assert_eq!(live_segments(UnixMillis(4_100)), 0..2);
        let last = MediaSequenceNumber(live_window(UnixMillis(u64::MAX)).end);
        for timing in [VIDEO, AUDIO] {
            timing.duration(last);
            rfc3339(timing.start(last));
        }
    }

    #[test]
    fn audio_segments_share_the_frames_of_a_loop() {
        let frames: Vec<u64> = (0..LOOP_SEGMENTS)
            .map(|n| AUDIO.duration(MediaSequenceNumber(n)) / AUDIO.ticks_per_frame)
            .collect();
        assert_eq!(frames, [94, 94, 94, 93, 94, 94, 94, 93, 94, 94, 94, 93]);
        assert_eq!(AUDIO.decode_time(MediaSequenceNumber(LOOP_SEGMENTS)), 24 * AUDIO.timescale);
    }

    #[test]
    fn decode_times_are_unix_time() {
        let msn = MediaSequenceNumber(900_000_000);
        assert_eq!(VIDEO.decode_time(msn), 1_800_000_000 * VIDEO.timescale);
        assert_eq!(AUDIO.decode_time(msn), 1_800_000_000 * AUDIO.timescale);
        assert_eq!(AUDIO.start(MediaSequenceNumber(900_000_001)), UnixMillis(1_800_000_002_005));
    }

    #[test]
    fn instants_are_written_as_rfc3339() {
        for (ms, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_800_000_000_000, "2027-01-15T08:00:00.000Z"),
            (1_835_481_599_999, "2028-02-29T23:59:59.999Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(UnixMillis(ms)), expected);
        }
    }
}
