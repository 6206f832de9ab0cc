//! Gives an fMP4 segment another place on the timeline: its decode time and sequence number.
//!
//! A looped clip needs these two numbers changed and nothing else, because sample offsets count
//! from the `moof` (default-base-is-moof) and durations are relative. Both have a fixed width, so
//! the segment keeps its length and every other byte.
//!
//! This is not an MP4 library. It walks `moof` → `mfhd` and `moof` → `traf` → `tfdt` (ISO/IEC
//! 14496-12, 8.8.4, 8.8.5, 8.8.12) and refuses what it would get wrong: a 32-bit decode time, which
//! cannot hold Unix time, and a `sidx`, whose own time would contradict the new one.
//!
//! Deliberately absent: several fragments in a segment, several tracks, edit lists, and boxes with
//! 64-bit sizes; `scripts/make-demo-clip.sh` writes none of them.

use std::ops::Range;

/// What to write into a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// `mfhd` sequence_number.
    pub sequence_number: u32,
    /// `tfdt` baseMediaDecodeTime, in the track's ticks.
    pub decode_time: u64,
}

/// Why a segment cannot be restamped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RestampError {
    #[error("the box at byte {at} does not fit into what holds it")]
    BadBoxSize { at: usize },
    #[error("there is no `{name}` box")]
    MissingBox { name: &'static str },
    #[error("the `tfdt` box has a 32-bit decode time")]
    NarrowDecodeTime,
    #[error("there is a `sidx` box")]
    UnexpectedIndex,
}

/// Returns the segment with `stamp` written into it; the length stays the same.
pub(super) fn restamp(segment: &[u8], stamp: Stamp) -> Result<Vec<u8>, RestampError> {
    let whole = 0..segment.len();
    if find(segment, whole.clone(), "sidx")?.is_some() {
        return Err(RestampError::UnexpectedIndex);
    }
    let moof = require(segment, whole, "moof")?;
    let mfhd = require(segment, moof.clone(), "mfhd")?;
    let traf = require(segment, moof, "traf")?;
    let tfdt = require(segment, traf, "tfdt")?;

    // Both are full boxes: one byte of version and three of flags come before the number.
    if segment[tfdt.clone()].first() != Some(&1) {
        return Err(RestampError::NarrowDecodeTime);
    }
    let mut out = segment.to_vec();
    overwrite(&mut out, mfhd, &stamp.sequence_number.to_be_bytes())?;
    overwrite(&mut out, tfdt, &stamp.decode_time.to_be_bytes())?;
    Ok(out)
}

/// Writes `number` behind the version and flags of the full box with this payload.
fn overwrite(out: &mut [u8], payload: Range<usize>, number: &[u8]) -> Result<(), RestampError> {
    let at = payload.start;
    out[payload].get_mut(4..4 + number.len()).ok_or(RestampError::BadBoxSize { at })?.copy_from_slice(number);
    Ok(())
}

/// As [`find`], but the box has to be there.
fn require(bytes: &[u8], within: Range<usize>, name: &'static str) -> Result<Range<usize>, RestampError> {
    find(bytes, within, name)?.ok_or(RestampError::MissingBox { name })
}

/// The payload of the first box called `name` among the boxes that fill `within`.
fn find(bytes: &[u8], within: Range<usize>, name: &str) -> Result<Option<Range<usize>>, RestampError> {
    const HEADER: usize = 8;
    let mut at = within.start;
    while at < within.end {
        let bad = RestampError::BadBoxSize { at };
        let header = bytes[at..within.end].first_chunk::<HEADER>().ok_or(bad)?;
        let [a, b, c, d, kind @ ..] = *header;
        let size = u32::from_be_bytes([a, b, c, d]) as usize;
        if size < HEADER || size > within.end - at {
            return Err(bad);
        }
        if kind == name.as_bytes() {
            return Ok(Some(at + HEADER..at + size));
        }
        at += size;
    }
    Ok(None)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { sequence_number: 0x0102_0304, decode_time: 0x1112_1314_1516_1718 };

    /// Wraps a payload in a box.
    fn mp4_box(name: &str, payload: &[u8]) -> Vec<u8> {
        let mut out = u32::try_from(payload.len() + 8).unwrap().to_be_bytes().to_vec();
        out.extend(name.as_bytes());
        out.extend(payload);
        out
    }

    fn segment(tfdt: &[u8]) -> Vec<u8> {
        let traf = [mp4_box("tfhd", &[9; 8]), mp4_box("tfdt", tfdt)].concat();
        let moof = [mp4_box("mfhd", &[0; 8]), mp4_box("traf", &traf)].concat();
        [mp4_box("styp", b"msdh"), mp4_box("moof", &moof), mp4_box("mdat", b"media")].concat()
    }

    /// The stamp that a segment carries, and the sum of its sample durations in ticks.
    pub(in crate::demo) fn read_stamp(segment: &[u8]) -> (Stamp, u64) {
        let word = |at: usize| u32::from_be_bytes(segment[at..at + 4].try_into().unwrap());
        let moof = require(segment, 0..segment.len(), "moof").unwrap();
        let mfhd = require(segment, moof.clone(), "mfhd").unwrap();
        let traf = require(segment, moof, "traf").unwrap();
        let [tfhd, tfdt, trun] =
            ["tfhd", "tfdt", "trun"].map(|name| require(segment, traf.clone(), name).unwrap());
        assert_eq!(segment[tfdt.start], 1, "a 64-bit tfdt");
        // tfhd: a default duration (0x08) stands behind the track ID, and no base data offset (0x01)
        // or sample description index (0x02) but what the flags say.
        let tfhd_flags = word(tfhd.start) & 0x00ff_ffff;
        assert_eq!(tfhd_flags & 0x02_0009, 0x02_0008, "default-base-is-moof, default duration");
        let default_duration = word(tfhd.start + 8 + if tfhd_flags & 2 == 2 { 4 } else { 0 });
        // trun: no durations of its own (0x100), no composition offsets (0x800).
        assert_eq!(word(trun.start) & 0x900, 0);
        let samples = word(trun.start + 4);
        let stamp = Stamp {
            sequence_number: word(mfhd.start + 4),
            decode_time: u64::from(word(tfdt.start + 4)) << 32 | u64::from(word(tfdt.start + 8)),
        };
        (stamp, u64::from(samples) * u64::from(default_duration))
    }

    #[test]
    fn only_the_two_numbers_change() {
        let before = segment(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let after = restamp(&before, STAMP).unwrap();
        assert_eq!(after.len(), before.len());
        let changed: Vec<u8> = after.iter().zip(&before).filter(|(a, b)| a != b).map(|(a, _)| *a).collect();
        assert_eq!(changed, [1, 2, 3, 4, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);
    }

    #[test]
    fn what_cannot_be_restamped_is_refused() {
        let check = |bytes: &[u8], expected| assert_eq!(restamp(bytes, STAMP), Err(expected));
        check(&segment(&[0; 8]), RestampError::NarrowDecodeTime);
        check(&segment(&[]), RestampError::NarrowDecodeTime);
        check(&mp4_box("mdat", b""), RestampError::MissingBox { name: "moof" });
        check(&[mp4_box("sidx", b""), segment(&[1; 12])].concat(), RestampError::UnexpectedIndex);
        let short_tfdt_at = 12 + 8 + 16 + 8 + 16 + 8;
        check(&segment(&[1, 0, 0, 0, 0]), RestampError::BadBoxSize { at: short_tfdt_at });
    }

    #[test]
    fn no_cut_and_no_box_size_panics() {
        let whole = segment(&[1; 12]);
        for length in 0..whole.len() {
            // A cut inside the `moof` (from byte 12 to 80) is seen; the media behind it is not read.
            let result = restamp(&whole[..length], STAMP);
            assert!(result.is_err() || length >= 80, "cut at {length}");
        }
        for at in 0..whole.len() {
            for byte in [0, 1, 7, 255] {
                let mut bytes = whole.clone();
                bytes[at] = byte;
                let _ = restamp(&bytes, STAMP);
            }
        }
    }
}
