//! Protocol buffers, as far as events need them:
//! <https://protobuf.dev/programming-guides/encoding/>.

/// A message under construction. A field that is zero or empty may be left out, like in proto3.
#[derive(Default)]
pub(super) struct Message(Vec<u8>);

const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

impl Message {
    pub(super) fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub(super) fn integer(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3 | VARINT);
        self.varint(value);
        self
    }

    #[must_use]
    pub(super) fn float(mut self, field: u64, value: f32) -> Self {
        self.varint(field << 3 | FIXED32);
        self.0.extend(value.to_le_bytes());
        self
    }

    #[must_use]
    pub(super) fn double(mut self, field: u64, value: f64) -> Self {
        self.varint(field << 3 | FIXED64);
        self.0.extend(value.to_le_bytes());
        self
    }

    #[must_use]
    pub(super) fn doubles(self, field: u64, values: &[f64]) -> Self {
        let packed: Vec<_> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.bytes(field, &packed)
    }

    #[must_use]
    pub(super) fn bytes(mut self, field: u64, bytes: &[u8]) -> Self {
        self.varint(field << 3 | BYTES);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    #[must_use]
    pub(super) fn text(self, field: u64, text: &str) -> Self {
        self.bytes(field, text.as_bytes())
    }

    #[must_use]
    pub(super) fn message(self, field: u64, message: Self) -> Self {
        self.bytes(field, &message.0)
    }

    pub(super) fn encoded(self) -> Vec<u8> {
        self.0
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_those_of_the_specification() {
        for (value, bytes) in
            [(0, &[0][..]), (127, &[0x7f]), (150, &[0x96, 0x01]), (1 << 32, &[0x80, 0x80, 0x80, 0x80, 0x10])]
        {
            assert_eq!(Message::new().integer(1, value).encoded(), [&[0x08], bytes].concat());
        }
        assert_eq!(Message::new().text(2, "testing").encoded(), [&[0x12, 0x07][..], b"testing"].concat());
    }
}
