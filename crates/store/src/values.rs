//! Values, and the answers that contain them.
//!
//! A large value exists once, however many answers contain it: broadcasting 8 MiB to a thousand
//! slow readers takes 8 MiB, and so does reading one key a thousand times.
//!
//! In the book: `docs/clusters.md#who-may-join`.

use std::collections::{TryReserveError, VecDeque};
use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::codec::MAX_KEYS;

/// Minimum size of a value that answers share; smaller values are copied.
const SHARED: usize = 1 << 10;

/// Maximum of bytes of an answer, except shared values: enough for any
/// [`MultiGet`](crate::codec::Request::MultiGet).
pub const MAX_ANSWER: usize = MAX_KEYS as usize * (SHARED + 8 + ENTRY);

/// Size of a reference to a shared value in an answer.
const ENTRY: usize = size_of::<(usize, Arc<SharedBytes>)>();

/// The bytes of a large value. They count as held until the last answer with them is sent, and not
/// only until the store drops the value; otherwise clients that do not read could make the process
/// hold any amount.
#[derive(Debug)]
pub struct SharedBytes {
    bytes: Vec<u8>,
    live: Arc<AtomicUsize>,
}

impl SharedBytes {
    fn new(bytes: Vec<u8>, live: &Arc<AtomicUsize>) -> Arc<Self> {
        live.fetch_add(bytes.len(), Ordering::Relaxed);
        Arc::new(Self { bytes, live: Arc::clone(live) })
    }
}

impl Drop for SharedBytes {
    fn drop(&mut self) {
        self.live.fetch_sub(self.bytes.len(), Ordering::Relaxed);
    }
}

/// A value in the store.
#[derive(Debug)]
pub(super) enum Value {
    Small(Vec<u8>),
    Shared(Arc<SharedBytes>),
}

impl Value {
    /// Copies bytes. `live` counts those of large values.
    pub(super) fn copy(bytes: &[u8], live: &Arc<AtomicUsize>) -> Result<Self, TryReserveError> {
        let bytes = copy(bytes)?;
        Ok(if bytes.len() < SHARED {
            Self::Small(bytes)
        } else {
            Self::Shared(SharedBytes::new(bytes, live))
        })
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Small(bytes) => bytes,
            Self::Shared(large) => &large.bytes,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// Returns the bytes that `live` does not count.
    pub(super) fn uncounted(&self) -> usize {
        if let Self::Small(bytes) = self { bytes.len() } else { 0 }
    }

    /// Returns the size of this value in an answer, without shared bytes.
    pub(super) fn in_answer(&self) -> usize {
        8 + if let Self::Small(bytes) = self { bytes.len() } else { ENTRY }
    }

    /// Appends bytes. Pending answers keep the old value.
    pub(super) fn append(&mut self, more: &[u8], live: &Arc<AtomicUsize>) -> Result<(), TryReserveError> {
        let length = self.len() + more.len();
        if let Self::Small(bytes) = self
            && length < SHARED
        {
            bytes.try_reserve(more.len())?;
            bytes.extend_from_slice(more);
            return Ok(());
        }
        if let Self::Shared(large) = self
            && let Some(SharedBytes { bytes, .. }) = Arc::get_mut(large)
        {
            // A vector would double its capacity, which is more than is counted.
            if bytes.capacity() < length {
                bytes.try_reserve_exact(more.len().max(bytes.len() / 8))?;
            }
            bytes.extend_from_slice(more);
            live.fetch_add(more.len(), Ordering::Relaxed);
            return Ok(());
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(length)?;
        bytes.extend_from_slice(self.as_slice());
        bytes.extend_from_slice(more);
        *self = Self::Shared(SharedBytes::new(bytes, live));
        Ok(())
    }
}

/// Copies bytes, if there is memory.
pub(super) fn copy(bytes: &[u8]) -> Result<Vec<u8>, TryReserveError> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(bytes.len())?;
    copy.extend_from_slice(bytes);
    Ok(copy)
}

/// Bytes for one client: its own, with shared values in between.
#[derive(Debug, Default)]
pub struct Answer {
    bytes: Vec<u8>,
    /// Shared values with their positions in `bytes`.
    shared: VecDeque<(usize, Arc<SharedBytes>)>,
    /// Total length of the shared values.
    spliced: usize,
}

impl Answer {
    /// Returns the number of bytes that the client receives.
    pub fn len(&self) -> usize {
        self.bytes.len() + self.spliced
    }

    /// Returns whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.shared.is_empty()
    }

    /// Returns whether it contains shared values.
    pub fn has_shared(&self) -> bool {
        !self.shared.is_empty()
    }

    /// Returns its own bytes, without shared values.
    pub fn own(&self) -> &[u8] {
        &self.bytes
    }

    /// Clears it, and keeps its capacity.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.shared.clear();
        self.spliced = 0;
    }

    /// Returns its memory in bytes, without shared values.
    pub fn held(&self) -> usize {
        self.bytes.capacity() + self.shared.capacity() * ENTRY
    }

    /// Reserves room for `size` bytes of its own.
    pub(super) fn reserve(&mut self, size: usize) -> Result<(), TryReserveError> {
        self.bytes.try_reserve(size)
    }

    /// Appends a byte.
    pub fn push(&mut self, byte: u8) {
        self.bytes.push(byte);
    }

    /// Appends bytes.
    pub fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn put_length(&mut self, length: usize) {
        self.put(&(length as i64).to_le_bytes());
    }

    /// Appends the length of a value and the value.
    pub(super) fn put_value(&mut self, value: &Value) {
        self.put_length(value.len());
        match value {
            Value::Small(bytes) => self.put(bytes),
            Value::Shared(large) => {
                self.spliced += large.bytes.len();
                self.shared.push_back((self.bytes.len(), Arc::clone(large)));
            }
        }
    }

    /// Returns all of its bytes in order.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.len());
        let mut at = 0;
        for (before, large) in &self.shared {
            all.extend_from_slice(&self.bytes[at..*before]);
            all.extend_from_slice(&large.bytes);
            at = *before;
        }
        all.extend_from_slice(&self.bytes[at..]);
        all
    }
}

/// An answer that is partly sent.
#[derive(Debug, Default)]
pub struct Sending {
    answer: Answer,
    /// Number of its own bytes that are sent.
    at: usize,
    /// Number of bytes of the first shared value that are sent.
    within: usize,
}

impl Sending {
    /// Begins to send an answer, of which the first `sent` bytes are sent. If the bytes fill less
    /// than half of the capacity they are copied, and `answer` keeps its buffer.
    ///
    /// # Errors
    /// There is no memory for the copy.
    pub fn begin(answer: &mut Answer, sent: usize) -> Result<Self, TryReserveError> {
        if answer.shared.is_empty() && answer.bytes.len() - sent < answer.bytes.capacity() / 2 {
            let bytes = copy(&answer.bytes[sent..])?;
            return Ok(Self { answer: Answer { bytes, ..Answer::default() }, ..Self::default() });
        }
        let mut sending = Self { answer: std::mem::take(answer), ..Self::default() };
        sending.sent(sent);
        Ok(sending)
    }

    /// Returns its memory in bytes, without shared values.
    pub fn held(&self) -> usize {
        self.answer.held()
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// There is no memory for them.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), TryReserveError> {
        self.answer.reserve(bytes.len())?;
        self.answer.put(bytes);
        Ok(())
    }

    /// Fills `slices` with the bytes to send next, and returns their number: 0 once all is sent.
    pub fn next<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let Answer { bytes, shared, .. } = &self.answer;
        let (mut at, mut within, mut count) = (self.at, self.within, 0);
        let mut put = |slice: &'a [u8]| {
            let Some(place) = slices.get_mut(count) else { return false };
            if !slice.is_empty() {
                *place = IoSlice::new(slice);
                count += 1;
            }
            true
        };
        for (before, large) in shared {
            if !put(&bytes[at..*before]) || !put(&large.bytes[within..]) {
                return count;
            }
            (at, within) = (*before, 0);
        }
        put(&bytes[at..]);
        count
    }

    /// Notes that `more` bytes were sent. A shared value is dropped once all of it is.
    pub fn sent(&mut self, mut more: usize) {
        while let Some((before, large)) = self.answer.shared.front() {
            let own = (before - self.at).min(more);
            self.at += own;
            more -= own;
            let of_value = (large.bytes.len() - self.within).min(more);
            self.within += of_value;
            more -= of_value;
            if self.at < *before || self.within < large.bytes.len() {
                return;
            }
            self.answer.shared.pop_front();
            self.within = 0;
        }
        self.at += more;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_sent_in_any_pieces_arrives_unchanged() {
        let live = Arc::default();
        let value = |byte: u8, size| Value::copy(&vec![byte; size], &live).unwrap();
        let mut answer = Answer::default();
        answer.push(1);
        for (byte, size) in [(2, SHARED), (3, 5), (4, SHARED * 3), (5, SHARED + 1)] {
            answer.put_value(&value(byte, size));
        }
        answer.put(b"end");
        let all = answer.to_vec();
        assert_eq!(all.len(), answer.len());
        answer.clear();
        for piece in [1, 7, SHARED, SHARED * 2 + 3, usize::MAX] {
            let mut answer = Answer::default();
            answer.push(1);
            for (byte, size) in [(2, SHARED), (3, 5), (4, SHARED * 3), (5, SHARED + 1)] {
                answer.put_value(&value(byte, size));
            }
            let mut sending = Sending::begin(&mut answer, 0).unwrap();
            assert!(answer.is_empty());
            sending.put(b"end").unwrap();
            let mut received = Vec::new();
            loop {
                let mut slices = [IoSlice::new(&[]); 3];
                let count = sending.next(&mut slices);
                if count == 0 {
                    break;
                }
                let bytes: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.iter().copied()).collect();
                let sent = bytes.len().min(piece);
                received.extend_from_slice(&bytes[..sent]);
                sending.sent(sent);
            }
            assert_eq!(received, all, "{piece}");
            // All shared values are dropped by now.
            assert_eq!(live.load(Ordering::Relaxed), 0);
        }
    }

    #[test]
    fn appending_to_a_value_does_not_change_pending_answers() {
        let live = Arc::default();
        let mut value = Value::copy(&[1; SHARED - 1], &live).unwrap();
        assert_eq!((value.uncounted(), live.load(Ordering::Relaxed)), (SHARED - 1, 0));
        value.append(&[2], &live).unwrap();
        assert_eq!((value.uncounted(), live.load(Ordering::Relaxed)), (0, SHARED));
        value.append(&[3], &live).unwrap();
        let mut answer = Answer::default();
        answer.put_value(&value);
        let before = answer.to_vec();
        value.append(&[4], &live).unwrap();
        assert_eq!(answer.to_vec(), before);
        assert_eq!(value.as_slice()[SHARED - 1..], [2, 3, 4]);
        assert_eq!(live.load(Ordering::Relaxed), SHARED + 1 + SHARED + 2);
        drop(answer);
        assert_eq!(live.load(Ordering::Relaxed), SHARED + 2);
    }
}
