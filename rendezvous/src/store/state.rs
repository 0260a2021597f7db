//! What the store holds, and its answers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::store::codec::Request;

/// A client's connection.
pub type Connection = u64;

/// Bytes to be sent to a client.
pub type Reply = (Connection, Vec<u8>);

const READY: u8 = 0;
const NOT_READY: u8 = 1;
const WAIT_CANCELLED: u8 = 1;

/// The keys, their values, and who waits for what.
#[derive(Debug, Default)]
pub struct Store {
    values: BTreeMap<Vec<u8>, Vec<u8>>,
    queues: BTreeMap<Vec<u8>, VecDeque<Vec<u8>>>,
    /// Keys that a client still waits for.
    waiting: BTreeMap<Connection, BTreeSet<Vec<u8>>>,
    /// The same by key.
    waiters: BTreeMap<Vec<u8>, BTreeSet<Connection>>,
    barriers: BTreeMap<Vec<u8>, Vec<Connection>>,
}

impl Store {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all keys. Clients that wait go on waiting.
    pub fn clear(&mut self) {
        self.values.clear();
        self.queues.clear();
        self.barriers.clear();
    }

    /// Forgets a client.
    pub fn disconnect(&mut self, client: Connection) {
        self.stop_waiting(client);
        self.barriers.retain(|_, clients| {
            clients.retain(|other| *other != client);
            !clients.is_empty()
        });
    }

    /// Carries out a request and returns what is to be sent, to this client and to others.
    pub fn handle(&mut self, client: Connection, request: Request) -> Vec<Reply> {
        match request {
            Request::Validate => Vec::new(),
            Request::Set(key, value) => self.set(key, value),
            Request::CompareSet { key, expected, desired } => {
                self.compare_set(client, key, &expected, desired)
            }
            Request::Get(key) => vec![(client, string(self.value(&key)))],
            Request::Add(key, amount) => {
                let before =
                    std::str::from_utf8(self.value(&key)).ok().and_then(|text| text.parse::<i64>().ok());
                let sum = before.unwrap_or(0).wrapping_add(amount);
                let mut replies = vec![(client, sum.to_le_bytes().to_vec())];
                replies.extend(self.set(key, sum.to_string().into_bytes()));
                replies
            }
            Request::Check(keys) => {
                let ready = keys.iter().all(|key| self.has(key));
                vec![(client, vec![if ready { READY } else { NOT_READY }])]
            }
            Request::Wait(keys) => self.wait(client, keys),
            Request::NumKeys => vec![(client, integer(self.values.len()))],
            Request::Delete(key) => {
                let removed = self.values.remove(&key).is_some() | self.queues.remove(&key).is_some();
                vec![(client, integer(usize::from(removed)))]
            }
            Request::Append(key, more) => {
                let value = [self.value(&key), &more].concat();
                self.set(key, value)
            }
            Request::MultiGet(keys) => {
                vec![(client, keys.iter().flat_map(|key| string(self.value(key))).collect())]
            }
            Request::MultiSet(pairs) => {
                pairs.into_iter().flat_map(|(key, value)| self.set(key, value)).collect()
            }
            Request::CancelWait => {
                self.stop_waiting(client);
                vec![(client, vec![WAIT_CANCELLED])]
            }
            Request::Ping(number) => vec![(client, number.to_le_bytes().to_vec())],
            Request::QueuePush(key, value) => {
                self.queues.entry(key.clone()).or_default().push_back(value);
                // One element serves one client.
                let first = self.waiters.get(&key).and_then(|clients| clients.first().copied());
                first.map(|waiter| self.arrived(waiter, &key)).unwrap_or_default()
            }
            Request::QueuePop(key) => vec![(client, self.queue_pop(&key))],
            Request::QueueLen(key) => {
                vec![(client, integer(self.queues.get(&key).map_or(0, VecDeque::len)))]
            }
            Request::ListKeys => {
                let mut reply = integer(self.values.len());
                reply.extend(self.values.keys().flat_map(|key| string(key)));
                vec![(client, reply)]
            }
            Request::Barrier(key, size) => {
                let clients = self.barriers.entry(key.clone()).or_default();
                clients.push(client);
                if (clients.len() as i64) < size {
                    return Vec::new();
                }
                let clients = self.barriers.remove(&key).unwrap_or_default();
                clients.into_iter().map(|client| (client, vec![READY])).collect()
            }
        }
    }

    fn value(&self, key: &[u8]) -> &[u8] {
        self.values.get(key).map_or(&[], Vec::as_slice)
    }

    fn has(&self, key: &[u8]) -> bool {
        self.values.contains_key(key) || self.queues.get(key).is_some_and(|queue| !queue.is_empty())
    }

    fn set(&mut self, key: Vec<u8>, value: Vec<u8>) -> Vec<Reply> {
        let waiters: Vec<_> = self.waiters.get(&key).into_iter().flatten().copied().collect();
        let replies = waiters.into_iter().flat_map(|waiter| self.arrived(waiter, &key)).collect();
        self.values.insert(key, value);
        replies
    }

    fn compare_set(
        &mut self,
        client: Connection,
        key: Vec<u8>,
        expected: &[u8],
        desired: Vec<u8>,
    ) -> Vec<Reply> {
        let stored = match self.values.get(&key) {
            Some(value) => value == expected,
            None => expected.is_empty(),
        };
        if !stored {
            let now = self.values.get(&key).map_or(expected, Vec::as_slice);
            return vec![(client, string(now))];
        }
        let mut replies = vec![(client, string(&desired))];
        replies.extend(self.set(key, desired));
        replies
    }

    fn queue_pop(&mut self, key: &[u8]) -> Vec<u8> {
        let Some(queue) = self.queues.get_mut(key) else { return integer(0) };
        let mut reply = integer(queue.len());
        if let Some(value) = queue.pop_front() {
            reply.extend(string(&value));
        }
        if queue.is_empty() {
            self.queues.remove(key);
        }
        reply
    }

    fn wait(&mut self, client: Connection, keys: Vec<Vec<u8>>) -> Vec<Reply> {
        self.stop_waiting(client);
        let missing: BTreeSet<_> = keys.into_iter().filter(|key| !self.has(key)).collect();
        if missing.is_empty() {
            return vec![(client, vec![READY])];
        }
        for key in &missing {
            self.waiters.entry(key.clone()).or_default().insert(client);
        }
        self.waiting.insert(client, missing);
        Vec::new()
    }

    /// A key that a client waits for is there.
    fn arrived(&mut self, client: Connection, key: &[u8]) -> Vec<Reply> {
        self.forget_waiter(client, key);
        let Some(missing) = self.waiting.get_mut(&client) else { return Vec::new() };
        missing.remove(key);
        if !missing.is_empty() {
            return Vec::new();
        }
        self.waiting.remove(&client);
        vec![(client, vec![READY])]
    }

    fn stop_waiting(&mut self, client: Connection) {
        for key in self.waiting.remove(&client).unwrap_or_default() {
            self.forget_waiter(client, &key);
        }
    }

    fn forget_waiter(&mut self, client: Connection, key: &[u8]) {
        if let Some(clients) = self.waiters.get_mut(key) {
            clients.remove(&client);
            if clients.is_empty() {
                self.waiters.remove(key);
            }
        }
    }
}

fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

fn integer(number: usize) -> Vec<u8> {
    (number as i64).to_le_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(store: &mut Store, key: &str, value: &str) -> Vec<Reply> {
        store.handle(9, Request::Set(key.into(), value.into()))
    }

    fn keys(keys: &[&str]) -> Vec<Vec<u8>> {
        keys.iter().map(|key| key.as_bytes().to_vec()).collect()
    }

    #[test]
    fn a_wait_is_answered_once_when_the_last_key_comes() {
        let mut store = Store::new();
        assert_eq!(store.handle(1, Request::Wait(keys(&["a", "b"]))), []);
        assert_eq!(set(&mut store, "a", "1"), []);
        assert_eq!(set(&mut store, "b", "2"), [(1, vec![READY])]);
        assert_eq!(set(&mut store, "b", "3"), []);
        assert_eq!(store.handle(1, Request::Wait(keys(&["b"]))), [(1, vec![READY])]);
    }

    #[test]
    fn a_cancelled_or_lost_wait_is_not_answered() {
        let mut store = Store::new();
        store.handle(1, Request::Wait(keys(&["a"])));
        store.handle(2, Request::Wait(keys(&["a"])));
        assert_eq!(store.handle(1, Request::CancelWait), [(1, vec![WAIT_CANCELLED])]);
        store.disconnect(2);
        assert_eq!(set(&mut store, "a", "1"), []);
    }

    #[test]
    fn add_counts_in_decimal_text() {
        let mut store = Store::new();
        assert_eq!(store.handle(1, Request::Add(b"n".into(), 5)), [(1, 5_i64.to_le_bytes().to_vec())]);
        assert_eq!(store.handle(1, Request::Add(b"n".into(), -7)), [(1, (-2_i64).to_le_bytes().to_vec())]);
        assert_eq!(store.handle(1, Request::Get(b"n".into())), [(1, string(b"-2"))]);
    }

    #[test]
    fn compare_set_follows_torch() {
        let mut store = Store::new();
        let mut compare = |expected: &str, desired: &str| {
            let (expected, desired) = (expected.into(), desired.into());
            store.handle(1, Request::CompareSet { key: b"k".into(), expected, desired })
        };
        assert_eq!(compare("x", "y"), [(1, string(b"x"))]);
        assert_eq!(compare("", "y"), [(1, string(b"y"))]);
        assert_eq!(compare("x", "z"), [(1, string(b"y"))]);
        assert_eq!(compare("y", "z"), [(1, string(b"z"))]);
    }

    #[test]
    fn a_queue_wakes_one_waiter_per_element() {
        let mut store = Store::new();
        store.handle(1, Request::Wait(keys(&["q"])));
        store.handle(2, Request::Wait(keys(&["q"])));
        let push = |store: &mut Store| store.handle(9, Request::QueuePush(b"q".into(), b"v".into()));
        assert_eq!(push(&mut store), [(1, vec![READY])]);
        let popped = [integer(1), string(b"v")].concat();
        assert_eq!(store.handle(1, Request::QueuePop(b"q".into())), [(1, popped)]);
        assert_eq!(push(&mut store), [(2, vec![READY])]);
        assert_eq!(store.handle(3, Request::Check(keys(&["q"]))), [(3, vec![READY])]);
    }

    #[test]
    fn a_barrier_lets_all_through_at_once_and_again() {
        let mut store = Store::new();
        for _ in 0..2 {
            assert_eq!(store.handle(1, Request::Barrier(b"b".into(), 2)), []);
            assert_eq!(
                store.handle(2, Request::Barrier(b"b".into(), 2)),
                [(1, vec![READY]), (2, vec![READY])]
            );
        }
    }

    #[test]
    fn a_cleared_store_has_no_keys() {
        let mut store = Store::new();
        set(&mut store, "a", "1");
        store.clear();
        assert_eq!(store.handle(1, Request::NumKeys), [(1, integer(0))]);
        assert_eq!(store.handle(1, Request::Check(keys(&["a"]))), [(1, vec![NOT_READY])]);
    }
}
