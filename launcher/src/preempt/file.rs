//! A notice by a file that appears.

use std::os::fd::AsFd;
use std::path::Path;
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// Interval of checks for the file, in milliseconds. Inotify alone is not enough: a network file
/// system does not report changes by other machines.
const LOOK: u16 = 2000;

/// Waits until the file exists. Returns the text of the notice.
pub(super) fn wait(path: &Path) -> String {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The folder is watched before the check, so that a file made in between is not missed.
    let mut inotify = None;
    loop {
        if inotify.is_none() {
            inotify = watch(folder).ok();
        }
        if path.exists() {
            return format!("{} is there", path.display());
        }
        match &inotify {
            Some(inotify) => {
                let mut fds = [PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
                // Errors and events are ignored: the next check of the file decides.
                let _ = poll(&mut fds, PollTimeout::from(LOOK));
                let _ = inotify.read_events();
            }
            // The folder may appear later.
            None => thread::sleep(std::time::Duration::from_millis(LOOK.into())),
        }
    }
}

fn watch(folder: &Path) -> nix::Result<Inotify> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    inotify.add_watch(folder, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)?;
    Ok(inotify)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_noticed_that_is_there_or_comes() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["made", "moved"] {
            let path = folder.path().join(name);
            let waiting = {
                let path = path.clone();
                thread::spawn(move || wait(&path))
            };
            let beside = folder.path().join("beside");
            std::fs::write(&beside, "").unwrap();
            if name == "moved" {
                std::fs::rename(&beside, &path).unwrap();
            } else {
                std::fs::write(&path, "").unwrap();
            }
            assert_eq!(waiting.join().unwrap(), format!("{} is there", path.display()));
            assert!(wait(&path).contains(name), "it is there already");
        }
    }
}
