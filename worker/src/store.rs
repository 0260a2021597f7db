//! libtorch's store and group, as the link needs them.

use std::time::Duration;

use ice_c10d::{Error, ErrorKind, ProcessGroup, Store};

/// A client of the round's store.
#[derive(Clone)]
pub(crate) struct LinkStore(pub(crate) Store);

impl ice_link::Store for LinkStore {
    type Error = Error;

    fn reconnect(&self) -> Result<Self, Error> {
        self.0.reconnect().map(Self)
    }

    fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        self.0.set(key, value)
    }

    fn get(&self, key: &str) -> Result<Vec<u8>, Error> {
        self.0.get(key)
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        self.0.add(key, amount)
    }

    fn compare_set(&self, key: &str, expected: &str, desired: &str) -> Result<Vec<u8>, Error> {
        self.0.compare_set(key, expected, desired)
    }

    fn wait(&self, key: &str, timeout: Duration) -> Result<bool, Error> {
        match self.0.wait(&[key], timeout) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Timeout => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The round's process group, which the link aborts at the end of the round.
pub(crate) struct LinkGroup(pub(crate) ProcessGroup);

impl ice_link::Group for LinkGroup {
    fn abort(&self) {
        self.0.abort();
    }
}
