//! The first three messages between an agent and the coordinator. With them each end proves that it
//! knows the job's token, if there is one, without revealing it. A proof is valid for one
//! connection only, so it cannot be replayed.
//!
//! A proof covers the role of its sender, whether the connection uses TLS, both nonces and, inside
//! TLS, the channel binding of the connection (RFC 9266).
//!
//! In the book: `docs/clusters.md#who-may-join`.

use serde::{Deserialize, Serialize};

/// Random bytes for one use.
pub type Nonce = [u8; 32];
/// HMAC-SHA-256 (RFC 2104) with the token as key.
pub type Proof = [u8; 32];

/// The agent's first message: a challenge to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// Nonce that the coordinator's proof must cover.
    pub nonce: Nonce,
}

/// The coordinator's reply: its proof, and a challenge to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// Nonce that the agent's proof must cover.
    pub nonce: Nonce,
    /// The coordinator's proof; `None` if it has no token.
    pub proof: Option<Proof>,
}

/// The agent's reply. [`crate::rendezvous::ToCoordinator::Hello`] follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The agent's proof; `None` if it has no token.
    pub proof: Option<Proof>,
}
