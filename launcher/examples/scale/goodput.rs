//! The share of the time in steps that count, if failures are random. Times between failures are
//! drawn from an exponential distribution. All times are seconds.

use crate::network::uniform;
use ice_testing::Random;

/// A job with checkpoints and failures.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job {
    /// Mean time between failures.
    pub(crate) mtbf: f64,
    /// Time of work between two checkpoints.
    pub(crate) interval: f64,
    /// Time that training pauses for a checkpoint.
    pub(crate) save: f64,
    /// Time from a failure until training continues from the newest checkpoint.
    pub(crate) restart: f64,
    pub(crate) in_place: Option<InPlace>,
}

/// Recovery from the memory of the surviving ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InPlace {
    /// Time from a failure until the next step begins.
    pub(crate) recovery: f64,
    /// Least and most work that is repeated.
    pub(crate) repeated: (f64, f64),
    /// Share of the failures after which only a restart from a checkpoint helps.
    pub(crate) beyond: f64,
}

/// Returns the interval between two checkpoints with the least cost: Young, 1974, which is the
/// first order of Daly, 2006.
pub(crate) fn young(mtbf: f64, save: f64) -> f64 {
    (2.0 * save * mtbf).sqrt()
}

/// Returns the goodput over this number of failures. A failure during a pause restarts the pause.
pub(crate) fn simulate(random: &mut Random, job: &Job, failures: u32) -> f64 {
    let (mut time, mut kept, mut since, mut pause) = (0.0, 0.0, 0.0, 0.0);
    let cycle = job.interval + job.save;
    for _ in 0..failures {
        let until = -job.mtbf * uniform(random).ln();
        time += until;
        if until <= pause {
            // The kind of recovery stays the same: a recovery from memory is repeated from memory.
            continue;
        }
        let place = since + (until - pause);
        kept += (place / cycle).floor() * job.interval;
        // An incomplete checkpoint does not count.
        since = (place % cycle).min(job.interval);
        match job.in_place {
            Some(InPlace { recovery, repeated: (least, most), beyond }) if uniform(random) > beyond => {
                let repeated = least + (most - least) * uniform(random);
                // Ranks that have continued from a checkpoint have no state before it, so no more
                // work can be repeated.
                since = (since - repeated).max(0.0);
                pause = recovery;
            }
            _ => (since, pause) = (0.0, job.restart),
        }
    }
    (kept + since) / time
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAILURES: u32 = 200_000;

    /// Returns the goodput of a job that restarts from checkpoints, in closed form: the complete
    /// model of Daly, 2006.
    fn closed_form(job: &Job) -> f64 {
        let Job { mtbf, interval, save, restart, .. } = *job;
        interval / (mtbf * (restart / mtbf).exp() * ((interval + save) / mtbf).exp_m1())
    }

    fn job() -> Job {
        Job { mtbf: 7200.0, interval: 600.0, save: 20.0, restart: 180.0, in_place: None }
    }

    #[test]
    fn the_simulation_is_the_closed_form() {
        for (mtbf, interval) in [(1800.0, 200.0), (7200.0, 600.0), (7200.0, 3600.0), (86400.0, 1800.0)] {
            let job = Job { mtbf, interval, ..job() };
            let (simulated, expected) = (simulate(&mut Random::new(5), &job, FAILURES), closed_form(&job));
            assert!((simulated / expected - 1.0).abs() < 0.005, "{simulated} and {expected} for {job:?}");
        }
    }

    #[test]
    fn no_interval_is_better_than_the_optimum() {
        let of = |interval| closed_form(&Job { interval, ..job() });
        let best = (1..500).map(|tens| of(f64::from(tens) * 10.0)).fold(0.0, f64::max);
        let optimum = of(young(7200.0, 20.0));
        assert!(best - optimum < 0.001 && of(100.0) < optimum && of(3000.0) < optimum, "{best} {optimum}");
    }

    #[test]
    fn going_on_costs_the_pause_and_what_is_repeated() {
        let in_place = InPlace { recovery: 30.0, repeated: (40.0, 60.0), beyond: 0.0 };
        let job = Job { mtbf: 20_000.0, interval: 1000.0, in_place: Some(in_place), ..job() };
        let simulated = simulate(&mut Random::new(5), &job, FAILURES);
        // A failure during a save loses half of the save on average, which is a second-order
        // effect.
        let expected = (1.0 - 80.0 / 20_000.0) * 1000.0 / 1020.0;
        assert!((simulated - expected).abs() < 0.001, "{simulated} and {expected}");
        let beyond = InPlace { beyond: 1.0, ..in_place };
        let all = simulate(&mut Random::new(5), &Job { in_place: Some(beyond), ..job }, FAILURES);
        assert!((all / closed_form(&job) - 1.0).abs() < 0.005);
    }
}
