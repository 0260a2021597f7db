//! The event loop of the agent process. Signals, ends of ranks, links, the coordinator and timers
//! become events of the pure agent machine, and its actions become system calls. The machine
//! decides about ranks, rounds and the exit; the loop decides only what is printed and how the user
//! is asked.

mod clock;
mod finished;
mod group;
mod hang_check;
mod import_hint;
mod inspect;
mod leaving;
mod link;
mod member;
mod pause;
mod prompt;
mod rank_events;
mod ranks_store;
mod spares;
mod terminal;
mod timers;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use ice_proto::exit::ExitCode;
use ice_proto::link::{BoundaryRequest, FromRank};
use ice_proto::rendezvous::{Hello, Round, ToAgent, ToCoordinator};
use ice_rendezvous::{Rendezvous, Session, address};
use nix::sys::signal::{Signal, raise};
use tokio::sync::mpsc;

use crate::logs::{Console, Files};
use crate::report::{ErrorDocument, Events, JobEvent, ProgressLines, Rounds};
use crate::supervise::{Caught, Heartbeats, ProcessId, ProcessTree, Remains, Signals};
use crate::warm::Warm;
use crate::{Error, LaunchPlan, preempt};
use clock::Clock;
use finished::Finished;
use group::Group;
use ice_agent::{Action, Event, Exit, GroupConfig, Hang, HangWatch, WorkerGroup};
use import_hint::ImportHint;
use prompt::Answer;
use ranks_store::StoreOffer;
use timers::{FileTimers, requested};

/// Time in which pending output may still be written once the user wants the end.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// An event of a rank, or of a thread or task that works for the dispatcher.
pub(crate) enum RankEvent {
    Exited(ProcessId, Exit),
    /// A message about processes that a rank has left behind, or about a rank that does not end.
    Remains(ProcessId, Remains),
    /// A message of a process over its link.
    Said(ProcessId, FromRank),
    /// The user has answered the question.
    Answered(Answer),
    /// This machine, or the job's time, is about to be taken away. The text names the notice.
    Noticed(String),
    /// A warning for the user.
    Warned(String),
    /// The stacks of a job that hung in this round have been written. The text says which exist.
    Inspected(u64, Hang, String),
}

/// Carries out a plan and returns the exit code of the launcher.
pub(crate) async fn run(plan: LaunchPlan) -> Result<ExitCode, Error> {
    let mut signals = Signals::new(&plan.signals, &plan.notice_signals()).map_err(Error::Runtime)?;
    let heartbeats = Heartbeats::make();
    let (tree, mut notes) = ProcessTree::root(heartbeats.as_ref().ok().map(Heartbeats::folder));
    if let Err(error) = &heartbeats {
        notes.push(format!("ICE_HEARTBEAT_FILE is not set: no temporary folder: {error}"));
    }
    let _reaper = tree.reap().map_err(Error::Runtime)?;
    let meeting = Arc::new(Rendezvous::open(plan.meeting.clone(), plan.place.clone()).await?);
    let (console, said) = Console::open().map_err(Error::Runtime)?;
    for note in notes.iter().chain(&plan.notes).chain(meeting.notes()) {
        console.note(note);
    }
    if plan.meeting.multi_node && plan.meeting.token.is_none() {
        let (endpoint, _) = meeting.address();
        let open = match (meeting.coordinator_can_move(), meeting.is_host() && !is_loopback(&endpoint)) {
            (true, _) => Some("the agent that coordinates"),
            (false, true) => Some(endpoint.as_str()),
            (false, false) => None,
        };
        if let Some(open) = open {
            console.note(&format!(
                "any process that reaches {open} can join this job, and messages of its agents are not encrypted: make a secret with \
                 `openssl rand -hex 32 > token`, and give all agents --rdzv-token-file token --rdzv-tls"
            ));
        }
    }
    let (files, written) = Files::open(&console).map_err(Error::Runtime)?;
    let events = match &plan.events {
        Some(path) => match files.append_to(path, None) {
            Ok(file) => Some((files.clone(), file)),
            Err(source) => return Err(Error::Events { path: path.clone(), source }),
        },
        None => None,
    };
    let offer = StoreOffer::new(&plan).map_err(Error::Runtime)?;
    let timers = FileTimers::open(&plan, &console)?;
    // The template imports modules while the nodes meet.
    let warm = Warm::new(&plan, &tree, (&console, &files));
    let meet = async {
        let session = meeting.connect(hello(&plan, &meeting, &offer)).await;
        if session.is_ok() {
            warm.ready().await;
        }
        session
    };
    let session = tokio::select! {
        session = meet => session?,
        caught = signals.stop() => {
            ErrorDocument::of_launcher("told to stop before the nodes had met").write();
            return Ok(match caught {
                Caught::Stop(signal) => Exit::Signal(signal).code(),
                _ => ExitCode::Requeue(plan.requeue_exit_code),
            });
        }
    };
    session.send(ToCoordinator::Join);
    let events = Events::new(&plan.run_id, events);
    let dispatcher = Dispatcher::new(
        &plan,
        (Arc::clone(&meeting), offer),
        session,
        &tree,
        (console.clone(), files),
        events,
        warm,
    )
    .with_timers(timers)
    .with_heartbeats(heartbeats.ok());
    let mut gave_up = false;
    let outcome = dispatcher.run(&mut signals, &mut gave_up).await;
    // After an error ranks may still run, and the dispatcher that supervised them is gone.
    tokio::select! {
        () = tree.end(|text| console.note(&text)), if !gave_up => tree.dismiss_keeper(),
        // A signal ends the wait for processes that cannot be ended; the keeper keeps waiting for
        // them.
        _ = signals.stop(), if !gave_up => {}
        else => {}
    }
    drop(console);
    // Each writer thread ends once the last handle of its queue is dropped. The thread for files
    // comes first: files hold handles of the console, to report that they cannot be written.
    let mut all_written = std::pin::pin!(async {
        written.wait().await;
        said.wait().await;
    });
    tokio::select! {
        () = &mut all_written => {}
        // A signal ends the wait for a console that is not read.
        _ = signals.stop() => {
            let _ = tokio::time::timeout(FLUSH_TIMEOUT, all_written).await;
        }
    }
    meeting.close(plan.close_timeout).await;
    outcome
}

fn hello(plan: &LaunchPlan, meeting: &Rendezvous, offer: &StoreOffer) -> Hello {
    Hello {
        run_id: plan.run_id.clone(),
        node_rank: plan.node_rank,
        nnodes: plan.nnodes,
        local_world_size: plan.local_world_size(),
        role: plan.role.clone(),
        ranks_store: offer.of(meeting),
        restarts: plan.restarts,
        keep_alive: plan.meeting.keep_alive,
        agent_id: meeting.agent_id(),
        run_stamp: None,
        last_node_rank: None,
        addresses: address::own_addresses(),
        host: hostname(),
        pid: std::process::id(),
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

pub(crate) fn hostname() -> String {
    nix::unistd::gethostname().map_or_else(|_| "?".into(), |name| name.to_string_lossy().into_owned())
}

/// State of the event loop. Only this loop's task accesses the state; threads and tasks that work
/// for the loop send a [`RankEvent`] through `sender`.
struct Dispatcher<'a> {
    worker_group: WorkerGroup,
    group: Group<'a>,
    console: Console,
    event_log: Events,
    session: Option<Session>,
    /// Sender for threads and tasks that work for the loop.
    sender: mpsc::UnboundedSender<RankEvent>,
    events: mpsc::UnboundedReceiver<RankEvent>,
    progress: ProgressLines,
    hangs: HangWatch,
    /// Pipe and deadlines of the timers that ranks set, if the plan asks for timers.
    timers: Option<FileTimers>,
    rounds: Rounds,
    /// Time of the first event that may end the round.
    first_failure_at: Option<Duration>,
    /// Time at which heartbeat files and CPU times are read next.
    sample_at: Duration,
    /// Whether the stacks of a hang are being written. No other hang is looked for meanwhile.
    inspecting: bool,
    /// Local ranks that wait at a step boundary because the job is paused.
    paused: BTreeSet<u32>,
    /// Whether the user is being asked.
    asking: bool,
    clock: Clock,
    plan: &'a LaunchPlan,
    meeting: Arc<Rendezvous>,
    offer: StoreOffer,
    /// Run stamp of the job, once the coordinator has sent it.
    run_stamp: Option<String>,
    /// Path and step of the last checkpoint that a rank of this node has saved.
    saved: Option<(String, u64)>,
    /// Reason why this node leaves the job.
    left: Option<String>,
    /// Ranks of this node that have exited with code 0 while others run.
    finished: Finished,
    import_hint: ImportHint,
    /// Whether the time for the line at the start of the job has come.
    is_introduced: bool,
    /// Reason why the job is over, according to the coordinator or the connection to it.
    over: Option<String>,
    /// The search for a lost coordinator.
    reconnect: Option<Reconnect>,
    /// Whether processes that do not end are left to the keeper.
    gave_up: bool,
}

impl<'a> Dispatcher<'a> {
    fn new(
        plan: &'a LaunchPlan,
        (meeting, offer): (Arc<Rendezvous>, StoreOffer),
        session: Session,
        tree: &Arc<ProcessTree>,
        (console, files): (Console, Files),
        event_log: Events,
        warm: Warm,
    ) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        preempt::watch(&plan.notices, &sender);
        let rewrites = terminal::rewrites_progress(plan);
        let config = GroupConfig {
            may_restart: plan.restarts.max_restarts > 0,
            local_world_size: plan.local_world_size(),
            shutdown_timeout: plan.shutdown_timeout,
            fatal_exit_codes: plan.fatal_exit_codes.clone(),
            requeue_exit_code: plan.requeue_exit_code,
            reconnect_timeout: (meeting.coordinator_can_move()
                || (!meeting.is_host() && plan.outlives_nodes()))
            .then(|| meeting.reconnect_timeout()),
        };
        Self {
            worker_group: WorkerGroup::new(config),
            group: Group::new(
                plan,
                Arc::clone(tree),
                (console.clone(), files),
                sender.clone(),
                rewrites,
                warm,
            ),
            console,
            event_log,
            session: Some(session),
            sender,
            events,
            progress: ProgressLines::new(plan.progress_interval, rewrites),
            hangs: HangWatch::new(plan.hang_timeout, plan.monitor_interval),
            timers: None,
            rounds: Rounds::default(),
            first_failure_at: None,
            sample_at: Duration::ZERO,
            inspecting: false,
            paused: BTreeSet::new(),
            asking: false,
            clock: Clock::start(),
            plan,
            meeting,
            offer,
            run_stamp: None,
            saved: None,
            left: None,
            finished: Finished::default(),
            import_hint: ImportHint::new(plan),
            is_introduced: false,
            over: None,
            reconnect: None,
            gave_up: false,
        }
    }

    fn with_timers(mut self, timers: Option<FileTimers>) -> Self {
        self.group.set_timer_file(timers.as_ref().map(FileTimers::path));
        Self { timers, ..self }
    }

    fn with_heartbeats(mut self, heartbeats: Option<Heartbeats>) -> Self {
        self.group.set_heartbeats(heartbeats);
        self
    }

    async fn run(mut self, signals: &mut Signals, gave_up: &mut bool) -> Result<ExitCode, Error> {
        let command = self.plan.program.command();
        let (ranks, host) = (self.plan.devices.len(), hostname());
        self.event_log.add(&JobEvent::AgentStarted { pid: std::process::id(), host, ranks, command });
        loop {
            let deadline = self.deadline();
            let wake = self.clock.instant(deadline.unwrap_or_default());
            let event = tokio::select! {
                // The order of the branches matters. Events that have arrived are handled before
                // deadlines, so that a heartbeat in the queue prevents a false hang.
                biased;
                caught = signals.next() => self.caught(caught),
                Some(event) = self.events.recv() => self.rank_event(event),
                message = receive(&mut self.session) => match message {
                    Ok(ToAgent::Standstill { round }) => self.stands_still(round),
                    Ok(message) => {
                        if let ToAgent::RoundStarted(Round { run_stamp, .. })
                        | ToAgent::Waiting { run_stamp, .. } = &message
                        {
                            self.run_stamp = Some(run_stamp.clone());
                        }
                        match &message {
                            // The coordinator may repeat a message about an earlier round.
                            ToAgent::RoundBroken { round, reason, .. } if self.rounds.current() == Some(*round) => {
                                self.end_round(reason);
                            }
                            ToAgent::Closed { reason, .. } => {
                                self.over = Some(reason.clone());
                                self.end_round(reason);
                            }
                            ToAgent::Refused { reason } => self.over = Some(reason.clone()),
                            _ => {}
                        }
                        Some(Event::Coordinator(message))
                    }
                    Err(error) => {
                        self.session = None;
                        self.over = Some(error.to_string());
                        self.end_round(&error.to_string());
                        Some(Event::CoordinatorLost(error.to_string()))
                    }
                },
                found = reconnected(&mut self.reconnect) => {
                    self.reconnect = None;
                    Some(match found {
                        Ok(session) => {
                            self.session = Some(session);
                            Event::Reconnected
                        }
                        Err(error) => {
                            self.over = Some(error.to_string());
                            Event::ReconnectFailed(error.to_string())
                        }
                    })
                }
                () = tokio::time::sleep_until(wake), if deadline.is_some() => {
                    self.clock.woke(deadline.unwrap_or_default());
                    self.say_finished();
                    self.look().or(Some(Event::Tick))
                }
                // Last, because a rank that writes without pause must not hold up deadlines.
                request = requested(&mut self.timers) => {
                    self.timer_requested(request);
                    None
                }
            };
            let Some(event) = event else { continue };
            if let Some(code) = self.handle(event).await? {
                if let Some(session) = self.session {
                    session.finish().await;
                }
                self.event_log.add(&JobEvent::AgentEnded { exit_code: code.code() });
                *gave_up = self.gave_up;
                return Ok(code);
            }
        }
    }

    /// Returns the next time at which the loop has to act without an event.
    fn deadline(&self) -> Option<Duration> {
        let watching = self.worker_group.is_running() && !self.inspecting;
        let silence = self.hangs.silence().filter(|_| self.worker_group.is_regrouping()).map(|(due, _)| due);
        let hang = self.hangs.deadline().filter(|_| watching).or(silence);
        let sample = self.hangs.sampling().filter(|_| watching).map(|_| self.sample_at);
        let timer = self.timers.as_ref().and_then(FileTimers::deadline).filter(|_| watching);
        let finished = self.finished.deadline().filter(|_| self.worker_group.is_running());
        [self.worker_group.deadline(), hang, sample, timer, finished].into_iter().flatten().min()
    }

    fn caught(&mut self, caught: Caught) -> Option<Event> {
        match caught {
            Caught::Stop(signal) => {
                self.event_log.add(&JobEvent::Signal { signal });
                if signal == Signal::SIGINT as i32 && self.asks() {
                    return None;
                }
                let again = signal == Signal::SIGINT as i32 && self.asking;
                if std::mem::take(&mut self.asking) {
                    self.console.say("\n");
                }
                Some(match again {
                    // A second Ctrl-C while the question is on the screen means "no": stop without
                    // a checkpoint.
                    true if self.is_paused() => self.stop(signal, false),
                    true => Event::Abort(signal),
                    false => self.stop(signal, true),
                })
            }
            Caught::Notice(signal) => {
                self.event_log.add(&JobEvent::Signal { signal: signal as i32 });
                Some(self.noticed(signal.as_str().into()))
            }
            Caught::Forward(signal) => {
                self.event_log.add(&JobEvent::Signal { signal });
                Some(Event::Forward(signal))
            }
            Caught::Suspend => {
                self.suspend();
                None
            }
        }
    }

    fn stop(&self, signal: i32, save: bool) -> Event {
        Event::Stop { signal, save, together: self.group.agrees(), notice: None }
    }

    fn noticed(&self, what: String) -> Event {
        let (signal, together) = (Signal::SIGTERM as i32, self.group.agrees());
        Event::Stop { signal, save: true, together, notice: Some(what) }
    }

    /// Stops all ranks and then this process. Returns once the process is continued.
    fn suspend(&mut self) {
        // Ranks are in sessions of their own, so the terminal does not stop them.
        self.group.signal(Signal::SIGSTOP);
        self.progress.pause();
        self.clock.pause(|| _ = raise(Signal::SIGSTOP));
        self.group.signal(Signal::SIGCONT);
    }

    /// Carries out the actions that follow from an event. Returns the exit code once the agent is
    /// done.
    async fn handle(&mut self, event: Event) -> Result<Option<ExitCode>, Error> {
        tracing::debug!(?event, "event");
        for action in self.worker_group.handle(self.clock.now(), event) {
            tracing::debug!(?action, "action");
            match action {
                Action::Send(message) => {
                    if let ToCoordinator::Leave { reason, .. } = &message {
                        self.left = Some(reason.clone());
                    }
                    if let Some(session) = &self.session {
                        session.send(message);
                    }
                }
                Action::Reconnect => {
                    let (run_stamp, last_node_rank) = (self.run_stamp.clone(), self.group.place());
                    let hello =
                        Hello { run_stamp, last_node_rank, ..hello(self.plan, &self.meeting, &self.offer) };
                    let meeting = Arc::clone(&self.meeting);
                    self.reconnect = Some(Box::pin(async move { meeting.reconnect(hello).await }));
                }
                Action::Spawn(round) => self.spawn(round)?,
                Action::RequestStop(ask) => {
                    self.console.no_status();
                    self.event_log.add(&JobEvent::Stopping { how: "asked" });
                    self.group.ask(&ask);
                }
                Action::Terminate => {
                    self.event_log.add(&JobEvent::Stopping { how: "terminated" });
                    self.group.terminate();
                }
                Action::TerminateRank(local_rank) => self.group.terminate_rank(local_rank),
                Action::Kill => {
                    self.event_log.add(&JobEvent::Stopping { how: "killed" });
                    self.group.kill();
                }
                Action::KillUnparked => {
                    self.event_log.add(&JobEvent::Stopping { how: "killed" });
                    self.group.kill_unparked();
                }
                Action::GiveUp => self.gave_up = true,
                Action::Forward(signal) => self.forward(signal),
                Action::Report(ends) => {
                    // A process that has left its rank's session and mark may hold the pipes of the
                    // rank open, which would delay the report.
                    self.group.kill_others();
                    if let Some(failure) = self.group.report(ends).await {
                        let cause = failure.root_cause;
                        let (rank, exit, message) = (cause.rank, cause.exit.exit, cause.message);
                        self.event_log.add(&JobEvent::AttemptFailed {
                            attempt: failure.attempt,
                            rank,
                            exit,
                            message,
                        });
                    }
                }
                Action::Notify(text) => {
                    self.console.note(&text);
                    self.event_log.add(&JobEvent::Decision { text });
                }
                Action::Exit(code) => {
                    self.leave(code);
                    if code != ExitCode::Success {
                        self.write_error(code);
                    }
                    return Ok(Some(code));
                }
            }
        }
        Ok(None)
    }

    fn spawn(&mut self, round: Round) -> Result<(), Error> {
        // Processes that the last attempt left behind must not interfere with the next one.
        self.group.kill_others();
        self.event_log.add(&JobEvent::RoundStarted {
            round: round.number,
            attempt: round.restart_count,
            nodes: round.nodes,
            node: round.assignment.group_rank,
            world_size: round.world_size,
        });
        if round.restart_count > 0
            && let Some(hint) = self.import_hint.line()
        {
            self.console.note(hint);
        }
        let nodes = round.nodes;
        let (host, port) = self.meeting.address();
        let began = round.clone();
        let started = self.group.spawn(round, (&host, port))?;
        (self.first_failure_at, self.finished) = (None, Finished::default());
        self.rounds.start(self.clock.now(), &began, started.clone());
        (self.inspecting, self.sample_at) = (false, self.clock.now());
        self.hangs.start(self.plan.local_world_size(), nodes);
        for (local_rank, pid) in self.group.living() {
            if !started.contains(&local_rank) {
                continue;
            }
            let rank = self.group.rank(local_rank);
            self.event_log.add(&JobEvent::RankStarted { rank, local_rank, pid });
        }
        for pid in self.group.park_spares() {
            self.event_log.add(&JobEvent::SpareStarted { pid });
        }
        self.introduce();
        Ok(())
    }

    /// Writes the error file for the platform that started this launcher.
    fn write_error(&mut self, code: ExitCode) {
        // After a stop by the user, errors that ranks reported are a consequence of the stop.
        let failed_here = self.group.error().filter(|_| self.left.is_none());
        let document = failed_here.unwrap_or_else(|| {
            let reason = self.left.as_deref().or(self.over.as_deref());
            let unknown = || format!("the job failed with exit code {}", code.code());
            ErrorDocument::of_launcher(&reason.map_or_else(unknown, Into::into))
        });
        document.write();
    }

    /// Records the end of the running round, if there is one.
    fn end_round(&mut self, reason: &str) {
        // If this node leaves, other reasons are consequences of that.
        let reason = self.left.as_deref().unwrap_or(reason);
        if let Some(record) = self.rounds.end(self.clock.now(), self.first_failure_at.take(), reason) {
            self.group.write_round(record);
        }
    }

    fn start_spares(&mut self) {
        let (host, port) = self.meeting.address();
        for pid in self.group.start_spares((&host, port)) {
            self.event_log.add(&JobEvent::SpareStarted { pid });
        }
    }

    fn forward(&mut self, signal: i32) {
        let Ok(signal) = Signal::try_from(signal) else { return };
        let refused = self.group.forward(signal);
        let request = match signal {
            Signal::SIGUSR1 => BoundaryRequest::Save,
            _ if self.paused.is_empty() => BoundaryRequest::Pause,
            _ => BoundaryRequest::Resume,
        };
        // Ranks of the runtime install no handlers. A request over the link makes them perform
        // together the action that the signal stands for.
        if !refused.is_empty() && self.group.agrees() {
            self.request(request);
        } else if !refused.is_empty() {
            let ranks: Vec<_> = refused.iter().map(ToString::to_string).collect();
            self.console.note(&format!(
                "{signal} was not passed on to rank {}: it has no handler and would end",
                ranks.join(", ")
            ));
        }
    }
}

/// A search for the coordinator.
type Reconnect = Pin<Box<dyn Future<Output = Result<Session, ice_rendezvous::Error>>>>;

/// Waits for the end of the search, forever if there is none. Cancel-safe: the search stays in
/// `reconnect`.
async fn reconnected(reconnect: &mut Option<Reconnect>) -> Result<Session, ice_rendezvous::Error> {
    match reconnect {
        Some(search) => search.await,
        None => std::future::pending().await,
    }
}

/// Waits for the next message of the coordinator, forever if there is no connection.
async fn receive(session: &mut Option<Session>) -> Result<ToAgent, ice_rendezvous::Error> {
    match session {
        Some(session) => session.recv().await,
        None => std::future::pending().await,
    }
}
