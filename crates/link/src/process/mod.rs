//! State that belongs to the whole process: signals, inherited descriptors, open connections. It
//! takes calls into the system that the compiler cannot check, and nothing else in the crate does.
//!
//! In the book: `docs/design.md#three-layers`.

pub mod inherit;
pub mod signals;
mod sockets;

pub use sockets::Connections;
