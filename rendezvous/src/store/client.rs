//! A client of TCPStore servers, of this crate and of torch.
//!
//! In the book: `docs/clusters.md#who-may-join`.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio::time::timeout;

use super::codec::{self, MAX_KEY, MAX_KEYS, MAX_REQUEST, MAX_VALUE, Request};
use super::state::{MAX_HELD, READY, WAIT_CANCELLED};

/// Timeout of the store's confirmation that a wait has ended.
const PROMPT: Duration = Duration::from_secs(30);

/// A failed operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection failed; the client is unusable.
    #[error("the store at {address}: {source}")]
    Io {
        /// Address of the store.
        address: String,
        /// Error of the system.
        source: io::Error,
    },
    /// Keys were not set in time; the client stays usable.
    #[error("no {} in the store within {limit:?}", keys.join(", "))]
    Timeout {
        /// The awaited keys.
        keys: Vec<String>,
        /// Timeout of the wait.
        limit: Duration,
    },
    /// The request is over a limit of the store; nothing was sent.
    #[error("{what} of {given} bytes is over the store's limit of {limit}")]
    TooLarge {
        /// The value that is too large.
        what: &'static str,
        /// Its size in bytes.
        given: usize,
        /// The limit in bytes.
        limit: u64,
    },
    /// The answer is invalid.
    #[error("what answers at {address} is no store: {what}")]
    Protocol {
        /// Address of the peer.
        address: String,
        /// The problem.
        what: &'static str,
    },
}

/// A connection to the store.
///
/// Keys are stored with a leading `/`, like those of torch's clients, so both find each other's
/// keys. With a prefix, keys are those of `torch.distributed.PrefixStore`.
pub struct Client {
    stream: TcpStream,
    /// Address as given, for messages.
    address: String,
    /// Prefix of every key.
    prefix: Vec<u8>,
    /// Timeout of waits.
    limit: Duration,
    request: Vec<u8>,
}

impl Client {
    /// Connects, and checks that the peer is a store. `limit` is the timeout of connecting, and
    /// later of each wait.
    ///
    /// # Errors
    /// [`Error::Io`] if no peer answers in time, [`Error::Protocol`] if the peer is not a store.
    pub async fn connect(address: impl ToSocketAddrs + ToString, limit: Duration) -> Result<Self, Error> {
        let name = address.to_string();
        let failed = |source| Error::Io { address: name.clone(), source };
        let connect = async {
            let stream = TcpStream::connect(address).await.map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            let mut client =
                Self { stream, address: name.clone(), prefix: b"/".into(), limit, request: Vec::new() };
            client.send(&Request::Validate).await?;
            client.ping().await?;
            Ok(client)
        };
        timeout(limit, connect).await.map_err(|late| failed(late.into()))?
    }

    /// Sets the timeout of waits.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Checks that the store answers.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn ping(&mut self) -> Result<(), Error> {
        let number = std::process::id();
        self.send(&Request::Ping(number)).await?;
        let mut answer = [0; 4];
        self.read(&mut answer).await?;
        if u32::from_le_bytes(answer) != number {
            return Err(self.protocol("it answers with another number"));
        }
        Ok(())
    }

    /// Adds `prefix/` to the prefix of all keys.
    pub fn with_prefix(mut self, prefix: &str) -> Self {
        self.prefix.extend(format!("{prefix}/").into_bytes());
        self
    }

    /// Stores a value.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn set(&mut self, key: &str, value: &[u8]) -> Result<(), Error> {
        let key = self.key(key)?;
        check("a value", value.len(), MAX_VALUE)?;
        self.send(&Request::Set(&key, value)).await
    }

    /// Waits for a value, and returns it.
    ///
    /// # Errors
    /// [`Error::Timeout`] if it is not set in time, or another [`Error`].
    pub async fn get(&mut self, key: &str) -> Result<Vec<u8>, Error> {
        self.wait(&[key]).await?;
        let key = self.key(key)?;
        self.send(&Request::Get(&key)).await?;
        self.string(MAX_HELD).await
    }

    /// Adds to a decimal number, which is 0 if it is missing. Returns the sum.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn add(&mut self, key: &str, amount: i64) -> Result<i64, Error> {
        let key = self.key(key)?;
        self.send(&Request::Add(&key, amount)).await?;
        self.number().await
    }

    /// Stores `desired` if the value is `expected`; an empty `expected` also matches a missing
    /// value. Returns the value after that.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn compare_set(
        &mut self,
        key: &str,
        expected: &[u8],
        desired: &[u8],
    ) -> Result<Vec<u8>, Error> {
        let key = self.key(key)?;
        check("a value", expected.len().max(desired.len()), MAX_VALUE)?;
        self.send(&Request::CompareSet { key: &key, expected, desired }).await?;
        self.string(MAX_HELD).await
    }

    /// Returns whether all keys exist.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn check(&mut self, keys: &[&str]) -> Result<bool, Error> {
        let keys = self.keys(keys)?;
        self.send(&Request::Check(keys.iter().map(Vec::as_slice).collect())).await?;
        Ok(self.byte().await? == READY)
    }

    /// Waits until all keys exist.
    ///
    /// # Errors
    /// [`Error::Timeout`] if they are not set in time, or another [`Error`].
    pub async fn wait(&mut self, keys: &[&str]) -> Result<(), Error> {
        let full = self.keys(keys)?;
        self.send(&Request::Wait(full.iter().map(Vec::as_slice).collect())).await?;
        self.until_ready(keys).await
    }

    /// Removes a key. Returns whether it existed.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn delete(&mut self, key: &str) -> Result<bool, Error> {
        let key = self.key(key)?;
        self.send(&Request::Delete(&key)).await?;
        Ok(self.number().await? == 1)
    }

    /// Returns the number of keys of the store, of all prefixes.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn num_keys(&mut self) -> Result<i64, Error> {
        self.send(&Request::NumKeys).await?;
        self.number().await
    }

    /// Returns all keys of the store, of all prefixes, as stored.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn list_keys(&mut self) -> Result<Vec<Vec<u8>>, Error> {
        self.send(&Request::ListKeys).await?;
        let count = self.number().await?;
        let (mut keys, mut held) = (Vec::new(), 0);
        for _ in 0..count {
            let key = self.string(MAX_KEY as usize).await?;
            held += key.len();
            if held > MAX_HELD {
                return Err(self.protocol("it has more keys than a store may"));
            }
            keys.push(key);
        }
        Ok(keys)
    }

    /// Appends to a value.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn append(&mut self, key: &str, more: &[u8]) -> Result<(), Error> {
        let key = self.key(key)?;
        check("a value", more.len(), MAX_VALUE)?;
        self.send(&Request::Append(&key, more)).await
    }

    /// Waits for several values, and returns them.
    ///
    /// # Errors
    /// [`Error::Timeout`] if one is not set in time, or another [`Error`].
    pub async fn multi_get(&mut self, keys: &[&str]) -> Result<Vec<Vec<u8>>, Error> {
        self.wait(keys).await?;
        let full = self.keys(keys)?;
        self.send(&Request::MultiGet(full.iter().map(Vec::as_slice).collect())).await?;
        let mut values = Vec::new();
        for _ in keys {
            values.push(self.string(MAX_HELD).await?);
        }
        Ok(values)
    }

    /// Stores several values.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn multi_set(&mut self, pairs: &[(&str, &[u8])]) -> Result<(), Error> {
        let keys: Vec<&str> = pairs.iter().map(|(key, _)| *key).collect();
        let keys = self.keys(&keys)?;
        for (_, value) in pairs {
            check("a value", value.len(), MAX_VALUE)?;
        }
        let size = pairs.iter().zip(&keys).map(|((_, value), key)| key.len() + value.len() + 16).sum();
        check("a list of pairs", size, MAX_REQUEST as u64 - 16)?;
        let values = pairs.iter().map(|(_, value)| *value);
        self.send(&Request::MultiSet(keys.iter().map(Vec::as_slice).zip(values).collect())).await
    }

    /// Appends to a queue.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn queue_push(&mut self, key: &str, value: &[u8]) -> Result<(), Error> {
        let key = self.key(key)?;
        check("a value", value.len(), MAX_VALUE)?;
        self.send(&Request::QueuePush(&key, value)).await
    }

    /// Removes the first element of a queue, if there is one.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn queue_pop(&mut self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let key = self.key(key)?;
        self.send(&Request::QueuePop(&key)).await?;
        match self.number().await? {
            0 => Ok(None),
            _ => self.string(MAX_HELD).await.map(Some),
        }
    }

    /// Returns the length of a queue.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn queue_len(&mut self, key: &str) -> Result<i64, Error> {
        let key = self.key(key)?;
        self.send(&Request::QueueLen(&key)).await?;
        self.number().await
    }

    /// Waits until `size` clients have entered a barrier. A client that times out still counts. The
    /// store counts in a key of this name, so each barrier is used once.
    ///
    /// # Errors
    /// [`Error::Timeout`] if they do not enter in time, or another [`Error`].
    pub async fn barrier(&mut self, key: &str, size: i64) -> Result<(), Error> {
        let full = self.key(key)?;
        self.send(&Request::Barrier(&full, size)).await?;
        self.until_ready(&[key]).await
    }

    fn key(&self, key: &str) -> Result<Vec<u8>, Error> {
        check("a key", self.prefix.len() + key.len(), MAX_KEY)?;
        Ok([&self.prefix, key.as_bytes()].concat())
    }

    fn keys(&self, keys: &[&str]) -> Result<Vec<Vec<u8>>, Error> {
        check("a list", keys.len(), MAX_KEYS)?;
        keys.iter().map(|key| self.key(key)).collect()
    }

    async fn send(&mut self, request: &Request<'_>) -> Result<(), Error> {
        self.request.clear();
        codec::encode(request, &mut self.request);
        let sent = self.stream.write_all(&self.request).await;
        // Releases the memory of a large value.
        self.request.clear();
        self.request.shrink_to(4096);
        sent.map_err(|source| self.failed(source))
    }

    async fn until_ready(&mut self, keys: &[&str]) -> Result<(), Error> {
        if let Ok(answer) = timeout(self.limit, self.byte()).await {
            return match answer? {
                READY => Ok(()),
                _ => Err(self.protocol("a wait ends with something else")),
            };
        }
        self.send(&Request::CancelWait).await?;
        let limit = self.limit;
        let last_moment = async {
            let came = self.byte().await? != WAIT_CANCELLED;
            // The wait may have ended just before the cancellation: then READY precedes its
            // confirmation.
            if came {
                self.byte().await?;
            }
            Ok(came)
        };
        match timeout(PROMPT, last_moment).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => {
                Err(Error::Timeout { keys: keys.iter().map(|key| (*key).to_owned()).collect(), limit })
            }
            Ok(Err(error)) => Err(error),
            Err(late) => Err(self.failed(late.into())),
        }
    }

    async fn read(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        let read = self.stream.read_exact(bytes).await;
        read.map(drop).map_err(|source| self.failed(source))
    }

    async fn byte(&mut self) -> Result<u8, Error> {
        let mut byte = [0];
        self.read(&mut byte).await?;
        Ok(byte[0])
    }

    async fn number(&mut self) -> Result<i64, Error> {
        let mut number = [0; 8];
        self.read(&mut number).await?;
        Ok(i64::from_le_bytes(number))
    }

    async fn string(&mut self, limit: usize) -> Result<Vec<u8>, Error> {
        let length = self.number().await?;
        if !usize::try_from(length).is_ok_and(|length| length <= limit) {
            return Err(self.protocol("an answer is too long"));
        }
        let mut string = Vec::new();
        // Not reserved in advance: the peer chooses the length.
        let read = (&mut self.stream).take(length as u64).read_to_end(&mut string).await;
        match read.map_err(|source| self.failed(source))? as i64 == length {
            true => Ok(string),
            false => Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Io { address: self.address.clone(), source }
    }

    fn protocol(&self, what: &'static str) -> Error {
        Error::Protocol { address: self.address.clone(), what }
    }
}

fn check(what: &'static str, given: usize, limit: u64) -> Result<(), Error> {
    match given as u64 > limit {
        true => Err(Error::TooLarge { what, given, limit }),
        false => Ok(()),
    }
}
