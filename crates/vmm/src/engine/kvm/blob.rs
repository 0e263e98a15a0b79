//! Structures of KVM's interface inside a saved state: hexadecimal digits, because nobody but KVM reads them.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A structure that is saved as its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blob<T>(pub(super) T);

impl<T: IntoBytes + Immutable> Serialize for Blob<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |value: u8| char::from_digit(value.into(), 16).unwrap_or('0');
        let digits: String = self.0.as_bytes().iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 0xF)]).collect();
        serializer.serialize_str(&digits)
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Blob<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Blob<T>, D::Error> {
        let digits = String::deserialize(deserializer)?;
        let digit = |value: u8| char::from(value).to_digit(16).map(|value| value as u8);
        let bytes: Option<Vec<u8>> = digits
            .as_bytes()
            .chunks(2)
            .map(|pair| match pair {
                [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
                _ => None,
            })
            .collect();
        let bytes = bytes.ok_or_else(|| D::Error::custom("not pairs of hexadecimal digits"))?;
        let found = bytes.len();
        T::read_from_bytes(&bytes)
            .map(Blob)
            .map_err(|_| D::Error::custom(format!("{found} bytes for a structure of {}", size_of::<T>())))
    }
}
