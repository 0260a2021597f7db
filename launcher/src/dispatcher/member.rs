//! A rank of the round, living or not, with all that hangs on it.

use std::cell::Cell;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime};

use ice_proto::error_file::{self, ErrorRecord};
use ice_proto::frame;
use ice_proto::link::{Down, Up};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::{ProcessId, RankEvent, link};
use crate::logs::{Pump, RankFiles};
use crate::supervise::{Ending, Orders, Rank, descendants, handles};

pub(super) struct Member {
    /// Which of all processes that the agent has started.
    pub(super) id: ProcessId,
    pub(super) files: RankFiles,
    process: Option<(u32, Pid)>,
    alive: bool,
    /// The pump of stderr, where it goes through one.
    stderr: Option<Pump>,
    link: Option<OwnedWriteHalf>,
    knows_link: bool,
    /// Whether it has left its round and waits for the next one.
    parked: Cell<bool>,
    /// What is wanted of it.
    ending: watch::Sender<Ending>,
    /// What waits for its end, and what listens to it.
    tasks: Vec<JoinHandle<()>>,
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

    /// Watches over a rank that was started. `lives` is dropped when it ends.
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

    /// What was a spare is a rank now.
    pub(super) fn become_rank(&mut self, files: RankFiles, stderr: Pump) {
        (self.files, self.stderr) = (files, Some(stderr));
    }

    /// Its process while it lives.
    pub(super) fn living(&self) -> Option<u32> {
        self.process.filter(|_| self.alive).map(|(pid, _)| pid)
    }

    /// Its process, also after its end.
    pub(super) fn pid(&self) -> Option<u32> {
        self.process.map(|(pid, _)| pid)
    }

    pub(super) fn exited(&mut self) {
        self.alive = false;
    }

    pub(super) fn said(&mut self, message: &Up) {
        match message {
            Up::Hello { .. } => self.knows_link = true,
            Up::Parked { .. } => self.parked.set(true),
            Up::Error { message } => self.message = Some(message.clone()),
            _ => {}
        }
    }

    /// Asks it to end: over the link where it knows it, else by a signal to its process group.
    pub(super) fn ask(&mut self, message: &Down, signal: Signal) {
        if self.knows_link && self.send(message) {
            self.order(Ending::Asked { signalled: false });
            return;
        }
        self.end_group(signal);
    }

    fn end_group(&self, signal: Signal) {
        self.signal(signal);
        self.order(Ending::Asked { signalled: true });
        // One that is stopped cannot end.
        self.signal(Signal::SIGCONT);
    }

    /// Sends SIGTERM unless its group has had a signal, or it waits for the next round.
    pub(super) fn terminate(&mut self) {
        let is_signalled = matches!(*self.ending.borrow(), Ending::Asked { signalled: true });
        // A rank that knows the link leaves its signals to the agent, until it hears that this one
        // counts.
        if !self.is_parked() && (!is_signalled || self.knows_link) {
            if self.knows_link {
                self.send(&Down::Terminate);
            }
            self.end_group(Signal::SIGTERM);
        }
    }

    /// Whether a SIGTERM that it got may be this agent's.
    pub(super) fn was_signalled(&self) -> bool {
        matches!(*self.ending.borrow(), Ending::Asked { signalled: true } | Ending::Killed)
    }

    /// Kills it, and all that came of it.
    pub(super) fn kill(&self) {
        self.order(Ending::Killed);
        self.signal(Signal::SIGKILL);
    }

    fn order(&self, ending: Ending) {
        let is_final = *self.ending.borrow() == Ending::Killed && self.alive;
        if !is_final {
            self.ending.send_replace(ending);
        }
    }

    /// Signals its process group while it lives.
    pub(super) fn signal(&self, signal: Signal) {
        if let Some((_, group)) = self.process.filter(|_| self.alive) {
            let _ = killpg(group, signal);
        }
    }

    /// Whether the agent has killed it.
    pub(super) fn was_killed(&self) -> bool {
        *self.ending.borrow() == Ending::Killed
    }

    /// Passes a signal on to the processes of its session that handle it: the rank may be a script that has started the program. False
    /// if none does, since all would end.
    pub(super) fn forward(&self, signal: Signal) -> bool {
        let Some(pid) = self.living() else { return true };
        let mut session = descendants([pid]);
        session.retain(|process| process.session == pid && handles(process.pid, signal as i32));
        let Some(number) = rustix::process::Signal::from_named_raw(signal as i32) else { return false };
        session.iter().for_each(|process| process.signal(number));
        !session.is_empty()
    }

    /// Whether it lives and knows the link.
    pub(super) fn listens(&self) -> bool {
        self.alive && self.knows_link
    }

    /// Tells it something over the link; false where it is not to be had.
    pub(super) fn send(&self, message: &Down) -> bool {
        let (Some(link), Ok(frame)) = (&self.link, frame::encode(message)) else { return false };
        if matches!(message, Down::Round { .. } | Down::End { .. }) {
            self.parked.set(false);
        }
        if matches!(message, Down::Round { .. }) {
            // It had been asked to leave the round before.
            self.order(Ending::Unasked);
        }
        link.try_write(&frame).is_ok_and(|written| written == frame.len())
    }

    /// Whether it waits for the next round.
    pub(super) fn is_parked(&self) -> bool {
        self.parked.get()
    }

    /// What the rank left about its failure.
    pub(super) fn record(&self) -> Option<ErrorRecord> {
        let in_file = self.files.error.as_ref().and_then(|file| error_file::read(file).ok().flatten());
        let said = |message: &String| ErrorRecord {
            message: message.clone(),
            callstack: String::new(),
            timestamp: 0,
        };
        in_file.or_else(|| self.message.as_ref().map(said))
    }

    /// When it wrote so.
    pub(super) fn failed_at(&self) -> Option<SystemTime> {
        self.files.error.as_ref()?.metadata().and_then(|meta| meta.modified()).ok()
    }

    /// The last lines of its stderr, at most this many.
    pub(super) async fn last_lines(&mut self, count: usize) -> Vec<String> {
        match &mut self.stderr {
            Some(pump) => pump.last_lines(count).await,
            None => self.files.stderr_tail(count),
        }
    }
}
