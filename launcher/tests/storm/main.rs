//! A storm of faults. Each fault disturbs a job. Afterwards no process may be left, the exit code
//! must be the documented one, and all output of ranks must be in its place.
//!
//! `STORM_SEED=<n>` replays a storm, `STORM_FAULT=<n>` only one of its faults, and
//! `STORM_FAULTS=<n>` sets the number of faults.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fault;
#[path = "../support/mod.rs"]
#[expect(dead_code, reason = "other tests use the rest")]
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::{TempDir, tempdir};

use fault::Fault;
use ice_testing::Random;
use support::{Finished, Freezer, Gate, Job, SOON, launch, lives, wait_for_state, wait_for_text};

const FAULTS: u64 = 200;
/// Number of jobs that run at the same time.
const AT_ONCE: usize = 3;

/// Destinations of stdout and stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Output {
    Console,
    Files,
    Both,
    /// Files alone, but written by the launcher.
    Rotated,
}

/// A job and its fault.
#[derive(Debug)]
struct Case {
    fault: Fault,
    ranks: u64,
    victim: u64,
    restarts: u64,
    output: Output,
    lines: u64,
    /// Pages and inodes that the log folder has in addition to those that the start needs.
    room: (u64, u64),
}

impl Case {
    fn new(seed: u64, number: u64) -> Self {
        let mut random = Random::new(seed.wrapping_mul(1_000_003).wrapping_add(number));
        let fault = Fault::any(&mut random);
        let ranks = 1 + random.below(4);
        let output =
            random.pick(&[Output::Console, Output::Files, Output::Both, Output::Both, Output::Rotated]);
        Self {
            fault,
            ranks,
            victim: random.below(ranks),
            restarts: random.below(3),
            // Only writes of the launcher may reach the limit: a rank would notice that its own
            // writes fail.
            output: if fault == Fault::FullDisk { Output::Both } else { output },
            lines: if fault == Fault::FullDisk { 300 } else { 1 + random.below(300) },
            room: (random.below(12), random.below(12)),
        }
    }

    fn script(&self) -> String {
        let Self { fault, victim, lines, .. } = self;
        format!(
            "go() {{ read -r go < $GO; }}
            i=0; while [ $i -lt {lines} ]; do
                i=$((i + 1)); echo \"rank $RANK attempt $TORCHELASTIC_RESTART_COUNT line $i\"
            done
            [ $TORCHELASTIC_RESTART_COUNT = 0 ] || exit 0
            echo $$ > $UP/.$RANK; mv $UP/.$RANK $UP/$RANK
            GO=$(eval echo \\$GO$RANK)
            if [ $RANK = {victim} ]; then {}; fi
            {}",
            fault.victims_part(),
            fault.others_part()
        )
    }

    fn options(&self, logs: &Path) -> Vec<String> {
        let is_short = matches!(self.fault, Fault::Deaf | Fault::Frozen);
        let timeout = if is_short { "0.3" } else { "600" };
        let mut options = vec![
            format!("--devices=cpu:0-{}", self.ranks - 1),
            format!("--max-restarts={}", self.restarts),
            format!("--shutdown-timeout={timeout}"),
            format!("--log-dir={}", logs.display()),
        ];
        let output: &[&str] = match self.output {
            Output::Console => &[],
            Output::Files => &["-r3"],
            Output::Both => &["-t3"],
            Output::Rotated => &["-r3", "--log-max-size=1G"],
        };
        options.extend(output.iter().map(|option| (*option).to_owned()));
        options
    }

    fn restarted(&self) -> bool {
        self.restarts > 0 && self.fault.restarts()
    }

    /// Returns all expected output of the ranks, by rank and attempt.
    fn written(&self) -> Vec<(u64, u64, String)> {
        let attempts = if self.restarted() { 2 } else { 1 };
        let lines = |rank, attempt| {
            (1..=self.lines).map(|line| format!("rank {rank} attempt {attempt} line {line}\n")).collect()
        };
        let ranks = |attempt| (0..self.ranks).map(move |rank| (rank, attempt, lines(rank, attempt)));
        (0..attempts).flat_map(ranks).collect()
    }

    fn run(&self) {
        let folder = tempdir().unwrap();
        let (up, logs) = (folder.path().join("up"), folder.path().join("logs"));
        fs::create_dir(&up).unwrap();
        let options = self.options(&logs);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let inner = launch(&options, &self.script());
        let mut command = match self.fault {
            Fault::NoConsole => wrapped("exec \"$@\" >&- 2>&-", &inner),
            // In units of 512 bytes: more than the launcher tries to write at the start.
            Fault::FullDisk => wrapped("trap '' XFSZ; ulimit -f 9; exec \"$@\"", &inner),
            Fault::FullLogs => self.on_a_small_disk(&logs, &inner),
            _ => inner,
        };
        command.env("UP", &up);
        let gates: Vec<Gate> =
            (0..self.ranks).map(|rank| Gate::named(&format!("GO{rank}"), &mut command)).collect();
        let mut job = Job::start(command);
        let pids: Vec<String> =
            (0..self.ranks).map(|rank| wait_for_text(&up.join(rank.to_string()), "\n")).collect();
        self.strike(&mut job, &pids, &gates, &up);
        let finished = job.finish();
        self.check(&finished, &folder, &logs);
    }

    /// Gives the log folder its own file system, with room for the files that are made before the
    /// first rank starts.
    fn on_a_small_disk(&self, logs: &Path, inner: &Command) -> Command {
        fs::create_dir(logs).unwrap();
        let (pages, inodes) = self.room;
        let options = format!("size={}k,nr_inodes={}", 4 * (1 + pages), 5 + 3 * self.ranks + inodes);
        let script = "mount -t tmpfs -o \"$1\" none \"$2\" 2> /dev/null; shift 2; exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh", &options]).arg(logs);
        command.arg(inner.get_program()).args(inner.get_args());
        command
    }

    fn strike(&self, job: &mut Job, pids: &[String], gates: &[Gate], up: &Path) {
        let victim = self.victim as usize;
        let kill = |pid: &str, signal| {
            kill_process(Pid::from_raw(pid.trim().parse().unwrap()).unwrap(), signal).unwrap();
        };
        match self.fault {
            Fault::Exit(_) | Fault::Abort | Fault::Sleepers | Fault::Deaf | Fault::FullLogs => {
                gates[victim].open();
            }
            Fault::KillLauncherOfMany => {
                // Half of the launchers are killed while processes are still being started.
                let enough = if self.lines.is_multiple_of(2) { fault::KINDS } else { 1 };
                wait_for_lines(&up.join("kinds"), enough);
                job.signal(Signal::KILL);
            }
            Fault::Wrapped => {
                wait_for_text(&up.join("program"), "up");
                job.signal(Signal::TERM);
            }
            Fault::Frozen => {
                let freezer = Freezer::with(pids[victim].trim());
                job.signal(Signal::TERM);
                match freezer {
                    Some(_) => job.signal_until_it_ends(Signal::TERM),
                    None => job.wait(),
                }
            }
            Fault::KillRank => kill(&pids[victim], Signal::KILL),
            Fault::KillGrandchild => kill(&wait_for_text(&up.join("grandchild"), "\n"), Signal::KILL),
            Fault::KillLauncher => job.signal(Signal::KILL),
            Fault::Stop(signal) => job.signal(signal),
            Fault::StopHard => {
                job.signal(Signal::TERM);
                job.signal_until_it_ends(Signal::INT);
            }
            Fault::SuspendRank => {
                kill(&pids[victim], Signal::STOP);
                job.signal(Signal::TERM);
            }
            Fault::SuspendLauncher => {
                job.signal(Signal::STOP);
                wait_for_state(&job.pid().to_string(), 'T');
                gates[victim].open();
                job.signal(Signal::CONT);
                self.open_others(gates);
            }
            Fault::SuspendJob => {
                job.signal(Signal::TSTP);
                pids.iter().for_each(|pid| wait_for_state(pid.trim(), 'T'));
                wait_for_state(&job.pid().to_string(), 'T');
                job.signal(Signal::CONT);
                gates[victim].open();
                self.open_others(gates);
            }
            Fault::CloseOutputs | Fault::NoConsole | Fault::FullDisk => {
                gates[victim].open();
                self.open_others(gates);
            }
        }
    }

    fn open_others(&self, gates: &[Gate]) {
        let others = gates.iter().zip(0..).filter(|(_, rank)| *rank != self.victim);
        others.for_each(|(gate, _)| gate.open());
    }

    fn check(&self, finished: &Finished, folder: &TempDir, logs: &Path) {
        assert_eq!(finished.code, self.fault.code(self.restarts > 0), "{finished:#?}");
        let killed = matches!(self.fault, Fault::KillLauncher | Fault::KillLauncherOfMany);
        let up = folder.path().join("up");
        if self.fault == Fault::KillLauncherOfMany {
            wait_until_none_lives(&up.join("kinds"));
        }
        assert_eq!(self.fault == Fault::Wrapped, up.join("saved").exists(), "{finished:#?}");
        if self.output != Output::Console && !matches!(self.fault, Fault::FullDisk | Fault::FullLogs) {
            // Output that was in the launcher when it was killed is lost.
            let through_launcher = self.output != Output::Files;
            let run = fs::read_dir(logs).unwrap().next().unwrap().unwrap().path();
            for (rank, attempt, lines) in self.written() {
                let log = run.join(format!("attempt_{attempt}/{rank}/stdout.log"));
                let text = fs::read_to_string(&log).unwrap_or_default();
                let whole = if killed && through_launcher { lines.starts_with(&text) } else { text == lines };
                assert!(whole, "{log:?} holds {} of {} bytes", text.len(), lines.len());
            }
        }
        if self.fault == Fault::FullDisk {
            assert!(finished.stderr.contains("cannot be written"), "{finished:#?}");
        }
        if self.fault != Fault::NoConsole && !killed && matches!(self.output, Output::Console | Output::Both)
        {
            let prefix = |rank| match self.output {
                Output::Both => format!("[default{rank}]:"),
                _ => String::new(),
            };
            let mut expected: Vec<String> = Vec::new();
            for (rank, _, lines) in self.written() {
                expected.extend(lines.lines().map(|line| format!("{}{line}", prefix(rank))));
            }
            expected.sort();
            let mut seen = finished.stdout.clone();
            seen.sort();
            assert_eq!(seen, expected);
        }
        let left = fs::read_dir(folder.path().join("up")).unwrap().count();
        assert!(left >= self.ranks as usize);
    }
}

/// Waits until a file has this many lines.
fn wait_for_lines(path: &Path, count: usize) {
    let deadline = Instant::now() + SOON;
    while fs::read_to_string(path).unwrap_or_default().lines().count() < count {
        assert!(Instant::now() < deadline, "no {count} lines in {path:?}");
        thread::yield_now();
    }
}

/// Waits until none of the processes whose ids are in a file lives. Their environment, and with it
/// the tests' mark, may be gone.
fn wait_until_none_lives(path: &Path) {
    let text = fs::read_to_string(path).unwrap();
    let deadline = Instant::now() + SOON;
    while let Some(left) = text.lines().find(|pid| lives(pid)) {
        assert!(Instant::now() < deadline, "process {left} is left");
        thread::yield_now();
    }
}

/// Returns the command as the arguments of a shell script.
fn wrapped(script: &str, inner: &Command) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(inner.get_program()).args(inner.get_args());
    command
}

/// Returns the children of this process that have ended and have not been waited for.
fn zombies() -> Vec<String> {
    let own = format!("{}", std::process::id());
    let stats = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        (fields[0] == "Z" && fields[1] == own).then(|| stat.clone())
    });
    stats.collect()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
fn nothing_is_left_after_a_storm() {
    let seed = number("STORM_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap();
        now.as_secs()
    });
    let only = number("STORM_FAULT");
    let count = number("STORM_FAULTS").unwrap_or(FAULTS);
    let next = AtomicU64::new(only.unwrap_or(0));
    let end = only.map_or(count, |only| only + 1);
    let storm = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= end {
                return;
            }
            let case = Case::new(seed, number);
            let outcome = std::panic::catch_unwind(|| case.run());
            assert!(outcome.is_ok(), "STORM_SEED={seed} STORM_FAULT={number} replays this: {case:?}");
        }
    };
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(storm);
        }
    });
    assert_eq!(zombies(), [""; 0]);
}
