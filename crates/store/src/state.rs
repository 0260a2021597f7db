//! State of the store, and its answers. Pure.
//!
//! In the book: `docs/clusters.md#who-may-join`.

use std::collections::{BTreeMap, BTreeSet, HashMap, TryReserveError, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::codec::Request;
use crate::values::{Answer, MAX_ANSWER, Value, copy};

/// A client's connection.
pub type Connection = u64;

/// Default limit of the bytes that a store holds: keys, values and waits together.
pub const MAX_HELD: usize = 1 << 30;

/// Answer to a wait that has ended.
pub const READY: u8 = 0;
const NOT_READY: u8 = 1;
/// Answer to a cancelled wait.
pub const WAIT_CANCELLED: u8 = 1;

/// Maximum length in bytes of a value after an append. Torch's server has no limit here.
pub const MAX_APPENDED: usize = 64 << 20;

/// Approximate overhead of an entry in bytes: its slot in a half-full table, and two allocations.
const ENTRY: usize = 160;

/// A refused request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The store would exceed its limit.
    #[error("the store is full: it holds {held} bytes of at most {limit}")]
    Full {
        /// Bytes that it holds.
        held: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The value to add to is not a number.
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

/// Answers to send.
#[derive(Debug, Default)]
pub struct Replies {
    /// Answer to the client of the request.
    pub own: Answer,
    /// Other clients, each of which receives [`READY`].
    pub woken: Vec<Connection>,
}

/// A client's wait.
#[derive(Debug)]
struct Wait {
    /// Position among all waits.
    turn: u64,
    /// Keys that do not exist yet.
    missing: BTreeSet<Vec<u8>>,
}

/// The keys with their values, and the waiting clients.
#[derive(Debug)]
pub struct Store {
    values: HashMap<Vec<u8>, Value>,
    queues: HashMap<Vec<u8>, VecDeque<Value>>,
    waiting: HashMap<Connection, Wait>,
    /// The same waits by key, in order.
    waiters: HashMap<Vec<u8>, BTreeMap<u64, Connection>>,
    /// Number of waits begun so far.
    waits: u64,
    /// Bytes of all these, except those of large values.
    held: usize,
    /// Bytes of large values in the store or in pending answers.
    live: Arc<AtomicUsize>,
    limit: usize,
}

impl Store {
    /// Creates an empty store that holds at most `limit` bytes.
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

    /// Removes all keys, queues and waits. Large values in pending answers still count.
    pub fn clear(&mut self) {
        *self = Self { live: Arc::clone(&self.live), ..Self::new(self.limit) };
    }

    /// Returns the approximate bytes of the store and of the values in its answers.
    pub fn held(&self) -> usize {
        self.held + self.live.load(Ordering::Relaxed)
    }

    /// Removes a client's wait.
    pub fn disconnect(&mut self, client: Connection) {
        self.stop_waiting(client);
    }

    /// Handles a request, and adds the answers to `replies`.
    ///
    /// # Errors
    /// [`Refused`]; the store is unchanged.
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
                // Checked before the answer is built: a request of a few bytes may ask for many
                // values.
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
                // The count is a key like any other, as in torch's server: a client that cancels or
                // disconnects still counts.
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

    /// Copies a value, after checking the limit.
    fn copy(&self, value: &[u8]) -> Result<Value, Refused> {
        self.room_for(value.len())?;
        Ok(Value::copy(value, &self.live)?)
    }

    /// Adds the value of a key to an answer; an empty value if it is missing.
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

    /// Stores a value without waking waiting clients.
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
        // A pending answer keeps the old value, so both may exist at once.
        self.room_for(length + more.len())?;
        if let Some(value) = self.values.get_mut(key) {
            self.held -= value.uncounted();
            let appended = value.append(more, &self.live);
            self.held += value.uncounted();
            appended?;
        }
        // A client that waits for an existing value is in a barrier that counts in this key.
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

    /// Wakes one client per element: the first whose other keys exist.
    fn wake_one(&mut self, key: &[u8], replies: &mut Replies) {
        while let Some((_, client)) = self.waiters.get_mut(key).and_then(BTreeMap::pop_first) {
            self.held -= waiting_size(key);
            if self.arrived(client, key, replies) {
                break;
            }
        }
        self.forget_key_without_waiters(key);
    }

    /// Removes a key. A queue of the same name stays, as in torch's server.
    fn remove(&mut self, key: &[u8]) -> bool {
        let Some(value) = self.values.remove(key) else { return false };
        self.held -= key.len() + value.uncounted() + ENTRY;
        true
    }

    /// Returns the number at a key; 0 if it is missing.
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
                // An empty queue would count as an existing key.
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

    /// Notes that an awaited key exists. Returns whether it was the client's last one.
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

/// Returns the size of a waiting key, which is stored by client and by key.
fn waiting_size(key: &[u8]) -> usize {
    2 * (key.len() + ENTRY)
}

/// Parses the leading number like `std::stoll`, which torch's server uses.
fn leading_number(value: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t'..=b'\r');
    let text = &value[value.iter().take_while(|byte| blank(byte)).count()..];
    let sign = usize::from(matches!(text.first(), Some(b'+' | b'-')));
    let digits = text[sign..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&text[..sign + digits]).ok()?.parse().ok()
}

/// Reserves room in an answer.
fn make_room(answer: &mut Answer, size: usize) -> Result<(), Refused> {
    if size > MAX_ANSWER {
        return Err(Refused::AnswerTooLarge(size));
    }
    Ok(answer.reserve(size)?)
}

#[cfg(test)]
mod tests;
