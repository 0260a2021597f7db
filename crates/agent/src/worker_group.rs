use std::collections::BTreeSet;
use std::time::Duration;

use ice_proto::exit::ExitCode;
use ice_proto::rendezvous::{ToAgent, ToCoordinator};

use super::events::{Action, End, Event, GroupConfig, SIGINT, SIGQUIT, SIGTERM, StopRequest};
use super::exit::{Exit, signal_name};

/// Shortest uptime that is reported for a round in which a step was applied.
const PROGRESS: Duration = Duration::from_secs(60);
/// Period in which a second signal counts as a repetition of the first. Schedulers signal a
/// process, its group and its parent, so one request arrives several times.
const SIGNAL_DEBOUNCE: Duration = Duration::from_millis(250);
/// Time within which a killed process ends, unless the kernel holds it (frozen, or in an
/// uninterruptible system call).
const HELD: Duration = Duration::from_secs(1);

/// State of the agent, which decides which events matter.
///
/// `Joining` → `Running` when a round starts, `Running` → `Finished` when all ranks succeed. A
/// failure, an ended round or a request to stop leads to `Stopping`. Once no rank has to be waited
/// for and the next state is known, `WorkerGroup::finish_drain` moves on to `Joining` or `Done`.
#[derive(Debug, Clone)]
enum Phase {
    /// Waiting for a round to start.
    Joining,
    Running,
    /// All ranks exited successfully. The agent waits for the other nodes.
    Finished,
    /// Ranks are ending. The argument says what follows after the last of them.
    Stopping(AfterDrain),
    Done,
}

/// Next state after [`Phase::Stopping`].
#[derive(Debug, Clone)]
enum AfterDrain {
    /// Wait for the coordinator, which has not yet answered the report of the failure.
    Await,
    Rejoin,
    Exit(Option<ExitCode>),
}

/// The state machine. The module documentation lists its invariants.
pub struct WorkerGroup {
    config: GroupConfig,
    phase: Phase,
    /// Whether the agent has a connection to a coordinator.
    connected: bool,
    /// Number of the last round that started.
    round: u64,
    /// The report of a failure in this round, kept until the next round starts (AG-7). A
    /// `RoundBroken` does not acknowledge the report: the round may have ended for another reason.
    pending_failure: Option<ToCoordinator>,
    /// Number and reason of the last `RoundBroken` that was received.
    last_round_broken: Option<(u64, String)>,
    /// Local ranks whose processes run.
    alive: BTreeSet<u32>,
    /// Ranks that keep their process and its state when the round ends (survivors).
    survivors: BTreeSet<u32>,
    /// Survivors that have left the round and wait for the next one.
    parked: BTreeSet<u32>,
    /// Whether the ranks end the round by themselves, at a step that they agree on.
    graceful: bool,
    /// Whether a training step was applied in this round.
    progressed: bool,
    /// Time at which the round started.
    started: Duration,
    /// Ends of ranks in this attempt, in order of arrival.
    ends: Vec<End>,
    /// Time at which the user first asked for the end of the job.
    signalled: Option<Duration>,
    /// Time at which the last signal that asks for the end was answered.
    answered: Duration,
    /// Time at which the ranks were killed, if this agent is leaving.
    killed: Option<Duration>,
    /// Whether a notice of preemption arrived.
    preempted: bool,
    /// The `Leave` message of this node, while the coordinator must not receive it yet (AG-8).
    leave: Option<ToCoordinator>,
    /// Time at which ranks that still run receive SIGTERM.
    terminate_at: Option<Duration>,
    /// Time at which ranks that still run are killed (AG-4).
    kill_at: Option<Duration>,
}

impl WorkerGroup {
    /// Creates the machine of an agent that has joined.
    pub fn new(config: GroupConfig) -> Self {
        Self {
            config,
            phase: Phase::Joining,
            connected: true,
            round: 0,
            pending_failure: None,
            last_round_broken: None,
            alive: BTreeSet::new(),
            survivors: BTreeSet::new(),
            parked: BTreeSet::new(),
            graceful: false,
            progressed: false,
            started: Duration::ZERO,
            ends: Vec::new(),
            signalled: None,
            answered: Duration::ZERO,
            killed: None,
            preempted: false,
            leave: None,
            terminate_at: None,
            kill_at: None,
        }
    }

    /// Returns the next time at which the machine needs a [`Event::Tick`].
    pub fn deadline(&self) -> Option<Duration> {
        self.terminate_at.into_iter().chain(self.kill_at).min()
    }

    /// Whether the agent watches the ranks for hangs.
    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    /// Whether the agent exits once its ranks have ended.
    fn is_leaving(&self) -> bool {
        matches!(self.phase, Phase::Stopping(AfterDrain::Exit(_)))
    }

    /// Whether ranks are leaving a round, to join the next one or to exit.
    pub fn is_regrouping(&self) -> bool {
        matches!(self.phase, Phase::Stopping(AfterDrain::Await | AfterDrain::Rejoin))
            && !self.alive.is_subset(&self.parked)
    }

    /// Applies an event at time `now` and returns the actions that follow, in order.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        if matches!(self.phase, Phase::Done) {
            return Vec::new();
        }
        let mut actions = match event {
            Event::Coordinator(message) => self.coordinator(now, message),
            // This agent leaves the job anyway, so a lost coordinator only ends the wait of its
            // ranks for those of other nodes (AG-8).
            Event::CoordinatorLost(reason) | Event::ReconnectFailed(reason) if self.is_leaving() => {
                self.leave_now(&reason)
            }
            Event::CoordinatorLost(reason) if self.config.reconnect_timeout.is_some() => {
                self.lost(now, &reason)
            }
            Event::CoordinatorLost(reason) | Event::ReconnectFailed(reason) => {
                let mut actions = vec![Action::Notify(reason.clone())];
                actions.extend(self.stop(now, AfterDrain::Exit(None), StopRequest::Broken(reason)));
                actions
            }
            Event::Reconnected => {
                self.connected = true;
                let join = matches!(self.phase, Phase::Joining).then_some(ToCoordinator::Join);
                self.pending_failure.clone().into_iter().chain(join).map(Action::Send).collect()
            }
            Event::Exited { local_rank, exit, failed_at } => self.exited(now, local_rank, exit, failed_at),
            Event::Survivor(local_rank) => {
                self.survivors.insert(local_rank);
                Vec::new()
            }
            Event::Parked { local_rank, round } => {
                if round == self.round && self.alive.contains(&local_rank) {
                    self.parked.insert(local_rank);
                }
                Vec::new()
            }
            Event::FirstStep { round } => {
                self.progressed |= round == self.round;
                Vec::new()
            }
            Event::RoundLost { local_rank, round, reason } => {
                self.round_lost(now, local_rank, round, &reason)
            }
            Event::Hung { local_rank, reason } => self.hung(now, local_rank, reason),
            Event::Stop { notice: Some(notice), together, .. } => self.preempted(now, &notice, together),
            Event::Stop { signal, save, together, notice: None } => self.signal(now, signal, save, together),
            Event::RankTerminated { local_rank, together } => self.rank_terminated(now, local_rank, together),
            Event::Abort(_) if self.is_held(now) => self.give_up(),
            Event::Abort(signal) => self.abort(now, signal),
            Event::Forward(signal) if self.alive.is_empty() => {
                vec![Action::Notify(format!("no rank runs that {} could be passed on to", name_of(signal)))]
            }
            Event::Forward(signal) => vec![Action::Forward(signal)],
            Event::Tick => self.tick(now),
        };
        actions.extend(self.finish_drain());
        actions
    }

    fn coordinator(&mut self, now: Duration, message: ToAgent) -> Vec<Action> {
        match (message, &self.phase) {
            (ToAgent::RoundStarted(round), Phase::Joining) => {
                let survivors =
                    std::mem::replace(&mut self.alive, (0..self.config.local_world_size).collect());
                self.survivors.retain(|local_rank| survivors.contains(local_rank));
                self.parked.clear();
                (self.graceful, self.progressed) = (false, false);
                self.started = now;
                self.ends.clear();
                (self.pending_failure, self.last_round_broken) = (None, None);
                self.round = round.number;
                self.phase = Phase::Running;
                vec![Action::Spawn(round)]
            }
            (ToAgent::RoundBroken { round, reason, graceful }, phase)
                if !matches!(phase, Phase::Stopping(AfterDrain::Exit(_))) =>
            {
                let runs =
                    matches!(phase, Phase::Running | Phase::Finished | Phase::Stopping(AfterDrain::Await))
                        || (self.graceful && !graceful);
                // The coordinator may repeat a message on the next connection; its reason is
                // printed once.
                let received = Some((round, reason.clone()));
                let is_new = self.last_round_broken != received;
                let mut actions: Vec<_> =
                    is_new.then(|| Action::Notify(reason.clone())).into_iter().collect();
                self.last_round_broken = received;
                if runs && round == self.round {
                    let graceful = graceful && self.alive.is_subset(&self.survivors);
                    let request = if graceful { StopRequest::Regroup } else { StopRequest::Broken(reason) };
                    actions.extend(self.stop(now, AfterDrain::Rejoin, request));
                }
                actions
            }
            (ToAgent::RoundBroken { round, reason, .. }, _) if round == self.round => self.leave_now(&reason),
            (ToAgent::Waiting { reason, .. }, Phase::Joining) => vec![Action::Notify(reason)],
            (ToAgent::Closed { success: true, .. }, Phase::Joining) => {
                self.phase = Phase::Stopping(AfterDrain::Exit(Some(ExitCode::Success)));
                Vec::new()
            }
            (ToAgent::Closed { success: true, .. }, Phase::Finished) => self.stop(
                now,
                AfterDrain::Exit(Some(ExitCode::Success)),
                StopRequest::Broken("all is done".into()),
            ),
            (ToAgent::Closed { reason, no_restart, preempted, .. }, _) => {
                self.over(now, &reason, no_restart, preempted)
            }
            (ToAgent::Refused { reason }, _) => self.over(now, &reason, None, false),
            _ => Vec::new(),
        }
    }

    /// Ends the round and looks for a coordinator. The lost coordinator's decision about the round
    /// can no longer be received; the next round may be another coordinator's.
    fn lost(&mut self, now: Duration, reason: &str) -> Vec<Action> {
        self.connected = false;
        let limit = self.config.reconnect_timeout.unwrap_or_default();
        let reason = format!("{reason}; looking for it again for up to {limit:?}");
        let mut actions = vec![Action::Notify(reason.clone()), Action::Reconnect];
        if !matches!(self.phase, Phase::Joining) {
            actions.extend(self.stop(now, AfterDrain::Rejoin, StopRequest::Broken(reason)));
        }
        actions
    }

    /// Stops the ranks because the coordinator closed the job or refused this node, and explains
    /// why no restart follows.
    fn over(
        &mut self,
        now: Duration,
        reason: &str,
        no_restart: Option<String>,
        preempted: bool,
    ) -> Vec<Action> {
        if self.is_leaving() {
            return self.leave_now(reason);
        }
        // If a rank failed here, the report of the failure says what ended the job.
        let what = (!self.failed()).then(|| format!("the job is over: {reason}"));
        let could_stay = self.failed() && !self.config.may_restart && !self.survivors.is_empty();
        let hint = || {
            "without --max-restarts a failure ends the job; with it, surviving ranks continue from memory"
                .into()
        };
        let why = no_restart.or_else(|| could_stay.then(hint)).map(|why| format!("no restart: {why}"));
        let said = [what, why].into_iter().flatten().collect::<Vec<_>>().join("; ");
        let mut actions = Vec::new();
        if !said.is_empty() {
            actions.push(Action::Notify(said));
        }
        let code = preempted.then_some(ExitCode::Requeue(self.config.requeue_exit_code));
        actions.extend(self.stop(now, AfterDrain::Exit(code), StopRequest::Broken(reason.to_owned())));
        actions
    }

    /// Records the end of a rank, and decides whether it is a success, a failure or the answer to a
    /// request to end.
    fn exited(
        &mut self,
        now: Duration,
        local_rank: u32,
        exit: Exit,
        failed_at: Option<Duration>,
    ) -> Vec<Action> {
        if !self.alive.remove(&local_rank) {
            return Vec::new();
        }
        self.survivors.remove(&local_rank);
        self.parked.remove(&local_rank);
        let success = exit.is_success();
        let asked = matches!(self.phase, Phase::Stopping(_)) && !self.graceful;
        // A rank that was asked to end is the cause of the failure only if it had failed before.
        // `Duration::MAX` sorts all other such ends behind every failure.
        let at = failed_at.unwrap_or(if asked { Duration::MAX } else { now });
        let what = format!("local rank {local_rank}: {exit}");
        let fatal_reason = self.fatal_reason(&exit);
        self.ends.push(End { local_rank, exit, asked, at });
        if self.graceful && !success {
            return self.fail(now, what, fatal_reason);
        }
        if !self.is_running() {
            // The ranks of a node that leaves end together. Once one of them has succeeded, their
            // common work (a checkpoint) is done and the node leaves. Once one has failed, the work
            // cannot be completed.
            return match success {
                true => self.leave.take().map(Action::Send).into_iter().collect(),
                false => self.leave_now(&what),
            };
        }
        if success {
            if !self.alive.is_empty() {
                return Vec::new();
            }
            self.phase = Phase::Finished;
            return vec![Action::Send(ToCoordinator::Finished { round: self.round })];
        }
        self.fail(now, what, fatal_reason)
    }

    fn hung(&mut self, now: Duration, local_rank: u32, reason: String) -> Vec<Action> {
        let is_known = |end: &End| end.local_rank == local_rank && matches!(end.exit, Exit::Hung(_));
        if !self.alive.contains(&local_rank) || self.ends.iter().any(is_known) {
            return Vec::new();
        }
        let what = format!("local rank {local_rank} hangs: {reason}");
        if self.is_regrouping() {
            return vec![Action::Notify(what), Action::TerminateRank(local_rank)];
        }
        if !self.is_running() {
            return Vec::new();
        }
        // The rank has not ended yet. Its hang is the cause of all ends that follow, so
        // `Duration::ZERO` puts it at the front of the report.
        self.ends.push(End { local_rank, exit: Exit::Hung(reason), asked: false, at: Duration::ZERO });
        let mut actions = vec![Action::Notify(what.clone())];
        actions.extend(self.fail(now, what, None));
        // A stopped or deadlocked rank does not react to a request, so this rank receives SIGTERM at
        // once.
        actions.push(Action::TerminateRank(local_rank));
        actions
    }

    /// Sends the delayed `Leave` and asks the ranks to end by themselves, because other ranks that
    /// they were to end together with are gone.
    fn leave_now(&mut self, reason: &str) -> Vec<Action> {
        let leave = self
            .leave
            .take()
            .map(|leave| [Action::Send(leave), Action::RequestStop(StopRequest::End(reason.into()))]);
        leave.into_iter().flatten().collect()
    }

    /// Reports a rank's broken process group as this rank's failure. If no other part of the job
    /// knows that the round is over, this report ends it.
    fn round_lost(&mut self, now: Duration, local_rank: u32, round: u64, reason: &str) -> Vec<Action> {
        if round != self.round || !self.alive.contains(&local_rank) || !(self.is_running() || self.graceful) {
            return Vec::new();
        }
        let what = format!("local rank {local_rank} has lost the others: {reason}");
        let mut actions = vec![Action::Notify(what.clone())];
        actions.extend(self.fail(now, what, None));
        actions
    }

    /// Reports a failure to the coordinator and stops the ranks until the coordinator has decided.
    fn fail(&mut self, now: Duration, reason: String, fatal_reason: Option<String>) -> Vec<Action> {
        let uptime = now.saturating_sub(self.started);
        // The coordinator counts failures right after a start separately. An attempt that applied a
        // step is not such a failure, however short it was.
        let uptime = if self.progressed { uptime.max(PROGRESS) } else { uptime };
        let request = StopRequest::Broken(reason.clone());
        let failed = ToCoordinator::Failed { round: self.round, reason, uptime, fatal_reason };
        self.pending_failure = Some(failed.clone());
        let mut actions = vec![Action::Send(failed)];
        actions.extend(self.stop(now, AfterDrain::Await, request));
        actions
    }

    /// Returns the reason why no restart can help, if there is one.
    fn fatal_reason(&self, exit: &Exit) -> Option<String> {
        match exit.status() {
            // A process that could not be started for lack of a resource (memory, processes) may
            // start after a restart.
            Exit::NotStarted { code: ExitCode::Failure, .. } => None,
            Exit::NotStarted { .. } => Some("the program cannot be started".into()),
            Exit::Code(code) => u8::try_from(*code)
                .ok()
                .filter(|code| self.config.fatal_exit_codes.contains(code))
                .map(|code| format!("exit code {code} is final (--fatal-exit-codes)")),
            _ => None,
        }
    }

    /// Answers a signal of the user or a scheduler: the first one ends the job in order, a later
    /// SIGINT or SIGQUIT kills the ranks. A later SIGTERM is only answered with the time that is
    /// left.
    fn signal(&mut self, now: Duration, signal: i32, save: bool, together: bool) -> Vec<Action> {
        if self.is_held(now) {
            return self.give_up();
        }
        if let Some(first) = self.signalled {
            return match ends_at_once(signal) {
                true if now.saturating_sub(first) < SIGNAL_DEBOUNCE => Vec::new(),
                true => self.abort(now, signal),
                false => self.asked_again(now, signal),
            };
        }
        (self.signalled, self.answered) = (Some(now), now);
        let reason = format!("told to stop by {}", name_of(signal));
        if self.preempted {
            // The sender of a notice sends a signal later. The stop that the notice started
            // continues.
            return vec![Action::Notify(format!("{reason}, as was noticed before"))];
        }
        let code = Exit::Signal(signal).code();
        self.end_ranks(now, reason, code, StopRequest::Stop(signal, save), together)
    }

    /// Answers a repeated SIGTERM without shortening the stop. Schedulers send SIGTERM as a notice
    /// and again at the end of the grace time, and job scripts pass their own on. A checkpoint that
    /// is being saved for the first signal must not be lost to the second.
    fn asked_again(&mut self, now: Duration, signal: i32) -> Vec<Action> {
        if now.saturating_sub(self.answered) < SIGNAL_DEBOUNCE {
            return Vec::new();
        }
        self.answered = now;
        let left = match self.kill_at {
            Some(at) => {
                let seconds = at.saturating_sub(now).as_secs_f64().ceil();
                format!("ranks have {seconds} s left (--shutdown-timeout), SIGINT kills them at once")
            }
            None => "the job is ending".into(),
        };
        vec![Action::Notify(format!("told to stop again by {}: {left}", name_of(signal)))]
    }

    /// Stops all ranks of this node, as if the agent had received the signal. SIGTERM went either
    /// to all processes of the job, this agent included, or to this rank alone. A rank that ended
    /// alone would make the checkpoint of the other ranks impossible.
    fn rank_terminated(&mut self, now: Duration, local_rank: u32, together: bool) -> Vec<Action> {
        if self.signalled.is_some() || self.preempted || self.is_leaving() {
            return Vec::new();
        }
        (self.signalled, self.answered) = (Some(now), now);
        let reason = format!("local rank {local_rank} was told to stop by {}", name_of(SIGTERM));
        let code = Exit::Signal(SIGTERM).code();
        self.end_ranks(now, reason, code, StopRequest::Stop(SIGTERM, true), together)
    }

    /// Whether ranks were killed long enough ago that they should have ended.
    fn is_held(&self, now: Duration) -> bool {
        self.killed.is_some_and(|killed| now.saturating_sub(killed) >= HELD)
    }

    /// Exits without the killed ranks that have not ended: they are frozen, or wait within the
    /// kernel. The user asked again, so the agent does not wait for them any longer (AG-1).
    fn give_up(&mut self) -> Vec<Action> {
        self.killed = None;
        let left = std::mem::take(&mut self.alive).len();
        let ranks = if left == 1 { "1 rank that was" } else { &format!("{left} ranks that were") };
        vec![
            Action::Notify(format!("told to stop again: ending without {ranks} killed and did not end")),
            Action::GiveUp,
        ]
    }

    /// Ends the ranks with a checkpoint after a notice of preemption. The job exits with the code
    /// for a requeue.
    fn preempted(&mut self, now: Duration, notice: &str, together: bool) -> Vec<Action> {
        if self.signalled.is_some() || std::mem::replace(&mut self.preempted, true) {
            return Vec::new();
        }
        let code = ExitCode::Requeue(self.config.requeue_exit_code);
        self.end_ranks(now, format!("preempted: {notice}"), code, StopRequest::Stop(SIGTERM, true), together)
    }

    /// Ends the ranks of this node, and then the agent.
    fn end_ranks(
        &mut self,
        now: Duration,
        reason: String,
        code: ExitCode,
        request: StopRequest,
        together: bool,
    ) -> Vec<Action> {
        self.leave = Some(ToCoordinator::Leave { reason: reason.clone(), preempted: self.preempted });
        let mut actions = vec![Action::Notify(reason)];
        // Ranks that end together with those of other nodes need them until then, so the
        // coordinator receives `Leave` later.
        if !together || self.alive.is_empty() || !self.is_running() {
            actions.extend(self.leave.take().map(Action::Send));
        }
        actions.extend(self.stop(now, AfterDrain::Exit(Some(code)), request));
        actions
    }

    /// Kills the ranks at once, and leaves without waiting for a checkpoint.
    fn abort(&mut self, now: Duration, signal: i32) -> Vec<Action> {
        let leave = match self.signalled.replace(now) {
            Some(_) => self.leave.take(),
            None => {
                // `stop` sets phase and exit code. Its request to the ranks is dropped: they are
                // killed.
                self.stop(
                    now,
                    AfterDrain::Exit(Some(Exit::Signal(signal).code())),
                    StopRequest::Stop(signal, false),
                );
                let reason = format!("told to stop by {}", name_of(signal));
                Some(ToCoordinator::Leave { reason, preempted: false })
            }
        };
        self.killed.get_or_insert(now);
        let mut actions = vec![Action::Notify("told to stop again: killing".into()), Action::Kill];
        actions.extend(leave.map(Action::Send));
        actions
    }

    /// Sends SIGTERM to or kills the ranks that are overdue (AG-4).
    fn tick(&mut self, now: Duration) -> Vec<Action> {
        let due = |at: Option<Duration>| at.is_some_and(|at| now >= at);
        let mut actions = Vec::new();
        if due(self.kill_at) {
            (self.terminate_at, self.kill_at) = (None, None);
            let what = "ranks did not end within the shutdown timeout: killing them";
            let kill = if self.is_leaving() { Action::Kill } else { Action::KillUnparked };
            if self.is_leaving() {
                self.killed.get_or_insert(now);
            }
            actions.extend([Action::Notify(what.into()), kill]);
        } else if due(self.terminate_at) {
            self.terminate_at = None;
            actions.push(Action::Terminate);
        }
        if !actions.is_empty() {
            actions.extend(self.leave.take().map(Action::Send));
        }
        actions
    }

    /// Moves to `Stopping`, and returns the request to the ranks that `request` leads to, if any.
    ///
    /// A second call while ranks already end usually repeats nothing. The exceptions are a graceful
    /// end of a round that becomes an abrupt one, and the end of the job (`AfterDrain::Exit`), which
    /// ranks that would wait for a next round must receive. A graceful end has no deadline: ranks
    /// take as long as their step does.
    fn stop(&mut self, now: Duration, then: AfterDrain, request: StopRequest) -> Vec<Action> {
        let already = matches!(self.phase, Phase::Stopping(_));
        let was_graceful = std::mem::take(&mut self.graceful);
        let was_leaving = self.is_leaving();
        let is_last = matches!(then, AfterDrain::Exit(_));
        self.phase = Phase::Stopping(then);
        if self.alive.is_empty() {
            return Vec::new();
        }
        let request = match request {
            StopRequest::Regroup => {
                // No deadline: ranks leave the round once their current step is done, however long
                // it takes.
                self.graceful = true;
                return vec![Action::RequestStop(StopRequest::Regroup)];
            }
            // Parked ranks wait for a round that will not come. All ranks therefore receive `End`
            // instead of a request to save.
            StopRequest::Stop(..) if !self.parked.is_empty() => StopRequest::End("told to stop".into()),
            StopRequest::Broken(reason) if is_last => StopRequest::End(reason),
            _ if already && !was_graceful && !is_last => return Vec::new(),
            request => request,
        };
        if already && (was_leaving || (is_last && self.survivors.is_empty() && !was_graceful)) {
            return Vec::new();
        }
        let timeout = self.config.shutdown_timeout;
        self.terminate_at = Some(now + timeout * 2 / 3);
        self.kill_at = Some(now + timeout);
        vec![Action::RequestStop(request)]
    }

    /// Continues once the last rank has ended or, if the agent is not leaving, has left the round.
    fn finish_drain(&mut self) -> Vec<Action> {
        let is_ready = self.alive.is_empty() || (!self.is_leaving() && self.alive.is_subset(&self.parked));
        if !is_ready {
            return Vec::new();
        }
        (self.terminate_at, self.kill_at) = (None, None);
        let then = match &self.phase {
            Phase::Stopping(then) if !matches!(then, AfterDrain::Await) => then.clone(),
            _ => return Vec::new(),
        };
        let failed = self.failed();
        let ends = self.ends();
        let cause = if failed { ends.first().map(|end| end.exit.code()) } else { None };
        let (next, last) = match then {
            AfterDrain::Exit(code) => {
                // If no rank of this node failed, the failure was elsewhere and has no exit code to
                // propagate.
                let code = code.or(cause).unwrap_or(ExitCode::Failure);
                (Phase::Done, Some(Action::Exit(code)))
            }
            AfterDrain::Await | AfterDrain::Rejoin => {
                (Phase::Joining, self.connected.then_some(Action::Send(ToCoordinator::Join)))
            }
        };
        self.phase = next;
        let report = failed.then_some(Action::Report(ends));
        report.into_iter().chain(last).collect()
    }

    /// Whether a rank of this attempt failed.
    fn failed(&self) -> bool {
        self.ends.iter().any(|end| !end.asked && !end.exit.is_success())
    }

    /// Takes the ends of this attempt, each rank once: failures in order of their time, then
    /// successes.
    fn ends(&mut self) -> Vec<End> {
        let mut ends = std::mem::take(&mut self.ends);
        ends.sort_by_key(|end| (end.exit.is_success(), end.at));
        let mut seen = BTreeSet::new();
        ends.retain(|end| seen.insert(end.local_rank));
        ends
    }
}

/// Whether a signal that follows the first one means "now". People send SIGINT and SIGQUIT;
/// schedulers repeat the other signals.
fn ends_at_once(signal: i32) -> bool {
    matches!(signal, SIGINT | SIGQUIT)
}

fn name_of(signal: i32) -> String {
    signal_name(signal).map_or_else(|| format!("signal {signal}"), ToOwned::to_owned)
}

#[cfg(test)]
mod tests;
