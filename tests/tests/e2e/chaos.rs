//! Ranks and agents that are killed or stopped at random: the others continue from memory, and the
//! result is that of an undisturbed training.
//!
//! `ICE_CHAOS_SEED=<n>` replays the faults. The activity of a process at the time of a fault
//! depends on the machine. `ICE_CHAOS_FAULTS=<n>` sets the number of faults.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{Job, Program, TRAINING, Traces, free_port, last_pass, random};
use ice_testing::Random;

/// Number of passes of a step, and of a repetition of the trainee's tasks.
const PASSES: u64 = 2;
/// Longest wait between a pass and a fault, in microseconds: about the duration of some steps, a
/// save or an evaluation.
const LATER: u64 = 8_000;
/// Longest wait between two faults that come together, in microseconds: about the duration of a
/// recovery.
const TOGETHER: u64 = 400_000;

struct Training<'a> {
    traces: Traces,
    options: &'a [&'a str],
    repeats: u64,
    port: u16,
}

impl<'a> Training<'a> {
    fn new(options: &'a [&'a str], repeats: u64) -> Self {
        Self { traces: Traces::new(), options, repeats, port: free_port() }
    }

    /// Returns an agent with two ranks.
    fn agent(&self, node_rank: &str) -> Program {
        let (endpoint, logs) = (format!("127.0.0.1:{}", self.port), self.traces.path("logs"));
        let launcher = Program::ice_launch(["--nnodes", "2", "--rdzv-endpoint", &endpoint])
            .args(["--node-rank", node_rank, "--devices", "cpu:0-1", "--run-id", "chaos", "--log-dir", &logs])
            .args(["--max-restarts", "1000000", "--restart-backoff", "0", "--crash-loop-limit", "0"])
            .args(["--hang-timeout", "3", "--rdzv-conf", "last_call_timeout=1"]);
        let trainee = self.traces.trainee(launcher, 1).args(["--repeats", &self.repeats.to_string()]);
        trainee.args(self.options)
    }

    /// Returns the samples by pass and rank. A repeated pass must have the same samples.
    fn seen(&self) -> BTreeMap<(u64, usize), Vec<usize>> {
        let mut seen = BTreeMap::new();
        for pass in self.traces.passes() {
            let Some(indices) = pass.indices else { continue };
            let before = seen.insert((pass.number, pass.rank), indices.clone());
            assert!(
                before.is_none_or(|before| before == indices),
                "pass {} of rank {}",
                pass.number,
                pass.rank
            );
        }
        seen
    }
}

fn pick(ranks: &[Pid], random: &mut Random) -> Option<Pid> {
    ranks.get(random.below(ranks.len().max(1) as u64) as usize).copied()
}

fn ranks_of(job: &Job) -> Vec<Pid> {
    job.others().iter().map(|process| process.pid).collect()
}

#[test]
fn two_hundred_faults_leave_no_trace() {
    let rounds = faults_leave_no_trace(&[], 200);
    assert!(rounds.iter().all(|round| repeated(round) <= 1), "{rounds:?}");
}

/// A lost shard of the state is in the memory of a rank on the other node, as it was some steps
/// before, unless that rank is lost as well.
#[test]
fn faults_leave_no_trace_where_each_rank_has_a_part_of_the_state() {
    let rounds = faults_leave_no_trace(&["--shard-optimizer", "--copy-shards-every", "2"], 60);
    let within = rounds.iter().filter(|round| repeated(round) <= 2 + 1).count();
    assert!(10 * within >= 9 * rounds.len(), "{within} of {rounds:?}");
}

fn repeated(round: &Value) -> u64 {
    round["repeated_steps"].as_u64().unwrap()
}

/// Disturbs a training with these options. Returns its agents' records of the rounds.
fn faults_leave_no_trace(options: &[&str], faults: u64) -> Vec<Value> {
    let mut random = random("ICE_CHAOS_SEED");
    let given = std::env::var("ICE_CHAOS_FAULTS").ok();
    let faults = given.and_then(|faults| faults.parse().ok()).unwrap_or(faults);
    let repeats = faults / 4 + 6;
    let undisturbed = Training::new(options, repeats);
    let other = undisturbed.agent("1").start();
    undisturbed.agent("0").run(TRAINING).expect_code(0);
    other.finish(TRAINING).expect_code(0);

    let training = Training::new(options, repeats);
    let first = training.agent("0").start();
    let mut second = training.agent("1").start();
    let (mut killed, mut stopped, mut agents, mut together) = (0_u64, 0, 0, 0);
    let mut pass = 0;
    for _ in 0..faults {
        if random.below(5) > 0 {
            let wanted = pass + PASSES * (1 + random.below(4));
            // On a loaded machine, passes between faults that come together may use up the training.
            if first.wait_for_output_or_end(TRAINING, |text| last_pass(text) >= wanted) {
                break;
            }
            pass = last_pass(&first.output());
            thread::sleep(Duration::from_micros(random.below(LATER)));
        } else {
            together += 1;
            thread::sleep(Duration::from_micros(random.below(TOGETHER)));
        }
        let ranks = [ranks_of(&first), ranks_of(&second)].concat();
        match random.below(40) {
            0..2 => {
                stopped += 1;
                pick(&ranks, &mut random).map(|rank| kill_process(rank, Signal::STOP));
            }
            2..6 => {
                agents += 1;
                drop(std::mem::replace(&mut second, training.agent("1").start()));
            }
            _ => {
                killed += 1;
                pick(&ranks, &mut random).map(|rank| kill_process(rank, Signal::KILL));
            }
        }
    }
    let first = first.finish(TRAINING);
    let count = killed + stopped + agents;
    assert!(2 * count >= faults, "{count} of {faults} faults before the end\n{}", first.transcript());
    println!(
        "{killed} ranks killed, {stopped} stopped, {agents} agents killed; {together} faults soon after another"
    );
    first.expect_code(0);
    second.finish(TRAINING).expect_code(0);
    let rounds = training.traces.rounds();
    let mut recoveries: Vec<_> =
        rounds.iter().filter_map(|round| round["recovered_after"].as_f64()).collect();
    recoveries.sort_by(f64::total_cmp);
    let from_memory = first.stdout.matches(": continuing after step").count();
    let steps: u64 = rounds.iter().map(repeated).sum();
    println!(
        "{} rounds, {from_memory} of them from memory ({} from copies) and {} from a checkpoint; {steps} steps repeated; recovered after {:.2} s in the middle, {:.2} s at most",
        rounds.iter().map(|round| round["round"].as_u64().unwrap()).max().unwrap() + 1,
        first.stdout.matches("from copies in memory").count(),
        first.stdout.matches("resuming from").count(),
        recoveries[recoveries.len() / 2],
        recoveries.last().unwrap()
    );
    let (seen, expected) = (training.seen(), undisturbed.seen());
    // Only the last line of a killed rank may be missing.
    let others: BTreeSet<_> =
        seen.iter().filter(|(place, indices)| expected.get(place) != Some(indices)).collect();
    assert!(others.is_empty(), "{others:?}\n{}", first.transcript());
    assert!(expected.len() - seen.len() <= faults as usize, "{} of {}", seen.len(), expected.len());
    training.traces.assert_same_end(&undisturbed.traces, &["counters", "tasks"], &first.transcript());
    rounds
}
