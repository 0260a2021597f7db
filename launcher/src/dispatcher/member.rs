//! A rank of the round, live or ended, with its process, link, output and log files.

use std::cell::Cell;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime};

use ice_proto::error_file::{self, ErrorRecord};
use ice_proto::frame;
use ice_proto::link::{FromRank, ToRank};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::{ProcessId, RankEvent, link};
use crate::logs::{Pump, RankFiles};
use crate::supervise::{Ending, Orders, Rank, descendants, handles};

pub(super) struct Member {
    /// Number of this process among all that the agent has started.
    pub(super) id: ProcessId,
    pub(super) files: RankFiles,
    process: Option<(u32, Pid)>,
    alive: bool,
    /// The pump of stderr, if stderr goes through one.
    stderr: Option<Pump>,
    link: Option<OwnedWriteHalf>,
    /// Whether the process has sent `Hello`, so that requests reach it over the link.
    knows_link: bool,
    /// Whether the rank has left its round and waits for the next one.
    parked: Cell<bool>,
    /// The end that the agent wants for the process. The task that waits for the process reads it.
    ending: watch::Sender<Ending>,
    /// The tasks that wait for the end of the process and read its link.
    tasks: Vec<JoinHandle<()>>,
    /// The last error that the rank reported over the link.
    message: Option<String>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Member {
    pub(super) fn not_started(id: ProcessId, files: RankFiles) -> Self {
        Self {
            id,
            files,
            process: None,
            alive: false,
            stderr: None,
            link: None,
            knows_link: false,
            parked: Cell::new(false),
            ending: watch::channel(Ending::Unasked).0,
            tasks: Vec::new(),
            message: None,
        }
    }

    /// Supervises a rank that was started. `lives` is dropped when the rank has ended, which tells
    /// the pumps that no more output is to come.
    pub(super) fn started(
        id: ProcessId,
        rank: Rank,
        link: UnixStream,
        stderr: Option<Pump>,
        lives: watch::Sender<()>,
        files: RankFiles,
        (events, timeout): (&mpsc::UnboundedSender<RankEvent>, Duration),
    ) -> io::Result<Self> {
        link.set_nonblocking(true)?;
        let (from_rank, to_rank) = tokio::net::UnixStream::from_std(link)?.into_split();
        let process = Some((rank.pid(), rank.group()));
        let (ended, remains) = (events.clone(), events.clone());
        let (ending, orders) = watch::channel(Ending::Unasked);
        let wait = tokio::spawn(async move {
            let orders = Orders { ending: orders, timeout };
            let say = |what| _ = remains.send(RankEvent::Remains(id, what));
            let exit = rank.wait(orders, say).await;
            drop(lives);
            let _ = ended.send(RankEvent::Exited(id, exit));
        });
        let listen = tokio::spawn(link::listen(id, from_rank, events.clone()));
        let mut member = Self::not_started(id, files);
        (member.process, member.alive, member.ending) = (process, true, ending);
        (member.stderr, member.link, member.tasks) = (stderr, Some(to_rank), vec![wait, listen]);
        Ok(member)
    }

    /// Turns a spare into a rank with these files.
    pub(super) fn become_rank(&mut self, files: RankFiles, stderr: Pump) {
        (self.files, self.stderr) = (files, Some(stderr));
    }

    /// Returns the process id while the process lives.
    pub(super) fn living(&self) -> Option<u32> {
        self.process.filter(|_| self.alive).map(|(pid, _)| pid)
    }

    /// Returns the process id, also after the end of the process.
    pub(super) fn pid(&self) -> Option<u32> {
        self.process.map(|(pid, _)| pid)
    }

    pub(super) fn exited(&mut self) {
        self.alive = false;
    }

    pub(super) fn said(&mut self, message: &FromRank) {
        match message {
            FromRank::Hello { .. } => self.knows_link = true,
            FromRank::Parked { .. } => self.parked.set(true),
            FromRank::Error { message } => self.message = Some(message.clone()),
            _ => {}
        }
    }

    /// Asks the rank to end: over the link if the rank knows it, otherwise by a signal to its
    /// process group.
    pub(super) fn ask(&mut self, message: &ToRank, signal: Signal) {
        if self.knows_link && self.send(message) {
            self.order(Ending::Asked { signalled: false });
            return;
        }
        self.end_group(signal);
    }

    fn end_group(&self, signal: Signal) {
        self.signal(signal);
        self.order(Ending::Asked { signalled: true });
        // A stopped process cannot react to the signal, so SIGCONT follows.
        self.signal(Signal::SIGCONT);
    }

    /// Sends SIGTERM, unless the rank waits for the next round. A rank that does not know the link
    /// receives only one signal.
    pub(super) fn terminate(&mut self) {
        let is_signalled = matches!(*self.ending.borrow(), Ending::Asked { signalled: true });
        // A rank that knows the link reports SIGTERM to the agent instead of exiting.
        // The message over the link says that this SIGTERM is to be obeyed.
        if !self.is_parked() && (!is_signalled || self.knows_link) {
            if self.knows_link {
                self.send(&ToRank::Terminate);
            }
            self.end_group(Signal::SIGTERM);
        }
    }

    /// Whether a SIGTERM that the rank received may have come from this agent.
    pub(super) fn was_signalled(&self) -> bool {
        matches!(*self.ending.borrow(), Ending::Asked { signalled: true } | Ending::Killed)
    }

    /// Kills the rank and all of its descendants.
    pub(super) fn kill(&self) {
        self.order(Ending::Killed);
        self.signal(Signal::SIGKILL);
    }

    /// Changes what is wanted of the process. A kill is final while the process lives.
    fn order(&self, ending: Ending) {
        let is_final = *self.ending.borrow() == Ending::Killed && self.alive;
        if !is_final {
            self.ending.send_replace(ending);
        }
    }

    /// Signals the rank's process group while the rank lives.
    pub(super) fn signal(&self, signal: Signal) {
        if let Some((_, group)) = self.process.filter(|_| self.alive) {
            let _ = killpg(group, signal);
        }
    }

    /// Whether the agent has killed the rank.
    pub(super) fn was_killed(&self) -> bool {
        *self.ending.borrow() == Ending::Killed
    }

    /// Passes a signal on to the processes of the rank's session that handle it: the rank may be a
    /// script that has started the program. Returns false if no process handles it, since the
    /// signal would end them all.
    pub(super) fn forward(&self, signal: Signal) -> bool {
        let Some(pid) = self.living() else { return true };
        let mut session = descendants([pid]);
        session.retain(|process| process.session == pid && handles(process.pid, signal as i32));
        let Some(number) = rustix::process::Signal::from_named_raw(signal as i32) else { return false };
        session.iter().for_each(|process| process.signal(number));
        !session.is_empty()
    }

    /// Whether the rank lives and knows the link.
    pub(super) fn listens(&self) -> bool {
        self.alive && self.knows_link
    }

    /// Sends a message over the link. Returns false if the message could not be sent.
    pub(super) fn send(&self, message: &ToRank) -> bool {
        let (Some(link), Ok(frame)) = (&self.link, frame::encode(message)) else { return false };
        if matches!(message, ToRank::Round { .. } | ToRank::End { .. }) {
            self.parked.set(false);
        }
        if matches!(message, ToRank::Round { .. }) {
            // The previous round may have ended with a request to leave, which no longer applies.
            self.order(Ending::Unasked);
        }
        link.try_write(&frame).is_ok_and(|written| written == frame.len())
    }

    /// Whether the rank waits for the next round.
    pub(super) fn is_parked(&self) -> bool {
        self.parked.get()
    }

    /// Returns the rank's own record of its failure: its error file, or else its message over the
    /// link.
    pub(super) fn record(&self) -> Option<ErrorRecord> {
        let in_file = self.files.error.as_ref().and_then(|file| error_file::read(file).ok().flatten());
        let said = |message: &String| ErrorRecord {
            message: message.clone(),
            callstack: String::new(),
            timestamp: 0,
        };
        in_file.or_else(|| self.message.as_ref().map(said))
    }

    /// Returns the time at which the rank wrote its error file.
    pub(super) fn failed_at(&self) -> Option<SystemTime> {
        self.files.error.as_ref()?.metadata().and_then(|meta| meta.modified()).ok()
    }

    /// Returns the last lines of stderr, at most `count`.
    pub(super) async fn last_lines(&mut self, count: usize) -> Vec<String> {
        match &mut self.stderr {
            Some(pump) => pump.last_lines(count).await,
            None => self.files.stderr_tail(count),
        }
    }
}
