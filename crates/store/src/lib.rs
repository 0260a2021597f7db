//! The key-value store of the ranks, in the wire format of c10d's TCPStore (torch 2.13,
//! `torch/csrc/distributed/c10d/TCPStoreBackend.cpp`).
//!
//! [`codec`] decodes requests, and [`state`] answers them. Both are pure: `ice-rendezvous` moves the
//! bytes.
//!
//! In the book: `docs/clusters.md#who-may-join`.

pub mod codec;
pub mod state;
pub mod values;
