//! The kernel's lists of CPUs, such as `0-3,8,10-11`.

use std::collections::BTreeSet;

/// Parses a list. The list of a NUMA node without CPUs, which has only memory, is empty.
pub(crate) fn parse(text: &str) -> Option<BTreeSet<u32>> {
    let mut cpus = BTreeSet::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// Formats CPUs as a list.
pub(crate) fn format(cpus: &BTreeSet<u32>) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let range = |(first, last): (u32, u32)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    ranges.into_iter().map(range).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_comes_back_as_it_was() {
        for (text, cpus) in
            [("", vec![]), ("5", vec![5]), ("0-3,8,10-11", vec![0, 1, 2, 3, 8, 10, 11]), ("0,2", vec![0, 2])]
        {
            let cpus = cpus.into_iter().collect::<BTreeSet<_>>();
            assert_eq!(parse(text), Some(cpus.clone()), "{text}");
            assert_eq!(format(&cpus), text);
        }
        assert_eq!(parse("0-1, 4\n"), parse("0,1,4"));
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in ["x", "3-1", "1-", "-1", "0-1-2"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
