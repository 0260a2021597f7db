//! Whether the ranks of this node stand still.
//!
//! Ranks that know the link say every second how much they have got done, and whether more is
//! expected of them. A rank that is alone at work, as one that saves, keeps the others waiting for
//! as long as it takes. Of other programs only the CPU time that they use is known. Time comes in
//! as an argument, as for the agent.

use std::collections::BTreeMap;
use std::time::Duration;

use ice_proto::link::Doing;

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
}

impl HangWatch {
    pub(crate) fn new(timeout: HangTimeout, monitor_interval: Duration) -> Self {
        Self { timeout, ranks: BTreeMap::new(), period: monitor_interval, several_nodes: false }
    }

    /// A round begins, with so many ranks on this node, and others where there are several nodes.
    pub(crate) fn start(&mut self, ranks: u32, nodes: u32) {
        self.several_nodes = nodes > 1;
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
            // A rank of another node may be alone at work, which only its own agent hears.
            (_, Pulse::Steps { doing: Doing::Meeting, .. }) if self.several_nodes => None,
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
        dues.chain(self.standstill()).min()
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

    /// When the last rank that still did something will have stood still for too long.
    fn standstill(&self) -> Option<Duration> {
        if self.ranks.values().any(|pulse| self.is_waited_for(pulse)) {
            return None;
        }
        let due = |pulse: &Pulse| Some(pulse.changed()? + self.timeout_of(pulse)?);
        let due = self.ranks.values().filter_map(due).max()?;
        // The agent that sees which rank is behind acts first; others only guess.
        let guesses = self.several_nodes && !self.is_evident(due);
        let patience = self.ranks.values().find_map(|pulse| self.timeout_of(pulse)).filter(|_| guesses);
        Some(due + patience.unwrap_or_default())
    }

    /// Whether one of the ranks of this node differs from the others, or is silent.
    fn is_evident(&self, at: Duration) -> bool {
        let mut known = None;
        self.ranks.values().any(|pulse| match *pulse {
            Pulse::Steps { step, activity, heard, .. } => {
                heard + SILENT < at || *known.get_or_insert((step, activity)) != (step, activity)
            }
            // How much of the CPU a rank uses says little of others, as does its file.
            Pulse::File { .. } | Pulse::Cpu { .. } => true,
            Pulse::None => false,
        })
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
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Steps so far and things done so far of a rank, and what it is about.
    type Beat = (u64, u64, Doing);

    fn beat(watch: &mut HangWatch, now: u64, local_rank: u32, (step, activity, doing): Beat) {
        watch.heartbeat(s(now), local_rank, step, activity, doing);
    }

    fn steps(count: u64) -> Beat {
        (count, count, Doing::Steps)
    }

    fn watch(timeout: HangTimeout) -> HangWatch {
        let mut watch = HangWatch::new(timeout, Duration::from_millis(100));
        watch.start(2, 1);
        watch
    }

    #[test]
    fn the_group_hangs_when_its_last_rank_stands_still() {
        let mut watch = watch(HangTimeout::After(s(10)));
        for now in 1..30 {
            beat(&mut watch, now, 0, steps(now.min(5)));
            if now < 8 {
                beat(&mut watch, now, 1, steps(now.min(4)));
            }
            let hang = watch.check(s(now));
            assert_eq!(hang.is_some(), now >= 15, "{now}");
            if let Some(hang) = hang {
                assert_eq!(hang.local_rank, 1);
                assert!(hang.reason.contains("10 s; it is at step 4 of 5, silent for"), "{}", hang.reason);
            }
        }
    }

    #[test]
    fn ranks_that_load_data_or_have_finished_are_not_watched() {
        let mut watch = watch(HangTimeout::Default);
        assert_eq!(watch.standstill(), None, "nothing was heard of them");
        beat(&mut watch, 1, 0, (0, 0, Doing::Alone));
        beat(&mut watch, 1, 1, (0, 0, Doing::Alone));
        assert_eq!(watch.standstill(), None, "before the group is formed");
        beat(&mut watch, 2, 0, steps(1));
        beat(&mut watch, 2, 1, steps(1));
        assert_eq!(watch.standstill(), Some(s(2) + DEFAULT));
        beat(&mut watch, 3, 0, (1, 1, Doing::Resting));
        beat(&mut watch, 3, 1, (1, 1, Doing::Resting));
        assert_eq!(watch.standstill(), None, "paused, or after the end");
        beat(&mut watch, 4, 0, steps(1));
        watch.gone(0);
        assert_eq!(watch.standstill(), None);
    }

    #[test]
    fn ranks_that_wait_for_each_other_before_the_first_step_stand_still() {
        // The group is not formed, or one waits in a step that the other one will not do.
        for doing in [Doing::Meeting, Doing::Steps] {
            let mut watch = watch(HangTimeout::After(s(10)));
            for now in 1..30 {
                beat(&mut watch, now, 0, (0, 0, Doing::Meeting));
                beat(&mut watch, now, 1, (0, 3, doing));
                let hang = watch.check(s(now));
                assert_eq!(hang.map(|hang| hang.local_rank), (now >= 11).then_some(0), "{doing:?} {now}");
            }
        }
    }

    #[test]
    fn a_rank_that_left_the_steps_while_others_wait_in_one_is_behind() {
        // Of several nodes, too: that its own ranks differ is evident to this agent.
        for nodes in [1, 2] {
            let mut watch = watch(HangTimeout::After(s(10)));
            watch.start(2, nodes);
            for now in 1..30 {
                let left = (now.min(4), now.min(4), if now < 5 { Doing::Steps } else { Doing::Meeting });
                beat(&mut watch, now, 0, left);
                beat(&mut watch, now, 1, steps(now.min(6)));
                let hang = watch.check(s(now));
                assert_eq!(hang.as_ref().map(|hang| hang.local_rank), (now >= 16).then_some(0), "{now}");
                assert!(hang.is_none_or(|hang| hang.reason.contains("at step 4 of 6")));
            }
        }
    }

    #[test]
    fn a_rank_that_is_alone_at_work_is_waited_for() {
        for other in [Doing::Meeting, Doing::Steps] {
            let mut watch = watch(HangTimeout::After(s(10)));
            for now in 1..100 {
                beat(&mut watch, now, 0, (7, 7, Doing::Alone));
                beat(&mut watch, now, 1, (7, 9, other));
                assert_eq!(watch.check(s(now)), None, "{now}");
            }
            // It joins the others, and then they all stand still.
            beat(&mut watch, 100, 0, (7, 7, Doing::Meeting));
            beat(&mut watch, 109, 1, (7, 9, other));
            assert_eq!(watch.check(s(109)), None);
            beat(&mut watch, 110, 0, (7, 7, Doing::Meeting));
            assert_eq!(watch.check(s(110)).map(|hang| hang.local_rank), Some(0));
        }
    }

    #[test]
    fn ranks_that_meet_may_wait_for_one_of_another_node() {
        let mut watch = watch(HangTimeout::After(s(10)));
        watch.start(2, 2);
        for now in 1..100 {
            beat(&mut watch, now, 0, (7, 7, Doing::Meeting));
            beat(&mut watch, now, 1, (7, 7, Doing::Meeting));
            assert_eq!(watch.check(s(now)), None, "{now}");
        }
    }

    #[test]
    fn a_rank_that_is_silent_hangs_whatever_it_was_doing() {
        let mut watch = watch(HangTimeout::After(s(10)));
        for now in 1..20 {
            beat(&mut watch, now, 0, (7, 0, Doing::Alone));
            if now <= 4 {
                beat(&mut watch, now, 1, (7, 0, Doing::Alone));
            }
            let hang = watch.check(s(now));
            assert_eq!(hang.as_ref().map(|hang| hang.local_rank), (now >= 14).then_some(1), "{now}");
            assert!(hang.is_none_or(|hang| hang.reason.contains("silent for") && hang.since == s(4)));
        }
    }

    #[test]
    fn a_new_process_that_does_not_begin_is_behind_those_that_did_steps() {
        let mut watch = watch(HangTimeout::After(s(10)));
        beat(&mut watch, 1, 0, (7, 9, Doing::Meeting));
        assert_eq!(watch.check(s(11)).map(|hang| hang.local_rank), Some(0), "the other is not heard of");
        beat(&mut watch, 1, 1, (0, 0, Doing::Alone));
        assert_eq!(watch.check(s(11)).unwrap().local_rank, 1);
        beat(&mut watch, 1, 1, (7, 0, Doing::Resting));
        assert_eq!(watch.check(s(11)).unwrap().local_rank, 0, "one that rests is not");
    }

    #[test]
    fn a_rank_that_works_alone_keeps_the_others_waiting() {
        let mut watch = watch(HangTimeout::After(s(10)));
        for now in 1..100 {
            beat(&mut watch, now, 0, (7, now, Doing::Steps));
            beat(&mut watch, now, 1, (7, 7, Doing::Steps));
            assert_eq!(watch.check(s(now)), None);
        }
    }

    #[test]
    fn of_several_nodes_the_one_acts_first_that_sees_which_rank_is_behind() {
        let (mut here, mut there) = (watch(HangTimeout::After(s(10))), watch(HangTimeout::After(s(10))));
        for watch in [&mut here, &mut there] {
            watch.start(2, 2);
        }
        for now in 1..30 {
            // The first rank of the other node is stopped.
            beat(&mut here, now, 0, steps(now.min(5)));
            beat(&mut here, now, 1, steps(now.min(5)));
            beat(&mut there, now, 1, steps(now.min(5)));
            if now <= 5 {
                beat(&mut there, now, 0, steps(now));
            }
            assert_eq!(there.check(s(now)).map(|hang| hang.local_rank), (now >= 15).then_some(0), "{now}");
            assert_eq!(here.check(s(now)).is_some(), now >= 25, "{now}");
        }
    }

    #[test]
    fn of_a_plain_program_the_cpu_time_tells_if_that_was_asked_for() {
        let plain = watch(HangTimeout::Default);
        assert!(!plain.wants_cpu_times());
        assert_eq!((plain.sampling(), plain.deadline()), (Some(s(10)), None), "for files alone");

        let mut plain = watch(HangTimeout::After(s(10)));
        assert_eq!(plain.sampling(), Some(s(1)));
        for now in 1..=12 {
            // The first rank works for four seconds, the other one only polls.
            plain.cpu_time(s(now), 0, s(now.min(4)));
            plain.cpu_time(s(now), 1, Duration::from_millis(10 * now));
            assert_eq!(plain.check(s(now)), None);
        }
        plain.cpu_time(s(14), 0, s(4));
        let hang = plain.check(s(14)).unwrap();
        assert_eq!((hang.local_rank, hang.reason.contains("used the CPU for 10 s")), (1, true));
        assert_eq!(watch(HangTimeout::Never).check(s(9999)), None);
    }
    #[test]
    fn a_rank_that_touches_a_file_is_to_go_on_with_that_from_the_first_time() {
        for (timeout, seconds) in [(HangTimeout::After(s(10)), 10), (HangTimeout::Default, 600)] {
            let mut watch = watch(timeout);
            assert_eq!(watch.deadline(), None);
            // The other one uses the CPU, as one that spins does.
            for now in 1..2000 {
                watch.touched(s(now), 1, s(now.min(5)));
                if watch.wants_cpu_times() {
                    watch.cpu_time(s(now), 0, s(now));
                    watch.cpu_time(s(now), 1, s(now));
                }
                let hang = watch.check(s(now));
                assert_eq!(hang.is_some(), now >= 5 + seconds, "{now}");
                if let Some(hang) = hang {
                    let said = format!("did not touch its heartbeat file for {seconds} s");
                    assert!(hang.local_rank == 1 && hang.reason.contains(&said), "{hang:?}");
                    break;
                }
            }
        }
        let mut never = watch(HangTimeout::Never);
        never.touched(s(1), 1, s(1));
        assert_eq!((never.sampling(), never.deadline(), never.check(s(9999))), (None, None, None));
    }

    #[test]
    fn a_rank_that_touches_its_file_keeps_those_without_one_waiting() {
        let mut watch = watch(HangTimeout::After(s(10)));
        for now in 1..100 {
            watch.touched(s(now), 0, s(now));
            watch.cpu_time(s(now), 1, s(1));
            assert_eq!(watch.check(s(now)), None, "{now}");
        }
    }
}
