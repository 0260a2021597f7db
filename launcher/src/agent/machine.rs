use std::collections::BTreeSet;
use std::time::Duration;

use ice_proto::exit::ExitCode;
use ice_proto::rendezvous::{ToAgent, ToCoordinator};

use super::events::{Action, Ask, End, Event, Rules, SIGINT, SIGQUIT, SIGTERM};
use super::exit::{Exit, signal_name};

/// For how long a round counts as having run at least, once a step was applied in it.
const PROGRESS: Duration = Duration::from_secs(60);
/// A signal that follows another one so soon is the same wish: schedulers signal a process, its group and its parent.
const ECHO: Duration = Duration::from_millis(250);
/// A process that was killed has ended sooner than this, unless the kernel holds it.
const HELD: Duration = Duration::from_secs(1);

#[derive(Debug, Clone)]
enum Phase {
    /// Waiting for a round to start.
    Joining,
    Running,
    /// All ranks ended well; waiting for the other nodes.
    Finished,
    /// Ranks are ending; what comes when the last one has.
    Stopping(Then),
    Done,
}

#[derive(Debug, Clone)]
enum Then {
    /// The coordinator has not said yet.
    Await,
    Rejoin,
    Exit(Option<ExitCode>),
}

/// The machine. See the module for its invariants.
pub(crate) struct Agent {
    rules: Rules,
    phase: Phase,
    /// Whether there is a coordinator to talk to.
    met: bool,
    /// The last round that started.
    round: u64,
    /// The report of a failure in it, until the next one starts. That it is over is no answer: it may be so for another reason.
    unanswered: Option<ToCoordinator>,
    /// Which round was over, and why, as the coordinator said last.
    heard: Option<(u64, String)>,
    alive: BTreeSet<u32>,
    /// Those of them that keep their state when the round ends.
    stays: BTreeSet<u32>,
    /// Those of these that have left the round.
    parked: BTreeSet<u32>,
    /// Whether the ranks end the round by themselves.
    gentle: bool,
    /// Whether a training step was applied in the round.
    progressed: bool,
    started: Duration,
    /// How ranks of this attempt have ended.
    ends: Vec<End>,
    /// When the user first wanted the job to end.
    signalled: Option<Duration>,
    /// When the last signal that asks for the end was answered.
    answered: Duration,
    /// When the ranks of an agent that leaves were killed.
    killed: Option<Duration>,
    /// Whether there was a notice before.
    preempted: bool,
    /// That this node leaves, where the coordinator is not to know yet.
    leave: Option<ToCoordinator>,
    terminate_at: Option<Duration>,
    kill_at: Option<Duration>,
}

impl Agent {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            phase: Phase::Joining,
            met: true,
            round: 0,
            unanswered: None,
            heard: None,
            alive: BTreeSet::new(),
            stays: BTreeSet::new(),
            parked: BTreeSet::new(),
            gentle: false,
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

    /// When time alone changes something.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.terminate_at.into_iter().chain(self.kill_at).min()
    }

    /// Whether the ranks are to be watched for a standstill.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    /// Whether the agent ends once its ranks have.
    fn is_leaving(&self) -> bool {
        matches!(self.phase, Phase::Stopping(Then::Exit(_)))
    }

    /// Whether ranks are on their way out of a round, into the next one or to their end.
    pub(crate) fn is_regrouping(&self) -> bool {
        matches!(self.phase, Phase::Stopping(Then::Await | Then::Rejoin))
            && !self.alive.is_subset(&self.parked)
    }

    pub(crate) fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        if matches!(self.phase, Phase::Done) {
            return Vec::new();
        }
        let mut actions = match event {
            Event::Coordinator(message) => self.coordinator(now, message),
            // It is how a job that this agent leaves anyway ends.
            Event::CoordinatorLost(reason) | Event::NotMet(reason) if self.is_leaving() => {
                self.alone(&reason)
            }
            Event::CoordinatorLost(reason) if self.rules.looks_again.is_some() => self.lost(now, &reason),
            Event::CoordinatorLost(reason) | Event::NotMet(reason) => {
                let mut actions = vec![Action::Say(reason.clone())];
                actions.extend(self.stop(now, Then::Exit(None), Ask::Broken(reason)));
                actions
            }
            Event::Met => {
                self.met = true;
                let join = matches!(self.phase, Phase::Joining).then_some(ToCoordinator::Join);
                self.unanswered.clone().into_iter().chain(join).map(Action::Send).collect()
            }
            Event::Exited { local_rank, exit, failed_at } => self.exited(now, local_rank, exit, failed_at),
            Event::Stays(local_rank) => {
                self.stays.insert(local_rank);
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
                vec![Action::Say(format!("no rank runs that {} could be passed on to", name_of(signal)))]
            }
            Event::Forward(signal) => vec![Action::Forward(signal)],
            Event::Tick => self.tick(now),
        };
        actions.extend(self.settle());
        actions
    }

    fn coordinator(&mut self, now: Duration, message: ToAgent) -> Vec<Action> {
        match (message, &self.phase) {
            (ToAgent::RoundStarted(round), Phase::Joining) => {
                let survivors =
                    std::mem::replace(&mut self.alive, (0..self.rules.local_world_size).collect());
                self.stays.retain(|local_rank| survivors.contains(local_rank));
                self.parked.clear();
                (self.gentle, self.progressed) = (false, false);
                self.started = now;
                self.ends.clear();
                (self.unanswered, self.heard) = (None, None);
                self.round = round.number;
                self.phase = Phase::Running;
                vec![Action::Spawn(round)]
            }
            (ToAgent::RoundBroken { round, reason, gentle }, phase)
                if !matches!(phase, Phase::Stopping(Then::Exit(_))) =>
            {
                let runs = matches!(phase, Phase::Running | Phase::Finished | Phase::Stopping(Then::Await))
                    || (self.gentle && !gentle);
                // What was said on one connection may be said again on the next.
                let heard = Some((round, reason.clone()));
                let is_new = self.heard != heard;
                let mut actions: Vec<_> = is_new.then(|| Action::Say(reason.clone())).into_iter().collect();
                self.heard = heard;
                if runs && round == self.round {
                    let gentle = gentle && self.alive.is_subset(&self.stays);
                    let ask = if gentle { Ask::Regroup } else { Ask::Broken(reason) };
                    actions.extend(self.stop(now, Then::Rejoin, ask));
                }
                actions
            }
            (ToAgent::RoundBroken { round, reason, .. }, _) if round == self.round => self.alone(&reason),
            (ToAgent::Waiting { reason, .. }, Phase::Joining) => vec![Action::Say(reason)],
            (ToAgent::Closed { success: true, .. }, Phase::Joining) => {
                self.phase = Phase::Stopping(Then::Exit(Some(ExitCode::Success)));
                Vec::new()
            }
            (ToAgent::Closed { success: true, .. }, Phase::Finished) => {
                self.stop(now, Then::Exit(Some(ExitCode::Success)), Ask::Broken("all is done".into()))
            }
            (ToAgent::Closed { reason, no_restart, preempted, .. }, _) => {
                self.over(now, &reason, no_restart, preempted)
            }
            (ToAgent::Refused { reason }, _) => self.over(now, &reason, None, false),
            _ => Vec::new(),
        }
    }

    /// The round is over, since nobody knows what becomes of it; the next one is another coordinator's.
    fn lost(&mut self, now: Duration, reason: &str) -> Vec<Action> {
        self.met = false;
        let limit = self.rules.looks_again.unwrap_or_default();
        let reason = format!("{reason}; looking for it again for up to {limit:?}");
        let mut actions = vec![Action::Say(reason.clone()), Action::Meet];
        if !matches!(self.phase, Phase::Joining) {
            actions.extend(self.stop(now, Then::Rejoin, Ask::Broken(reason)));
        }
        actions
    }

    fn over(
        &mut self,
        now: Duration,
        reason: &str,
        no_restart: Option<String>,
        preempted: bool,
    ) -> Vec<Action> {
        if self.is_leaving() {
            return self.alone(reason);
        }
        // The report says what failed here.
        let what = (!self.failed()).then(|| format!("the job is over: {reason}"));
        let could_stay = self.failed() && !self.rules.may_restart && !self.stays.is_empty();
        let hint = || {
            "without --max-restarts a failure ends the job; with it, surviving ranks continue from memory"
                .into()
        };
        let why = no_restart.or_else(|| could_stay.then(hint)).map(|why| format!("no restart: {why}"));
        let said = [what, why].into_iter().flatten().collect::<Vec<_>>().join("; ");
        let mut actions = Vec::new();
        if !said.is_empty() {
            actions.push(Action::Say(said));
        }
        let code = preempted.then_some(ExitCode::Requeue(self.rules.requeue_exit_code));
        actions.extend(self.stop(now, Then::Exit(code), Ask::Broken(reason.to_owned())));
        actions
    }

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
        self.stays.remove(&local_rank);
        self.parked.remove(&local_rank);
        let success = exit.is_success();
        let asked = matches!(self.phase, Phase::Stopping(_)) && !self.gentle;
        // One that was asked to end is a cause only where it had failed before.
        let at = failed_at.unwrap_or(if asked { Duration::MAX } else { now });
        let what = format!("local rank {local_rank}: {exit}");
        let hopeless = self.hopeless(&exit);
        self.ends.push(End { local_rank, exit, asked, at });
        if self.gentle && !success {
            return self.fail(now, what, hopeless);
        }
        if !self.is_running() {
            // What the ranks had to do together is done, or will not be.
            return match success {
                true => self.leave.take().map(Action::Send).into_iter().collect(),
                false => self.alone(&what),
            };
        }
        if success {
            if !self.alive.is_empty() {
                return Vec::new();
            }
            self.phase = Phase::Finished;
            return vec![Action::Send(ToCoordinator::Finished { round: self.round })];
        }
        self.fail(now, what, hopeless)
    }

    fn hung(&mut self, now: Duration, local_rank: u32, reason: String) -> Vec<Action> {
        let is_known = |end: &End| end.local_rank == local_rank && matches!(end.exit, Exit::Hung(_));
        if !self.alive.contains(&local_rank) || self.ends.iter().any(is_known) {
            return Vec::new();
        }
        let what = format!("local rank {local_rank} hangs: {reason}");
        if self.is_regrouping() {
            return vec![Action::Say(what), Action::TerminateRank(local_rank)];
        }
        if !self.is_running() {
            return Vec::new();
        }
        // It has not ended, but that it is behind is the cause of all ends that follow.
        self.ends.push(End { local_rank, exit: Exit::Hung(reason), asked: false, at: Duration::ZERO });
        let mut actions = vec![Action::Say(what.clone())];
        actions.extend(self.fail(now, what, None));
        // One that is stopped, or that waits for ever, is not asked in vain.
        actions.push(Action::TerminateRank(local_rank));
        actions
    }

    /// Others that the ranks of this node were to end together with are gone: they end by themselves.
    fn alone(&mut self, reason: &str) -> Vec<Action> {
        let leave =
            self.leave.take().map(|leave| [Action::Send(leave), Action::Ask(Ask::End(reason.into()))]);
        leave.into_iter().flatten().collect()
    }

    /// Where nobody else knows that the round is over, it is this rank's failure that ends it.
    fn round_lost(&mut self, now: Duration, local_rank: u32, round: u64, reason: &str) -> Vec<Action> {
        if round != self.round || !self.alive.contains(&local_rank) || !(self.is_running() || self.gentle) {
            return Vec::new();
        }
        let what = format!("local rank {local_rank} has lost the others: {reason}");
        let mut actions = vec![Action::Say(what.clone())];
        actions.extend(self.fail(now, what, None));
        actions
    }

    fn fail(&mut self, now: Duration, reason: String, hopeless: Option<String>) -> Vec<Action> {
        let uptime = now.saturating_sub(self.started);
        // What gets something done does not fail right at its start.
        let uptime = if self.progressed { uptime.max(PROGRESS) } else { uptime };
        let ask = Ask::Broken(reason.clone());
        let failed = ToCoordinator::Failed { round: self.round, reason, uptime, hopeless };
        self.unanswered = Some(failed.clone());
        let mut actions = vec![Action::Send(failed)];
        actions.extend(self.stop(now, Then::Await, ask));
        actions
    }

    fn hopeless(&self, exit: &Exit) -> Option<String> {
        match exit.status() {
            // A process for which there is no room now may find some after a restart.
            Exit::NotStarted { code: ExitCode::Failure, .. } => None,
            Exit::NotStarted { .. } => Some("the program cannot be started".into()),
            Exit::Code(code) => u8::try_from(*code)
                .ok()
                .filter(|code| self.rules.fatal_exit_codes.contains(code))
                .map(|code| format!("exit code {code} is final (--fatal-exit-codes)")),
            _ => None,
        }
    }

    fn signal(&mut self, now: Duration, signal: i32, save: bool, together: bool) -> Vec<Action> {
        if self.is_held(now) {
            return self.give_up();
        }
        if let Some(first) = self.signalled {
            return match ends_at_once(signal) {
                true if now.saturating_sub(first) < ECHO => Vec::new(),
                true => self.abort(now, signal),
                false => self.asked_again(now, signal),
            };
        }
        (self.signalled, self.answered) = (Some(now), now);
        let reason = format!("told to stop by {}", name_of(signal));
        if self.preempted {
            // Whoever gives notice sends a signal later, and what was begun then goes on.
            return vec![Action::Say(format!("{reason}, as was noticed before"))];
        }
        let code = Exit::Signal(signal).code();
        self.end_ranks(now, reason, code, Ask::Stop(signal, save), together)
    }

    /// Schedulers repeat SIGTERM: as a notice and at the end of the grace time, or because a job script passes
    /// its own on. A checkpoint that is being saved for the first one must not be lost to the second.
    fn asked_again(&mut self, now: Duration, signal: i32) -> Vec<Action> {
        if now.saturating_sub(self.answered) < ECHO {
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
        vec![Action::Say(format!("told to stop again by {}: {left}", name_of(signal)))]
    }

    /// The signal went to all processes of the job, this agent included, or to this rank alone. A
    /// rank that ended alone would take the others' checkpoint with it, so all of this node's end
    /// as if the agent had got the signal.
    fn rank_terminated(&mut self, now: Duration, local_rank: u32, together: bool) -> Vec<Action> {
        if self.signalled.is_some() || self.preempted || self.is_leaving() {
            return Vec::new();
        }
        (self.signalled, self.answered) = (Some(now), now);
        let reason = format!("local rank {local_rank} was told to stop by {}", name_of(SIGTERM));
        let code = Exit::Signal(SIGTERM).code();
        self.end_ranks(now, reason, code, Ask::Stop(SIGTERM, true), together)
    }

    /// Whether ranks were killed long enough ago to have ended.
    fn is_held(&self, now: Duration) -> bool {
        self.killed.is_some_and(|killed| now.saturating_sub(killed) >= HELD)
    }

    /// Killed ranks that do not end are frozen, or wait within the kernel. The user does not wait for them.
    fn give_up(&mut self) -> Vec<Action> {
        self.killed = None;
        let left = std::mem::take(&mut self.alive).len();
        let ranks = if left == 1 { "1 rank that was" } else { &format!("{left} ranks that were") };
        vec![
            Action::Say(format!("told to stop again: ending without {ranks} killed and did not end")),
            Action::GiveUp,
        ]
    }

    /// There is some time yet, and then there is none.
    fn preempted(&mut self, now: Duration, notice: &str, together: bool) -> Vec<Action> {
        if self.signalled.is_some() || std::mem::replace(&mut self.preempted, true) {
            return Vec::new();
        }
        let code = ExitCode::Requeue(self.rules.requeue_exit_code);
        self.end_ranks(now, format!("preempted: {notice}"), code, Ask::Stop(SIGTERM, true), together)
    }

    /// Ends the ranks of this node, and then the agent.
    fn end_ranks(
        &mut self,
        now: Duration,
        reason: String,
        code: ExitCode,
        ask: Ask,
        together: bool,
    ) -> Vec<Action> {
        self.leave = Some(ToCoordinator::Leave { reason: reason.clone(), preempted: self.preempted });
        let mut actions = vec![Action::Say(reason)];
        // Ranks that end together need those of the other nodes until then.
        if !together || self.alive.is_empty() || !self.is_running() {
            actions.extend(self.leave.take().map(Action::Send));
        }
        actions.extend(self.stop(now, Then::Exit(Some(code)), ask));
        actions
    }

    fn abort(&mut self, now: Duration, signal: i32) -> Vec<Action> {
        let leave = match self.signalled.replace(now) {
            Some(_) => self.leave.take(),
            None => {
                // They are not asked any more.
                self.stop(now, Then::Exit(Some(Exit::Signal(signal).code())), Ask::Stop(signal, false));
                let reason = format!("told to stop by {}", name_of(signal));
                Some(ToCoordinator::Leave { reason, preempted: false })
            }
        };
        self.killed.get_or_insert(now);
        let mut actions = vec![Action::Say("told to stop again: killing".into()), Action::Kill];
        actions.extend(leave.map(Action::Send));
        actions
    }

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
            actions.extend([Action::Say(what.into()), kill]);
        } else if due(self.terminate_at) {
            self.terminate_at = None;
            actions.push(Action::Terminate);
        }
        if !actions.is_empty() {
            actions.extend(self.leave.take().map(Action::Send));
        }
        actions
    }

    fn stop(&mut self, now: Duration, then: Then, ask: Ask) -> Vec<Action> {
        let already = matches!(self.phase, Phase::Stopping(_));
        let was_gentle = std::mem::take(&mut self.gentle);
        let was_leaving = self.is_leaving();
        let is_last = matches!(then, Then::Exit(_));
        self.phase = Phase::Stopping(then);
        if self.alive.is_empty() {
            return Vec::new();
        }
        let ask = match ask {
            Ask::Regroup => {
                // They take as long as their step does.
                self.gentle = true;
                return vec![Action::Ask(Ask::Regroup)];
            }
            // Those that wait for a round wait in vain now.
            Ask::Stop(..) if !self.parked.is_empty() => Ask::End("told to stop".into()),
            Ask::Broken(reason) if is_last => Ask::End(reason),
            _ if already && !was_gentle && !is_last => return Vec::new(),
            ask => ask,
        };
        if already && (was_leaving || (is_last && self.stays.is_empty() && !was_gentle)) {
            return Vec::new();
        }
        let timeout = self.rules.shutdown_timeout;
        self.terminate_at = Some(now + timeout * 2 / 3);
        self.kill_at = Some(now + timeout);
        vec![Action::Ask(ask)]
    }

    /// Goes on once the last rank has ended, or has left the round.
    fn settle(&mut self) -> Vec<Action> {
        let is_ready = self.alive.is_empty() || (!self.is_leaving() && self.alive.is_subset(&self.parked));
        if !is_ready {
            return Vec::new();
        }
        (self.terminate_at, self.kill_at) = (None, None);
        let then = match &self.phase {
            Phase::Stopping(then) if !matches!(then, Then::Await) => then.clone(),
            _ => return Vec::new(),
        };
        let failed = self.failed();
        let ends = self.ends();
        let cause = if failed { ends.first().map(|end| end.exit.code()) } else { None };
        let (next, last) = match then {
            Then::Exit(code) => {
                // A failure elsewhere has no code to pass on.
                let code = code.or(cause).unwrap_or(ExitCode::Failure);
                (Phase::Done, Some(Action::Exit(code)))
            }
            Then::Await | Then::Rejoin => {
                (Phase::Joining, self.met.then_some(Action::Send(ToCoordinator::Join)))
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

    /// How the ranks ended, each once, in order of their failures.
    fn ends(&mut self) -> Vec<End> {
        let mut ends = std::mem::take(&mut self.ends);
        ends.sort_by_key(|end| (end.exit.is_success(), end.at));
        let mut seen = BTreeSet::new();
        ends.retain(|end| seen.insert(end.local_rank));
        ends
    }
}

/// Whether a signal that follows the first one means "now". A person sends these; schedulers repeat the others.
fn ends_at_once(signal: i32) -> bool {
    matches!(signal, SIGINT | SIGQUIT)
}

fn name_of(signal: i32) -> String {
    signal_name(signal).map_or_else(|| format!("signal {signal}"), ToOwned::to_owned)
}
