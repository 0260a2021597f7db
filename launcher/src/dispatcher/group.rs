//! The ranks of this node in a round: starts, signals and links.

mod output;
mod reporting;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use ice_proto::env::{ICE_HEARTBEAT_FILE, TORCHELASTIC_TIMER_FILE};
use ice_proto::exit::ExitCode;
use ice_proto::link::{BoundaryRequest, FromRank, ToRank};
use ice_proto::rendezvous::Round;
use nix::sys::signal::Signal;
use tokio::sync::{mpsc, watch};

use super::member::Member;
use super::spares::{Spare, Spares};
use super::{ProcessId, RankEvent, hostname};
use crate::logs::{Console, Files, LogFile, LogFolder, Names, Pump, RankFiles, prefix};
use crate::report::{ErrorDocument, Summary};
use crate::supervise::{
    Environment, Executable, Heartbeats, MemoryWatch, ProcessTree, Start, Stdio, explained, spawn,
};
use crate::warm::Warm;
use crate::{Error, LaunchPlan};
use ice_agent::{Exit, StopRequest};
use output::Stream;

pub(super) struct Group<'a> {
    plan: &'a LaunchPlan,
    tree: Arc<ProcessTree>,
    /// Name of this host.
    host: String,
    console: Console,
    files: Files,
    events: mpsc::UnboundedSender<RankEvent>,
    /// Whether the launcher rewrites a line of the terminal in place, which all other output has to
    /// avoid.
    rewrites: bool,
    logs: Option<LogFolder>,
    round: Option<Round>,
    /// Port of the agents' store.
    store_port: u16,
    ranks: BTreeMap<u32, Member>,
    spares: Spares,
    memory: MemoryWatch,
    executable: Executable,
    /// Forks ranks of Python programs.
    warm: Warm,
    /// Number of processes started so far, and id of the last one.
    started: ProcessId,
    /// Folder of the files that ranks touch to show progress.
    heartbeats: Option<Heartbeats>,
    /// Path of the pipe on which ranks request timers.
    timer_file: Option<PathBuf>,
    /// Content of `report.json`, shared with the thread that writes files.
    summary: Arc<Mutex<Summary>>,
    /// `rounds.jsonl`, once a round has ended.
    rounds: Option<LogFile>,
    /// Content of the launcher's error file, if the last round failed on this node.
    error: Option<ErrorDocument>,
}

impl<'a> Group<'a> {
    pub(super) fn new(
        plan: &'a LaunchPlan,
        tree: Arc<ProcessTree>,
        (console, files): (Console, Files),
        events: mpsc::UnboundedSender<RankEvent>,
        rewrites: bool,
        warm: Warm,
    ) -> Self {
        let summary = Arc::new(Mutex::new(Summary::new(&plan.run_id)));
        let (logs, round, ranks) = (None, None, BTreeMap::new());
        let host = hostname();
        // Those of Python are forked, and need no program that knows the link.
        let spares = Spares::new(if plan.preload.is_empty() { plan.spares } else { 0 });
        let memory = MemoryWatch::new();
        let (started, error) = (0, None);
        Self {
            plan,
            tree,
            host,
            console,
            files,
            events,
            rewrites,
            logs,
            round,
            store_port: 0,
            ranks,
            spares,
            memory,
            executable: Executable::open(&plan.program),
            warm,
            started,
            heartbeats: None,
            timer_file: None,
            summary,
            rounds: None,
            error,
        }
    }

    /// Gives the ranks files for heartbeats.
    pub(super) fn set_heartbeats(&mut self, heartbeats: Option<Heartbeats>) {
        self.heartbeats = heartbeats;
    }

    /// Sets the path of the pipe on which ranks request timers.
    pub(super) fn set_timer_file(&mut self, path: Option<&Path>) {
        self.timer_file = path.map(Path::to_owned);
    }

    /// Returns the last time at which each live rank touched its heartbeat file.
    pub(super) fn touched(&self) -> BTreeMap<u32, Duration> {
        let living = self.ranks.iter().filter(|(_, member)| member.living().is_some());
        let processes = living.map(|(rank, member)| (*rank, member.id));
        self.heartbeats.as_ref().map(|heartbeats| heartbeats.touched(processes)).unwrap_or_default()
    }

    /// Returns the number of the last round.
    pub(super) fn round(&self) -> Option<u64> {
        self.round.as_ref().map(|round| round.number)
    }

    /// Returns the node rank in the last round.
    pub(super) fn place(&self) -> Option<u32> {
        self.round.as_ref().map(|round| round.assignment.group_rank)
    }

    /// Returns the numbers of nodes and ranks in the last round.
    pub(super) fn size(&self) -> Option<(u32, u32)> {
        self.round.as_ref().map(|round| (round.nodes, round.world_size))
    }

    /// Returns the number of restarts before the last round.
    pub(super) fn restarts(&self) -> u32 {
        self.round.as_ref().map_or(0, |round| round.restart_count)
    }

    /// Returns the folder of the job's logs.
    pub(super) fn log_folder(&self) -> Option<&Path> {
        self.logs.as_ref().and_then(LogFolder::path)
    }

    /// Returns the outcome of the job, in a word.
    pub(super) fn outcome(&self) -> &'static str {
        reporting::locked(&self.summary).outcome()
    }

    /// Begins a round: sends it to the live ranks, and starts the others. Returns the local ranks
    /// that were started. A rank that cannot be started counts as a rank that has ended.
    ///
    /// # Errors
    /// Fails if log files cannot be made before this node has started any rank. Later, ranks start
    /// without them.
    pub(super) fn spawn(&mut self, round: Round, store: (&str, u16)) -> Result<Vec<u32>, Error> {
        let is_first = self.logs.is_none();
        let mut logs = match self.logs.take() {
            Some(logs) => logs,
            None => LogFolder::make(self.plan, &round)?,
        };
        logs.begin(&round);
        if let Some(news) = self.executable.refresh() {
            self.console.note(&news);
        }
        self.store_port = store.1;
        let environment = Environment::new(self.plan, &round, store);
        let mut missing = Vec::new();
        for local_rank in 0..self.plan.local_world_size() {
            let told = self.ranks.get(&local_rank).is_some_and(|member| {
                member.living().is_some()
                    && member.send(&environment.as_message(local_rank, member.files.error.as_deref()))
            });
            if !told {
                missing.push(local_rank);
            }
        }
        let missing = self.files_of(missing, &mut logs, is_first)?;
        let mut filtered = [None, None];
        for (at, stream) in ["stdout", "stderr"].into_iter().enumerate() {
            if self.plan.logs.filters[at].is_empty() {
                continue;
            }
            let Some(path) = logs.filtered(stream) else { continue };
            match self.files.append_to(&path, None) {
                Ok(file) => filtered[at] = Some(file),
                Err(source) if is_first => return Err(Error::Logs { path, source }),
                Err(error) => self.files.health().failed(&path, &error),
            }
        }
        let started = missing.iter().map(|(local_rank, _)| *local_rank).collect();
        self.memory.start_round();
        for (local_rank, files) in missing {
            if let Some(spare) = self.spares.take() {
                match self.promote(spare, &round, &environment, local_rank, &files, &filtered) {
                    Ok(member) => {
                        self.ranks.insert(local_rank, member);
                        continue;
                    }
                    Err(error) => self.console.note(&format!("a spare could not be used: {error}")),
                }
            }
            self.started += 1;
            let id = self.started;
            let member = match self.start(&round, &environment, (id, local_rank), &files, &filtered) {
                Ok(member) => member,
                Err(error) => {
                    let exit = self.not_started(&error);
                    let _ = self.events.send(RankEvent::Exited(id, exit));
                    Member::not_started(id, files)
                }
            };
            self.ranks.insert(local_rank, member);
        }
        (self.logs, self.round, self.error) = (Some(logs), Some(round), None);
        Ok(started)
    }

    /// Makes the log folders of ranks that are about to start, and returns the paths of their
    /// files.
    fn files_of(
        &self,
        ranks: Vec<u32>,
        logs: &mut LogFolder,
        is_first: bool,
    ) -> Result<Vec<(u32, RankFiles)>, Error> {
        let (mut all, mut failure) = (Vec::new(), None);
        for local_rank in ranks {
            let files = match logs.rank(local_rank) {
                Ok(files) => files,
                Err((path, source)) if is_first && self.plan.logs.are_wanted() => {
                    return Err(Error::Logs { path, source });
                }
                Err((_, error)) => {
                    failure.get_or_insert(error);
                    logs.rank_elsewhere(local_rank)
                }
            };
            all.push((local_rank, files));
        }
        let (plan, health) = (&self.plan.logs, self.files.health());
        match (failure, logs.path().filter(|_| plan.are_wanted())) {
            (Some(error), Some(path)) => {
                health.failed(path, &error);
                if !plan.redirects.is_empty() || !plan.tee.is_empty() {
                    self.console.note("ranks start without log files: their output goes to the console");
                }
            }
            (None, Some(path)) => health.works(path, 0),
            // The user asked for no log files, so none are missing.
            (_, None) => {}
        }
        Ok(all)
    }

    /// Starts the missing spares. Returns their process ids.
    pub(super) fn start_spares(&mut self, store: (&str, u16)) -> Vec<u32> {
        let Some(round) = self.round.clone() else { return Vec::new() };
        let mut started = Vec::new();
        for _ in 0..self.spares.missing() {
            self.started += 1;
            let variables = Environment::new(self.plan, &round, store).of_spare();
            let watch = (&self.events, self.plan.shutdown_timeout);
            let program = (&self.plan.program, self.executable.started_by());
            match self.spares.start(&self.tree, self.started, program, variables, watch) {
                Ok(pid) => started.push(pid),
                Err(error) => {
                    self.console.note(&format!("a spare could not be started: {error}"));
                    break;
                }
            }
        }
        started
    }

    /// Forks what is missing of the spares of Python; their processes.
    pub(super) fn park_spares(&self) -> Vec<u32> {
        self.warm.park()
    }

    /// Records the end of a spare.
    pub(super) fn spare_exited(&mut self, process: ProcessId, exit: &Exit) {
        if let Some(note) = self.spares.exited(process, exit) {
            self.console.note(&note);
        }
    }

    /// Makes a spare a rank.
    fn promote(
        &self,
        spare: Spare,
        round: &Round,
        environment: &Environment,
        local_rank: u32,
        files: &RankFiles,
        filtered: &[Option<LogFile>; 2],
    ) -> io::Result<Member> {
        let Spare { mut member, streams: [stdout, stderr], ended } = spare;
        let prefix = self.prefix(round, local_rank);
        let [out_filter, err_filter] = filtered;
        let out = self.route(Stream::Stdout, local_rank, &prefix, out_filter.as_ref());
        let err = self.route(Stream::Stderr, local_rank, &prefix, err_filter.as_ref());
        // Nothing asks the pump of stdout for its last lines, so its handle is dropped; the pump
        // keeps running.
        Pump::start(stdout, self.sink(out, files.stdout.as_deref()), ended.clone())?;
        let stderr = Pump::start(stderr, self.sink(err, files.stderr.as_deref()), ended)?;
        member.become_rank(files.clone(), stderr);
        match member.send(&environment.as_message(local_rank, files.error.as_deref())) {
            true => {
                // The spare sent `Stays` before it had a local rank, so the message is repeated for
                // the rank.
                let _ = self.events.send(RankEvent::Said(member.id, FromRank::Stays));
                Ok(member)
            }
            false => Err(io::Error::other("it does not listen")),
        }
    }

    fn prefix(&self, round: &Round, local_rank: u32) -> String {
        let names = Names {
            role_name: &self.plan.role,
            rank: round.assignment.first_rank + local_rank,
            local_rank,
            node_rank: round.assignment.group_rank,
            host: &self.host,
            run_id: &self.plan.run_id,
        };
        prefix(&self.plan.logs.prefix, &names)
    }

    /// Returns the local rank of a process, unless another process has replaced it.
    pub(super) fn local_rank(&self, process: ProcessId) -> Option<u32> {
        self.ranks.iter().find(|(_, member)| member.id == process).map(|(local_rank, _)| *local_rank)
    }

    fn not_started(&self, error: &io::Error) -> Exit {
        let path = &self.plan.program.path;
        let code = match error.kind() {
            // `NotFound` for a file that exists means that its interpreter is missing.
            io::ErrorKind::NotFound if path.exists() => ExitCode::NotExecutable,
            io::ErrorKind::NotFound => ExitCode::NotFound,
            io::ErrorKind::PermissionDenied => ExitCode::NotExecutable,
            _ if error.raw_os_error() == Some(nix::libc::ENOEXEC) => ExitCode::NotExecutable,
            _ => ExitCode::Failure,
        };
        Exit::NotStarted { code, reason: format!("cannot execute {}: {}", path.display(), explained(error)) }
    }

    fn start(
        &self,
        round: &Round,
        environment: &Environment,
        (id, local_rank): (ProcessId, u32),
        files: &RankFiles,
        filtered: &[Option<LogFile>; 2],
    ) -> io::Result<Member> {
        let (ours, theirs) = UnixStream::pair()?;
        let prefix = self.prefix(round, local_rank);
        let (lives, ended) = watch::channel(());
        let [out_filter, err_filter] = filtered;
        let stream = |stream, path: &Option<PathBuf>, filter: &Option<LogFile>| {
            self.stream(stream, local_rank, path.as_deref(), &prefix, filter.as_ref(), &ended)
        };
        // Nothing asks the pump of stdout for its last lines, so its handle is dropped; the pump
        // keeps running.
        let (stdout, _) = stream(Stream::Stdout, &files.stdout, out_filter)?;
        let (stderr, stderr_pump) = stream(Stream::Stderr, &files.stderr, err_filter)?;
        let mut variables = environment.of(local_rank, files.error.as_deref());
        let heartbeat = self.heartbeats.as_ref().map(|heartbeats| heartbeats.file(id));
        let paths = [(ICE_HEARTBEAT_FILE, heartbeat), (TORCHELASTIC_TIMER_FILE, self.timer_file.clone())];
        variables
            .extend(paths.into_iter().filter_map(|(name, path)| Some((name, path?.display().to_string()))));
        let cpus = self.plan.cpus.as_ref().and_then(|cpus| cpus.get(local_rank as usize));
        let (program, link, stdin) = (&self.plan.program, &theirs, Stdio::Inherit);
        let (executable, output) = (self.executable.started_by(), [stdout, stderr]);
        let start = Start { id, program, executable, local_rank, cpus, variables, link, stdin, output };
        let rank = match self.warm.start(&start, &environment.thread_variables()) {
            Some(rank) => rank,
            None => spawn(&self.tree, start)?,
        };
        let watch = (&self.events, self.plan.shutdown_timeout);
        Member::started(id, rank, ours, stderr_pump, lives, files.clone(), watch)
    }

    /// Returns the rank within the job.
    pub(super) fn rank(&self, local_rank: u32) -> u32 {
        self.round.as_ref().map_or(0, |round| round.assignment.first_rank) + local_rank
    }

    /// Records a message of a process. Returns its local rank, or `None` for a spare.
    pub(super) fn said(&mut self, process: ProcessId, message: &FromRank) -> Option<u32> {
        if self.spares.said(process, message) {
            return None;
        }
        let local_rank = self.local_rank(process)?;
        self.ranks.get_mut(&local_rank)?.said(message);
        Some(local_rank)
    }

    /// Adds to an exit what the kernel knows about its cause.
    pub(super) fn explained(&self, local_rank: u32, exit: Exit) -> Exit {
        let member = self.ranks.get(&local_rank).filter(|member| !member.was_killed());
        match member.and_then(|_| self.memory.cause(&exit)) {
            Some(cause) => Exit::Explained(Box::new(exit), cause),
            None => exit,
        }
    }

    /// Records the end of a rank. Returns the time at which the rank failed according to its own
    /// report.
    pub(super) fn exited(&mut self, local_rank: u32, exit: &Exit) -> Option<SystemTime> {
        let member = self.ranks.get_mut(&local_rank)?;
        member.exited();
        if *exit == Exit::Code(0) { None } else { member.failed_at() }
    }

    /// Returns the live processes by local rank.
    pub(super) fn living(&self) -> BTreeMap<u32, u32> {
        self.ranks.iter().filter_map(|(rank, member)| Some((*rank, member.living()?))).collect()
    }

    /// Kills every process of the job that does not descend from a live rank, spare or template.
    pub(super) fn kill_others(&self) {
        let ranks = self.ranks.values().filter_map(|member| Some((member.id, member.living()?)));
        let others = self.spares.living().chain(self.warm.process());
        self.tree.kill_others(&ranks.chain(others).collect::<Vec<_>>());
    }

    /// Returns rank, process and stack file of each live rank.
    pub(super) fn stack_files(&self) -> Vec<(u32, u32, Option<PathBuf>)> {
        let file = |(rank, member): (&u32, &Member)| {
            Some((self.rank(*rank), member.living()?, member.files.stacks.clone()))
        };
        self.ranks.iter().filter_map(file).collect()
    }

    /// Asks all ranks to end, or to leave the round.
    pub(super) fn ask(&mut self, request: &StopRequest) {
        let (round, node) =
            self.round.as_ref().map_or((0, 0), |round| (round.number, round.assignment.group_rank));
        let message = match request {
            StopRequest::Stop(_, save) if self.agrees() => {
                return self.request(BoundaryRequest::Stop { node, save: *save });
            }
            // Some rank is ended by a signal and can take part in no common checkpoint, so the
            // others end as well.
            StopRequest::Stop(..) => ToRank::End { reason: "told to stop".into() },
            StopRequest::End(reason) => ToRank::End { reason: reason.clone() },
            StopRequest::Broken(reason) => ToRank::RoundBroken { round, reason: reason.clone() },
            // A request to one rank reaches the ranks of all nodes, so node 0 alone sends it.
            StopRequest::Regroup if node > 0 => return,
            StopRequest::Regroup => return self.request(BoundaryRequest::Regroup),
        };
        let signal = Signal::try_from(request.signal()).unwrap_or(Signal::SIGTERM);
        self.ranks.values_mut().for_each(|member| member.ask(&message, signal));
    }

    /// Whether a request to one rank is carried out by all of them: all live and know the link.
    pub(super) fn agrees(&self) -> bool {
        !self.ranks.is_empty() && self.ranks.values().all(Member::listens)
    }

    /// Sends one rank a request that all ranks of the job then carry out together.
    pub(super) fn request(&self, request: BoundaryRequest) {
        let told = self.ranks.values().any(|member| member.send(&ToRank::Ask(request)));
        if !told {
            self.console.note("no rank could be told");
        }
    }

    /// Sends SIGTERM to the ranks that do not wait for the next round. A rank that does not know
    /// the link receives only one signal.
    pub(super) fn terminate(&mut self) {
        self.ranks.values_mut().for_each(Member::terminate);
    }

    /// Kills the ranks that do not wait for the next round.
    pub(super) fn kill_unparked(&self) {
        self.ranks.values().filter(|member| !member.is_parked()).for_each(Member::kill);
    }

    /// Kills all ranks.
    pub(super) fn kill(&self) {
        self.ranks.values().for_each(Member::kill);
    }

    pub(super) fn terminate_rank(&mut self, local_rank: u32) {
        self.ranks.get_mut(&local_rank).into_iter().for_each(Member::terminate);
    }

    /// Whether a SIGTERM that a rank received may have come from this agent.
    pub(super) fn was_signalled(&self, local_rank: u32) -> bool {
        self.ranks.get(&local_rank).is_some_and(Member::was_signalled)
    }

    /// Signals the process groups of all live ranks.
    pub(super) fn signal(&self, signal: Signal) {
        self.ranks.values().for_each(|member| member.signal(signal));
    }

    /// Passes a signal on. Returns the ranks that do not handle it.
    pub(super) fn forward(&self, signal: Signal) -> Vec<u32> {
        let refuses = |(rank, member): (&u32, &Member)| (!member.forward(signal)).then(|| self.rank(*rank));
        self.ranks.iter().filter_map(refuses).collect()
    }
}
