//! Reports of ranks that ended because memory ran out.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tempfile::tempdir;

use crate::TWO;
use crate::support::{launch, run, with_disk, within};

/// Lets only one test at a time have a process killed: the machine has one counter of killed
/// processes for all cgroups together.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cgroup with a limit. Dropping this value removes the cgroup.
struct Cgroup(PathBuf);

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

impl Cgroup {
    /// `None` if this user may not make a cgroup here, which is an error with ICE_TEST_NODES.
    fn with_limit(bytes: u64) -> Option<Self> {
        let first = PathBuf::from("/sys/fs/cgroup/memory");
        let (root, file) = match first.is_dir() {
            true => (first, "memory.limit_in_bytes"),
            false => (PathBuf::from("/sys/fs/cgroup"), "memory.max"),
        };
        let cgroup = Self(root.join(format!("ice-test-{}", std::process::id())));
        match fs::create_dir(&cgroup.0).and_then(|()| fs::write(cgroup.0.join(file), bytes.to_string())) {
            Ok(()) => Some(cgroup),
            Err(error) => {
                assert!(std::env::var_os("ICE_TEST_NODES").is_none(), "no cgroup can be made: {error}");
                eprintln!("skipped: no cgroup can be made: {error}");
                None
            }
        }
    }

    /// Returns the command in this cgroup.
    fn with(&self, command: &Command) -> Command {
        within(&format!("echo $$ > {}/cgroup.procs", self.0.display()), command)
    }
}

#[test]
fn a_rank_that_the_kernel_killed_for_memory_says_so_with_the_limit() {
    let _alone = one_at_a_time();
    let Some(cgroup) = Cgroup::with_limit(64 << 20) else { return };
    let folder = tempdir().unwrap();
    let (logs, events) = (folder.path().join("logs"), folder.path().join("events.jsonl"));
    let script = "
        [ $TORCHELASTIC_RESTART_COUNT = 0 ] || exit 0
        [ $RANK = 1 ] || exec sleep 600
        mkfifo $FOLDER/zeros; head -c 300M /dev/zero > $FOLDER/zeros & exec tail -c 300M < $FOLDER/zeros";
    let options = ["--log-dir", logs.to_str().unwrap(), "--events", events.to_str().unwrap()];
    let command = launch(&[&TWO[..], &options, &["--max-restarts", "1"]].concat(), script);
    let mut command = cgroup.with(&command);
    command.env("FOLDER", folder.path());
    let outcome = run(command);
    let name = cgroup.0.file_name().unwrap().to_str().unwrap();
    let what =
        format!("killed by SIGKILL: out of memory: the limit of cgroup /{name} is 64 MiB, its peak was ");
    // In the report, and in the decision to restart.
    assert_eq!(outcome.expect(0, &[]).stderr.matches(&what).count(), 2, "{outcome:#?}");
    let run = fs::read_dir(&logs).unwrap().next().unwrap().unwrap().path();
    let report: Value = serde_json::from_slice(&fs::read(run.join("report.json")).unwrap()).unwrap();
    let cause = &report["failures"][0]["root_cause"];
    assert_eq!(cause["out_of_memory"]["limit"], 64 << 20, "{report}");
    assert_eq!(cause["signal"], 9, "{report}");
    let text = fs::read_to_string(&events).unwrap();
    let ended = text.lines().find(|line| line.contains("\"out_of_memory\":{")).unwrap_or_default();
    assert!(ended.contains("\"event\":\"rank_ended\""), "{text}");
}

#[test]
fn a_rank_that_the_user_killed_is_not_out_of_memory() {
    let _alone = one_at_a_time();
    let outcome = run(launch(&["--devices", "cpu"], "kill -KILL $$"));
    outcome.expect(137, &["rank 0 failed: killed by SIGKILL\n"]);
}

#[test]
fn a_bus_error_names_shared_memory_that_is_full() {
    let command = launch(&["--devices", "cpu"], "cat /dev/zero > /dev/shm/fill 2> /dev/null; kill -BUS $$");
    let Some(outcome) = with_disk("size=1m", "/dev/shm".as_ref(), &command) else { return };
    outcome.expect(135, &["killed by SIGBUS: /dev/shm is full, 1 MiB of 1 MiB: raise its size"]);
}

#[test]
fn a_limit_of_the_file_size_is_named() {
    let script = "ulimit -f 1; exec head -c 100000 /dev/zero > $FILE";
    let folder = tempdir().unwrap();
    let mut command = launch(&["--devices", "cpu"], script);
    command.env("FILE", folder.path().join("large"));
    run(command).expect(153, &["killed by SIGXFSZ: a file reached the limit of its size (ulimit -f)"]);
}
