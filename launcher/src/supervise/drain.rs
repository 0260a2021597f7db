//! Ends the processes that a rank has left behind.
//!
//! A rank may be a shell script that starts the program, or may start helpers. The rank has ended
//! when the last of its descendants has ended:
//!
//! - A rank that was asked to end: its descendants have time until the agent kills them, at most
//!   the shutdown timeout after the end of the rank's own process.
//! - A rank that exited with code 0 by itself: its descendants get SIGTERM, and the shutdown
//!   timeout.
//! - A rank that failed: its descendants are killed at once, since a restart waits for them.

use std::collections::BTreeSet;
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::proc::{Process, handles};
use super::stuck::{Stuck, obstacles};
use super::{ProcessId, ProcessTree};

/// Time that helpers which end with their rank, such as Python's resource tracker, have before they
/// count as left behind.
const SETTLE: Duration = Duration::from_millis(200);
/// Interval of checks for remaining processes, even if no child has ended.
const LOOK: Duration = Duration::from_millis(500);

const SIGTERM: i32 = Signal::TERM.as_raw();

/// The end that the agent wants for a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The rank runs on.
    Unasked,
    /// The rank ends. `signalled`: its process group has received a signal for that.
    Asked { signalled: bool },
    /// The rank and all of its descendants are killed.
    Killed,
}

/// The agent's instructions to the task that waits for a rank.
pub(crate) struct Orders {
    pub(crate) ending: watch::Receiver<Ending>,
    /// Time that the descendants of an ended rank have, unless the rank failed.
    pub(crate) timeout: Duration,
}

/// Messages about processes that remain while a rank ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Remains {
    /// The rank's own process has ended, but descendants have not.
    Behind,
    /// Processes that were ended although the rank was not asked to end.
    Ended(String),
    /// Processes that were killed and have not ended.
    Stuck(String),
}

/// Waits for the next message about killed processes that have not ended, forever if no process was
/// killed.
pub(super) async fn due(stuck: Option<&mut Stuck>) {
    match stuck {
        Some(stuck) => stuck.due().await,
        None => std::future::pending().await,
    }
}

/// Waits until no descendant of an ended process is left. `well`: the process exited with code 0.
pub(super) async fn drain(
    tree: &ProcessTree,
    ended: (ProcessId, u32),
    well: bool,
    mut orders: Orders,
    say: impl Fn(Remains),
) {
    let mut changed = tree.changes();
    let began = Instant::now();
    let (mut told, mut asked) = (false, false);
    let (mut terminated, mut stuck) = (BTreeSet::new(), None::<Stuck>);
    loop {
        changed.mark_unchanged();
        let left = tree.left_of(ended);
        if left.is_empty() {
            return;
        }
        if !std::mem::replace(&mut told, true) {
            say(Remains::Behind);
        }
        let ending = *orders.ending.borrow_and_update();
        let late = began + orders.timeout;
        let now = Instant::now();
        let kill = match ending {
            Ending::Killed => true,
            Ending::Unasked => !well || now >= late,
            Ending::Asked { .. } => now >= late,
        };
        let mut look = now + LOOK;
        if kill {
            if stuck.is_none() && well && ending != Ending::Killed {
                say(Remains::Ended(format!("killed {}", named(&left))));
            }
            stuck.get_or_insert_with(Stuck::new);
            left.iter().for_each(|process| process.signal(Signal::KILL));
        } else {
            let settled = began + SETTLE;
            match ending {
                Ending::Asked { signalled } => {
                    let first = !std::mem::replace(&mut asked, true);
                    let due = |process: &&Process| match signalled && process.group == ended.1 {
                        true => missed(process),
                        // Processes that these start afterwards belong to their shutdown, so they
                        // get no signal.
                        false => first,
                    };
                    terminate(left.iter().filter(due), &mut terminated);
                }
                Ending::Unasked if !terminated.is_empty() => {}
                _ if now >= settled => {
                    say(Remains::Ended(format!("sent SIGTERM to {}", named(&left))));
                    terminate(left.iter(), &mut terminated);
                }
                _ => look = settled,
            }
        }
        tokio::select! {
            Ok(()) = changed.changed() => {}
            Ok(()) = orders.ending.changed() => {}
            () = sleep_until(look.min(late.max(now + SETTLE))) => {}
            () = due(stuck.as_mut()) => say(Remains::Stuck(obstacles(&left))),
        }
    }
}

/// Whether a process of the group has missed the signal that the group received.
///
/// If the signal reaches a shell between fork and exec of a command, the shell takes it for itself,
/// and the command continues. Such a process has no handler, and its parent is gone. A process with
/// a handler is saving, and gets no second signal. A process with a living parent is left to that
/// parent.
fn missed(process: &Process) -> bool {
    process.parent == std::process::id() && !handles(process.pid, SIGTERM)
}

/// Sends SIGTERM to the processes that have not received it yet.
fn terminate<'a>(processes: impl Iterator<Item = &'a Process>, terminated: &mut BTreeSet<(u32, u64)>) {
    for process in processes {
        if terminated.insert((process.pid, process.started)) {
            process.signal(Signal::TERM);
            // A stopped process cannot react to SIGTERM, so SIGCONT follows.
            process.signal(Signal::CONT);
        }
    }
}

fn named(processes: &[Process]) -> String {
    const NAMED: usize = 5;
    let named: Vec<_> = processes.iter().take(NAMED).map(ToString::to_string).collect();
    let more = processes.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let word = if processes.len() == 1 { "process" } else { "processes" };
    format!("{word} {}{more}", named.join(", "))
}
