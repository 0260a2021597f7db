//! Processes that ranks left behind in sessions of their own.

use std::collections::BTreeSet;
use std::fs;

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, getsid};

/// Makes the kernel give orphaned descendants to this process, instead of to init, so that they can be ended.
///
/// This process may have children that no rank started: those of the program that calls the launcher, or of the shell that became
/// it. They are left alone. A rank leads a session of its own, so nothing that came of one is in the agent's.
pub(crate) struct Orphans {
    bystanders: BTreeSet<Pid>,
}

impl Orphans {
    pub(crate) fn adopt() -> Self {
        // Before the first adoption, so that each of them is somebody else's.
        let bystanders = children().collect();
        if let Err(error) = prctl::set_child_subreaper(true) {
            tracing::warn!(%error, "processes that ranks leave behind in sessions of their own will not be ended");
        }
        Self { bystanders }
    }

    /// Ends all that ranks left behind, but for these ranks and what is in their sessions.
    pub(crate) fn end(&self, living: &BTreeSet<u32>) {
        let own_session = getsid(None).ok();
        loop {
            // Each pass may hand down the children of those that it ended.
            let left: Vec<_> = children()
                .filter(|child| !self.bystanders.contains(child))
                .filter(|child| {
                    let session = getsid(Some(*child)).ok();
                    let is_living =
                        session.is_some_and(|leader| living.contains(&leader.as_raw().cast_unsigned()));
                    session != own_session && !is_living
                })
                .collect();
            if left.is_empty() {
                return;
            }
            for child in left {
                let _ = kill(child, Signal::SIGKILL);
                let _ = waitpid(child, Some(WaitPidFlag::__WALL));
            }
        }
    }
}

/// The children of all threads of this process.
fn children() -> impl Iterator<Item = Pid> {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("children")).ok());
    lists.flat_map(|list| {
        let pids = list.split_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid::from_raw);
        pids.collect::<Vec<_>>()
    })
}
