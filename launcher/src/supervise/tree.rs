//! All processes that came of the agent's: the ranks that it has started, and what they have left to it.
//!
//! The kernel gives orphaned descendants to the agent (a child subreaper). The agent waits for them as
//! soon as they end, knows which rank each came of, and ends them with it.
//!
//! This process may have children that no rank started: those of the program that calls the launcher, or
//! of the shell that became it. They are left alone. A rank leads a session of its own, so nothing that
//! came of one is in the agent's.

use std::collections::BTreeSet;
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
    /// Children that were there before the first rank.
    bystanders: BTreeSet<u32>,
    mark: Option<Mark>,
    keeper: Mutex<Option<Keeper>>,
    /// Processes that the agent has started and not waited for.
    leaders: Mutex<BTreeSet<u32>>,
    /// The leader that hid other ended children when `reap_ended` ran last; 0 before the first.
    hider: AtomicU32,
    /// Notified when a leader was waited for, so that it hides nothing any more.
    unhidden: Notify,
    /// Why `/proc` shows none of them.
    blind: Option<String>,
    /// Sent whenever a child has ended.
    changed: watch::Sender<()>,
}

/// Waits for adopted children until it is dropped.
pub(crate) struct Reaper(JoinHandle<()>);

impl Drop for Reaper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ProcessTree {
    /// Makes this process the one that orphaned descendants are given to, and starts its keeper. Called before anything is started.
    ///
    /// Also returns what the user should know.
    pub(crate) fn root() -> (Arc<Self>, Vec<String>) {
        let mut notes = Vec::new();
        let blind = proc::unusable();
        if let Some(why) = &blind {
            notes.push(format!(
                "/proc cannot be used: {why}; processes that ranks leave in other sessions will not be ended\n\
                 hint: mount the /proc of this PID namespace"
            ));
        }
        // Before the first adoption, so that each of them is somebody else's.
        let bystanders = match blind {
            Some(_) => BTreeSet::new(),
            None => proc::children(std::process::id()).into_iter().collect(),
        };
        let mark = Mark::choose().unwrap_or_else(|error| {
            tracing::debug!(%error, "processes cannot be marked");
            None
        });
        let keeper = match mark.filter(|_| blind.is_none()).map(Keeper::start) {
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

    /// A tree that adopts nothing: tests share a process.
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

    /// The limit that marks a process which the agent starts.
    pub(super) fn mark_of(&self, process: ProcessId) -> Option<u64> {
        self.mark.map(|mark| mark.of(process))
    }

    /// Starts to wait for adopted children.
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

    /// Tells of ends of children.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn leaders(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.leaders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a process that is waited for by whoever has started it.
    pub(super) fn started(&self, pid: u32) {
        self.leaders().insert(pid);
    }

    /// Notes that a leader was waited for. Until then it hid the adopted children that have ended.
    pub(super) fn waited_for(&self, pid: u32) {
        self.leaders().remove(&pid);
        self.unhidden.notify_one();
    }

    /// Waits for the adopted children that have ended.
    fn reap_ended(&self) {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT | WaitPidFlag::__WALL;
        // The kernel shows one child that has ended. If another waiter owns that one, it hides the others.
        while let Ok(status) = waitid(Id::All, flags) {
            let Some(pid) = status.pid() else { return };
            if !self.is_adopted(pid) {
                let hider = pid.as_raw().cast_unsigned();
                let is_new = self.hider.swap(hider, Ordering::Relaxed) != hider;
                // Its waiter comes soon, and `unhidden` follows. Listing the children would delay a restart.
                if is_new && self.leaders().contains(&hider) {
                    return;
                }
                break;
            }
            let _ = waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
        }
        for pid in proc::children(std::process::id()) {
            let pid = Pid::from_raw(pid.cast_signed());
            if self.is_adopted(pid) {
                let _: nix::Result<WaitStatus> =
                    waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
            }
        }
    }

    /// Whether a child was left to this process by a rank, or is the keeper of process 1.
    fn is_adopted(&self, child: Pid) -> bool {
        let pid = child.as_raw().cast_unsigned();
        let is_known = self.bystanders.contains(&pid) || self.leaders().contains(&pid);
        !is_known && getsid(Some(child)) != getsid(None)
    }

    /// The living processes that were left to the agent and match, with all that came of them.
    fn adopted(&self, matches: impl Fn(&Process) -> bool) -> Vec<Process> {
        if self.blind.is_some() {
            return Vec::new();
        }
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        let keeper = keeper.as_ref().map(|keeper| keeper.pid().as_raw().cast_unsigned());
        let children = proc::children(std::process::id()).into_iter();
        let roots = children.filter(|pid| {
            Some(*pid) != keeper
                && self.is_adopted(Pid::from_raw(pid.cast_signed()))
                && Process::read(*pid).is_some_and(|process| matches(&process))
        });
        let mut found = proc::descendants(roots);
        found.retain(Process::lives);
        found
    }

    /// Whether an adopted process came of this one, whose session it may have left.
    fn came_of(&self, process: &Process, (id, leader): (ProcessId, u32)) -> bool {
        let limit = || mark::parse(&std::fs::read(format!("/proc/{}/limits", process.pid)).ok()?);
        process.session == leader
            || self.mark.is_some_and(|mark| limit().is_some_and(|limit| mark.came_of(limit, id)))
    }

    /// What a process that has ended has left behind.
    pub(super) fn left_of(&self, ended: (ProcessId, u32)) -> Vec<Process> {
        self.adopted(|process| self.came_of(process, ended))
    }

    /// Kills what came of none of these, which live.
    pub(crate) fn kill_others(&self, living: &[(ProcessId, u32)]) {
        let left = self.adopted(|process| !living.iter().any(|one| self.came_of(process, *one)));
        left.iter().for_each(|process| process.signal(Signal::KILL));
    }

    /// Ends all that is left, ranks included, and the keeper. Says what does not end, again and again; to be dropped by who does not want to wait.
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

    /// Lets the keeper go, since nothing is left.
    pub(crate) fn dismiss_keeper(&self) {
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(keeper) = keeper {
            keeper.dismiss();
        }
    }
}
