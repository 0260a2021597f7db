//! What `/proc` tells about ranks.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// The CPU time that the processes of each of these sessions have used, those included that have ended and were waited for. A rank leads a
/// session of its own.
pub(crate) fn cpu_times(sessions: impl IntoIterator<Item = u32>) -> BTreeMap<u32, Duration> {
    let mut times: BTreeMap<u32, Duration> =
        sessions.into_iter().map(|session| (session, Duration::ZERO)).collect();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if !entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit) {
            continue;
        }
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        if let Some((session, used)) = parse(&stat)
            && let Some(time) = times.get_mut(&session)
        {
            *time += used;
        }
    }
    times
}

/// Session and CPU time of a line of `/proc/<pid>/stat`, proc_pid_stat(5).
fn parse(stat: &str) -> Option<(u32, Duration)> {
    // The name in parentheses may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let session = fields.get(3)?.parse().ok()?;
    let ticks: u64 = fields.get(11..15)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
    // The kernel shows 100 ticks per second on every Linux that libtorch runs on.
    Some((session, Duration::from_millis(ticks.saturating_mul(10))))
}

/// Whether a process has a handler for a signal.
pub(crate) fn handles(pid: u32, signal: i32) -> bool {
    mask(&format!("/proc/{pid}/status"), "SigCgt:").is_some_and(|mask| is_in(mask, signal))
}

/// Whether this process was started with a signal ignored, as under nohup.
pub(super) fn ignores(signal: i32) -> bool {
    mask("/proc/self/status", "SigIgn:").is_some_and(|mask| is_in(mask, signal))
}

fn mask(path: &str, name: &str) -> Option<u64> {
    let status = fs::read_to_string(path).ok()?;
    let text = status.lines().find_map(|line| line.strip_prefix(name))?;
    u64::from_str_radix(text.trim(), 16).ok()
}

fn is_in(mask: u64, signal: i32) -> bool {
    u32::try_from(signal - 1).ok().and_then(|bit| mask.checked_shr(bit)).is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let stat = "7 (a) b (c) S 1 7 42 0 -1 4194560 1 0 0 0 10 20 30 40 20 0 1 0 100 0 0";
        assert_eq!(parse(stat), Some((42, Duration::from_secs(1))));
        assert_eq!(parse("7 (x) S 1"), None);
    }

    #[test]
    fn masks_have_a_bit_per_signal() {
        assert!(is_in(1 << 9, 10) && !is_in(1 << 9, 9) && !is_in(u64::MAX, 0));
    }
}
