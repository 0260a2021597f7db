//! A started program with all of its descendants.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write as _};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use tempfile::{TempDir, tempdir};

use super::leftovers::{self, Leftover, MARK};
use super::{built, forget_package, root};

/// Time after the end of a job within which its other processes have to end.
const AFTERMATH: Duration = Duration::from_secs(5);

/// A program to start, with changes to the tests' own environment, and whether its standard input
/// is a pipe.
pub(crate) struct Program(Command, bool);

impl Program {
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.current_dir(root());
        // Variables of a launcher that runs the tests must not reach the ranks.
        for (name, _) in ice_proto::env::ALL {
            command.env_remove(name);
        }
        forget_package(&mut command);
        Self(command, false)
    }

    /// Returns `ice-launch` with these arguments.
    pub(crate) fn ice_launch<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        Self::new(built("ice-launch")).args(arguments)
    }

    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.0.arg(argument);
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.0.args(arguments);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// Returns the program at its own terminal, whose keys [`Job::type_keys`] presses. All of its
    /// output is on standard output.
    pub(crate) fn at_a_terminal(self) -> Self {
        let words = std::iter::once(self.0.get_program()).chain(self.0.get_args());
        let words: Vec<_> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
        let mut script = Self::new("script").args(["-qfec", &words.join(" "), "/dev/null"]);
        for (name, value) in self.0.get_envs() {
            if let Some(value) = value {
                script.0.env(name, value);
            }
        }
        script.1 = true;
        script
    }

    pub(crate) fn start(mut self) -> Job {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let mark = format!("{}-{}", std::process::id(), STARTED.fetch_add(1, Ordering::Relaxed));
        // A failed job keeps its logs. This folder removes them with the test.
        let scratch = tempdir().unwrap();
        self.0.env(MARK, &mark).env("TMPDIR", scratch.path()).process_group(0);
        self.0.stdin(if self.1 { Stdio::piped() } else { Stdio::null() });
        self.0.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.0.spawn().unwrap_or_else(|error| panic!("cannot start {:?}: {error}", self.0));
        let stdout = Stream::read(child.stdout.take().unwrap());
        let stderr = Stream::read(child.stderr.take().unwrap());
        Job { child, mark, command: format!("{:?}", self.0), stdout, stderr, _scratch: scratch }
    }

    /// Starts the program and waits for its end.
    pub(crate) fn run(self, limit: Duration) -> Finished {
        self.start().finish(limit)
    }
}

/// A program that was started. Dropping it kills the program and all of its descendants.
pub(crate) struct Job {
    child: Child,
    mark: String,
    command: String,
    stdout: Stream,
    stderr: Stream,
    _scratch: TempDir,
}

/// Outcome of a job that has ended by itself.
pub(crate) struct Finished {
    pub(crate) command: String,
    /// Exit code, or `None` if a signal ended the program.
    pub(crate) code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Job {
    /// Waits for the end of the program, and then for the end of all of its descendants.
    pub(crate) fn finish(mut self, limit: Duration) -> Finished {
        self.wait(limit);
        let status = self.child.wait().unwrap();
        let left = leftovers::wait_until_none(&self.mark, AFTERMATH);
        assert!(left.is_empty(), "{} has left behind {left:#?}\n{}", self.command, self.transcript());
        for stream in [&self.stdout, &self.stderr] {
            assert!(
                stream.wait_until(AFTERMATH, |_, open| !open),
                "the output of {} stays open",
                self.command
            );
        }
        Finished {
            command: self.command.clone(),
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
        }
    }

    fn wait(&mut self, limit: Duration) {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).unwrap();
        let ended = leftovers::wait_for_end(&pidfd, limit);
        assert!(ended, "{} has not ended in {limit:?}\n{}", self.command, self.transcript());
    }

    /// Waits until standard output has a line that `wanted` accepts, and returns the line.
    pub(crate) fn wait_for_line(&self, limit: Duration, wanted: impl Fn(&str) -> bool) -> String {
        let mut found = None;
        let deadline = Instant::now() + limit;
        self.stdout.wait_until(deadline.saturating_duration_since(Instant::now()), |text, open| {
            let complete = text.rfind('\n').map_or("", |end| &text[..end]);
            found = complete.lines().find(|line| wanted(line)).map(str::to_owned);
            found.is_some() || !open
        });
        found.unwrap_or_else(|| {
            panic!("{} has not printed what was expected\n{}", self.command, self.transcript())
        })
    }

    /// Waits until `wanted` accepts the output so far.
    pub(crate) fn wait_for_output(&self, limit: Duration, wanted: impl Fn(&str) -> bool) {
        let ended = self.wait_for_output_or_end(limit, wanted);
        assert!(!ended, "{} has not printed what was expected\n{}", self.command, self.transcript());
    }

    /// Waits until `wanted` accepts the output so far. Returns true if the output ended before.
    pub(crate) fn wait_for_output_or_end(&self, limit: Duration, wanted: impl Fn(&str) -> bool) -> bool {
        let (mut found, mut ended) = (false, false);
        self.stdout.wait_until(limit, |text, open| {
            found = wanted(text);
            ended = !open;
            found || ended
        });
        assert!(found || ended, "{} has not printed what was expected\n{}", self.command, self.transcript());
        !found
    }

    /// Returns the output so far.
    pub(crate) fn output(&self) -> String {
        self.stdout.text()
    }

    /// Presses keys at the program's terminal.
    pub(crate) fn type_keys(&mut self, keys: &str) {
        self.child.stdin.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until standard output contains this text, even in an incomplete line.
    pub(crate) fn wait_for_text(&self, limit: Duration, wanted: &str) {
        self.wait_for(&self.stdout, limit, wanted);
    }

    /// Waits until standard error contains this text.
    pub(crate) fn wait_for_error_text(&self, limit: Duration, wanted: &str) {
        self.wait_for(&self.stderr, limit, wanted);
    }

    fn wait_for(&self, stream: &Stream, limit: Duration, wanted: &str) {
        stream.wait_until(limit, |text, open| text.contains(wanted) || !open);
        assert!(
            stream.text().contains(wanted),
            "{} has not printed `{wanted}`\n{}",
            self.command,
            self.transcript()
        );
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Returns the live processes of the job except the launcher and its keeper.
    pub(crate) fn others(&self) -> Vec<Leftover> {
        let is_keeper = |pid: Pid| {
            let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()));
            name.is_ok_and(|name| name.trim_end() == "ice-keeper")
        };
        let mut processes = leftovers::marked(&self.mark);
        processes.retain(|process| process.pid != self.pid() && !is_keeper(process.pid));
        processes
    }

    fn transcript(&self) -> String {
        format!("--- stdout\n{}\n--- stderr\n{}", self.stdout.text(), self.stderr.text())
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let ended = matches!(self.child.try_wait(), Ok(Some(_)));
        if !ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        leftovers::kill(&self.mark);
    }
}

impl Finished {
    /// Fails with all output if the exit code differs from `code`.
    #[track_caller]
    pub(crate) fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(self.code, Some(code), "exit code of {}", self.transcript());
        self
    }

    /// Fails with all output if standard error lacks one of these parts.
    #[track_caller]
    pub(crate) fn expect_in_stderr(&self, parts: &[&str]) -> &Self {
        for part in parts {
            assert!(
                self.stderr.contains(part),
                "`{part}` is missing in the standard error of {}",
                self.transcript()
            );
        }
        self
    }

    /// Returns the text under this heading of the report of a failure.
    #[track_caller]
    pub(crate) fn report(&self, heading: &str) -> &str {
        let lines = self.stderr.lines().skip_while(|line| !line.starts_with("ice-launch: rank "));
        let mut values = lines.filter_map(|line| line.trim_start().strip_prefix(heading)?.strip_prefix(' '));
        let value = values.next().map(str::trim_start);
        value.unwrap_or_else(|| panic!("no `{heading}` in the report of {}", self.transcript()))
    }

    pub(crate) fn last_line(&self) -> &str {
        self.stdout.lines().next_back().unwrap_or_default()
    }

    pub(crate) fn transcript(&self) -> String {
        let mut text = self.command.clone();
        let _ = write!(text, "\n--- code {:?}, signal {:?}", self.code, self.signal);
        let _ = write!(text, "\n--- stdout\n{}\n--- stderr\n{}", self.stdout, self.stderr);
        text
    }
}

/// An output of the program, which a thread reads.
#[derive(Clone)]
struct Stream(Arc<(Mutex<Text>, Condvar)>);

struct Text {
    bytes: Vec<u8>,
    open: bool,
}

impl Stream {
    fn read(mut pipe: impl Read + Send + 'static) -> Self {
        let stream = Self(Arc::new((Mutex::new(Text { bytes: Vec::new(), open: true }), Condvar::new())));
        let reader = stream.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let n = pipe.read(&mut buffer).unwrap_or(0);
                let (text, changed) = &*reader.0;
                let mut text = text.lock().unwrap();
                text.bytes.extend(&buffer[..n]);
                text.open = n > 0;
                changed.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        stream
    }

    /// Waits until `done` accepts the text so far. The flag says whether more text may come.
    /// Returns `false` after the time limit.
    fn wait_until(&self, limit: Duration, mut done: impl FnMut(&str, bool) -> bool) -> bool {
        let (text, changed) = &*self.0;
        let waiting = |text: &mut Text| !done(&String::from_utf8_lossy(&text.bytes), text.open);
        let text = text.lock().unwrap();
        !changed.wait_timeout_while(text, limit, waiting).unwrap().1.timed_out()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap().bytes).into_owned()
    }
}
