//! How what a rank has left behind is ended.
//!
//! A rank may be a shell script that starts the program, or may start helpers. The rank has ended when
//! the last process that came of it has:
//!
//! - A rank that was asked to end: its processes have until the agent kills them.
//! - A rank that ended with code 0 by itself: what it left gets SIGTERM, and the shutdown timeout.
//! - A rank that failed: what it left is killed at once, since a restart waits for it.

use std::collections::BTreeSet;
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::proc::{Process, handles};
use super::stuck::{Stuck, obstacles};
use super::{ProcessId, ProcessTree};

/// Helpers that end with their rank, as Python's resource tracker does, have so long before they count as left behind.
const SETTLE: Duration = Duration::from_millis(200);
/// How often what is left is looked at even if no child has ended.
const LOOK: Duration = Duration::from_millis(500);

const SIGTERM: i32 = Signal::TERM.as_raw();

/// What the agent wants of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// That it runs.
    Unasked,
    /// That it ends; whether its process group has got a signal for that.
    Asked { signalled: bool },
    /// That nothing is left of it.
    Killed,
}

/// The agent's side of an ending.
pub(crate) struct Orders {
    pub(crate) ending: watch::Receiver<Ending>,
    /// How long what a rank leaves after a good end may take.
    pub(crate) timeout: Duration,
}

/// What is to be known while a rank ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Remains {
    /// The rank's own process has ended, and others that came of it have not.
    Behind,
    /// Processes that were ended although no end was asked for.
    Ended(String),
    /// Processes that were killed and do not end.
    Stuck(String),
}

/// Waits for the next message about processes that do not end; for ever if none was killed.
pub(super) async fn due(stuck: Option<&mut Stuck>) {
    match stuck {
        Some(stuck) => stuck.due().await,
        None => std::future::pending().await,
    }
}

/// Waits until nothing is left of a process that has ended, with code 0 if it ended well.
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
                        // What these start afterwards belongs to their ending.
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

/// Whether a process of the group has not got the signal that the group got.
///
/// A shell that the signal reaches between fork and exec of a command takes it for itself, and the command
/// runs on. Such a process has no handler, and its parent is gone. One with a handler is saving, and gets
/// no second signal; one with a parent is that one's business.
fn missed(process: &Process) -> bool {
    process.parent == std::process::id() && !handles(process.pid, SIGTERM)
}

/// Sends SIGTERM to those that have not had it.
fn terminate<'a>(processes: impl Iterator<Item = &'a Process>, terminated: &mut BTreeSet<(u32, u64)>) {
    for process in processes {
        if terminated.insert((process.pid, process.started)) {
            process.signal(Signal::TERM);
            // One that is stopped cannot end.
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
