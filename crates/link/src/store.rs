//! The store of a round, as far as the agreements of the ranks need it.

use std::error::Error;
use std::time::Duration;

/// A client of the key-value store of a round. All keys are below the round's prefix.
///
/// Clones may share a connection, and a call that waits then occupies it. The link therefore calls
/// [`Store::reconnect`] for each of its threads.
pub trait Store: Clone + Send + Sync + 'static {
    /// A failed operation.
    type Error: Error + Send + Sync + 'static;

    /// Returns the same store, over a separate connection.
    ///
    /// # Errors
    /// The store is gone.
    fn reconnect(&self) -> Result<Self, Self::Error>;

    /// Sets a key, replacing its value.
    ///
    /// # Errors
    /// The store is gone.
    fn set(&self, key: &str, value: &[u8]) -> Result<(), Self::Error>;

    /// Returns the value of a key that is set.
    ///
    /// # Errors
    /// The store is gone.
    fn get(&self, key: &str) -> Result<Vec<u8>, Self::Error>;

    /// Adds to a decimal counter, which starts at zero, and returns the sum.
    ///
    /// # Errors
    /// The store is gone.
    fn add(&self, key: &str, amount: i64) -> Result<i64, Self::Error>;

    /// Sets a key to `desired` if its value is `expected`; an empty `expected` also matches a key
    /// without a value. Returns the resulting value.
    ///
    /// # Errors
    /// The store is gone.
    fn compare_set(&self, key: &str, expected: &str, desired: &str) -> Result<Vec<u8>, Self::Error>;

    /// Waits until a key is set. Returns `false` if it is not set within the timeout.
    ///
    /// # Errors
    /// The store is gone.
    fn wait(&self, key: &str, timeout: Duration) -> Result<bool, Self::Error>;
}

#[cfg(test)]
pub(crate) use memory::MemoryStore;

#[cfg(test)]
mod memory {
    use std::collections::BTreeMap;
    use std::io::{Error, ErrorKind};
    use std::sync::{Arc, Condvar, Mutex, MutexGuard};
    use std::time::Duration;

    use super::Store;

    /// A store within this process. Clones share its keys.
    #[derive(Clone, Default)]
    pub(crate) struct MemoryStore(Arc<(Mutex<Keys>, Condvar)>);

    #[derive(Default)]
    struct Keys {
        values: BTreeMap<String, Vec<u8>>,
        closed: bool,
    }

    impl MemoryStore {
        /// Makes all calls fail from now on, like a server that is gone.
        pub(crate) fn close(&self) {
            self.0.0.lock().unwrap().closed = true;
            self.0.1.notify_all();
        }

        fn open(&self) -> Result<MutexGuard<'_, Keys>, Error> {
            let keys = self.0.0.lock().unwrap();
            if keys.closed { Err(ErrorKind::ConnectionReset.into()) } else { Ok(keys) }
        }
    }

    impl Store for MemoryStore {
        type Error = Error;

        fn reconnect(&self) -> Result<Self, Error> {
            Ok(self.clone())
        }

        fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
            self.open()?.values.insert(key.into(), value.into());
            self.0.1.notify_all();
            Ok(())
        }

        fn get(&self, key: &str) -> Result<Vec<u8>, Error> {
            Ok(self.open()?.values[key].clone())
        }

        fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
            let mut keys = self.open()?;
            let number = |bytes: &Vec<u8>| str::from_utf8(bytes).unwrap().parse::<i64>().unwrap();
            let sum = keys.values.get(key).map_or(0, number) + amount;
            keys.values.insert(key.into(), sum.to_string().into_bytes());
            self.0.1.notify_all();
            Ok(sum)
        }

        fn compare_set(&self, key: &str, expected: &str, desired: &str) -> Result<Vec<u8>, Error> {
            let mut keys = self.open()?;
            let found = keys.values.get(key).cloned().unwrap_or_default();
            if found != expected.as_bytes() {
                return Ok(found);
            }
            keys.values.insert(key.into(), desired.into());
            self.0.1.notify_all();
            Ok(desired.into())
        }

        fn wait(&self, key: &str, timeout: Duration) -> Result<bool, Error> {
            let keys = self.open()?;
            let missing = |keys: &mut Keys| !keys.closed && !keys.values.contains_key(key);
            let (keys, _) = self.0.1.wait_timeout_while(keys, timeout, missing).unwrap();
            if keys.closed {
                Err(ErrorKind::ConnectionReset.into())
            } else {
                Ok(keys.values.contains_key(key))
            }
        }
    }
}
