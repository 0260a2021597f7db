//! How an agent reaches the agreement. One backend so far: static endpoints, with the coordinator in node 0's agent.

mod session;

pub use session::Session;
