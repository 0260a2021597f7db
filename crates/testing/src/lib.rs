//! Parts of tests and simulations that several crates use.
//!
//! In the book: `docs/design.md#decisions-are-made-by-machines-without-a-clock`.

mod random;

pub use random::Random;
