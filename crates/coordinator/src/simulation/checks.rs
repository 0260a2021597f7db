//! The checks: over the whole history, and at its end.

use std::collections::{BTreeMap, BTreeSet};

use ice_proto::rendezvous::Round;

use super::Discovery;
use super::agent::State;
use super::cluster::{Cluster, Job};
use super::network::End;
use super::sim_coordinator::SimCoordinator;
use crate::{Record, check_round};

/// Time until nothing changes after the last fault, by slow clocks: lost connections are noticed,
/// leases expire, agents restart and find the coordinator, ranks stop, and the last call ends.
pub(super) const SETTLING: u64 = 250_000;
/// Time until all agents have received the end of the job.
const TELLING: u64 = 1000;
/// Maximum time that a round overlaps a round of the next coordinator: until its members notice the
/// silence of theirs.
const MAX_OVERLAP: u64 = 19_000;

/// A process of an agent: host and number.
type Process = (usize, u64);

#[derive(Debug)]
struct Started {
    term: u64,
    at: u64,
    restarts: u32,
    members: BTreeSet<Process>,
}

/// The history of one job. All coordinators that continue it have its run stamp.
#[derive(Debug, Default)]
struct JobHistory {
    rounds: BTreeMap<u64, Started>,
    /// Processes whose ranks failed, or finished, by round.
    failed: BTreeMap<u64, BTreeSet<Process>>,
    finished: BTreeMap<u64, BTreeSet<Process>>,
    closed: Option<bool>,
}

#[derive(Default)]
pub(super) struct History(BTreeMap<String, JobHistory>);

impl History {
    fn job(&mut self, stamp: &str) -> &mut JobHistory {
        self.0.entry(stamp.to_owned()).or_default()
    }

    pub(super) fn failed(&mut self, round: &Round, who: Process) {
        self.job(&round.run_stamp).failed.entry(round.number).or_default().insert(who);
    }

    pub(super) fn finished(&mut self, round: &Round, who: Process) {
        self.job(&round.run_stamp).finished.entry(round.number).or_default().insert(who);
    }

    /// Checks a round that starts: RV-1, RV-3, RV-4, RV-10 and RV-11.
    pub(super) fn started(
        &mut self,
        at: u64,
        term: u64,
        job: &Job,
        round_check: &[(Option<Process>, &Round)],
    ) {
        check_round(round_check.iter().map(|(_, round)| *round)).unwrap();
        let Some((_, view)) = round_check.first() else { return };
        let (min_nodes, max_nodes) = job.nnodes;
        assert!((min_nodes..=max_nodes).contains(&view.nodes), "RV-3: {} nodes", view.nodes);
        assert!(view.restart_count <= job.restarts.max_restarts, "RV-4: {} restarts", view.restart_count);
        let job = self.job(&view.run_stamp);
        let mut members = BTreeSet::new();
        for who in round_check.iter().filter_map(|(who, _)| *who) {
            assert!(members.insert(who), "RV-1: {who:?} is twice in round {}", view.number);
        }
        let restarts = view.restart_count;
        if let Some((number, before)) = job.rounds.range(..view.number).next_back() {
            assert!(before.restarts <= restarts, "RV-10: fewer restarts than in round {number}");
        }
        if let Some((number, after)) = job.rounds.range(view.number..).next() {
            assert!(*number > view.number, "RV-10: round {number} is started again");
            assert!(after.term != term, "RV-10: round {number} was started before");
            assert!(after.restarts >= restarts, "RV-10: more restarts than in round {number}");
        }
        let failed = || job.failed.range(..view.number);
        assert!(restarts as usize <= failed().count(), "RV-11: {restarts} restarts after {:?}", job.failed);
        for (number, whose) in failed().filter(|(_, whose)| !whose.is_disjoint(&members)) {
            let before = job.rounds.get(number).map_or(0, |round| round.restarts);
            assert!(restarts > before, "RV-11: {whose:?} failed in round {number}, which counts for nothing");
        }
        job.rounds.insert(view.number, Started { term, at, restarts, members });
    }

    /// Checks RV-7 when an agent that was never suspended in a round learns that it is over.
    pub(super) fn left(&self, now: u64, since: u64, round: &Round) {
        let Some(job) = self.0.get(&round.run_stamp) else { return };
        let Some(own) = job.rounds.get(&round.number) else { return };
        let later = job.rounds.range(round.number + 1..).find(|(_, later)| later.term != own.term);
        if let Some((number, later)) = later {
            let beside = now - later.at.max(since);
            assert!(
                beside <= MAX_OVERLAP,
                "RV-7: round {} was live for {beside} ms beside {number}",
                round.number
            );
        }
    }

    /// Checks the end of a job: RV-10.
    pub(super) fn closed(&mut self, record: &Record, success: bool) {
        let job = self.job(&record.run_stamp);
        let first = *job.closed.get_or_insert(success);
        assert_eq!(first, success, "RV-10: the job has ended in two ways");
        if let Some((number, round)) = job.rounds.last_key_value().filter(|_| success) {
            let finished = job.finished.get(number);
            let all = finished.is_some_and(|finished| round.members.is_subset(finished));
            assert!(all, "RV-10: {round:?} is held to be finished, and was by {finished:?}");
        }
    }

    /// Checks a record that replaces another: RV-10.
    pub(super) fn written(&mut self, last: Option<&Record>, record: &Record) {
        let Some(last) = last else { return };
        let verdict = |record: &Record| record.verdict.as_ref().map(|verdict| verdict.round);
        let grows = last.run_stamp == record.run_stamp
            && last.next_round <= record.next_round
            && last.restarts.count() <= record.restarts.count()
            && verdict(last) <= verdict(record)
            && last.now <= record.now;
        assert!(grows, "RV-10: {record:?} after {last:?}");
        assert!(last.closed.is_none() || last.closed == record.closed, "RV-10: {record:?} after {last:?}");
    }
}

impl Cluster {
    /// Checks the state after [`SETTLING`]: RV-6, RV-7, RV-9 and RV-10.
    pub(super) fn check_settled(&mut self) {
        // The job may have ended a moment ago.
        if self.agents.iter().filter_map(|agent| agent.coordinator.as_ref()).any(SimCoordinator::is_closed) {
            self.run(self.now + TELLING);
        }
        let here: Vec<_> = self.agents.iter().filter(|agent| agent.is_active()).collect();
        let met = |agent: &&&super::agent::Agent| agent.link.is_some();
        let coordinators: Vec<_> =
            self.agents.iter().filter_map(|agent| agent.coordinator.as_ref()).collect();
        let Some(coordinator) = coordinators.first() else {
            let endpoint_is_gone = self.job.kind == Discovery::Endpoint;
            assert!(here.is_empty() || endpoint_is_gone, "RV-9: nobody coordinates");
            assert_eq!(here.iter().filter(met).count(), 0, "RV-6: somebody is connected to nobody");
            return;
        };
        assert_eq!(coordinators.len(), 1, "RV-10: several coordinate");
        if coordinator.is_closed() {
            assert!(here.is_empty(), "RV-6: not everybody heard of the end");
            return;
        }
        assert_eq!(
            here.iter().filter(met).count(),
            here.len(),
            "RV-9: somebody did not find the coordinator"
        );
        let lives = |agent: &&&super::agent::Agent| {
            let connection = agent.link.and_then(|peer| self.network.connections.get(&peer));
            connection.is_some_and(|connection| connection.is_open(End::Server))
        };
        assert_eq!(here.iter().filter(lives).count(), here.len(), "RV-9: somebody talks to nobody");
        let (min_nodes, max_nodes) = self.job.nnodes;
        let there = here.len();
        if there < min_nodes as usize {
            return;
        }
        let in_round: Vec<_> =
            here.iter().filter(|agent| matches!(agent.state, State::Running | State::Finished)).collect();
        let numbers: BTreeSet<_> =
            in_round.iter().filter_map(|agent| agent.round.as_ref()).map(|round| round.number).collect();
        assert!(numbers.len() <= 1, "RV-7: rounds {numbers:?} are live");
        let waiting = here.iter().filter(|agent| agent.state == State::Waiting).count();
        assert_eq!(in_round.len() + waiting, there, "RV-6: somebody was told nothing");
        // Once a node has finished, no other node gets in.
        if in_round.iter().all(|agent| agent.state == State::Running) {
            let in_round = in_round.len();
            assert_eq!(
                in_round,
                there.min(max_nodes as usize),
                "RV-9: {there} are there, {min_nodes} to {max_nodes} are wanted"
            );
        }
    }

    pub(super) fn check_over(&self) {
        let left: Vec<_> = (0..self.agents.len()).filter(|host| self.agents[*host].is_active()).collect();
        assert!(left.is_empty(), "RV-6: the job never ended for {left:?}");
    }
}
