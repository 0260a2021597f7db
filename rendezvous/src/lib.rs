//! Agreement between the nodes of a job, and the store in which their ranks meet.
//!
//! [`Server`] serves both on one port: the [`coordinator`], a pure state machine, and the key-value
//! [`store`], another one, which speaks the wire format of c10d's TCPStore. [`Session`] is an
//! agent's connection to the coordinator, and [`Rendezvous`] finds the coordinator or becomes its
//! host. This crate knows nothing of ranks as processes, of devices or of libtorch.
//!
//! In the book: `docs/clusters.md`.

pub mod address;
mod auth;
mod backend;
mod channel;
mod error;
mod keepalive;
mod server;
pub mod store;
mod tls;

pub use auth::Token;
pub use backend::{
    Backend, Endpoint, EtcdConfig, EtcdTls, Rendezvous, RendezvousConfig, RetryPolicy, ServedBy, Session,
};
pub use error::Error;
pub use ice_coordinator as coordinator;
pub use server::{Server, ServerConfig};

/// Whether this build can use etcd: its feature `etcd`.
pub const HAS_ETCD: bool = cfg!(feature = "etcd");
/// Whether this build can encrypt the connections between agents: its feature `tls`.
pub const HAS_TLS: bool = cfg!(feature = "tls");
