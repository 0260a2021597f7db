//! The coordinator and model agents in a simulated cluster: hosts with clocks of their own, a
//! network with delays and partitions, an etcd with leases, and processes that are killed,
//! suspended and restarted.
//!
//! Connections behave like TCP: messages of a connection keep their order, and are late or lost
//! together; each end notices in its own time that the other is gone. In most runs the agents elect
//! the coordinator through etcd, and replace it. In the others it is at an endpoint that all agents
//! know, and its end is the end of the job.
//!
//! `ICE_SEED=<n>` replays the run of one seed and prints a trace, `ICE_SEEDS=<n>` sets the number
//! of runs.

mod agent;
mod checks;
mod cluster;
mod etcd;
mod faults;
mod network;
mod sim_coordinator;

use cluster::Cluster;

const RUNS: u64 = 2000;

/// How agents find the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Discovery {
    /// Elected through etcd, and replaced when it is lost.
    Etcd,
    /// At the first host, and never replaced.
    Endpoint,
}

/// A host's clock, which is wrong.
#[derive(Debug, Clone, Copy)]
struct Clock {
    offset: u64,
    /// Milliseconds that it shows per 1000 real ones.
    rate: u64,
    /// Milliseconds that it stood still.
    late: u64,
}

impl Clock {
    /// Returns the time that it shows.
    fn local(self, at: u64) -> u64 {
        self.offset + (at - self.late) * self.rate / 1000
    }

    /// Returns when it will show a time, unless it stands still before.
    fn real(self, local: u64) -> u64 {
        self.late + (local.saturating_sub(self.offset) * 1000).div_ceil(self.rate)
    }
}

fn simulate(seed: u64, traced: bool) {
    let mut cluster = Cluster::new(seed, traced);
    cluster.run(cluster.job.faults_until);
    cluster.stop_faults();
    cluster.run(cluster.now + checks::SETTLING);
    cluster.check_settled();
    cluster.run(u64::MAX);
    cluster.check_over();
}

#[test]
fn invariants_hold_under_faults() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let one = number("ICE_SEED");
    let seeds = one.map_or(0..number("ICE_SEEDS").unwrap_or(RUNS), |seed| seed..seed + 1);
    for seed in seeds {
        let outcome = std::panic::catch_unwind(|| simulate(seed, one.is_some()));
        assert!(outcome.is_ok(), "seed {seed} failed: ICE_SEED={seed} replays it");
    }
}
