//! The file that all processes of a job are started from.
//!
//! A build or an upgrade may replace the program while the job runs. A restarted rank must run the
//! same program as the ranks that it joins. The file is therefore held open, and started by its
//! descriptor once its path leads to another file. A script cannot be started like that, since its
//! interpreter opens it by its path. If the text of a script has changed, the user is notified.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::cli::Program;

/// A program's file as it was when the job started.
pub(crate) struct Executable {
    path: PathBuf,
    /// The open file. `None` if the file could not be opened; the start then reports why.
    held: Option<Held>,
    /// The script that an interpreter runs.
    script: Option<(PathBuf, Identity)>,
    started_by: PathBuf,
    /// The last message to the user.
    said: Option<String>,
}

struct Held {
    file: File,
    identity: Identity,
    is_script: bool,
}

/// Identifies a content of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
}

impl From<&Metadata> for Identity {
    fn from(meta: &Metadata) -> Self {
        Self {
            file: (meta.dev(), meta.ino()),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        }
    }
}

fn identity(path: &Path) -> io::Result<Identity> {
    Ok(Identity::from(&fs::metadata(path)?))
}

impl Executable {
    pub(crate) fn open(program: &Program) -> Self {
        let path = program.path.clone();
        // A program that launches itself is already running: the running file counts instead of the
        // file that its path leads to now.
        let own = std::env::current_exe().is_ok_and(|own| own == path);
        let opened = if own { Path::new("/proc/self/exe") } else { &path };
        let script = program.script().and_then(|script| Some((script.to_owned(), identity(script).ok()?)));
        Self { held: Held::open(opened).ok(), started_by: path.clone(), path, script, said: None }
    }

    /// Decides by which path ranks start from now on. Returns a message for the user if that has
    /// changed.
    pub(crate) fn refresh(&mut self) -> Option<String> {
        let (path, said) = self.look();
        self.started_by = path;
        let news = said.clone().filter(|text| self.said.as_ref() != Some(text));
        self.said = said;
        news
    }

    /// Returns the path by which ranks start.
    pub(crate) fn started_by(&self) -> &Path {
        &self.started_by
    }

    fn look(&self) -> (PathBuf, Option<String>) {
        let (path, name) = (self.path.clone(), self.path.display());
        if let Some(held) = &self.held {
            let now = identity(&self.path);
            let has_same_file = now.as_ref().is_ok_and(|now| now.file == held.identity.file);
            let by_descriptor = PathBuf::from(format!("/proc/self/fd/{}", held.file.as_raw_fd()));
            match now {
                Ok(now) if now == held.identity => {}
                Ok(_) if held.is_script || has_same_file => {
                    let text = format!(
                        "`{name}` has been changed since the job started: ranks start with its new content"
                    );
                    return (path, Some(text));
                }
                Err(_) if held.is_script => {}
                changed if by_descriptor.exists() => {
                    let how = if changed.is_ok() { "replaced" } else { "removed" };
                    let text = format!(
                        "`{name}` has been {how} since the job started: ranks start from the file that it was"
                    );
                    return (by_descriptor, Some(text));
                }
                Ok(_) => {
                    let text = format!(
                        "`{name}` has been replaced since the job started, and the file that it was cannot be started"
                    );
                    return (path, Some(text));
                }
                Err(_) => {}
            }
        }
        let changed =
            self.script.as_ref().filter(|(path, before)| identity(path).is_ok_and(|now| now != *before));
        let text = changed.map(|(script, _)| {
            format!(
                "`{}` has been changed since the job started: ranks start with its new text",
                script.display()
            )
        });
        (path, text)
    }
}

impl Held {
    fn open(path: &Path) -> io::Result<Self> {
        // `O_PATH`, because a program may be executable but not readable. Only a readable program
        // can be a script.
        let file = File::options().read(true).custom_flags(nix::libc::O_PATH).open(path)?;
        let identity = Identity::from(&file.metadata()?);
        let mut start = [0; 2];
        let is_script =
            File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == *b"#!";
        Ok(Self { file, identity, is_script })
    }
}
