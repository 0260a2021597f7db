//! Simulation of many ranks, with requests at any time and delayed messages. `AGREE_SEED=<n>`
//! replays one run.

use ice_proto::link::BoundaryRequest;
use ice_testing::Random;

use super::boundaries::{Boundaries, BoundaryDecision, NO_BOUNDARY};

/// The program, equal on all ranks.
struct Program {
    /// Whether the ranks wait for each other in the step after each boundary.
    waits: Vec<bool>,
    /// Boundaries after which a run ends and the next one begins, in ascending order.
    runs: Vec<usize>,
}

#[derive(Default)]
struct Rank {
    boundaries: Boundaries,
    /// Number of boundaries passed, counted by the program.
    passed: usize,
    /// Whether it is within a step.
    inside: bool,
    /// Number of finished runs, and whether it is between two runs.
    runs: usize,
    between: bool,
    ended: bool,
    /// Index of the request that its thread handles, and whether it has answered.
    request: usize,
    answered: bool,
    /// Performed requests with their boundaries.
    done: Vec<(BoundaryRequest, usize)>,
}

#[derive(Default)]
struct Asked {
    request: Option<BoundaryRequest>,
    answers: Vec<u64>,
}

struct Simulation {
    program: Program,
    ranks: Vec<Rank>,
    requests: Vec<Asked>,
    random: Random,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let (waits, ends) = (random.below(101), random.below(20));
        let waits: Vec<_> = (0..random.below(30)).map(|_| random.chance(waits)).collect();
        let runs = (1..waits.len()).filter(|_| random.chance(ends)).collect();
        let program = Program { waits, runs };
        let ranks = (0..1 + random.below(6)).map(|_| Rank::default()).collect();
        Self { program, ranks, requests: Vec::new(), random }
    }

    fn ask(&mut self, request: BoundaryRequest) {
        self.requests.push(Asked { request: Some(request), answers: Vec::new() });
    }

    /// Advances the program of a rank. Returns whether it could.
    fn run(&mut self, number: usize) -> bool {
        let everybody = |at: usize| self.ranks.iter().all(|rank| rank.passed >= at);
        let may_leave = {
            let rank = &self.ranks[number];
            rank.inside && (!self.program.waits[rank.passed - 1] || everybody(rank.passed))
        };
        let length = self.program.waits.len();
        let all_ended = |runs: usize| self.ranks.iter().all(|rank| rank.runs > runs || rank.between);
        let may_begin = all_ended(self.ranks[number].runs);
        let rank = &mut self.ranks[number];
        if rank.ended || (rank.inside && !may_leave) {
            return false;
        }
        if rank.inside {
            rank.inside = false;
            return true;
        }
        if self.program.runs.get(rank.runs) == Some(&rank.passed) {
            if !rank.between {
                rank.boundaries.end();
                rank.between = true;
                return true;
            }
            if may_begin {
                rank.boundaries.begin();
                (rank.between, rank.runs) = (false, rank.runs + 1);
            }
            return may_begin;
        }
        if rank.passed == length {
            rank.boundaries.end();
            rank.ended = true;
            return true;
        }
        match rank.boundaries.arrive() {
            BoundaryDecision::Wait => false,
            BoundaryDecision::Do(request) => {
                rank.done.push((request, rank.passed));
                true
            }
            BoundaryDecision::Pass => {
                (rank.passed, rank.inside) = (rank.passed + 1, true);
                true
            }
        }
    }

    /// Advances the thread of a rank. Returns whether it could.
    fn talk(&mut self, number: usize) -> bool {
        let (ranks, rank) = (self.ranks.len(), &mut self.ranks[number]);
        let Some(asked) = self.requests.get_mut(rank.request) else { return false };
        if !rank.answered {
            asked.answers.push(asked.request.map_or(NO_BOUNDARY, |request| rank.boundaries.ask(request)));
            rank.answered = true;
            return true;
        }
        if asked.answers.len() < ranks {
            return false;
        }
        rank.boundaries.settle(asked.answers.iter().copied().max().unwrap_or(NO_BOUNDARY));
        (rank.request, rank.answered) = (rank.request + 1, false);
        true
    }

    /// Runs until no rank can advance.
    fn settle(&mut self) {
        loop {
            let moves = |one: &mut Self, number| one.run(number) | one.talk(number);
            if !(0..self.ranks.len()).fold(false, |any, number| moves(self, number) | any) {
                return;
            }
        }
    }
}

fn check(seed: u64) -> u64 {
    let mut one = Simulation::new(seed);
    for _ in 0..one.random.below(300) {
        let number = one.random.below(one.ranks.len() as u64) as usize;
        match one.random.below(40) {
            0 => one.ask(BoundaryRequest::Save),
            1 => one.ask(BoundaryRequest::Stop { node: 0, save: true }),
            2 => one.ask(BoundaryRequest::Pause),
            3 => one.ask(BoundaryRequest::Resume),
            n if n % 2 == 0 => _ = one.run(number),
            _ => _ = one.talk(number),
        }
    }
    one.settle();
    // All paused ranks are at one boundary, and resume on request.
    if one.ranks.iter().any(|rank| rank.boundaries.is_paused()) {
        let passed: Vec<_> = one.ranks.iter().map(|rank| rank.passed).collect();
        assert!(one.ranks.iter().all(|rank| rank.boundaries.is_paused()), "seed {seed}: {passed:?}");
        assert!(passed.windows(2).all(|two| two[0] == two[1]), "seed {seed}: {passed:?}");
        one.ask(BoundaryRequest::Resume);
        one.settle();
    }
    for rank in &one.ranks {
        assert!(rank.ended, "seed {seed}: a rank stays at {} of {}", rank.passed, one.program.waits.len());
        assert_eq!(rank.done, one.ranks[0].done, "seed {seed}");
    }
    one.ranks[0].done.len() as u64
}

#[test]
fn all_ranks_do_the_same_at_the_same_boundary() {
    if let Some(seed) = std::env::var("AGREE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        check(seed);
        return;
    }
    let done: u64 = (0..20_000).map(check).sum();
    assert!(done > 10_000, "{done} requests were acted on");
}
