//! The connections that a server keeps if it cannot keep all. Pure: time is an argument, and the
//! caller closes evicted connections.
//!
//! A connection is pending until it has shown its protocol and, if it is an agent's, has
//! authenticated; then it is a rank's or an agent's. It is *idle* until its first message after
//! that: the hello of an agent, a request of a rank other than a ping.
//!
//! - **C-1** There are at most [`Limits::all`] connections.
//! - **C-2** Ranks leave at least an eighth of all connections to agents and an eighth to pending
//!   ones. So an agent, which begins as pending, is served however many connections ranks have.
//! - **C-3** The evicted connection is the oldest idle one of the address that has the most of its
//!   kind. So connections of one address do not block those of another, and idle ones block none.
//! - **C-4** A rank's or an agent's active connection is never evicted. If no connection is idle,
//!   the newcomer is evicted.
//! - **C-5** The ranks of one address have at most [`Limits::per_address`] connections, which grows
//!   with the job.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// Pending connections beyond which the oldest is evicted, once it is older than
/// [`MIN_PENDING_TIME`].
const PENDING_SOFT_LIMIT: usize = 1024;
/// Time that an honest peer needs for its first message. All agents of a large job connect at once.
const MIN_PENDING_TIME: Duration = Duration::from_secs(2);
/// Pending connections beyond which the oldest is evicted at any age.
const PENDING_HARD_LIMIT: usize = 32 << 10;
/// Maximum of connections of one address per rank of the job: a process has one for each of its
/// process groups.
const PER_RANK: usize = 1024;
/// Maximum of connections of one address in a small job, or before its first round.
const PER_ADDRESS: usize = 4096;

/// Identifier of a connection. Later connections have greater ones.
pub(super) type ConnectionId = u64;

/// The kind of a connection, by what it has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Pending,
    Rank,
    Agent,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Pending => "connections that had shown nothing",
            Self::Rank => "connections to the store",
            Self::Agent => "connections of agents",
        }
    }
}

/// Limits of the numbers of connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Maximum of all connections.
    pub(super) all: usize,
    /// Ranks of the job; 0 before its first round.
    pub(super) world_size: usize,
}

impl Limits {
    fn of(&self, kind: Kind) -> usize {
        match kind {
            Kind::Pending => PENDING_HARD_LIMIT.min(self.all / 4),
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

/// Connections of one kind and one address: the idle ones in order of age, the active ones as a
/// count.
#[derive(Debug, Default)]
struct AddressGroup {
    idle: BTreeSet<ConnectionId>,
    busy: usize,
}

impl AddressGroup {
    fn count(&self) -> usize {
        self.idle.len() + self.busy
    }
}

/// An evicted connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Evicted<T> {
    pub(super) handle: T,
    /// Warning to log, at the first, the tenth, the hundredth eviction of its kind.
    pub(super) message: Option<String>,
}

/// All connections of a server. `T` is a handle that closes one.
#[derive(Debug)]
pub(super) struct Connections<T> {
    limits: Limits,
    all: BTreeMap<ConnectionId, Connection<T>>,
    groups: HashMap<(Kind, IpAddr), AddressGroup>,
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

    /// Adapts the limits to a round of this many ranks.
    pub(super) fn set_world_size(&mut self, world_size: usize) {
        self.limits.world_size = world_size;
    }

    pub(super) fn count(&self, kind: Kind) -> usize {
        self.counts.get(&kind).copied().unwrap_or_default()
    }

    /// Adds a pending connection. Returns the evicted connections, which may include the new one.
    pub(super) fn add(
        &mut self,
        id: ConnectionId,
        address: IpAddr,
        handle: T,
        now: Instant,
    ) -> Vec<Evicted<T>> {
        let address = address.to_canonical();
        self.insert(id, Connection { address, kind: Kind::Pending, since: now, is_idle: true, handle });
        let mut evicted = Vec::new();
        while self.count(Kind::Pending) > PENDING_SOFT_LIMIT
            && let Some(oldest) = self.victim(Kind::Pending)
        {
            let is_new =
                self.all.get(&oldest).is_none_or(|stranger| now - stranger.since <= MIN_PENDING_TIME);
            if is_new && self.count(Kind::Pending) <= self.limits.of(Kind::Pending) {
                break;
            }
            evicted.extend(self.evict(oldest));
        }
        while self.count(Kind::Pending) > self.limits.of(Kind::Pending)
            && let Some(oldest) = self.victim(Kind::Pending)
        {
            evicted.extend(self.evict(oldest));
        }
        while self.all.len() > self.limits.all {
            // C-2: if pending connections have no more than their eighth, agents have more than
            // theirs.
            let kind =
                if self.count(Kind::Pending) > self.limits.all / 8 { Kind::Pending } else { Kind::Agent };
            let victim = self.victim(kind).unwrap_or(id);
            evicted.extend(self.evict(victim));
        }
        evicted
    }

    /// Changes the kind of a pending connection. Returns the evicted connections, which may include
    /// this one.
    pub(super) fn becomes(&mut self, id: ConnectionId, kind: Kind) -> Vec<Evicted<T>> {
        let Some(mut connection) = self.take(id) else { return Vec::new() };
        connection.kind = kind;
        let address = connection.address;
        self.insert(id, connection);
        let mut evicted = Vec::new();
        let of_address = self.groups.get(&(kind, address)).map_or(0, AddressGroup::count);
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

    /// Marks a connection as active.
    pub(super) fn mark_active(&mut self, id: ConnectionId) {
        let Some(mut connection) = self.take(id) else { return };
        connection.is_idle = false;
        self.insert(id, connection);
    }

    /// Removes a connection that has ended.
    pub(super) fn remove(&mut self, id: ConnectionId) {
        self.take(id);
    }

    /// Evicts an idle connection, if there is one, since file descriptors are short.
    pub(super) fn make_room(&mut self) -> Option<Evicted<T>> {
        let victim = [Kind::Pending, Kind::Rank].into_iter().find_map(|kind| self.victim(kind))?;
        self.evict(victim)
    }

    /// C-3: returns the oldest idle connection of the address that has the most of a kind.
    fn victim(&self, kind: Kind) -> Option<ConnectionId> {
        let of_kind = self.groups.iter().filter(|((of, _), group)| *of == kind && !group.idle.is_empty());
        let largest =
            of_kind.max_by_key(|(_, group)| (group.count(), group.idle.first().copied().map(Reverse)));
        largest.and_then(|(_, group)| group.idle.first().copied())
    }

    fn evict(&mut self, id: ConnectionId) -> Option<Evicted<T>> {
        let Connection { address, kind, handle, .. } = self.take(id)?;
        let evicted = self.evicted.entry(kind).or_default();
        *evicted += 1;
        let message = super::is_logged(*evicted).then(|| {
            let left = self.groups.get(&(kind, address)).map_or(0, AddressGroup::count);
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

    fn insert(&mut self, id: ConnectionId, connection: Connection<T>) {
        let group = self.groups.entry((connection.kind, connection.address)).or_default();
        if connection.is_idle {
            group.idle.insert(id);
        } else {
            group.busy += 1;
        }
        *self.counts.entry(connection.kind).or_default() += 1;
        self.all.insert(id, connection);
    }

    fn take(&mut self, id: ConnectionId) -> Option<Connection<T>> {
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

    /// Adds pending connections at one time. Returns the ids of the evicted ones.
    fn come(
        connections: &mut Connections<ConnectionId>,
        ids: std::ops::Range<ConnectionId>,
        host: u8,
        now: Instant,
    ) -> Vec<ConnectionId> {
        let evicted = ids.flat_map(|id| connections.add(id, address(host), id, now));
        evicted.map(|evicted| evicted.handle).collect()
    }

    #[test]
    fn burst_of_pending_connections_is_kept_and_the_oldest_are_evicted_later() {
        let mut connections = Connections::new(1 << 20);
        let start = Instant::now();
        let (many, most) = (PENDING_SOFT_LIMIT as u64 * 3, PENDING_HARD_LIMIT as u64);
        assert_eq!(come(&mut connections, 0..many, 1, start), [0; 0]);
        // C-3: the newest connections are kept.
        let evicted = come(&mut connections, many..many + 1, 1, start + MIN_PENDING_TIME * 2);
        assert_eq!(evicted, (0..=many - PENDING_SOFT_LIMIT as u64).collect::<Vec<_>>());
        let evicted = come(&mut connections, many + 1..many + most + 9, 1, start + MIN_PENDING_TIME * 2);
        assert_eq!(
            (evicted.len(), connections.count(Kind::Pending)),
            (PENDING_SOFT_LIMIT + 8, PENDING_HARD_LIMIT)
        );
    }

    #[test]
    fn flood_of_one_address_evicts_no_stranger_of_another() {
        let mut connections = Connections::new(1 << 20);
        let now = Instant::now();
        come(&mut connections, 0..3, 1, now);
        let evicted = come(&mut connections, 3..PENDING_HARD_LIMIT as u64 * 2, 2, now);
        assert!(
            evicted.len() >= PENDING_HARD_LIMIT && !evicted.iter().any(|id| *id < 3),
            "{}",
            evicted.len()
        );
    }

    #[test]
    fn idle_ranks_make_room_and_busy_ones_do_not() {
        let mut connections = Connections::new(80);
        let now = Instant::now();
        let mut next = 0;
        let mut rank = |connections: &mut Connections<ConnectionId>, host: u8, asks: bool| {
            next += 1;
            assert_eq!(connections.add(next, address(host), next, now), []);
            let evicted = connections.becomes(next, Kind::Rank);
            if asks {
                connections.mark_active(next);
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
        // C-3: the flood evicts its own connections, and not the idle one of another address.
        assert_eq!(rank(&mut connections, 2, false).1, [idle[2]]);
        for _ in 0..38 {
            assert_eq!(rank(&mut connections, 4, true).1.len(), 1);
        }
        // C-4: only the third address has an idle connection left; then newcomers are evicted.
        let (_, evicted) = rank(&mut connections, 4, true);
        assert_eq!(evicted.len(), 1);
        let (newcomer, evicted) = rank(&mut connections, 4, false);
        assert_eq!(evicted, [newcomer]);
        // C-2: agents are served nevertheless.
        for id in 1000..1010 {
            assert_eq!(connections.add(id, address(2), id, now), []);
            assert_eq!(connections.becomes(id, Kind::Agent), []);
        }
    }

    #[test]
    fn address_has_a_limit_that_grows_with_the_job() {
        let mut connections = Connections::new(1 << 20);
        let now = Instant::now();
        let evicted = |connections: &mut Connections<ConnectionId>, ids: std::ops::Range<ConnectionId>| {
            let of = ids.map(|id| {
                connections.add(id, address(1), id, now);
                connections.becomes(id, Kind::Rank).len()
            });
            of.sum::<usize>()
        };
        let limit = PER_ADDRESS as u64;
        assert_eq!(evicted(&mut connections, 0..limit), 0);
        assert_eq!(evicted(&mut connections, limit..limit + 5), 5);
        connections.set_world_size(2 * PER_ADDRESS / PER_RANK);
        assert_eq!(evicted(&mut connections, limit + 5..2 * limit + 5), 0);
        assert_eq!(evicted(&mut connections, 2 * limit + 5..2 * limit + 7), 2);
    }

    #[test]
    fn evictions_are_logged_at_powers_of_ten() {
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
                        let is_marked_active =
                            connections.all.get(&id).is_some_and(|connection| connection.kind != Kind::Pending);
                        if is_marked_active {
                            connections.mark_active(id);
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
                // C-4: only the connection that changes its kind may be active.
                for evicted in &evicted {
                    prop_assert!(!busy.contains(&evicted.handle) || evicted.handle == id);
                    busy.remove(&evicted.handle);
                }
                prop_assert!(connections.all.len() <= all, "C-1");
                let ranks = connections.count(Kind::Rank);
                prop_assert!(ranks <= all - 2 * (all / 8), "C-2");
                let groups: usize = connections.groups.values().map(AddressGroup::count).sum();
                prop_assert_eq!(groups, connections.all.len());
            }
        }
    }
}
