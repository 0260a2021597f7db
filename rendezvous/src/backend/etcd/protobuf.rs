//! The part of protocol buffers that etcd's messages need:
//! <https://protobuf.dev/programming-guides/encoding/>.

/// Bytes that are not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it ends too early, or a field has a type that there is not")]
pub(super) struct Malformed;

/// An encoder of one message.
#[derive(Debug, Default)]
pub(super) struct Writer(Vec<u8>);

const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const BYTES: u8 = 2;
const FIXED32: u8 = 5;

impl Writer {
    pub(super) fn finish(self) -> Vec<u8> {
        self.0
    }

    /// Writes a number, including 0, which matters in a `oneof`.
    #[must_use]
    pub(super) fn int(mut self, field: u8, value: i64) -> Self {
        self.varint(u64::from(field << 3 | VARINT));
        self.varint(value.cast_unsigned());
        self
    }

    #[must_use]
    pub(super) fn bytes(mut self, field: u8, value: &[u8]) -> Self {
        self.varint(u64::from(field << 3 | BYTES));
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    #[must_use]
    pub(super) fn message(self, field: u8, value: Self) -> Self {
        self.bytes(field, &value.0)
    }

    #[must_use]
    pub(super) fn messages(self, field: u8, values: impl IntoIterator<Item = Self>) -> Self {
        values.into_iter().fold(self, |writer, value| writer.message(field, value))
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// Value of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Int(u64),
    Bytes(&'a [u8]),
    /// A value of a type that etcd's messages do not use.
    Other,
}

impl<'a> Value<'a> {
    pub(super) fn int(self) -> Result<i64, Malformed> {
        match self {
            Self::Int(value) => Ok(value.cast_signed()),
            _ => Err(Malformed),
        }
    }

    pub(super) fn bytes(self) -> Result<&'a [u8], Malformed> {
        match self {
            Self::Bytes(value) => Ok(value),
            _ => Err(Malformed),
        }
    }
}

/// Iterates over the fields of a message with their numbers. An error ends the iteration.
#[derive(Debug)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or(Malformed))
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let key = self.varint()?;
        let value = match (key & 7) as u8 {
            VARINT => Value::Int(self.varint()?),
            BYTES => {
                let length = usize::try_from(self.varint()?).ok()?;
                Value::Bytes(self.take(length)?)
            }
            FIXED64 => self.take(8).map(|_| Value::Other)?,
            FIXED32 => self.take(4).map(|_| Value::Other)?,
            _ => return None,
        };
        Some((key >> 3, value))
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            let part = u64::from(byte & 0x7F);
            if shift == 63 && part > 1 {
                return None;
            }
            value |= part << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn encoding_matches_the_specification() {
        let writer = Writer::default().int(1, 150).bytes(2, b"testing").int(3, -1);
        let expected = [
            &[0x08, 0x96, 0x01, 0x12, 0x07][..],
            b"testing",
            &[0x18, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1],
        ];
        assert_eq!(writer.finish(), expected.concat());
    }

    #[test]
    fn malformed_message_is_an_error() {
        for bytes in [
            &[0x08][..],
            &[0x80],
            &[0x12, 3, b'a', b'b'],
            &[0x12, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1],
            &[0x0B],
            &[0x09, 0, 0],
            &[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2],
            &[0x08, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 0],
        ] {
            assert_eq!(Fields(bytes).last(), Some(Err(Malformed)), "{bytes:?}");
        }
        assert_eq!(Value::Bytes(b"").int(), Err(Malformed));
        assert_eq!(Value::Int(0).bytes(), Err(Malformed));
    }

    proptest! {
        #[test]
        fn encoded_value_round_trips(int: i64, bytes: Vec<u8>, field in 1u8..16) {
            let inner = Writer::default().int(field, int).bytes(field, &bytes);
            let written = Writer::default().messages(field, [inner]).finish();
            let number = u64::from(field);
            let outer: Vec<_> = Fields(&written).collect();
            let [Ok((outer, Value::Bytes(inner)))] = outer[..] else { panic!("{outer:?}") };
            prop_assert_eq!(outer, number);
            let inner: Vec<_> = Fields(inner).collect();
            prop_assert_eq!(inner, [
                Ok((number, Value::Int(int.cast_unsigned()))),
                Ok((number, Value::Bytes(&bytes))),
            ]);
        }

        #[test]
        fn decoding_of_any_bytes_terminates(bytes: Vec<u8>) {
            // Every field has at least one byte, and an error is the last item.
            prop_assert!(Fields(&bytes).count() <= bytes.len());
        }
    }
}
