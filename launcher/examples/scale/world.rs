//! A cluster in virtual time: the real coordinator, a real agent for each node, the network between
//! them, and the CPU time of the coordinator's one thread. There are no ranks: an agent's ranks
//! leave a round as soon as they are asked to.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::time::Duration;

use ice_proto::frame;
use ice_proto::rendezvous::{Hello, KeepAlive, RestartPolicy, Round, ToAgent, ToCoordinator};
use ice_rendezvous::coordinator::{Action, Coordinator, Event, Peer, Settings};

use crate::network::{Costs, Link, Network};
use ice_agent::{Exit, GroupConfig, WorkerGroup};
use ice_testing::Random;

pub(crate) const RANKS_PER_NODE: u32 = 8;
/// Number of connections that the kernel keeps until they are accepted, the same as the real
/// host's. The kernel drops further connections.
const BACKLOG: usize = 4096;
/// Time until the kernel's second attempt to connect. The time doubles with each attempt.
const RESEND: Duration = Duration::from_secs(1);
/// Time that an agent waits for its coordinator before it tries again, and the pause between two
/// attempts. The same values as in the rendezvous crate.
const ANSWER: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(100);
/// Limit for connections without a greeting. Beyond it, the oldest one is closed if it has existed
/// for `GRACE`. The same values as in the rendezvous crate.
const STRANGERS: usize = 1024;
const GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Config {
    pub(crate) seed: u64,
    pub(crate) nodes: u32,
    /// Whether a round may start with half of the nodes.
    pub(crate) elastic: bool,
    pub(crate) network: Network,
    pub(crate) costs: Costs,
}

/// An event at a time.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// The kernel of a node asks for a connection. `tries` counts earlier attempts.
    Connect {
        node: usize,
        tries: u32,
    },
    Accepted(Peer),
    /// The agent's time to wait for an answer is over.
    Impatient(Peer),
    /// An input arrives at the coordinator.
    Comes(Input),
    /// The coordinator's thread is idle.
    Works,
    /// A message of the coordinator arrives at an agent. The number is an index into
    /// `World::heard`.
    Heard(Peer, usize),
    Greeted(Peer),
    TurnedAway(Peer),
    /// Time to check whether a keep-alive is due.
    AgentAlive(Peer),
    HostAlive(Peer),
    Silence(Peer),
    Parked {
        node: usize,
        round: u64,
    },
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Input {
    Accept(Peer),
    Greet(Peer),
    /// A message of an agent. The number is an index into `World::said`.
    Said(Peer, usize),
    KeepAlive(Peer),
    Lost(Peer),
    Tick,
}

struct Connection {
    node: usize,
    /// Whether both ends know the connection.
    open: bool,
    heard: Duration,
    /// Time of the last message of the coordinator, and of the agent.
    host_said: Duration,
    agent_said: Duration,
    /// Arrival of the last message in each direction, because a stream keeps its order.
    to_host: Duration,
    to_agent: Duration,
}

struct Node {
    agent: WorkerGroup,
    /// Random id that the agent has drawn.
    id: u64,
    peer: Option<Peer>,
    /// Whether the node is silent: it sends no messages, and receives none.
    dead: bool,
    view: Option<Round>,
    knows: Duration,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trouble {
    /// Connection requests that the kernel dropped.
    pub(crate) dropped: u64,
    /// Connections that either end closed because it had waited too long.
    pub(crate) given_up: u64,
    /// Longest time that an input waited for the coordinator's thread.
    pub(crate) longest_wait: Duration,
}

pub(crate) struct World {
    config: Config,
    random: Random,
    pub(crate) now: Duration,
    events: BinaryHeap<Reverse<(Duration, u64, What)>>,
    count: u64,
    coordinator: Coordinator,
    /// Inputs that wait for the coordinator's thread, with their time of arrival.
    queue: VecDeque<(Duration, Input)>,
    to_accept: usize,
    is_working: bool,
    pub(crate) busy: Duration,
    tick: Option<Duration>,
    strangers: BTreeMap<Peer, Duration>,
    connections: Vec<Connection>,
    nodes: Vec<Node>,
    alive: usize,
    /// Number of the last round that started, and the number of nodes that have received it.
    started: (u64, usize),
    pub(crate) incoming: Link,
    pub(crate) outgoing: Link,
    said: Vec<Option<ToCoordinator>>,
    heard: Vec<Option<ToAgent>>,
    pub(crate) lost: Option<Duration>,
    pub(crate) trouble: Trouble,
}

impl World {
    /// Makes a cluster whose agents all start now.
    pub(crate) fn new(config: Config) -> Self {
        let settings = Settings {
            run_id: "scale".into(),
            join_timeout: Duration::from_secs(600),
            last_call: Duration::from_secs(30),
            run_stamp: "01010000_scale".into(),
        };
        let mut world = Self {
            config,
            random: Random::new(config.seed),
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            count: 0,
            coordinator: Coordinator::new(settings),
            queue: VecDeque::new(),
            to_accept: 0,
            is_working: false,
            busy: Duration::ZERO,
            tick: None,
            strangers: BTreeMap::new(),
            connections: Vec::new(),
            nodes: Vec::new(),
            alive: config.nodes as usize,
            started: (0, 0),
            incoming: Link::default(),
            outgoing: Link::default(),
            said: Vec::new(),
            heard: Vec::new(),
            lost: None,
            trouble: Trouble::default(),
        };
        for _ in 0..config.nodes {
            let node = world.new_node();
            world.nodes.push(node);
            world.connect(world.nodes.len() - 1, Duration::ZERO, 0);
        }
        world
    }

    fn new_node(&mut self) -> Node {
        let rules = GroupConfig {
            may_restart: true,
            local_world_size: RANKS_PER_NODE,
            shutdown_timeout: Duration::from_secs(30),
            fatal_exit_codes: BTreeSet::new(),
            reconnect_timeout: Some(Duration::from_secs(600)),
            requeue_exit_code: 75,
        };
        let (agent, id) = (WorkerGroup::new(rules), self.random.next());
        Node { agent, id, peer: None, dead: false, view: None, knows: Duration::ZERO }
    }

    /// Advances time until the condition holds or the limit is reached. Returns whether the
    /// condition holds.
    pub(crate) fn run(&mut self, limit: Duration, mut until: impl FnMut(&Self) -> bool) -> bool {
        let end = self.now + limit;
        while !until(self) {
            match self.events.peek() {
                Some(Reverse((at, _, _))) if *at <= end => {}
                _ => {
                    self.now = end;
                    return false;
                }
            }
            if let Some(Reverse((at, _, what))) = self.events.pop() {
                self.now = at;
                self.happens(what);
            }
        }
        true
    }

    /// Kills a rank. Its agent notices at once.
    pub(crate) fn kill_rank(&mut self, node: usize, local_rank: u32) {
        let exit = Exit::Signal(9);
        self.tell(node, ice_agent::Event::Exited { local_rank, exit, failed_at: None });
    }

    /// Makes a node silent without closing its connection.
    pub(crate) fn silence(&mut self, node: usize) {
        self.nodes[node].dead = true;
        self.alive -= 1;
    }

    /// Starts another agent in place of a silent one.
    pub(crate) fn replace(&mut self, node: usize) {
        self.nodes[node] = self.new_node();
        self.alive += 1;
        self.connect(node, Duration::ZERO, 0);
    }

    /// Returns the last round that each live node received.
    pub(crate) fn views(&self) -> impl Iterator<Item = Option<&Round>> {
        self.nodes.iter().filter(|node| !node.dead).map(|node| node.view.as_ref())
    }

    /// Whether all live nodes have started the ranks of this round.
    pub(crate) fn all_started(&self, round: u64) -> bool {
        self.started == (round, self.alive)
    }

    /// Returns the time at which the last live node received that a round is over.
    pub(crate) fn all_know(&self) -> Duration {
        let alive = self.nodes.iter().filter(|node| !node.dead);
        alive.map(|node| node.knows).max().unwrap_or_default()
    }

    fn at(&mut self, at: Duration, what: What) {
        self.count += 1;
        self.events.push(Reverse((at, self.count, what)));
    }

    fn one_way(&mut self) -> Duration {
        self.config.network.one_way(&mut self.random)
    }

    fn connect(&mut self, node: usize, after: Duration, tries: u32) {
        let at = self.now + after + self.one_way();
        self.at(at, What::Connect { node, tries });
    }
}

mod coordinator;
mod events;

impl World {
    fn hello(&self, node: usize) -> Hello {
        let most = self.config.nodes;
        let fewest = if self.config.elastic { most.div_ceil(2) } else { most };
        Hello {
            run_id: "scale".into(),
            node_rank: None,
            nnodes: (fewest, most),
            local_world_size: RANKS_PER_NODE,
            role: "default".into(),
            ranks_store: None,
            restarts: RestartPolicy {
                max_restarts: 100,
                window: None,
                backoff: Duration::ZERO,
                crash_loop: 0,
            },
            keep_alive: KeepAlive::default(),
            agent_id: self.nodes[node].id,
            run_stamp: None,
            last_node_rank: None,
            addresses: Vec::new(),
            host: format!("node{node}.cluster.example"),
            pid: 4711,
        }
    }
}

/// Returns the bytes of a message on its stream.
fn frame_len(message: &impl serde::Serialize) -> usize {
    frame::encode(message).map_or(0, |frame| frame.len())
}

/// Returns the interval of keep-alives of each end, and the silence after which the other end
/// counts as lost.
fn keep_alive() -> (Duration, Duration) {
    let KeepAlive { interval, attempts } = KeepAlive::default();
    (interval, interval * attempts)
}
