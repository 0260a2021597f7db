//! Python ranks and agents that are killed or stopped at random: the others continue from memory,
//! each sample counts once, and the result has the bits of an undisturbed training.
//!
//! `ICE_PYTHON_CHAOS_SEED=<n>` replays the faults. The activity of a process at the time of a fault
//! depends on the machine. `ICE_PYTHON_CHAOS_FAULTS=<n>` sets the number of faults; it is small by
//! default.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use ice_testing::Random;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::{TempDir, tempdir};

use crate::elastic_python::{result, said, script};
use crate::support::{Finished, Job, Program, TRAINING, free_port, last_pass, peer, random};

/// Longest wait between a pass and a fault, in microseconds: about the duration of some steps or of
/// a save.
const LATER: u64 = 30_000;
/// Longest wait between two faults that come together, in microseconds: about the duration of a
/// recovery.
const TOGETHER: u64 = 600_000;
/// Samples of an epoch. They are divided evenly among two ranks and among four, so that no rank
/// repeats one at the end of an epoch.
const SAMPLES: &str = "160";

/// A training on agents with two ranks each.
struct Training {
    folder: TempDir,
    python: PathBuf,
    nodes: &'static str,
    epochs: Option<String>,
    port: u16,
}

impl Training {
    fn new(python: &Path, nodes: &'static str, epochs: Option<String>) -> Self {
        Self { folder: tempdir().unwrap(), python: python.into(), nodes, epochs, port: free_port() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn agent(&self, node_rank: &str) -> Job {
        let endpoint = format!("127.0.0.1:{}", self.port);
        let launcher = Program::ice_launch(["--nnodes", self.nodes, "--rdzv-endpoint", &endpoint])
            .args(["--node-rank", node_rank, "--devices", "cpu:0-1", "--run-id", "chaos"])
            .args(["--max-restarts", "1000000", "--restart-backoff", "0", "--crash-loop-limit", "0"])
            .args(["--hang-timeout", "6", "--rdzv-conf", "keep_alive_interval=1,last_call_timeout=1"])
            .args(["--preload", "torch", "--log-dir"])
            .arg(self.path("logs"));
        let program = script(launcher, &self.python, "elastic.py").args(["--passes", "--samples", SAMPLES]);
        let program = program.args(["--save-every", "5", "--checkpoints"]).arg(self.path("checkpoints"));
        match &self.epochs {
            Some(epochs) => program.args(["--epochs", epochs]),
            None => program.args(["--epochs", "1000000", "--until"]).arg(self.path("end")),
        }
        .start()
    }

    /// Returns the agents' records of the rounds.
    fn rounds(&self) -> Vec<Value> {
        let folders = fs::read_dir(self.path("logs")).unwrap().map(|entry| entry.unwrap().path());
        let texts = folders.filter_map(|folder| fs::read_to_string(folder.join("rounds.jsonl")).ok());
        // A killed agent may have left half a line.
        texts
            .flat_map(|text| {
                text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect::<Vec<_>>()
            })
            .collect()
    }
}

/// Faults that were made, by kind.
#[derive(Debug, Default)]
struct Faults {
    killed: u32,
    stopped: u32,
    agents: u32,
    started: u32,
    together: u32,
}

/// The agents of a disturbed training. Rank 0 of the first round is on the first one.
struct Disturbed {
    training: Training,
    first: Job,
    second: Option<Job>,
    random: Random,
    pass: u64,
    faults: Faults,
}

impl Disturbed {
    fn start(training: Training) -> Self {
        let (first, second) = (training.agent("0"), Some(training.agent("1")));
        let random = random("ICE_PYTHON_CHAOS_SEED");
        Self { training, first, second, random, pass: 0, faults: Faults::default() }
    }

    /// Waits for some steps and a random time, or with a chance of one fifth for a random time
    /// after the last fault.
    fn wait(&mut self) {
        if self.random.below(5) > 0 {
            let wanted = self.pass + 2 * (1 + self.random.below(4));
            self.first.wait_for_output(TRAINING, |text| last_pass(text) >= wanted);
            self.pass = last_pass(&self.first.output());
            thread::sleep(Duration::from_micros(self.random.below(LATER)));
        } else {
            self.faults.together += 1;
            thread::sleep(Duration::from_micros(self.random.below(TOGETHER)));
        }
    }

    fn signal_rank(&mut self, signal: Signal) {
        let ranks: Vec<_> =
            [Some(&self.first), self.second.as_ref()].into_iter().flatten().flat_map(ranks_of).collect();
        if let Some(rank) = ranks.get(self.random.below(ranks.len().max(1) as u64) as usize) {
            // The rank may have ended by itself since it was found.
            let _ = kill_process(*rank, signal);
        }
    }

    /// Waits for the end, which comes after the current epoch.
    fn finish(mut self) -> (Training, Finished) {
        fs::write(self.training.path("end"), "").unwrap();
        let second = self.second.take().unwrap_or_else(|| self.training.agent("1"));
        let first = self.first.finish(TRAINING);
        println!("{:?}", self.faults);
        first.expect_code(0);
        second.finish(TRAINING).expect_code(0);
        (self.training, first)
    }
}

/// Returns the ranks of a job, without the process from which they are forked: it is Python with a
/// command of its own.
fn ranks_of(job: &Job) -> Vec<Pid> {
    let is_rank = |pid: &Pid| {
        let line = fs::read_to_string(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        line.contains("elastic.py") && !line.contains("\0-c\0")
    };
    job.others().iter().map(|process| process.pid).filter(is_rank).collect()
}

fn number_of_faults(default: u64) -> u64 {
    let given = std::env::var("ICE_PYTHON_CHAOS_FAULTS").ok();
    given.and_then(|faults| faults.parse().ok()).unwrap_or(default)
}

#[test]
fn faults_of_python_ranks_leave_no_trace() {
    let Some(python) = peer("elastic_python_chaos::faults_of_python_ranks_leave_no_trace") else { return };
    let faults = number_of_faults(8);
    let mut one = Disturbed::start(Training::new(&python, "2", None));
    for fault in 0..faults {
        one.wait();
        // The default number has each kind of fault.
        match (fault, one.random.below(40)) {
            (2, _) | (8.., 0..2) => {
                one.faults.stopped += 1;
                one.signal_rank(Signal::STOP);
            }
            (5, _) | (8.., 2..5) => {
                one.faults.agents += 1;
                one.second = None;
                one.second = Some(one.training.agent("1"));
            }
            _ => {
                one.faults.killed += 1;
                one.signal_rank(Signal::KILL);
            }
        }
    }
    let (training, disturbed) = one.finish();
    let rounds = training.rounds();
    let repeated = rounds.iter().filter_map(|round| round["repeated_steps"].as_u64());
    let mut recoveries: Vec<_> =
        rounds.iter().filter_map(|round| round["recovered_after"].as_f64()).collect();
    recoveries.sort_by(f64::total_cmp);
    println!(
        "{} records of rounds, at most {} steps repeated; recovered after {:.2} s in the middle, {:.2} s at most",
        rounds.len(),
        repeated.max().unwrap_or(0),
        recoveries.get(recoveries.len() / 2).unwrap_or(&0.0),
        recoveries.last().unwrap_or(&0.0),
    );
    let epochs = said(&disturbed.stdout, "epochs ")[0].to_owned();
    let undisturbed = Training::new(&python, "2", Some(epochs));
    let (first, second) = (undisturbed.agent("0"), undisturbed.agent("1"));
    let first = first.finish(TRAINING);
    second.finish(TRAINING).expect_code(0);
    assert_eq!(result(&disturbed), result(&first), "{}", disturbed.transcript());
}

#[test]
fn nodes_that_come_and_go_lose_and_repeat_no_sample() {
    let Some(python) = peer("elastic_python_chaos::nodes_that_come_and_go") else { return };
    let faults = number_of_faults(4);
    let mut one = Disturbed::start(Training::new(&python, "1:2", None));
    for fault in 0..faults {
        one.wait();
        match (fault, one.random.below(4)) {
            (0 | 2, _) | (4.., 0) => match one.second.take() {
                Some(second) => {
                    one.faults.agents += 1;
                    drop(second);
                }
                None => {
                    one.faults.started += 1;
                    one.second = Some(one.training.agent("1"));
                }
            },
            _ => {
                one.faults.killed += 1;
                one.signal_rank(Signal::KILL);
            }
        }
    }
    // The last node may still be on its way into the job.
    let _ = one.second.get_or_insert_with(|| one.training.agent("1"));
    let of_four = |text: &str| said(text, "rank ").last().is_some_and(|line| line.contains(" of 4 "));
    one.first.wait_for_output(TRAINING, of_four);
    let (_, disturbed) = one.finish();
    // The script checks at the end of each epoch how often each sample was applied.
    let epochs = said(&disturbed.stdout, "epochs ")[0];
    assert!(result(&disturbed)[0][0].starts_with(&format!("[{epochs}.0] ")), "{}", disturbed.transcript());
}
