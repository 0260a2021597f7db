//! Descriptors that the parent process left open for this process.
//!
//! In the book: `docs/design.md#three-layers`.
#![expect(unsafe_code, reason = "turns a number into an owned descriptor")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

const F_GETFD: c_int = 1;
const F_SETFD: c_int = 2;
const FD_CLOEXEC: c_int = 1;

static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

unsafe extern "C" {
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
}

/// Takes ownership of an inherited descriptor, once, and sets its close-on-exec flag so that child
/// processes do not inherit it.
///
/// Call it early: the number must refer to a descriptor of the parent, not to one that this process
/// has opened since.
///
/// # Errors
/// If the descriptor is a standard stream, is not open, or was taken before.
pub fn descriptor(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= 2 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("descriptor {fd} is a standard stream"),
        ));
    }
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&fd) {
        return Err(io::Error::other(format!("descriptor {fd} was taken over before")));
    }
    // SAFETY: these commands only read and set a flag, and fail for a number that is not open.
    let flags = unsafe { fcntl(fd, F_GETFD) };
    // SAFETY: as above.
    if flags < 0 || unsafe { fcntl(fd, F_SETFD, flags | FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    taken.push(fd);
    // SAFETY: the descriptor is open, and this function, the only place that takes such
    // descriptors, has not taken it before.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn a_descriptor_is_taken_once_and_only_when_open() {
        let fd = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        assert_eq!(descriptor(fd).unwrap().as_raw_fd(), fd);
        assert!(descriptor(fd).is_err());
        assert!(descriptor(1).is_err());
        assert!(descriptor(1_000_000).is_err());
    }
}
