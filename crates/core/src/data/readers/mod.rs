//! Readers of common formats, one per file. Readers behind a feature name the feature.
//!
//! In the book: `docs/data.md#formats`.

#[cfg(feature = "csv")]
mod csv;
mod file;
mod idx;
#[cfg(feature = "images")]
mod images;
#[cfg(feature = "images")]
mod jpeg;
mod mnist;
#[cfg(feature = "parquet")]
mod parquet;
#[cfg(feature = "tar")]
mod tar;
mod token_files;
mod tokens;

#[cfg(feature = "csv")]
pub use self::csv::{Csv, CsvRow};
pub use self::idx::Idx;
#[cfg(feature = "images")]
pub use self::images::{ImageFolder, decode_image, read_image};
pub use self::mnist::{Labelled, Mnist, Split};
#[cfg(feature = "parquet")]
pub use self::parquet::{Cell, Parquet, Row};
#[cfg(feature = "tar")]
pub use self::tar::{TarFound, TarSample, TarShards};
pub use self::tokens::{TokenType, Tokens};
