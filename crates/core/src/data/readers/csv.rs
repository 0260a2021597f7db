use std::cell::Cell;
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::str::FromStr;
use std::sync::Arc;

use ::csv::{ByteRecord, ReaderBuilder};

use super::file::{Fingerprint, fail, only};
use crate::data::{Items, SampleRng};
use crate::{Error, Result};

/// Size limit of a row in bytes. A longer row has a quote that is not closed.
const MAX_ROW: u64 = 1 << 24;

/// The rows of a CSV file whose first line names the columns. The start of each row is found once,
/// and a row is read on access.
///
/// ```
/// use ice_core::data::{Dataset, Items};
/// use ice_core::data::readers::Csv;
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("houses.csv");
/// std::fs::write(&path, "rooms,town,price\n3,\"Aachen, old\",1.5\n4,Bonn,2.5\n").unwrap();
/// let rows = Csv::open(&path)?;
/// let dataset = rows.map(|row| Ok((row.parse::<i64>("rooms")?, row.parse::<f32>("price")?))).stack();
/// // Int64 `[n]` and float `[n]`.
/// let (rooms, prices) = dataset.batch(&[1, 0], tch::Device::Cpu)?;
/// assert_eq!(Vec::<i64>::try_from(rooms).unwrap(), [4, 3]);
/// # Ok::<(), ice_core::Error>(())
/// ```
pub struct Csv {
    path: PathBuf,
    file: File,
    columns: Arc<[String]>,
    delimiter: u8,
    /// Start of each row, and end of the last row.
    offsets: Vec<u64>,
    fingerprint: u64,
}

/// A row of a [`Csv`].
#[derive(Debug, Clone)]
pub struct CsvRow {
    columns: Arc<[String]>,
    fields: ByteRecord,
}

impl Csv {
    /// Opens a file with commas between the fields.
    ///
    /// # Errors
    /// [`Error::Data`] if the file is missing, or has rows with different numbers of fields.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, b',')
    }

    /// Opens a file with another byte between the fields.
    ///
    /// # Errors
    /// The errors of [`Csv::open`].
    pub fn open_with(path: impl AsRef<Path>, delimiter: u8) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let file = File::open(&path).map_err(fail(&path))?;
        let budget = Rc::new(Cell::new(MAX_ROW));
        let source = Bounded { file: &file, budget: Rc::clone(&budget) };
        let mut reader = ReaderBuilder::new().delimiter(delimiter).from_reader(source);
        let headers = reader.headers().map_err(fail(&path))?;
        let columns: Arc<[String]> = headers.iter().map(str::to_owned).collect();
        let mut offsets = Vec::new();
        let mut record = ByteRecord::new();
        loop {
            budget.set(MAX_ROW);
            let start = reader.position().byte();
            if !reader.read_byte_record(&mut record).map_err(fail(&path))? {
                offsets.push(start);
                break;
            }
            offsets.push(record.position().map_or(start, ::csv::Position::byte));
        }
        let mut fingerprint = Fingerprint::default();
        fingerprint.add_file(&path)?;
        let fingerprint = fingerprint.finish();
        Ok(Self { path, file, columns, delimiter, offsets, fingerprint })
    }

    /// Returns the names of the columns.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }
}

/// A reader that limits the length of a row.
struct Bounded<'a> {
    file: &'a File,
    budget: Rc<Cell<u64>>,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        match self.budget.get().checked_sub(read as u64) {
            Some(left) => self.budget.set(left),
            None => {
                return Err(io::Error::other(format!(
                    "a row has more than {MAX_ROW} bytes: is a quote not closed?"
                )));
            }
        }
        Ok(read)
    }
}

impl Items for Csv {
    type Item = CsvRow;

    fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    fn get(&self, index: usize, _: &mut SampleRng) -> Result<CsvRow> {
        let (start, end) = (self.offsets[index], self.offsets[index + 1]);
        let mut bytes = vec![0; (end - start) as usize];
        self.file.read_exact_at(&mut bytes, start).map_err(fail(&self.path))?;
        let mut reader =
            ReaderBuilder::new().delimiter(self.delimiter).has_headers(false).from_reader(bytes.as_slice());
        let mut fields = ByteRecord::new();
        reader.read_byte_record(&mut fields).map_err(fail(&self.path))?;
        if fields.len() != self.columns.len() {
            return Err(fail(&self.path)(format!(
                "row {index} has {} fields for {} columns: the file has changed",
                fields.len(),
                self.columns.len()
            )));
        }
        Ok(CsvRow { columns: Arc::clone(&self.columns), fields })
    }

    fn fingerprint(&self) -> u64 {
        self.fingerprint
    }
}

impl CsvRow {
    /// Returns the field of a column.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no such column, or there are two of that name, or the field is
    /// not UTF-8.
    pub fn text(&self, column: &str) -> Result<&str> {
        let at = only(&self.columns, column)?;
        std::str::from_utf8(&self.fields[at])
            .map_err(|error| Error::Usage(format!("column `{column}`: {error}")))
    }

    /// Parses the field of a column as another type, without surrounding spaces.
    ///
    /// The values `True` and `False` of pandas and Python, and `TRUE` and `FALSE` of spreadsheets,
    /// can also be parsed as `bool`.
    ///
    /// # Errors
    /// The errors of [`CsvRow::text`], or a field that is not of that type.
    pub fn parse<T: FromStr<Err: Display>>(&self, column: &str) -> Result<T> {
        let text = self.text(column)?.trim();
        let parsed = text.parse().or_else(|error| match text {
            "True" | "TRUE" => "true".parse().map_err(|_| error),
            "False" | "FALSE" => "false".parse().map_err(|_| error),
            _ => Err(error),
        });
        parsed.map_err(|error| Error::Usage(format!("column `{column}`, `{text}`: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::Pass;

    fn open(content: &[u8]) -> (tempfile::TempDir, Result<Csv>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.csv");
        fs::write(&path, content).unwrap();
        let csv = Csv::open(&path);
        (folder, csv)
    }

    fn row(csv: &Csv, index: usize) -> CsvRow {
        csv.get(index, &mut Pass::new(0, 0).rng(0)).unwrap()
    }

    #[test]
    fn rows_are_found_in_any_order_whatever_is_in_their_quotes() {
        for end in ["", "\n", "\r\n\r\n"] {
            let rows = "\"1\",\"a\nb,\"\"c\"\"\"\r\n\n2,\n 3 ,é";
            let (_folder, csv) = open(format!("n,t\n{rows}{end}").as_bytes());
            let csv = csv.unwrap();
            assert_eq!((csv.len(), csv.columns()), (3, ["n".to_owned(), "t".to_owned()].as_slice()));
            for (index, number, text) in [(2, 3, "é"), (0, 1, "a\nb,\"c\""), (1, 2, "")] {
                let row = row(&csv, index);
                assert_eq!((row.parse::<i64>("n").unwrap(), row.text("t").unwrap()), (number, text));
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let message = open(b"a,b\n1,2\n3\n").1.err().unwrap().to_string();
        assert!(message.contains("x.csv") && message.contains("line: 3"), "{message}");
        let (_folder, csv) = open(b"a,b\n1,x\n2,\xff\n");
        let csv = csv.unwrap();
        let message = row(&csv, 0).parse::<f32>("b").unwrap_err().to_string();
        assert!(message.contains("column `b`, `x`"), "{message}");
        let message = row(&csv, 0).text("c").unwrap_err().to_string();
        assert!(message.contains("no column `c`; there are a, b"), "{message}");
        assert!(row(&csv, 1).text("b").unwrap_err().to_string().contains("utf-8"));
        assert_eq!(open(b"").1.unwrap().len(), 0);
        assert_eq!(open(b"a,b").1.unwrap().len(), 0);
    }

    #[test]
    fn booleans_of_pandas_and_spreadsheets_are_read() {
        let (_folder, csv) = open(b"a,b\nTrue, False\nTRUE,FALSE\ntrue,false\nyes,1\n");
        let csv = csv.unwrap();
        for index in 0..3 {
            let row = row(&csv, index);
            assert_eq!((row.parse::<bool>("a").unwrap(), row.parse::<bool>("b").unwrap()), (true, false));
        }
        let message = row(&csv, 3).parse::<bool>("a").unwrap_err().to_string();
        assert!(message.contains("column `a`, `yes`"), "{message}");
        assert_eq!(row(&csv, 0).parse::<String>("a").unwrap(), "True");
        assert!(row(&csv, 0).parse::<f32>("a").is_err());
    }

    #[test]
    fn name_of_two_columns_is_an_error_and_the_others_are_read() {
        let (_folder, csv) = open(b"id,x,x,,\n1,2,3,4,5\n");
        let row = row(&csv.unwrap(), 0);
        assert_eq!(row.parse::<i64>("id").unwrap(), 1);
        let message = row.text("x").unwrap_err().to_string();
        assert!(message.contains("2 columns are named `x` (columns 2, 3)"), "{message}");
    }

    #[test]
    fn a_quote_that_is_not_closed_does_not_fill_the_memory() {
        let mut content = b"a,b\n1,\"".to_vec();
        content.resize(MAX_ROW as usize + (1 << 20), b'x');
        let message = open(&content).1.err().unwrap().to_string();
        assert!(message.contains("is a quote not closed?"), "{message}");
    }
}
