//! Slurm's host lists.
//!
//! ```text
//! list := name { "," name }               name   := { text | "[" ranges "]" }
//! ranges := range { "," range }           range  := number [ "-" number ]
//! ```
//!
//! Numbers have the width of the first number of their range: `n[08-10]` is `n08 n09 n10`. Several
//! brackets in a name count like an odometer: the last one fastest.

/// More nodes than any job has. The limit bounds the memory that a list can ask for.
const MOST_HOSTS: u64 = 65_536;
/// Long enough for [`MOST_HOSTS`] nodes of which no two form a range.
const LONGEST_LIST: usize = 1 << 20;
/// Length of the longest name in DNS.
const LONGEST_NAME: usize = 253;

/// Returns the hosts that a list names, in its order.
pub(super) fn expand(list: &str) -> Result<Vec<String>, String> {
    if list.len() > LONGEST_LIST {
        return Err(format!("{} bytes, and a host list has at most {LONGEST_LIST}", list.len()));
    }
    let mut hosts = Vec::new();
    for piece in pieces(list)? {
        let name = Name::parse(piece).map_err(|problem| format!("in `{}`: {problem}", short(piece)))?;
        let count = name.count().filter(|count| hosts.len() as u64 + count <= MOST_HOSTS);
        let count = count.ok_or_else(|| format!("`{}` makes more than {MOST_HOSTS} hosts", short(piece)))?;
        for index in 0..count {
            let host = name.host(index);
            if host.len() > LONGEST_NAME {
                return Err(format!("`{}` is longer than a host name can be", short(piece)));
            }
            hosts.push(host);
        }
    }
    if hosts.is_empty() {
        return Err("it names no host".into());
    }
    Ok(hosts)
}

/// Splits a list into names at the commas outside of brackets.
fn pieces(list: &str) -> Result<Vec<&str>, String> {
    let (mut pieces, mut start, mut open) = (Vec::new(), 0, false);
    for (at, byte) in list.bytes().enumerate() {
        match byte {
            b'[' if open => return Err(format!("`[` within `[` in `{}`", short(&list[start..]))),
            b']' if !open => return Err(format!("`]` without `[` in `{}`", short(&list[start..]))),
            b'[' => open = true,
            b']' => open = false,
            b',' if !open => {
                pieces.push(list[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    if open {
        return Err(format!("`[` without `]` in `{}`", short(&list[start..])));
    }
    pieces.push(list[start..].trim());
    // Slurm itself ignores empty names, for example after a last comma.
    pieces.retain(|piece| !piece.is_empty());
    Ok(pieces)
}

enum Part<'a> {
    Text(&'a str),
    Ranges(Vec<Range>),
}

struct Range {
    first: u64,
    last: u64,
    width: usize,
}

struct Name<'a>(Vec<Part<'a>>);

impl<'a> Name<'a> {
    fn parse(piece: &'a str) -> Result<Self, String> {
        let (mut parts, mut rest) = (Vec::new(), piece);
        while let Some((text, bracket)) = rest.split_once('[') {
            let (ranges, behind) = bracket.split_once(']').ok_or("`[` without `]`")?;
            parts.push(Part::Text(plain(text)?));
            parts.push(Part::Ranges(ranges.split(',').map(Range::parse).collect::<Result<_, _>>()?));
            rest = behind;
        }
        parts.push(Part::Text(plain(rest)?));
        Ok(Self(parts))
    }

    /// Returns the number of hosts that the name stands for. `None` if the number overflows.
    fn count(&self) -> Option<u64> {
        self.0.iter().try_fold(1_u64, |count, part| match part {
            Part::Text(_) => Some(count),
            Part::Ranges(ranges) => count.checked_mul(total(ranges)?),
        })
    }

    fn host(&self, mut index: u64) -> String {
        // From the last bracket to the first, because the last one counts fastest.
        let mut parts = Vec::with_capacity(self.0.len());
        for part in self.0.iter().rev() {
            parts.push(match part {
                Part::Text(text) => (*text).to_owned(),
                Part::Ranges(ranges) => {
                    let count = total(ranges).unwrap_or(u64::MAX);
                    let number = nth(ranges, index % count);
                    index /= count;
                    number
                }
            });
        }
        parts.reverse();
        parts.concat()
    }
}

impl Range {
    fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{}` is neither a number nor a range", short(text));
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
            true => text.parse::<u64>().map_err(|_| wrong()),
            false => Err(wrong()),
        };
        let range = Self { first: number(first)?, last: number(last)?, width: first.len() };
        if range.first > range.last {
            return Err(format!("`{}` runs backwards", short(text)));
        }
        if range.width > LONGEST_NAME {
            return Err(wrong());
        }
        Ok(range)
    }

    fn count(&self) -> Option<u64> {
        (self.last - self.first).checked_add(1)
    }
}

fn total(ranges: &[Range]) -> Option<u64> {
    ranges.iter().try_fold(0_u64, |total, range| total.checked_add(range.count()?))
}

fn nth(ranges: &[Range], mut index: u64) -> String {
    for range in ranges {
        let count = range.count().unwrap_or(u64::MAX);
        if index < count {
            return format!("{:0width$}", range.first + index, width = range.width);
        }
        index -= count;
    }
    String::new()
}

fn plain(text: &str) -> Result<&str, String> {
    let allowed = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
    match text.chars().find(|character| !allowed(*character)) {
        Some(character) => Err(format!("{character:?} is not part of a host name")),
        None => Ok(text),
    }
}

/// Returns the beginning of a text, for a message.
fn short(text: &str) -> String {
    let mut begin: String = text.chars().take(60).collect();
    if begin.len() < text.len() {
        begin.push('…');
    }
    begin
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_of_the_grammar() {
        for (list, hosts) in [
            ("node7", "node7"),
            ("node[001-003,7]", "node001 node002 node003 node7"),
            ("a1,b[2-3]-ib", "a1 b2-ib b3-ib"),
            (
                "rack[1-2]node[01-03]",
                "rack1node01 rack1node02 rack1node03 rack2node01 rack2node02 rack2node03",
            ),
            ("n[08-10]", "n08 n09 n10"),
            ("n[9-11]", "n9 n10 n11"),
            ("n[0-1,00-01]", "n0 n1 n00 n01"),
            ("[1-2].cluster.example", "1.cluster.example 2.cluster.example"),
            ("gpu-a_1.example, gpu-b,", "gpu-a_1.example gpu-b"),
            ("n[1-2][3-4]", "n13 n14 n23 n24"),
            ("n[18446744073709551615]", "n18446744073709551615"),
        ] {
            assert_eq!(expand(list).unwrap().join(" "), hosts, "{list}");
        }
        assert_eq!(expand("n[1-65536]").unwrap().len(), 65_536);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (list, named) in [
            ("", "no host"),
            (",", "no host"),
            ("n[1-3", "`n[1-3`"),
            ("a,n1-3]", "`n1-3]`"),
            ("n[1,[2]]", "`[` within `[`"),
            ("n[]", "``"),
            ("n[1-]", "`1-`"),
            ("n[1-2-3]", "`1-2-3`"),
            ("n[x]", "`x`"),
            ("n[+1]", "`+1`"),
            ("n[3-1]", "`3-1` runs backwards"),
            ("n[1-99999999]", "`n[1-99999999]` makes more than 65536"),
            ("n[0-18446744073709551615]", "makes more than 65536"),
            ("n[18446744073709551616]", "`18446744073709551616`"),
            ("n[0-9999]r[0-9999]s[0-9999]t[0-9999]u[0-9999]", "makes more than 65536"),
            ("m[1-65536],n1", "`n1` makes more than 65536"),
            ("a b", "' '"),
            ("n;rm", "';'"),
            ("ä1", "'ä'"),
        ] {
            let error = expand(list).unwrap_err();
            assert!(error.contains(named), "{list}: {error}");
        }
        assert!(expand(&"n".repeat(254)).is_err());
        assert!(expand(&"n,".repeat(1 << 20)).unwrap_err().contains("at most"));
        assert!(expand(&format!("n[{}1]", "0".repeat(300))).is_err());
    }

    /// Numbers with their widths, between a prefix and a suffix.
    type Group = (String, Vec<(u64, usize)>, String);

    /// Formats names like Slurm: consecutive numbers of the same width become a range.
    fn compress(groups: &[Group]) -> String {
        let names = groups.iter().map(|(prefix, numbers, suffix)| {
            let mut ranges: Vec<(u64, u64, usize)> = Vec::new();
            for (number, width) in numbers {
                match ranges.last_mut() {
                    Some((_, last, of)) if of == width && last.checked_add(1) == Some(*number) => {
                        *last = *number;
                    }
                    _ => ranges.push((*number, *number, *width)),
                }
            }
            let ranges = ranges.iter().map(|(first, last, width)| match first == last {
                true => format!("{first:0width$}"),
                false => format!("{first:0width$}-{last:0width$}"),
            });
            format!("{prefix}[{}]{suffix}", ranges.collect::<Vec<_>>().join(","))
        });
        names.collect::<Vec<_>>().join(",")
    }

    fn numbers() -> impl Strategy<Value = Vec<(u64, usize)>> {
        // Runs of numbers, so that the result contains ranges.
        let run = (0_u64..2000, 1_usize..6, 1_u64..6)
            .prop_map(|(first, width, count)| (first..first + count).map(move |number| (number, width)));
        prop::collection::vec(run, 1..5).prop_map(|runs| runs.into_iter().flatten().collect())
    }

    proptest! {
        #[test]
        fn what_is_compressed_comes_back(
            groups in prop::collection::vec(("[a-z][a-z.-]{0,5}", numbers(), "(-ib|\\.local|)"), 1..6)
        ) {
            let hosts: Vec<_> = groups
                .iter()
                .flat_map(|(prefix, numbers, suffix)| {
                    numbers.iter().map(move |(number, width)| format!("{prefix}{number:0width$}{suffix}"))
                })
                .collect();
            prop_assert_eq!(expand(&compress(&groups)).unwrap(), hosts);
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = expand(&text);
        }

        #[test]
        fn no_text_of_the_grammars_characters_panics(text in "[n0-9\\[\\],-]{0,40}") {
            if let Ok(hosts) = expand(&text) {
                prop_assert!(!hosts.is_empty() && hosts.len() as u64 <= MOST_HOSTS);
            }
        }
    }
}
