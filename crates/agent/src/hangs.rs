//! Detects whether the ranks of this node hang.
//!
//! Ranks that know the link report every second how much they have done, and whether more is
//! expected of them. The other ranks wait for a rank that works alone (it saves, for example) for
//! as long as its work takes. If there are several nodes, the rank that works alone may be on
//! another node: the agent reports that its ranks wait, and the coordinator decides whether the
//! round hangs. Other programs may touch a heartbeat file. Otherwise only the CPU time that they
//! use is known. The time is an argument, like in the agent.

use std::collections::BTreeMap;
use std::time::Duration;

use ice_proto::link::Doing;
use ice_proto::rendezvous::{Achieved, NodeProgress};

/// Timeout for ranks that report their steps. The timeout is longer than the longest step,
/// evaluation or write of a checkpoint that ranks wait for, and as long as NCCL's own timeout.
const DEFAULT: Duration = Duration::from_secs(600);
/// Lower limit of the timeout. Heartbeats come every second, so a shorter timeout would take the
/// pause between two of them for a hang.
const SHORTEST: Duration = Duration::from_secs(3);
/// Fraction of a core; a rank that uses less of it only waits.
const IDLE: f64 = 0.02;
/// Age of the last heartbeat from which on a rank is silent.
const SILENT: Duration = Duration::from_millis(2500);

/// Time without progress after which a job has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HangTimeout {
    /// The default for ranks that report their steps or touch a heartbeat file; no timeout for
    /// others.
    Default,
    /// No rank hangs.
    Never,
    /// This time, for all ranks.
    After(Duration),
}

/// Last known activity of a rank.
#[derive(Debug, Clone, Copy)]
enum Pulse {
    /// No information yet.
    None,
    Steps {
        /// Last step that the rank has reported over the link.
        step: u64,
        activity: u64,
        doing: Doing,
        changed: Duration,
        /// Time of the last heartbeat.
        heard: Duration,
    },
    /// The rank touches a heartbeat file.
    File {
        /// Modification time of the file, by the clock of the file system.
        touched: Duration,
        /// Time at which the agent saw that modification.
        changed: Duration,
    },
    Cpu {
        /// CPU time of the rank, which the agent samples because the program reports nothing.
        used: Duration,
        sampled: Duration,
        changed: Duration,
    },
}

impl Pulse {
    /// Returns the time of the rank's last known activity.
    fn changed(&self) -> Option<Duration> {
        match self {
            Self::None => None,
            Self::Steps { changed, .. } | Self::File { changed, .. } | Self::Cpu { changed, .. } => {
                Some(*changed)
            }
        }
    }
}

/// A hang of the job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hang {
    /// The rank that the others wait for, as far as this node can tell.
    pub local_rank: u32,
    /// The evidence, for the report.
    pub reason: String,
    /// Time of the last activity: of all ranks, or of this rank if it is silent or neglects its
    /// file.
    pub since: Duration,
    /// Whether the rank sends no heartbeats either. Its stacks are then not written, because it may
    /// be stopped.
    pub is_silent: bool,
    /// Process id and signal to end that process by, before its rank is ended. Set if a timer
    /// expired.
    pub ends_by: Option<(u32, i32)>,
}

/// Watches the ranks of a node for hangs.
pub struct HangWatch {
    timeout: HangTimeout,
    ranks: BTreeMap<u32, Pulse>,
    period: Duration,
    /// Whether the round has ranks on other nodes.
    several_nodes: bool,
    /// Progress of this node that the coordinator was last notified of.
    told: NodeProgress,
}

impl HangWatch {
    /// Creates the watch, which samples what ranks do not report every `monitor_interval`.
    pub fn new(timeout: HangTimeout, monitor_interval: Duration) -> Self {
        let (ranks, told) = (BTreeMap::new(), NodeProgress::Working);
        Self { timeout, ranks, period: monitor_interval, several_nodes: false, told }
    }

    /// Starts the watch of a round with `ranks` ranks on this node.
    pub fn start(&mut self, ranks: u32, nodes: u32) {
        (self.several_nodes, self.told) = (nodes > 1, NodeProgress::Working);
        self.ranks = (0..ranks).map(|rank| (rank, Pulse::None)).collect();
    }

    /// Stops watching a rank that has ended.
    pub fn gone(&mut self, local_rank: u32) {
        self.ranks.remove(&local_rank);
    }

    /// Records that the stacks of the ranks were written. A debugger stops a rank for seconds, which
    /// is not its silence.
    pub fn inspected(&mut self, now: Duration) {
        for pulse in self.ranks.values_mut() {
            if let Pulse::Steps { heard, .. } = pulse {
                *heard = now;
            }
        }
    }

    /// Notes what a rank reports of itself: its step, a count that changes with each activity, and
    /// what it does.
    pub fn heartbeat(&mut self, now: Duration, local_rank: u32, step: u64, activity: u64, doing: Doing) {
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

    /// Returns the interval in which heartbeat files (and CPU times, if
    /// [`HangWatch::wants_cpu_times`]) are sampled. `None` if hangs are not watched, or all ranks
    /// report their steps.
    pub fn sampling(&self) -> Option<Duration> {
        let timeout = match self.timeout {
            HangTimeout::Never => return None,
            HangTimeout::Default => DEFAULT,
            HangTimeout::After(timeout) => timeout,
        };
        let plain = self.ranks.values().any(|pulse| !matches!(pulse, Pulse::Steps { .. }));
        // A file tells when it was touched, so that a hang is found at most a tenth too late.
        let longest = Duration::from_secs(if self.wants_cpu_times() { 10 } else { 60 });
        plain.then(|| (timeout / 10).clamp(Duration::from_millis(20), longest).max(self.period))
    }

    /// Whether the CPU times of ranks count. CPU time is a weak sign of progress, so the user has
    /// to ask for it with an explicit timeout.
    pub fn wants_cpu_times(&self) -> bool {
        matches!(self.timeout, HangTimeout::After(_))
    }

    /// Records that a rank touched its file at `touched`. From its first touch on, the file is what
    /// counts for a program that does not know the link.
    pub fn touched(&mut self, now: Duration, local_rank: u32, touched: Duration) {
        match self.ranks.get_mut(&local_rank) {
            None | Some(Pulse::Steps { .. }) => {}
            Some(Pulse::File { touched: before, .. }) if *before == touched => {}
            Some(pulse) => *pulse = Pulse::File { touched, changed: now },
        }
    }

    /// Records the CPU time that a rank and all of its descendants have used.
    pub fn cpu_time(&mut self, now: Duration, local_rank: u32, used: Duration) {
        match self.ranks.get_mut(&local_rank) {
            Some(pulse @ Pulse::None) => *pulse = Pulse::Cpu { used, sampled: now, changed: now },
            Some(Pulse::Cpu { used: before, sampled, changed }) => {
                let passed = now.saturating_sub(*sampled).as_secs_f64();
                // The total decreases when a child has ended.
                let spent = used.as_secs_f64() - before.as_secs_f64();
                if spent < 0.0 || spent > IDLE * passed {
                    *changed = now;
                }
                (*before, *sampled) = (used, now);
            }
            _ => {}
        }
    }

    /// Returns the time that a rank with this pulse may spend without progress.
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

    /// Returns the timeout of ranks that know the link.
    fn timeout_of_steps(&self) -> Option<Duration> {
        match self.timeout {
            HangTimeout::Never => None,
            HangTimeout::Default => Some(DEFAULT),
            HangTimeout::After(timeout) => Some(timeout.max(SHORTEST)),
        }
    }

    /// Whether the other ranks may rightly wait for this one without a limit. Once there were
    /// steps, a starting process has only the timeout of a step.
    fn is_waited_for(&self, pulse: &Pulse) -> bool {
        match pulse {
            Pulse::None | Pulse::Steps { step: 0, doing: Doing::Alone, .. } => !self.there_were_steps(),
            Pulse::Steps { doing, .. } => *doing == Doing::Alone,
            Pulse::File { .. } | Pulse::Cpu { .. } => false,
        }
    }

    fn there_were_steps(&self) -> bool {
        self.ranks.values().any(|pulse| matches!(pulse, Pulse::Steps { step: 1.., .. }))
    }

    /// Whether this rank may be the one that the others wait for. A rank that has not begun its
    /// first step, or has left the steps before the others, may be, and so may a process without a
    /// heartbeat among ranks that did steps: it has not come as far as its link. A resting rank is
    /// not.
    fn may_be_behind(&self, pulse: &Pulse) -> bool {
        match pulse {
            Pulse::None => self.there_were_steps(),
            pulse => !matches!(pulse, Pulse::Steps { doing: Doing::Resting, .. }),
        }
    }

    /// Returns the next time at which [`HangWatch::check`] or [`HangWatch::news`] may have a
    /// result.
    pub fn deadline(&self) -> Option<Duration> {
        let dues = [self.silence(), self.neglect()].into_iter().flatten().map(|(due, _)| due);
        let waits = self.waits_at().filter(|_| self.told == NodeProgress::Working);
        dues.chain(self.standstill()).chain(waits).min()
    }

    /// Returns the time at which the ranks of this node will have made no progress for the timeout,
    /// if other nodes decide whether that is a hang. A node with progress is never due, so it sends
    /// nothing.
    fn waits_at(&self) -> Option<Duration> {
        if !self.is_one_of_several() || self.ranks.values().any(|pulse| self.is_waited_for(pulse)) {
            return None;
        }
        let due = self.ranks.values().filter_map(Pulse::changed).max()? + self.timeout_of_steps()?;
        // A silent rank does not wait: its silence is a failure by itself, whatever the other nodes
        // do.
        let is_silent = |pulse: &Pulse| matches!(pulse, Pulse::Steps { heard, .. } if *heard + SILENT < due);
        (!self.ranks.values().any(is_silent)).then_some(due)
    }

    /// Whether the coordinator has to decide whether a standstill of this node is a hang. The agent
    /// of plain programs decides alone.
    fn is_one_of_several(&self) -> bool {
        let is_plain = |pulse: &Pulse| matches!(pulse, Pulse::File { .. } | Pulse::Cpu { .. });
        self.several_nodes && !self.ranks.values().any(is_plain)
    }

    /// Returns the progress of this node: the least of its ranks' once they have stood still for
    /// the timeout.
    fn progress(&self, now: Duration) -> NodeProgress {
        if self.waits_at().is_none_or(|due| now < due) {
            return NodeProgress::Working;
        }
        let achieved = |pulse: &Pulse| match *pulse {
            _ if !self.may_be_behind(pulse) => None,
            Pulse::None => Some(Achieved { step: 0, activity: 0 }),
            Pulse::Steps { step, activity, .. } => Some(Achieved { step, activity }),
            Pulse::File { .. } | Pulse::Cpu { .. } => None,
        };
        let least = self.ranks.values().filter_map(achieved).min();
        least.map_or(NodeProgress::Resting, NodeProgress::Waiting)
    }

    /// Returns the progress of this node if it differs from the last one that the coordinator was
    /// notified of.
    pub fn news(&mut self, now: Duration) -> Option<NodeProgress> {
        let progress = self.progress(now);
        (std::mem::replace(&mut self.told, progress) != progress).then_some(progress)
    }

    /// Returns the rank that is behind, once the coordinator has found that no node works and that
    /// this node is behind. `None` if its ranks have made progress meanwhile.
    pub fn confirmed(&self, now: Duration) -> Option<Hang> {
        matches!(self.progress(now), NodeProgress::Waiting(_)).then(|| self.behind(now)).flatten()
    }

    /// Returns the time at which a rank will have left its file untouched for too long, and that
    /// rank. Activity of other ranks does not excuse it: the file is a promise of this rank.
    fn neglect(&self) -> Option<(Duration, u32)> {
        let due = |(rank, pulse): (&u32, &Pulse)| match pulse {
            Pulse::File { changed, .. } => Some((*changed + self.timeout_of(pulse)?, *rank)),
            _ => None,
        };
        self.ranks.iter().filter_map(due).min()
    }

    /// Returns a hang if a rank has not touched its file for too long.
    fn check_neglect(&self, now: Duration) -> Option<Hang> {
        let (_, local_rank) = self.neglect().filter(|(due, _)| *due <= now)?;
        let pulse = self.ranks.get(&local_rank)?;
        let (since, timeout) = (pulse.changed()?, self.timeout_of(pulse)?.as_secs_f64());
        let reason = format!("it did not touch its heartbeat file for {timeout} s");
        Some(Hang { local_rank, reason, since, is_silent: false, ends_by: None })
    }

    /// Returns the time at which a rank will have been silent for too long, and that rank. A
    /// process that runs sends heartbeats, whatever it is doing.
    pub fn silence(&self) -> Option<(Duration, u32)> {
        let timeout = self.timeout_of_steps()?;
        let due = |(rank, pulse): (&u32, &Pulse)| match pulse {
            Pulse::Steps { heard, .. } => Some((*heard + timeout, *rank)),
            _ => None,
        };
        self.ranks.iter().filter_map(due).min()
    }

    /// Returns the time at which all ranks will have stood still for too long, if this agent can
    /// tell.
    fn standstill(&self) -> Option<Duration> {
        if self.is_one_of_several() || self.ranks.values().any(|pulse| self.is_waited_for(pulse)) {
            return None;
        }
        let due = |pulse: &Pulse| Some(pulse.changed()? + self.timeout_of(pulse)?);
        self.ranks.values().filter_map(due).max()
    }

    /// Returns a hang if a rank has been silent for too long.
    pub fn check_silence(&self, now: Duration) -> Option<Hang> {
        let (_, local_rank) = self.silence().filter(|(due, _)| *due <= now)?;
        let Some(Pulse::Steps { step, heard, .. }) = self.ranks.get(&local_rank) else { return None };
        let silent = now.saturating_sub(*heard).as_secs_f64();
        let reason = format!(
            "it was at step {step} when it was last heard of, and has been silent for {silent:.0} s: it is stopped, or gets no CPU"
        );
        Some(Hang { local_rank, reason, since: *heard, is_silent: true, ends_by: None })
    }

    /// Returns a hang if a rank neglects its file, all ranks at work stand still, or a rank is
    /// silent for too long.
    pub fn check(&self, now: Duration) -> Option<Hang> {
        if let Some(hang) = self.check_neglect(now) {
            return Some(hang);
        }
        if self.standstill().is_none_or(|at| now < at) {
            return self.check_silence(now);
        }
        self.behind(now)
    }

    /// Returns the rank that is behind, among ranks that stand still: the rank with the fewest
    /// steps, then the fewest operations, then the oldest heartbeat. Among plain programs, the rank
    /// whose last activity is the oldest.
    fn behind(&self, now: Duration) -> Option<Hang> {
        let watched: Vec<_> = self.ranks.iter().filter(|(_, pulse)| self.may_be_behind(pulse)).collect();
        let (behind, pulse) = watched.iter().min_by_key(|(_, pulse)| match pulse {
            Pulse::Steps { step, activity, heard, .. } => (*step, *activity, *heard),
            Pulse::File { changed, .. } | Pulse::Cpu { changed, .. } => (0, 0, *changed),
            Pulse::None => (0, 0, Duration::ZERO),
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
            Pulse::None => format!("no rank got anything done for {still} s; it has not begun"),
            _ => format!("no rank used the CPU for {still} s"),
        };
        let is_silent = self.silence().is_some_and(|(due, rank)| due <= now && rank == **behind);
        Some(Hang { local_rank: **behind, reason, since, is_silent, ends_by: None })
    }
}

#[cfg(test)]
mod tests;
