//! Connections that others wait on, cut from another thread.
//!
//! Neither gloo nor the store can be interrupted: a rank whose peer is lost may wait for it until a timeout. What does end the wait is
//! the end of the connections, which the kernel tells at once. They are told from other sockets of the process by when they were opened.
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

/// Whether a socket waits for connections. Gloo ends the process where one of its own cannot do so any more.
fn listens(fd: RawFd) -> bool {
    let (mut value, mut length) = (0, size_of::<c_int>() as u32);
    // SAFETY: there is room for as many bytes as is said.
    let known = unsafe { getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &mut value, &mut length) } == 0;
    known && value != 0
}

/// The sockets of this process: their numbers, and what the kernel calls them, which is never used again.
fn sockets() -> BTreeMap<RawFd, String> {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let socket = |entry: fs::DirEntry| {
        let name = fs::read_link(entry.path()).ok()?.into_os_string().into_string().ok()?;
        Some((entry.file_name().to_str()?.parse().ok()?, name))
            .filter(|(_, name)| name.starts_with("socket:"))
    };
    entries.filter_map(socket).collect()
}

/// The connections that were opened between [`Connections::watch`] and [`Connections::are_complete`], by any thread.
#[derive(Debug, Clone)]
pub struct Connections(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Those that are somebody else's.
    before: BTreeMap<RawFd, String>,
    /// Those that are these; none as long as more are being opened.
    own: Option<BTreeMap<RawFd, String>>,
}

impl Connections {
    /// Takes note of the sockets that are there already.
    pub fn watch() -> Self {
        Self(Arc::new(Mutex::new(State { before: sockets(), own: None })))
    }

    /// No more will be opened.
    pub fn are_complete(&self) {
        let mut state = self.lock();
        let before = std::mem::take(&mut state.before);
        let is_new = |fd: &RawFd, name: &mut String| before.get(fd) != Some(name);
        let mut own = sockets();
        own.retain(is_new);
        state.own = Some(own);
    }

    /// Ends them. Whoever waits for something to come over one gets an error.
    pub fn cut(&self) {
        let state = self.lock();
        for (fd, name) in sockets() {
            let is_own = match &state.own {
                Some(own) => own.get(&fd) == Some(&name),
                None => state.before.get(&fd) != Some(&name),
            };
            if is_own && !listens(fd) {
                // SAFETY: touches no memory; a number that is no socket any more is an error that is of no interest.
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
