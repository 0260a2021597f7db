//! Records of the rounds, and the share of the time that was spent in steps that count (goodput).

use std::collections::BTreeMap;
use std::time::Duration;

use ice_proto::rendezvous::Round;
use serde::Serialize;

use super::Excerpt;
use super::events::timestamp;

/// A round, as seen by this node. Times are in seconds; `docs/events.md` documents the fields.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct RoundRecord {
    round: u64,
    /// Time of its start, RFC 3339, UTC.
    time: String,
    nodes: u32,
    node: u32,
    world_size: u32,
    /// Number of restarts before this round.
    restarts: u32,
    /// Local ranks whose processes were started for the round, or had been spares. The other
    /// processes continued.
    new_ranks: Vec<u32>,
    /// Time from the end of the previous round to the start of this one.
    formed_after: Option<f64>,
    /// Time from the end of the previous round to the first step applied in this one.
    recovered_after: Option<f64>,
    /// Number of the first step applied in the round.
    first_step: Option<u64>,
    /// Number of steps that were begun in an earlier round and repeated.
    repeated_steps: u64,
    lasted: f64,
    /// Time from the failure that ended the round to the end, if the failure was on this node. A
    /// hang is detected late, for example.
    detected_after: Option<f64>,
    /// Reason for the end.
    ended_by: Option<String>,
}

/// The rounds so far.
#[derive(Default)]
pub(crate) struct Rounds {
    current: Option<(Duration, RoundRecord)>,
    /// Time at which the last round ended: the time of its failure, if that was on this node.
    broken: Option<Duration>,
    /// Time at which the first round started.
    first: Option<Duration>,
    past: Excerpt<RoundRecord>,
    /// Number of recoveries, and the sum of their times in seconds.
    recoveries: (u64, f64),
    /// Number of repeated steps.
    repeated: u64,
    /// Local rank and time in applied steps, by process.
    applied: BTreeMap<u64, (u32, Duration)>,
}

impl Rounds {
    pub(crate) fn start(&mut self, now: Duration, round: &Round, new_ranks: Vec<u32>) {
        self.first.get_or_insert(now);
        let formed_after = self.broken.map(|broken| now.saturating_sub(broken).as_secs_f64());
        let record = RoundRecord {
            round: round.number,
            time: timestamp(),
            nodes: round.nodes,
            node: round.assignment.group_rank,
            world_size: round.world_size,
            restarts: round.restart_count,
            new_ranks,
            formed_after,
            recovered_after: None,
            first_step: None,
            repeated_steps: 0,
            lasted: 0.0,
            detected_after: None,
            ended_by: None,
        };
        self.current = Some((now, record));
    }

    /// Records the first training step of a round, which every rank reports. Returns whether this
    /// report is the first one.
    pub(crate) fn first_step(&mut self, now: Duration, round: u64, step: u64, repeated: u64) -> bool {
        let Some((_, record)) = self.current.as_mut().filter(|(_, record)| record.round == round) else {
            return false;
        };
        record.repeated_steps = record.repeated_steps.max(repeated);
        let is_first = record.first_step.is_none();
        if is_first {
            record.first_step = Some(step);
            record.recovered_after = self.broken.map(|broken| now.saturating_sub(broken).as_secs_f64());
        }
        is_first
    }

    /// Records the time that a process has spent in applied steps so far.
    pub(crate) fn applied(&mut self, process: u64, local_rank: u32, time: Duration) {
        self.applied.insert(process, (local_rank, time));
    }

    /// Returns the number of the running round.
    pub(crate) fn current(&self) -> Option<u64> {
        self.current.as_ref().map(|(_, record)| record.round)
    }

    /// Ends the round because of an event at time `since`, and returns its record.
    pub(crate) fn end(
        &mut self,
        now: Duration,
        since: Option<Duration>,
        reason: &str,
    ) -> Option<&RoundRecord> {
        let (started, mut record) = self.current.take()?;
        self.broken = Some(since.unwrap_or(now));
        record.lasted = now.saturating_sub(started).as_secs_f64();
        record.detected_after = since.map(|since| now.saturating_sub(since).as_secs_f64());
        record.ended_by = Some(reason.to_owned());
        if let Some(time) = record.recovered_after {
            self.recoveries = (self.recoveries.0 + 1, self.recoveries.1 + time);
        }
        self.repeated += record.repeated_steps;
        Some(self.past.push(record))
    }

    pub(crate) fn past(&self) -> &Excerpt<RoundRecord> {
        &self.past
    }

    /// Returns the share of the time since the first round that the ranks of this node have spent
    /// in applied steps. `None` if no rank has reported a step.
    pub(crate) fn goodput(&self, now: Duration) -> Option<f64> {
        let mut of_ranks: BTreeMap<u32, Duration> = BTreeMap::new();
        for (local_rank, time) in self.applied.values() {
            *of_ranks.entry(*local_rank).or_default() += *time;
        }
        let all = now.checked_sub(self.first?)?.as_secs_f64() * of_ranks.len() as f64;
        let applied: f64 = of_ranks.values().map(Duration::as_secs_f64).sum();
        (applied > 0.0 && all > 0.0).then(|| applied / all)
    }

    /// Returns a line for the user at the end of the job, if ranks have reported steps.
    pub(crate) fn summary(&self, now: Duration) -> Option<String> {
        let goodput = self.goodput(now)? * 100.0;
        let (recoveries, time) = self.recoveries;
        let repeated = self.repeated;
        let steps = if repeated == 1 { "step" } else { "steps" };
        let mean = time / recoveries.max(1) as f64;
        let recovered = match recoveries {
            0 => String::new(),
            1 => format!("; 1 recovery in {mean:.2} s, {repeated} {steps} repeated"),
            n => format!("; {n} recoveries in {mean:.2} s on average, {repeated} {steps} repeated"),
        };
        Some(format!("goodput {goodput:.1} %: the share of the time in steps that count{recovered}"))
    }
}

#[cfg(test)]
mod tests {
    use ice_proto::rendezvous::NodeAssignment;

    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn round(number: u64) -> Round {
        let assignment = NodeAssignment {
            group_rank: 1,
            first_rank: 2,
            local_world_size: 2,
            ranks_on_host: 2,
            first_role_rank: 0,
            role_world_size: 2,
        };
        Round {
            number,
            restart_count: 0,
            nodes: 2,
            world_size: 4,
            run_stamp: "s".into(),
            ranks_store: None,
            assignment,
        }
    }

    #[test]
    fn a_recovery_is_measured_from_what_ended_the_round_to_the_next_step() {
        let mut rounds = Rounds::default();
        rounds.start(s(1), &round(0), vec![0, 1]);
        rounds.first_step(s(3), 0, 1, 0);
        rounds.applied(1, 0, s(4));
        rounds.applied(2, 1, s(4));
        let ended = rounds.end(s(10), Some(s(7)), "local rank 1 hangs").unwrap();
        assert_eq!((ended.lasted, ended.detected_after, ended.recovered_after), (9.0, Some(3.0), None));
        rounds.start(s(11), &round(1), vec![1]);
        rounds.first_step(s(12), 1, 4, 1);
        rounds.first_step(s(13), 1, 4, 0);
        assert!(!rounds.first_step(s(13), 0, 9, 7), "of another round");
        rounds.applied(1, 0, s(12));
        rounds.applied(3, 1, s(8));
        let ended = rounds.end(s(21), None, "all is done").unwrap();
        assert_eq!((ended.formed_after, ended.recovered_after), (Some(4.0), Some(5.0)));
        assert_eq!((ended.first_step, ended.repeated_steps), (Some(4), 1));
        assert_eq!(rounds.goodput(s(21)), Some((12.0 + 12.0) / 40.0));
        let summary = rounds.summary(s(21)).unwrap();
        assert!(
            summary.contains("goodput 60.0 %") && summary.contains("1 recovery in 5.00 s, 1 step "),
            "{summary}"
        );
    }

    #[test]
    fn a_program_that_tells_of_no_steps_has_no_goodput() {
        let mut rounds = Rounds::default();
        rounds.start(s(1), &round(0), vec![0]);
        rounds.end(s(2), None, "all is done");
        assert_eq!(rounds.summary(s(2)), None);
    }
}
