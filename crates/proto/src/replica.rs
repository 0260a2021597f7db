//! Replication of a rank's own shards to the memory of another rank, the holder.
//!
//! ```text
//! owner                                    holder
//!   OwnerHello                           →        once: its 32 bytes from the store of the round
//!                                                 prove that the owner is a rank of the round
//!   ReplicaHeader, then the parts' bytes →        once per replica
//!                                       ←  ReplicaStored, once the replica is complete
//! ```
//!
//! In the book: `docs/elasticity.md#sharded-optimizers`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Maximum number of parts of a replica.
pub const MAX_PARTS: usize = 16;

/// First message of a connection.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerHello {
    /// Token that the holder has published in the store for the ranks of the round.
    pub token: [u8; 32],
    /// Rank of the owner.
    pub owner: u32,
}

impl fmt::Debug for OwnerHello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hello").field("owner", &self.owner).finish_non_exhaustive()
    }
}

/// Header of a replica, followed by the bytes of its parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaHeader {
    /// Number of the replica, equal for all ranks that replicate one state.
    pub number: u64,
    /// Last replica that is known to be complete on all ranks. The holder keeps it in addition to
    /// this one.
    pub whole: Option<u64>,
    /// Rank of the owner when the replica was made.
    pub owner: u32,
    /// Number of ranks among which the state was sharded.
    pub of: u32,
    /// Training steps of the state.
    pub step: u64,
    /// Parts that follow, in this order; at most [`MAX_PARTS`].
    pub parts: Vec<ReplicaPart>,
}

/// A part of a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaPart {
    /// Name of the part.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32C of the bytes.
    pub crc32c: u32,
}

/// Confirmation that a replica is complete in the holder's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaStored {
    /// Number of the replica.
    pub number: u64,
}

/// Returns the CRC-32C of these bytes.
pub fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}
