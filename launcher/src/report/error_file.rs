//! The launcher's own error file. A platform that sets `TORCHELASTIC_ERROR_FILE` for the launcher
//! (TorchX, Flyte) reads from this file why the job failed. The format is that of torch's
//! `dump_error_file`: the error file of the rank that failed first, with its exit code as
//! `errorCode`.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{env, fs, io};

use ice_proto::env::TORCHELASTIC_ERROR_FILE;
use serde_json::{Value, json};

use super::RankFailure;

/// Content of the launcher's error file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ErrorDocument(Value);

impl ErrorDocument {
    /// Returns the document of a failed rank. `error_file` is the rank's own error file, which may
    /// be missing or empty.
    pub(crate) fn of_rank(failure: &RankFailure, host: &str, error_file: Option<&Path>) -> Self {
        let own = error_file.and_then(|file| fs::read(file).ok());
        let own = own.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let mut document = own.filter(|own: &Value| own.get("message").is_some()).unwrap_or_else(|| {
            let exit = &failure.exit.exit;
            let what = || format!("rank {} on {host} failed: {exit}", failure.rank);
            let stack = || failure.stderr.join("\n");
            let message = failure.message.clone().unwrap_or_else(what);
            Self::with(&message, &failure.callstack.clone().unwrap_or_else(stack)).0
        });
        // torch uses a negative number for a signal. If the message is plain text, the code cannot
        // be added.
        let code = failure.exit.exit_code.or(failure.exit.signal.map(|signal| -signal));
        if let (Some(code), Some(Value::Object(message))) = (code, document.get_mut("message")) {
            message.insert("errorCode".into(), code.into());
        }
        Self(document)
    }

    /// Returns the document of a job that failed on another node, or before it began.
    pub(crate) fn of_launcher(message: &str) -> Self {
        Self::with(message, "")
    }

    fn with(message: &str, stack: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let extra = json!({ "py_callstack": stack, "timestamp": now.to_string() });
        Self(json!({ "message": { "message": message, "extraInfo": extra } }))
    }

    /// Writes the document to the file that the launcher's environment names, if any.
    pub(crate) fn write(&self) {
        let Some(path) = env::var_os(TORCHELASTIC_ERROR_FILE).filter(|path| !path.is_empty()) else { return };
        let path = PathBuf::from(path);
        if let Err(error) = self.write_to(&path) {
            tracing::warn!("{TORCHELASTIC_ERROR_FILE}={} was not written: {error}", path.display());
        }
    }

    fn write_to(&self, path: &Path) -> io::Result<()> {
        let text = self.0.to_string();
        // A pipe or a device must not be replaced by a file.
        if fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
            return fs::write(path, text);
        }
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        fs::write(&partial, text)?;
        fs::rename(&partial, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::ExitRecord;
    use ice_agent::Exit;

    fn failure(exit: &Exit, message: Option<&str>) -> RankFailure {
        RankFailure {
            rank: 3,
            local_rank: 1,
            pid: Some(7),
            exit: ExitRecord::from(exit),
            message: message.map(Into::into),
            callstack: None,
            stderr: vec!["a".into(), "b".into()],
            logs: None,
        }
    }

    #[test]
    fn error_file_of_the_rank_is_kept_and_gets_the_exit_code() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("error.json");
        let text = r#"{"message": {"message": "ValueError: x", "extraInfo": {"py_callstack": "T", "timestamp": "17"}}, "more": 1}"#;
        fs::write(&path, text).unwrap();
        let document = ErrorDocument::of_rank(&failure(&Exit::Signal(9), None), "h", Some(&path));
        let expected = json!({
            "message": {
                "message": "ValueError: x",
                "extraInfo": { "py_callstack": "T", "timestamp": "17" },
                "errorCode": -9,
            },
            "more": 1,
        });
        assert_eq!(document.0, expected);
        fs::write(&path, r#"{"message": "plain"}"#).unwrap();
        let document = ErrorDocument::of_rank(&failure(&Exit::Code(3), None), "h", Some(&path));
        assert_eq!(document.0, json!({ "message": "plain" }));
    }

    #[test]
    fn rank_without_an_error_file_is_described() {
        let document = |message| {
            let failure = failure(&Exit::Code(3), message);
            ErrorDocument::of_rank(&failure, "node7", None).0
        };
        let written = document(None);
        assert_eq!(written["message"]["message"], "rank 3 on node7 failed: exit code 3");
        assert_eq!(written["message"]["extraInfo"]["py_callstack"], "a\nb");
        assert_eq!(written["message"]["errorCode"], 3);
        assert!(written["message"]["extraInfo"]["timestamp"].as_str().unwrap().parse::<u64>().unwrap() > 0);
        assert_eq!(document(Some("data: gone"))["message"]["message"], "data: gone");
    }

    #[test]
    fn file_is_replaced_and_a_device_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reply.json");
        fs::write(&path, "old").unwrap();
        let document = ErrorDocument::of_launcher("the job is over");
        document.write_to(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), document.0.to_string());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        document.write_to(Path::new("/dev/null")).unwrap();
    }
}
