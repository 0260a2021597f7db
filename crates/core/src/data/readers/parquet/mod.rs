//! Rows of Parquet files, without Arrow.

mod row;
mod schema;

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::schema::types::Type;

pub use row::{Cell, Row};

use super::file::{Fingerprint, fail};
use crate::data::worker_pool::{guard, lock};
use crate::data::{Items, SampleRng, ShardIter, Stream};
use crate::{Error, Result};

/// Limit of the size that a row group declares, uncompressed, in bytes.
const MAX_GROUP: i64 = 1 << 32;
/// Default number of row groups that are kept decoded.
const GROUPS_KEPT: usize = 4;

/// The rows of one or more Parquet files, uncompressed or compressed with Snappy or Zstandard.
///
/// Cells are numbers, text, bytes, lists and structs: `row.bytes("image.bytes")` returns the bytes
/// of an image in a Hugging Face dataset. Decimals and maps are errors, unless [`Parquet::columns`]
/// leaves them out.
///
/// Access to a row decodes its whole row group, and the last few groups are kept. Rows are
/// therefore best read as a [`Stream`], whose shards are the row groups: if a buffer shuffles them,
/// most rows come from groups that are still decoded. [`Items`] give access to any row. If they are
/// shuffled and not all groups are kept, each access may decode a group: see [`Parquet::keep`].
///
/// ```
/// use ice_core::StreamNode;
/// use ice_core::data::Stream;
/// use ice_core::data::readers::Parquet;
/// # fn node(path: &std::path::Path) -> ice_core::Result<()> {
/// let rows = Parquet::open([path])?.columns(&["text", "label"])?;
/// let samples = rows.map(|row| Ok((row.text("text")?.len() as i64, row.int("label")?)));
/// // Int64 `[64]` each.
/// let node = StreamNode::new(samples.stack()).shuffle(10_000).batch_size(64).workers(2);
/// # Ok(())
/// # }
/// ```
pub struct Parquet {
    groups: Vec<Group>,
    rows: usize,
    columns: Option<Vec<String>>,
    keep: usize,
    decoded: Mutex<VecDeque<(usize, Arc<Decoded>)>>,
    fingerprint: Fingerprint,
}

/// A row group of a file.
struct Group {
    path: Arc<Path>,
    number: usize,
    /// Number of rows before this group, and of this group.
    start: usize,
    rows: usize,
}

/// The rows of a group, once decoded. The thread that decodes them holds the lock, and other
/// threads that need them wait for it.
#[derive(Default)]
struct Decoded(Mutex<Option<Arc<[Row]>>>);

impl Parquet {
    /// Opens files with the same columns, in this order. Reads their footers.
    ///
    /// # Errors
    /// [`Error::Data`] if a file is missing, damaged, or compressed in a way that this reader does
    /// not support.
    pub fn open<P: Into<PathBuf>>(paths: impl IntoIterator<Item = P>) -> Result<Self> {
        let (mut groups, mut rows, mut fingerprint) = (Vec::new(), 0, Fingerprint::default());
        for path in paths {
            let path: PathBuf = path.into();
            let path: Arc<Path> = path.into();
            let reader = reader(&path)?;
            for (number, group) in reader.metadata().row_groups().iter().enumerate() {
                let size = group.total_byte_size();
                let count = usize::try_from(group.num_rows()).ok().filter(|&count| {
                    // Rejects rows without size in excessive numbers: no program writes such files.
                    (0..=MAX_GROUP).contains(&size) && count as i64 <= MAX_GROUP
                });
                let count = count.ok_or_else(|| {
                    fail(&path)(format!(
                        "row group {number} says that it has {} rows in {size} bytes",
                        group.num_rows()
                    ))
                })?;
                schema::check_codecs(group).map_err(fail(&path))?;
                groups.push(Group { path: Arc::clone(&path), number, start: rows, rows: count });
                rows += count;
            }
            fingerprint.add_file(&path)?;
        }
        Ok(Self { groups, rows, columns: None, keep: GROUPS_KEPT, decoded: Mutex::default(), fingerprint })
    }

    /// Reads only these columns. `image.bytes` is the field `bytes` of a column `image` of structs.
    ///
    /// # Errors
    /// [`Error::Data`] if a file has no such column, with a list of the columns.
    pub fn columns(mut self, names: &[&str]) -> Result<Self> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        for group in &self.groups {
            if group.number == 0 {
                projection(&reader(&group.path)?, &names).map_err(fail(&group.path))?;
            }
        }
        for name in &names {
            self.fingerprint.add(name.as_bytes());
        }
        self.columns = Some(names);
        Ok(self)
    }

    /// Sets the number of row groups that are kept decoded in memory, at least 1. Default: 4.
    #[must_use]
    pub fn keep(mut self, groups: usize) -> Self {
        self.keep = groups.max(1);
        self
    }

    fn row(&self, group: usize, row: usize) -> Result<Row> {
        let decoded = {
            let mut kept = lock(&self.decoded);
            let entry = kept.iter().position(|(number, _)| *number == group).and_then(|at| kept.remove(at));
            let (_, decoded) = entry.unwrap_or_else(|| (group, Arc::default()));
            kept.push_front((group, Arc::clone(&decoded)));
            kept.truncate(self.keep);
            decoded
        };
        let mut rows = lock(&decoded.0);
        let rows = match &*rows {
            Some(rows) => rows,
            None => &*rows.insert(self.decode(group)?),
        };
        let Group { path, number, .. } = &self.groups[group];
        rows.get(row).cloned().ok_or_else(|| fail(path)(format!("row group {number} has no row {row}")))
    }

    fn decode(&self, group: usize) -> Result<Arc<[Row]>> {
        let Group { path, number, rows, .. } = &self.groups[group];
        let named = |problem: String| fail(path)(format!("row group {number}: {problem}"));
        let decode = || {
            let reader = reader(path)?;
            let projection = self.columns.as_ref().map(|names| projection(&reader, names)).transpose();
            let projection = projection.map_err(&named)?;
            let root = reader.metadata().file_metadata().schema();
            let schema = projection.clone();
            let schema = schema.as_ref().unwrap_or(root);
            let text = |error: ParquetError| named(error.to_string());
            let found = reader.get_row_group(*number).map_err(text)?;
            let mut names = None;
            let mut decoded = Vec::new();
            for row in found.get_row_iter(projection).map_err(text)? {
                decoded.push(Row::new(row.map_err(text)?, schema, &mut names).map_err(&named)?);
            }
            Ok::<_, Error>(decoded)
        };
        // The decoders are known to panic on damaged files.
        let decoded = guard(decode).map_err(|error| match error {
            Error::Panicked(message) => named(format!("it is damaged: {message}")),
            error => error,
        })?;
        if decoded.len() != *rows {
            return Err(named(format!("{} rows instead of {rows}: it is damaged", decoded.len())));
        }
        Ok(decoded.into())
    }
}

fn reader(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = File::open(path).map_err(fail(path))?;
    let open = || SerializedFileReader::new(file).map_err(fail(path));
    guard(open).map_err(|error| match error {
        Error::Panicked(message) => fail(path)(format!("its footer is damaged: {message}")),
        error => error,
    })
}

/// Returns the schema with these columns only.
fn projection(reader: &SerializedFileReader<File>, names: &[String]) -> Result<Type, String> {
    let schema = reader.metadata().file_metadata().schema();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let fields = schema::select(schema.get_fields(), &names)?;
    let builder = Type::group_type_builder(schema.name()).with_fields(fields);
    builder.build().map_err(|error| error.to_string())
}

impl Items for Parquet {
    type Item = Row;

    fn len(&self) -> usize {
        self.rows
    }

    fn get(&self, index: usize, _: &mut SampleRng) -> Result<Row> {
        // An empty group has the same start as the next group, and is skipped.
        let group = self.groups.partition_point(|group| group.start + group.rows <= index);
        let start = self.groups.get(group).map_or(0, |group| group.start);
        self.row(group, index - start)
    }

    fn fingerprint(&self) -> u64 {
        self.fingerprint.finish()
    }
}

impl Stream for Parquet {
    /// Number of a row group, and number of a row in it.
    type LocatedSample = (usize, usize);
    type Item = Row;

    fn shards(&self) -> usize {
        self.groups.len()
    }

    fn open(&self, shard: usize) -> Result<ShardIter<(usize, usize)>> {
        Ok(Box::new((0..self.groups[shard].rows).map(move |row| Ok((shard, row)))))
    }

    fn load(&self, (group, row): (usize, usize), _: &mut SampleRng) -> Result<Row> {
        self.row(group, row)
    }

    fn samples(&self) -> Option<u64> {
        Some(self.rows as u64)
    }
}

#[cfg(test)]
mod tests;
