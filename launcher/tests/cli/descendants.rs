//! Descendants of ranks: none outlives the job, and no unrelated process is ended.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use rustix::process::{Pid, Signal, getuid, kill_process};
use tempfile::{TempDir, tempdir};

use crate::support::{
    Finished, Freezer, Gate, Job, SOON, copy, launch, lives, run, wait_for_state, wait_until_reaped,
};
use crate::{STAY, TWO};

/// Starts a process of each kind, which writes its process id into `$PIDS`: a child, a session
/// leader, a process that is forked twice, one without an environment, one with all of these
/// properties, and a parent with children.
const EVERY_KIND: &str = "
    sleep 600 & echo $! >> $PIDS
    setsid sh -c 'echo $$ >> $PIDS; exec sleep 600' &
    (setsid sh -c 'echo $$ >> $PIDS; exec sleep 600' &)
    env -i PIDS=$PIDS /bin/sh -c 'echo $$ >> $PIDS; exec env -i /bin/sleep 600' &
    (setsid env -i PIDS=$PIDS /bin/sh -c 'echo $$ >> $PIDS; exec env -i /bin/sleep 600' &)
    setsid env -i PIDS=$PIDS /bin/sh -c 'echo $$ >> $PIDS
        for n in 1 2 3; do env -i /bin/sleep 600 & echo $! >> $PIDS; done; wait' &
    while [ $(wc -l < $PIDS) -lt 9 ]; do :; done
    ";

/// A file into which processes write their ids.
struct Pids(TempDir);

impl Pids {
    fn new(command: &mut Command) -> Self {
        let pids = Self(tempdir().unwrap());
        // Writable for all users that processes may run as.
        fs::set_permissions(pids.0.path(), fs::Permissions::from_mode(0o777)).unwrap();
        fs::write(pids.path(), "").unwrap();
        fs::set_permissions(pids.path(), fs::Permissions::from_mode(0o666)).unwrap();
        command.env("PIDS", pids.path());
        pids
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("pids")
    }

    fn all(&self) -> Vec<String> {
        fs::read_to_string(self.path()).unwrap().lines().map(str::to_owned).collect()
    }

    /// Waits until none of the processes lives.
    #[track_caller]
    fn wait_until_none_lives(&self, count: usize) {
        let pids = self.all();
        assert_eq!(pids.len(), count, "{pids:?}");
        let deadline = Instant::now() + SOON;
        while pids.iter().any(|pid| lives(pid)) {
            let left: Vec<_> = pids.iter().filter(|pid| lives(pid)).collect();
            assert!(Instant::now() < deadline, "{left:?} of {pids:?} are left");
            std::thread::yield_now();
        }
    }
}

fn signal(pid: &str, signal: Signal) {
    kill_process(Pid::from_raw(pid.trim().parse().unwrap()).unwrap(), signal).unwrap();
}

/// Returns a command that runs as another user than root, from a copy that this user can execute.
/// `None` if this process does not run as root.
fn as_nobody(inner: &Command, folder: &Path) -> Option<Command> {
    if !getuid().is_root() {
        return None;
    }
    let program = folder.join("ice-launch");
    copy(inner.get_program(), &program);
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program).args(inner.get_args());
    command.env("TMPDIR", "/tmp").current_dir("/");
    Some(command)
}

/// Ends the launcher by a signal once this many of its ranks have printed `up`. Waits until no
/// process that has written its id down lives.
#[track_caller]
fn expect_nothing_left(mut command: Command, end: Signal, ranks: usize, processes: usize) {
    let pids = Pids::new(&mut command);
    let mut job = Job::start(command);
    (0..ranks).for_each(|_| _ = job.expect_line("up"));
    job.signal(end);
    assert_eq!(job.finish().signal, Some(end.as_raw()));
    pids.wait_until_none_lives(processes);
}

#[test]
fn nothing_is_left_when_the_launcher_is_killed_or_aborts() {
    for end in [Signal::KILL, Signal::ABORT, Signal::ILL] {
        let command = launch(&["--devices", "cpu"], &format!("{EVERY_KIND} echo up; {STAY}"));
        expect_nothing_left(command, end, 1, 9);
    }
}

#[test]
fn temporary_folder_of_a_killed_launcher_is_removed() {
    let folder = tempdir().unwrap();
    let mut command = launch(&TWO, &format!("touch \"$ICE_HEARTBEAT_FILE\"; echo up; {STAY}"));
    command.env("TMPDIR", folder.path());
    let mut job = Job::start(command);
    (0..2).for_each(|_| _ = job.expect_line("up"));
    let left = || -> Vec<_> {
        let entries = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        entries.filter(|name| name.to_string_lossy().contains("heartbeats")).collect()
    };
    assert_eq!(left().len(), 1);
    job.signal(Signal::KILL);
    assert_eq!(job.finish().signal, Some(Signal::KILL.as_raw()));
    let deadline = Instant::now() + SOON;
    while !left().is_empty() {
        assert!(Instant::now() < deadline, "{:?} is left", left());
        std::thread::yield_now();
    }
}

#[test]
fn nothing_is_left_of_a_killed_launcher_of_an_ordinary_user() {
    let folder = tempdir().unwrap();
    let inner = launch(&["--devices", "cpu"], &format!("{EVERY_KIND} echo up; {STAY}"));
    let Some(command) = as_nobody(&inner, folder.path()) else { return };
    expect_nothing_left(command, Signal::KILL, 1, 9);
}

#[test]
fn rank_that_changes_its_credentials_does_not_outlive_a_killed_launcher() {
    if !getuid().is_root() {
        return;
    }
    let script =
        "echo $$ >> $PIDS; exec setpriv --reuid=65534 --clear-groups sh -c 'echo up; exec sleep 600'";
    expect_nothing_left(launch(&TWO, script), Signal::KILL, 2, 2);
}

#[test]
fn nothing_is_left_of_a_thousand_descendants() {
    let script = format!(
        "n=0; while [ $n -lt 500 ]; do n=$((n + 1))
            sleep 600 & echo $! >> $PIDS; setsid sh -c 'echo $$ >> $PIDS; exec sleep 600' &
        done; while [ $(wc -l < $PIDS) -lt 1000 ]; do :; done; echo up; {STAY}"
    );
    expect_nothing_left(launch(&["--devices", "cpu"], &script), Signal::KILL, 1, 1000);
}

#[test]
fn job_within_a_job_ends_with_the_outer_one() {
    let folder = tempdir().unwrap();
    let inner = folder.path().join("inner.sh");
    fs::write(&inner, format!("{EVERY_KIND} echo up; {STAY}")).unwrap();
    let script = "exec \"$LAUNCHER\" --devices cpu sh \"$INNER\"";
    let mut command = launch(&["--devices", "cpu"], script);
    command.env("LAUNCHER", env!("CARGO_BIN_EXE_ice-launch")).env("INNER", &inner);
    expect_nothing_left(command, Signal::KILL, 1, 9);
}

#[test]
fn process_that_sheds_its_mark_and_holds_a_pipe_is_ended_before_the_report() {
    // The mark is a limit that any process can lower, but only root can raise. A sleeper without
    // the mark would delay the report, and still live when the report is printed.
    let script = "
        setsid prlimit --locks=5:5 sh -c 'echo $$ >> $PIDS; echo up
            until set -- $LOGS/*/report.json && [ -e $1 ]; do :; done; echo reported >> $PIDS' &
        read -r go < $GATE; echo 'last words' >&2; exit 3";
    let logs = tempdir().unwrap();
    let mut command = launch(&["--devices", "cpu"], script);
    command.env("LOGS", logs.path()).env("PET_LOG_DIR", logs.path());
    let (pids, gate) = (Pids::new(&mut command), Gate::new(&mut command));
    let mut job = Job::start(command);
    job.expect_line("up");
    gate.open();
    job.finish().expect(3, &["rank 0 failed: exit code 3", "    last words"]);
    pids.wait_until_none_lives(1);
}

#[test]
fn launcher_as_process_1_of_a_container_adopts_and_ends_what_its_ranks_leave() {
    if !getuid().is_root() {
        return;
    }
    // Without a failing rank, the namespace would end with its first process in any case.
    let script = "
        [ $TORCHELASTIC_RESTART_COUNT = 0 ] || { ps -eo pid,stat,comm > $PIDS; exit 0; }
        (setsid env -i /bin/sleep 600 &); (setsid sh -c : &); exit 3";
    let inner = launch(&["--devices", "cpu", "--max-restarts", "1"], script);
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc"]).arg(inner.get_program()).args(inner.get_args());
    let pids = Pids::new(&mut command);
    run(command).expect(0, &["restart 1 of 1"]);
    let seen = fs::read_to_string(pids.path()).unwrap();
    assert!(seen.contains("ice-launch") && seen.contains("ice-keeper"), "{seen}");
    assert!(!seen.contains("sleep") && !seen.contains('Z'), "{seen}");
}

#[test]
fn foreign_proc_is_said_and_no_stranger_is_signalled() {
    if !getuid().is_root() {
        return;
    }
    // To pass a signal on, the launcher looks for handlers by process id.
    let script = "trap 'echo usr1' USR1; echo up; read -r go < $GATE; exit 3";
    let inner = launch(&["--devices", "cpu"], script);
    let mut command = Command::new("unshare");
    // The /proc of the outer namespace remains mounted.
    command.args(["--pid", "--fork", "--kill-child"]).arg(inner.get_program()).args(inner.get_args());
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    job.expect_line("up");
    let launcher = fs::read_to_string(format!("/proc/{0}/task/{0}/children", job.pid())).unwrap();
    signal(&launcher, Signal::USR1);
    gate.open();
    let said = [
        "/proc cannot be used",
        "hint: mount the /proc of this PID namespace",
        "was not passed on to rank 0",
    ];
    job.finish().expect(3, &said);
}

#[test]
fn adopted_orphans_are_reaped_while_the_job_runs() {
    let script = "
        n=0; while [ $n -lt 50 ]; do n=$((n + 1)); (setsid sh -c 'echo $$ >> $PIDS' &); done
        while [ $(wc -l < $PIDS) -lt 50 ]; do :; done
        echo up; read -r go < $GATE";
    let mut command = launch(&["--devices", "cpu"], script);
    let (pids, gate) = (Pids::new(&mut command), Gate::new(&mut command));
    let mut job = Job::start(command);
    job.expect_line("up");
    pids.all().iter().for_each(|pid| wait_until_reaped(pid));
    gate.open();
    job.finish().expect(0, &[]);
}

#[test]
fn orphans_that_ended_ranks_hide_are_reaped_while_the_job_runs() {
    const RANKS: usize = 8;
    let script = "
        [ $RANK = 0 ] && { read -r go < $GATE; exit 0; }
        (setsid sh -c 'echo $$ >> $PIDS; exec sleep 600' &)
        while [ $(wc -l < $PIDS) -lt 7 ]; do :; done
        echo \"rank $$\"; until [ -e $PIDS.end ]; do :; done";
    let mut command = launch(&["--devices", "cpu:0-7"], script);
    let (pids, gate) = (Pids::new(&mut command), Gate::new(&mut command));
    let mut job = Job::start(command);
    let ranks: Vec<String> = (1..RANKS).map(|_| job.expect_line("rank ")).collect();
    // The ranks and their orphans end while the launcher is stopped and cannot wait for any of
    // them. The kernel then shows the ranks first, and no further signal announces the orphans.
    job.signal(Signal::STOP);
    wait_for_state(&job.pid().to_string(), 'T');
    fs::write(pids.path().with_extension("end"), "").unwrap();
    ranks.iter().for_each(|pid| wait_for_state(pid, 'Z'));
    let orphans = pids.all();
    orphans.iter().for_each(|pid| signal(pid, Signal::KILL));
    orphans.iter().for_each(|pid| wait_for_state(pid, 'Z'));
    job.signal(Signal::CONT);
    orphans.iter().for_each(|pid| wait_until_reaped(pid));
    gate.open();
    job.finish().expect(0, &[]);
}

/// A script that starts the program as a child. The program needs a while to save.
const WRAPPED: &str = "
    sh -c 'trap \"read -r go < $GATE; echo saved; exit 0\" TERM; echo \"program $$\"; while :; do sleep 600 & wait $!; done'
    echo 'the wrapper goes on'";

#[test]
fn program_below_a_script_has_time_to_save_when_the_job_is_stopped() {
    let mut command = launch(&["--devices", "cpu"], WRAPPED);
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    job.expect_line("program ");
    job.signal(Signal::TERM);
    // The program waits at the gate once it has been asked to end. By then its wrapper may have
    // ended.
    gate.open();
    job.expect_line("saved");
    job.finish().expect(143, &[]);
}

#[test]
fn program_below_a_script_has_time_to_save_when_another_rank_fails() {
    let script = format!("[ $RANK = 0 ] && {{ read -r go < $FAIL; exit 3; }}; {WRAPPED}");
    let mut command = launch(&TWO, &script);
    let gate = Gate::new(&mut command);
    let fail = Gate::named("FAIL", &mut command);
    let mut job = Job::start(command);
    job.expect_line("program ");
    fail.open();
    gate.open();
    job.expect_line("saved");
    job.finish().expect(3, &[]);
}

#[test]
fn program_below_a_script_is_killed_after_the_shutdown_timeout() {
    let script = "sh -c 'trap \"\" TERM; echo \"program $$\"; while :; do sleep 600; done'; exit 0";
    let mut job = Job::start(launch(&["--devices", "cpu", "--shutdown-timeout", "0.3"], script));
    job.expect_line("program ");
    job.signal(Signal::TERM);
    job.finish().expect(143, &["shutdown timeout"]);
}

#[test]
fn helper_that_a_rank_leaves_after_a_good_end_is_asked_and_named() {
    let script = "
        setsid sh -c 'trap \"read -r go < $GATE; echo uploaded; exit 0\" TERM; echo up; while :; do sleep 600 & wait $!; done' &
        read -r go < $LEAVE; exit 0";
    let mut command = launch(&["--devices", "cpu"], script);
    let gate = Gate::new(&mut command);
    let leave = Gate::named("LEAVE", &mut command);
    let mut job = Job::start(command);
    job.expect_line("up");
    leave.open();
    gate.open();
    job.expect_line("uploaded");
    job.finish().expect(0, &["rank 0 has ended, and what it left has not: sent SIGTERM to process", "(sh)"]);
}

#[test]
fn helper_that_does_not_listen_is_killed_and_the_job_ends_well() {
    let script =
        "setsid sh -c 'trap \"\" TERM; echo up; while :; do sleep 600; done' & read -r go < $GATE; exit 0";
    let mut command = launch(&["--devices", "cpu", "--shutdown-timeout", "0.5"], script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    job.expect_line("up");
    gate.open();
    job.finish().expect(0, &["sent SIGTERM to process", "what it left has not: killed"]);
}

#[test]
fn user_signal_reaches_the_program_below_a_script() {
    let script =
        "sh -c 'trap \"echo saved; exit 0\" USR1; echo up; while :; do sleep 600 & wait $!; done'; exit 0";
    let mut job = Job::start(launch(&["--devices", "cpu"], script));
    job.expect_line("up");
    job.signal(Signal::USR1);
    job.expect_line("saved");
    let finished: Finished = job.finish();
    finished.expect(0, &[]);
    assert!(!finished.stderr.contains("not passed on"), "{finished:#?}");
}

#[test]
fn frozen_rank_is_named_and_the_user_is_obeyed() {
    let script = "echo \"rank $$\"; exec sleep 600";
    let command = launch(&["--devices", "cpu", "--shutdown-timeout", "0.1"], script);
    let mut job = Job::start_unread(command);
    let pid = job.expect_line("rank ");
    // Created after the job, and so dropped (thawed) before the job is cleaned up.
    let Some(freezer) = Freezer::with(&pid) else { return };
    job.signal(Signal::TERM);
    job.expect_error(&format!(
        "rank 0: killed, but not ended: process {pid} (sleep) is frozen by its cgroup"
    ));
    job.signal(Signal::TERM);
    job.expect_error("told to stop again: ending without 1 rank that was killed and did not end");
    job.wait();
    freezer.thaw();
    job.read_stderr();
    job.finish().expect(143, &[]);
}

#[test]
fn frozen_process_that_a_rank_left_is_named_at_a_restart() {
    let script = "
        [ $TORCHELASTIC_RESTART_COUNT = 0 ] || exit 0
        setsid sh -c 'echo \"helper $$\"; exec sleep 600' & read -r go < $GATE; exit 3";
    let mut command = launch(&["--devices", "cpu", "--max-restarts", "1"], script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start_unread(command);
    let pid = job.expect_line("helper ");
    let Some(freezer) = Freezer::with(&pid) else { return };
    gate.open();
    job.expect_error(&format!(
        "rank 0: killed, but not ended: process {pid} (sleep) is frozen by its cgroup"
    ));
    freezer.thaw();
    job.read_stderr();
    job.finish().expect(0, &["restart 1 of 1"]);
}

#[test]
fn process_list_of_a_job_is_the_launcher_and_its_ranks() {
    let mut job = Job::start(launch(&TWO, &format!("echo \"rank $$\"; {STAY}")));
    let mut ranks = vec![job.expect_line("rank "), job.expect_line("rank ")];
    ranks.sort();
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", job.pid())).unwrap();
    let mut children: Vec<&str> = children.split_whitespace().collect();
    children.sort_unstable();
    assert_eq!(children, ranks, "the keeper is not among them");
    signal(&ranks[0], Signal::KILL);
    job.finish().expect(137, &[]);
}
