//! A training that is killed at random, again and again, gives the same result as an undisturbed
//! one.
//!
//! `ICE_KILL_SEED=<n>` replays the places. The part of a step that is done when the signal arrives
//! depends on the machine.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::Duration;

use ice_proto::exit::ExitCode;
use rustix::process::Signal;

use crate::support::{Finished, Job, Program, SAMPLES, TRAINING, Traces, assert_epochs, random};

const SEED: &str = "ICE_KILL_SEED";
/// Longest wait between a pass and the signal, in microseconds: about the duration of some steps, a
/// save or an evaluation.
const LATER: u64 = 8_000;

const EVERY_STEP: [&str; 2] = ["--save-every-steps", "1"];

/// A training in several lives, between which it is killed.
struct Training {
    traces: Traces,
    options: Vec<&'static str>,
    lives: u64,
}

impl Training {
    fn new(options: &[&'static str]) -> Self {
        Self { traces: Traces::new(), options: options.to_vec(), lives: 0 }
    }

    fn next_life(&mut self, devices: &str) -> Program {
        self.lives += 1;
        let launcher = Program::ice_launch(["--devices", devices, "--run-id", "trainee"]);
        let program = self.traces.trainee(launcher, self.lives).args(&self.options);
        let resume = !self.traces.checkpoints().is_empty();
        program.args(if resume { &["--resume-from", "latest"][..] } else { &[] })
    }

    fn finish(&mut self, devices: &str) {
        self.next_life(devices).run(TRAINING).expect_code(0);
    }

    /// Kills all processes this number of passes and some microseconds after the first pass of a
    /// life.
    fn kill(&mut self, devices: &str, passes: u64, later: Duration) {
        drop(self.started(devices, passes, later));
    }

    fn started(&mut self, devices: &str, passes: u64, later: Duration) -> Job {
        let job = self.next_life(devices).start();
        let number = |line: &str| line.strip_prefix("pass ").and_then(|number| number.parse::<u64>().ok());
        let first = job.wait_for_line(TRAINING, |line| number(line).is_some());
        let wanted = number(&first).map(|first| first + passes);
        job.wait_for_line(TRAINING, |line| number(line) == wanted);
        thread::sleep(later);
        job
    }

    /// Returns the number of half-written checkpoints that a kill has left.
    fn partial(&self) -> usize {
        let runs = fs::read_dir(self.traces.path("out")).unwrap();
        let names =
            runs.flat_map(|run| fs::read_dir(run.unwrap().path().join("ckpts")).into_iter().flatten());
        names
            .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".partial"))
            .count()
    }

    /// Returns the number of passes of rank 0 that were repeated in a later life.
    fn repeated(&self) -> usize {
        let of_main = self.traces.passes().into_iter().filter(|pass| pass.rank == 0);
        let mut passes: Vec<_> = of_main.map(|pass| pass.number).collect();
        let all = passes.len();
        passes.sort_unstable();
        passes.dedup();
        all - passes.len()
    }

    /// Returns the samples of each rank by pass, from the last life that reached the pass.
    fn seen(&self) -> BTreeMap<u64, BTreeMap<usize, Vec<usize>>> {
        let mut seen: BTreeMap<u64, (u64, BTreeMap<usize, Vec<usize>>)> = BTreeMap::new();
        for pass in self.traces.passes() {
            let indices = pass.indices.unwrap();
            let known = seen.entry(pass.number).or_default();
            if pass.life > known.0 {
                *known = (pass.life, BTreeMap::new());
            }
            if pass.life == known.0 {
                known.1.insert(pass.rank, indices);
            }
        }
        seen.into_iter().map(|(pass, (_, ranks))| (pass, ranks)).collect()
    }
}

fn is_never_killed(devices: &str, options: &[&'static str], kills: u64) {
    let mut random = random(SEED);
    let mut undisturbed = Training::new(options);
    undisturbed.finish(devices);
    let mut killed = Training::new(options);
    for _ in 0..kills {
        killed.kill(devices, random.below(5), Duration::from_micros(random.below(LATER)));
    }
    killed.finish(devices);
    println!("{kills} kills, {} of them within a save", killed.partial());
    assert_eq!(killed.seen(), undisturbed.seen());
    assert_same_end(&killed, &undisturbed);
}

fn assert_same_end(disturbed: &Training, undisturbed: &Training) {
    let keys = ["counters", "tasks", "measures", "nodes"];
    disturbed.traces.assert_same_end(&undisturbed.traces, &keys, "");
}

#[test]
fn twenty_kills_leave_no_trace() {
    is_never_killed("cpu:0-1", &EVERY_STEP, 20);
}

#[test]
fn kills_leave_no_trace_where_three_ranks_share_the_state_and_the_writing() {
    is_never_killed("cpu:0-2", &[&EVERY_STEP[..], &["--shard-optimizer", "--split-checkpoints"]].concat(), 6);
}

#[test]
fn stops_leave_no_trace_and_lose_no_step() {
    let mut random = random(SEED);
    let options = ["--shard-optimizer"];
    let mut undisturbed = Training::new(&options);
    undisturbed.finish("cpu:0-2");
    let mut stopped = Training::new(&options);
    for _ in 0..6 {
        let job =
            stopped.started("cpu:0-2", 1 + random.below(12), Duration::from_micros(random.below(LATER)));
        job.signal(Signal::TERM);
        job.finish(TRAINING).expect_code(ExitCode::Signal(15).code().into());
    }
    stopped.finish("cpu:0-2");
    assert_eq!(stopped.seen(), undisturbed.seen());
    assert_eq!(stopped.repeated(), 0, "what was done before a stop is in its checkpoint");
    assert_same_end(&stopped, &undisturbed);
}

fn short_training(options: &[&str]) -> (Traces, Finished) {
    let launcher = Program::ice_launch(["--devices", "cpu:0-1", "--max-restarts", "1", "--run-id", "lost"]);
    let traces = Traces::new();
    let outcome = traces.trainee(launcher, 1).args(["--repeats", "1"]).args(options).run(TRAINING);
    outcome.expect_code(0);
    (traces, outcome)
}

/// The metric `noise` draws random numbers.
#[test]
fn rank_killed_within_an_evaluation_leaves_no_trace_in_measures() {
    let measures = |options: &[&str]| -> Vec<String> {
        let (_, outcome) = short_training(options);
        let lines = outcome.stdout.lines().filter(|line| line.starts_with("val epoch"));
        // A line ends with the time that the epoch took.
        lines.map(|line| line.split("  (").next().unwrap_or_default().to_owned()).collect()
    };
    let undisturbed = measures(&[]);
    assert!(undisturbed.len() == 3 && undisturbed[0].contains("noise 0."), "{undisturbed:?}");
    assert_eq!(measures(&["--dies", "1", "--dies-in", "noise"]), undisturbed);
}

/// The other rank fails in an exchange of statistics within the forward pass, or in one of
/// gradients, after the module has changed its buffers.
#[test]
fn rank_killed_within_a_step_leaves_no_trace_with_sync_batch_norm_and_with_torch_script() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/core/tests/reference/script/net.pt");
    for (options, lost, node) in
        [(&["--sync-batch-norm"][..], "1", "seen"), (&["--script", script], "0", "loss")]
    {
        let (undisturbed, _) = short_training(options);
        let (traces, outcome) = short_training(&[options, &["--dies", lost, "--dies-in", node]].concat());
        for words in ["continuing after step 5", "from the memory of rank"] {
            assert!(outcome.stdout.contains(words), "{words}: {}", outcome.transcript());
        }
        traces.assert_same_end(&undisturbed, &["counters", "tasks", "measures"], &outcome.transcript());
    }
}

#[test]
fn every_sample_is_seen_once_an_epoch_whatever_the_number_of_ranks() {
    let mut random = random(SEED);
    let mut training = Training::new(&[&EVERY_STEP[..], &["--shard-optimizer"]].concat());
    for devices in ["cpu:0-1", "cpu:0-2", "cpu:0", "cpu:0-2", "cpu:0-1", "cpu:0"] {
        training.kill(devices, 2 + random.below(5), Duration::from_micros(random.below(LATER)));
    }
    training.finish("cpu:0-1");
    let order: Vec<usize> =
        training.seen().into_values().flat_map(|ranks| ranks.into_values().flatten()).collect();
    let epochs = order.chunks_exact(SAMPLES);
    assert!(epochs.len() >= 10 && epochs.remainder().len() < SAMPLES, "{}", order.len());
    assert_epochs(&order);
    let mut undisturbed = Training::new(&[&EVERY_STEP[..], &["--shard-optimizer"]].concat());
    undisturbed.finish("cpu:0");
    let whole: Vec<usize> =
        undisturbed.seen().into_values().flat_map(|ranks| ranks.into_values().flatten()).collect();
    assert_eq!(order, whole, "the order does not depend on the ranks");
}
