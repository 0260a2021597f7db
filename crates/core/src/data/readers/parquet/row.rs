use std::sync::Arc;

use ::parquet::record::{Field, Row as Decoded};
use ::parquet::schema::types::Type;

use super::schema::{Unit, element};
use crate::data::readers::file::only;
use crate::{Error, Result};

/// A value in a [`Row`].
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    /// No value.
    Null,
    /// True or false.
    Bool(bool),
    /// An integer, a date (days since 1970), a timestamp (microseconds since 1970) or a time of day
    /// (microseconds since midnight).
    ///
    /// The unit does not depend on the file's. Nanoseconds are rounded down, and timestamps stored
    /// as INT96 to milliseconds.
    Int(i64),
    /// A floating-point number.
    Float(f64),
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// Values of one type.
    List(Vec<Cell>),
    /// Named values: an image of Hugging Face's datasets is a struct of `bytes` and `path`.
    Struct(Vec<(String, Cell)>),
}

static NULL: Cell = Cell::Null;

impl Cell {
    /// Returns the field of a struct. `bbox.width` is the field of a struct within a struct. The
    /// fields of a null are null.
    pub fn field(&self, path: &str) -> Option<&Cell> {
        match self {
            Self::Struct(fields) => find(fields.iter().map(|(name, cell)| (name.as_str(), cell)), path),
            Self::Null => Some(&NULL),
            _ => None,
        }
    }

    /// Collects the paths of the fields, each with the prefix `name`.
    fn paths(&self, name: &str, paths: &mut Vec<String>) {
        match self {
            Self::Struct(fields) => {
                fields.iter().for_each(|(field, cell)| cell.paths(&format!("{name}.{field}"), paths));
            }
            _ => paths.push(name.to_owned()),
        }
    }
}

/// Returns the cell with this name, or the cell at this path within a struct.
fn find<'a>(cells: impl Iterator<Item = (&'a str, &'a Cell)> + Clone, path: &str) -> Option<&'a Cell> {
    let whole = cells.clone().find(|(name, _)| *name == path).map(|(_, cell)| cell);
    whole.or_else(|| {
        cells.into_iter().find_map(|(name, cell)| cell.field(path.strip_prefix(name)?.strip_prefix('.')?))
    })
}

/// A row of a [`Parquet`](super::Parquet) file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    columns: Arc<[String]>,
    cells: Vec<Cell>,
}

impl Row {
    /// Converts a decoded row. The rows of a group share the names of the columns.
    pub(super) fn new(
        row: Decoded,
        schema: &Type,
        names: &mut Option<Arc<[String]>>,
    ) -> Result<Self, String> {
        let columns = row.into_columns();
        let names = names.get_or_insert_with(|| columns.iter().map(|(name, _)| name.clone()).collect());
        let cells: Result<Vec<_>, String> = columns
            .into_iter()
            .zip(schema.get_fields())
            .map(|((name, field), kind)| {
                cell(field, kind).map_err(|kind| format!("column `{name}` has {kind}, which is not read"))
            })
            .collect();
        Ok(Self { columns: Arc::clone(names), cells: cells? })
    }

    /// Returns the value of a column. `image.bytes` is the field `bytes` of a column `image` of
    /// structs.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no such column, with a list of the columns, or there are two of
    /// that name.
    pub fn cell(&self, column: &str) -> Result<&Cell> {
        if self.columns.iter().any(|name| name == column) {
            return Ok(&self.cells[only(&self.columns, column)?]);
        }
        let cells = self.columns.iter().map(String::as_str).zip(&self.cells);
        find(cells.clone(), column).ok_or_else(|| {
            let mut there = Vec::new();
            cells.for_each(|(name, cell)| cell.paths(name, &mut there));
            Error::Usage(format!("no column `{column}`; there are {}", there.join(", ")))
        })
    }

    /// Returns the integer of a column. A boolean is 0 or 1.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no such column, or its value has another type.
    pub fn int(&self, column: &str) -> Result<i64> {
        match self.cell(column)? {
            Cell::Int(value) => Ok(*value),
            Cell::Bool(value) => Ok((*value).into()),
            other => Err(unexpected(column, other, "an integer")),
        }
    }

    /// Returns the number of a column.
    ///
    /// # Errors
    /// The errors of [`Row::int`].
    pub fn float(&self, column: &str) -> Result<f64> {
        match self.cell(column)? {
            Cell::Float(value) => Ok(*value),
            Cell::Int(value) => Ok(*value as f64),
            other => Err(unexpected(column, other, "a number")),
        }
    }

    /// Returns the text of a column.
    ///
    /// # Errors
    /// The errors of [`Row::int`].
    pub fn text(&self, column: &str) -> Result<&str> {
        match self.cell(column)? {
            Cell::Text(text) => Ok(text),
            other => Err(unexpected(column, other, "text")),
        }
    }

    /// Returns the bytes of a column, or of its text.
    ///
    /// # Errors
    /// The errors of [`Row::int`].
    pub fn bytes(&self, column: &str) -> Result<&[u8]> {
        match self.cell(column)? {
            Cell::Bytes(bytes) => Ok(bytes),
            Cell::Text(text) => Ok(text.as_bytes()),
            other => Err(unexpected(column, other, "bytes")),
        }
    }

    /// Returns the list of integers of a column, such as tokens.
    ///
    /// # Errors
    /// The errors of [`Row::int`].
    pub fn ints(&self, column: &str) -> Result<Vec<i64>> {
        let Cell::List(cells) = self.cell(column)? else {
            return Err(unexpected(column, self.cell(column)?, "a list"));
        };
        cells
            .iter()
            .map(|cell| match cell {
                Cell::Int(value) => Ok(*value),
                other => Err(unexpected(column, other, "a list of integers")),
            })
            .collect()
    }

    /// Returns the list of numbers of a column, such as an embedding.
    ///
    /// # Errors
    /// The errors of [`Row::int`].
    pub fn floats(&self, column: &str) -> Result<Vec<f64>> {
        let Cell::List(cells) = self.cell(column)? else {
            return Err(unexpected(column, self.cell(column)?, "a list"));
        };
        cells
            .iter()
            .map(|cell| match cell {
                Cell::Float(value) => Ok(*value),
                Cell::Int(value) => Ok(*value as f64),
                other => Err(unexpected(column, other, "a list of numbers")),
            })
            .collect()
    }
}

fn unexpected(column: &str, cell: &Cell, wanted: &str) -> Error {
    let kind = match cell {
        Cell::Null => "nothing",
        Cell::Bool(_) => "a boolean",
        Cell::Int(_) => "an integer",
        Cell::Float(_) => "a floating-point number",
        Cell::Text(_) => "text",
        Cell::Bytes(_) => "bytes",
        Cell::List(_) => "a list",
        Cell::Struct(_) => "a struct",
    };
    Error::Usage(format!("column `{column}` has {kind} and not {wanted}"))
}

/// Converts a value. If there is no cell for it, returns its description.
fn cell(field: Field, kind: &Type) -> Result<Cell, &'static str> {
    let time = |value: i64, unit: Unit| unit.to_micros(value).map(Cell::Int).ok_or("a time beyond 63 bits");
    Ok(match field {
        Field::Null => Cell::Null,
        Field::Bool(value) => Cell::Bool(value),
        Field::Byte(value) => Cell::Int(value.into()),
        Field::Short(value) => Cell::Int(value.into()),
        Field::Date(value) => Cell::Int(value.into()),
        Field::Int(value) => time(value.into(), Unit::of(kind))?,
        Field::Long(value) => time(value, Unit::of(kind))?,
        Field::TimeMillis(value) => time(value.into(), Unit::Millis)?,
        Field::TimestampMillis(value) => time(value, Unit::Millis)?,
        Field::TimeMicros(value) | Field::TimestampMicros(value) => Cell::Int(value),
        Field::UByte(value) => Cell::Int(value.into()),
        Field::UShort(value) => Cell::Int(value.into()),
        Field::UInt(value) => Cell::Int(value.into()),
        Field::ULong(value) => Cell::Int(value.try_into().map_err(|_| "an integer beyond 63 bits")?),
        Field::Float16(value) => Cell::Float(value.to_f64()),
        Field::Float(value) => Cell::Float(value.into()),
        Field::Double(value) => Cell::Float(value),
        Field::Str(text) => Cell::Text(text),
        Field::Bytes(bytes) => Cell::Bytes(bytes.data().to_vec()),
        Field::ListInternal(list) => {
            let kind = element(kind);
            let cells = list.elements().iter().map(|field| cell(field.clone(), kind));
            Cell::List(cells.collect::<Result<_, _>>()?)
        }
        Field::Group(row) => {
            let fields = row.into_columns().into_iter().zip(kind.get_fields());
            let fields = fields.map(|((name, field), kind)| Ok((name, cell(field, kind)?)));
            Cell::Struct(fields.collect::<Result<_, &'static str>>()?)
        }
        Field::Decimal(_) => return Err("a decimal"),
        Field::MapInternal(_) => return Err("a map"),
    })
}
