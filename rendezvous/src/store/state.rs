//! What the store holds, and its answers.
//!
//! In the book: `docs/clusters.md#who-may-join`.

use std::collections::{BTreeMap, BTreeSet, HashMap, TryReserveError, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::codec::Request;
use super::values::{Answer, MAX_ANSWER, Value, copy};

/// A client's connection.
pub type Connection = u64;

/// Most bytes that a store holds unless it is told otherwise: keys, values and waits together.
pub const MAX_HELD: usize = 1 << 30;

/// What tells a client that its wait is over.
pub const READY: u8 = 0;
const NOT_READY: u8 = 1;
/// What tells a client that its wait was cancelled.
pub const WAIT_CANCELLED: u8 = 1;

/// Longest value that appending makes, in bytes. Torch's server has no limit here.
pub const MAX_APPENDED: usize = 64 << 20;

/// What an entry takes beside its key and its value, roughly: its place in a table that is half full, and two allocations.
const ENTRY: usize = 160;

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
    /// An appended value would be longer than [`MAX_APPENDED`].
    #[error("a value of {0} bytes is over the limit of {MAX_APPENDED} for appending")]
    ValueTooLarge(usize),
    /// An answer would take more than [`MAX_ANSWER`].
    #[error("an answer of {0} bytes is over the limit of {MAX_ANSWER}")]
    AnswerTooLarge(usize),
    /// The system has no memory for the request.
    #[error("there is no memory for the request")]
    Memory,
}

impl From<TryReserveError> for Refused {
    fn from(_: TryReserveError) -> Self {
        Self::Memory
    }
}

/// What is to be sent.
#[derive(Debug, Default)]
pub struct Replies {
    /// To the client that asked.
    pub own: Answer,
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
    values: HashMap<Vec<u8>, Value>,
    queues: HashMap<Vec<u8>, VecDeque<Value>>,
    waiting: HashMap<Connection, Wait>,
    /// The same by key, in turn.
    waiters: HashMap<Vec<u8>, BTreeMap<u64, Connection>>,
    /// How many waits have begun.
    waits: u64,
    /// Bytes of all that, without those of large values.
    held: usize,
    /// Bytes of large values that are in the store or in an answer.
    live: Arc<AtomicUsize>,
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
            live: Arc::default(),
            limit,
        }
    }

    /// Forgets everything, waits included. Large values in answers that are being sent still count.
    pub fn clear(&mut self) {
        *self = Self { live: Arc::clone(&self.live), ..Self::new(self.limit) };
    }

    /// Bytes that the store and the values of its answers take, roughly.
    pub fn held(&self) -> usize {
        self.held + self.live.load(Ordering::Relaxed)
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
            Request::Set(key, value) => self.set(key, self.copy(value)?, replies)?,
            Request::CompareSet { key, expected, desired } => {
                self.compare_set(key, expected, desired, replies)?;
            }
            Request::Get(key) => self.answer(key, &mut replies.own),
            Request::Add(key, amount) => {
                let sum = self.number(key)?.wrapping_add(amount);
                self.set(key, Value::Small(sum.to_string().into_bytes()), replies)?;
                replies.own.put(&sum.to_le_bytes());
            }
            Request::Check(keys) => {
                let ready = keys.iter().all(|key| self.has(key));
                replies.own.push(if ready { READY } else { NOT_READY });
            }
            Request::Wait(keys) => self.wait(client, &keys, replies)?,
            Request::NumKeys => replies.own.put_length(self.values.len()),
            Request::Delete(key) => {
                let removed = self.remove(key);
                replies.own.put_length(usize::from(removed));
            }
            Request::Append(key, more) => self.append(key, more, replies)?,
            Request::MultiGet(keys) => {
                // Known before it is built: a request of a few bytes may ask for many values.
                let size = keys.iter().map(|key| self.values.get(*key).map_or(8, Value::in_answer)).sum();
                make_room(&mut replies.own, size)?;
                keys.iter().for_each(|key| self.answer(key, &mut replies.own));
            }
            Request::MultiSet(pairs) => self.multi_set(&pairs, replies)?,
            Request::CancelWait => {
                self.stop_waiting(client);
                replies.own.push(WAIT_CANCELLED);
            }
            Request::Ping(number) => replies.own.put(&number.to_le_bytes()),
            Request::QueuePush(key, value) => {
                self.queue_push(key, value)?;
                self.wake_one(key, replies);
            }
            Request::QueuePop(key) => self.queue_pop(key, &mut replies.own),
            Request::QueueLen(key) => {
                replies.own.put_length(self.queues.get(key).map_or(0, VecDeque::len));
            }
            Request::ListKeys => {
                make_room(&mut replies.own, 8 + self.values.keys().map(|key| 8 + key.len()).sum::<usize>())?;
                replies.own.put_length(self.values.len());
                for key in self.values.keys() {
                    replies.own.put_length(key.len());
                    replies.own.put(key);
                }
            }
            Request::Barrier(key, size) => {
                let come = self.number(key)?.wrapping_add(1);
                self.stop_waiting(client);
                let count = Value::Small(come.to_string().into_bytes());
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
        let (held, limit) = (self.held(), self.limit);
        if held + more > limit { Err(Refused::Full { held, limit }) } else { Ok(()) }
    }

    /// A value for the store. It must have room before memory is asked for.
    fn copy(&self, value: &[u8]) -> Result<Value, Refused> {
        self.room_for(value.len())?;
        Ok(Value::copy(value, &self.live)?)
    }

    /// Adds the value of a key to an answer, an empty one if there is none.
    fn answer(&self, key: &[u8], answer: &mut Answer) {
        match self.values.get(key) {
            Some(value) => answer.put_value(value),
            None => answer.put_length(0),
        }
    }

    fn has(&self, key: &[u8]) -> bool {
        self.values.contains_key(key) || self.queues.get(key).is_some_and(|queue| !queue.is_empty())
    }

    fn set(&mut self, key: &[u8], value: Value, replies: &mut Replies) -> Result<(), Refused> {
        self.put(key, value)?;
        self.wake(key, replies);
        Ok(())
    }

    /// Stores a value and wakes no client.
    fn put(&mut self, key: &[u8], value: Value) -> Result<(), Refused> {
        self.room_for(key.len() + value.uncounted() + ENTRY)?;
        match self.values.get_mut(key) {
            Some(place) => {
                self.held += value.uncounted();
                self.held -= std::mem::replace(place, value).uncounted();
            }
            None => {
                self.values.try_reserve(1)?;
                let name = copy(key)?;
                self.held += key.len() + value.uncounted() + ENTRY;
                self.values.insert(name, value);
            }
        }
        Ok(())
    }

    /// Stores all of the pairs or none.
    fn multi_set(&mut self, pairs: &[(&[u8], &[u8])], replies: &mut Replies) -> Result<(), Refused> {
        let size = pairs.iter().map(|(key, value)| key.len() + value.len() + ENTRY).sum();
        self.room_for(size)?;
        let mut values = Vec::new();
        values.try_reserve_exact(pairs.len())?;
        for (_, value) in pairs {
            values.push(Value::copy(value, &self.live)?);
        }
        self.values.try_reserve(pairs.len())?;
        for ((key, _), value) in pairs.iter().zip(values) {
            self.set(key, value, replies)?;
        }
        Ok(())
    }

    fn append(&mut self, key: &[u8], more: &[u8], replies: &mut Replies) -> Result<(), Refused> {
        let Some(length) = self.values.get(key).map(Value::len) else {
            return self.set(key, self.copy(more)?, replies);
        };
        if length + more.len() > MAX_APPENDED {
            return Err(Refused::ValueTooLarge(length + more.len()));
        }
        // An answer that is being sent keeps the value as it was, so that there may be two.
        self.room_for(length + more.len())?;
        if let Some(value) = self.values.get_mut(key) {
            self.held -= value.uncounted();
            let appended = value.append(more, &self.live);
            self.held += value.uncounted();
            appended?;
        }
        // A client that waits although there is a value is in a barrier that counts here.
        self.wake(key, replies);
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
        self.held -= key.len() + value.uncounted() + ENTRY;
        true
    }

    /// The number at a key, 0 where there is none.
    fn number(&self, key: &[u8]) -> Result<i64, Refused> {
        let value = self.values.get(key);
        value.map_or(Ok(0), |value| leading_number(value.as_slice()).ok_or(Refused::NotANumber))
    }

    fn compare_set(
        &mut self,
        key: &[u8],
        expected: &[u8],
        desired: &[u8],
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        match self.values.get(key) {
            Some(value) if value.as_slice() != expected => {
                replies.own.put_value(value);
                return Ok(());
            }
            None if !expected.is_empty() => {
                make_room(&mut replies.own, 8 + expected.len())?;
                replies.own.put_length(expected.len());
                replies.own.put(expected);
                return Ok(());
            }
            _ => {}
        }
        self.set(key, self.copy(desired)?, replies)?;
        self.answer(key, &mut replies.own);
        Ok(())
    }

    fn queue_push(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refused> {
        self.room_for(key.len() + value.len() + ENTRY)?;
        let value = Value::copy(value, &self.live)?;
        let size = key.len() + value.uncounted() + ENTRY;
        if !self.queues.contains_key(key) {
            self.queues.try_reserve(1)?;
            let name = copy(key)?;
            self.queues.insert(name, VecDeque::new());
        }
        if let Some(queue) = self.queues.get_mut(key) {
            if let Err(error) = queue.try_reserve(1) {
                // No empty queue stays behind.
                if queue.is_empty() {
                    self.queues.remove(key);
                }
                return Err(error.into());
            }
            queue.push_back(value);
            self.held += size;
        }
        Ok(())
    }

    fn queue_pop(&mut self, key: &[u8], reply: &mut Answer) {
        let Some(queue) = self.queues.get_mut(key) else { return reply.put_length(0) };
        reply.put_length(queue.len());
        if let Some(value) = queue.pop_front() {
            self.held -= key.len() + value.uncounted() + ENTRY;
            reply.put_value(&value);
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

/// Makes room for so much more of an answer.
fn make_room(answer: &mut Answer, size: usize) -> Result<(), Refused> {
    if size > MAX_ANSWER {
        return Err(Refused::AnswerTooLarge(size));
    }
    Ok(answer.reserve(size)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What goes to whom.
    type Sent = Vec<(Connection, Vec<u8>)>;

    fn handle(store: &mut Store, client: Connection, request: Request<'_>) -> Sent {
        let mut replies = Replies::default();
        store.handle(client, request, &mut replies).unwrap();
        let own = (!replies.own.is_empty()).then_some((client, replies.own.to_vec()));
        own.into_iter().chain(replies.woken.into_iter().map(|woken| (woken, vec![READY]))).collect()
    }

    fn set(store: &mut Store, key: &str, value: &str) -> Sent {
        handle(store, 9, Request::Set(key.as_bytes(), value.as_bytes()))
    }

    fn text(bytes: &[u8]) -> Vec<u8> {
        [&number(bytes.len()), bytes].concat()
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
        assert_eq!(store.held(), 0);
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
        assert_eq!(store.held(), 3 * ENTRY + 3 + 9 + 2 * (ENTRY + 1) + 3 + 3 * 2 * (ENTRY + 1));
        handle(&mut store, 1, Request::QueuePop(b"q"));
        handle(&mut store, 1, Request::QueuePop(b"q"));
        for key in [b"a", b"b", b"n"] {
            handle(&mut store, 1, Request::Delete(key));
        }
        set(&mut store, "x", "");
        handle(&mut store, 1, Request::Delete(b"x"));
        store.disconnect(2);
        assert_eq!(store.held(), 0);
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
        assert_eq!(number, 110);
        assert!(error.to_string().contains("full"), "{error}");
        assert!(store.handle(1, Request::QueuePush(b"q", &value), &mut replies).is_err());
        assert!(store.handle(1, Request::MultiSet(vec![(b"k", &value)]), &mut replies).is_err());
        assert_eq!(handle(&mut store, 1, Request::NumKeys), [(1, 110_i64.to_le_bytes().to_vec())]);
    }

    const LARGE: usize = 1 << 20;

    #[test]
    fn one_large_value_in_many_places_of_answers_is_held_once() {
        let mut store = Store::new(MAX_HELD);
        let value = vec![7; LARGE];
        handle(&mut store, 1, Request::Set(b"k", &value));
        let held = store.held();
        let mut replies = Replies::default();
        // A request of some bytes for 300 MB.
        store.handle(1, Request::MultiGet(vec![b"k"; 300]), &mut replies).unwrap();
        assert_eq!(replies.own.len(), 300 * (8 + LARGE));
        assert_eq!(store.held(), held);
        assert!(replies.own.held() < LARGE, "{}", replies.own.held());
        // A value that a client has not taken yet counts although it is gone from the store.
        handle(&mut store, 2, Request::Delete(b"k"));
        assert_eq!(store.held(), LARGE);
        store.clear();
        assert_eq!(store.held(), LARGE);
        replies.own.clear();
        assert_eq!(store.held(), 0);
    }

    #[test]
    fn clients_that_do_not_read_cannot_make_the_store_hold_more_than_its_limit() {
        let mut store = Store::new(4 * LARGE);
        let value = vec![7; LARGE];
        let mut unread = Vec::new();
        let full = loop {
            let mut replies = Replies::default();
            let set = store.handle(1, Request::Set(b"k", &value), &mut replies);
            if let Err(full) = set.and_then(|()| store.handle(1, Request::Get(b"k"), &mut replies)) {
                break full;
            }
            unread.push(replies);
        };
        assert!(matches!(full, Refused::Full { .. }) && unread.len() == 3, "{full} {}", unread.len());
        unread.clear();
        set(&mut store, "k", "1");
        assert!(store.held() < LARGE);
    }

    #[test]
    fn largest_answers_are_known_before_they_are_built() {
        // As many keys as a request may have, each of the largest size that is copied.
        let mut store = Store::new(MAX_HELD);
        let value = vec![7; 1023];
        handle(&mut store, 1, Request::Set(b"k", &value));
        let mut replies = Replies::default();
        let keys = crate::store::codec::MAX_KEYS as usize;
        store.handle(1, Request::MultiGet(vec![b"k"; keys]), &mut replies).unwrap();
        assert!(replies.own.len() <= MAX_ANSWER && replies.own.held() <= MAX_ANSWER);
        replies.own = Answer::default();
        // Keys are copied: so many of 8 KiB that the list would be too long.
        let name = vec![b'k'; 8 << 10];
        for number in 0..MAX_ANSWER / name.len() + 1 {
            let key = [&name[8..], &number.to_le_bytes()].concat();
            handle(&mut store, 1, Request::Set(&key, b""));
        }
        let refused = store.handle(1, Request::ListKeys, &mut replies);
        assert!(matches!(refused, Err(Refused::AnswerTooLarge(_))), "{refused:?}");
        assert!(replies.own.is_empty() && replies.own.held() == 0);
    }

    #[test]
    fn appended_value_has_a_longest_size() {
        let mut store = Store::new(MAX_HELD);
        let more = vec![7; 8 << 20];
        let mut replies = Replies::default();
        for _ in 0..MAX_APPENDED / more.len() {
            store.handle(1, Request::Append(b"k", &more), &mut replies).unwrap();
        }
        let held = store.held();
        let refused = store.handle(1, Request::Append(b"k", b"1"), &mut replies);
        assert_eq!(refused, Err(Refused::ValueTooLarge(MAX_APPENDED + 1)));
        assert_eq!(store.held(), held);
        assert!(held < MAX_APPENDED + LARGE);
    }
}
