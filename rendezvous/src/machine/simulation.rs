//! The coordinator and model agents over a virtual network and a virtual clock, with faults. Agents talk to the coordinator over TCP, so
//! the network delays, and breaks connections that each end notices in its own time; within a connection messages keep their order.
//!
//! `ICE_SEED=<n>` replays the run of one seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

use ice_proto::rendezvous::{Hello, KeepAlive, RestartPolicy, Round, ToAgent, ToCoordinator};

use super::random::Random;
use super::{Action, Coordinator, Event, Peer, Settings, check_views};

const RUNS: u64 = 2000;
const LAST_CALL: u64 = 30_000;
/// Longest that an end takes to notice that its connection is broken.
const SILENCE: u64 = 15_000;
/// Longest that ranks take to end.
const STOP: u64 = 31_000;
const LATENCY: u64 = 300;

/// What an agent is doing.
#[derive(Debug, Clone, PartialEq)]
enum State {
    /// Not started, or gone for good.
    Down,
    Joining,
    /// Told that there is no place for it.
    Waiting,
    Running(Round),
    Stopping,
    Finished(Round),
    Done,
}

struct Agent {
    state: State,
    /// The connection, once it is open.
    peer: Option<Peer>,
    /// Counts its lives and its work, so that what was planned for an earlier one is dropped.
    epoch: u64,
    node_rank: Option<u32>,
}

#[derive(Debug)]
enum Happening {
    /// The agent starts and connects.
    Start(usize),
    ToHost(Peer, ToCoordinator),
    HostLoses(Peer),
    ToAgent(usize, Peer, ToAgent),
    AgentLoses(usize, Peer),
    /// The ranks of an agent end by themselves, well or not.
    RanksEnd {
        agent: usize,
        epoch: u64,
        well: bool,
    },
    /// The ranks of an agent have been stopped.
    Stopped {
        agent: usize,
        epoch: u64,
    },
    Fault,
    Tick,
}

struct World {
    random: Random,
    now: u64,
    sequence: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    planned: BTreeMap<u64, Happening>,
    coordinator: Coordinator,
    agents: Vec<Agent>,
    /// Whose connection it is, while it is whole.
    open: BTreeMap<Peer, usize>,
    /// Those that the host believes to be there.
    known: BTreeSet<Peer>,
    /// When the last message of a connection arrives, each way.
    arrivals: BTreeMap<(Peer, bool), u64>,
    next_peer: Peer,
    nnodes: (u32, u32),
    restarts: RestartPolicy,
    /// The members of the live round, as the host sees them.
    live: BTreeSet<Peer>,
    faults_until: u64,
    /// How long ranks take that do not fail.
    work: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        // Mostly few nodes, now and then hundreds.
        let count = if random.chance(2) { 100 + random.below(200) } else { 1 + random.below(8) };
        let most = 1 + random.below(count + 2);
        let fewest = 1 + random.below(most);
        let fixed = random.chance(30);
        let nnodes = (if fixed { most } else { fewest } as u32, most as u32);
        let restarts = RestartPolicy {
            max_restarts: random.below(4) as u32,
            window: None,
            backoff: Duration::from_millis(random.below(2000)),
            crash_loop: 0,
        };
        let ranked = fixed && random.chance(50);
        let agents = (0..count)
            .map(|number| Agent {
                state: State::Down,
                peer: None,
                epoch: 0,
                node_rank: (ranked && number < most).then_some(number as u32),
            })
            .collect();
        let settings = Settings {
            run_id: "job".into(),
            join_timeout: Duration::from_secs(600),
            last_call: Duration::from_millis(LAST_CALL),
            run_stamp: "stamp".into(),
        };
        let mut world = Self {
            random,
            now: 0,
            sequence: 0,
            queue: BinaryHeap::new(),
            planned: BTreeMap::new(),
            coordinator: Coordinator::new(settings),
            agents,
            open: BTreeMap::new(),
            known: BTreeSet::new(),
            arrivals: BTreeMap::new(),
            next_peer: 0,
            nnodes,
            restarts,
            live: BTreeSet::new(),
            faults_until: 300_000,
            work: 0,
        };
        // Most jobs are still running when the faults are over.
        world.work = if world.random.chance(30) { 60_000 } else { 500_000 };
        for agent in 0..world.agents.len() {
            let at =
                if world.random.chance(80) { world.random.below(5000) } else { world.random.below(200_000) };
            world.plan(at, Happening::Start(agent));
        }
        for _ in 0..world.random.below(12) {
            let at = world.random.below(world.faults_until);
            world.plan(at, Happening::Fault);
        }
        world
    }

    fn plan(&mut self, at: u64, happening: Happening) {
        self.sequence += 1;
        self.queue.push(Reverse((at, self.sequence)));
        self.planned.insert(self.sequence, happening);
    }

    /// Runs to the end of all that is planned, or until this time.
    fn run(&mut self, until: u64) {
        while let Some(Reverse((at, sequence))) = self.queue.peek().copied() {
            if at > until {
                break;
            }
            self.queue.pop();
            self.now = at;
            if let Some(happening) = self.planned.remove(&sequence) {
                self.happen(happening);
            }
        }
        self.now = until;
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Start(agent) => self.start(agent),
            Happening::ToHost(peer, message) => self.host(Event::Message(peer, message)),
            Happening::HostLoses(peer) => {
                self.known.remove(&peer);
                self.live.remove(&peer);
                self.host(Event::Lost(peer));
            }
            Happening::ToAgent(agent, peer, message) => {
                if self.open.get(&peer) == Some(&agent) && self.agents[agent].peer == Some(peer) {
                    self.hear(agent, message);
                }
            }
            // As the real one, it stops its ranks and leaves; what started it may start it again.
            Happening::AgentLoses(agent, peer) if self.agents[agent].peer == Some(peer) => self.die(agent),
            Happening::AgentLoses(..) => {}
            Happening::RanksEnd { agent, epoch, well } => self.ranks_end(agent, epoch, well),
            Happening::Stopped { agent, epoch } => {
                if self.agents[agent].epoch == epoch && self.agents[agent].state == State::Stopping {
                    self.agents[agent].state = State::Joining;
                    self.say(agent, ToCoordinator::Join);
                }
            }
            Happening::Fault => self.fault(),
            Happening::Tick => {
                if self.coordinator.deadline().is_some_and(|due| millis(due) <= self.now) {
                    self.host(Event::Tick);
                }
            }
        }
    }

    fn start(&mut self, agent: usize) {
        if self.agents[agent].state != State::Down {
            return;
        }
        self.next_peer += 1;
        let peer = self.next_peer;
        self.agents[agent].peer = Some(peer);
        self.agents[agent].state = State::Joining;
        self.agents[agent].epoch += 1;
        self.open.insert(peer, agent);
        self.known.insert(peer);
        let hello = Hello {
            run_id: "job".into(),
            node_rank: self.agents[agent].node_rank,
            nnodes: self.nnodes,
            local_world_size: 1 + (agent as u32 % 3),
            restarts: self.restarts,
            host: format!("host{agent}"),
            keep_alive: KeepAlive::default(),
            agent: peer,
            run_stamp: None,
            place: None,
            addresses: Vec::new(),
            pid: peer as u32,
        };
        self.say(agent, ToCoordinator::Hello(hello));
        self.say(agent, ToCoordinator::Join);
    }

    /// Plans the arrival of a message, after all that went the same way before.
    fn arrival(&mut self, peer: Peer, to_host: bool) -> u64 {
        let at = self.now + 1 + self.random.below(LATENCY);
        let last = self.arrivals.entry((peer, to_host)).or_default();
        *last = at.max(*last);
        *last
    }

    fn say(&mut self, agent: usize, message: ToCoordinator) {
        let Some(peer) = self.agents[agent].peer.filter(|peer| self.open.contains_key(peer)) else { return };
        let at = self.arrival(peer, true);
        self.plan(at, Happening::ToHost(peer, message));
    }

    /// Gives the coordinator an event, checks what it does, and plans what follows.
    fn host(&mut self, event: Event) {
        if let Event::Message(peer, _) = &event
            && !self.known.contains(peer)
        {
            return;
        }
        if let Event::Message(peer, ToCoordinator::Leave { .. }) = &event {
            self.known.remove(peer);
            self.live.remove(peer);
        }
        let was_closed = self.coordinator.is_closed();
        let before = self.live.clone();
        let actions = self.coordinator.handle(Duration::from_millis(self.now), event);
        let mut started: BTreeMap<Peer, Round> = BTreeMap::new();
        for action in actions {
            let Action::Send(peer, message) = action else { continue };
            match &message {
                ToAgent::RoundStarted(round) => _ = started.insert(peer, round.clone()),
                ToAgent::RoundBroken { .. } => _ = self.live.remove(&peer),
                ToAgent::Closed { .. } => _ = self.live.remove(&peer),
                ToAgent::Waiting { .. } | ToAgent::Refused { .. } | ToAgent::KeepAlive => {}
            }
            if let Some(agent) = self.open.get(&peer).copied() {
                let at = self.arrival(peer, false);
                self.plan(at, Happening::ToAgent(agent, peer, message));
            }
        }
        if !started.is_empty() {
            assert!(!was_closed, "RV-5");
            assert!(self.live.is_empty(), "RV-7: {:?} are still in the last round", self.live);
            self.check_round(&started, &before);
            self.live = started.into_keys().collect();
        }
        if let Some(due) = self.coordinator.deadline() {
            self.plan(millis(due).max(self.now), Happening::Tick);
        }
    }

    fn check_round(&self, started: &BTreeMap<Peer, Round>, before: &BTreeSet<Peer>) {
        let (fewest, most) = self.nnodes;
        assert!((fewest..=most).contains(&(started.len() as u32)), "RV-3: {} nodes", started.len());
        check_views(started.values()).unwrap();
        assert!(started.values().all(|round| round.restart_count <= self.restarts.max_restarts), "RV-4");
        let dropped = before.iter().find(|peer| self.known.contains(peer) && !started.contains_key(peer));
        assert_eq!(dropped, None, "RV-8");
    }

    fn hear(&mut self, agent: usize, message: ToAgent) {
        let state = &self.agents[agent].state;
        match message {
            ToAgent::RoundStarted(round) => {
                assert!(matches!(state, State::Joining | State::Waiting), "RV-7: agent {agent} is {state:?}");
                self.agents[agent].epoch += 1;
                self.agents[agent].state = State::Running(round);
                let epoch = self.agents[agent].epoch;
                let quiet = self.now >= self.faults_until;
                let well = quiet || !self.random.chance(15);
                let takes = if well { self.work } else { self.random.below(60_000) };
                let takes = takes + self.random.below(20_000);
                self.plan(self.now + takes, Happening::RanksEnd { agent, epoch, well });
            }
            ToAgent::RoundBroken { .. } => {
                if matches!(state, State::Running(_) | State::Stopping | State::Finished(_)) {
                    self.stop(agent);
                }
            }
            ToAgent::Closed { .. } | ToAgent::Refused { .. } => {
                self.agents[agent].state = State::Done;
                self.agents[agent].epoch += 1;
            }
            ToAgent::Waiting { .. } => self.agents[agent].state = State::Waiting,
            ToAgent::KeepAlive => {}
        }
    }

    fn stop(&mut self, agent: usize) {
        self.agents[agent].state = State::Stopping;
        self.agents[agent].epoch += 1;
        let epoch = self.agents[agent].epoch;
        let at = self.now + self.random.below(STOP);
        self.plan(at, Happening::Stopped { agent, epoch });
    }

    fn ranks_end(&mut self, agent: usize, epoch: u64, well: bool) {
        if self.agents[agent].epoch != epoch {
            return;
        }
        let State::Running(round) = self.agents[agent].state.clone() else { return };
        let number = round.number;
        if well {
            self.agents[agent].state = State::Finished(round);
            self.say(agent, ToCoordinator::Finished { round: number });
        } else {
            // It hears from the host what becomes of the round.
            let uptime = Duration::from_secs(20);
            let failed =
                ToCoordinator::Failed { round: number, reason: "a fault".into(), uptime, hopeless: None };
            self.say(agent, failed);
        }
    }

    fn die(&mut self, agent: usize) {
        self.agents[agent].epoch += 1;
        self.agents[agent].peer = None;
        self.agents[agent].state = State::Down;
        if self.random.chance(70) {
            let at = self.now + self.random.below(60_000);
            self.plan(at, Happening::Start(agent));
        }
    }

    /// Something happens to one of the agents.
    fn fault(&mut self) {
        let agent = self.random.below(self.agents.len() as u64) as usize;
        let Some(peer) = self.agents[agent].peer else { return };
        match self.random.below(4) {
            // Its process is killed; the host sees that at once, or when the machine is missed.
            0 | 1 => {
                self.cut(peer, Some(agent), false);
                self.die(agent);
            }
            // The network breaks between the two.
            2 => self.cut(peer, Some(agent), true),
            // The user stops it.
            _ => {
                self.say(agent, ToCoordinator::Leave { reason: "told to".into() });
                self.cut(peer, None, false);
                self.agents[agent].state = State::Done;
                self.agents[agent].epoch += 1;
            }
        }
    }

    /// Breaks a connection. What is on its way to the agent is lost; of what is on its way to the host a message may still arrive.
    fn cut(&mut self, peer: Peer, agent: Option<usize>, agent_notices: bool) {
        self.open.remove(&peer);
        let delay = if self.random.chance(50) { 0 } else { self.random.below(SILENCE) };
        let at = self.arrival(peer, true) + delay;
        self.arrivals.insert((peer, true), at);
        self.plan(at, Happening::HostLoses(peer));
        if let Some(agent) = agent.filter(|_| agent_notices) {
            let at = self.now + self.random.below(SILENCE);
            self.plan(at, Happening::AgentLoses(agent, peer));
        }
    }

    /// Once nothing changes any more, everybody who wants in is in.
    fn check_quiet(&self) {
        if self.coordinator.is_closed() {
            let ended = |agent: &Agent| matches!(agent.state, State::Done | State::Down);
            assert!(self.agents.iter().all(ended), "RV-6: not everybody heard of the end");
            return;
        }
        let here = self.agents.iter().filter(|agent| !matches!(agent.state, State::Done | State::Down));
        let (fewest, most) = self.nnodes;
        let there = here.clone().count();
        if there < fewest as usize {
            return;
        }
        let members =
            here.clone().filter(|agent| matches!(agent.state, State::Running(_) | State::Finished(_)));
        let in_round = members.count();
        assert_eq!(
            in_round,
            there.min(most as usize),
            "RV-9: {there} are there, {fewest} to {most} are wanted"
        );
        let waiting = here.filter(|agent| agent.state == State::Waiting).count();
        assert_eq!(in_round + waiting, there, "RV-6: somebody was told nothing");
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn simulate(seed: u64) {
    let mut world = World::new(seed);
    world.run(world.faults_until);
    // The last faults are noticed, ranks stopped, restarts made, the last call is over; nobody has finished a round begun then.
    world.faults_until = 0;
    world.run(300_000 + SILENCE + 60_000);
    let settled = world.now + STOP + LAST_CALL + 10 * LATENCY;
    world.run(settled);
    world.check_quiet();
    // With enough nodes the job ends.
    world.run(settled + 3_600_000);
    let closed = world.coordinator.is_closed();
    let left = world.agents.iter().any(|agent| !matches!(agent.state, State::Done | State::Down));
    assert!(closed || !left, "RV-6: the job never ended for somebody");
}

#[test]
fn invariants_hold_whatever_the_network_does() {
    let given = std::env::var("ICE_SEED").ok().map(|seed| seed.parse().unwrap());
    let seeds = given.map_or(0..RUNS, |seed| seed..seed + 1);
    for seed in seeds {
        let outcome = std::panic::catch_unwind(|| simulate(seed));
        assert!(outcome.is_ok(), "seed {seed} failed: ICE_SEED={seed} replays it");
    }
}
