//! The first three messages between an agent and the coordinator: each shows that it knows the job's token, where there is one,
//! without saying it. What is shown holds for this connection alone, so that it cannot be replayed.
//!
//! A proof is over who shows it, whether that is inside of TLS, both nonces and, inside of TLS, what tells this connection of TLS from all
//! others (RFC 9266).
//!
//! In the book: `docs/clusters.md#who-may-join`.

use serde::{Deserialize, Serialize};

/// Random bytes that are used once.
pub type Nonce = [u8; 32];
/// HMAC-SHA-256 (RFC 2104) with the token as key.
pub type Proof = [u8; 32];

/// From the agent: a question for the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// What the coordinator's proof is to be about.
    pub nonce: Nonce,
}

/// From the coordinator: its answer, and a question for the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// What the agent's proof is to be about.
    pub nonce: Nonce,
    /// The coordinator's; `None` where it has no token.
    pub proof: Option<Proof>,
}

/// From the agent: its answer. [`crate::rendezvous::ToCoordinator::Hello`] follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The agent's; `None` where it has no token.
    pub proof: Option<Proof>,
}
