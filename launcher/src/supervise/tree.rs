//! All descendants of the agent: the ranks that it has started, and the processes that ranks have
//! left behind.
//!
//! The kernel gives orphaned descendants to the agent (a child subreaper). The agent reaps them as
//! soon as they end, knows which rank each descends from, and ends them with that rank.
//!
//! This process may have children that no rank started: those of the program that calls the
//! launcher, or of the shell that became it. These bystanders are left alone. Each rank leads its
//! own session, so a descendant of a rank is never in the agent's session.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::prctl;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, getsid};
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::ProcessId;
use super::keeper::Keeper;
use super::mark::{self, Mark};
use super::proc::{self, Process};
use super::stuck::{Stuck, obstacles};

/// The descendants of this agent.
pub(crate) struct ProcessTree {
    /// Children that existed before the first rank.
    bystanders: BTreeSet<u32>,
    mark: Option<Mark>,
    /// Locked before `leaders` if both are needed (`adopted`).
    keeper: Mutex<Option<Keeper>>,
    /// Processes that the agent has started and not waited for yet.
    leaders: Mutex<BTreeSet<u32>>,
    /// The leader that hid other ended children at the last run of `reap_ended`; 0 before the first
    /// run.
    hider: AtomicU32,
    /// Notified when a leader was waited for, so that it no longer hides other ended children.
    unhidden: Notify,
    /// Reason why `/proc` cannot show these processes, if it cannot.
    blind: Option<String>,
    /// Notified whenever a child has ended.
    changed: watch::Sender<()>,
}

/// A task that reaps adopted children. Dropping this handle ends the task.
pub(crate) struct Reaper(JoinHandle<()>);

impl Drop for Reaper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ProcessTree {
    /// Makes this process the one that adopts orphaned descendants, and starts its keeper. Must be
    /// called before the first process is started. If this process is killed, the keeper removes
    /// `folder`, which has files only.
    ///
    /// Also returns notes for the user.
    pub(crate) fn root(folder: Option<&Path>) -> (Arc<Self>, Vec<String>) {
        let mut notes = Vec::new();
        let blind = proc::unusable();
        if let Some(why) = &blind {
            notes.push(format!(
                "/proc cannot be used: {why}; processes that ranks leave in other sessions will not be ended\n\
                 hint: mount the /proc of this PID namespace"
            ));
        }
        // Before the first adoption, when no rank can have left any of them behind.
        let bystanders = match blind {
            Some(_) => BTreeSet::new(),
            None => proc::children(std::process::id()).into_iter().collect(),
        };
        let mark = Mark::choose().unwrap_or_else(|error| {
            tracing::debug!(%error, "processes cannot be marked");
            None
        });
        let keeper = match mark.filter(|_| blind.is_none()).map(|mark| Keeper::start(mark, folder)) {
            Some(Ok(keeper)) => Some(keeper),
            Some(Err(error)) => {
                notes.push(format!(
                    "no keeper process could be started: {error}; if this agent is killed, processes that \
                     its ranks have started may stay"
                ));
                None
            }
            None => None,
        };
        if let Err(error) = prctl::set_child_subreaper(true) {
            tracing::warn!(%error, "processes that ranks leave behind will not be ended");
        }
        (Arc::new(Self::new(bystanders, mark, keeper, blind)), notes)
    }

    /// Makes a tree that adopts nothing, because tests share a process.
    #[cfg(test)]
    pub(super) fn for_tests() -> Arc<Self> {
        Arc::new(Self::new(BTreeSet::new(), None, None, Some("a test".into())))
    }

    fn new(
        bystanders: BTreeSet<u32>,
        mark: Option<Mark>,
        keeper: Option<Keeper>,
        blind: Option<String>,
    ) -> Self {
        Self {
            bystanders,
            mark,
            keeper: Mutex::new(keeper),
            leaders: Mutex::default(),
            hider: AtomicU32::new(0),
            unhidden: Notify::new(),
            blind,
            changed: watch::channel(()).0,
        }
    }

    /// Returns the limit that marks a process which the agent starts.
    pub(super) fn mark_of(&self, process: ProcessId) -> Option<u64> {
        self.mark.map(|mark| mark.of(process))
    }

    /// Starts to reap adopted children.
    pub(crate) fn reap(self: &Arc<Self>) -> std::io::Result<Reaper> {
        let (tree, mut ended) = (Arc::clone(self), signal(SignalKind::child())?);
        let reap = async move {
            loop {
                tokio::select! {
                    Some(()) = ended.recv() => {
                        tree.reap_ended();
                        tree.changed.send_replace(());
                    }
                    () = tree.unhidden.notified() => tree.reap_ended(),
                }
            }
        };
        Ok(Reaper(tokio::spawn(reap)))
    }

    /// Returns a receiver that is notified of ends of children.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn leaders(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.leaders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a process that its starter waits for, so that the reaper leaves it alone.
    pub(super) fn started(&self, pid: u32) {
        self.leaders().insert(pid);
    }

    /// Records that a leader was waited for. Until then, the leader may have hidden adopted
    /// children that have ended.
    pub(super) fn waited_for(&self, pid: u32) {
        self.leaders().remove(&pid);
        self.unhidden.notify_one();
    }

    /// Reaps the adopted children that have ended, and leaves every leader to its own waiter.
    ///
    /// The kernel reports one ended child at a time. An ended leader that is not waited for yet
    /// hides the adopted children behind it. In that case the children are listed one by one,
    /// except the first time that this leader hides others: its waiter will soon call `waited_for`,
    /// which triggers another run.
    fn reap_ended(&self) {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT | WaitPidFlag::__WALL;
        // The kernel shows one child that has ended. If another waiter owns that one, it hides the
        // others.
        loop {
            let pid = match waitid(Id::All, flags) {
                Ok(status) => status.pid(),
                Err(nix::Error::ECHILD) => None,
                // nix has no name for a real-time signal, so a child killed by one hides the others.
                Err(_) => break,
            };
            let Some(pid) = pid else { return };
            if !self.is_adopted(pid) {
                let hider = pid.as_raw().cast_unsigned();
                let is_new = self.hider.swap(hider, Ordering::Relaxed) != hider;
                // The hider's own waiter reaps it soon, and `unhidden` follows. Listing the
                // children here would delay a restart.
                if is_new && self.leaders().contains(&hider) {
                    return;
                }
                break;
            }
            let _ = waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
        }
        for pid in proc::own_children() {
            let pid = Pid::from_raw(pid.cast_signed());
            if self.is_adopted(pid) {
                let _: nix::Result<WaitStatus> =
                    waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
            }
        }
    }

    /// Whether a child was left to this process by a rank, or is the keeper of an agent that is
    /// process 1.
    fn is_adopted(&self, child: Pid) -> bool {
        let pid = child.as_raw().cast_unsigned();
        let is_known = self.bystanders.contains(&pid) || self.leaders().contains(&pid);
        !is_known && getsid(Some(child)) != getsid(None)
    }

    /// Returns the live adopted processes that match, with all of their descendants.
    fn adopted(&self, matches: impl Fn(&Process) -> bool) -> Vec<Process> {
        if self.blind.is_some() {
            return Vec::new();
        }
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        let keeper = keeper.as_ref().map(|keeper| keeper.pid().as_raw().cast_unsigned());
        let children = proc::own_children().into_iter();
        let roots = children.filter(|pid| {
            Some(*pid) != keeper
                && self.is_adopted(Pid::from_raw(pid.cast_signed()))
                && Process::read(*pid).is_some_and(|process| matches(&process))
        });
        let mut found = proc::descendants(roots);
        found.retain(Process::lives);
        found
    }

    /// Whether an adopted process descends from this process. The adopted process may have left the
    /// session, but then still has the mark.
    fn came_of(&self, process: &Process, (id, leader): (ProcessId, u32)) -> bool {
        let limit = || mark::parse(&std::fs::read(format!("/proc/{}/limits", process.pid)).ok()?);
        process.session == leader
            || self.mark.is_some_and(|mark| limit().is_some_and(|limit| mark.came_of(limit, id)))
    }

    /// Returns the processes that an ended process has left behind.
    pub(super) fn left_of(&self, ended: (ProcessId, u32)) -> Vec<Process> {
        self.adopted(|process| self.came_of(process, ended))
    }

    /// Kills all processes that descend from none of these live processes.
    pub(crate) fn kill_others(&self, living: &[(ProcessId, u32)]) {
        let left = self.adopted(|process| !living.iter().any(|one| self.came_of(process, *one)));
        left.iter().for_each(|process| process.signal(Signal::KILL));
    }

    /// Kills all remaining processes, ranks included, and waits for their end. The keeper is left
    /// for [`ProcessTree::dismiss_keeper`]. Reports killed processes that do not end again and
    /// again. A caller that does not want to wait drops the future.
    pub(crate) async fn end(&self, say: impl Fn(String)) {
        let mut changed = self.changes();
        self.leaders().clear();
        let mut stuck = Stuck::new();
        loop {
            self.reap_ended();
            let left = self.adopted(|_| true);
            if left.is_empty() {
                break;
            }
            left.iter().for_each(|process| process.signal(Signal::KILL));
            tokio::select! {
                _ = changed.changed() => {}
                () = stuck.due() => say(obstacles(&left)),
            }
        }
    }

    /// Dismisses the keeper, since no process of the job is left.
    pub(crate) fn dismiss_keeper(&self) {
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(keeper) = keeper {
            keeper.dismiss();
        }
    }
}
