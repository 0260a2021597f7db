use std::sync::Arc;

use ::parquet::record::{Field, Row as Decoded};

use crate::{Error, Result};

/// A value in a [`Row`].
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    /// There is none.
    Null,
    /// True or false.
    Bool(bool),
    /// An integer, a date (in days) or a time (in the file's unit).
    Int(i64),
    /// A floating-point number.
    Float(f64),
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// Values of one type.
    List(Vec<Cell>),
}

/// A row of a [`Parquet`](super::Parquet) file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    columns: Arc<[String]>,
    cells: Vec<Cell>,
}

impl Row {
    /// The names of the columns are shared by the rows of a group.
    pub(super) fn new(row: Decoded, names: &mut Option<Arc<[String]>>) -> Result<Self, String> {
        let columns = row.into_columns();
        let names = names.get_or_insert_with(|| columns.iter().map(|(name, _)| name.clone()).collect());
        let cells: Result<Vec<_>, String> = columns
            .into_iter()
            .map(|(name, field)| {
                cell(field).map_err(|kind| format!("column `{name}` is {kind}, which is not read"))
            })
            .collect();
        Ok(Self { columns: Arc::clone(names), cells: cells? })
    }

    /// The value of a column.
    ///
    /// # Errors
    /// [`Error::Usage`] where there is no such column; says what there is.
    pub fn cell(&self, column: &str) -> Result<&Cell> {
        let at = self.columns.iter().position(|name| name == column);
        at.and_then(|at| self.cells.get(at)).ok_or_else(|| {
            Error::Usage(format!("no column `{column}`; there are {}", self.columns.join(", ")))
        })
    }

    /// The integer of a column; a boolean is 0 or 1.
    ///
    /// # Errors
    /// [`Error::Usage`] where there is no such column, or it has something else.
    pub fn int(&self, column: &str) -> Result<i64> {
        match self.cell(column)? {
            Cell::Int(value) => Ok(*value),
            Cell::Bool(value) => Ok((*value).into()),
            other => Err(unexpected(column, other, "an integer")),
        }
    }

    /// The number of a column.
    ///
    /// # Errors
    /// As [`Row::int`].
    pub fn float(&self, column: &str) -> Result<f64> {
        match self.cell(column)? {
            Cell::Float(value) => Ok(*value),
            Cell::Int(value) => Ok(*value as f64),
            other => Err(unexpected(column, other, "a number")),
        }
    }

    /// The text of a column.
    ///
    /// # Errors
    /// As [`Row::int`].
    pub fn text(&self, column: &str) -> Result<&str> {
        match self.cell(column)? {
            Cell::Text(text) => Ok(text),
            other => Err(unexpected(column, other, "text")),
        }
    }

    /// The bytes of a column, or of its text.
    ///
    /// # Errors
    /// As [`Row::int`].
    pub fn bytes(&self, column: &str) -> Result<&[u8]> {
        match self.cell(column)? {
            Cell::Bytes(bytes) => Ok(bytes),
            Cell::Text(text) => Ok(text.as_bytes()),
            other => Err(unexpected(column, other, "bytes")),
        }
    }

    /// The list of integers of a column: tokens, say.
    ///
    /// # Errors
    /// As [`Row::int`].
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

    /// The list of numbers of a column: an embedding, say.
    ///
    /// # Errors
    /// As [`Row::int`].
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
    };
    Error::Usage(format!("column `{column}` has {kind} and not {wanted}"))
}

/// The value, or what it is where there is no cell for it.
fn cell(field: Field) -> Result<Cell, &'static str> {
    Ok(match field {
        Field::Null => Cell::Null,
        Field::Bool(value) => Cell::Bool(value),
        Field::Byte(value) => Cell::Int(value.into()),
        Field::Short(value) => Cell::Int(value.into()),
        Field::Int(value) | Field::Date(value) | Field::TimeMillis(value) => Cell::Int(value.into()),
        Field::Long(value)
        | Field::TimeMicros(value)
        | Field::TimestampMillis(value)
        | Field::TimestampMicros(value) => Cell::Int(value),
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
            Cell::List(list.elements().iter().cloned().map(cell).collect::<Result<_, _>>()?)
        }
        Field::Decimal(_) => return Err("a decimal"),
        Field::Group(_) => return Err("a group"),
        Field::MapInternal(_) => return Err("a map"),
    })
}
