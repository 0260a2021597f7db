//! How ranks give each other copies of what they alone have of a state.
//!
//! ```text
//! owner                                   holder
//!   Hello                               →            once: 32 bytes from the store of the round prove that it is a rank of it
//!   Parcel, then the bytes of its parts →            again and again
//!                                       ←  Kept      once the copy is whole
//! ```
//!
//! In the book: `docs/elasticity.md#sharded-optimizers`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The most parts of a parcel.
pub const MAX_PARTS: usize = 16;

/// What a connection begins with.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What the holder has left in the store for the ranks of the round.
    pub token: [u8; 32],
    /// Rank of the owner.
    pub owner: u32,
}

impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hello").field("owner", &self.owner).finish_non_exhaustive()
    }
}

/// A copy is about to follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parcel {
    /// Number of the copy, the same for all ranks that copy their parts of one state.
    pub number: u64,
    /// The last copy that is known to be whole on all ranks, which is to be kept beside this one.
    pub whole: Option<u64>,
    /// Rank of the owner, when it was made.
    pub owner: u32,
    /// Ranks among which the state was divided.
    pub of: u32,
    /// Training steps that the state has behind it.
    pub step: u64,
    /// What follows, in this order; at most [`MAX_PARTS`].
    pub parts: Vec<Part>,
}

/// A run of bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What it is.
    pub name: String,
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32C of them.
    pub crc32c: u32,
}

/// The copy is whole in the holder's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Its number.
    pub number: u64,
}

/// CRC-32C of these bytes.
pub fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}
