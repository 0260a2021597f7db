//! Stacks of the ranks of a job that hangs.
//!
//! py-spy is used as a program instead of a library: as a library (0.4.3, without the features for
//! its command line) it would make the launcher 2.5 MB larger.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use std::{fs, io};

use tokio::process::Command;
use tokio::time::timeout;

use super::proc::unusable;

/// Time that a debugger has for a rank.
const PATIENCE: Duration = Duration::from_secs(20);
/// Number of bytes of a debugger's output that are kept.
const ENOUGH: usize = 1 << 20;
/// Number of threads whose state in the kernel is written.
const THREADS: usize = 256;

/// Lines of gdb without information about the process.
const NOISE: [&str; 9] = [
    "warning:",
    "[New LWP ",
    "[Thread debugging using ",
    "[Inferior ",
    "Using host libthread_db ",
    "This GDB supports auto-downloading debuginfo",
    "Enable debuginfod for this session?",
    "Debuginfod has been disabled",
    "Download",
];

/// Frame of the destructor of a gloo group. In PyTorch 2.13 it joins threads that may wait for the
/// interpreter's lock, which this thread may hold.
const DESTRUCTOR: &str = "c10d::ProcessGroupGloo::~ProcessGroupGloo";

/// Information about a process that was written into a file.
pub(crate) struct Stacks {
    /// The kinds of information in one line.
    pub(crate) kinds: String,
    /// Whether a thread is in the destructor of a gloo group.
    pub(crate) ends_group: bool,
}

/// Writes information about a process into a file: its threads from the kernel, and their stacks
/// from py-spy or gdb if one of them is installed.
pub(crate) async fn write_stacks(pid: u32, path: Option<&Path>) -> io::Result<Stacks> {
    let Some(path) = path else { return Err(io::Error::other("no file for them can be written")) };
    // In another PID namespace the id would be another process's, which a debugger would stop.
    if let Some(why) = unusable() {
        return Err(io::Error::other(why));
    }
    let mut text = threads(pid);
    let mut found = vec!["threads"];
    let python = interpreter(pid);
    let number = pid.to_string();
    let mut py_spy = vec!["dump", "--pid", &number];
    if is_stopped(pid) {
        // Without this option, py-spy fails on a process that is already stopped.
        py_spy.push("--nonblocking");
    }
    let gdb = ["-nx", "-batch", "-ex", "set pagination off", "-ex", "thread apply all bt", "-p", &number];
    let beside = python.as_ref().map(|python| python.with_file_name("py-spy")).filter(|path| path.exists());
    let tries: [(&str, PathBuf, &[&str]); 2] =
        [("py-spy", beside.unwrap_or_else(|| "py-spy".into()), &py_spy), ("gdb", "gdb".into(), &gdb)];
    for (name, debugger, args) in tries {
        match ask(&debugger, args).await {
            Ok(Some(answer)) => {
                let _ = write!(text, "\n--- {name}\n{}", without_noise(&answer));
                found.push(name);
            }
            Ok(None) if name == "py-spy" && python.is_some() => {
                let _ = writeln!(text, "\n--- py-spy: not installed\nhint: pip install py-spy");
            }
            Ok(None) => {}
            Err(error) => _ = writeln!(text, "\n--- {name}: {error}"),
        }
    }
    fs::write(path, &text)?;
    Ok(Stacks { kinds: found.join(", "), ends_group: text.contains(DESTRUCTOR) })
}

/// Returns the Python that a process was started as. In a virtual environment, this name is a link,
/// and tools such as py-spy are in its folder.
fn interpreter(pid: u32) -> Option<PathBuf> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let first = line.split(|byte| *byte == 0).next()?;
    let path = Path::new(OsStr::from_bytes(first));
    let is_python = path.file_name()?.as_bytes().starts_with(b"python");
    is_python.then(|| path.to_owned())
}

fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may contain any characters, parentheses included.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['T', 't']))
}

fn without_noise(answer: &str) -> String {
    let is_noise = |line: &&str| NOISE.iter().any(|start| line.starts_with(start));
    answer.lines().filter(|line| !is_noise(line)).flat_map(|line| [line, "\n"]).collect()
}

/// Returns the state of each thread, and its place in the kernel.
fn threads(pid: u32) -> String {
    let mut text = format!("process {pid}\n");
    for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().take(THREADS) {
        let read = |name: &str| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        let status = read("status");
        let state = status.lines().find_map(|line| line.strip_prefix("State:")).unwrap_or(" ?").trim();
        let id = thread.file_name();
        let _ =
            writeln!(text, "thread {} {}: {state}, in {}", id.display(), read("comm").trim(), read("wchan"));
        // Only root can read this file.
        for line in read("stack").lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
    text
}

/// Returns the output of a debugger, `None` if the debugger is not installed.
async fn ask(debugger: &Path, args: &[&str]) -> io::Result<Option<String>> {
    let mut command = Command::new(debugger);
    // Without DEBUGINFOD_URLS, gdb does not ask whether it may look for symbols in the network.
    command
        .args(args)
        .env_remove("DEBUGINFOD_URLS")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let output = match timeout(PATIENCE, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Ok(Err(error)) => return Err(error),
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    };
    let answer = if output.status.success() { output.stdout } else { output.stderr };
    Ok(Some(String::from_utf8_lossy(&answer[..answer.len().min(ENOUGH)]).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_noise_of_a_debugger_is_left_out() {
        let answer = "[New LWP 12]\nwarning: 44\t./x.c: No such file\n[Thread debugging using libthread_db enabled]\n\
                      Thread 2 (LWP 12):\n#0  poll () at x.c:5\n[Inferior 1 (process 7) detached]\n";
        assert_eq!(without_noise(answer), "Thread 2 (LWP 12):\n#0  poll () at x.c:5\n");
    }

    #[tokio::test]
    async fn the_threads_of_a_process_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stacks.txt");
        let found = write_stacks(std::process::id(), Some(&path)).await.unwrap();
        assert!(found.kinds.starts_with("threads") && !found.ends_group, "{}", found.kinds);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("thread ") && text.contains("(running)"), "{text}");
    }
}
