#![expect(unsafe_code, reason = "calls the C++ shim")]

use std::sync::Arc;
use std::time::Duration;

use crate::error::check;
use crate::ffi::{self, Handle, IceStore, IceStr, milliseconds, take_bytes};
use crate::{Error, Result};

/// A client of a c10d store: keys and values shared by all processes of a job. It uses the protocol
/// of PyTorch's TCPStore.
///
/// A clone shares the connection, and a call that waits occupies it. A thread that must not wait
/// for another needs [`Store::reconnect`].
#[derive(Debug, Clone)]
pub struct Store {
    handle: Arc<Handle<IceStore>>,
}

impl Store {
    /// Connects to the store at `host:port`. Never hosts a store.
    ///
    /// `timeout` limits the time to connect, and later every call that waits for a key without a
    /// timeout of its own.
    ///
    /// # Errors
    /// `Network` if no server accepts the connection within the timeout.
    pub fn tcp(host: &str, port: u16, timeout: Duration) -> Result<Self> {
        let host = IceStr::new(host);
        Self::make(|out, message| {
            // SAFETY: the string outlives the call, and both out-pointers are valid.
            unsafe { ffi::ice_store_tcp(host, port, milliseconds(timeout), out, message) }
        })
    }

    /// Returns the same store, with this prefix and a slash before every key.
    #[must_use]
    pub fn with_prefix(&self, prefix: &str) -> Self {
        let prefix = IceStr::new(prefix);
        Self::make(|out, message| {
            // SAFETY: the handle is alive, the string outlives the call, and both out-pointers are
            // valid.
            unsafe { ffi::ice_store_prefix(self.pointer(), prefix, out, message) }
        })
        .expect("a prefix allocates a few bytes and does nothing else")
    }

    /// Returns the same store, over a separate connection.
    ///
    /// # Errors
    /// `Network` if the store is gone.
    pub fn reconnect(&self) -> Result<Self> {
        // SAFETY: the handle is alive, and both out-pointers are valid.
        Self::make(|out, message| unsafe { ffi::ice_store_reconnect(self.pointer(), out, message) })
    }

    /// Sets a key, replacing its value. The store does not acknowledge this: if the store has just
    /// died, only the next call notices it.
    ///
    /// # Errors
    /// `Network` if the connection is known to be broken.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        check(|message| {
            // SAFETY: the handle is alive; key and value outlive the call.
            unsafe {
                ffi::ice_store_set(self.pointer(), IceStr::new(key), value.as_ptr(), value.len(), message)
            }
        })
    }

    /// Sets a key to `desired` if its value is `expected`. An empty `expected` also matches a key
    /// without a value. Returns the resulting value; if the key has no value but one was expected,
    /// returns `expected`.
    ///
    /// # Errors
    /// `Network` if the store is gone.
    pub fn compare_set(&self, key: &str, expected: &str, desired: &str) -> Result<Vec<u8>> {
        let (mut data, mut size) = (std::ptr::null_mut(), 0);
        let [key, expected, desired] = [key, expected, desired].map(IceStr::new);
        check(|message| {
            // SAFETY: the handle is alive, the strings outlive the call, and the out-pointers are
            // valid.
            unsafe {
                ffi::ice_store_compare_set(
                    self.pointer(),
                    key,
                    expected,
                    desired,
                    &mut data,
                    &mut size,
                    message,
                )
            }
        })?;
        Ok(take_bytes(data, size))
    }

    /// Returns the value of a key. Waits until the key is set.
    ///
    /// # Errors
    /// `Timeout` if the key is not set within the store's timeout; `Network` if the store is gone.
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        let (mut data, mut size) = (std::ptr::null_mut(), 0);
        check(|message| {
            // SAFETY: the handle is alive, the key outlives the call, and the out-pointers are
            // valid.
            unsafe { ffi::ice_store_get(self.pointer(), IceStr::new(key), &mut data, &mut size, message) }
        })?;
        Ok(take_bytes(data, size))
    }

    /// Adds to a counter, which starts at zero, and returns the sum.
    ///
    /// # Errors
    /// `Network` if the store is gone.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64> {
        let mut sum = 0;
        check(|message| {
            // SAFETY: the handle is alive, the key outlives the call, and the out-pointers are
            // valid.
            unsafe { ffi::ice_store_add(self.pointer(), IceStr::new(key), amount, &mut sum, message) }
        })?;
        Ok(sum)
    }

    /// Whether all of these keys exist.
    ///
    /// # Errors
    /// `Network` if the store is gone.
    pub fn check(&self, keys: &[&str]) -> Result<bool> {
        let keys: Vec<_> = keys.iter().map(|key| IceStr::new(key)).collect();
        let mut all = false;
        check(|message| {
            // SAFETY: the handle is alive, the keys outlive the call, and the out-pointers are
            // valid.
            unsafe { ffi::ice_store_check(self.pointer(), keys.as_ptr(), keys.len(), &mut all, message) }
        })?;
        Ok(all)
    }

    /// Waits until all of these keys exist.
    ///
    /// # Errors
    /// `Timeout` if they are not set in time; `Network` if the store is gone.
    pub fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        let keys: Vec<_> = keys.iter().map(|key| IceStr::new(key)).collect();
        check(|message| {
            let timeout = milliseconds(timeout);
            // SAFETY: the handle is alive and the keys outlive the call.
            unsafe { ffi::ice_store_wait(self.pointer(), keys.as_ptr(), keys.len(), timeout, message) }
        })
    }

    /// Deletes a key. Returns whether it existed.
    ///
    /// # Errors
    /// `Network` if the store is gone.
    pub fn delete(&self, key: &str) -> Result<bool> {
        let mut deleted = false;
        check(|message| {
            // SAFETY: the handle is alive, the key outlives the call, and the out-pointers are
            // valid.
            unsafe { ffi::ice_store_delete(self.pointer(), IceStr::new(key), &mut deleted, message) }
        })?;
        Ok(deleted)
    }

    /// Hosts a store on a free port of loopback, for tests.
    pub(crate) fn serve() -> Result<(Self, u16)> {
        let mut port = 0;
        // SAFETY: all out-pointers are valid.
        let store = Self::make(|out, message| unsafe { ffi::ice_store_serve(out, &mut port, message) })?;
        Ok((store, port))
    }

    pub(crate) fn pointer(&self) -> *const IceStore {
        self.handle.pointer()
    }

    fn make(
        call: impl FnOnce(*mut *mut IceStore, *mut *mut std::ffi::c_char) -> i32,
    ) -> std::result::Result<Self, Error> {
        Handle::make(call).map(|handle| Self { handle: Arc::new(handle) })
    }
}
