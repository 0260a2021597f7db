//! Encoding of requests. Integers are little-endian; a string is a u64 length and its bytes.
//!
//! Lengths are checked against torch's own limits before memory is allocated.
//!
//! In the book: `docs/clusters.md#who-may-join`.

/// Value of a client's first request.
pub const VALIDATION_MAGIC: u32 = 0x3C85_F7CE;
/// Command of a client's first request.
pub const VALIDATE: u8 = 0;
/// Maximum length of a key in bytes.
pub const MAX_KEY: u64 = 8 << 10;
/// Maximum length of a value in bytes.
pub const MAX_VALUE: u64 = 8 << 20;
/// Maximum number of keys in one request.
pub const MAX_KEYS: u64 = 128 << 10;
/// Maximum length of a request in bytes; more than any client of torch sends.
pub const MAX_REQUEST: usize = 64 << 20;

/// A request of a client, borrowed from the bytes that it was decoded from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request<'a> {
    /// Validates the protocol; the first request of a connection.
    Validate,
    /// Stores a value.
    Set(&'a [u8], &'a [u8]),
    /// Stores `desired` if the value is `expected`.
    CompareSet {
        /// Key.
        key: &'a [u8],
        /// Expected value; empty also matches a missing value.
        expected: &'a [u8],
        /// New value.
        desired: &'a [u8],
    },
    /// Reads a value; empty if it is missing.
    Get(&'a [u8]),
    /// Adds to a decimal number.
    Add(&'a [u8], i64),
    /// Answers whether all keys exist.
    Check(Vec<&'a [u8]>),
    /// Answers once all keys exist.
    Wait(Vec<&'a [u8]>),
    /// Answers with the number of keys.
    NumKeys,
    /// Removes a key.
    Delete(&'a [u8]),
    /// Appends to a value.
    Append(&'a [u8], &'a [u8]),
    /// Reads several values.
    MultiGet(Vec<&'a [u8]>),
    /// Stores several values.
    MultiSet(Vec<(&'a [u8], &'a [u8])>),
    /// Cancels this client's wait.
    CancelWait,
    /// Answers with the same number.
    Ping(u32),
    /// Appends to a queue.
    QueuePush(&'a [u8], &'a [u8]),
    /// Removes the first element of a queue.
    QueuePop(&'a [u8]),
    /// Answers with the length of a queue.
    QueueLen(&'a [u8]),
    /// Answers with all keys.
    ListKeys,
    /// Answers once this many clients have entered.
    Barrier(&'a [u8], i64),
}

/// Bytes that are not a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The first request did not carry [`VALIDATION_MAGIC`].
    #[error("the client is none of c10d's TCPStore (it starts with {0:#010x})")]
    Magic(u32),
    /// The command is unknown.
    #[error("{0} is not a request of the store")]
    Command(u8),
    /// A length is over its limit.
    #[error("{what} of {given} is over the limit of {limit}")]
    TooLarge {
        /// The field that is too large.
        what: &'static str,
        /// Its length.
        given: u64,
        /// The limit.
        limit: u64,
    },
}

/// Decodes the first request of `bytes`, and returns it with its length; `None` if more bytes are
/// needed.
///
/// # Errors
/// [`CodecError`]; the connection is unusable after one.
pub fn decode(bytes: &[u8]) -> Result<Option<(Request<'_>, usize)>, CodecError> {
    let mut scan = Scan::default();
    if !scan.advance(bytes)? {
        return Ok(None);
    }
    Ok(Reader { bytes, at: 0 }.request()?.map(|request| (request, scan.at)))
}

/// Encodes a request as a client sends it.
pub fn encode(request: &Request<'_>, bytes: &mut Vec<u8>) {
    let mut put = |command: u8, strings: &[&[u8]]| {
        bytes.push(command);
        strings.iter().for_each(|string| put_string(string, bytes));
    };
    match request {
        Request::Validate => {
            bytes.push(VALIDATE);
            bytes.extend(VALIDATION_MAGIC.to_le_bytes());
        }
        Request::Set(key, value) => put(1, &[key, value]),
        Request::CompareSet { key, expected, desired } => put(2, &[key, expected, desired]),
        Request::Get(key) => put(3, &[key]),
        Request::Add(key, amount) => {
            put(4, &[key]);
            bytes.extend(amount.to_le_bytes());
        }
        Request::Check(keys) => put_keys(5, keys, bytes),
        Request::Wait(keys) => put_keys(6, keys, bytes),
        Request::NumKeys => bytes.push(7),
        Request::Delete(key) => put(8, &[key]),
        Request::Append(key, value) => put(9, &[key, value]),
        Request::MultiGet(keys) => put_keys(10, keys, bytes),
        Request::MultiSet(pairs) => {
            bytes.push(11);
            bytes.extend((pairs.len() as u64).to_le_bytes());
            for (key, value) in pairs {
                put_string(key, bytes);
                put_string(value, bytes);
            }
        }
        Request::CancelWait => bytes.push(12),
        Request::Ping(number) => {
            bytes.push(13);
            bytes.extend(number.to_le_bytes());
        }
        Request::QueuePush(key, value) => put(14, &[key, value]),
        Request::QueuePop(key) => put(15, &[key]),
        Request::QueueLen(key) => put(16, &[key]),
        Request::ListKeys => bytes.push(17),
        Request::Barrier(key, size) => {
            put(18, &[key]);
            bytes.extend(size.to_le_bytes());
        }
    }
}

fn put_string(string: &[u8], bytes: &mut Vec<u8>) {
    bytes.extend((string.len() as u64).to_le_bytes());
    bytes.extend(string);
}

fn put_keys(command: u8, keys: &[&[u8]], bytes: &mut Vec<u8>) {
    bytes.push(command);
    bytes.extend((keys.len() as u64).to_le_bytes());
    keys.iter().for_each(|key| put_string(key, bytes));
}

#[derive(Clone, Copy)]
enum Field {
    /// A field of this many bytes.
    Fixed(usize),
    Key,
    Value,
}

/// Fields after a command: once, or as a counted list.
enum Layout {
    Once(&'static [Field]),
    List(&'static [Field]),
}

fn layout(command: u8) -> Result<Layout, CodecError> {
    use Field::{Fixed, Key, Value};
    use Layout::{List, Once};
    Ok(match command {
        VALIDATE | 13 => Once(&[Fixed(4)]),
        1 | 9 | 14 => Once(&[Key, Value]),
        2 => Once(&[Key, Value, Value]),
        3 | 8 | 15 | 16 => Once(&[Key]),
        4 | 18 => Once(&[Key, Fixed(8)]),
        5 | 6 | 10 => List(&[Key]),
        7 | 12 | 17 => Once(&[]),
        11 => List(&[Key, Value]),
        other => return Err(CodecError::Command(other)),
    })
}

/// Progress of checking a request that arrives in pieces: its bytes are scanned once, however many
/// pieces there are.
#[derive(Debug, Default)]
pub struct Scan {
    /// Length of the scanned part.
    at: usize,
    /// Number of complete fields, over all items.
    fields: u64,
    /// Number of items of a list, once its bytes have arrived.
    items: Option<u64>,
}

impl Scan {
    /// Continues the scan with the same bytes and those that have arrived since. Returns whether
    /// the request is complete.
    ///
    /// # Errors
    /// [`CodecError`]; the connection is unusable after one.
    pub fn advance(&mut self, bytes: &[u8]) -> Result<bool, CodecError> {
        let Some(command) = bytes.first() else { return Ok(false) };
        self.at = self.at.max(1);
        let (fields, items) = match layout(*command)? {
            Layout::Once(fields) => (fields, 1),
            Layout::List(fields) => {
                if self.items.is_none() {
                    self.items = self.length(bytes, "a number of keys", MAX_KEYS)?;
                    self.at += if self.items.is_some() { 8 } else { 0 };
                }
                let Some(items) = self.items else { return Ok(false) };
                (fields, items)
            }
        };
        let count = fields.len() as u64;
        while self.fields < count * items {
            let size = match fields[(self.fields % count) as usize] {
                Field::Fixed(size) => Some(size),
                Field::Key => self.string(bytes, "a key", MAX_KEY)?,
                Field::Value => self.string(bytes, "a value", MAX_VALUE)?,
            };
            match size {
                Some(size) if bytes.len() - self.at >= size => self.at += size,
                _ => return Ok(false),
            }
            self.fields += 1;
        }
        Ok(true)
    }

    /// Returns the size of a string with its length, once that has arrived.
    fn string(&self, bytes: &[u8], what: &'static str, limit: u64) -> Result<Option<usize>, CodecError> {
        Ok(self.length(bytes, what, limit)?.map(|length| 8 + length as usize))
    }

    fn length(&self, bytes: &[u8], what: &'static str, limit: u64) -> Result<Option<u64>, CodecError> {
        let given =
            bytes.get(self.at..).and_then(|rest| rest.first_chunk()).map(|field| u64::from_le_bytes(*field));
        match given {
            Some(given) if given > limit => Err(CodecError::TooLarge { what, given, limit }),
            given => Ok(given),
        }
    }

    /// Returns the request of the scanned bytes and its length. `None` for a complete request means
    /// that there is no memory for its list of keys.
    ///
    /// # Errors
    /// [`CodecError`]; the connection is unusable after one.
    pub fn request<'a>(&self, bytes: &'a [u8]) -> Result<Option<(Request<'a>, usize)>, CodecError> {
        Ok(Reader { bytes, at: 0 }.request()?.map(|request| (request, self.at)))
    }
}

/// Decodes bytes that a [`Scan`] has found to be complete.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn request(&mut self) -> Result<Option<Request<'a>>, CodecError> {
        if let [VALIDATE, magic @ ..] = self.bytes {
            let magic = magic.first_chunk().map(|magic| u32::from_le_bytes(*magic));
            return match magic {
                Some(magic) if magic != VALIDATION_MAGIC => Err(CodecError::Magic(magic)),
                magic => Ok(magic.map(|_| Request::Validate)),
            };
        }
        Ok(self.fields())
    }

    fn fields(&mut self) -> Option<Request<'a>> {
        let [command] = self.take()?;
        Some(match command {
            1 => Request::Set(self.string()?, self.string()?),
            2 => {
                Request::CompareSet { key: self.string()?, expected: self.string()?, desired: self.string()? }
            }
            3 => Request::Get(self.string()?),
            4 => Request::Add(self.string()?, self.integer()?),
            5 => Request::Check(self.list(Self::string)?),
            6 => Request::Wait(self.list(Self::string)?),
            7 => Request::NumKeys,
            8 => Request::Delete(self.string()?),
            9 => Request::Append(self.string()?, self.string()?),
            10 => Request::MultiGet(self.list(Self::string)?),
            11 => Request::MultiSet(self.list(|reader| Some((reader.string()?, reader.string()?)))?),
            12 => Request::CancelWait,
            13 => Request::Ping(u32::from_le_bytes(self.take()?)),
            14 => Request::QueuePush(self.string()?, self.string()?),
            15 => Request::QueuePop(self.string()?),
            16 => Request::QueueLen(self.string()?),
            17 => Request::ListKeys,
            18 => Request::Barrier(self.string()?, self.integer()?),
            _ => return None,
        })
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = self.bytes.get(self.at..)?.first_chunk::<N>()?;
        self.at += N;
        Some(*bytes)
    }

    fn integer(&mut self) -> Option<i64> {
        Some(i64::from_le_bytes(self.take()?))
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let len = u64::from_le_bytes(self.take()?) as usize;
        let bytes = self.bytes.get(self.at..)?.get(..len)?;
        self.at += len;
        Some(bytes)
    }

    /// Decodes a list, which the scan has limited to [`MAX_KEYS`] items. Returns `None` also if
    /// there is no memory for it.
    fn list<T>(&mut self, item: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = u64::from_le_bytes(self.take()?) as usize;
        let mut items = Vec::new();
        items.try_reserve_exact(count).ok()?;
        for _ in 0..count {
            items.push(item(self)?);
        }
        Some(items)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn string(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
    }

    #[test]
    fn request_is_decoded_only_once_it_is_complete() {
        let multi_set =
            [&[11][..], &2_u64.to_le_bytes(), &string(b"a"), &string(b"1"), &string(b"b"), &string(b"")];
        let bytes = multi_set.concat();
        for cut in 0..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), Ok(None), "{cut}");
        }
        let expected = Request::MultiSet(vec![(b"a", b"1"), (b"b", b"")]);
        assert_eq!(decode(&[bytes.clone(), vec![7]].concat()), Ok(Some((expected.clone(), bytes.len()))));
        // In pieces, each of which is scanned once.
        let mut scan = Scan::default();
        for cut in 0..bytes.len() {
            assert_eq!(scan.advance(&bytes[..cut]), Ok(false), "{cut}");
        }
        assert_eq!(scan.advance(&bytes), Ok(true));
        assert_eq!(scan.request(&bytes), Ok(Some((expected, bytes.len()))));
    }

    #[test]
    fn limits_are_checked_before_the_bytes_arrive() {
        for (command, given) in [(3, MAX_KEY + 1), (5, MAX_KEYS + 1), (10, u64::MAX)] {
            let bytes = [&[command][..], &given.to_le_bytes()].concat();
            assert!(matches!(decode(&bytes), Err(CodecError::TooLarge { .. })), "{command}");
        }
        assert_eq!(decode(&[0, 1, 2, 3, 4]), Err(CodecError::Magic(0x0403_0201)));
        assert_eq!(decode(&[99]), Err(CodecError::Command(99)));
    }

    /// A request of each kind.
    fn request<'a>(kind: u8, a: &'a [u8], b: &'a [u8], number: i64) -> Request<'a> {
        match kind {
            0 => Request::Validate,
            1 => Request::Set(a, b),
            2 => Request::CompareSet { key: a, expected: b, desired: a },
            3 => Request::Get(a),
            4 => Request::Add(a, number),
            5 => Request::Check(vec![a, b]),
            6 => Request::Wait(vec![a]),
            7 => Request::NumKeys,
            8 => Request::Delete(a),
            9 => Request::Append(a, b),
            10 => Request::MultiGet(vec![a, b, a]),
            11 => Request::MultiSet(vec![(a, b), (b, a)]),
            12 => Request::CancelWait,
            13 => Request::Ping(number as u32),
            14 => Request::QueuePush(a, b),
            15 => Request::QueuePop(a),
            16 => Request::QueueLen(a),
            17 => Request::ListKeys,
            _ => Request::Barrier(a, number),
        }
    }

    proptest! {
        #[test]
        fn encoded_value_round_trips(
            kind in 0_u8..19, number in any::<i64>(),
            a in proptest::collection::vec(any::<u8>(), 0..40), b in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let request = request(kind, &a, &b, number);
            let mut bytes = Vec::new();
            encode(&request, &mut bytes);
            prop_assert_eq!(bytes[0], kind);
            prop_assert_eq!(decode(&bytes), Ok(Some((request, bytes.len()))));
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(Some((_, read))) = decode(&bytes) {
                prop_assert!(read <= bytes.len());
            }
        }
    }
}
