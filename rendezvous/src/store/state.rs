//! What the store holds, and its answers.
//!
//! In the book: `docs/clusters.md#who-may-join`.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use crate::store::codec::Request;

/// A client's connection.
pub type Connection = u64;

/// Most bytes that a store holds unless it is told otherwise: keys, values and waits together.
pub const MAX_HELD: usize = 1 << 30;

/// What tells a client that its wait is over.
pub const READY: u8 = 0;
const NOT_READY: u8 = 1;
/// What tells a client that its wait was cancelled.
pub const WAIT_CANCELLED: u8 = 1;

/// What an entry takes beside its key and its value, roughly.
const ENTRY: usize = 64;

/// Why a request was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The store would hold more than it may.
    #[error("the store is full: it holds {held} bytes of at most {limit}")]
    Full {
        /// Bytes that it holds.
        held: usize,
        /// The most.
        limit: usize,
    },
    /// There is nothing to add to.
    #[error("the value to add to is no number")]
    NotANumber,
}

/// What is to be sent.
#[derive(Debug, Default)]
pub struct Replies {
    /// To the client that asked.
    pub own: Vec<u8>,
    /// To each of these [`READY`].
    pub woken: Vec<Connection>,
}

/// What a client waits for.
#[derive(Debug)]
struct Wait {
    /// Its turn among all waits.
    turn: u64,
    /// Keys that have not come yet.
    missing: BTreeSet<Vec<u8>>,
}

/// The keys, their values, and who waits for what.
#[derive(Debug)]
pub struct Store {
    values: HashMap<Vec<u8>, Vec<u8>>,
    queues: HashMap<Vec<u8>, VecDeque<Vec<u8>>>,
    waiting: HashMap<Connection, Wait>,
    /// The same by key, in turn.
    waiters: HashMap<Vec<u8>, BTreeMap<u64, Connection>>,
    /// How many waits have begun.
    waits: u64,
    /// Bytes of all that.
    held: usize,
    limit: usize,
}

impl Store {
    /// An empty store that holds at most so many bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            values: HashMap::new(),
            queues: HashMap::new(),
            waiting: HashMap::new(),
            waiters: HashMap::new(),
            waits: 0,
            held: 0,
            limit,
        }
    }

    /// Forgets everything, waits included.
    pub fn clear(&mut self) {
        *self = Self::new(self.limit);
    }

    /// Forgets a client.
    pub fn disconnect(&mut self, client: Connection) {
        self.stop_waiting(client);
    }

    /// Carries out a request; what is to be sent is added to `replies`.
    ///
    /// # Errors
    /// [`Refused`], and nothing is changed.
    pub fn handle(
        &mut self,
        client: Connection,
        request: Request<'_>,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        match request {
            Request::Validate => {}
            Request::Set(key, value) => self.set(key, value.to_vec(), replies)?,
            Request::CompareSet { key, expected, desired } => {
                self.compare_set(key, expected, desired, replies)?;
            }
            Request::Get(key) => string(self.value(key), &mut replies.own),
            Request::Add(key, amount) => {
                let sum = self.number(key)?.wrapping_add(amount);
                self.set(key, sum.to_string().into_bytes(), replies)?;
                replies.own.extend(sum.to_le_bytes());
            }
            Request::Check(keys) => {
                let ready = keys.iter().all(|key| self.has(key));
                replies.own.push(if ready { READY } else { NOT_READY });
            }
            Request::Wait(keys) => self.wait(client, &keys, replies)?,
            Request::NumKeys => integer(self.values.len(), &mut replies.own),
            Request::Delete(key) => {
                let removed = self.remove(key);
                integer(usize::from(removed), &mut replies.own);
            }
            Request::Append(key, more) => {
                self.room_for(more.len())?;
                match self.values.get_mut(key) {
                    Some(value) => {
                        value.extend(more);
                        self.held += more.len();
                        // Who waits although there is a value is in a barrier that counts here.
                        self.wake(key, replies);
                    }
                    None => self.set(key, more.to_vec(), replies)?,
                }
            }
            Request::MultiGet(keys) => {
                keys.iter().for_each(|key| string(self.value(key), &mut replies.own));
            }
            Request::MultiSet(pairs) => {
                let size = pairs.iter().map(|(key, value)| key.len() + value.len() + ENTRY).sum();
                self.room_for(size)?;
                for (key, value) in pairs {
                    self.set(key, value.to_vec(), replies)?;
                }
            }
            Request::CancelWait => {
                self.stop_waiting(client);
                replies.own.push(WAIT_CANCELLED);
            }
            Request::Ping(number) => replies.own.extend(number.to_le_bytes()),
            Request::QueuePush(key, value) => {
                self.room_for(key.len() + value.len() + ENTRY)?;
                self.held += key.len() + value.len() + ENTRY;
                self.queues.entry(key.to_vec()).or_default().push_back(value.to_vec());
                self.wake_one(key, replies);
            }
            Request::QueuePop(key) => self.queue_pop(key, &mut replies.own),
            Request::QueueLen(key) => {
                integer(self.queues.get(key).map_or(0, VecDeque::len), &mut replies.own);
            }
            Request::ListKeys => {
                integer(self.values.len(), &mut replies.own);
                self.values.keys().for_each(|key| string(key, &mut replies.own));
            }
            Request::Barrier(key, size) => {
                let come = self.number(key)?.wrapping_add(1);
                self.stop_waiting(client);
                let count = come.to_string().into_bytes();
                self.room_for(key.len() + count.len() + ENTRY + waiting_size(key))?;
                // The count is a key like any other, as in torch's server: who gives up or goes has come all the same.
                self.put(key, count)?;
                if come >= size {
                    self.wake(key, replies);
                    replies.own.push(READY);
                } else {
                    self.enrol(client, BTreeSet::from([key.to_vec()]))?;
                }
            }
        }
        Ok(())
    }

    fn room_for(&self, more: usize) -> Result<(), Refused> {
        let Self { held, limit, .. } = *self;
        if held + more > limit { Err(Refused::Full { held, limit }) } else { Ok(()) }
    }

    fn value(&self, key: &[u8]) -> &[u8] {
        self.values.get(key).map_or(&[], Vec::as_slice)
    }

    fn has(&self, key: &[u8]) -> bool {
        self.values.contains_key(key) || self.queues.get(key).is_some_and(|queue| !queue.is_empty())
    }

    fn set(&mut self, key: &[u8], value: Vec<u8>, replies: &mut Replies) -> Result<(), Refused> {
        self.put(key, value)?;
        self.wake(key, replies);
        Ok(())
    }

    /// Stores a value and wakes nobody.
    fn put(&mut self, key: &[u8], value: Vec<u8>) -> Result<(), Refused> {
        self.room_for(key.len() + value.len() + ENTRY)?;
        self.held += value.len();
        match self.values.get_mut(key) {
            Some(place) => self.held -= std::mem::replace(place, value).len(),
            None => {
                self.held += key.len() + ENTRY;
                self.values.insert(key.to_vec(), value);
            }
        }
        Ok(())
    }

    fn wake(&mut self, key: &[u8], replies: &mut Replies) {
        let waiters = self.waiters.remove(key).unwrap_or_default();
        self.held -= waiters.len() * waiting_size(key);
        for client in waiters.into_values() {
            self.arrived(client, key, replies);
        }
    }

    /// One element serves one client: the first that waits for nothing else.
    fn wake_one(&mut self, key: &[u8], replies: &mut Replies) {
        while let Some((_, client)) = self.waiters.get_mut(key).and_then(BTreeMap::pop_first) {
            self.held -= waiting_size(key);
            if self.arrived(client, key, replies) {
                break;
            }
        }
        self.forget_key_without_waiters(key);
    }

    /// A queue of that name stays, as in torch's server.
    fn remove(&mut self, key: &[u8]) -> bool {
        let Some(value) = self.values.remove(key) else { return false };
        self.held -= key.len() + value.len() + ENTRY;
        true
    }

    /// The number at a key, 0 where there is none.
    fn number(&self, key: &[u8]) -> Result<i64, Refused> {
        self.values.get(key).map_or(Ok(0), |value| leading_number(value).ok_or(Refused::NotANumber))
    }

    fn compare_set(
        &mut self,
        key: &[u8],
        expected: &[u8],
        desired: &[u8],
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let stored = self.values.get(key);
        if !stored.map_or(expected.is_empty(), |value| value == expected) {
            string(stored.map_or(expected, Vec::as_slice), &mut replies.own);
            return Ok(());
        }
        self.set(key, desired.to_vec(), replies)?;
        string(desired, &mut replies.own);
        Ok(())
    }

    fn queue_pop(&mut self, key: &[u8], reply: &mut Vec<u8>) {
        let Some(queue) = self.queues.get_mut(key) else { return integer(0, reply) };
        integer(queue.len(), reply);
        if let Some(value) = queue.pop_front() {
            self.held -= key.len() + value.len() + ENTRY;
            string(&value, reply);
        }
        if queue.is_empty() {
            self.queues.remove(key);
        }
    }

    fn wait(&mut self, client: Connection, keys: &[&[u8]], replies: &mut Replies) -> Result<(), Refused> {
        self.stop_waiting(client);
        let missing: BTreeSet<_> = keys.iter().filter(|key| !self.has(key)).map(|key| key.to_vec()).collect();
        if missing.is_empty() {
            replies.own.push(READY);
            return Ok(());
        }
        self.enrol(client, missing)
    }

    fn enrol(&mut self, client: Connection, missing: BTreeSet<Vec<u8>>) -> Result<(), Refused> {
        let size = missing.iter().map(|key| waiting_size(key)).sum();
        self.room_for(size)?;
        self.held += size;
        let turn = self.waits;
        self.waits += 1;
        for key in &missing {
            self.waiters.entry(key.clone()).or_default().insert(turn, client);
        }
        self.waiting.insert(client, Wait { turn, missing });
        Ok(())
    }

    /// A key that a client waits for is there; whether that was the last.
    fn arrived(&mut self, client: Connection, key: &[u8], replies: &mut Replies) -> bool {
        let Some(wait) = self.waiting.get_mut(&client) else { return false };
        wait.missing.remove(key);
        let last = wait.missing.is_empty();
        if last {
            self.waiting.remove(&client);
            replies.woken.push(client);
        }
        last
    }

    fn stop_waiting(&mut self, client: Connection) {
        let Some(Wait { turn, missing }) = self.waiting.remove(&client) else { return };
        for key in missing {
            self.held -= waiting_size(&key);
            self.waiters.get_mut(&key).and_then(|waiters| waiters.remove(&turn));
            self.forget_key_without_waiters(&key);
        }
    }

    fn forget_key_without_waiters(&mut self, key: &[u8]) {
        if self.waiters.get(key).is_some_and(BTreeMap::is_empty) {
            self.waiters.remove(key);
        }
    }
}

/// A key that is waited for is there once by client and once by key.
fn waiting_size(key: &[u8]) -> usize {
    2 * (key.len() + ENTRY)
}

/// What `std::stoll` reads, which torch's server counts with.
fn leading_number(value: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t'..=b'\r');
    let text = &value[value.iter().take_while(|byte| blank(byte)).count()..];
    let sign = usize::from(matches!(text.first(), Some(b'+' | b'-')));
    let digits = text[sign..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&text[..sign + digits]).ok()?.parse().ok()
}

fn string(bytes: &[u8], reply: &mut Vec<u8>) {
    integer(bytes.len(), reply);
    reply.extend(bytes);
}

fn integer(number: usize, reply: &mut Vec<u8>) {
    reply.extend((number as i64).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What goes to whom.
    type Sent = Vec<(Connection, Vec<u8>)>;

    fn handle(store: &mut Store, client: Connection, request: Request<'_>) -> Sent {
        let mut replies = Replies::default();
        store.handle(client, request, &mut replies).unwrap();
        let own = (!replies.own.is_empty()).then_some((client, replies.own));
        own.into_iter().chain(replies.woken.into_iter().map(|woken| (woken, vec![READY]))).collect()
    }

    fn set(store: &mut Store, key: &str, value: &str) -> Sent {
        handle(store, 9, Request::Set(key.as_bytes(), value.as_bytes()))
    }

    fn text(bytes: &[u8]) -> Vec<u8> {
        let mut reply = Vec::new();
        string(bytes, &mut reply);
        reply
    }

    fn number(number: usize) -> Vec<u8> {
        (number as i64).to_le_bytes().to_vec()
    }

    #[test]
    fn a_wait_is_answered_once_when_the_last_key_comes() {
        let mut store = Store::new(MAX_HELD);
        assert_eq!(handle(&mut store, 1, Request::Wait(vec![b"a", b"b"])), []);
        assert_eq!(set(&mut store, "a", "1"), []);
        assert_eq!(set(&mut store, "b", "2"), [(1, vec![READY])]);
        assert_eq!(set(&mut store, "b", "3"), []);
        assert_eq!(handle(&mut store, 1, Request::Wait(vec![b"b"])), [(1, vec![READY])]);
    }

    #[test]
    fn a_cancelled_or_lost_wait_is_not_answered() {
        let mut store = Store::new(MAX_HELD);
        handle(&mut store, 1, Request::Wait(vec![b"a"]));
        handle(&mut store, 2, Request::Wait(vec![b"a"]));
        assert_eq!(handle(&mut store, 1, Request::CancelWait), [(1, vec![WAIT_CANCELLED])]);
        store.disconnect(2);
        assert_eq!(set(&mut store, "a", "1"), []);
    }

    #[test]
    fn add_counts_in_decimal_text() {
        let mut store = Store::new(MAX_HELD);
        assert_eq!(handle(&mut store, 1, Request::Add(b"n", 5)), [(1, 5_i64.to_le_bytes().to_vec())]);
        assert_eq!(handle(&mut store, 1, Request::Add(b"n", -7)), [(1, (-2_i64).to_le_bytes().to_vec())]);
        assert_eq!(handle(&mut store, 1, Request::Get(b"n")), [(1, text(b"-2"))]);
    }

    #[test]
    fn compare_set_follows_torch() {
        let mut store = Store::new(MAX_HELD);
        let mut compare = |expected: &str, desired: &str| {
            let (expected, desired) = (expected.as_bytes(), desired.as_bytes());
            handle(&mut store, 1, Request::CompareSet { key: b"k", expected, desired })
        };
        assert_eq!(compare("x", "y"), [(1, text(b"x"))]);
        assert_eq!(compare("", "y"), [(1, text(b"y"))]);
        assert_eq!(compare("x", "z"), [(1, text(b"y"))]);
        assert_eq!(compare("y", "z"), [(1, text(b"z"))]);
    }

    #[test]
    fn a_queue_wakes_one_waiter_per_element() {
        let mut store = Store::new(MAX_HELD);
        handle(&mut store, 1, Request::Wait(vec![b"q"]));
        handle(&mut store, 2, Request::Wait(vec![b"q"]));
        let push = |store: &mut Store| handle(store, 9, Request::QueuePush(b"q", b"v"));
        assert_eq!(push(&mut store), [(1, vec![READY])]);
        let popped = [number(1), text(b"v")].concat();
        assert_eq!(handle(&mut store, 1, Request::QueuePop(b"q")), [(1, popped)]);
        assert_eq!(push(&mut store), [(2, vec![READY])]);
        assert_eq!(handle(&mut store, 3, Request::Check(vec![b"q"])), [(3, vec![READY])]);
    }

    #[test]
    fn a_queue_serves_those_that_wait_in_turn() {
        let mut store = Store::new(MAX_HELD);
        let push = |store: &mut Store| handle(store, 9, Request::QueuePush(b"q", b"v"));
        handle(&mut store, 3, Request::Wait(vec![b"q", b"x"]));
        handle(&mut store, 2, Request::Wait(vec![b"q"]));
        handle(&mut store, 1, Request::Wait(vec![b"q"]));
        assert_eq!(push(&mut store), [(2, vec![READY])]);
        // Again, behind the other.
        handle(&mut store, 2, Request::QueuePop(b"q"));
        handle(&mut store, 2, Request::Wait(vec![b"q"]));
        assert_eq!(push(&mut store), [(1, vec![READY])]);
        handle(&mut store, 1, Request::QueuePop(b"q"));
        assert_eq!(push(&mut store), [(2, vec![READY])]);
        assert_eq!(set(&mut store, "x", ""), [(3, vec![READY])]);
        assert!(store.waiters.is_empty() && store.waiting.is_empty());
    }

    #[test]
    fn add_refuses_what_torch_refuses() {
        let mut store = Store::new(MAX_HELD);
        for (value, sum) in
            [("41abc", 42), (" 7", 8), ("\t\n\u{b}\u{c}\r7", 8), ("+5", 6), ("-3", -2), ("0x10", 1)]
        {
            set(&mut store, "n", value);
            let sent = handle(&mut store, 1, Request::Add(b"n", 1));
            assert_eq!(sent, [(1, i64::to_le_bytes(sum).to_vec())], "{value}");
        }
        for value in ["", "abc", "-", "99999999999999999999"] {
            set(&mut store, "n", value);
            let mut replies = Replies::default();
            assert_eq!(store.handle(1, Request::Add(b"n", 1), &mut replies), Err(Refused::NotANumber));
            assert_eq!(handle(&mut store, 1, Request::Get(b"n")), [(1, text(value.as_bytes()))]);
        }
    }

    #[test]
    fn a_queue_stays_when_its_key_is_deleted() {
        let mut store = Store::new(MAX_HELD);
        handle(&mut store, 1, Request::QueuePush(b"q", b"v"));
        assert_eq!(handle(&mut store, 1, Request::Delete(b"q")), [(1, number(0))]);
        assert_eq!(handle(&mut store, 1, Request::QueueLen(b"q")), [(1, number(1))]);
    }

    #[test]
    fn a_barrier_counts_in_a_key() {
        let mut store = Store::new(MAX_HELD);
        let barrier = |store: &mut Store, client| handle(store, client, Request::Barrier(b"b", 2));
        assert_eq!(barrier(&mut store, 1), []);
        assert_eq!(barrier(&mut store, 2), [(2, vec![READY]), (1, vec![READY])]);
        assert_eq!(handle(&mut store, 1, Request::Get(b"b")), [(1, text(b"2"))]);
        assert_eq!(barrier(&mut store, 3), [(3, vec![READY])]);
        handle(&mut store, 1, Request::Delete(b"b"));
        assert_eq!(barrier(&mut store, 1), []);
        assert_eq!(handle(&mut store, 2, Request::Append(b"b", b"0")), [(1, vec![READY])]);
    }

    #[test]
    fn who_gives_up_a_barrier_is_told_nothing_more() {
        let mut store = Store::new(MAX_HELD);
        handle(&mut store, 1, Request::Barrier(b"b", 3));
        handle(&mut store, 2, Request::Barrier(b"b", 3));
        assert_eq!(handle(&mut store, 1, Request::CancelWait), [(1, vec![WAIT_CANCELLED])]);
        store.disconnect(2);
        assert_eq!(handle(&mut store, 3, Request::Barrier(b"b", 3)), [(3, vec![READY])]);
        handle(&mut store, 1, Request::Delete(b"b"));
        assert_eq!(store.held, 0);
    }

    #[test]
    fn a_cleared_store_has_no_keys() {
        let mut store = Store::new(MAX_HELD);
        set(&mut store, "a", "1");
        store.clear();
        assert_eq!(handle(&mut store, 1, Request::NumKeys), [(1, number(0))]);
        assert_eq!(handle(&mut store, 1, Request::Check(vec![b"a"])), [(1, vec![NOT_READY])]);
    }

    #[test]
    fn what_is_held_is_counted_and_given_back() {
        let mut store = Store::new(MAX_HELD);
        set(&mut store, "a", "1");
        set(&mut store, "a", "12345");
        handle(&mut store, 1, Request::Append(b"a", b"6"));
        handle(&mut store, 1, Request::CompareSet { key: b"b", expected: b"", desired: b"x" });
        handle(&mut store, 1, Request::Add(b"n", 10));
        handle(&mut store, 1, Request::QueuePush(b"q", b"v"));
        handle(&mut store, 1, Request::QueuePush(b"q", b"vv"));
        handle(&mut store, 2, Request::Wait(vec![b"x", b"y", b"y"]));
        handle(&mut store, 3, Request::Wait(vec![b"x"]));
        assert_eq!(store.held, 3 * ENTRY + 3 + 9 + 2 * (ENTRY + 1) + 3 + 3 * 2 * (ENTRY + 1));
        handle(&mut store, 1, Request::QueuePop(b"q"));
        handle(&mut store, 1, Request::QueuePop(b"q"));
        for key in [b"a", b"b", b"n"] {
            handle(&mut store, 1, Request::Delete(key));
        }
        set(&mut store, "x", "");
        handle(&mut store, 1, Request::Delete(b"x"));
        store.disconnect(2);
        assert_eq!(store.held, 0);
    }

    #[test]
    fn a_full_store_says_so_and_keeps_what_it_has() {
        let mut store = Store::new(128 << 10);
        let value = vec![0; 1 << 10];
        let mut replies = Replies::default();
        let mut full = None;
        for number in 0..200_u8 {
            if let Err(error) = store.handle(1, Request::Set(&[number], &value), &mut replies) {
                full = Some((number, error));
                break;
            }
        }
        let (number, error) = full.unwrap();
        assert_eq!(number, 120);
        assert!(error.to_string().contains("full"), "{error}");
        assert!(store.handle(1, Request::QueuePush(b"q", &value), &mut replies).is_err());
        assert!(store.handle(1, Request::MultiSet(vec![(b"k", &value)]), &mut replies).is_err());
        assert_eq!(handle(&mut store, 1, Request::NumKeys), [(1, 120_i64.to_le_bytes().to_vec())]);
    }
}
