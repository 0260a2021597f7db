//! Health of the files that the agent writes: logs, events and reports. A full disk does not end
//! the job.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Console;

/// Prints once that files cannot be written, and once that they can be written again.
#[derive(Clone)]
pub(crate) struct Health {
    console: Console,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Files that could not be written at the last attempt.
    failing: BTreeSet<PathBuf>,
    /// Whether the failure was printed.
    is_said: bool,
    /// The first error of the job. Data is missing since then, even if the disk has room again.
    first: Option<String>,
}

impl Health {
    pub(super) fn new(console: Console) -> Self {
        Self { console, state: Arc::default() }
    }

    /// Records that a file cannot be written. The job continues without it.
    pub(crate) fn failed(&self, path: &Path, error: &io::Error) {
        let mut state = self.state();
        state.failing.insert(path.to_owned());
        let what = format!("{} cannot be written: {error}", path.display());
        if !std::mem::replace(&mut state.is_said, true) {
            let folder = path.parent().unwrap_or(path).display();
            self.console.note(&format!(
                "{what}: the job continues, and what else cannot be written is not mentioned"
            ));
            self.console.note(&format!("hint: df -h {folder}; df -i {folder}"));
        }
        state.first.get_or_insert(what);
    }

    /// Records that a file was written. `missing` bytes were lost before.
    pub(crate) fn works(&self, path: &Path, missing: u64) {
        let mut state = self.state();
        state.failing.remove(path);
        if state.is_said && state.failing.is_empty() {
            state.is_said = false;
            let lost = if missing > 0 { format!("; {missing} bytes are missing") } else { String::new() };
            self.console.note(&format!("{} is written again{lost}", path.display()));
        }
    }

    /// Records that a file is no longer needed.
    pub(super) fn forget(&self, path: &Path) {
        self.state().failing.remove(path);
    }

    /// Returns the first file that could not be written, and the error.
    pub(crate) fn first_failure(&self) -> Option<String> {
        self.state().first.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::console::tests::noted;
    use super::*;

    #[tokio::test]
    async fn failures_are_said_once_and_so_is_the_recovery() {
        let (console, written, seen) = noted();
        let health = Health::new(console);
        let (a, b) = (Path::new("logs/a"), Path::new("logs/b"));
        let full = io::Error::from(io::ErrorKind::StorageFull);
        health.works(a, 0);
        health.failed(a, &full);
        health.failed(b, &full);
        health.works(a, 5);
        health.works(b, 7);
        health.works(b, 0);
        health.failed(a, &full);
        health.forget(a);
        health.works(b, 0);
        assert!(health.first_failure().unwrap().starts_with("logs/a cannot be written: "));
        drop(health);
        written.wait().await;
        let text: String = seen.lock().unwrap().iter().map(|(_, text)| text.as_str()).collect();
        let lines: Vec<&str> = text.lines().filter(|line| !line.contains("hint: df -h logs;")).collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(
            lines[0].contains("logs/a cannot be written: ") && lines[2].contains("logs/a cannot"),
            "{text}"
        );
        assert_eq!(lines[1], "ice-launch: logs/b is written again; 7 bytes are missing");
        assert_eq!(lines[3], "ice-launch: logs/b is written again");
    }
}
