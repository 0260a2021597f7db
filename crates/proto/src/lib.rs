//! Formats that cross a process boundary of a job: environment variables, the messages between
//! agent and rank and between agents, the error file, and exit codes.
//!
//! This crate knows formats only: it opens no sockets, starts no processes and reads no clock. It
//! is the only crate that names bincode, so the encoding of the messages can be replaced here.
//!
//! In the book: `docs/design.md#three-layers`.

pub mod auth;
pub mod backend;
pub mod env;
pub mod error_file;
pub mod exit;
pub mod frame;
pub mod link;
pub mod rendezvous;
pub mod replica;
pub mod text;
