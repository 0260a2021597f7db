//! The ranks of this node in a round: starting them, signalling them, and reporting on them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::SystemTime;

use ice_proto::exit::ExitCode;
use ice_proto::link::{Down, Request, Up};
use ice_proto::rendezvous::Round;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use tokio::sync::{mpsc, watch};

use super::member::Member;
use super::{RankEvent, hostname};
use crate::agent::{Ask, End, Exit};
use crate::logs::{Console, Files, Filtered, LogFile, LogFolder, Names, Pump, RankFiles, Sink, Target};
use crate::logs::{coloured, prefix};
use crate::report::{ExitRecord, Failure, OtherEnd, OtherRank, RankFailure, Summary};
use crate::supervise::{Environment, Stdio, spawn};
use crate::{Error, LaunchPlan};

pub(super) struct Group<'a> {
    plan: &'a LaunchPlan,
    /// This host's name.
    host: String,
    console: Console,
    files: Files,
    events: mpsc::UnboundedSender<RankEvent>,
    /// Whether a line of the terminal is rewritten, which all other output has to go around.
    rewrites: bool,
    logs: Option<LogFolder>,
    round: Option<Round>,
    ranks: BTreeMap<u32, Member>,
    summary: Summary,
}

/// One of the two output streams of a rank.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stream {
    Stdout,
    Stderr,
}

impl<'a> Group<'a> {
    pub(super) fn new(
        plan: &'a LaunchPlan,
        console: Console,
        files: Files,
        events: mpsc::UnboundedSender<RankEvent>,
        rewrites: bool,
    ) -> Self {
        let summary = Summary::new(&plan.run_id);
        let (logs, round, ranks) = (None, None, BTreeMap::new());
        Self { plan, host: hostname(), console, files, events, rewrites, logs, round, ranks, summary }
    }

    /// The node's rank in the last round.
    pub(super) fn place(&self) -> Option<u32> {
        self.round.as_ref().map(|round| round.you.group_rank)
    }

    /// Starts all ranks. One that cannot be started counts as one that ended.
    pub(super) fn spawn(&mut self, round: Round, store: (&str, u16)) -> Result<(), Error> {
        let mut logs = match self.logs.take() {
            Some(logs) => logs,
            None => LogFolder::make(self.plan, &round)?,
        };
        logs.begin(&round);
        self.ranks.clear();
        let environment = Environment::new(self.plan, &round, store);
        let mut members = BTreeMap::new();
        let mut ranks = Vec::new();
        for local_rank in 0..self.plan.local_world_size() {
            ranks.push((local_rank, logs.rank(local_rank)?));
        }
        let filtered = [(0, "stdout"), (1, "stderr")].map(|(at, stream)| {
            let texts: &[String] = &self.plan.logs.filters[at];
            if texts.is_empty() {
                return Ok(None);
            }
            let path = logs.filtered(stream);
            self.files.append_to(&path, None).map(Some).map_err(|source| Error::Logs { path, source })
        });
        let [stdout, stderr] = filtered;
        let filtered = [stdout?, stderr?];
        for (local_rank, files) in ranks {
            let member = match self.start(&round, &environment, local_rank, &files, &filtered) {
                Ok(member) => member,
                Err(error) => {
                    let exit = self.not_started(&error);
                    let _ = self.events.send(RankEvent::Exited(local_rank, exit));
                    Member::not_started(files)
                }
            };
            members.insert(local_rank, member);
        }
        (self.ranks, self.logs, self.round) = (members, Some(logs), Some(round));
        Ok(())
    }

    fn not_started(&self, error: &io::Error) -> Exit {
        let path = &self.plan.program.path;
        let code = match error.kind() {
            // A file that is there and not found lacks its interpreter.
            io::ErrorKind::NotFound if path.exists() => ExitCode::NotExecutable,
            io::ErrorKind::NotFound => ExitCode::NotFound,
            io::ErrorKind::PermissionDenied => ExitCode::NotExecutable,
            _ if error.raw_os_error() == Some(nix::libc::ENOEXEC) => ExitCode::NotExecutable,
            _ => ExitCode::Failure,
        };
        Exit::NotStarted { code, reason: format!("cannot execute {}: {error}", path.display()) }
    }

    fn start(
        &self,
        round: &Round,
        environment: &Environment,
        local_rank: u32,
        files: &RankFiles,
        filtered: &[Option<LogFile>; 2],
    ) -> io::Result<Member> {
        let (ours, theirs) = UnixStream::pair()?;
        let names = Names {
            role_name: &self.plan.role,
            rank: round.you.first_rank + local_rank,
            local_rank,
            node_rank: round.you.group_rank,
            host: &self.host,
            run_id: &self.plan.run_id,
        };
        let prefix = prefix(&self.plan.logs.prefix, &names);
        let (lives, ended) = watch::channel(());
        let [out_filter, err_filter] = filtered;
        let stream = |stream, path: &Path, filter: &Option<LogFile>| {
            self.stream(stream, local_rank, path, &prefix, filter.as_ref(), &ended)
        };
        // The pump of stdout works by itself: nobody asks it for anything.
        let (stdout, _) = stream(Stream::Stdout, &files.stdout, out_filter)?;
        let (stderr, stderr_pump) = stream(Stream::Stderr, &files.stderr, err_filter)?;
        let variables = environment.of(local_rank, &files.error);
        let cpus = self.plan.cpus.as_ref().and_then(|cpus| cpus.get(local_rank as usize));
        let rank = spawn(&self.plan.program, local_rank, cpus, variables, &theirs, [stdout, stderr])?;
        Member::started(local_rank, rank, ours, stderr_pump, lives, files.clone(), &self.events)
    }

    /// Where a stream of a rank goes, and what carries it there.
    fn stream(
        &self,
        stream: Stream,
        local_rank: u32,
        path: &Path,
        prefix: &str,
        filter: Option<&LogFile>,
        ended: &watch::Receiver<()>,
    ) -> io::Result<(Stdio, Option<Pump>)> {
        let logs = &self.plan.logs;
        let pick = |streams: &crate::cli::PerRank| {
            let streams = streams.of(local_rank);
            if stream == Stream::Stdout { streams.stdout } else { streams.stderr }
        };
        let (redirected, teed) = (pick(&logs.redirects), pick(&logs.tee));
        let shown = logs.console_ranks.as_ref().is_none_or(|ranks| ranks.contains(&local_rank));
        let to_file = redirected || teed;
        let to_console = shown && (teed || !redirected);
        let filter = filter.filter(|_| to_file);
        if to_file && !to_console && filter.is_none() && logs.rotation.is_none() {
            return Ok((Stdio::File(File::create(path)?), None));
        }
        // The report needs the last lines of stderr, so that goes through the agent in any case.
        let over_status = self.rewrites && to_console && io::stdout().is_terminal();
        if !to_file && stream == Stream::Stdout && !over_status {
            return Ok((if to_console { Stdio::Inherit } else { Stdio::Null }, None));
        }
        let target = match stream {
            Stream::Stdout => Target::Stdout,
            Stream::Stderr => Target::Stderr,
        };
        let shown_prefix = match (teed, target.is_coloured()) {
            (false, _) => String::new(),
            (true, false) => prefix.to_owned(),
            (true, true) => coloured(prefix, local_rank),
        };
        let texts = &logs.filters[usize::from(stream == Stream::Stderr)];
        let filtered = filter.map(|file| Filtered {
            texts: texts.clone(),
            prefix: prefix.to_owned(),
            file: file.clone(),
        });
        let file = if to_file { Some(self.files.append_to(path, logs.rotation)?) } else { None };
        let (reader, writer): (OwnedFd, OwnedFd) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let sink = Sink {
            console: self.console.clone(),
            target: to_console.then_some(target),
            prefix: shown_prefix,
            file,
            filtered,
            files: self.files.clone(),
        };
        Ok((Stdio::Pipe(writer), Some(Pump::start(reader, sink, ended.clone())?)))
    }

    /// Rank within the job.
    pub(super) fn rank(&self, local_rank: u32) -> u32 {
        self.round.as_ref().map_or(0, |round| round.you.first_rank) + local_rank
    }

    /// Notes what a rank said.
    pub(super) fn said(&mut self, local_rank: u32, message: &Up) {
        if let Some(member) = self.ranks.get_mut(&local_rank) {
            member.said(message);
        }
    }

    /// Notes the end of a rank; returns when it failed by its own account.
    pub(super) fn exited(&mut self, local_rank: u32, exit: &Exit) -> Option<SystemTime> {
        let member = self.ranks.get_mut(&local_rank)?;
        member.exited();
        if *exit == Exit::Code(0) { None } else { member.failed_at() }
    }

    /// The processes that live, by local rank.
    pub(super) fn living(&self) -> BTreeMap<u32, u32> {
        self.ranks.iter().filter_map(|(rank, member)| Some((*rank, member.living()?))).collect()
    }

    /// Processes and where their stacks are to be written.
    pub(super) fn stack_files(&self) -> Vec<(u32, u32, std::path::PathBuf)> {
        let file = |(rank, member): (&u32, &Member)| {
            Some((self.rank(*rank), member.living()?, member.files.stacks.clone()))
        };
        self.ranks.iter().filter_map(file).collect()
    }

    pub(super) fn ask(&mut self, ask: &Ask) {
        let (round, node) = self.round.as_ref().map_or((0, 0), |round| (round.number, round.you.group_rank));
        let reason = match ask {
            Ask::Stop(_, save) if self.agrees() => return self.request(Request::Stop { node, save: *save }),
            // Some rank is ended by a signal, and takes part in nothing any more.
            Ask::Stop(..) => "told to stop".into(),
            Ask::Broken(reason) => reason.clone(),
        };
        let message = Down::RoundBroken { round, reason };
        let signal = Signal::try_from(ask.signal()).unwrap_or(Signal::SIGTERM);
        self.ranks.values_mut().for_each(|member| member.ask(&message, signal));
    }

    /// Whether the ranks do together what one of them is asked for: all live and know the link.
    pub(super) fn agrees(&self) -> bool {
        !self.ranks.is_empty() && self.ranks.values().all(Member::listens)
    }

    /// Asks one rank for something that all ranks of the job then do.
    pub(super) fn request(&self, request: Request) {
        let told = self.ranks.values().any(|member| member.send(&Down::Ask(request)));
        if !told {
            self.console.note("no rank could be told");
        }
    }

    pub(super) fn terminate(&mut self) {
        self.ranks.values_mut().for_each(Member::terminate);
    }

    /// Signals the process groups of all ranks that live.
    pub(super) fn signal(&self, signal: Signal) {
        self.ranks.values().for_each(|member| member.signal(signal));
    }

    /// Passes a signal on; returns the ranks that do not handle it.
    pub(super) fn forward(&self, signal: Signal) -> Vec<u32> {
        let refuses = |(rank, member): (&u32, &Member)| (!member.forward(signal)).then(|| self.rank(*rank));
        self.ranks.iter().filter_map(refuses).collect()
    }

    /// Tells the user how the ranks of an attempt ended.
    pub(super) async fn report(&mut self, ends: Vec<End>) -> Option<Failure> {
        let mut ends = ends.into_iter();
        let first = ends.next()?;
        let (round, node, attempt) =
            self.round.as_ref().map(|round| (round.number, round.you.group_rank, round.restart_count))?;
        let others = ends.map(|end| self.other(&end)).collect();
        let rank = self.rank(first.local_rank);
        let member = self.ranks.get_mut(&first.local_rank)?;
        let record = member.record();
        let mut logs = member.files.error.parent().unwrap_or(Path::new("")).to_owned();
        if matches!(first.exit, Exit::Hung(_)) {
            logs = member.files.stacks.clone();
        }
        let root_cause = RankFailure {
            rank,
            local_rank: first.local_rank,
            pid: member.pid(),
            exit: ExitRecord::from(&first.exit),
            message: record.as_ref().map(|record| record.message.clone()),
            callstack: record.map(|record| record.callstack).filter(|stack| !stack.is_empty()),
            stderr: member.last_lines().await,
            logs,
        };
        let program = self.plan.program.path.clone();
        let failure = Failure { attempt, round, host: self.host.clone(), node, program, root_cause, others };
        self.console.say(&failure.to_string());
        self.summary.add(failure.clone());
        self.write_summary();
        if let Some(logs) = &mut self.logs {
            logs.keep();
        }
        Some(failure)
    }

    fn other(&self, end: &End) -> OtherRank {
        let record = self.ranks.get(&end.local_rank).and_then(Member::record);
        let how = match end.exit {
            Exit::Code(0) if end.asked => OtherEnd::Stopped,
            Exit::Code(0) => OtherEnd::Finished,
            _ if end.asked && record.is_none() => OtherEnd::Stopped,
            _ => OtherEnd::Failed,
        };
        OtherRank {
            rank: self.rank(end.local_rank),
            local_rank: end.local_rank,
            end: how,
            exit: ExitRecord::from(&end.exit),
            message: record.map(|record| record.message),
        }
    }

    fn write_summary(&self) {
        let Some(logs) = &self.logs else { return };
        if let Err(error) = self.summary.write(logs.path()) {
            self.console.note(&format!("report.json was not written: {error}"));
        }
    }

    /// The job is over: a temporary folder goes unless somebody may want it.
    pub(super) fn finish(&mut self, code: ExitCode) {
        self.summary.end(code.code());
        let plan = &self.plan.logs;
        let wanted = code != ExitCode::Success || !plan.redirects.is_empty() || !plan.tee.is_empty();
        if self.logs.as_ref().is_some_and(LogFolder::is_named) || self.summary.has_failures() {
            self.write_summary();
        }
        if let Some(logs) = &mut self.logs
            && wanted
        {
            logs.keep();
        }
    }
}
