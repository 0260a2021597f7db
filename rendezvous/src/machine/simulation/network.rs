//! Connections between agents and coordinators, and what keeps their bytes from arriving.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ice_proto::rendezvous::{ToAgent, ToCoordinator};

use super::world::{Happening, World};
use crate::machine::{Event, Peer};

/// Longest that bytes take.
const LATENCY: u64 = 300;
/// How long an end hears nothing before it gives up: the interval of what it should have heard, and all of it.
const SILENCE: (u64, u64) = (10_000, 5000);

/// One of the two ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Agent,
    Host,
}

impl End {
    fn other(self) -> Self {
        match self {
            Self::Agent => Self::Host,
            Self::Host => Self::Agent,
        }
    }
}

/// What goes over a connection.
#[derive(Debug)]
pub(super) enum Item {
    ToHost(ToCoordinator),
    ToAgent(ToAgent),
    /// The other end was closed.
    Fin,
}

/// What one end knows, and what is on its way to it.
#[derive(Debug)]
struct Side {
    open: bool,
    coming: VecDeque<Item>,
    /// When the last of it arrives.
    last: u64,
    /// How many arrivals wait for the network.
    stalled: usize,
    /// Since when it hears nothing: a number.
    deaf: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) agent: usize,
    /// Of the agent that opened it.
    pub(super) life: u64,
    pub(super) host: usize,
    pub(super) office: u64,
    /// It was dropped on its way, and neither end knows.
    broken: bool,
    sides: [Side; 2],
}

impl Connection {
    fn side(&mut self, end: End) -> &mut Side {
        &mut self.sides[end as usize]
    }

    pub(super) fn is_open(&self, end: End) -> bool {
        self.sides[end as usize].open
    }

    fn place(&self, end: End) -> usize {
        match end {
            End::Agent => self.agent,
            End::Host => self.host,
        }
    }
}

/// Nothing gets from the ones to the others.
#[derive(Debug)]
pub(super) struct Cut {
    from: BTreeSet<usize>,
    to: BTreeSet<usize>,
    both_ways: bool,
}

#[derive(Default)]
pub(super) struct Network {
    pub(super) connections: BTreeMap<Peer, Connection>,
    cuts: BTreeMap<u64, Cut>,
}

impl Network {
    pub(super) fn host_of(&self, peer: Peer, end: End) -> Option<usize> {
        self.connections.get(&peer).map(|connection| connection.place(end))
    }

    pub(super) fn reaches(&self, from: usize, to: usize) -> bool {
        let separates = |cut: &Cut| {
            (cut.from.contains(&from) && cut.to.contains(&to))
                || (cut.both_ways && cut.from.contains(&to) && cut.to.contains(&from))
        };
        from == to || self.cuts.is_empty() || !self.cuts.values().any(separates)
    }

    fn passes(&self, connection: &Connection, to: End) -> bool {
        !connection.broken && self.reaches(connection.place(to.other()), connection.place(to))
    }
}

impl World {
    /// Where etcd is.
    pub(super) fn etcd_host(&self) -> usize {
        self.agents.len()
    }

    /// Makes a connection; both ends know of it.
    pub(super) fn open(&mut self, agent: usize, host: usize, office: u64) -> Peer {
        let peer = self.number();
        let side = || Side { open: true, coming: VecDeque::new(), last: 0, stalled: 0, deaf: None };
        let life = self.agents[agent].life;
        let sides = [side(), side()];
        let connection = Connection { agent, life, host, office, broken: false, sides };
        self.network.connections.insert(peer, connection);
        self.listen();
        peer
    }

    pub(super) fn send(&mut self, peer: Peer, to: End, item: Item) {
        let at = self.now + 1 + self.random.below(LATENCY);
        let Some(connection) = self.network.connections.get_mut(&peer) else { return };
        let side = connection.side(to);
        side.last = at.max(side.last);
        side.coming.push_back(item);
        let at = side.last;
        self.plan(at, Happening::Deliver { peer, to });
    }

    pub(super) fn deliver(&mut self, peer: Peer, to: End) {
        let Some(connection) = self.network.connections.get(&peer) else { return };
        let passes = self.network.passes(connection, to);
        let Some(connection) = self.network.connections.get_mut(&peer) else { return };
        let (agent, host, office) = (connection.agent, connection.host, connection.office);
        let side = connection.side(to);
        if !side.open {
            side.coming.clear();
            return;
        }
        if !passes {
            side.stalled += 1;
            return;
        }
        let Some(item) = side.coming.pop_front() else { return };
        match item {
            Item::ToHost(message) => {
                if self.agents[host].is_office(office) {
                    self.tell(|| format!("agent {agent} said to {office}: {message:?}"));
                    self.feed(host, Event::Message(peer, message));
                }
            }
            Item::ToAgent(message) => self.hear(agent, message),
            Item::Fin => self.hung_up(peer, to),
        }
    }

    /// An end learns that the other is gone.
    fn hung_up(&mut self, peer: Peer, end: End) {
        let Some(connection) = self.network.connections.get(&peer) else { return };
        let (agent, host, office) = (connection.agent, connection.host, connection.office);
        self.hang_up(peer, end);
        match end {
            End::Agent => self.lost(agent),
            End::Host if self.agents[host].is_office(office) => self.feed(host, Event::Lost(peer)),
            End::Host => {}
        }
    }

    /// Closes an end; the other hears of it, if it can.
    pub(super) fn hang_up(&mut self, peer: Peer, end: End) {
        let Some(connection) = self.network.connections.get_mut(&peer) else { return };
        if !std::mem::replace(&mut connection.side(end).open, false) {
            return;
        }
        let (host, office) = (connection.host, connection.office);
        if connection.is_open(end.other()) {
            self.send(peer, end.other(), Item::Fin);
        } else {
            self.network.connections.remove(&peer);
        }
        self.listen();
        if end == End::Host {
            self.resign_if_deserted(host, office);
        }
    }

    pub(super) fn silence(&mut self, peer: Peer, end: End, stamp: u64) {
        let Some(connection) = self.network.connections.get_mut(&peer) else { return };
        let side = connection.side(end);
        if side.open && side.deaf == Some(stamp) {
            self.tell(|| format!("connection {peer}: nothing heard at its {end:?}"));
            self.hung_up(peer, end);
        }
    }

    /// Looks which ends hear the other, after something changed.
    pub(super) fn listen(&mut self) {
        let mut deaf = Vec::new();
        for (peer, connection) in &self.network.connections {
            for end in [End::Agent, End::Host] {
                let other = connection.place(end.other());
                let hears = self.network.passes(connection, end)
                    && connection.is_open(end.other())
                    && !self.agents[other].asleep;
                let side = &connection.sides[end as usize];
                if side.open && side.deaf.is_none() != hears {
                    deaf.push((*peer, end, hears));
                }
            }
        }
        for (peer, end, hears) in deaf {
            let stamp = self.number();
            let Some(connection) = self.network.connections.get_mut(&peer) else { continue };
            connection.side(end).deaf = (!hears).then_some(stamp);
            let clock = self.agents[connection.place(end)].clock;
            if !hears {
                let (least, more) = SILENCE;
                let local = clock.local(self.now) + least + self.random.below(more);
                self.plan(clock.real(local), Happening::Silence { peer, end, stamp });
            }
        }
    }

    /// A connection is dropped on its way.
    pub(super) fn break_connection(&mut self, peer: Peer) {
        if let Some(connection) = self.network.connections.get_mut(&peer) {
            connection.broken = true;
            self.listen();
        }
    }

    pub(super) fn cut(&mut self, from: BTreeSet<usize>, to: BTreeSet<usize>, both_ways: bool, lasts: u64) {
        let number = self.number();
        self.network.cuts.insert(number, Cut { from, to, both_ways });
        self.listen();
        self.plan_in(lasts, 1, Happening::Heal { cut: number });
    }

    pub(super) fn heal(&mut self, cut: u64) {
        if self.network.cuts.remove(&cut).is_none() {
            return;
        }
        self.tell(|| "the network heals".into());
        let mut again = Vec::new();
        for (peer, connection) in &self.network.connections {
            for to in [End::Agent, End::Host] {
                if self.network.passes(connection, to) {
                    again.push((*peer, to));
                }
            }
        }
        for (peer, to) in again {
            let at = self.now + 1 + self.random.below(LATENCY);
            let Some(connection) = self.network.connections.get_mut(&peer) else { continue };
            let side = connection.side(to);
            side.last = at.max(side.last);
            let (at, stalled) = (side.last, std::mem::take(&mut side.stalled));
            (0..stalled).for_each(|_| self.plan(at, Happening::Deliver { peer, to }));
        }
        self.listen();
        self.send_held();
    }

    pub(super) fn heal_all(&mut self) {
        let cuts: Vec<u64> = self.network.cuts.keys().copied().collect();
        cuts.into_iter().for_each(|cut| self.heal(cut));
    }

    /// All ends on a host are closed: its process is gone. The others hear of it unless the machine went with it.
    pub(super) fn close_all(&mut self, host: usize, silently: bool) {
        let peers: Vec<(Peer, End)> = (self.network.connections.iter())
            .flat_map(|(peer, connection)| {
                let ends = [End::Agent, End::Host];
                ends.into_iter().filter(|end| connection.place(*end) == host).map(|end| (*peer, end))
            })
            .collect();
        for (peer, end) in peers {
            if silently {
                let Some(connection) = self.network.connections.get_mut(&peer) else { continue };
                connection.side(end).open = false;
                connection.side(end.other()).coming.clear();
                connection.side(end.other()).stalled = 0;
            } else {
                self.hang_up(peer, end);
            }
        }
        self.listen();
    }
}
