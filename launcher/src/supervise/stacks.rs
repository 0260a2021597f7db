//! What the ranks of a job that hangs are doing.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use std::{fs, io};

use tokio::process::Command;
use tokio::time::timeout;

/// Time that a debugger has for a rank.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of a debugger's answer that are kept.
const ENOUGH: usize = 1 << 20;
/// Threads that the kernel is asked about.
const THREADS: usize = 256;

/// Writes what can be learned about a process into a file: its threads from the kernel, and their stacks from py-spy or gdb where one of them is
/// installed. Returns in one line what there is.
pub(crate) async fn write_stacks(pid: u32, path: Option<&Path>) -> io::Result<String> {
    let Some(path) = path else { return Err(io::Error::other("no file for them can be written")) };
    let mut text = threads(pid);
    let mut found = vec!["threads"];
    let pid = pid.to_string();
    let tries: [(&str, &[&str]); 2] = [
        ("py-spy", &["dump", "--pid", &pid]),
        ("gdb", &["-nx", "-batch", "-ex", "set pagination off", "-ex", "thread apply all bt", "-p", &pid]),
    ];
    for (debugger, args) in tries {
        match ask(debugger, args).await {
            Ok(Some(answer)) => {
                let _ = write!(text, "\n--- {debugger}\n{answer}");
                found.push(debugger);
            }
            Ok(None) => {}
            Err(error) => _ = writeln!(text, "\n--- {debugger}: {error}"),
        }
    }
    fs::write(path, text)?;
    Ok(found.join(", "))
}

/// State and place in the kernel of each thread.
fn threads(pid: u32) -> String {
    let mut text = format!("process {pid}\n");
    for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().take(THREADS) {
        let read = |name: &str| fs::read_to_string(thread.path().join(name)).unwrap_or_default();
        let status = read("status");
        let state = status.lines().find_map(|line| line.strip_prefix("State:")).unwrap_or(" ?").trim();
        let id = thread.file_name();
        let _ =
            writeln!(text, "thread {} {}: {state}, in {}", id.display(), read("comm").trim(), read("wchan"));
        // Readable for root only.
        for line in read("stack").lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
    text
}

/// What a debugger prints; `None` where it is not installed.
async fn ask(debugger: &str, args: &[&str]) -> io::Result<Option<String>> {
    let mut command = Command::new(debugger);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
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

    #[tokio::test]
    async fn the_threads_of_a_process_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stacks.txt");
        let found = write_stacks(std::process::id(), Some(&path)).await.unwrap();
        assert!(found.starts_with("threads"), "{found}");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("thread ") && text.contains("(running)"), "{text}");
    }
}
