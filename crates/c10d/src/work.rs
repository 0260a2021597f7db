#![expect(unsafe_code, reason = "calls the C++ shim")]

use std::time::Duration;

use crate::Result;
use crate::error::check;
use crate::ffi::{self, Handle, IceWork, milliseconds};

/// A collective in progress. Dropping the value does not stop it.
#[derive(Debug)]
#[must_use = "a collective has not happened before its wait returns"]
pub struct Work {
    handle: Handle<IceWork>,
}

impl Work {
    pub(crate) fn new(handle: Handle<IceWork>) -> Self {
        Self { handle }
    }

    /// Waits until the collective is completed on this rank. On CUDA, only the current stream
    /// waits.
    ///
    /// # Errors
    /// `Network` if a peer is lost, `Timeout` after the group's timeout.
    pub fn wait(self) -> Result<()> {
        self.wait_milliseconds(0)
    }

    /// Like [`wait`](Self::wait), with another timeout. After a `Timeout`, the collective is still
    /// in progress, and the group is unusable.
    ///
    /// # Errors
    /// The errors of [`wait`](Self::wait).
    pub fn wait_timeout(&self, timeout: Duration) -> Result<()> {
        self.wait_milliseconds(milliseconds(timeout))
    }

    /// Whether the collective has ended on this rank, successfully or not. Does not block.
    pub fn is_completed(&self) -> bool {
        // SAFETY: the handle is alive; c10d locks the state of the operation.
        unsafe { ffi::ice_work_is_completed(self.handle.pointer()) }
    }

    fn wait_milliseconds(&self, timeout: i64) -> Result<()> {
        // SAFETY: the handle is alive.
        check(|message| unsafe { ffi::ice_work_wait(self.handle.pointer(), timeout, message) })
    }
}
