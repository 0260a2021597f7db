//! The coordinator and model agents in a virtual cluster: hosts with clocks of their own, a network that delays and is cut, an etcd with
//! leases, and processes that are killed, suspended and started again.
//!
//! Agents talk to the coordinator over TCP: within a connection messages keep their order, and are late or lost with it; each end notices in
//! its own time that the other is gone. In most runs the agents elect the coordinator through etcd and replace it; in the others it is at an
//! endpoint that all know, and its end is the end of the job.
//!
//! `ICE_SEED=<n>` replays the run of one seed and tells what happens, `ICE_SEEDS=<n>` makes more runs or fewer.

mod agent;
mod checks;
mod etcd;
mod faults;
mod network;
mod office;
mod world;

use world::World;

const RUNS: u64 = 2000;

/// How the coordinator is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It is elected, and replaced when it is lost.
    Etcd,
    /// It is the first host's, and not replaced.
    Endpoint,
}

/// A host's clock, which is wrong.
#[derive(Debug, Clone, Copy)]
struct Clock {
    offset: u64,
    /// What passes while 1000 pass.
    rate: u64,
    /// How long it stood still.
    late: u64,
}

impl Clock {
    /// What it shows.
    fn local(self, at: u64) -> u64 {
        self.offset + (at - self.late) * self.rate / 1000
    }

    /// When it will show so, unless it stands still before.
    fn real(self, local: u64) -> u64 {
        self.late + (local.saturating_sub(self.offset) * 1000).div_ceil(self.rate)
    }
}

fn simulate(seed: u64, told: bool) {
    let mut world = World::new(seed, told);
    world.run(world.job.faults_until);
    world.calm();
    world.run(world.now + checks::SETTLING);
    world.check_settled();
    world.run(u64::MAX);
    world.check_over();
}

#[test]
fn invariants_hold_whatever_happens_to_the_cluster() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let one = number("ICE_SEED");
    let seeds = one.map_or(0..number("ICE_SEEDS").unwrap_or(RUNS), |seed| seed..seed + 1);
    for seed in seeds {
        let outcome = std::panic::catch_unwind(|| simulate(seed, one.is_some()));
        assert!(outcome.is_ok(), "seed {seed} failed: ICE_SEED={seed} replays it");
    }
}
