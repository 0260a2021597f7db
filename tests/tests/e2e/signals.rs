//! Signals that reach ranks of the runtime: from a scheduler that signals all processes of a step,
//! and from a user who signals one process.

use std::path::{Path, PathBuf};

use ice_proto::exit::ExitCode;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::{TempDir, tempdir};

use crate::forms::Run;
use crate::stopping::{events, saved};
use crate::support::{Job, Program, SOON, TRAINING, built, wait_until};

const LAUNCHES: [fn(&Run, &[&str]) -> Program; 2] = [Run::under_ice_launch, Run::by_itself];

/// A training job of two ranks.
struct Training {
    job: Job,
    log: PathBuf,
    ranks: Vec<Pid>,
    _folder: TempDir,
}

impl Training {
    fn start(launch: fn(&Run, &[&str]) -> Program) -> Self {
        let folder = tempdir().unwrap();
        let (out, log) = (folder.path().join("out"), folder.path().join("events"));
        let run = Run::new(&out).args(["--epochs", "1", "--steps", "100000"]);
        let job = launch(&run, &["--devices", "cpu:0-1", "--events", log.to_str().unwrap()]).start();
        wait_until(TRAINING, "a first step", || !events(&log, "first_step").is_empty());
        let ranks = ranks(&log);
        Self { job, log, ranks, _folder: folder }
    }

    /// Signals all processes of the job, the ranks first.
    fn signal_all(&self, signal: Signal) {
        self.ranks.iter().for_each(|rank| kill_process(*rank, signal).unwrap());
        self.job.signal(signal);
    }

    /// Waits for the end, and checks that each rank exited by itself after one more checkpoint.
    fn expect_saved_end(self, checkpoints: usize, said: &str) {
        let outcome = self.job.finish(TRAINING);
        outcome.expect_code(ExitCode::Signal(15).code().into()).expect_in_stderr(&[said]);
        let ended = events(&self.log, "rank_ended");
        assert_eq!(ended.len(), 2);
        for rank in &ended {
            assert_eq!(rank["exit_code"], 0, "not ended by itself: {rank} {}", outcome.transcript());
        }
        assert_eq!(saved(&self.log).len(), checkpoints, "{}", outcome.transcript());
    }
}

/// Returns the processes of the ranks.
fn ranks(log: &Path) -> Vec<Pid> {
    let pid = |event: &serde_json::Value| Pid::from_raw(event["pid"].as_i64()?.try_into().ok()?);
    events(log, "rank_started").iter().map(|event| pid(event).unwrap()).collect()
}

#[test]
fn terminate_to_all_processes_of_a_job_saves_and_ends_it() {
    for launch in LAUNCHES {
        let training = Training::start(launch);
        training.signal_all(Signal::TERM);
        training.expect_saved_end(1, "told to stop by SIGTERM");
    }
}

#[test]
fn user_signals_to_all_processes_of_a_job_save_and_pause() {
    let training = Training::start(Run::under_ice_launch);
    training.signal_all(Signal::USR1);
    wait_until(SOON, "a checkpoint", || saved(&training.log).len() == 1);
    training.signal_all(Signal::USR2);
    wait_until(SOON, "a pause", || events(&training.log, "paused").len() == 2);
    training.signal_all(Signal::USR2);
    wait_until(SOON, "the end of the pause", || events(&training.log, "resumed").len() == 2);
    training.signal_all(Signal::TERM);
    training.expect_saved_end(2, "told to stop by SIGTERM");
}

#[test]
fn signals_to_ranks_alone_end_none_of_them() {
    let training = Training::start(Run::under_ice_launch);
    for signal in [Signal::INT, Signal::HUP, Signal::USR1, Signal::USR2] {
        training.ranks.iter().for_each(|rank| kill_process(*rank, signal).unwrap());
    }
    // Both ranks take part in the checkpoint that a signal to the job asks for.
    training.job.signal(Signal::USR1);
    wait_until(SOON, "a checkpoint", || saved(&training.log).len() == 1);
    // If the signalled rank ended alone, the other rank could not complete its checkpoint.
    kill_process(training.ranks[1], Signal::TERM).unwrap();
    training.expect_saved_end(2, "local rank 1 was told to stop by SIGTERM");
}

#[test]
fn ranks_that_reach_no_boundary_end_by_the_terminate_of_the_agent() {
    let folder = tempdir().unwrap();
    let log = folder.path().join("events");
    // The last third of this timeout is left for the ranks to end.
    let options = ["--devices", "cpu:0-1", "--shutdown-timeout", "12", "--events", log.to_str().unwrap()];
    let job = Program::ice_launch(options).arg(built("rank")).arg("wait").start();
    job.wait_for_line(SOON, |line| line.contains("waiting"));
    // The ranks leave this SIGTERM to the agent, which says over the link when one counts.
    ranks(&log).into_iter().for_each(|rank| kill_process(rank, Signal::TERM).unwrap());
    let outcome = job.finish(SOON);
    outcome.expect_code(ExitCode::Signal(15).code().into());
    let how: Vec<_> = events(&log, "stopping").iter().map(|event| event["how"].clone()).collect();
    assert_eq!(how, ["asked", "terminated"], "{}", outcome.transcript());
    for rank in events(&log, "rank_ended") {
        assert_eq!(rank["signal"], 15, "{rank} {}", outcome.transcript());
    }
}

#[test]
fn rank_without_a_launcher_keeps_the_default_actions() {
    for signal in [Signal::TERM, Signal::USR1] {
        let mut program = Program::new(built("rank")).args(["wait"]);
        let variables = [("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")];
        let (_store, port) = ice_c10d::testing::serve_store().unwrap();
        for (name, value) in variables {
            program = program.env(name, value);
        }
        let job = program.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string()).start();
        job.wait_for_line(SOON, |line| line.contains("waiting"));
        job.signal(signal);
        assert_eq!(job.finish(SOON).signal, Some(signal.as_raw()));
    }
}
