//! Whether the ranks of this node stand still.
//!
//! Ranks that know the link say every second how much they have got done, and whether more is
//! expected of them. A rank that is alone at work, as one that saves, keeps the others waiting for
//! as long as it takes. If there are several nodes, such a rank may be on another one: the agent
//! reports that its ranks wait, and the coordinator decides whether the round hangs. Of other
//! programs only the CPU time that they use is known. Time comes in as an argument, as for the
//! agent.

use std::collections::BTreeMap;
use std::time::Duration;

use ice_proto::link::Doing;
use ice_proto::rendezvous::{Achieved, NodeProgress};

use crate::cli::HangTimeout;

/// For ranks that report their steps. Longer than the longest step, evaluation or write of a checkpoint that anyone
/// waits for; as long as NCCL's own timeout.
const DEFAULT: Duration = Duration::from_secs(600);
/// Heartbeats come every second, and are not to be taken for a standstill.
const SHORTEST: Duration = Duration::from_secs(3);
/// A rank that uses less of a core than this does nothing but wait.
const IDLE: f64 = 0.02;
/// A rank whose heartbeat is this late is silent.
const SILENT: Duration = Duration::from_millis(2500);

/// What is known of a rank.
#[derive(Debug, Clone, Copy)]
enum Pulse {
    /// Nothing to go by yet.
    None,
    Steps {
        step: u64,
        activity: u64,
        doing: Doing,
        changed: Duration,
        heard: Duration,
    },
    /// The rank has a file that it touches.
    File {
        /// When it did last, by the clock of files.
        touched: Duration,
        /// When that was seen.
        changed: Duration,
    },
    Cpu {
        used: Duration,
        sampled: Duration,
        changed: Duration,
    },
}

impl Pulse {
    /// When the rank last did something.
    fn changed(&self) -> Option<Duration> {
        match self {
            Self::None => None,
            Self::Steps { changed, .. } | Self::File { changed, .. } | Self::Cpu { changed, .. } => {
                Some(*changed)
            }
        }
    }
}

/// A job that stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hang {
    /// The rank that is behind, as far as can be seen from here.
    pub(crate) local_rank: u32,
    pub(crate) reason: String,
    /// When the last rank still did something.
    pub(crate) since: Duration,
    /// Whether it does not even say that it lives: how it got there is not to be seen then.
    pub(crate) is_silent: bool,
    /// The process and the signal to end it by, before its rank is ended.
    pub(crate) ends_by: Option<(u32, i32)>,
}

pub(crate) struct HangWatch {
    timeout: HangTimeout,
    ranks: BTreeMap<u32, Pulse>,
    period: Duration,
    /// Whether other nodes have ranks, too.
    several_nodes: bool,
    /// Progress of this node that the coordinator has heard of.
    told: NodeProgress,
}

impl HangWatch {
    pub(crate) fn new(timeout: HangTimeout, monitor_interval: Duration) -> Self {
        let (ranks, told) = (BTreeMap::new(), NodeProgress::Working);
        Self { timeout, ranks, period: monitor_interval, several_nodes: false, told }
    }

    /// A round begins, with so many ranks on this node, and others where there are several nodes.
    pub(crate) fn start(&mut self, ranks: u32, nodes: u32) {
        (self.several_nodes, self.told) = (nodes > 1, NodeProgress::Working);
        self.ranks = (0..ranks).map(|rank| (rank, Pulse::None)).collect();
    }

    /// A rank has ended.
    pub(crate) fn gone(&mut self, local_rank: u32) {
        self.ranks.remove(&local_rank);
    }

    pub(crate) fn heartbeat(
        &mut self,
        now: Duration,
        local_rank: u32,
        step: u64,
        activity: u64,
        doing: Doing,
    ) {
        let Some(pulse) = self.ranks.get_mut(&local_rank) else { return };
        let changed = match *pulse {
            Pulse::Steps { activity: before, doing: what, changed, .. }
                if (before, what) == (activity, doing) =>
            {
                changed
            }
            _ => now,
        };
        *pulse = Pulse::Steps { step, activity, doing, changed, heard: now };
    }

    /// How often files, and CPU times where [`HangWatch::wants_cpu_times`], are to be looked at;
    /// never where hangs are of no interest.
    pub(crate) fn sampling(&self) -> Option<Duration> {
        let timeout = match self.timeout {
            HangTimeout::Never => return None,
            HangTimeout::Default => DEFAULT,
            HangTimeout::After(timeout) => timeout,
        };
        let plain = self.ranks.values().any(|pulse| !matches!(pulse, Pulse::Steps { .. }));
        plain.then(|| {
            (timeout / 10).clamp(Duration::from_millis(20), Duration::from_secs(10)).max(self.period)
        })
    }

    /// Whether the CPU times of ranks count. They say little, so the user has to ask for it.
    pub(crate) fn wants_cpu_times(&self) -> bool {
        matches!(self.timeout, HangTimeout::After(_))
    }

    /// When a rank has touched its file last. From the first time on, that is what counts of a
    /// program that does not know the link.
    pub(crate) fn touched(&mut self, now: Duration, local_rank: u32, touched: Duration) {
        match self.ranks.get_mut(&local_rank) {
            None | Some(Pulse::Steps { .. }) => {}
            Some(Pulse::File { touched: before, .. }) if *before == touched => {}
            Some(pulse) => *pulse = Pulse::File { touched, changed: now },
        }
    }

    /// The CPU time that a rank and all that came of it have used.
    pub(crate) fn cpu_time(&mut self, now: Duration, local_rank: u32, used: Duration) {
        match self.ranks.get_mut(&local_rank) {
            Some(pulse @ Pulse::None) => *pulse = Pulse::Cpu { used, sampled: now, changed: now },
            Some(Pulse::Cpu { used: before, sampled, changed }) => {
                let passed = now.saturating_sub(*sampled).as_secs_f64();
                // Less than before where a child has ended.
                let spent = used.as_secs_f64() - before.as_secs_f64();
                if spent < 0.0 || spent > IDLE * passed {
                    *changed = now;
                }
                (*before, *sampled) = (used, now);
            }
            _ => {}
        }
    }

    fn timeout_of(&self, pulse: &Pulse) -> Option<Duration> {
        match (self.timeout, pulse) {
            (_, Pulse::None | Pulse::Steps { doing: Doing::Alone | Doing::Resting, .. }) => None,
            (_, Pulse::Steps { .. }) => self.timeout_of_steps(),
            (HangTimeout::Never, Pulse::File { .. }) => None,
            (HangTimeout::Default, Pulse::File { .. }) => Some(DEFAULT),
            (HangTimeout::After(timeout), Pulse::File { .. }) => Some(timeout),
            (HangTimeout::After(timeout), Pulse::Cpu { .. }) => Some(timeout),
            (HangTimeout::Default | HangTimeout::Never, Pulse::Cpu { .. }) => None,
        }
    }

    /// For ranks that know the link.
    fn timeout_of_steps(&self) -> Option<Duration> {
        match self.timeout {
            HangTimeout::Never => None,
            HangTimeout::Default => Some(DEFAULT),
            HangTimeout::After(timeout) => Some(timeout.max(SHORTEST)),
        }
    }

    /// Whether a rank is one that the others may rightly wait for, however long that takes. Once
    /// there were steps, a process that starts has as long as a step.
    fn is_waited_for(&self, pulse: &Pulse) -> bool {
        let there_were_steps =
            || self.ranks.values().any(|pulse| matches!(pulse, Pulse::Steps { step: 1.., .. }));
        match pulse {
            Pulse::None | Pulse::Steps { step: 0, doing: Doing::Alone, .. } => !there_were_steps(),
            Pulse::Steps { doing, .. } => *doing == Doing::Alone,
            Pulse::File { .. } | Pulse::Cpu { .. } => false,
        }
    }

    /// A rank that does not begin may be what the others wait for, as may one that left the steps
    /// before them. One that rests is not.
    fn may_be_behind(&self, pulse: &Pulse) -> bool {
        !matches!(pulse, Pulse::None | Pulse::Steps { doing: Doing::Resting, .. })
    }

    /// When a rank will have been silent for too long, or the last one that still did something will have stood still.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let dues = [self.silence(), self.neglect()].into_iter().flatten().map(|(due, _)| due);
        let waits = self.waits_at().filter(|_| self.told == NodeProgress::Working);
        dues.chain(self.standstill()).chain(waits).min()
    }

    /// When the ranks of this node will have got nothing done for the timeout, if other nodes decide
    /// whether that is a hang. A node that does well is never due, so it sends nothing.
    fn waits_at(&self) -> Option<Duration> {
        if !self.is_one_of_several() || self.ranks.values().any(|pulse| self.is_waited_for(pulse)) {
            return None;
        }
        let due = self.ranks.values().filter_map(Pulse::changed).max()? + self.timeout_of_steps()?;
        // A silent rank does not wait, and its silence is a failure without the other nodes.
        let is_silent = |pulse: &Pulse| matches!(pulse, Pulse::Steps { heard, .. } if *heard + SILENT < due);
        (!self.ranks.values().any(is_silent)).then_some(due)
    }

    /// Whether other nodes have to say whether a standstill of this one is a hang. Plain programs
    /// hang by themselves.
    fn is_one_of_several(&self) -> bool {
        let is_plain = |pulse: &Pulse| matches!(pulse, Pulse::File { .. } | Pulse::Cpu { .. });
        self.several_nodes && !self.ranks.values().any(is_plain)
    }

    fn progress(&self, now: Duration) -> NodeProgress {
        if self.waits_at().is_none_or(|due| now < due) {
            return NodeProgress::Working;
        }
        let achieved = |pulse: &Pulse| match *pulse {
            Pulse::Steps { step, activity, .. } if self.may_be_behind(pulse) => {
                Some(Achieved { step, activity })
            }
            _ => None,
        };
        let least = self.ranks.values().filter_map(achieved).min();
        least.map_or(NodeProgress::Resting, NodeProgress::Waiting)
    }

    /// The progress of this node, if it is not what the coordinator has heard of last.
    pub(crate) fn news(&mut self, now: Duration) -> Option<NodeProgress> {
        let progress = self.progress(now);
        (std::mem::replace(&mut self.told, progress) != progress).then_some(progress)
    }

    /// The rank that is behind, once the coordinator has found that no node works and that this one
    /// is behind. None if its ranks got something done meanwhile.
    pub(crate) fn confirmed(&self, now: Duration) -> Option<Hang> {
        matches!(self.progress(now), NodeProgress::Waiting(_)).then(|| self.behind(now)).flatten()
    }

    /// When a rank will not have touched its file for too long, and which one. That others do
    /// something is no excuse: the file is a promise of this rank.
    fn neglect(&self) -> Option<(Duration, u32)> {
        let due = |(rank, pulse): (&u32, &Pulse)| match pulse {
            Pulse::File { changed, .. } => Some((*changed + self.timeout_of(pulse)?, *rank)),
            _ => None,
        };
        self.ranks.iter().filter_map(due).min()
    }

    /// Whether a rank has not touched its file for too long.
    fn check_neglect(&self, now: Duration) -> Option<Hang> {
        let (_, local_rank) = self.neglect().filter(|(due, _)| *due <= now)?;
        let pulse = self.ranks.get(&local_rank)?;
        let (since, timeout) = (pulse.changed()?, self.timeout_of(pulse)?.as_secs_f64());
        let reason = format!("it did not touch its heartbeat file for {timeout} s");
        Some(Hang { local_rank, reason, since, is_silent: false, ends_by: None })
    }

    /// When a rank will have been silent for too long, and which one: whatever it is doing, a process that runs says so.
    pub(crate) fn silence(&self) -> Option<(Duration, u32)> {
        let timeout = self.timeout_of_steps()?;
        let due = |(rank, pulse): (&u32, &Pulse)| match pulse {
            Pulse::Steps { heard, .. } => Some((*heard + timeout, *rank)),
            _ => None,
        };
        self.ranks.iter().filter_map(due).min()
    }

    /// When the last rank that still did something will have stood still for too long, if this agent
    /// can tell.
    fn standstill(&self) -> Option<Duration> {
        if self.is_one_of_several() || self.ranks.values().any(|pulse| self.is_waited_for(pulse)) {
            return None;
        }
        let due = |pulse: &Pulse| Some(pulse.changed()? + self.timeout_of(pulse)?);
        self.ranks.values().filter_map(due).max()
    }

    /// Whether a rank is silent for too long.
    pub(crate) fn check_silence(&self, now: Duration) -> Option<Hang> {
        let (_, local_rank) = self.silence().filter(|(due, _)| *due <= now)?;
        let Some(Pulse::Steps { step, heard, .. }) = self.ranks.get(&local_rank) else { return None };
        let silent = now.saturating_sub(*heard).as_secs_f64();
        let reason = format!(
            "it was at step {step} when it was last heard of, and has been silent for {silent:.0} s: it is stopped, or gets no CPU"
        );
        Some(Hang { local_rank, reason, since: *heard, is_silent: true, ends_by: None })
    }

    /// Whether a rank is silent, or all that are at work stand still, for too long.
    pub(crate) fn check(&self, now: Duration) -> Option<Hang> {
        if let Some(hang) = self.check_neglect(now) {
            return Some(hang);
        }
        if self.standstill().is_none_or(|at| now < at) {
            return self.check_silence(now);
        }
        self.behind(now)
    }

    /// The rank that is behind, of ranks that stand still.
    fn behind(&self, now: Duration) -> Option<Hang> {
        let watched: Vec<_> = self.ranks.iter().filter(|(_, pulse)| self.may_be_behind(pulse)).collect();
        let (behind, pulse) = watched.iter().min_by_key(|(_, pulse)| match pulse {
            Pulse::Steps { step, activity, heard, .. } => (*step, *activity, *heard),
            Pulse::File { changed, .. } | Pulse::Cpu { changed, .. } => (0, 0, *changed),
            Pulse::None => (u64::MAX, u64::MAX, Duration::MAX),
        })?;
        let still = self.ranks.values().find_map(|pulse| self.timeout_of(pulse))?.as_secs_f64();
        let since = self.ranks.values().filter_map(Pulse::changed).max().unwrap_or(now);
        let reason = match pulse {
            Pulse::Steps { step, heard, .. } => {
                let silent = match now.saturating_sub(*heard) {
                    late if late > SILENT => format!(", silent for {:.0} s", late.as_secs_f64()),
                    _ => String::new(),
                };
                let most = watched.iter().filter_map(|(_, pulse)| match pulse {
                    Pulse::Steps { step, .. } => Some(*step),
                    _ => None,
                });
                let most = most.max().unwrap_or(*step);
                format!("no rank got anything done for {still} s; it is at step {step} of {most}{silent}")
            }
            _ => format!("no rank used the CPU for {still} s"),
        };
        let is_silent = self.silence().is_some_and(|(due, rank)| due <= now && rank == **behind);
        Some(Hang { local_rank: **behind, reason, since, is_silent, ends_by: None })
    }
}

#[cfg(test)]
mod tests;
