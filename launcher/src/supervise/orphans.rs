//! Processes that ranks left behind in sessions of their own.

use std::fs;

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// Makes the kernel give orphaned descendants to this process, instead of to init, so that they can be ended.
pub(crate) struct Orphans(());

impl Orphans {
    pub(crate) fn adopt() -> Self {
        if let Err(error) = prctl::set_child_subreaper(true) {
            tracing::warn!(%error, "processes that ranks leave behind in sessions of their own will not be ended");
        }
        Self(())
    }

    /// Ends all children. To be called when no rank lives, so that all that is left is orphans.
    pub(crate) fn end(&self) {
        // Each pass may hand down the children of those that it ended.
        while let Some(children) = children() {
            for child in children {
                let _ = kill(child, Signal::SIGKILL);
                let _ = waitpid(child, Some(WaitPidFlag::__WALL));
            }
        }
    }
}

/// The children of all threads of this process; `None` where there are none.
fn children() -> Option<Vec<Pid>> {
    let threads = fs::read_dir("/proc/self/task").ok()?;
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("children")).ok());
    let pids: Vec<_> = lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>())
        .map(Pid::from_raw)
        .collect();
    (!pids.is_empty()).then_some(pids)
}
