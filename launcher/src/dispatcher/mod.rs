//! The one event loop of the agent: signals, ends of ranks, links, the coordinator and timers become events of the pure agent
//! machine, and its actions become system calls. Nothing is decided here.

mod group;
mod link;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ice_proto::exit::ExitCode;
use ice_proto::link::Up;
use ice_proto::rendezvous::{Hello, ToAgent, ToCoordinator};
use ice_rendezvous::{Host, HostConfig, Session};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::agent::{Action, Agent, Event, Exit};
use crate::logs::Console;
use crate::report::ProgressLines;
use crate::supervise::Orphans;
use crate::{Error, LaunchPlan};
use group::Group;

/// How long nodes wait for each other; torchrun's default.
const JOIN_TIMEOUT: Duration = Duration::from_secs(600);
/// How long the host waits for the other agents to leave after the end.
const GOODBYE: Duration = Duration::from_secs(10);

/// What ranks do.
pub(crate) enum RankEvent {
    Exited(u32, Exit),
    Said(u32, Up),
}

/// Carries out a plan.
pub(crate) async fn run(plan: LaunchPlan) -> Result<ExitCode, Error> {
    let mut signals = Signals::new().map_err(Error::Runtime)?;
    let orphans = Orphans::adopt();
    let host = match plan.is_host() {
        true => Some(bind(&plan).await?),
        false => None,
    };
    let port = host.as_ref().map_or(plan.master_port, Host::port);
    let hello = Hello {
        run_id: plan.run_id.clone(),
        node_rank: plan.node_rank,
        nnodes: (plan.nnodes, plan.nnodes),
        local_world_size: u32::try_from(plan.devices.len()).unwrap_or(u32::MAX),
        max_restarts: plan.max_restarts,
        host: hostname(),
        pid: std::process::id(),
    };
    let session = tokio::select! {
        session = Session::connect(&plan.master_addr, port, hello, JOIN_TIMEOUT) => session?,
        number = signals.next() => return Ok(Exit::Signal(number).code()),
    };
    session.send(ToCoordinator::Join);
    let (console, written) = Console::open().map_err(Error::Runtime)?;
    let outcome = Dispatcher::new(&plan, port, session, console, &orphans).run(&mut signals).await;
    // After an error ranks may still live; their supervision has ended with the dispatcher.
    orphans.end();
    tokio::select! {
        () = written.wait() => {}
        // Nobody reads the console, and the user will not wait for it.
        _ = signals.next() => {}
    }
    if let Some(host) = host {
        let _ = tokio::time::timeout(GOODBYE, host.deserted()).await;
    }
    outcome
}

async fn bind(plan: &LaunchPlan) -> Result<Host, Error> {
    let name = (plan.master_addr.as_str(), plan.master_port);
    let fail = |source| Error::Resolve { host: plan.master_addr.clone(), source };
    let mut addresses = tokio::net::lookup_host(name).await.map_err(fail)?;
    let none = || std::io::Error::new(std::io::ErrorKind::NotFound, "no address");
    let address: SocketAddr = addresses.next().ok_or_else(none).map_err(fail)?;
    Ok(Host::bind(HostConfig { address, run_id: plan.run_id.clone(), join_timeout: JOIN_TIMEOUT }).await?)
}

pub(crate) fn hostname() -> String {
    nix::unistd::gethostname().map_or_else(|_| "?".into(), |name| name.to_string_lossy().into_owned())
}

/// The signals that stop the agent.
struct Signals([(i32, Signal); 4]);

impl Signals {
    fn new() -> std::io::Result<Self> {
        let listen = |kind: SignalKind| Ok::<_, std::io::Error>((kind.as_raw_value(), signal(kind)?));
        Ok(Self([
            listen(SignalKind::terminate())?,
            listen(SignalKind::interrupt())?,
            listen(SignalKind::hangup())?,
            listen(SignalKind::quit())?,
        ]))
    }

    async fn next(&mut self) -> i32 {
        let [(a, term), (b, int), (c, hup), (d, quit)] = &mut self.0;
        tokio::select! {
            _ = term.recv() => *a,
            _ = int.recv() => *b,
            _ = hup.recv() => *c,
            _ = quit.recv() => *d,
        }
    }
}

struct Dispatcher<'a> {
    agent: Agent,
    group: Group<'a>,
    console: Console,
    orphans: &'a Orphans,
    session: Option<Session>,
    events: mpsc::UnboundedReceiver<RankEvent>,
    progress: ProgressLines,
    start: Instant,
}

impl<'a> Dispatcher<'a> {
    fn new(
        plan: &'a LaunchPlan,
        port: u16,
        session: Session,
        console: Console,
        orphans: &'a Orphans,
    ) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        let local_world_size = u32::try_from(plan.devices.len()).unwrap_or(u32::MAX);
        Self {
            agent: Agent::new(local_world_size, plan.shutdown_timeout),
            group: Group::new(plan, port, console.clone(), sender),
            console,
            orphans,
            session: Some(session),
            events,
            progress: ProgressLines::new(plan.monitor_interval),
            start: Instant::now(),
        }
    }

    async fn run(mut self, signals: &mut Signals) -> Result<ExitCode, Error> {
        loop {
            let deadline = self.agent.deadline().map(|at| tokio::time::Instant::from_std(self.start + at));
            let event = tokio::select! {
                number = signals.next() => Event::Signal(number),
                message = receive(&mut self.session) => match message {
                    Ok(message) => Event::Coordinator(message),
                    Err(error) => {
                        self.session = None;
                        Event::CoordinatorLost(error.to_string())
                    }
                },
                Some(event) = self.events.recv() => match event {
                    RankEvent::Exited(local_rank, exit) => {
                        self.group.exited(local_rank);
                        Event::Exited { local_rank, exit }
                    }
                    RankEvent::Said(_, Up::Progress(progress)) => {
                        if let Some(line) = self.progress.due(&progress, Instant::now()) {
                            self.console.say_if_idle(&line);
                        }
                        continue;
                    }
                    RankEvent::Said(local_rank, message) => {
                        self.group.said(local_rank, message);
                        continue;
                    }
                },
                () = tokio::time::sleep_until(deadline.unwrap_or_else(tokio::time::Instant::now)),
                    if deadline.is_some() => Event::Tick,
            };
            if let Some(code) = self.handle(event).await? {
                if let Some(session) = self.session {
                    session.finish().await;
                }
                return Ok(code);
            }
        }
    }

    /// Carries out what an event leads to; the exit code once the agent is done.
    async fn handle(&mut self, event: Event) -> Result<Option<ExitCode>, Error> {
        tracing::debug!(?event, "event");
        for action in self.agent.handle(self.start.elapsed(), event) {
            tracing::debug!(?action, "action");
            match action {
                Action::Send(message) => {
                    if let Some(session) = &self.session {
                        session.send(message);
                    }
                }
                Action::Spawn(round) => {
                    // What the last attempt left behind must not meet the next one.
                    self.orphans.end();
                    self.group.spawn(round)?;
                }
                Action::Terminate => self.group.signal(nix::sys::signal::Signal::SIGTERM),
                Action::Kill => self.group.signal(nix::sys::signal::Signal::SIGKILL),
                Action::Report { local_rank, exit } => {
                    // No rank lives any more, and what they left behind may hold the pipes open.
                    self.orphans.end();
                    self.group.report(local_rank, exit).await;
                }
                Action::Say(text) => self.console.say(&format!("ice-launch: {text}\n")),
                Action::Exit(code) => {
                    self.group.finish(code == ExitCode::Success);
                    return Ok(Some(code));
                }
            }
        }
        Ok(None)
    }
}

async fn receive(session: &mut Option<Session>) -> Result<ToAgent, ice_rendezvous::Error> {
    match session {
        Some(session) => session.recv().await,
        None => std::future::pending().await,
    }
}
