//! Ranks and agents that are killed or stopped at random: the others go on from memory, and in the end it is as if nothing had happened.
//!
//! `ICE_CHAOS_SEED=<n>` replays the faults; what a process was doing when one came is up to the machine. `ICE_CHAOS_FAULTS=<n>` makes them
//! more or fewer.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::{TempDir, tempdir};

use crate::random::Random;
use crate::support::{Job, Program, TRAINING, built, checkpoints, free_port};

/// Passes of a step, and of a repetition of the trainee's tasks.
const PASSES: u64 = 2;
/// The longest wait between a pass and a fault, in microseconds: as long as some steps, a save or an evaluation take.
const LATER: u64 = 8_000;
/// The longest wait between two faults that come together: about as long as a recovery takes.
const TOGETHER: u64 = 400_000;

struct Training {
    folder: TempDir,
    repeats: u64,
    port: u16,
}

impl Training {
    fn new(repeats: u64) -> Self {
        let mut folder = tempdir().unwrap();
        folder.disable_cleanup(std::env::var_os("ICE_CHAOS_KEEP").is_some());
        fs::create_dir(folder.path().join("seen")).unwrap();
        Self { folder, repeats, port: free_port() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// An agent with two ranks.
    fn agent(&self, nodes: &str, node_rank: Option<&str>, devices: &str) -> Program {
        let endpoint = format!("127.0.0.1:{}", self.port);
        let of_node = node_rank.map_or(Vec::new(), |rank| vec!["--node-rank", rank]);
        Program::ice_launch(["--nnodes", nodes, "--rdzv-endpoint", &endpoint])
            .args(of_node)
            .args(["--devices", devices, "--run-id", "chaos", "--log-dir", &self.path("logs")])
            .args(["--max-restarts", "1000000"])
            .args([
                "--restart-backoff",
                "0",
                "--crash-loop-limit",
                "0",
                "--hang-timeout",
                "3",
                "--rdzv-conf",
                "last_call_timeout=1",
            ])
            .arg(built("trainee"))
            .args(["--seen", &self.path("seen"), "--life", "1", "--out-dir", &self.path("out")])
            .args(["--repeats", &self.repeats.to_string()])
    }

    /// By the number of the pass and the rank what was seen in it. Whatever is done again is the same again.
    fn seen(&self) -> BTreeMap<(u64, usize), Vec<usize>> {
        let mut seen = BTreeMap::new();
        for rank in 0.. {
            let Ok(text) = fs::read_to_string(Path::new(&self.path("seen")).join(format!("rank{rank}.txt")))
            else {
                break;
            };
            for line in text.lines() {
                let mut parts = line.splitn(3, ' ');
                let pass = parts.nth(1).unwrap().parse().unwrap();
                // A rank that was killed may have left half a line.
                let Some(Ok(indices)) = parts.next().map(serde_json::from_str::<Vec<usize>>) else {
                    continue;
                };
                let before = seen.insert((pass, rank), indices.clone());
                assert!(before.is_none_or(|before| before == indices), "pass {pass} of rank {rank}");
            }
        }
        seen
    }

    /// Files of the last checkpoint, and what its manifest says that a fault may not change.
    fn end(&self) -> (BTreeMap<String, Vec<u8>>, BTreeMap<&'static str, serde_json::Value>) {
        let last = checkpoints(Path::new(&self.path("out"))).pop().unwrap();
        let files = fs::read_dir(&last).unwrap().map(|entry| entry.unwrap().path());
        let mut files: BTreeMap<_, _> = files
            .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap()))
            .collect();
        let manifest: serde_json::Value =
            serde_json::from_slice(&files.remove("manifest.json").unwrap()).unwrap();
        (files, ["counters", "tasks"].map(|key| (key, manifest[key].clone())).into())
    }
}

impl Training {
    /// What the agents have written down of the rounds.
    fn rounds(&self) -> Vec<serde_json::Value> {
        let folders = fs::read_dir(self.path("logs")).unwrap().map(|entry| entry.unwrap().path());
        let texts = folders.filter_map(|folder| fs::read_to_string(folder.join("rounds.jsonl")).ok());
        let rounds = texts.flat_map(|text| text.lines().map(serde_json::from_str).collect::<Vec<_>>());
        rounds.filter_map(Result::ok).collect()
    }
}

fn last_pass(text: &str) -> u64 {
    let numbers = text.lines().filter_map(|line| line.strip_prefix("pass ")?.parse().ok());
    numbers.max().unwrap_or(0)
}

fn random() -> Random {
    let seed = std::env::var("ICE_CHAOS_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("ICE_CHAOS_SEED={seed} replays it");
    Random::new(seed)
}

fn pick(ranks: &[Pid], random: &mut Random) -> Option<Pid> {
    ranks.get(random.below(ranks.len().max(1) as u64) as usize).copied()
}

fn ranks_of(job: &Job) -> Vec<Pid> {
    job.others().iter().map(|process| process.pid).collect()
}

#[test]
fn two_hundred_faults_leave_no_trace() {
    let mut random = random();
    let faults = std::env::var("ICE_CHAOS_FAULTS").ok().and_then(|faults| faults.parse().ok()).unwrap_or(200);
    let repeats = faults / 4 + 6;
    let undisturbed = Training::new(repeats);
    let other = undisturbed.agent("2", Some("1"), "cpu:0-1").start();
    undisturbed.agent("2", Some("0"), "cpu:0-1").run(TRAINING).expect_code(0);
    other.finish(TRAINING).expect_code(0);

    let training = Training::new(repeats);
    let first = training.agent("2", Some("0"), "cpu:0-1").start();
    let mut second = training.agent("2", Some("1"), "cpu:0-1").start();
    let (mut killed, mut stopped, mut agents, mut together) = (0, 0, 0, 0);
    let mut pass = 0;
    for _ in 0..faults {
        if random.below(5) > 0 {
            let wanted = pass + PASSES * (1 + random.below(4));
            first.wait_for_output(TRAINING, |text| last_pass(text) >= wanted);
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
                drop(std::mem::replace(&mut second, training.agent("2", Some("1"), "cpu:0-1").start()));
            }
            _ => {
                killed += 1;
                pick(&ranks, &mut random).map(|rank| kill_process(rank, Signal::KILL));
            }
        }
    }
    let first = first.finish(TRAINING);
    println!(
        "{killed} ranks killed, {stopped} stopped, {agents} agents killed; {together} faults soon after another"
    );
    first.expect_code(0);
    second.finish(TRAINING).expect_code(0);
    let rounds = training.rounds();
    assert!(rounds.iter().all(|round| round["repeated_steps"].as_u64().unwrap() <= 1), "{rounds:?}");
    let mut recoveries: Vec<_> =
        rounds.iter().filter_map(|round| round["recovered_after"].as_f64()).collect();
    recoveries.sort_by(f64::total_cmp);
    let from_memory = first.stdout.matches("from the memory of rank").count();
    println!(
        "{} rounds, {from_memory} of them from memory and {} from a checkpoint; recovered after {:.2} s in the middle, {:.2} s at most",
        rounds.iter().map(|round| round["round"].as_u64().unwrap()).max().unwrap() + 1,
        first.stdout.matches("resuming from").count(),
        recoveries[recoveries.len() / 2],
        recoveries.last().unwrap()
    );
    let (seen, expected) = (training.seen(), undisturbed.seen());
    // The last line of a rank that was killed may be missing, and nothing else.
    let others: BTreeSet<_> =
        seen.iter().filter(|(place, indices)| expected.get(place) != Some(indices)).collect();
    assert!(others.is_empty(), "{others:?}\n{}", first.transcript());
    assert!(expected.len() - seen.len() <= faults as usize, "{} of {}", seen.len(), expected.len());
    let ((files, says), (bits, said)) = (training.end(), undisturbed.end());
    assert_eq!(says, said, "{}", first.transcript());
    for (name, bytes) in &files {
        assert!(*bytes == bits[name], "{name} has other bits\n{}", first.transcript());
    }
}
