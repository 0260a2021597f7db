//! Parsers for options that are numbers. clap's own parsers only report "invalid digit found in
//! string".

use std::str::FromStr;

/// Parses a whole number from 0.
pub(super) fn count(text: &str) -> Result<u32, String> {
    digits(text, u32::MAX)
}

/// Parses a port.
pub(super) fn port(text: &str) -> Result<u16, String> {
    digits(text, u16::MAX)
}

/// Parses a number of seconds that is neither negative, infinite nor NaN.
pub(super) fn seconds(text: &str) -> Result<f64, String> {
    let number = text.trim().parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "expected a number of seconds from 0, such as 30 or 0.5".into())
}

fn digits<T: FromStr + std::fmt::Display>(text: &str, most: T) -> Result<T, String> {
    let text = text.trim();
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = if is_number { text.parse().ok() } else { None };
    number.ok_or_else(|| format!("expected a whole number from 0 to {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_at_their_edges() {
        assert_eq!((count("0"), count(" 7 "), port("65535")), (Ok(0), Ok(7), Ok(65535)));
        assert_eq!((seconds("0"), seconds("1e3"), seconds("0.5")), (Ok(0.0), Ok(1000.0), Ok(0.5)));
        for wrong in ["", "-1", "+1", "1.5", "4294967296", "x", "0x1", "nan"] {
            assert!(count(wrong).unwrap_err().contains("from 0 to 4294967295"), "{wrong}");
        }
        assert!(port("65536").unwrap_err().contains("65535"));
        for wrong in ["", "-1", "-0.1", "nan", "inf", "-inf", "soon", "1e999"] {
            assert!(seconds(wrong).unwrap_err().contains("number of seconds"), "{wrong}");
        }
    }
}
