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
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::{RankEvent, hostname, link};
use crate::agent::Exit;
use crate::logs::{Console, LogFolder, Pump, RankFiles, Sink, TAIL_LINES, Target};
use crate::report::Failure;
use crate::supervise::{Environment, Stdio, spawn};
use crate::{Error, LaunchPlan};

pub(super) struct Group<'a> {
    plan: &'a LaunchPlan,
    master_port: u16,
    console: Console,
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
    /// The pump of stderr, where it goes through one.
    stderr: Option<Pump>,
    /// What waits for its end, and what listens to it.
    tasks: Vec<JoinHandle<()>>,
    message: Option<String>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl<'a> Group<'a> {
    pub(super) fn new(
        plan: &'a LaunchPlan,
        master_port: u16,
        console: Console,
        events: mpsc::UnboundedSender<RankEvent>,
    ) -> Self {
        Self { plan, master_port, console, events, logs: None, round: None, ranks: BTreeMap::new() }
    }

    /// Starts all ranks. One that cannot be started counts as one that ended.
    pub(super) fn spawn(&mut self, round: Round) -> Result<(), Error> {
        let logs = match self.logs.take() {
            Some(logs) => logs,
            None => LogFolder::make(self.plan, &round.run_stamp)?,
        };
        self.ranks.clear();
        let environment = Environment { plan: self.plan, round: &round, master_port: self.master_port };
        if (round.number, round.you) == (0, 0) && environment.limits_threads() {
            self.console.say(
                "ice-launch: OMP_NUM_THREADS is not set: 1 thread per rank; --omp-num-threads gives more\n",
            );
        }
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
        let (lives, ended) = watch::channel(());

        let stream =
            |redirect: bool, tee: bool, target: Target, path: &Path| -> io::Result<(Stdio, Option<Pump>)> {
                let (file, prefix) = match (redirect, tee) {
                    (_, true) => (Some(File::create(path)?), prefix.clone()),
                    (true, false) => return Ok((Stdio::File(File::create(path)?), None)),
                    // The report needs the last lines of stderr, so that goes through the agent in any case.
                    (false, false) if target == Target::Stderr => (None, String::new()),
                    (false, false) => return Ok((Stdio::Inherit, None)),
                };
                let (reader, writer): (OwnedFd, OwnedFd) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
                nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
                let sink = Sink { console: self.console.clone(), target, prefix, file };
                Ok((Stdio::Pipe(writer), Some(Pump::start(reader, sink, ended.clone())?)))
            };
        // The pump of stdout works by itself: nobody asks it for anything.
        let (stdout, _) = stream(redirects.stdout, tee.stdout, Target::Stdout, &files.stdout)?;
        let (stderr, stderr_pump) = stream(redirects.stderr, tee.stderr, Target::Stderr, &files.stderr)?;

        let variables = environment.of(local_rank, &files.error);
        let rank = spawn(&self.plan.program, variables, &theirs, [stdout, stderr])?;
        let process = Some((rank.pid(), rank.group()));
        let events = self.events.clone();
        let wait = tokio::spawn(async move {
            let exit = rank.wait().await;
            drop(lives);
            let _ = events.send(RankEvent::Exited(local_rank, exit));
        });
        let listen = tokio::spawn(link::listen(local_rank, ours, self.events.clone()));
        Ok(Member {
            files: files.clone(),
            process,
            alive: true,
            stderr: stderr_pump,
            tasks: vec![wait, listen],
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

    /// Notes the end of a rank.
    pub(super) fn exited(&mut self, local_rank: u32) {
        if let Some(member) = self.ranks.get_mut(&local_rank) {
            member.alive = false;
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
    pub(super) async fn report(&mut self, local_rank: u32, exit: Exit) {
        let others = self.ranks.keys().copied().filter(|other| *other != local_rank).collect::<Vec<_>>();
        let (Some(member), Some(round)) = (self.ranks.get_mut(&local_rank), &self.round) else { return };
        let first_rank = round.members.get(round.you as usize).map_or(0, |own| own.first_rank);
        let in_file = error_file::read(&member.files.error).ok().flatten().map(|record| record.message);
        let failure = Failure {
            host: hostname(),
            node: round.you,
            rank: first_rank + local_rank,
            local_rank,
            pid: member.process.map(|(pid, _)| pid),
            exit,
            message: in_file.or_else(|| member.message.clone()),
            stderr: match &mut member.stderr {
                Some(pump) => pump.last_lines().await,
                None => member.files.stderr_tail(TAIL_LINES),
            },
            log: member.files.error.parent().unwrap_or(Path::new("")).to_owned(),
            program: self.plan.program.path.clone(),
            others: others.into_iter().map(|other| first_rank + other).collect(),
        };
        self.console.say(&failure.to_string());
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
        Self { files, process: None, alive: false, stderr: None, tasks: Vec::new(), message: None }
    }
}
