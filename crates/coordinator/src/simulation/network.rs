//! Connections between agents and coordinators, and the partitions that delay their bytes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ice_proto::rendezvous::{ToAgent, ToCoordinator};

use super::cluster::{Cluster, SimEvent};
use crate::{Event, Peer};

/// Maximum latency.
const LATENCY: u64 = 300;
/// Silence after which an end closes: a minimum, and a random addition.
const SILENCE: (u64, u64) = (10_000, 5000);

/// One of the two ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Agent,
    Server,
}

impl End {
    fn other(self) -> Self {
        match self {
            Self::Agent => Self::Server,
            Self::Server => Self::Agent,
        }
    }
}

/// An item of a connection's stream.
#[derive(Debug)]
pub(super) enum Item {
    ToServer(ToCoordinator),
    ToAgent(ToAgent),
    /// The sender has closed its end.
    Fin,
}

/// State of one end, and the items that are on their way to it.
#[derive(Debug)]
struct Side {
    open: bool,
    coming: VecDeque<Item>,
    /// Arrival time of the last item.
    last: u64,
    /// Number of arrivals that the cut network holds back.
    stalled: usize,
    /// Number of the silence that it is in; `None` while it hears the other end.
    deaf: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) agent: usize,
    /// Process of the agent that opened it.
    pub(super) incarnation: u64,
    pub(super) host: usize,
    pub(super) term: u64,
    /// Dropped by the network; neither end knows.
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

    fn host_at(&self, end: End) -> usize {
        match end {
            End::Agent => self.agent,
            End::Server => self.host,
        }
    }
}

/// A partition: no byte passes from one set of hosts to the other.
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
        self.connections.get(&peer).map(|connection| connection.host_at(end))
    }

    pub(super) fn reaches(&self, from: usize, to: usize) -> bool {
        let separates = |cut: &Cut| {
            (cut.from.contains(&from) && cut.to.contains(&to))
                || (cut.both_ways && cut.from.contains(&to) && cut.to.contains(&from))
        };
        from == to || self.cuts.is_empty() || !self.cuts.values().any(separates)
    }

    fn passes(&self, connection: &Connection, to: End) -> bool {
        !connection.broken && self.reaches(connection.host_at(to.other()), connection.host_at(to))
    }
}

impl Cluster {
    /// Returns the host of etcd.
    pub(super) fn etcd_host(&self) -> usize {
        self.agents.len()
    }

    /// Opens a connection; both ends know it at once.
    pub(super) fn open(&mut self, agent: usize, host: usize, term: u64) -> Peer {
        let peer = self.next_number();
        let side = || Side { open: true, coming: VecDeque::new(), last: 0, stalled: 0, deaf: None };
        let incarnation = self.agents[agent].incarnation;
        let sides = [side(), side()];
        let connection = Connection { agent, incarnation, host, term, broken: false, sides };
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
        self.schedule(at, SimEvent::Deliver { peer, to });
    }

    pub(super) fn deliver(&mut self, peer: Peer, to: End) {
        let Some(connection) = self.network.connections.get(&peer) else { return };
        let passes = self.network.passes(connection, to);
        let Some(connection) = self.network.connections.get_mut(&peer) else { return };
        let (agent, host, term) = (connection.agent, connection.host, connection.term);
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
            Item::ToServer(message) => {
                if self.agents[host].coordinates(term) {
                    self.trace(|| format!("agent {agent} said to {term}: {message:?}"));
                    self.feed(host, Event::Message(peer, message));
                }
            }
            Item::ToAgent(message) => self.receive(agent, message),
            Item::Fin => self.peer_closed(peer, to),
        }
    }

    /// An end learns that the other has closed.
    fn peer_closed(&mut self, peer: Peer, end: End) {
        let Some(connection) = self.network.connections.get(&peer) else { return };
        let (agent, host, term) = (connection.agent, connection.host, connection.term);
        self.close_end(peer, end);
        match end {
            End::Agent => self.connection_lost(agent),
            End::Server if self.agents[host].coordinates(term) => self.feed(host, Event::Lost(peer)),
            End::Server => {}
        }
    }

    /// Closes an end; the other receives [`Item::Fin`], if the network lets it through.
    pub(super) fn close_end(&mut self, peer: Peer, end: End) {
        let Some(connection) = self.network.connections.get_mut(&peer) else { return };
        if !std::mem::replace(&mut connection.side(end).open, false) {
            return;
        }
        let (host, term) = (connection.host, connection.term);
        if connection.is_open(end.other()) {
            self.send(peer, end.other(), Item::Fin);
        } else {
            self.network.connections.remove(&peer);
        }
        self.listen();
        if end == End::Server {
            self.resign_if_idle(host, term);
        }
    }

    pub(super) fn silence(&mut self, peer: Peer, end: End, stamp: u64) {
        let Some(connection) = self.network.connections.get_mut(&peer) else { return };
        let side = connection.side(end);
        if side.open && side.deaf == Some(stamp) {
            self.trace(|| format!("connection {peer}: nothing heard at its {end:?}"));
            self.peer_closed(peer, end);
        }
    }

    /// Updates which ends hear the other, after a change.
    pub(super) fn listen(&mut self) {
        let mut deaf = Vec::new();
        for (peer, connection) in &self.network.connections {
            for end in [End::Agent, End::Server] {
                let other = connection.host_at(end.other());
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
            let stamp = self.next_number();
            let Some(connection) = self.network.connections.get_mut(&peer) else { continue };
            connection.side(end).deaf = (!hears).then_some(stamp);
            let clock = self.agents[connection.host_at(end)].clock;
            if !hears {
                let (least, more) = SILENCE;
                let local = clock.local(self.now) + least + self.random.below(more);
                self.schedule(clock.real(local), SimEvent::Silence { peer, end, stamp });
            }
        }
    }

    /// Drops a connection without a notice to its ends.
    pub(super) fn break_connection(&mut self, peer: Peer) {
        if let Some(connection) = self.network.connections.get_mut(&peer) {
            connection.broken = true;
            self.listen();
        }
    }

    pub(super) fn cut(&mut self, from: BTreeSet<usize>, to: BTreeSet<usize>, both_ways: bool, lasts: u64) {
        let number = self.next_number();
        self.network.cuts.insert(number, Cut { from, to, both_ways });
        self.listen();
        self.schedule_in(lasts, 1, SimEvent::Heal { cut: number });
    }

    pub(super) fn heal(&mut self, cut: u64) {
        if self.network.cuts.remove(&cut).is_none() {
            return;
        }
        self.trace(|| "the network heals".into());
        let mut again = Vec::new();
        for (peer, connection) in &self.network.connections {
            for to in [End::Agent, End::Server] {
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
            (0..stalled).for_each(|_| self.schedule(at, SimEvent::Deliver { peer, to }));
        }
        self.listen();
        self.send_held();
    }

    pub(super) fn heal_all(&mut self) {
        let cuts: Vec<u64> = self.network.cuts.keys().copied().collect();
        cuts.into_iter().for_each(|cut| self.heal(cut));
    }

    /// Closes all ends of a host whose process is gone. The other ends receive [`Item::Fin`] unless
    /// the machine is gone, too.
    pub(super) fn close_all(&mut self, host: usize, silently: bool) {
        let peers: Vec<(Peer, End)> = (self.network.connections.iter())
            .flat_map(|(peer, connection)| {
                let ends = [End::Agent, End::Server];
                ends.into_iter().filter(|end| connection.host_at(*end) == host).map(|end| (*peer, end))
            })
            .collect();
        for (peer, end) in peers {
            if silently {
                let Some(connection) = self.network.connections.get_mut(&peer) else { continue };
                connection.side(end).open = false;
                connection.side(end.other()).coming.clear();
                connection.side(end.other()).stalled = 0;
            } else {
                self.close_end(peer, end);
            }
        }
        self.listen();
    }
}
