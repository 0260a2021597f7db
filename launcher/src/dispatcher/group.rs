//! The ranks of this node in a round, with all that hangs on them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use ice_proto::error_file;
use ice_proto::exit::ExitCode;
use ice_proto::link::Up;
use ice_proto::rendezvous::Round;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{RankEvent, hostname, link};
use crate::agent::Exit;
use crate::logs::{LogFolder, Pump, RankFiles, TAIL_LINES};
use crate::report::Failure;
use crate::supervise::{Environment, Stdio, spawn};
use crate::{Error, LaunchPlan};

pub(super) struct Group<'a> {
    plan: &'a LaunchPlan,
    master_port: u16,
    events: mpsc::UnboundedSender<RankEvent>,
    logs: Option<LogFolder>,
    round: Option<Round>,
    ranks: BTreeMap<u32, Member>,
}

/// A rank of the round, living or not.
struct Member {
    files: RankFiles,
    process: Option<(u32, Pid)>,
    alive: bool,
    pumps: Vec<Pump>,
    /// The pump of stderr, where it goes through one.
    stderr: Option<usize>,
    link: Option<JoinHandle<()>>,
    message: Option<String>,
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            link.abort();
        }
    }
}

impl<'a> Group<'a> {
    pub(super) fn new(
        plan: &'a LaunchPlan,
        master_port: u16,
        events: mpsc::UnboundedSender<RankEvent>,
    ) -> Self {
        Self { plan, master_port, events, logs: None, round: None, ranks: BTreeMap::new() }
    }

    /// Starts all ranks. One that cannot be started counts as one that ended.
    pub(super) fn spawn(&mut self, round: Round) -> Result<(), Error> {
        let logs = match self.logs.take() {
            Some(logs) => logs,
            None => LogFolder::make(self.plan, &round.run_stamp)?,
        };
        self.ranks.clear();
        let mut members = BTreeMap::new();
        for local_rank in 0..u32::try_from(self.plan.devices.len()).unwrap_or(u32::MAX) {
            let files = logs.rank(round.restart_count, local_rank)?;
            let member = match self.start(&round, local_rank, &files) {
                Ok(member) => member,
                Err(error) => {
                    let code = match error.kind() {
                        // A file that is there and not found lacks its interpreter.
                        io::ErrorKind::NotFound if self.plan.program.path.exists() => ExitCode::NotExecutable,
                        io::ErrorKind::NotFound => ExitCode::NotFound,
                        io::ErrorKind::PermissionDenied => ExitCode::NotExecutable,
                        _ if error.raw_os_error() == Some(nix::libc::ENOEXEC) => ExitCode::NotExecutable,
                        _ => ExitCode::Failure,
                    };
                    let reason = format!("cannot execute {}: {error}", self.plan.program.path.display());
                    let _ =
                        self.events.send(RankEvent::Exited(local_rank, Exit::NotStarted { code, reason }));
                    Member::not_started(files)
                }
            };
            members.insert(local_rank, member);
        }
        (self.ranks, self.logs, self.round) = (members, Some(logs), Some(round));
        Ok(())
    }

    fn start(&self, round: &Round, local_rank: u32, files: &RankFiles) -> io::Result<Member> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let ours = tokio::net::UnixStream::from_std(ours)?;
        let environment = Environment { plan: self.plan, round, master_port: self.master_port };
        let (redirects, tee) = (self.plan.redirects.of(local_rank), self.plan.tee.of(local_rank));
        let prefix = format!("[{}{}]:", self.plan.role, environment.first_rank() + local_rank);
        let mut pumps = Vec::new();

        let mut stream =
            |redirect: bool, tee: bool, to_stderr: bool, path: &Path| -> io::Result<(Stdio, bool)> {
                let (file, prefix) = match (redirect, tee) {
                    (_, true) => (Some(File::create(path)?), prefix.clone()),
                    (true, false) => return Ok((Stdio::File(File::create(path)?), false)),
                    // The report needs the last lines of stderr, so that goes through the agent in any case.
                    (false, false) if to_stderr => (None, String::new()),
                    (false, false) => return Ok((Stdio::Inherit, false)),
                };
                let (reader, writer): (OwnedFd, OwnedFd) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
                nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
                pumps.push(Pump::start(reader, to_stderr, prefix, file)?);
                Ok((Stdio::Pipe(writer), true))
            };
        let (stdout, _) = stream(redirects.stdout, tee.stdout, false, &files.stdout)?;
        let (stderr, pumped) = stream(redirects.stderr, tee.stderr, true, &files.stderr)?;
        let stderr_pump = pumped.then(|| pumps.len() - 1);

        let variables = environment.of(local_rank, &files.error);
        let rank = spawn(&self.plan.program, variables, &theirs, [stdout, stderr])?;
        let process = Some((rank.pid(), rank.group()));
        let events = self.events.clone();
        tokio::spawn(async move {
            let exit = rank.wait().await;
            let _ = events.send(RankEvent::Exited(local_rank, exit));
        });
        let link = Some(tokio::spawn(link::listen(local_rank, ours, self.events.clone())));
        Ok(Member {
            files: files.clone(),
            process,
            alive: true,
            pumps,
            stderr: stderr_pump,
            link,
            message: None,
        })
    }

    /// Notes what a rank said.
    pub(super) fn said(&mut self, local_rank: u32, message: Up) {
        match (self.ranks.get_mut(&local_rank), message) {
            (Some(member), Up::Error { message }) => member.message = Some(message),
            (_, message) => tracing::debug!(local_rank, ?message, "a rank says"),
        }
    }

    /// Reads what a rank that ended has left in its pipes.
    pub(super) async fn drain(&mut self, local_rank: u32) {
        let Some(member) = self.ranks.get_mut(&local_rank) else { return };
        member.alive = false;
        for pump in &mut member.pumps {
            pump.finish().await;
        }
    }

    /// Signals the process groups of all ranks that live.
    pub(super) fn signal(&self, signal: Signal) {
        for member in self.ranks.values().filter(|member| member.alive) {
            if let Some((_, group)) = member.process {
                let _ = killpg(group, signal);
            }
        }
    }

    /// Tells the user how a rank failed.
    pub(super) fn report(&mut self, local_rank: u32, exit: Exit) {
        let (Some(member), Some(round)) = (self.ranks.get(&local_rank), &self.round) else { return };
        let own = round.members.get(round.you as usize);
        let first_rank = own.map_or(0, |own| own.first_rank);
        let in_file = error_file::read(&member.files.error).ok().flatten().map(|record| record.message);
        let failure = Failure {
            host: hostname(),
            node: round.you,
            rank: first_rank + local_rank,
            local_rank,
            pid: member.process.map(|(pid, _)| pid),
            exit,
            message: in_file.or_else(|| member.message.clone()),
            stderr: match member.stderr {
                Some(pump) => member.pumps[pump].tail.lines(),
                None => member.files.stderr_tail(TAIL_LINES),
            },
            log: member.files.error.parent().unwrap_or(Path::new("")).to_owned(),
            program: self.plan.program.path.clone(),
            others: self.ranks.keys().filter(|other| **other != local_rank).map(|r| first_rank + r).collect(),
        };
        eprint!("{failure}");
        if let Some(logs) = &mut self.logs {
            logs.keep();
        }
    }

    /// The job is over: a temporary folder goes unless somebody may want it.
    pub(super) fn finish(&mut self, success: bool) {
        if let Some(logs) = &mut self.logs
            && !(success && self.plan.redirects.is_empty() && self.plan.tee.is_empty())
        {
            logs.keep();
        }
    }
}

impl Member {
    fn not_started(files: RankFiles) -> Self {
        Self {
            files,
            process: None,
            alive: false,
            pumps: Vec::new(),
            stderr: None,
            link: None,
            message: None,
        }
    }
}
