//! The keeper: a process that ends the rest of a job whose agent was killed.
//!
//! Ranks die with their agent by the kernel's death signal. Their descendants have no such signal,
//! and a rank that changes its credentials loses it. The keeper is forked at the start, waits for
//! the end of the agent, kills every process that carries the job's mark until none is left, and
//! removes the job's temporary folder. An agent that exits by itself dismisses its keeper.
//!
//! - **KP-1** The keeper is ready before the first rank starts.
//! - **KP-2** The keeper is not the agent's child, and shares neither its session, its process
//!   group nor its command line. A signal that reaches the agent by one of these does not reach the
//!   keeper.
//! - **KP-3** After the fork the keeper makes system calls only. The keeper allocates nothing and
//!   takes no lock, since another thread may have held the lock at the fork.

#![expect(unsafe_code, reason = "fork, and code after it")]

use std::ffi::{CStr, CString};
use std::fs;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid, setsid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RawDir, SeekFrom, openat, seek, unlinkat};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::mark::{self, Mark};

/// Time that the keeper waits for killed processes that have not ended.
const PATIENCE: Duration = Duration::from_secs(600);
/// Longest time between two checks for them.
const PAUSE: Duration = Duration::from_millis(100);
/// Name in process lists.
const NAME: &CStr = c"ice-keeper";

/// The agent's handle of its keeper.
pub(super) struct Keeper {
    pid: Pid,
    control: fs::File,
}

impl Keeper {
    /// Forks the keeper, and waits until it is ready. It removes `folder` after the end of the job.
    pub(super) fn start(mark: Mark, folder: Option<&Path>) -> io::Result<Self> {
        let folder = folder.map(|folder| CString::new(folder.as_os_str().as_bytes())).transpose()?;
        let own = rustix::process::getpid();
        let agent = pidfd_open(own, PidfdFlags::empty())?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::open("/proc", flags, Mode::empty())?;
        let (told, control) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let (answer, ready) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        let arguments = arguments();
        // All signals are blocked over the fork. A handler of this process must not run in a child,
        // which shares the pipe that the handler writes to.
        let mut before = SigSet::empty();
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
        // SAFETY: both children make system calls only, up to `_exit` (KP-3).
        let forked = unsafe { fork() };
        if let Ok(ForkResult::Child) = forked {
            // SAFETY: as above. The keeper loses its parent, and with the parent its connection to
            // the agent.
            if let Ok(ForkResult::Child) = unsafe { fork() } {
                detach(arguments);
                let _ = rustix::io::write(&ready, &getpid().as_raw().to_ne_bytes());
                if hold_only([&agent, &told, &proc]) {
                    keep(mark, folder.as_deref());
                }
            }
            exit();
        }
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
        if let ForkResult::Parent { child } = forked? {
            waitpid(child, Some(WaitPidFlag::__WALL))?;
        }
        drop(ready);
        let mut pid = [0; 4];
        fs::File::from(answer).read_exact(&mut pid)?;
        Ok(Self { pid: Pid::from_raw(i32::from_ne_bytes(pid)), control: control.into() })
    }

    /// Returns the keeper's process. If the agent is process 1, the keeper is a child of the agent
    /// again.
    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Ends the keeper, since no process of the job is left. Waits up to a second for its end.
    pub(super) fn dismiss(mut self) {
        let pid = rustix::process::Pid::from_raw(self.pid.as_raw());
        let keeper = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        if self.control.write_all(b"!").is_err() {
            return;
        }
        if let Some(keeper) = keeper {
            let soon = Timespec { tv_sec: 1, tv_nsec: 0 };
            let _ = poll(&mut [PollFd::new(&keeper, PollFlags::IN)], Some(&soon));
        }
    }
}

/// Returns address and length of this process's arguments, proc_pid_stat(5).
fn arguments() -> Option<(usize, usize)> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(45);
    let (start, end) = (fields.next()?.parse::<usize>().ok()?, fields.next()?.parse::<usize>().ok()?);
    (start > 0).then(|| Some((start, end.checked_sub(start)?)))?
}

/// Leaves the agent's session, and changes the name and the command line of the process (KP-2).
fn detach(arguments: Option<(usize, usize)>) {
    let _ = setsid();
    let _ = prctl::set_name(NAME);
    let _ = rustix::process::chdir(c"/");
    if let Some((start, length)) = arguments {
        let name = NAME.to_bytes();
        let kept = name.len().min(length.saturating_sub(1));
        // SAFETY: the kernel has put the arguments there, on this process's stack, and no code
        // reads them any more.
        unsafe {
            let start = std::ptr::with_exposed_provenance_mut::<u8>(start);
            start.write_bytes(0, length);
            start.copy_from_nonoverlapping(name.as_ptr(), kept);
        }
    }
}

/// Numbers of the keeper's descriptors.
const AGENT: i32 = 0;
const CONTROL: i32 = 1;
const PROC: i32 = 2;

/// Makes these descriptors 0, 1 and 2, and closes all others, standard streams included. A pipe
/// that the agent has held can then end with the agent.
fn hold_only(descriptors: [&OwnedFd; 3]) -> bool {
    let mut high = [0; 3];
    for (high, descriptor) in high.iter_mut().zip(descriptors) {
        // SAFETY: a system call on a descriptor that is open.
        *high = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD, 10) };
    }
    let moved = high.iter().zip([AGENT, CONTROL, PROC]).all(|(high, low)| {
        // SAFETY: as above. Descriptors that were 0, 1 or 2 before are not used any more.
        *high >= 0 && unsafe { libc::dup2(*high, low) } == low
    });
    // SAFETY: closes descriptors. Only the three are used from here on.
    if moved && unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) } != 0 {
        // The kernel is older than 5.9.
        (3..4096).for_each(|descriptor| {
            // SAFETY: as above.
            unsafe { libc::close(descriptor) };
        });
    }
    moved
}

fn exit() -> ! {
    // SAFETY: ends the process without running any code of the agent.
    unsafe { libc::_exit(0) }
}

/// Waits for the end of the agent, and ends the processes that it has left.
fn keep(mark: Mark, folder: Option<&CStr>) -> ! {
    // SAFETY: `hold_only` has opened the three descriptors, and no code closes them.
    let [agent, control, proc] =
        [AGENT, CONTROL, PROC].map(|number| unsafe { BorrowedFd::borrow_raw(number) });
    let mut listens = true;
    loop {
        let mut ends = [PollFd::new(&agent, PollFlags::IN), PollFd::new(&control, PollFlags::IN)];
        let count = if listens { 2 } else { 1 };
        if poll(&mut ends[..count], None).is_err() {
            continue;
        }
        if listens && !ends[1].revents().is_empty() {
            let mut byte = [0; 1];
            match rustix::io::read(control, &mut byte) {
                Ok(1) => exit(),
                // The pipe ended or failed: the agent is gone, or about to be.
                _ => listens = false,
            }
        }
        if !ends[0].revents().is_empty() {
            end_all(proc, mark);
            if let Some(folder) = folder {
                remove(folder);
            }
            exit();
        }
    }
}

/// Kills all processes with the mark until none is left. A killed process may have forked a moment
/// before, so one pass is not enough.
fn end_all(proc: BorrowedFd<'_>, mark: Mark) {
    let own = getpid().as_raw();
    let (mut waited, mut pause) = (Duration::ZERO, Duration::from_millis(1));
    while waited < PATIENCE {
        let mut left = 0;
        let _ = seek(proc, SeekFrom::Start(0));
        let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
        let mut entries = RawDir::new(proc, &mut buffer);
        while let Some(Ok(entry)) = entries.next() {
            let Some(pid) = number(entry.file_name().to_bytes()).filter(|pid| *pid != own) else { continue };
            if carries(proc, pid, mark) {
                left += 1;
                kill(proc, pid, mark);
            }
        }
        if left == 0 {
            return;
        }
        let time = Timespec { tv_sec: 0, tv_nsec: i64::from(pause.subsec_nanos()) };
        let _ = poll(&mut [], Some(&time));
        waited += pause;
        pause = (pause * 2).min(PAUSE);
    }
}

/// Removes a folder and the files in it.
fn remove(path: &CStr) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(folder) = openat(CWD, path, flags, Mode::empty()) else { return };
    let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
    let mut entries = RawDir::new(&folder, &mut buffer);
    while let Some(Ok(entry)) = entries.next() {
        let _ = unlinkat(&folder, entry.file_name(), AtFlags::empty());
    }
    let _ = unlinkat(CWD, path, AtFlags::REMOVEDIR);
}

fn kill(proc: BorrowedFd<'_>, pid: i32, mark: Mark) {
    let Some(number) = rustix::process::Pid::from_raw(pid) else { return };
    // Between the check and the signal, the id may become another process's. A pidfd cannot, so the
    // check is repeated after it is open.
    if let Ok(process) = pidfd_open(number, PidfdFlags::empty())
        && carries(proc, pid, mark)
    {
        let _ = pidfd_send_signal(&process, Signal::KILL);
    }
}

/// Whether a process lives and carries the mark.
fn carries(proc: BorrowedFd<'_>, pid: i32, mark: Mark) -> bool {
    let mut buffer = [0; 2048];
    let limit = read(proc, pid, b"/limits\0", &mut buffer).and_then(mark::parse);
    if !limit.is_some_and(|limit| mark.covers(limit)) {
        return false;
    }
    // A zombie still shows its limits, so its state has to be checked as well.
    let stat = read(proc, pid, b"/stat\0", &mut buffer);
    let state = stat.and_then(|stat| {
        let end = stat.iter().rposition(|byte| *byte == b')')?;
        stat.get(end + 2)
    });
    state.is_some_and(|state| !matches!(state, b'Z' | b'X'))
}

/// Reads the start of a file of a process.
fn read<'a>(proc: BorrowedFd<'_>, pid: i32, file: &[u8], buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    let mut path = [0; 32];
    let mut digits = [0; 10];
    let (mut rest, mut first) = (pid, digits.len());
    while rest > 0 {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    let digits = &digits[first..];
    path[..digits.len()].copy_from_slice(digits);
    path[digits.len()..digits.len() + file.len()].copy_from_slice(file);
    let path = CStr::from_bytes_until_nul(&path).ok()?;
    let file = openat(proc, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let read = rustix::io::read(&file, &mut *buffer).ok()?;
    buffer.get(..read)
}

fn number(name: &[u8]) -> Option<i32> {
    name.iter().try_fold(0_i32, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| i32::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}
