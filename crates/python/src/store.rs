//! The store of a round, over the client of `ice-rendezvous`.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ice_rendezvous::store::client::{Client, Error};
use tokio::runtime::{Builder, Runtime};

/// Timeout of the connection. The store listens before any rank starts.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to the store. Clones share it.
#[derive(Clone)]
pub(crate) struct RoundStore {
    host: String,
    port: u16,
    prefix: String,
    connection: Arc<Mutex<Connection>>,
}

struct Connection {
    runtime: Runtime,
    client: Client,
}

impl RoundStore {
    /// Connects to the store of a round, whose keys begin with `prefix` and a slash.
    pub(crate) fn connect(host: &str, port: u16, prefix: &str) -> Result<Self, Error> {
        let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let io = |source: io::Error| Error::Io { address: address.clone(), source };
        let runtime = Builder::new_current_thread().enable_all().build().map_err(io)?;
        let client =
            runtime.block_on(Client::connect(address.as_str(), CONNECT_TIMEOUT))?.with_prefix(prefix);
        let connection = Arc::new(Mutex::new(Connection { runtime, client }));
        Ok(Self { host: host.into(), port, prefix: prefix.into(), connection })
    }

    fn call<T>(&self, call: impl AsyncFnOnce(&mut Client) -> Result<T, Error>) -> Result<T, Error> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let Connection { runtime, client } = &mut *connection;
        runtime.block_on(call(client))
    }
}

impl ice_link::Store for RoundStore {
    type Error = Error;

    fn reconnect(&self) -> Result<Self, Error> {
        Self::connect(&self.host, self.port, &self.prefix)
    }

    fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.call(async |client| client.set(key, value).await)
    }

    fn get(&self, key: &str) -> Result<Vec<u8>, Error> {
        self.call(async |client| client.get(key).await)
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        self.call(async |client| client.add(key, amount).await)
    }

    fn compare_set(&self, key: &str, expected: &str, desired: &str) -> Result<Vec<u8>, Error> {
        self.call(async |client| client.compare_set(key, expected.as_bytes(), desired.as_bytes()).await)
    }

    fn wait(&self, key: &str, timeout: Duration) -> Result<bool, Error> {
        self.call(async |client| {
            client.set_limit(timeout);
            match client.wait(&[key]).await {
                Ok(()) => Ok(true),
                Err(Error::Timeout { .. }) => Ok(false),
                Err(error) => Err(error),
            }
        })
    }
}
