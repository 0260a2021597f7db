//! Parsers for options that are lists, sizes or seconds.

use std::collections::BTreeSet;
use std::str::FromStr;
use std::time::Duration;

use nix::sys::signal::Signal;

/// Parses numbers and ranges, such as `2,64-78`.
pub(super) fn numbers<T>(text: &str) -> Result<BTreeSet<T>, String>
where
    T: FromStr + Ord + Copy + TryFrom<u32>,
    u32: From<T>,
{
    let mut found = BTreeSet::new();
    for part in text.split(',').map(str::trim).filter(|_| !text.trim().is_empty()) {
        let wrong = || format!("`{part}` is not a number or a range such as 64-78");
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: T = first.trim().parse().map_err(|_| wrong())?;
        let last: T = last.trim().parse().map_err(|_| wrong())?;
        let (first, last) = (u32::from(first), u32::from(last));
        if first > last || last - first > 1 << 16 {
            return Err(wrong());
        }
        found.extend((first..=last).filter_map(|number| T::try_from(number).ok()));
    }
    Ok(found)
}

/// Parses texts such as `apple,orange`, in which `,,` stands for a comma.
pub(super) fn texts(text: &str) -> Result<Vec<String>, String> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let mut found = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match (letter, letters.peek()) {
            (',', Some(',')) => {
                letters.next();
                found.last_mut().into_iter().for_each(|last| last.push(','));
            }
            (',', _) => found.push(String::new()),
            (letter, _) => found.last_mut().into_iter().for_each(|last| last.push(letter)),
        }
    }
    match found.iter().any(String::is_empty) {
        // An empty text would match every line.
        true => Err(format!("`{text}` has an empty part: expected texts such as apple,orange")),
        false => Ok(found),
    }
}

/// Parses names of signals that a process can handle, such as `SIGTERM,usr1`.
pub(crate) fn signals(text: &str) -> Result<Vec<Signal>, String> {
    let (found, unknown) = known_signals(text)?;
    match unknown.first() {
        Some(name) => Err(format!("`{name}` is not the name of a signal")),
        None => Ok(found),
    }
}

/// Returns the signals of a list, and the names in it that this system does not know.
pub(super) fn known_signals(text: &str) -> Result<(Vec<Signal>, Vec<String>), String> {
    let (mut found, mut unknown) = (Vec::new(), Vec::new());
    for name in text.split(',').map(str::trim).filter(|_| !text.trim().is_empty()) {
        let upper = name.to_ascii_uppercase();
        let full = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
        if name.is_empty() {
            return Err(format!("`{text}` has an empty part: expected names such as SIGTERM,SIGINT"));
        }
        let Ok(signal) = Signal::from_str(&full) else {
            unknown.push(name.to_owned());
            continue;
        };
        match signal {
            Signal::SIGKILL | Signal::SIGSTOP => {
                return Err(format!("`{name}` cannot be handled by any process"));
            }
            Signal::SIGTSTP | Signal::SIGCONT | Signal::SIGCHLD => {
                return Err(format!("`{name}` has a meaning of its own here and cannot stop the job"));
            }
            Signal::SIGSEGV
            | Signal::SIGBUS
            | Signal::SIGILL
            | Signal::SIGFPE
            | Signal::SIGTRAP
            | Signal::SIGABRT => {
                return Err(format!("`{name}` tells of a fault in the process that gets it"));
            }
            signal if found.contains(&signal) => {}
            signal => found.push(signal),
        }
    }
    Ok((found, unknown))
}

/// Parses a number of bytes such as `4096`, `64K`, `100M` or `2G`, in powers of 1024.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size such as 64K, 100M or 2G");
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "K" | "KB" | "KIB" => 1 << 10,
        "M" | "MB" | "MIB" => 1 << 20,
        "G" | "GB" | "GIB" => 1 << 30,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.trim().parse().map_err(|_| wrong())?;
    number.checked_mul(unit).filter(|size| *size > 0).ok_or_else(wrong)
}

/// Converts a number of seconds. Negative and infinite numbers are errors.
pub(super) fn seconds(value: f64) -> Result<Duration, String> {
    if !value.is_finite() {
        return Err(format!("{value} is not a number of seconds"));
    }
    // A year is as good as forever, and sums of times do not overflow.
    const YEAR: f64 = 366.0 * 24.0 * 3600.0;
    let value = if value > YEAR { YEAR } else { value };
    Duration::try_from_secs_f64(value).map_err(|_| format!("{value} is not a number of seconds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_ranges() {
        let codes = |text| numbers::<u8>(text).map(|codes| codes.into_iter().collect::<Vec<_>>());
        assert_eq!(codes("2, 64-66").unwrap(), [2, 64, 65, 66]);
        assert_eq!(codes("").unwrap(), [0_u8; 0]);
        for wrong in ["x", "1-", "3-1", "256", "-1", "1,,2", "1,", ","] {
            assert!(codes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn two_commas_are_one() {
        assert_eq!(texts("apple,orange").unwrap(), ["apple", "orange"]);
        assert_eq!(texts("a,,b,c").unwrap(), ["a,b", "c"]);
        assert_eq!(texts(",,").unwrap(), [","]);
        assert_eq!(texts("").unwrap(), [""; 0]);
        for wrong in [",", "a,", ",a", "a,,,b,"] {
            assert!(texts(wrong).unwrap_err().contains("empty part"), "{wrong}");
        }
    }

    #[test]
    fn signals_by_name() {
        assert_eq!(signals("SIGTERM, usr1,TERM").unwrap(), [Signal::SIGTERM, Signal::SIGUSR1]);
        let (found, unknown) = known_signals("SIGTERM,SIGBREAK").unwrap();
        assert_eq!((found, unknown), (vec![Signal::SIGTERM], vec!["SIGBREAK".to_owned()]));
        for wrong in ["SIGTERM,", ",", "SIGTERM,,SIGINT"] {
            assert!(signals(wrong).unwrap_err().contains("empty part"), "{wrong}");
        }
        for wrong in ["SIGKILL", "SIGNOTHING", "SIGCHLD", "9"] {
            assert!(signals(wrong).unwrap_err().contains(wrong), "{wrong}");
        }
    }

    #[test]
    fn sizes_and_seconds() {
        assert_eq!((bytes("4096"), bytes("64k"), bytes("2G")), (Ok(4096), Ok(65536), Ok(2 << 30)));
        for wrong in ["", "M", "0", "1T", "-1", "99999999999G"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
        assert_eq!(seconds(0.25), Ok(Duration::from_millis(250)));
        assert!(seconds(1e300).unwrap() < Duration::from_secs(40_000_000));
        assert!(seconds(-1.0).is_err() && seconds(f64::NAN).is_err() && seconds(f64::INFINITY).is_err());
    }
}
