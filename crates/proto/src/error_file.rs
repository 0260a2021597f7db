//! The error file of a failing rank, in torchelastic's format.
//!
//! `TORCHELASTIC_ERROR_FILE` names the file. Python's `@record` and the ranks of this project write
//! `{"message": {"message": "<Type>: <text>", "extraInfo": {"py_callstack": "…", "timestamp":
//! "<unix seconds>"}}}`.
//!
//! In the book: `docs/events.md#reportjson`.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Maximum of bytes that are read of an error file.
const MAX_LEN: u64 = 1 << 20;

/// A failed rank's record of its failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorRecord {
    /// The error, `<Type>: <text>` for Python.
    pub message: String,
    /// The traceback, or the chain of causes; may be empty.
    pub callstack: String,
    /// Time of the failure in seconds since the Unix epoch.
    pub timestamp: u64,
}

#[derive(Serialize, Deserialize)]
struct Document {
    message: Message,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Message {
    Detailed {
        message: String,
        #[serde(rename = "extraInfo")]
        extra: Extra,
    },
    Plain(String),
}

#[derive(Default, Serialize, Deserialize)]
struct Extra {
    #[serde(default)]
    py_callstack: String,
    #[serde(default)]
    timestamp: String,
}

/// Writes the record atomically: to a temporary file, which is then renamed.
///
/// # Errors
/// The error of the file system.
pub fn write(path: &Path, record: &ErrorRecord) -> io::Result<()> {
    let document = Document {
        message: Message::Detailed {
            message: record.message.clone(),
            extra: Extra { py_callstack: record.callstack.clone(), timestamp: record.timestamp.to_string() },
        },
    };
    let beside = path.with_extension("json.partial");
    fs::write(&beside, serde_json::to_vec(&document)?)?;
    fs::rename(&beside, path)
}

/// Reads the record of a rank. Returns `None` if there is no file.
///
/// # Errors
/// The error of the file system, or [`io::ErrorKind::InvalidData`] if the format is wrong.
pub fn read(path: &Path) -> io::Result<Option<ErrorRecord>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(MAX_LEN).read_to_end(&mut bytes)?;
    let document: Document = serde_json::from_slice(&bytes)?;
    Ok(Some(match document.message {
        Message::Plain(message) => ErrorRecord { message, callstack: String::new(), timestamp: 0 },
        Message::Detailed { message, extra } => ErrorRecord {
            message,
            callstack: extra.py_callstack,
            timestamp: extra.timestamp.parse().unwrap_or(0),
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_file_of_ice_and_of_torch_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("error.json");
        assert_eq!(read(&path).unwrap(), None);

        let record =
            ErrorRecord { message: "data: no such file".into(), callstack: "a\nb".into(), timestamp: 17 };
        write(&path, &record).unwrap();
        assert_eq!(read(&path).unwrap(), Some(record));

        let torch = r#"{"message": {"message": "ValueError: x", "extraInfo": {"py_callstack": "Traceback", "timestamp": "1700000000"}}}"#;
        fs::write(&path, torch).unwrap();
        let record = read(&path).unwrap().unwrap();
        assert_eq!((record.message.as_str(), record.timestamp), ("ValueError: x", 1_700_000_000));

        fs::write(&path, "{").unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
