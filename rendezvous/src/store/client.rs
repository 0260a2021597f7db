//! A client of TCPStore, ours or torch's.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio::time::timeout;

use super::codec::{self, MAX_KEY, MAX_KEYS, MAX_VALUE, Request};
use super::state::{MAX_HELD, READY, WAIT_CANCELLED};

/// Why the store did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection is of no use any more.
    #[error("the store: {0}")]
    Io(#[from] io::Error),
    /// Keys that did not come in time; the client goes on being of use.
    #[error("no {} in the store within {limit:?}", keys.join(", "))]
    Timeout {
        /// What was waited for.
        keys: Vec<String>,
        /// How long.
        limit: Duration,
    },
    /// The store takes no such request; nothing was sent.
    #[error("{what} of {given} bytes is over the store's limit of {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size.
        given: usize,
        /// The most.
        limit: u64,
    },
    /// What the store answered makes no sense.
    #[error("the peer is no store: {0}")]
    Protocol(&'static str),
}

/// A connection to the store.
///
/// Keys are stored with a leading `/`, as torch's clients do, so that both find each other's. With a prefix, they are what
/// `torch.distributed.PrefixStore` makes of them.
pub struct Client {
    stream: TcpStream,
    /// Stands before every key.
    prefix: Vec<u8>,
    /// How long keys are waited for.
    limit: Duration,
    request: Vec<u8>,
}

impl Client {
    /// Connects, and checks that a store answers. `limit` is for that and for each wait.
    ///
    /// # Errors
    /// [`Error::Io`] where nobody answers in time, [`Error::Protocol`] where it is no store.
    pub async fn connect(address: impl ToSocketAddrs, limit: Duration) -> Result<Self, Error> {
        let stream = timeout(limit, TcpStream::connect(address)).await.map_err(io::Error::from)??;
        stream.set_nodelay(true)?;
        let mut client = Self { stream, prefix: b"/".into(), limit, request: Vec::new() };
        client.send(&Request::Validate).await?;
        let number = std::process::id();
        let ping = async {
            client.send(&Request::Ping(number)).await?;
            Ok::<_, Error>(client.stream.read_u32_le().await?)
        };
        match timeout(limit, ping).await.map_err(io::Error::from)?? {
            answer if answer == number => Ok(client),
            _ => Err(Error::Protocol("it answers with another number")),
        }
    }

    /// Keys are those below `prefix/` from now on, which is below the prefix so far.
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

    /// Waits for a value and returns it.
    ///
    /// # Errors
    /// [`Error::Timeout`] where it does not come, or another [`Error`].
    pub async fn get(&mut self, key: &str) -> Result<Vec<u8>, Error> {
        self.wait(&[key]).await?;
        let key = self.key(key)?;
        self.send(&Request::Get(&key)).await?;
        self.string(MAX_HELD as u64).await
    }

    /// Adds to a decimal number, 0 where there is none, and returns the sum.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn add(&mut self, key: &str, amount: i64) -> Result<i64, Error> {
        let key = self.key(key)?;
        self.send(&Request::Add(&key, amount)).await?;
        Ok(self.stream.read_i64_le().await?)
    }

    /// Stores `desired` if the value is `expected`, where empty also stands for none; returns what is there then.
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
        self.string(MAX_HELD as u64).await
    }

    /// Whether all keys are there.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn check(&mut self, keys: &[&str]) -> Result<bool, Error> {
        let keys = self.keys(keys)?;
        self.send(&Request::Check(keys.iter().map(Vec::as_slice).collect())).await?;
        Ok(self.stream.read_u8().await? == READY)
    }

    /// Waits until all keys are there.
    ///
    /// # Errors
    /// [`Error::Timeout`] where they do not come, or another [`Error`].
    pub async fn wait(&mut self, keys: &[&str]) -> Result<(), Error> {
        let full = self.keys(keys)?;
        self.send(&Request::Wait(full.iter().map(Vec::as_slice).collect())).await?;
        if let Ok(answer) = timeout(self.limit, self.stream.read_u8()).await {
            return ready(answer?);
        }
        self.send(&Request::CancelWait).await?;
        // The keys may have come at the last moment: then that is said first.
        if self.answer().await? != WAIT_CANCELLED {
            self.answer().await?;
            return Ok(());
        }
        Err(Error::Timeout { keys: keys.iter().map(|key| (*key).to_owned()).collect(), limit: self.limit })
    }

    /// Removes a key; whether it was there.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn delete(&mut self, key: &str) -> Result<bool, Error> {
        let key = self.key(key)?;
        self.send(&Request::Delete(&key)).await?;
        Ok(self.stream.read_i64_le().await? == 1)
    }

    /// How many keys the store has, of all prefixes.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn num_keys(&mut self) -> Result<i64, Error> {
        self.send(&Request::NumKeys).await?;
        Ok(self.stream.read_i64_le().await?)
    }

    /// All keys of the store, of all prefixes, as they are stored.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn list_keys(&mut self) -> Result<Vec<Vec<u8>>, Error> {
        self.send(&Request::ListKeys).await?;
        let count = self.stream.read_i64_le().await?;
        let mut keys = Vec::new();
        for _ in 0..count {
            keys.push(self.string(MAX_KEY).await?);
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

    /// Waits for several values and returns them.
    ///
    /// # Errors
    /// [`Error::Timeout`] where one does not come, or another [`Error`].
    pub async fn multi_get(&mut self, keys: &[&str]) -> Result<Vec<Vec<u8>>, Error> {
        self.wait(keys).await?;
        let full = self.keys(keys)?;
        self.send(&Request::MultiGet(full.iter().map(Vec::as_slice).collect())).await?;
        let mut values = Vec::new();
        for _ in keys {
            values.push(self.string(MAX_HELD as u64).await?);
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

    /// Takes from the front of a queue, if there is something.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn queue_pop(&mut self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        let key = self.key(key)?;
        self.send(&Request::QueuePop(&key)).await?;
        match self.stream.read_i64_le().await? {
            0 => Ok(None),
            _ => self.string(MAX_HELD as u64).await.map(Some),
        }
    }

    /// How long a queue is.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn queue_len(&mut self, key: &str) -> Result<i64, Error> {
        let key = self.key(key)?;
        self.send(&Request::QueueLen(&key)).await?;
        Ok(self.stream.read_i64_le().await?)
    }

    /// Waits until so many clients have come to a barrier. A client that gives up has to connect anew.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn barrier(&mut self, key: &str, size: i64) -> Result<(), Error> {
        let full = self.key(key)?;
        self.send(&Request::Barrier(&full, size)).await?;
        ready(self.answer().await?)
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
        self.stream.write_all(&self.request).await?;
        // A large value is not kept.
        self.request.clear();
        self.request.shrink_to(4096);
        Ok(())
    }

    /// One byte, in time.
    async fn answer(&mut self) -> Result<u8, Error> {
        Ok(timeout(self.limit, self.stream.read_u8()).await.map_err(io::Error::from)??)
    }

    async fn string(&mut self, limit: u64) -> Result<Vec<u8>, Error> {
        let length = self.stream.read_u64_le().await?;
        if length > limit {
            return Err(Error::Protocol("an answer is too long"));
        }
        let mut string = Vec::new();
        (&mut self.stream).take(length).read_to_end(&mut string).await?;
        match string.len() as u64 == length {
            true => Ok(string),
            false => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        }
    }
}

fn check(what: &'static str, given: usize, limit: u64) -> Result<(), Error> {
    match given as u64 > limit {
        true => Err(Error::TooLarge { what, given, limit }),
        false => Ok(()),
    }
}

fn ready(answer: u8) -> Result<(), Error> {
    match answer {
        READY => Ok(()),
        _ => Err(Error::Protocol("a wait ends with something else")),
    }
}
