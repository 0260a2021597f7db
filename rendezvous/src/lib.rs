//! Agreement between the nodes of a job, and the store that their ranks meet in.
//!
//! [`Host`] serves both on one port: the coordinator, a pure machine in [`machine`], and the key-value store, a pure machine in
//! [`store`] that speaks c10d's TCPStore wire format. [`Session`] is an agent's connection to the coordinator, and
//! [`Meeting`] its way there. This crate knows nothing of ranks as processes, of devices or of libtorch.
//!
//! In the book: `docs/clusters.md`.

pub mod address;
mod alive;
mod auth;
mod backend;
mod error;
mod host;
pub mod machine;
pub mod store;
mod tls;

pub use auth::Token;
pub use backend::{Endpoint, EtcdConfig, EtcdTls, Meeting, MeetingConfig, Patience, Place, Role, Session};
pub use error::Error;
pub use host::{Host, HostConfig};

/// Whether this build can meet through etcd: its feature `etcd`.
pub const HAS_ETCD: bool = cfg!(feature = "etcd");
/// Whether this build can encrypt what agents say: its feature `tls`.
pub const HAS_TLS: bool = cfg!(feature = "tls");
