//! The entry of a connection among all connections of a server.

use std::net::IpAddr;
use std::sync::Arc;

use tokio::task::AbortHandle;

use super::connections::{self, Evicted};
use super::{Shared, locked};

/// Closes evicted connections, and logs their messages.
pub(super) fn close_evicted(evicted: impl IntoIterator<Item = Evicted<AbortHandle>>) {
    for Evicted { handle, message } in evicted {
        handle.abort();
        if let Some(message) = message {
            tracing::warn!("{message}");
        }
    }
}

/// A connection's entry among [`connections::Connections`], removed on drop.
pub(super) struct ConnectionSlot {
    shared: Arc<Shared>,
    id: u64,
    address: IpAddr,
}

impl ConnectionSlot {
    pub(super) fn new(shared: Arc<Shared>, id: u64, address: IpAddr) -> Self {
        Self { shared, id, address: address.to_canonical() }
    }

    /// Address of the peer.
    pub(super) fn address(&self) -> IpAddr {
        self.address
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn becomes(&self, kind: connections::Kind) {
        close_evicted(locked(&self.shared.connections).becomes(self.id, kind));
    }

    /// Marks the connection as active, so that it is not evicted (C-4).
    pub(super) fn mark_active(&self) {
        locked(&self.shared.connections).mark_active(self.id);
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        locked(&self.shared.connections).remove(self.id);
    }
}
