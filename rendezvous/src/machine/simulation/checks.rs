//! What must hold, over the whole history and at its end.

use std::collections::{BTreeMap, BTreeSet};

use ice_proto::rendezvous::Round;

use super::Kind;
use super::agent::State;
use super::network::End;
use super::office::Office;
use super::world::{Job, World};
use crate::machine::{Record, check_views};

/// How long it takes until nothing changes any more: lost connections are missed and leases end, agents are started again and find the
/// coordinator, ranks are stopped, and the last call is over, by slow clocks.
pub(super) const SETTLING: u64 = 250_000;
/// How long it takes to tell everybody of the end.
const TELLING: u64 = 1000;
/// How long a round may go on beside the next coordinator's: until its members have missed a coordinator that they do not hear any more.
const BESIDE: u64 = 19_000;

/// An agent's process.
type Who = (usize, u64);

#[derive(Debug)]
struct Started {
    office: u64,
    at: u64,
    restarts: u32,
    members: BTreeSet<Who>,
}

/// What happened in one job. All coordinators that go on with it have its run stamp.
#[derive(Debug, Default)]
struct JobHistory {
    rounds: BTreeMap<u64, Started>,
    /// Those whose ranks failed, or finished, by round.
    failed: BTreeMap<u64, BTreeSet<Who>>,
    finished: BTreeMap<u64, BTreeSet<Who>>,
    closed: Option<bool>,
}

#[derive(Default)]
pub(super) struct History(BTreeMap<String, JobHistory>);

impl History {
    fn job(&mut self, stamp: &str) -> &mut JobHistory {
        self.0.entry(stamp.to_owned()).or_default()
    }

    pub(super) fn failed(&mut self, round: &Round, who: Who) {
        self.job(&round.run_stamp).failed.entry(round.number).or_default().insert(who);
    }

    pub(super) fn finished(&mut self, round: &Round, who: Who) {
        self.job(&round.run_stamp).finished.entry(round.number).or_default().insert(who);
    }

    /// A round is told to its members.
    pub(super) fn started(&mut self, at: u64, office: u64, job: &Job, views: &[(Option<Who>, &Round)]) {
        check_views(views.iter().map(|(_, round)| *round)).unwrap();
        let Some((_, view)) = views.first() else { return };
        let (fewest, most) = job.nnodes;
        assert!((fewest..=most).contains(&view.nodes), "RV-3: {} nodes", view.nodes);
        assert!(view.restart_count <= job.restarts.max_restarts, "RV-4: {} restarts", view.restart_count);
        let job = self.job(&view.run_stamp);
        let mut members = BTreeSet::new();
        for who in views.iter().filter_map(|(who, _)| *who) {
            assert!(members.insert(who), "RV-1: {who:?} is twice in round {}", view.number);
        }
        let restarts = view.restart_count;
        if let Some((number, before)) = job.rounds.range(..view.number).next_back() {
            assert!(before.restarts <= restarts, "RV-10: fewer restarts than in round {number}");
        }
        if let Some((number, after)) = job.rounds.range(view.number..).next() {
            assert!(*number > view.number, "RV-10: round {number} is started again");
            assert!(after.office != office, "RV-10: round {number} was started before");
            assert!(after.restarts >= restarts, "RV-10: more restarts than in round {number}");
        }
        let failed = || job.failed.range(..view.number);
        assert!(restarts as usize <= failed().count(), "RV-11: {restarts} restarts after {:?}", job.failed);
        for (number, whose) in failed().filter(|(_, whose)| !whose.is_disjoint(&members)) {
            let before = job.rounds.get(number).map_or(0, |round| round.restarts);
            assert!(restarts > before, "RV-11: {whose:?} failed in round {number}, which counts for nothing");
        }
        job.rounds.insert(view.number, Started { office, at, restarts, members });
    }

    /// An agent that was awake since it was told of a round knows that it is over.
    pub(super) fn left(&self, now: u64, since: u64, round: &Round) {
        let Some(job) = self.0.get(&round.run_stamp) else { return };
        let Some(own) = job.rounds.get(&round.number) else { return };
        let later = job.rounds.range(round.number + 1..).find(|(_, later)| later.office != own.office);
        if let Some((number, later)) = later {
            let beside = now - later.at.max(since);
            assert!(
                beside <= BESIDE,
                "RV-7: round {} was live for {beside} ms beside {number}",
                round.number
            );
        }
    }

    /// The end of a job is told.
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

    /// A record replaces another.
    pub(super) fn written(&mut self, last: Option<&Record>, record: &Record) {
        let Some(last) = last else { return };
        let judged = |record: &Record| record.judged.as_ref().map(|judged| judged.round);
        let grows = last.run_stamp == record.run_stamp
            && last.next_round <= record.next_round
            && last.restarts.count() <= record.restarts.count()
            && judged(last) <= judged(record)
            && last.now <= record.now;
        assert!(grows, "RV-10: {record:?} after {last:?}");
        assert!(last.closed.is_none() || last.closed == record.closed, "RV-10: {record:?} after {last:?}");
    }
}

impl World {
    /// Once nothing changes any more, everybody who wants in is in.
    pub(super) fn check_settled(&mut self) {
        // The end may have come a moment ago.
        if self.agents.iter().filter_map(|agent| agent.office.as_ref()).any(Office::is_closed) {
            self.run(self.now + TELLING);
        }
        let here: Vec<_> = self.agents.iter().filter(|agent| agent.is_there()).collect();
        let met = |agent: &&&super::agent::Agent| agent.link.is_some();
        let offices: Vec<_> = self.agents.iter().filter_map(|agent| agent.office.as_ref()).collect();
        let Some(office) = offices.first() else {
            let endpoint_is_gone = self.job.kind == Kind::Endpoint;
            assert!(here.is_empty() || endpoint_is_gone, "RV-9: nobody coordinates");
            assert_eq!(here.iter().filter(met).count(), 0, "RV-6: somebody is connected to nobody");
            return;
        };
        assert_eq!(offices.len(), 1, "RV-10: several coordinate");
        if office.is_closed() {
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
            connection.is_some_and(|connection| connection.is_open(End::Host))
        };
        assert_eq!(here.iter().filter(lives).count(), here.len(), "RV-9: somebody talks to nobody");
        let (fewest, most) = self.job.nnodes;
        let there = here.len();
        if there < fewest as usize {
            return;
        }
        let in_round: Vec<_> =
            here.iter().filter(|agent| matches!(agent.state, State::Running | State::Finished)).collect();
        let numbers: BTreeSet<_> =
            in_round.iter().filter_map(|agent| agent.round.as_ref()).map(|round| round.number).collect();
        assert!(numbers.len() <= 1, "RV-7: rounds {numbers:?} are live");
        let waiting = here.iter().filter(|agent| agent.state == State::Waiting).count();
        assert_eq!(in_round.len() + waiting, there, "RV-6: somebody was told nothing");
        // Once one has finished, nobody is let in any more.
        if in_round.iter().all(|agent| agent.state == State::Running) {
            let in_round = in_round.len();
            assert_eq!(
                in_round,
                there.min(most as usize),
                "RV-9: {there} are there, {fewest} to {most} are wanted"
            );
        }
    }

    pub(super) fn check_over(&self) {
        let left: Vec<_> = (0..self.agents.len()).filter(|host| self.agents[*host].is_there()).collect();
        assert!(left.is_empty(), "RV-6: the job never ended for {left:?}");
    }
}
