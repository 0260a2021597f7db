//! The last lines of a stream.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memchr::{memchr, memrchr};

/// Number of bytes that are kept.
const KEPT: usize = 16 << 10;
/// Maximum number of bytes shown of a line.
const LINE: usize = 2 << 10;

/// The last bytes of a stream. Lines are made from them only on request.
#[derive(Clone, Default)]
pub(super) struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut kept = self.kept();
        kept.extend(&bytes[bytes.len().saturating_sub(KEPT)..]);
        if kept.len() > 2 * KEPT {
            // A progress bar must not push out the lines before it, so only its last refresh is
            // kept.
            if memchr(b'\r', kept.make_contiguous()).is_some() {
                let lines: Vec<u8> = kept
                    .make_contiguous()
                    .split_inclusive(|byte| *byte == b'\n')
                    .flat_map(refreshed)
                    .copied()
                    .collect();
                *kept = lines.into();
            }
            let too_many = kept.len().saturating_sub(KEPT);
            kept.drain(..too_many);
        }
    }

    /// Returns the last lines, at most `count`.
    pub(super) fn lines(&self, count: usize) -> Vec<String> {
        let mut kept = self.kept();
        let bytes: &[u8] = kept.make_contiguous();
        let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        if body.is_empty() {
            return Vec::new();
        }
        let last: Vec<&[u8]> = body.rsplit(|byte| *byte == b'\n').take(count).collect();
        let text = |line: &&[u8]| {
            let line = refreshed(line);
            String::from_utf8_lossy(&line[..line.len().min(LINE)]).trim_end().to_owned()
        };
        last.iter().rev().map(text).collect()
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the text that the last refresh of a line has left, with its line end.
fn refreshed(line: &[u8]) -> &[u8] {
    let end = line.iter().rposition(|byte| !matches!(byte, b'\r' | b'\n')).map_or(0, |last| last + 1);
    let start = memrchr(b'\r', &line[..end]).map_or(0, |at| at + 1);
    &line[start..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_progress_bar_is_one_line_and_leaves_the_others() {
        let tail = Tail::default();
        tail.push(b"loading\nstarting\n");
        for step in 0..10_000 {
            tail.push(format!("\r{step:>8}/10000").as_bytes());
        }
        assert_eq!(tail.lines(20), ["loading", "starting", "    9999/10000"]);
        tail.push(b"\rdone\r\nend");
        assert_eq!(tail.lines(2), ["done", "end"]);
    }

    #[test]
    fn the_last_of_many_lines_are_kept() {
        let tail = Tail::default();
        assert!(tail.lines(5).is_empty());
        for number in 0..10_000 {
            tail.push(format!("line {number}\n").as_bytes());
        }
        tail.push(&[b'x'; 5000]);
        let lines = tail.lines(3);
        assert_eq!(lines[..2], ["line 9998", "line 9999"]);
        assert_eq!(lines[2].len(), LINE);
    }
}
