//! The frames of a TFRecord file: length, its checksum, data, their checksum.

/// Returns `len u64 | masked crc32c of len, u32 | data | masked crc32c of data, u32`, all
/// little-endian.
pub(super) fn frame(data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u64).to_le_bytes();
    [&len[..], &masked(&len).to_le_bytes(), data, &masked(data).to_le_bytes()].concat()
}

/// Returns the checksum, masked like in TensorFlow since the data may contain checksums.
fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::super::messages::{Content, Event, Item};
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The expected bytes are those of TensorBoard 2.21:
    /// `RecordWriter(...).write(Event(...).SerializeToString())`.
    #[test]
    fn records_are_those_that_tensorboard_writes() {
        let version = Event { wall_time: 1.5, step: 0, content: Content::Version };
        let item = Item::Scalar { tag: "train/loss".into(), value: 0.25 };
        let scalar = Event { wall_time: 2.5, step: 300, content: Content::Summary(vec![item]) };
        let start = Event { wall_time: 3.5, step: 7, content: Content::SessionStart };
        for (event, known) in [
            (version, "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"),
            (
                scalar,
                "2100000000000000017becf609000000000000044010ac022a130a110a0a747261696e2f6c6f7373150000803e3cc9cac5",
            ),
            (start, "0f000000000000006d532b09090000000000000c4010073a0208018c2b37c8"),
        ] {
            assert_eq!(hex(&frame(&event.encoded())), known);
        }
    }
}
