//! The key-value store that ranks meet in, in the wire format of c10d's TCPStore (torch 2.13,
//! `torch/csrc/distributed/c10d/TCPStoreBackend.cpp`).
//!
//! [`codec`] turns bytes into requests, [`state`] answers them. Both are pure; [`Host`](crate::Host) moves the bytes.
//!
//! In the book: who may ask it what, `docs/clusters.md#who-may-join`.

pub mod client;
pub mod codec;
pub mod state;
pub mod values;
