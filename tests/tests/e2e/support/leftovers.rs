//! Processes that carry a job's mark in their environment: all descendants of the job, however they
//! detached themselves.

use std::fs;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// Name of the variable that marks a job's processes.
pub(crate) const MARK: &str = "ICE_TEST_MARK";

/// A process that carries a mark.
#[derive(Debug)]
pub(crate) struct Leftover {
    pub(crate) pid: Pid,
    #[expect(dead_code, reason = "failing tests show it")]
    pub(crate) command: String,
}

/// Returns the live processes that carry this mark. A zombie has no environment and is not
/// included.
pub(crate) fn marked(mark: &str) -> Vec<Leftover> {
    let entry = format!("{MARK}={mark}");
    let processes = fs::read_dir("/proc").unwrap();
    processes
        .filter_map(|process| {
            let process = process.ok()?;
            let pid = Pid::from_raw(process.file_name().to_str()?.parse().ok()?)?;
            let environment = fs::read(process.path().join("environ")).ok()?;
            environment.split(|byte| *byte == 0).find(|variable| *variable == entry.as_bytes())?;
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            Some(Leftover { pid, command })
        })
        .collect()
}

/// Waits until no process carries the mark. After the time limit, returns the processes that still
/// do.
pub(crate) fn wait_until_none(mark: &str, limit: Duration) -> Vec<Leftover> {
    let deadline = Instant::now() + limit;
    loop {
        let left = marked(mark);
        let Some(one) = left.first() else { return left };
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return left;
        }
        if let Some(process) = open(one.pid) {
            wait_for_end(&process, remaining);
        }
    }
}

/// Kills the processes that carry the mark, until there are none.
pub(crate) fn kill(mark: &str) {
    loop {
        let left = marked(mark);
        if left.is_empty() {
            return;
        }
        for process in left {
            let pidfd = open(process.pid);
            // The process may have ended by itself since it was found.
            let _ = kill_process(process.pid, Signal::KILL);
            if let Some(pidfd) = pidfd {
                wait_for_end(&pidfd, Duration::from_secs(10));
            }
        }
    }
}

fn open(pid: Pid) -> Option<OwnedFd> {
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// Waits until the process has ended. Returns `false` after the time limit.
pub(crate) fn wait_for_end(pidfd: &OwnedFd, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let remaining = deadline.saturating_duration_since(Instant::now());
        let timeout =
            Timespec { tv_sec: remaining.as_secs() as i64, tv_nsec: i64::from(remaining.subsec_nanos()) };
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll of a pidfd: {error}"),
        }
    }
}
