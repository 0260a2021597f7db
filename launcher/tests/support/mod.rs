//! A started `ice-launch` with all of its descendants.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tempfile::{TempDir, tempdir};

// The end-to-end tests of the workspace search for leftovers in the same way.
#[path = "../../../tests/tests/e2e/support/leftovers.rs"]
mod leftovers;

use leftovers::MARK;

/// Longer than any operation of these tests takes, even on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// Returns `ice-launch` with these options and `sh -c script` as its program.
pub(crate) fn launch(options: &[&str], script: &str) -> Command {
    let mut command = ice_launch();
    command.args(options).args(["sh", "-c", script]);
    command
}

pub(crate) fn ice_launch() -> Command {
    without_ours(Command::new(env!("CARGO_BIN_EXE_ice-launch")))
}

/// Removes variables from the environment that would change a job.
pub(crate) fn without_ours(mut command: Command) -> Command {
    let ours = ice_proto::env::ALL.iter().map(|(name, _)| (*name).to_owned());
    let clusters = std::env::vars().map(|(name, _)| name).filter(|name| name.starts_with("SLURM_"));
    ours.chain(clusters).for_each(|name| _ = command.env_remove(name));
    command
}

/// A program that was started. Dropping it kills the program and all of its descendants.
pub(crate) struct Job {
    child: Child,
    mark: String,
    stdout: Receiver<String>,
    stderr: Option<ChildStderr>,
    reader: Option<JoinHandle<()>>,
    /// Text that `reader` has read.
    said: Arc<Mutex<Vec<u8>>>,
    seen: Vec<String>,
}

/// Outcome of a job that has ended by itself.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: Vec<String>,
    pub(crate) stderr: String,
}

impl Job {
    pub(crate) fn start(command: Command) -> Self {
        let mut job = Self::start_unread(command);
        job.read_stderr();
        job
    }

    /// Starts a program whose standard error is not read before [`Job::read_stderr`].
    pub(crate) fn start_unread(mut command: Command) -> Self {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let mark = format!("{}-{}", std::process::id(), STARTED.fetch_add(1, Ordering::Relaxed));
        command.env(MARK, &mark).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (lines, stdout) = mpsc::channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        let stderr = child.stderr.take();
        Self { child, mark, stdout, stderr, reader: None, said: Arc::default(), seen: Vec::new() }
    }

    /// Waits until standard error, which is not read yet, contains this text. Returns the text that
    /// was read.
    #[track_caller]
    pub(crate) fn expect_error(&mut self, wanted: &str) -> String {
        let stderr = self.stderr.as_mut().unwrap();
        let mut text = String::new();
        while !text.contains(wanted) {
            let ready = poll(&mut [PollFd::new(stderr, PollFlags::IN)], Some(&SOON.try_into().unwrap()));
            let mut bytes = [0; 4096];
            let len = if ready == Ok(0) { 0 } else { stderr.read(&mut bytes).unwrap() };
            assert!(len > 0, "no `{wanted}` came: {text}");
            text += &String::from_utf8_lossy(&bytes[..len]);
        }
        text
    }

    pub(crate) fn read_stderr(&mut self) {
        if let Some(mut stderr) = self.stderr.take() {
            let said = self.said.clone();
            self.reader = Some(thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(len @ 1..) = stderr.read(&mut bytes) {
                    said.lock().unwrap().extend_from_slice(&bytes[..len]);
                }
            }));
        }
    }

    /// Returns what was read of standard error so far.
    fn said(&self) -> String {
        String::from_utf8_lossy(&self.said.lock().unwrap()).into_owned()
    }

    /// Closes the reading end of standard error.
    pub(crate) fn close_stderr(&mut self) {
        self.stderr = None;
    }

    /// Waits for a line that begins with `start`, and returns the rest of it.
    #[track_caller]
    pub(crate) fn expect_line(&mut self, start: &str) -> String {
        let deadline = Instant::now() + SOON;
        loop {
            let line = self.stdout.recv_timeout(deadline.saturating_duration_since(Instant::now()));
            let line = match line {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("no line `{start}` came: {:?} {}", self.seen, self.said())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    if let Some(reader) = self.reader.take() {
                        reader.join().unwrap();
                    }
                    panic!("it ended without a line `{start}`: {:?} {}", self.seen, self.said())
                }
            };
            self.seen.push(line.clone());
            if let Some(rest) = line.strip_prefix(start) {
                return rest.to_owned();
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Signals the launcher again and again until it exits, because a signal soon after another one
    /// counts as its repetition.
    #[track_caller]
    pub(crate) fn signal_until_it_ends(&self, signal: Signal) {
        let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).unwrap();
        let deadline = Instant::now() + SOON;
        while !leftovers::wait_for_end(&pidfd, Duration::from_millis(20)) {
            assert!(Instant::now() < deadline, "it does not end: {:?}", self.seen);
            self.signal(signal);
        }
    }

    /// Signals the launcher again and again until its standard error, which is not read yet,
    /// contains this text.
    #[track_caller]
    pub(crate) fn signal_until_said(&mut self, signal: Signal, wanted: &str) {
        let pid = Pid::from_child(&self.child);
        let stderr = self.stderr.as_mut().unwrap();
        let deadline = Instant::now() + SOON;
        let mut text = String::new();
        while !text.contains(wanted) {
            assert!(Instant::now() < deadline, "no `{wanted}` came: {text}");
            kill_process(pid, signal).unwrap();
            let moment = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            if poll(&mut [PollFd::new(stderr, PollFlags::IN)], Some(&moment)) != Ok(0) {
                let mut bytes = [0; 4096];
                let len = stderr.read(&mut bytes).unwrap();
                assert!(len > 0, "it ended without `{wanted}`: {text}");
                text += &String::from_utf8_lossy(&bytes[..len]);
            }
        }
    }

    /// Waits for the end of the launcher, but not of its descendants.
    #[track_caller]
    pub(crate) fn wait(&self) {
        self.wait_within(SOON);
    }

    #[track_caller]
    fn wait_within(&self, limit: Duration) {
        let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty()).unwrap();
        let ended = leftovers::wait_for_end(&pidfd, limit);
        assert!(ended, "it does not end: {:?} {}", self.seen, self.said());
    }

    /// Waits until standard error is full.
    #[track_caller]
    pub(crate) fn wait_until_stderr_is_full(&self) {
        let stderr = self.stderr.as_ref().unwrap();
        // Opened again for writing, since the reading end does not report whether the pipe has
        // room.
        let path = format!("/proc/self/fd/{}", stderr.as_raw_fd());
        let writer = fs::OpenOptions::new().write(true).open(path).unwrap();
        let deadline = Instant::now() + SOON;
        while poll(&mut [PollFd::new(&writer, PollFlags::OUT)], Some(&Timespec::default())) != Ok(0) {
            assert!(Instant::now() < deadline, "standard error does not fill");
            thread::yield_now();
        }
    }

    /// Waits for the end of the launcher, and checks that no process is left.
    #[track_caller]
    pub(crate) fn finish(self) -> Finished {
        self.finish_within(SOON)
    }

    /// Like [`Job::finish`], for what takes longer than other tests.
    #[track_caller]
    pub(crate) fn finish_within(mut self, limit: Duration) -> Finished {
        self.wait_within(limit);
        let status = self.child.wait().unwrap();
        let left = leftovers::wait_until_none(&self.mark, Duration::from_secs(5));
        assert!(left.is_empty(), "left behind: {left:#?}");
        self.seen.extend(self.stdout.iter());
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        Finished {
            code: status.code(),
            signal: status.signal(),
            stdout: std::mem::take(&mut self.seen),
            stderr: self.said(),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        leftovers::kill(&self.mark);
    }
}

impl Finished {
    #[track_caller]
    pub(crate) fn expect(&self, code: i32, stderr: &[&str]) -> &Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        for part in stderr {
            assert!(self.stderr.contains(part), "`{part}` is missing: {self:#?}");
        }
        self
    }
}

#[track_caller]
pub(crate) fn run(command: Command) -> Finished {
    Job::start(command).finish()
}

/// Returns the state of a process, as in `/proc`. `None` if there is no such process.
fn state(pid: &str) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

/// Whether a process lives. A zombie does not.
pub(crate) fn lives(pid: &str) -> bool {
    state(pid).is_some_and(|state| state != 'Z')
}

/// Waits until a process is in a state.
#[track_caller]
pub(crate) fn wait_for_state(pid: &str, wanted: char) {
    wait_until_state_is(pid, Some(wanted));
}

/// Waits until a process has ended and its parent has waited for it.
#[track_caller]
pub(crate) fn wait_until_reaped(pid: &str) {
    wait_until_state_is(pid, None);
}

#[track_caller]
fn wait_until_state_is(pid: &str, wanted: Option<char>) {
    let deadline = Instant::now() + SOON;
    while state(pid) != wanted {
        assert!(Instant::now() < deadline, "process {pid} is {:?}, not {wanted:?}", state(pid));
        thread::yield_now();
    }
}

/// Waits until a file contains a text, and returns the whole content.
#[track_caller]
pub(crate) fn wait_for_text(path: &std::path::Path, text: &str) -> String {
    let deadline = Instant::now() + SOON;
    loop {
        let held = fs::read_to_string(path).unwrap_or_default();
        if held.contains(text) {
            return held;
        }
        assert!(Instant::now() < deadline, "no `{text}` in {path:?}: {held}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A pipe that ranks wait at: `read -r go < $GATE`.
pub(crate) struct Gate(TempDir);

impl Gate {
    pub(crate) fn new(command: &mut Command) -> Self {
        Self::named("GATE", command)
    }

    /// Makes a gate whose path is in this variable.
    pub(crate) fn named(variable: &str, command: &mut Command) -> Self {
        let gate = Self(tempdir().unwrap());
        assert!(Command::new("mkfifo").arg(gate.path()).status().unwrap().success());
        gate.lead(variable, command);
        gate
    }

    /// Puts the gate's path into a variable of another program.
    pub(crate) fn lead(&self, variable: &str, command: &mut Command) {
        command.env(variable, self.path());
    }

    /// Lets one rank pass. Waits until a rank is at the gate.
    pub(crate) fn open(&self) {
        fs::write(self.path(), "go\n").unwrap();
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("gate")
    }
}

/// A cgroup whose processes do not run, even if they are killed, which is only possible in version
/// 1. Dropping this value thaws the processes.
pub(crate) struct Freezer(PathBuf);

impl Freezer {
    /// Freezes a process. `None` if that is not possible.
    pub(crate) fn with(pid: &str) -> Option<Self> {
        let path = PathBuf::from(format!("/sys/fs/cgroup/freezer/ice-test-{pid}"));
        fs::create_dir(&path).ok()?;
        let freezer = Self(path);
        fs::write(freezer.0.join("cgroup.procs"), pid).unwrap();
        fs::write(freezer.0.join("freezer.state"), "FROZEN").unwrap();
        wait_for_text(&freezer.0.join("freezer.state"), "FROZEN");
        Some(freezer)
    }

    pub(crate) fn thaw(&self) {
        fs::write(self.0.join("freezer.state"), "THAWED").unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.thaw();
        let deadline = Instant::now() + SOON;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            thread::yield_now();
        }
    }
}

/// Returns a port that was free a moment ago.
pub(crate) fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

/// Copies a file that will be executed. Another process writes the copy. If this process did, a
/// program that another test starts at the same time could inherit the descriptor for writing, and
/// a file that is open for writing cannot be executed.
pub(crate) fn copy(from: impl AsRef<OsStr>, to: &std::path::Path) {
    assert!(Command::new("cp").arg(from.as_ref()).arg(to).status().unwrap().success());
}

/// Makes an executable script.
pub(crate) fn executable(path: &std::path::Path, text: impl AsRef<OsStr>) {
    use std::os::unix::fs::PermissionsExt;
    let source = path.with_extension("source");
    fs::write(&source, text.as_ref().as_encoded_bytes()).unwrap();
    copy(&source, path);
    fs::remove_file(source).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Returns a command that runs after a line of bash.
pub(crate) fn within(line: &str, command: &Command) -> Command {
    let mut within = Command::new("bash");
    within.args(["-c", &format!("{line} && exec \"$@\""), "bash"]);
    add(&mut within, command);
    within
}

/// Appends a command with its variables.
fn add(outer: &mut Command, command: &Command) {
    outer.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
}

/// Runs a command with a small file system in a folder, which is unmounted at the end. `None` if
/// this user may not mount, which is an error with ICE_TEST_NODES.
pub(crate) fn with_disk(options: &str, folder: &std::path::Path, command: &Command) -> Option<Finished> {
    let mounting = |script: &str| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh", options]).arg(folder);
        unshare
    };
    let tried = mounting("mount -t tmpfs -o $1 none $2").output().unwrap();
    if !tried.status.success() {
        let problem = String::from_utf8_lossy(&tried.stderr);
        assert!(std::env::var_os("ICE_TEST_NODES").is_none(), "nothing can be mounted: {problem}");
        eprintln!("skipped: nothing can be mounted: {problem}");
        return None;
    }
    let mut mounted = mounting("mount -t tmpfs -o $1 none $2 && shift 2 && exec \"$@\"");
    add(&mut mounted, command);
    Some(run(mounted))
}
