//! The key-value store of the ranks: the pure part, and a client for ranks.
//!
//! In the book: `docs/clusters.md#who-may-join`.

pub use ice_store::{codec, state, values};

pub mod client;
