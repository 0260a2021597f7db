//! Numbers that are given once, or for each dimension.

/// A number for each of `N` dimensions. Made from one number for all of them, such as `3`, or from
/// an array, such as `[3, 5]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes<const N: usize>(pub(crate) [i64; N]);

impl<const N: usize> From<i64> for Sizes<N> {
    fn from(size: i64) -> Self {
        Self([size; N])
    }
}

impl<const N: usize> From<[i64; N]> for Sizes<N> {
    fn from(sizes: [i64; N]) -> Self {
        Self(sizes)
    }
}

/// The last dimensions of a tensor. Made from one size, such as `768`, or from several, such as
/// `[3, 5]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape(pub(crate) Vec<i64>);

impl From<i64> for Shape {
    fn from(size: i64) -> Self {
        Self(vec![size])
    }
}

impl<const N: usize> From<[i64; N]> for Shape {
    fn from(sizes: [i64; N]) -> Self {
        Self(sizes.into())
    }
}

impl From<&[i64]> for Shape {
    fn from(sizes: &[i64]) -> Self {
        Self(sizes.into())
    }
}

impl From<Vec<i64>> for Shape {
    fn from(sizes: Vec<i64>) -> Self {
        Self(sizes)
    }
}
