//! Connections that other threads wait on, shut down from any thread.
//!
//! Neither gloo nor the store can be interrupted: a rank whose peer is lost may wait for it until a
//! timeout. The wait only ends early if its connections end, which the kernel reports at once. This
//! module distinguishes the connections from other sockets of the process by the time of their
//! opening.
#![expect(unsafe_code, reason = "shuts sockets down by their number")]

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::fs;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const SHUT_RDWR: c_int = 2;
const SOL_SOCKET: c_int = 1;
const SO_ACCEPTCONN: c_int = 30;

unsafe extern "C" {
    fn shutdown(fd: c_int, how: c_int) -> c_int;
    fn getsockopt(fd: c_int, level: c_int, name: c_int, value: *mut c_int, length: *mut u32) -> c_int;
}

/// Whether a socket listens for connections. Listening sockets are not shut down: gloo terminates
/// the process if its own listening socket fails.
fn listens(fd: RawFd) -> bool {
    let (mut value, mut length) = (0, size_of::<c_int>() as u32);
    // SAFETY: the buffer has room for the given number of bytes.
    let known = unsafe { getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &mut value, &mut length) } == 0;
    known && value != 0
}

/// Returns the sockets of this process: their descriptors, and the kernel's names for them, which
/// are never reused.
fn sockets() -> BTreeMap<RawFd, String> {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let socket = |entry: fs::DirEntry| {
        let name = fs::read_link(entry.path()).ok()?.into_os_string().into_string().ok()?;
        Some((entry.file_name().to_str()?.parse().ok()?, name))
            .filter(|(_, name)| name.starts_with("socket:"))
    };
    entries.filter_map(socket).collect()
}

/// The connections that any thread has opened between [`Connections::watch`] and
/// [`Connections::are_complete`].
#[derive(Debug, Clone)]
pub struct Connections(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Sockets that were opened before, and belong to other code.
    before: BTreeMap<RawFd, String>,
    /// The connections. `None` while further connections may be opened.
    own: Option<BTreeMap<RawFd, String>>,
}

impl Connections {
    /// Records the existing sockets.
    pub fn watch() -> Self {
        Self(Arc::new(Mutex::new(State { before: sockets(), own: None })))
    }

    /// Notes that all connections have been opened.
    pub fn are_complete(&self) {
        let mut state = self.lock();
        let before = std::mem::take(&mut state.before);
        let is_new = |fd: &RawFd, name: &mut String| before.get(fd) != Some(name);
        let mut own = sockets();
        own.retain(is_new);
        state.own = Some(own);
    }

    /// Shuts down the connections. A thread that waits on one of them gets an error.
    pub fn cut(&self) {
        let state = self.lock();
        for (fd, name) in sockets() {
            let is_own = match &state.own {
                Some(own) => own.get(&fd) == Some(&name),
                None => state.before.get(&fd) != Some(&name),
            };
            if is_own && !listens(fd) {
                // SAFETY: touches no memory. If the number is no longer a socket, shutdown returns
                // an error that is irrelevant here.
                unsafe { shutdown(fd, SHUT_RDWR) };
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    #[test]
    fn what_was_opened_meanwhile_is_cut_and_nothing_else() {
        let (mut other, far_other) = UnixStream::pair().unwrap();
        let connections = Connections::watch();
        let (mut own, _far) = UnixStream::pair().unwrap();
        connections.are_complete();
        let (mut later, far_later) = UnixStream::pair().unwrap();
        let waiting = thread::spawn(move || own.read(&mut [0]).unwrap());
        connections.cut();
        assert_eq!(waiting.join().unwrap(), 0);
        for (stream, far) in [(&mut other, far_other), (&mut later, far_later)] {
            std::io::Write::write_all(&mut &far, b"x").unwrap();
            assert_eq!(stream.read(&mut [0]).unwrap(), 1);
        }
    }
}
