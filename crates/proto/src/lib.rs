//! All that crosses a process boundary in a job: environment variables, the messages between agent and rank and
//! between agents, the error file, and exit codes.
//!
//! This crate knows formats only. It opens no socket, spawns nothing and reads no clock. It is the only crate that names
//! bincode, so the encoding of the messages can be replaced here.
//!
//! In the book: `docs/design.md#three-layers`.

pub mod auth;
pub mod backend;
pub mod copies;
pub mod env;
pub mod error_file;
pub mod exit;
pub mod frame;
pub mod link;
pub mod rendezvous;
pub mod text;
