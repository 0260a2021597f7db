use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use ice_proto::exit::ExitCode;
use ice_proto::rendezvous::{Round, ToAgent, ToCoordinator};

/// How a rank ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Exit {
    Code(i32),
    Signal(i32),
    /// It was never started.
    NotStarted {
        code: ExitCode,
        reason: String,
    },
}

impl Exit {
    fn is_success(&self) -> bool {
        *self == Self::Code(0)
    }

    pub(crate) fn code(&self) -> ExitCode {
        match self {
            Self::Code(code) => u8::try_from(*code).map_or(ExitCode::Failure, ExitCode::Rank),
            Self::Signal(signal) => u8::try_from(*signal).map_or(ExitCode::Failure, ExitCode::Signal),
            Self::NotStarted { code, .. } => *code,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => match signal_name(*signal) {
                Some(name) => write!(f, "killed by {name}"),
                None => write!(f, "killed by signal {signal}"),
            },
            Self::NotStarted { reason, .. } => write!(f, "not started: {reason}"),
        }
    }
}

/// Names of the signals that end programs, as on Linux.
fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        15 => "SIGTERM",
        _ => return None,
    })
}

#[derive(Debug, Clone)]
pub(crate) enum Event {
    Coordinator(ToAgent),
    CoordinatorLost(String),
    Exited { local_rank: u32, exit: Exit },
    Signal(i32),
    Tick,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Send(ToCoordinator),
    /// Start all ranks of this node.
    Spawn(Round),
    /// Ask all ranks that live to end.
    Terminate,
    /// End them now.
    Kill,
    /// Tell the user how the rank that failed first ended.
    Report {
        local_rank: u32,
        exit: Exit,
    },
    /// Tell the user a decision and its reason.
    Say(String),
    Exit(ExitCode),
}

#[derive(Debug, Clone)]
enum Phase {
    /// Waiting for a round to start.
    Joining,
    Running {
        round: u64,
    },
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
    Exit(ExitCode),
}

/// The machine. See the module for its invariants.
pub(crate) struct Agent {
    local_world_size: u32,
    shutdown_timeout: Duration,
    phase: Phase,
    alive: BTreeSet<u32>,
    failure: Option<(u32, Exit)>,
    signalled: bool,
    kill_at: Option<Duration>,
}

impl Agent {
    pub(crate) fn new(local_world_size: u32, shutdown_timeout: Duration) -> Self {
        Self {
            local_world_size,
            shutdown_timeout,
            phase: Phase::Joining,
            alive: BTreeSet::new(),
            failure: None,
            signalled: false,
            kill_at: None,
        }
    }

    /// When time alone changes something.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.kill_at
    }

    pub(crate) fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        if matches!(self.phase, Phase::Done) {
            return Vec::new();
        }
        let mut actions = match event {
            Event::Coordinator(message) => self.coordinator(now, message),
            // It is how a job that this agent leaves anyway ends.
            Event::CoordinatorLost(_) if matches!(self.phase, Phase::Stopping(Then::Exit(_))) => Vec::new(),
            Event::CoordinatorLost(reason) => {
                let mut actions = vec![Action::Say(reason)];
                actions.extend(self.stop(now, Then::Exit(self.failure_code())));
                actions
            }
            Event::Exited { local_rank, exit } => self.exited(now, local_rank, exit),
            Event::Signal(signal) => self.signal(now, signal),
            Event::Tick => self.tick(now),
        };
        actions.extend(self.settle());
        actions
    }

    fn coordinator(&mut self, now: Duration, message: ToAgent) -> Vec<Action> {
        match (message, &self.phase) {
            (ToAgent::RoundStarted(round), Phase::Joining) => {
                self.alive = (0..self.local_world_size).collect();
                self.failure = None;
                self.phase = Phase::Running { round: round.number };
                vec![Action::Spawn(round)]
            }
            (
                ToAgent::RoundBroken { reason, .. },
                Phase::Running { .. } | Phase::Finished | Phase::Stopping(Then::Await),
            ) => {
                let mut actions = vec![Action::Say(reason)];
                actions.extend(self.stop(now, Then::Rejoin));
                actions
            }
            (ToAgent::Closed { success: true, .. }, Phase::Finished) => {
                self.stop(now, Then::Exit(ExitCode::Success))
            }
            (ToAgent::Closed { reason, .. } | ToAgent::Refused { reason }, phase) => {
                if matches!(phase, Phase::Stopping(Then::Exit(_))) {
                    return Vec::new();
                }
                let code = self.failure_code();
                let mut actions = Vec::new();
                if self.failure.is_none() {
                    actions.push(Action::Say(format!("the job is over: {reason}")));
                }
                actions.extend(self.stop(now, Then::Exit(code)));
                actions
            }
            _ => Vec::new(),
        }
    }

    /// The code of the rank that failed first here; a failure elsewhere has none to pass on.
    fn failure_code(&self) -> ExitCode {
        self.failure.as_ref().map_or(ExitCode::Failure, |(_, exit)| exit.code())
    }

    fn exited(&mut self, now: Duration, local_rank: u32, exit: Exit) -> Vec<Action> {
        if !self.alive.remove(&local_rank) {
            return Vec::new();
        }
        let Phase::Running { round } = self.phase else { return Vec::new() };
        if exit.is_success() {
            if !self.alive.is_empty() {
                return Vec::new();
            }
            self.phase = Phase::Finished;
            return vec![Action::Send(ToCoordinator::Finished { round })];
        }
        let reason = format!("local rank {local_rank}: {exit}");
        self.failure = Some((local_rank, exit));
        let mut actions = vec![Action::Send(ToCoordinator::Failed { round, reason })];
        actions.extend(self.stop(now, Then::Await));
        actions
    }

    fn signal(&mut self, now: Duration, signal: i32) -> Vec<Action> {
        if self.signalled {
            return vec![Action::Say("told to stop again: killing".into()), Action::Kill];
        }
        self.signalled = true;
        let exit = Exit::Signal(signal);
        let name = signal_name(signal).map_or_else(|| signal.to_string(), ToOwned::to_owned);
        let reason = format!("told to stop by {name}");
        let mut actions =
            vec![Action::Send(ToCoordinator::Leave { reason: reason.clone() }), Action::Say(reason)];
        actions.extend(self.stop(now, Then::Exit(exit.code())));
        actions
    }

    fn tick(&mut self, now: Duration) -> Vec<Action> {
        if self.kill_at.is_none_or(|at| now < at) {
            return Vec::new();
        }
        self.kill_at = None;
        vec![Action::Say("ranks did not end within the shutdown timeout: killing them".into()), Action::Kill]
    }

    fn stop(&mut self, now: Duration, then: Then) -> Vec<Action> {
        let already = matches!(self.phase, Phase::Stopping(_));
        self.phase = Phase::Stopping(then);
        if self.alive.is_empty() || already {
            return Vec::new();
        }
        self.kill_at = Some(now + self.shutdown_timeout);
        vec![Action::Terminate]
    }

    /// Goes on once the last rank has ended.
    fn settle(&mut self) -> Vec<Action> {
        if !self.alive.is_empty() {
            return Vec::new();
        }
        self.kill_at = None;
        let Phase::Stopping(then) = &self.phase else { return Vec::new() };
        let (next, last) = match then {
            Then::Await => return Vec::new(),
            Then::Rejoin => (Phase::Joining, Action::Send(ToCoordinator::Join)),
            Then::Exit(code) => (Phase::Done, Action::Exit(*code)),
        };
        self.phase = next;
        let report = self.failure.take().map(|(local_rank, exit)| Action::Report { local_rank, exit });
        report.into_iter().chain([last]).collect()
    }
}
