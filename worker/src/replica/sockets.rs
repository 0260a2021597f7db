//! The open sockets of a replication.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::net::Shutdown;

/// Purpose of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SocketSlot {
    Listen,
    Outgoing,
    Incoming(usize),
}

/// All sockets of a replication. Closing them wakes the threads that wait on them.
#[derive(Default)]
pub(super) struct Sockets(Mutex<Open>);

#[derive(Default)]
struct Open {
    closed: bool,
    sockets: BTreeMap<SocketSlot, OwnedFd>,
}

impl Sockets {
    /// Registers a socket, and closes the one that it replaces.
    pub(super) fn add(&self, slot: SocketSlot, socket: OwnedFd) {
        let mut open = self.lock();
        let old = if open.closed { Some(socket) } else { open.sockets.insert(slot, socket) };
        old.iter().for_each(shut);
    }

    /// Closes the socket of a slot.
    pub(super) fn remove(&self, slot: SocketSlot) {
        self.lock().sockets.remove(&slot).iter().for_each(shut);
    }

    pub(super) fn are_closed(&self) -> bool {
        self.lock().closed
    }

    pub(super) fn close(&self) {
        let mut open = self.lock();
        open.closed = true;
        std::mem::take(&mut open.sockets).values().for_each(shut);
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shut(socket: &OwnedFd) {
    // Fails if the peer has closed the connection already.
    let _ = rustix::net::shutdown(socket, Shutdown::Both);
}
