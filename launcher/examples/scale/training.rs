//! What a failure costs a training, by how it goes on. What is assumed is said here, and in docs/scale.md.

use std::time::Duration;

use crate::goodput::{InPlace, Job, simulate, young};
use crate::random::Random;
use crate::report::{CLIENT_US, Size, table, time};

/// Failures of a simulated job.
const FAILURES: u32 = 20_000;

/// Failures per rank and day: who reported them, and how many.
const RATES: [(&str, f64); 3] =
    [("Llama 3", 419.0 / 54.0 / 16384.0), ("RSC-1", 6.50 / 1000.0 / 8.0), ("RSC-2", 2.34 / 1000.0 / 8.0)];

/// Seconds that training stands still for a checkpoint.
const SAVE: f64 = 10.0;
/// Until a failure is noticed where processes start again, all have ended, and new ones have imported what they need.
const START: f64 = 40.0;
/// Until they have read a checkpoint.
const RELOAD: f64 = 60.0;
const FIXED_INTERVAL: f64 = 1800.0;
/// Of a step.
const STEP: f64 = 5.0;
/// Steps between two copies of shards, by default.
const COPIES: f64 = 20.0;
/// As often as the state's way lets it.
const OFTEN: f64 = 4.0;
/// To set up a communicator, for each rank: 265 s for 96 Ki of them (NCCLX).
const COMMUNICATOR: f64 = 265.0 / 98_304.0;
/// State of a rank, and what was measured for its way over gloo: 500 MB in 2.0 s instead of 0.44 s.
const STATE_GB: f64 = 4.0;
const GB_PER_S: f64 = 0.5 / (2.0 - 0.44);
/// From a rank's death to the next step with a spare and little state, as was measured for two ranks of one node.
const SPARE: f64 = 0.11;
/// To give a spare its device.
const DEVICE: f64 = 5.0;
/// Failures that only a checkpoint can mend.
const BEYOND: f64 = 0.01;

fn communicator(ranks: u32, faster: f64) -> f64 {
    COMMUNICATOR * f64::from(ranks) / faster
}

/// All ranks connect to the store of a new round, one after another, and have one answer at least.
fn store(ranks: u32) -> f64 {
    f64::from(ranks) * CLIENT_US / 1e6
}

fn transfer() -> f64 {
    STATE_GB / GB_PER_S
}

/// After the death of a rank, and of the silence of a node in whose place another one waits.
fn recoveries(size: &Size, faster: f64) -> (f64, f64) {
    let common = store(size.ranks) + communicator(size.ranks, faster) + transfer();
    let rank = SPARE + DEVICE + size.elastic.rank_next.as_secs_f64() + common;
    let noticed = size.elastic.node_noticed + size.elastic.node_next;
    (rank, noticed.as_secs_f64() + START + common)
}

fn restart(ranks: u32, faster: f64) -> f64 {
    START + RELOAD + store(ranks) + communicator(ranks, faster)
}

pub(crate) fn recovery(sizes: &[Size]) -> String {
    let heads = "ranks | coordinator and network | store | communicator | state | a rank dies, in all | a node is lost, in all | restart of all";
    let seconds = |seconds| time(Duration::from_secs_f64(seconds));
    table(heads, sizes, |size| {
        let (rank, node) = recoveries(size, 1.0);
        format!(
            "{} | {} | {} | {} | {} | {} | {} | {}",
            size.ranks,
            time(size.elastic.rank_next),
            seconds(store(size.ranks)),
            seconds(communicator(size.ranks, 1.0)),
            seconds(transfer()),
            seconds(rank),
            seconds(node),
            seconds(restart(size.ranks, 1.0)),
        )
    })
}

/// At all rates.
pub(crate) fn goodput(seed: u64, sizes: &[Size]) -> String {
    shares(seed, &RATES, sizes, 1.0)
}

/// At one rate, where communicators are set up so many times faster than NCCL does it.
pub(crate) fn faster(seed: u64, sizes: &[Size], times: f64) -> String {
    shares(seed, &RATES[1..2], sizes, times)
}

fn shares(seed: u64, rates: &[(&str, f64)], sizes: &[Size], faster: f64) -> String {
    let heads = "failures as of | ranks | MTBF | restart, every 30 min | restart, optimum (every) | rank dies, 1 step | node lost, copies each 20 steps | node lost, copies each 4";
    let rows: Vec<_> = rates.iter().flat_map(|rate| sizes.iter().map(move |size| (rate, size))).collect();
    table(heads, &rows, |((name, per_day), size)| {
        let mtbf = 86_400.0 / (per_day * f64::from(size.ranks));
        let restart = restart(size.ranks, faster);
        let share = |interval, in_place| {
            let job = Job { mtbf, interval, save: SAVE, restart, in_place };
            let random = &mut Random::new(seed);
            format!("{:.2} %", simulate(random, &job, FAILURES) * 100.0)
        };
        let (rank, node) = recoveries(size, faster);
        // Checkpoints are for what nothing else can mend.
        let in_place = |recovery, least, most| {
            let repeated = (least * STEP, most * STEP);
            share(young(mtbf / BEYOND, SAVE), Some(InPlace { recovery, repeated, beyond: BEYOND }))
        };
        let optimum = young(mtbf, SAVE);
        format!(
            "{name} | {} | {} | {} | {} ({:.0} min) | {} | {} | {}",
            size.ranks,
            hours(mtbf),
            share(FIXED_INTERVAL, None),
            share(optimum, None),
            optimum / 60.0,
            in_place(rank, 0.0, 1.0),
            in_place(node, COPIES, 2.0 * COPIES),
            in_place(node, OFTEN, 2.0 * OFTEN),
        )
    })
}

fn hours(seconds: f64) -> String {
    let hours = seconds / 3600.0;
    if hours >= 100.0 { format!("{:.0} d", hours / 24.0) } else { format!("{hours:.2} h") }
}
