//! Jobs of several nodes, on networks of their own and through a real etcd.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod etcd;
mod hosts;
mod network;
mod server;
#[expect(dead_code, reason = "other tests use the rest")]
#[path = "../support/mod.rs"]
mod support;
