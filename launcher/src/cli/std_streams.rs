//! `--redirects` and `--tee`: selected streams of selected ranks.

use std::collections::BTreeMap;

/// Standard streams of a rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Streams {
    /// Standard output.
    pub(crate) stdout: bool,
    /// Standard error.
    pub(crate) stderr: bool,
}

/// Streams by local rank.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PerRank {
    all: Streams,
    some: BTreeMap<u32, Streams>,
}

impl PerRank {
    /// Returns the selected streams of a rank. If the option names single ranks, all others have
    /// none.
    pub(crate) fn of(&self, local_rank: u32) -> Streams {
        self.some.get(&local_rank).copied().unwrap_or(self.all)
    }

    /// Whether the option selects no stream of any rank.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the highest local rank that the option names.
    pub(super) fn highest(&self) -> Option<u32> {
        self.some.last_key_value().map(|(rank, _)| *rank)
    }

    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let value = |text: &str| match text {
            "0" => Ok(Streams::default()),
            "1" => Ok(Streams { stdout: true, stderr: false }),
            "2" => Ok(Streams { stdout: false, stderr: true }),
            "3" => Ok(Streams { stdout: true, stderr: true }),
            _ => Err(format!("`{text}` is none of 0, 1, 2, 3, or a list such as 0:1,1:3")),
        };
        if !text.contains(':') {
            return Ok(Self { all: value(text)?, some: BTreeMap::new() });
        }
        let mut some = BTreeMap::new();
        for part in text.split(',') {
            let (rank, streams) =
                part.split_once(':').ok_or_else(|| format!("`{part}` is not rank:value"))?;
            let rank = rank.parse().map_err(|_| format!("`{rank}` is not a local rank"))?;
            if some.insert(rank, value(streams)?).is_some() {
                return Err(format!("`{text}` names rank {rank} twice"));
            }
        }
        Ok(Self { all: Streams::default(), some })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_or_one_per_rank() {
        let all = PerRank::parse("3").unwrap();
        assert_eq!(all.of(7), Streams { stdout: true, stderr: true });
        let some = PerRank::parse("0:1,2:2").unwrap();
        assert_eq!(some.of(0), Streams { stdout: true, stderr: false });
        assert_eq!(some.of(1), Streams::default());
        assert_eq!(some.of(2), Streams { stdout: false, stderr: true });
        assert_eq!((all.highest(), some.highest()), (None, Some(2)));
        for wrong in ["4", "", "0:4", "x:1", "0:1,2", "0:1,0:2", "0:1,,1:2", "0:1,"] {
            assert!(PerRank::parse(wrong).is_err(), "{wrong}");
        }
    }
}
