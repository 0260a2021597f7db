//! A rank of the round, living or not, with all that hangs on it.

use std::cell::Cell;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::SystemTime;

use ice_proto::error_file::{self, ErrorRecord};
use ice_proto::frame;
use ice_proto::link::{Down, Up};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::{ProcessId, RankEvent, link};
use crate::logs::{Pump, RankFiles};
use crate::supervise::{Rank, handles};

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
    /// Whether it was sent SIGTERM.
    terminated: bool,
    /// Whether it was sent SIGKILL.
    killed: Cell<bool>,
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
            terminated: false,
            killed: Cell::new(false),
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
        events: &mpsc::UnboundedSender<RankEvent>,
    ) -> io::Result<Self> {
        link.set_nonblocking(true)?;
        let (from_rank, to_rank) = tokio::net::UnixStream::from_std(link)?.into_split();
        let process = Some((rank.pid(), rank.group()));
        let ended = events.clone();
        let wait = tokio::spawn(async move {
            let exit = rank.wait().await;
            drop(lives);
            let _ = ended.send(RankEvent::Exited(id, exit));
        });
        let listen = tokio::spawn(link::listen(id, from_rank, events.clone()));
        let mut member = Self::not_started(id, files);
        (member.process, member.alive) = (process, true);
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
            return;
        }
        self.terminated = signal == Signal::SIGTERM;
        self.signal(signal);
        // One that is stopped cannot end.
        self.signal(Signal::SIGCONT);
    }

    /// Sends SIGTERM unless it had that, or waits for the next round.
    pub(super) fn terminate(&mut self) {
        if !self.is_parked() && !std::mem::replace(&mut self.terminated, true) {
            self.signal(Signal::SIGTERM);
            self.signal(Signal::SIGCONT);
        }
    }

    /// Signals its process group while it lives.
    pub(super) fn signal(&self, signal: Signal) {
        if let Some((_, group)) = self.process.filter(|_| self.alive) {
            self.killed.set(self.killed.get() || signal == Signal::SIGKILL);
            let _ = killpg(group, signal);
        }
    }

    /// Whether the agent has killed it.
    pub(super) fn was_killed(&self) -> bool {
        self.killed.get()
    }

    /// Passes a signal on to the process itself; false where it has no handler and would end.
    pub(super) fn forward(&self, signal: Signal) -> bool {
        let Some(pid) = self.living() else { return true };
        handles(pid, signal as i32) && kill(Pid::from_raw(pid.cast_signed()), signal).is_ok()
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
