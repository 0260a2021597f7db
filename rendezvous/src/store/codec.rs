//! Requests as bytes. All integers are little-endian; a string is a u64 length and its bytes.
//!
//! Nothing is allocated before its length is within the limits, which are torch's own.

/// The value that a client's first request carries.
pub const VALIDATION_MAGIC: u32 = 0x3C85_F7CE;
/// The command of a client's first request.
pub const VALIDATE: u8 = 0;
/// Longest key, in bytes.
pub const MAX_KEY: u64 = 8 << 10;
/// Longest value, in bytes.
pub const MAX_VALUE: u64 = 8 << 20;
/// Most keys in one request.
pub const MAX_KEYS: u64 = 128 << 10;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The client is one of TCPStore; the first request of a connection.
    Validate,
    /// Stores a value.
    Set(Vec<u8>, Vec<u8>),
    /// Stores `desired` if the value is `expected`.
    CompareSet {
        /// The key.
        key: Vec<u8>,
        /// What must be there; empty also stands for nothing.
        expected: Vec<u8>,
        /// What shall be there.
        desired: Vec<u8>,
    },
    /// Reads a value that is there.
    Get(Vec<u8>),
    /// Adds to a decimal number.
    Add(Vec<u8>, i64),
    /// Whether all keys are there.
    Check(Vec<Vec<u8>>),
    /// Answers once all keys are there.
    Wait(Vec<Vec<u8>>),
    /// How many keys there are.
    NumKeys,
    /// Removes a key.
    Delete(Vec<u8>),
    /// Appends to a value.
    Append(Vec<u8>, Vec<u8>),
    /// Reads several values.
    MultiGet(Vec<Vec<u8>>),
    /// Stores several values.
    MultiSet(Vec<(Vec<u8>, Vec<u8>)>),
    /// Ends this client's wait.
    CancelWait,
    /// Answers with the number.
    Ping(u32),
    /// Appends to a queue.
    QueuePush(Vec<u8>, Vec<u8>),
    /// Takes from the front of a queue.
    QueuePop(Vec<u8>),
    /// How long a queue is.
    QueueLen(Vec<u8>),
    /// All keys.
    ListKeys,
    /// Answers once so many clients have asked.
    Barrier(Vec<u8>, i64),
}

/// Why bytes are no request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The first request did not carry [`VALIDATION_MAGIC`].
    #[error("the client is none of c10d's TCPStore (it starts with {0:#010x})")]
    Magic(u32),
    /// There is no such request.
    #[error("{0} is not a request of the store")]
    Command(u8),
    /// A length is over its limit.
    #[error("{what} of {given} is over the limit of {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// How large it would be.
        given: u64,
        /// How large it may be.
        limit: u64,
    },
}

/// Reads the first request of `bytes` and how many bytes it took; `None` where more bytes are needed.
///
/// # Errors
/// [`CodecError`]; the connection is of no use after one.
pub fn decode(bytes: &[u8]) -> Result<Option<(Request, usize)>, CodecError> {
    let mut reader = Reader { bytes, at: 0 };
    match reader.request() {
        Ok(request) => Ok(Some((request, reader.at))),
        Err(Stop::Incomplete) => Ok(None),
        Err(Stop::Invalid(error)) => Err(error),
    }
}

enum Stop {
    Incomplete,
    Invalid(CodecError),
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn request(&mut self) -> Result<Request, Stop> {
        let [command] = self.take()?;
        Ok(match command {
            VALIDATE => match u32::from_le_bytes(self.take()?) {
                VALIDATION_MAGIC => Request::Validate,
                other => return Err(Stop::Invalid(CodecError::Magic(other))),
            },
            1 => Request::Set(self.key()?, self.value()?),
            2 => Request::CompareSet { key: self.key()?, expected: self.value()?, desired: self.value()? },
            3 => Request::Get(self.key()?),
            4 => Request::Add(self.key()?, self.integer()?),
            5 => Request::Check(self.keys()?),
            6 => Request::Wait(self.keys()?),
            7 => Request::NumKeys,
            8 => Request::Delete(self.key()?),
            9 => Request::Append(self.key()?, self.value()?),
            10 => Request::MultiGet(self.keys()?),
            11 => Request::MultiSet(self.list(|reader| Ok((reader.key()?, reader.value()?)))?),
            12 => Request::CancelWait,
            13 => Request::Ping(u32::from_le_bytes(self.take()?)),
            14 => Request::QueuePush(self.key()?, self.value()?),
            15 => Request::QueuePop(self.key()?),
            16 => Request::QueueLen(self.key()?),
            17 => Request::ListKeys,
            18 => Request::Barrier(self.key()?, self.integer()?),
            other => return Err(Stop::Invalid(CodecError::Command(other))),
        })
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let bytes =
            self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<N>()).ok_or(Stop::Incomplete)?;
        self.at += N;
        Ok(*bytes)
    }

    fn integer(&mut self) -> Result<i64, Stop> {
        Ok(i64::from_le_bytes(self.take()?))
    }

    fn length(&mut self, what: &'static str, limit: u64) -> Result<usize, Stop> {
        let given = u64::from_le_bytes(self.take()?);
        if given > limit {
            return Err(Stop::Invalid(CodecError::TooLarge { what, given, limit }));
        }
        usize::try_from(given).map_err(|_| Stop::Invalid(CodecError::TooLarge { what, given, limit }))
    }

    fn string(&mut self, what: &'static str, limit: u64) -> Result<Vec<u8>, Stop> {
        let len = self.length(what, limit)?;
        let bytes = self.bytes.get(self.at..self.at + len).ok_or(Stop::Incomplete)?;
        self.at += len;
        Ok(bytes.to_vec())
    }

    fn key(&mut self) -> Result<Vec<u8>, Stop> {
        self.string("a key", MAX_KEY)
    }

    fn value(&mut self) -> Result<Vec<u8>, Stop> {
        self.string("a value", MAX_VALUE)
    }

    fn keys(&mut self) -> Result<Vec<Vec<u8>>, Stop> {
        self.list(Self::key)
    }

    /// Grows with the bytes that are there, not with the count that is claimed.
    fn list<T>(&mut self, item: impl Fn(&mut Self) -> Result<T, Stop>) -> Result<Vec<T>, Stop> {
        let count = self.length("a number of keys", MAX_KEYS)?;
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(item(self)?);
        }
        Ok(list)
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
    fn a_request_is_read_from_any_prefix_only_when_it_is_whole() {
        let multi_set =
            [&[11][..], &2_u64.to_le_bytes(), &string(b"a"), &string(b"1"), &string(b"b"), &string(b"")];
        let bytes = multi_set.concat();
        for cut in 0..bytes.len() {
            assert_eq!(decode(&bytes[..cut]), Ok(None), "{cut}");
        }
        let expected = Request::MultiSet(vec![(b"a".into(), b"1".into()), (b"b".into(), vec![])]);
        assert_eq!(decode(&[bytes.clone(), vec![7]].concat()), Ok(Some((expected, bytes.len()))));
    }

    #[test]
    fn limits_hold_before_the_bytes_arrive() {
        for (command, given) in [(3, MAX_KEY + 1), (5, MAX_KEYS + 1), (10, u64::MAX)] {
            let bytes = [&[command][..], &given.to_le_bytes()].concat();
            assert!(matches!(decode(&bytes), Err(CodecError::TooLarge { .. })), "{command}");
        }
        assert_eq!(decode(&[0, 1, 2, 3, 4]), Err(CodecError::Magic(0x0403_0201)));
        assert_eq!(decode(&[99]), Err(CodecError::Command(99)));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(Some((_, read))) = decode(&bytes) {
                prop_assert!(read <= bytes.len());
            }
        }
    }
}
