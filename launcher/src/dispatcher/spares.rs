//! Processes that wait to replace a rank that dies: started, loaded and parked.
//!
//! The first spares start once the program has applied its first step in a round, which shows that
//! it can use spares.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ice_proto::link::FromRank;
use tokio::sync::{mpsc, watch};

use super::member::Member;
use super::{ProcessId, RankEvent};
use crate::cli::Program;
use crate::logs::{RankFiles, pipe};
use crate::supervise::{ProcessTree, Start, Stdio, spawn};
use ice_agent::Exit;

/// A spare, and the streams and the sign of life that pumps read once the spare is a rank.
pub(super) struct Spare {
    pub(super) member: Member,
    pub(super) streams: [OwnedFd; 2],
    pub(super) ended: watch::Receiver<()>,
}

pub(super) struct Spares {
    /// Number of spares to keep; 0 once a spare has ended before it was ready.
    wanted: usize,
    all: Vec<Spare>,
}

impl Spares {
    pub(super) fn new(wanted: u32) -> Self {
        Self { wanted: wanted as usize, all: Vec::new() }
    }

    /// Returns the number of missing spares.
    pub(super) fn missing(&self) -> usize {
        self.wanted.saturating_sub(self.all.len())
    }

    /// Starts a spare.
    pub(super) fn start(
        &mut self,
        tree: &Arc<ProcessTree>,
        id: ProcessId,
        (program, executable): (&Program, &Path),
        variables: Vec<(&'static str, String)>,
        watch: (&mpsc::UnboundedSender<RankEvent>, Duration),
    ) -> io::Result<u32> {
        let (ours, theirs) = UnixStream::pair()?;
        let (lives, ended) = watch::channel(());
        let ((stdout, to_stdout), (stderr, to_stderr)) = (pipe()?, pipe()?);
        let (link, stdin) = (&theirs, Stdio::Inherit);
        let output = [to_stdout, to_stderr].map(Stdio::Pipe);
        let rank = spawn(
            tree,
            Start { id, program, executable, local_rank: 0, cpus: None, variables, link, stdin, output },
        )?;
        let pid = rank.pid();
        let member = Member::started(id, rank, ours, None, lives, RankFiles::default(), watch)?;
        self.all.push(Spare { member, streams: [stdout, stderr], ended });
        Ok(pid)
    }

    /// Records a message of a spare. Returns false if the process is not a spare.
    pub(super) fn said(&mut self, process: ProcessId, message: &FromRank) -> bool {
        let spare = self.all.iter_mut().find(|spare| spare.member.id == process);
        spare.map(|spare| spare.member.said(message)).is_some()
    }

    /// Records the end of a spare and returns a note for the user. A spare that ended before it was
    /// ready would do so again, so no more are started.
    pub(super) fn exited(&mut self, process: ProcessId, exit: &Exit) -> Option<String> {
        let at = self.all.iter().position(|spare| spare.member.id == process)?;
        let spare = self.all.remove(at);
        if spare.member.is_parked() {
            return Some(format!("a spare ended ({exit}); another one is started with the next round"));
        }
        self.wanted = 0;
        Some(format!("a spare ended before it was ready ({exit}): continuing without spares"))
    }

    /// Takes a spare that is ready.
    pub(super) fn take(&mut self) -> Option<Spare> {
        let at = self.all.iter().position(|spare| spare.member.is_parked())?;
        Some(self.all.remove(at))
    }

    /// Returns the live spares.
    pub(super) fn living(&self) -> impl Iterator<Item = (ProcessId, u32)> {
        self.all.iter().filter_map(|spare| Some((spare.member.id, spare.member.living()?)))
    }
}
