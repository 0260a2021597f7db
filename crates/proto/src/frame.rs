//! Frames: the layout of messages on a byte stream.
//!
//! ```text
//! offset  size  field
//!      0     4  magic   "ICE\x01"
//!      4     2  version, little-endian
//!      6     2  reserved, zero
//!      8     4  length of the body in bytes, little-endian
//!     12     4  crc32c of the body, little-endian
//!     16     n  body: one bincode value, and nothing after it
//! ```
//!
//! The decoder trusts none of its bytes: it checks the length against the limit before it allocates
//! memory, and the first invalid byte makes the stream unusable.
//!
//! In the book: `docs/design.md#the-network-is-hostile`.

use std::io::{self, Read};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// First bytes of every frame. No command of TCPStore starts with `I`, so the two protocols can
/// share a port.
pub const MAGIC: [u8; 4] = *b"ICE\x01";
/// Version of the messages of this crate, which both ends of a channel must share. Increased when a
/// released message changes.
pub const VERSION: u16 = 1;
/// Length of the header in bytes.
pub const HEADER_LEN: usize = 16;
/// Maximum length of a body in bytes.
pub const MAX_BODY: usize = 1 << 20;

/// Bytes that are not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The stream does not start with [`MAGIC`]: the peer speaks another protocol.
    #[error("the peer does not speak the ice protocol (first bytes {0:02x?})")]
    Magic([u8; 4]),
    /// The peer is of another version.
    #[error(
        "the peer speaks version {theirs} of the ice protocol, this side {VERSION}: use the same release everywhere"
    )]
    Version {
        /// Version of the frame.
        theirs: u16,
    },
    /// The body would be larger than [`MAX_BODY`].
    #[error("a message of {len} bytes is over the limit of {MAX_BODY}")]
    TooLarge {
        /// Announced length.
        len: usize,
    },
    /// The checksum of the body does not match, or reserved bits are set.
    #[error("a message was damaged on its way (checksum does not match)")]
    Damaged,
    /// The body is not exactly one value of the expected type.
    #[error("a message could not be decoded: {0}")]
    Body(String),
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<MAX_BODY>()
}

/// Encodes one message as a frame.
///
/// # Errors
/// [`FrameError::TooLarge`] or [`FrameError::Body`] if the message does not fit into a frame.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; HEADER_LEN];
    bincode::serde::encode_into_std_write(message, &mut frame, config())
        .map_err(|error| FrameError::Body(error.to_string()))?;
    let len = frame.len() - HEADER_LEN;
    if len > MAX_BODY {
        return Err(FrameError::TooLarge { len });
    }
    let crc = crc32c::crc32c(&frame[HEADER_LEN..]);
    frame[0..4].copy_from_slice(&MAGIC);
    frame[4..6].copy_from_slice(&VERSION.to_le_bytes());
    frame[8..12].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
    frame[12..16].copy_from_slice(&crc.to_le_bytes());
    Ok(frame)
}

/// Decodes a byte stream into messages.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    consumed: usize,
}

impl Decoder {
    /// Creates an empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends received bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.consumed);
        self.consumed = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// Decodes the next complete message; `None` if it needs more bytes.
    ///
    /// # Errors
    /// Any [`FrameError`]; the stream is unusable after one.
    pub fn next_message<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let pending = &self.buffer[self.consumed..];
        let Some(header) = pending.first_chunk::<HEADER_LEN>() else {
            return match pending.iter().zip(MAGIC).all(|(a, b)| *a == b) {
                true => Ok(None),
                false => Err(bad_magic(pending)),
            };
        };
        if header[0..4] != MAGIC {
            return Err(bad_magic(header));
        }
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version != VERSION {
            return Err(FrameError::Version { theirs: version });
        }
        if header[6..8] != [0, 0] {
            return Err(FrameError::Damaged);
        }
        let len = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
        if len > MAX_BODY {
            return Err(FrameError::TooLarge { len });
        }
        let Some(body) = pending.get(HEADER_LEN..HEADER_LEN + len) else {
            return Ok(None);
        };
        if crc32c::crc32c(body).to_le_bytes() != header[12..16] {
            return Err(FrameError::Damaged);
        }
        let (message, read) = bincode::serde::decode_from_slice(body, config())
            .map_err(|error| FrameError::Body(error.to_string()))?;
        if read != len {
            return Err(FrameError::Body(format!("{} bytes after the value", len - read)));
        }
        self.consumed += HEADER_LEN + len;
        Ok(Some(message))
    }
}

/// Reads one message from a stream, and no byte after it, since other data may follow. Blocks.
///
/// # Errors
/// The error of the stream, or a [`FrameError`] of kind `InvalidData`.
pub fn read<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<T> {
    let invalid = |error: FrameError| io::Error::new(io::ErrorKind::InvalidData, error);
    let (mut decoder, mut header) = (Decoder::new(), [0; HEADER_LEN]);
    from.read_exact(&mut header)?;
    decoder.feed(&header);
    if let Some(message) = decoder.next_message().map_err(invalid)? {
        return Ok(message);
    }
    // The decoder has checked the length against the limit.
    let mut body = vec![0; u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize];
    from.read_exact(&mut body)?;
    decoder.feed(&body);
    decoder.next_message().map_err(invalid)?.ok_or_else(|| invalid(FrameError::Damaged))
}

fn bad_magic(bytes: &[u8]) -> FrameError {
    let mut first = [0; 4];
    let n = bytes.len().min(4);
    first[..n].copy_from_slice(&bytes[..n]);
    FrameError::Magic(first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::link::{Doing, FromRank};

    fn message() -> FromRank {
        FromRank::Heartbeat { step: 7, activity: 9, doing: Doing::Steps, applied_ms: 11 }
    }

    #[test]
    fn frame_cut_at_any_byte_is_decoded() {
        let frame = encode(&message()).unwrap();
        for cut in 0..frame.len() {
            let mut decoder = Decoder::new();
            decoder.feed(&frame[..cut]);
            assert_eq!(decoder.next_message::<FromRank>().unwrap(), None);
            decoder.feed(&frame[cut..]);
            assert_eq!(decoder.next_message::<FromRank>().unwrap(), Some(message()));
            assert_eq!(decoder.next_message::<FromRank>().unwrap(), None);
        }
    }

    #[test]
    fn flipped_bit_anywhere_is_detected() {
        let frame = encode(&message()).unwrap();
        for bit in 0..frame.len() * 8 {
            let mut damaged = frame.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let mut decoder = Decoder::new();
            decoder.feed(&damaged);
            assert!(!matches!(decoder.next_message::<FromRank>(), Ok(Some(_))), "bit {bit} was not noticed");
        }
    }

    #[test]
    fn oversized_length_is_refused_before_the_body_arrives() {
        let mut frame = encode(&message()).unwrap();
        frame[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut decoder = Decoder::new();
        decoder.feed(&frame[..HEADER_LEN]);
        assert_eq!(decoder.next_message::<FromRank>(), Err(FrameError::TooLarge { len: u32::MAX as usize }));
    }

    #[test]
    fn trailing_bytes_in_a_body_are_refused() {
        #[derive(serde::Serialize)]
        struct Long(FromRank, u8);
        let mut decoder = Decoder::new();
        decoder.feed(&encode(&Long(message(), 9)).unwrap());
        assert!(matches!(decoder.next_message::<FromRank>(), Err(FrameError::Body(_))));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::new();
            decoder.feed(&bytes);
            let _ = decoder.next_message::<FromRank>();
        }
    }
}
