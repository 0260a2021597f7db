//! A checkpoint that is being written: in a hidden folder next to its place, synced, then renamed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock};

use crate::find::is_named_for;
use crate::manifest::FileInfo;
use crate::{BEST, CHECKPOINTS, Error, LATEST, MANIFEST, Manifest, Result, write_file};

const PARTIAL: &str = "partial";
const REPLACED: &str = "replaced";
const REMOVED: &str = "removed";

/// The hidden folder in which a checkpoint is written. Several processes may fill it, and one of
/// them commits it.
///
/// Each process holds a shared lock on the folder, so that [`remove_abandoned`] of another run
/// leaves it alone.
#[derive(Debug, Clone)]
pub struct Staging {
    folder: PathBuf,
    beside: PathBuf,
    _lock: Arc<File>,
}

impl Staging {
    /// Creates the hidden folder of the checkpoint `folder`, or joins the processes that have
    /// created it. `attempt` distinguishes attempts to save the checkpoint, so that files of a
    /// killed process do not become part of this one.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be created.
    pub fn begin(folder: &Path, attempt: &str) -> Result<Self> {
        if folder.file_name().is_none() {
            return Err(Error::checkpoint(
                folder,
                "has no name of its own: name the folder of the checkpoint",
            ));
        }
        let beside = hidden(folder, &format!("{attempt}.{PARTIAL}"));
        fs::create_dir_all(&beside).map_err(Error::io(&beside))?;
        let lock = File::open(&beside).map_err(Error::io(&beside))?;
        // Without lock support, `remove_abandoned` cannot lock the folder either, and leaves it
        // alone.
        let _ = flock(&lock, FlockOperation::NonBlockingLockShared);
        Ok(Self { folder: folder.to_owned(), beside, _lock: Arc::new(lock) })
    }

    /// Removes the leftovers of earlier attempts to save this checkpoint. Called by one of the
    /// writing processes.
    ///
    /// # Errors
    /// [`Error::Io`] if a folder cannot be removed.
    pub fn remove_others(&self) -> Result<()> {
        let start = format!(".{}.", self.folder.file_name().unwrap_or_default().to_string_lossy());
        let parent = parent(&self.folder);
        for entry in fs::read_dir(parent).map_err(Error::io(parent))? {
            let path = entry.map_err(Error::io(parent))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_attempt = name.strip_prefix(&start).is_some_and(|rest| rest.ends_with(PARTIAL));
            if is_attempt && path.file_name() != self.beside.file_name() {
                remove_if_there(&path)?;
            }
        }
        Ok(())
    }

    /// Writes a file of the checkpoint, and syncs it to disk.
    ///
    /// # Errors
    /// [`Error::Io`] with the path of the file.
    pub fn write(&self, name: &str, parts: &[&[u8]]) -> Result<FileInfo> {
        write_file(&self.beside.join(name), parts)
    }

    /// Adds a file of another checkpoint: as a link, since files of checkpoints never change, or as
    /// a copy if the file system has no links between these folders.
    ///
    /// # Errors
    /// [`Error::Io`] with the path of the file.
    pub(crate) fn adopt(&self, checkpoint: &Path, name: &str) -> Result<()> {
        let (file, own) = (checkpoint.join(name), self.beside.join(name));
        fs::hard_link(&file, &own).or_else(|_| fs::copy(&file, &own).map(drop)).map_err(Error::io(&own))
    }

    /// Returns the path at which a file of the checkpoint is written.
    #[cfg(feature = "object-store")]
    pub(crate) fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.beside.join(name);
        match Path::new(name).components().count() {
            1 => Ok(path),
            _ => Err(Error::checkpoint(&path, "lies outside of its checkpoint")),
        }
    }

    /// Checks that a file written by another process is visible here.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is not.
    pub fn expect(&self, name: &str, info: &FileInfo) -> Result<()> {
        let path = self.beside.join(name);
        let found = fs::metadata(&path).map(|file| file.len());
        match found {
            Ok(bytes) if bytes == info.bytes => Ok(()),
            Ok(bytes) => Err(Error::checkpoint(
                &path,
                format!("has {bytes} bytes here and {} where it was written", info.bytes),
            )),
            Err(error) => Err(Error::checkpoint(
                &path,
                format!(
                    "{error}: another rank has written it, and this one does not see it; several ranks can write one \
                     checkpoint only in a folder that all nodes share"
                ),
            )),
        }
    }

    /// Writes the manifest, and renames the folder into place in one step. An existing checkpoint
    /// of that name is replaced.
    ///
    /// # Errors
    /// [`Error::Io`] with the failed path. The checkpoint then does not exist, and an older one of
    /// that name still does.
    pub fn commit(self, manifest: &Manifest) -> Result<()> {
        let path = self.beside.join(MANIFEST);
        let bytes = manifest.to_bytes().map_err(|problem| Error::checkpoint(&path, problem))?;
        write_file(&path, &[&bytes])?;
        sync_folder(&self.beside)?;
        let parent = parent(&self.folder);
        put_in_place(&self.beside, &self.folder)?;
        sync_folder(parent)?;
        point_latest(&self.folder);
        Ok(())
    }

    /// Removes what was written. If that fails, the next start removes it.
    pub fn abandon(self) {
        if let Err(error) = remove_if_there(&self.beside) {
            tracing::warn!("{error}");
        }
    }
}

fn put_in_place(beside: &Path, folder: &Path) -> Result<()> {
    match rustix::fs::renameat_with(CWD, beside, CWD, folder, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(()),
        // Either the name exists, or the file system does not support the flag.
        Err(rustix::io::Errno::EXIST | rustix::io::Errno::INVAL | rustix::io::Errno::NOTEMPTY) => {}
        Err(error) => return Err(Error::io(folder)(error.into())),
    }
    if !folder.exists() {
        return fs::rename(beside, folder).map_err(Error::io(folder));
    }
    let replaced = hidden(folder, REPLACED);
    remove_if_there(&replaced)?;
    if rustix::fs::renameat_with(CWD, beside, CWD, folder, RenameFlags::EXCHANGE).is_ok() {
        fs::rename(beside, &replaced).map_err(Error::io(beside))?;
    } else {
        // Two steps, if the file system cannot exchange names. If the process dies between them,
        // `remove_leftovers` undoes the first.
        fs::rename(folder, &replaced).map_err(Error::io(folder))?;
        fs::rename(beside, folder).map_err(Error::io(folder))?;
    }
    remove_if_there(&replaced)
}

/// Points the link `latest`, next to the checkpoint, at it. Nothing depends on the link, so a file
/// system without links only lacks it.
fn point_latest(folder: &Path) {
    let Some(name) = folder.file_name() else { return };
    let (link, new) = (parent(folder).join(LATEST), parent(folder).join(format!(".{LATEST}.new")));
    if name == LATEST || fs::symlink_metadata(&link).is_ok_and(|there| !there.is_symlink()) {
        return;
    }
    let _ = fs::remove_file(&new);
    if let Err(error) = symlink(name, &new).and_then(|()| fs::rename(&new, &link)) {
        tracing::warn!("{}: cannot point it at the newest checkpoint: {error}", link.display());
    }
}

/// Removes what killed processes have left among the checkpoints in a folder. The caller ensures
/// that no process writes there.
///
/// # Errors
/// [`Error::Io`] if a folder cannot be removed.
pub fn remove_leftovers(checkpoints: &Path) -> Result<()> {
    let entries = match fs::read_dir(checkpoints) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::io(checkpoints))?,
    };
    for entry in entries {
        let path = entry.map_err(Error::io(checkpoints))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let Some((name, suffix)) = name.strip_prefix('.').and_then(|name| name.rsplit_once('.')) else {
            continue;
        };
        let original = path.with_file_name(name);
        match suffix {
            REPLACED if !original.exists() && Manifest::read(&path).is_ok() => {
                fs::rename(&path, &original).map_err(Error::io(&path))?;
            }
            PARTIAL | REPLACED | REMOVED => remove_if_there(&path)?,
            _ => {}
        }
    }
    Ok(())
}

/// Removes half-written checkpoints that killed runs of this id have left in their folders,
/// `<out_dir>/<run id>_<stamp>`.
///
/// A folder locked by a process stays. On a file system without locks, all folders stay. A failure
/// is a warning.
pub fn remove_abandoned(out_dir: &Path, run_id: &str) {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten();
    let name = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    for run in entries(out_dir).filter(|entry| is_named_for(&name(entry), run_id)) {
        for holder in [CHECKPOINTS, BEST].map(|holder| run.path().join(holder)) {
            for left in entries(&holder) {
                let name = name(&left);
                if name.starts_with('.') && name.ends_with(&format!(".{PARTIAL}")) {
                    remove_unless_held(&left.path());
                }
            }
        }
    }
}

fn remove_unless_held(folder: &Path) {
    let Ok(lock) = File::open(folder) else { return };
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return;
    }
    if let Err(error) = remove_if_there(folder) {
        tracing::warn!("{error}");
    }
}

/// Checks that checkpoints can be written in a folder, by the operations of a save: writes, syncs
/// and renames a small file.
///
/// # Errors
/// [`Error::Io`] with the folder and the failure.
pub fn probe(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let [written, renamed] =
        ["new", "old"].map(|name| folder.join(format!(".probe.{}.{name}", std::process::id())));
    let probed = write_file(&written, &[b"probe"])
        .and_then(|_| fs::rename(&written, &renamed).map_err(Error::io(&renamed)))
        .and_then(|()| sync_folder(folder));
    for file in [written, renamed] {
        let _ = fs::remove_file(file);
    }
    probed
}

/// Removes a checkpoint so that it is never visible in part.
pub(crate) fn remove(checkpoint: &Path) -> Result<()> {
    let removed = hidden(checkpoint, REMOVED);
    remove_if_there(&removed)?;
    fs::rename(checkpoint, &removed).map_err(Error::io(checkpoint))?;
    sync_folder(parent(checkpoint))?;
    remove_if_there(&removed)
}

/// Returns the path of a hidden neighbour of the folder, which searches for checkpoints ignore.
fn hidden(folder: &Path, suffix: &str) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!(".{name}.{suffix}"))
}

fn parent(folder: &Path) -> &Path {
    match folder.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn remove_if_there(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(folder)(error)),
        _ => Ok(()),
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Counts;

    fn save(folder: &Path, step: u64) {
        let counts = Counts { train_steps: step, ..Counts::default() };
        Staging::begin(folder, "test")
            .unwrap()
            .commit(&Manifest::new("job", 1, 0, counts, ().into()))
            .unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_killed_processes_have_left_is_cleared() {
        let out = tempfile::tempdir().unwrap();
        save(&out.path().join("E0S1"), 1);
        // Interrupted: a save, a removal, a replacement after the first of its two steps, and a
        // replacement before its end.
        Staging::begin(&out.path().join("E0S2"), "killed").unwrap();
        save(&out.path().join(".E0S0.removed"), 0);
        save(&out.path().join(".E0S1.replaced"), 7);
        save(&out.path().join(".E0S3.replaced"), 3);
        fs::create_dir(out.path().join(".E0S4.replaced")).unwrap();
        fs::create_dir(out.path().join(".somebody.else")).unwrap();
        remove_leftovers(out.path()).unwrap();
        let mut left = names(out.path());
        left.retain(|name| !name.starts_with(".latest") && name != LATEST);
        assert_eq!(left, [".somebody.else", "E0S1", "E0S3"]);
        let step = |name: &str| Manifest::read(&out.path().join(name)).unwrap().counters.train_steps;
        assert_eq!((step("E0S1"), step("E0S3")), (1, 3));
    }

    #[test]
    fn abandoned_attempts_of_other_runs_are_removed_unless_held() {
        let out = tempfile::tempdir().unwrap();
        let begin = |run: &str, holder: &str| {
            Staging::begin(&out.path().join(run).join(holder).join("E0S2"), "x").unwrap()
        };
        let held = begin("job_11290903_ab12", CHECKPOINTS);
        drop(begin("job_11280101_cd34", CHECKPOINTS));
        drop(begin("job_11280101_cd34", BEST));
        drop(begin("job_a_11280101_cd34", CHECKPOINTS));
        save(&out.path().join("job_11280101_cd34").join(CHECKPOINTS).join("E0S1"), 1);
        remove_abandoned(out.path(), "job");
        let left = |run: &str, holder: &str| {
            let mut names = names(&out.path().join(run).join(holder));
            names.retain(|name| name != LATEST);
            names
        };
        assert_eq!(left("job_11290903_ab12", CHECKPOINTS), [".E0S2.x.partial"]);
        assert_eq!(left("job_11280101_cd34", CHECKPOINTS), ["E0S1"]);
        assert!(left("job_11280101_cd34", BEST).is_empty());
        assert_eq!(left("job_a_11280101_cd34", CHECKPOINTS), [".E0S2.x.partial"]);
        drop(held);
        remove_abandoned(out.path(), "job");
        assert!(left("job_11290903_ab12", CHECKPOINTS).is_empty());
    }

    #[test]
    fn folder_that_cannot_be_written_is_named() {
        let out = tempfile::tempdir().unwrap();
        probe(&out.path().join("new/run")).unwrap();
        assert!(names(&out.path().join("new/run")).is_empty());
        fs::write(out.path().join("file"), "").unwrap();
        let message = probe(&out.path().join("file/run")).unwrap_err().to_string();
        assert!(message.contains("file/run"), "{message}");
    }

    #[test]
    fn a_checkpoint_of_the_same_name_is_replaced() {
        let out = tempfile::tempdir().unwrap();
        let folder = out.path().join("x");
        for step in [1, 2] {
            Staging::begin(&folder, "killed").unwrap();
            let staging = Staging::begin(&folder, "test").unwrap();
            staging.remove_others().unwrap();
            save(&folder, step);
            assert_eq!(Manifest::read(&folder).unwrap().counters.train_steps, step);
            assert_eq!(names(out.path()), ["latest", "x"]);
        }
    }
}
