//! Saves that are interrupted by SIGKILL or by a full disk. The tests start this program again as
//! the program that saves.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::env;
use std::io::{BufRead, BufReader};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, SystemTime};

use ice_core::optim::AdamW;
use ice_core::{
    Checkpoint, CheckpointOptions, HyperGraph, LossNode, ModuleNode, Repeat, ResumeFrom, Run, RunConfig,
    SaveCheckpoint, Task,
};
use ice_worker::Worker;
use tch::{Device, Kind};

const OUT: &str = "ICE_TEST_OUT";
const KEEP: &str = "ICE_TEST_KEEP";

/// Trains and saves after each step, without end. Prints `done <step>` once a checkpoint is on
/// disk.
#[test]
#[ignore = "a program for the other tests"]
fn saves_without_end() {
    let Some(out) = env::var_os(OUT).map(PathBuf::from) else { return };
    let mut graph = HyperGraph::new();
    // 3.6 MB, including the two moments.
    let net = ModuleNode::new(|path| path.randn("w", &[300, 1000], 0.0, 1.0), |w, _| Ok(w.shallow_clone()));
    graph.add("net", net.optimizer(AdamW::new(0.1)), "*").unwrap();
    graph.add("loss", LossNode::new(|x| Ok(x.tensor("net")?.square().mean(Kind::Float))), "*").unwrap();
    let tasks =
        Repeat::new(1_000_000).then(Task::train("train").steps(1)).then(SaveCheckpoint::new()).call(|run| {
            run.finish_saving()?;
            println!("\ndone {}", run.counters().train_steps());
            Ok(())
        });
    let worker = Rc::new(Worker::alone(Device::Cpu));
    let resume_from =
        Checkpoint::find(&ResumeFrom::Latest, &out, "none").is_ok().then_some(ResumeFrom::Latest);
    let keep_last = env::var(KEEP).ok().and_then(|keep| keep.parse::<NonZeroUsize>().ok());
    let config = RunConfig {
        seed: 1,
        out_dir: out,
        save_every_steps: None,
        resume_from,
        checkpoints: CheckpointOptions { keep_last, ..CheckpointOptions::default() },
        ..RunConfig::default()
    };
    Run::execute(&graph, &tasks, worker, config).unwrap();
}

fn arguments() -> [&'static str; 5] {
    ["saves_without_end", "--exact", "--ignored", "--nocapture", "--test-threads=1"]
}

/// Returns the next number of Marsaglia's xorshift.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn step_of(line: &str) -> Option<u64> {
    line.strip_prefix("done ")?.parse().ok()
}

#[test]
fn a_save_that_is_killed_costs_no_older_checkpoint() {
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = env::var("ICE_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(clock | 1);
    println!("ICE_TEST_SEED={seed}");
    let mut random = seed;
    let out = tempfile::tempdir().unwrap();
    let holder = out.path().join("none_local/ckpts");
    let (mut done, mut unheard, mut cut_short) = (0, 0, 0);
    for kill in 0..100 {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(arguments())
            .env(OUT, out.path())
            .env(KEEP, "2")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let first = lines.by_ref().find_map(|line| step_of(&line)).expect("the program saves");
        // A resumed run first prints the step that the killed process had no time to print.
        assert!(first >= done, "kill {kill}: after step {done} came {first}");
        done = first;
        // From here on the program saves all the time. The delay decides which save is interrupted.
        thread::sleep(Duration::from_micros(next(&mut random) % 40_000));
        child.kill().unwrap();
        child.wait().unwrap();
        done = lines.filter_map(|line| step_of(&line)).last().unwrap_or(done);

        for entry in std::fs::read_dir(&holder).unwrap().map(Result::unwrap) {
            let seen = !entry.file_name().as_encoded_bytes().starts_with(b".");
            assert!(
                !seen || Checkpoint::open(&entry.path()).is_ok(),
                "kill {kill}: half of {entry:?} is to be seen"
            );
        }
        let newest = Checkpoint::find(&ResumeFrom::Latest, out.path(), "none").unwrap();
        let step = newest.manifest().counters.train_steps;
        assert!(step >= done, "kill {kill}: step {done} was saved and {step} was found");
        unheard += u64::from(step > done);
        cut_short += u64::from(hidden(&holder).iter().any(|name| name.ends_with(".partial")));
        // The next process must resume from this checkpoint: its first step may not be earlier.
        done = step;
    }
    println!(
        "{done} steps; {cut_short} saves were cut short, and of {unheard} that were whole nobody had heard"
    );
    let left = hidden(&holder);
    assert!(left.len() <= 2, "what was left is cleared at each start: {left:?}");
}

fn hidden(folder: &Path) -> Vec<String> {
    let names =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

/// Runs the program by lines of a shell, in which `"$@"` is the program. Returns the output.
fn in_shell(lines: &str, wrapper: &[&str], out: &Path) -> String {
    let script = format!("{lines}; \"$@\"; echo status $?; ls -A \"${OUT}/none_local/ckpts\"");
    let mut command = Command::new(wrapper.first().copied().unwrap_or("bash"));
    if !wrapper.is_empty() {
        command.args(&wrapper[1..]).arg("bash");
    }
    let output = command
        .args(["-c", &script, "bash"])
        .arg(env::current_exe().unwrap())
        .args(arguments())
        .env(OUT, out)
        .env_remove(KEEP)
        .output()
        .unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn a_full_disk_is_named_and_costs_no_older_checkpoint() {
    let out = tempfile::tempdir().unwrap();
    let unshare = ["unshare", "--mount"];
    let may_mount =
        Command::new("unshare").args(["--mount", "true"]).output().is_ok_and(|o| o.status.success());
    if !may_mount {
        return println!("skipped: only root can mount a small disk");
    }
    // Two checkpoints fit on the disk.
    let text = in_shell(&format!("mount -t tmpfs -o size=9m none \"${OUT}\""), &unshare, out.path());
    for part in ["E0S3", ".safetensors: No space left on device", "status 101"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let (_, listing) = text.split_once("status 101\n").unwrap();
    let names: Vec<_> = listing.lines().take(3).collect();
    assert_eq!(names, ["E0S1", "E0S2", "latest"], "{text}");
}

#[test]
fn a_limit_of_file_sizes_is_named() {
    let out = tempfile::tempdir().unwrap();
    // The limit is in blocks of 1024 bytes. The model has 1.2 MB, the optimizer 2.4 MB.
    let text = in_shell(
        "trap '' XFSZ; ulimit -f 2000; mkdir -p \"$ICE_TEST_OUT/none_local/ckpts\"",
        &[],
        out.path(),
    );
    for part in ["optimizer-00000-of-00001.safetensors: File too large", "status 101"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(
        std::fs::read_dir(out.path().join("none_local/ckpts")).unwrap().count(),
        0,
        "nothing is left: {text}"
    );
}
