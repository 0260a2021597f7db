//! The cost of a failure for a training, by kind of recovery. The assumptions are the constants
//! below, and explained in docs/scale.md.

use std::time::Duration;

use crate::goodput::{InPlace, Job, simulate, young};
use crate::report::{CLIENT_US, Size, table, time};
use ice_testing::Random;

/// Number of failures of a simulated job.
const FAILURES: u32 = 20_000;

/// Failures per rank and day, by source.
const RATES: [(&str, f64); 3] =
    [("Llama 3", 419.0 / 54.0 / 16384.0), ("RSC-1", 6.50 / 1000.0 / 8.0), ("RSC-2", 2.34 / 1000.0 / 8.0)];

/// Time that training pauses for a checkpoint, in seconds.
const SAVE: f64 = 10.0;
/// Time of a restart of processes, in seconds: the failure is detected, all processes have ended,
/// and new ones have imported their modules.
const START: f64 = 40.0;
/// Time to read a checkpoint, in seconds.
const RELOAD: f64 = 60.0;
const FIXED_INTERVAL: f64 = 1800.0;
/// Time of a step, in seconds.
const STEP: f64 = 5.0;
/// Default number of steps between two copies of shards.
const COPIES: f64 = 20.0;
/// Smallest number of steps between two copies that the transfer of the state permits.
const OFTEN: f64 = 4.0;
/// Time to set up a communicator, in seconds per rank: 265 s for 96 Ki ranks (NCCLX).
const COMMUNICATOR: f64 = 265.0 / 98_304.0;
/// State of a rank, and the measured speed of its transfer over gloo: 500 MB in 2.0 s instead of
/// 0.44 s.
const STATE_GB: f64 = 4.0;
const GB_PER_S: f64 = 0.5 / (2.0 - 0.44);
/// Time from a rank's death to the next step with a spare and little state, in seconds, as measured
/// for two ranks of one node.
const SPARE: f64 = 0.11;
/// Time until a spare has initialized its device, in seconds.
const DEVICE: f64 = 5.0;
/// Share of failures after which only a checkpoint helps.
const BEYOND: f64 = 0.01;

fn communicator(ranks: u32, faster: f64) -> f64 {
    COMMUNICATOR * f64::from(ranks) / faster
}

/// Returns the time until all ranks have connected to the store of a new round, one after another,
/// and have received at least one answer.
fn store(ranks: u32) -> f64 {
    f64::from(ranks) * CLIENT_US / 1e6
}

fn transfer() -> f64 {
    STATE_GB / GB_PER_S
}

/// Returns the time of recovery after the death of a rank, and after the silence of a node that a
/// waiting node replaces.
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

/// Returns the table for all rates.
pub(crate) fn goodput(seed: u64, sizes: &[Size]) -> String {
    shares(seed, &RATES, sizes, 1.0)
}

/// Returns the table for one rate, if communicators are set up `times` times faster than by NCCL.
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
        // In a job that recovers in place, checkpoints are only for failures that nothing else can
        // repair, so they are rarer.
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
