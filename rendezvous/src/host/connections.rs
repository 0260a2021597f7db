//! Which connections a host keeps if it cannot keep all. Pure: time comes in, and the caller ends what is evicted.
//!
//! A connection begins as a stranger and becomes a rank's or an agent's once it has shown what it is. It is *idle* until it has asked
//! for something: the hello of an agent, a request of a rank other than a ping.
//!
//! - **C-1** All connections are at most `Limits::all`.
//! - **C-2** Ranks leave at least an eighth of all places to agents and an eighth to strangers; so an agent, which begins as a stranger,
//!   finds a place however many connections ranks have.
//! - **C-3** The connection that makes room is the oldest idle one of the address that has the most of its kind. So connections
//!   of one address do not keep those of another out, and idle ones keep none out.
//! - **C-4** A rank's or an agent's connection that has asked for something makes no room. If an address has no idle one, the newcomer goes.
//! - **C-5** The connections of ranks of one address are at most [`Limits::per_address`], which grows with the job.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// Strangers at a time; beyond them the oldest goes, once it has had the time that an honest one needs.
const STRANGERS: usize = 1024;
/// That time. All agents of a large job come at once, and are as many as there are nodes.
const GRACE: Duration = Duration::from_secs(2);
/// Strangers at a time, however new they are.
const MOST_STRANGERS: usize = 32 << 10;
/// Connections of ranks of one address, for each rank of the job: a process has one for each of its process groups.
const PER_RANK: usize = 1024;
/// The same if the job is small, or has not begun.
const PER_ADDRESS: usize = 4096;

/// Identifier of a connection; later ones are greater.
pub(super) type Id = u64;

/// What a connection has shown itself to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Stranger,
    Rank,
    Agent,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Stranger => "connections that had shown nothing",
            Self::Rank => "connections to the store",
            Self::Agent => "connections of agents",
        }
    }
}

/// How many connections there may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// All of them.
    pub(super) all: usize,
    /// Ranks of the job; 0 before its first round.
    pub(super) world_size: usize,
}

impl Limits {
    fn of(&self, kind: Kind) -> usize {
        match kind {
            Kind::Stranger => MOST_STRANGERS.min(self.all / 4),
            Kind::Rank => self.all - 2 * (self.all / 8),
            Kind::Agent => self.all / 2,
        }
    }

    fn per_address(&self) -> usize {
        PER_ADDRESS.max(PER_RANK.saturating_mul(self.world_size))
    }
}

#[derive(Debug)]
struct Connection<T> {
    address: IpAddr,
    kind: Kind,
    since: Instant,
    is_idle: bool,
    handle: T,
}

/// Connections of one kind and one address.
#[derive(Debug, Default)]
struct Group {
    idle: BTreeSet<Id>,
    busy: usize,
}

impl Group {
    fn count(&self) -> usize {
        self.idle.len() + self.busy
    }
}

/// A connection that has made room.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Evicted<T> {
    pub(super) handle: T,
    /// What to say of it, if this is the first, the tenth, the hundredth of its kind.
    pub(super) message: Option<String>,
}

/// All connections of a host. `T` ends one.
#[derive(Debug)]
pub(super) struct Connections<T> {
    limits: Limits,
    all: BTreeMap<Id, Connection<T>>,
    groups: HashMap<(Kind, IpAddr), Group>,
    counts: HashMap<Kind, usize>,
    evicted: HashMap<Kind, u64>,
}

impl<T> Connections<T> {
    pub(super) fn new(all: usize) -> Self {
        Self {
            limits: Limits { all, world_size: 0 },
            all: BTreeMap::new(),
            groups: HashMap::new(),
            counts: HashMap::new(),
            evicted: HashMap::new(),
        }
    }

    /// A round of so many ranks begins.
    pub(super) fn round(&mut self, world_size: usize) {
        self.limits.world_size = world_size;
    }

    pub(super) fn count(&self, kind: Kind) -> usize {
        self.counts.get(&kind).copied().unwrap_or_default()
    }

    /// A stranger has come. Returns what makes room for it, which may be itself.
    pub(super) fn add(&mut self, id: Id, address: IpAddr, handle: T, now: Instant) -> Vec<Evicted<T>> {
        let address = address.to_canonical();
        self.enter(id, Connection { address, kind: Kind::Stranger, since: now, is_idle: true, handle });
        let mut evicted = Vec::new();
        while self.count(Kind::Stranger) > STRANGERS
            && let Some(oldest) = self.victim(Kind::Stranger)
        {
            let is_new = self.all.get(&oldest).is_none_or(|stranger| now - stranger.since <= GRACE);
            if is_new && self.count(Kind::Stranger) <= self.limits.of(Kind::Stranger) {
                break;
            }
            evicted.extend(self.evict(oldest));
        }
        while self.count(Kind::Stranger) > self.limits.of(Kind::Stranger)
            && let Some(oldest) = self.victim(Kind::Stranger)
        {
            evicted.extend(self.evict(oldest));
        }
        while self.all.len() > self.limits.all {
            // C-2: if strangers have no more than their eighth, agents have more than theirs.
            let kind =
                if self.count(Kind::Stranger) > self.limits.all / 8 { Kind::Stranger } else { Kind::Agent };
            let victim = self.victim(kind).unwrap_or(id);
            evicted.extend(self.evict(victim));
        }
        evicted
    }

    /// A stranger has shown what it is. Returns what makes room for it, which may be itself.
    pub(super) fn becomes(&mut self, id: Id, kind: Kind) -> Vec<Evicted<T>> {
        let Some(mut connection) = self.leave(id) else { return Vec::new() };
        connection.kind = kind;
        let address = connection.address;
        self.enter(id, connection);
        let mut evicted = Vec::new();
        let of_address = self.groups.get(&(kind, address)).map_or(0, Group::count);
        if kind == Kind::Rank && of_address > self.limits.per_address() {
            let oldest = self.groups.get(&(kind, address)).and_then(|group| group.idle.first().copied());
            evicted.extend(self.evict(oldest.unwrap_or(id)));
        }
        while self.count(kind) > self.limits.of(kind) {
            let victim = self.victim(kind).unwrap_or(id);
            evicted.extend(self.evict(victim));
        }
        evicted
    }

    /// A connection has asked for something.
    pub(super) fn asked(&mut self, id: Id) {
        let Some(mut connection) = self.leave(id) else { return };
        connection.is_idle = false;
        self.enter(id, connection);
    }

    /// A connection has ended.
    pub(super) fn remove(&mut self, id: Id) {
        self.leave(id);
    }

    /// Descriptors are short. Returns a connection that makes room, if one is idle.
    pub(super) fn make_room(&mut self) -> Option<Evicted<T>> {
        let victim = [Kind::Stranger, Kind::Rank].into_iter().find_map(|kind| self.victim(kind))?;
        self.evict(victim)
    }

    /// C-3: the oldest idle connection of the address that has the most of a kind.
    fn victim(&self, kind: Kind) -> Option<Id> {
        let of_kind = self.groups.iter().filter(|((of, _), group)| *of == kind && !group.idle.is_empty());
        let largest =
            of_kind.max_by_key(|(_, group)| (group.count(), group.idle.first().copied().map(Reverse)));
        largest.and_then(|(_, group)| group.idle.first().copied())
    }

    fn evict(&mut self, id: Id) -> Option<Evicted<T>> {
        let Connection { address, kind, handle, .. } = self.leave(id)?;
        let evicted = self.evicted.entry(kind).or_default();
        *evicted += 1;
        let message = super::is_said(*evicted).then(|| {
            let left = self.groups.get(&(kind, address)).map_or(0, Group::count);
            format!(
                "{} ended to make room, {evicted} so far: the last one is of {address}, which keeps {left} of them; all \
                 connections are {} of at most {}",
                kind.name(),
                self.all.len(),
                self.limits.all
            )
        });
        Some(Evicted { handle, message })
    }

    fn enter(&mut self, id: Id, connection: Connection<T>) {
        let group = self.groups.entry((connection.kind, connection.address)).or_default();
        if connection.is_idle {
            group.idle.insert(id);
        } else {
            group.busy += 1;
        }
        *self.counts.entry(connection.kind).or_default() += 1;
        self.all.insert(id, connection);
    }

    fn leave(&mut self, id: Id) -> Option<Connection<T>> {
        let connection = self.all.remove(&id)?;
        let key = (connection.kind, connection.address);
        if let Some(group) = self.groups.get_mut(&key) {
            if !group.idle.remove(&id) {
                group.busy -= 1;
            }
            if group.count() == 0 {
                self.groups.remove(&key);
            }
        }
        if let Some(count) = self.counts.get_mut(&connection.kind) {
            *count -= 1;
        }
        Some(connection)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address(host: u8) -> IpAddr {
        [10, 0, 0, host].into()
    }

    /// Connections of strangers that come at once; the ids of those that are evicted.
    fn come(connections: &mut Connections<Id>, ids: std::ops::Range<Id>, host: u8, now: Instant) -> Vec<Id> {
        let evicted = ids.flat_map(|id| connections.add(id, address(host), id, now));
        evicted.map(|evicted| evicted.handle).collect()
    }

    #[test]
    fn many_may_come_at_once_and_the_oldest_go_when_more_come() {
        let mut connections = Connections::new(1 << 20);
        let start = Instant::now();
        let (many, most) = (STRANGERS as u64 * 3, MOST_STRANGERS as u64);
        assert_eq!(come(&mut connections, 0..many, 1, start), [0; 0]);
        // C-3: the newest ones stay.
        let evicted = come(&mut connections, many..many + 1, 1, start + GRACE * 2);
        assert_eq!(evicted, (0..=many - STRANGERS as u64).collect::<Vec<_>>());
        let evicted = come(&mut connections, many + 1..many + most + 9, 1, start + GRACE * 2);
        assert_eq!((evicted.len(), connections.count(Kind::Stranger)), (STRANGERS + 8, MOST_STRANGERS));
    }

    #[test]
    fn flood_of_one_address_evicts_no_stranger_of_another() {
        let mut connections = Connections::new(1 << 20);
        let now = Instant::now();
        come(&mut connections, 0..3, 1, now);
        let evicted = come(&mut connections, 3..MOST_STRANGERS as u64 * 2, 2, now);
        assert!(evicted.len() >= MOST_STRANGERS && !evicted.iter().any(|id| *id < 3), "{}", evicted.len());
    }

    #[test]
    fn idle_ranks_make_room_and_busy_ones_do_not() {
        let mut connections = Connections::new(80);
        let now = Instant::now();
        let mut next = 0;
        let mut rank = |connections: &mut Connections<Id>, host: u8, asks: bool| {
            next += 1;
            assert_eq!(connections.add(next, address(host), next, now), []);
            let evicted = connections.becomes(next, Kind::Rank);
            if asks {
                connections.asked(next);
            }
            (next, evicted.into_iter().map(|evicted| evicted.handle).collect::<Vec<_>>())
        };
        // C-2: three quarters for ranks.
        for _ in 0..20 {
            assert_eq!(rank(&mut connections, 1, true).1, [0; 0]);
        }
        let idle: Vec<_> = (0..40).map(|_| rank(&mut connections, 2, false).0).collect();
        assert_eq!(rank(&mut connections, 1, true).1, [idle[0]]);
        assert_eq!(rank(&mut connections, 3, false).1, [idle[1]]);
        // C-3: the flood displaces itself, and not the idle one of another address.
        assert_eq!(rank(&mut connections, 2, false).1, [idle[2]]);
        for _ in 0..38 {
            assert_eq!(rank(&mut connections, 4, true).1.len(), 1);
        }
        // C-4: no idle one is left but that of the third address; then newcomers go.
        let (_, evicted) = rank(&mut connections, 4, true);
        assert_eq!(evicted.len(), 1);
        let (newcomer, evicted) = rank(&mut connections, 4, false);
        assert_eq!(evicted, [newcomer]);
        // C-2: agents find places all the same.
        for id in 1000..1010 {
            assert_eq!(connections.add(id, address(2), id, now), []);
            assert_eq!(connections.becomes(id, Kind::Agent), []);
        }
    }

    #[test]
    fn address_has_a_limit_that_grows_with_the_job() {
        let mut connections = Connections::new(1 << 20);
        let now = Instant::now();
        let evicted = |connections: &mut Connections<Id>, ids: std::ops::Range<Id>| {
            let of = ids.map(|id| {
                connections.add(id, address(1), id, now);
                connections.becomes(id, Kind::Rank).len()
            });
            of.sum::<usize>()
        };
        let limit = PER_ADDRESS as u64;
        assert_eq!(evicted(&mut connections, 0..limit), 0);
        assert_eq!(evicted(&mut connections, limit..limit + 5), 5);
        connections.round(2 * PER_ADDRESS / PER_RANK);
        assert_eq!(evicted(&mut connections, limit + 5..2 * limit + 5), 0);
        assert_eq!(evicted(&mut connections, 2 * limit + 5..2 * limit + 7), 2);
    }

    #[test]
    fn evictions_are_said_at_powers_of_ten() {
        let mut connections = Connections::new(8);
        let now = Instant::now();
        let evicted = (0..200).flat_map(|id| connections.add(id, address(1), id, now));
        let said: Vec<_> = evicted.filter_map(|evicted| evicted.message).collect();
        assert_eq!(said.len(), 3);
        assert!(
            said[1].contains("shown nothing ended to make room, 10 so far") && said[1].contains("10.0.0.1")
        );
    }

    proptest! {
        #[test]
        fn limits_hold(
            all in 8_usize..64, steps in proptest::collection::vec((0_u8..5, 0_u64..40, 0_u8..4), 0..300),
        ) {
            let mut connections = Connections::new(all);
            let now = Instant::now();
            let mut busy = BTreeSet::new();
            let mut next = 0;
            for (step, which, host) in steps {
                let id = next.max(40) - 40 + which;
                let evicted = match step {
                    0 => {
                        next += 1;
                        connections.add(next, address(host), next, now)
                    }
                    1 => connections.becomes(id, Kind::Rank),
                    2 => connections.becomes(id, Kind::Agent),
                    3 => {
                        let is_known =
                            connections.all.get(&id).is_some_and(|connection| connection.kind != Kind::Stranger);
                        if is_known {
                            connections.asked(id);
                            busy.insert(id);
                        }
                        Vec::new()
                    }
                    _ => {
                        connections.remove(id);
                        busy.remove(&id);
                        Vec::new()
                    }
                };
                // C-4: the newcomer alone may have asked, if it changes its kind.
                for evicted in &evicted {
                    prop_assert!(!busy.contains(&evicted.handle) || evicted.handle == id);
                    busy.remove(&evicted.handle);
                }
                prop_assert!(connections.all.len() <= all, "C-1");
                let ranks = connections.count(Kind::Rank);
                prop_assert!(ranks <= all - 2 * (all / 8), "C-2");
                let groups: usize = connections.groups.values().map(Group::count).sum();
                prop_assert_eq!(groups, connections.all.len());
            }
        }
    }
}
