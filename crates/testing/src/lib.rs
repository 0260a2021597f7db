//! Parts of tests and simulations that several crates use.
//!
//! In the book: `docs/project.md`.

mod random;

pub use random::Random;
