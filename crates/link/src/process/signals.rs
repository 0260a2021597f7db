//! Handling of signals in a process whose launcher decides when it exits.
//!
//! Schedulers signal all processes of a job step at once, so a rank also receives the signals that
//! are meant for its launcher. The default action of most of them terminates the rank before the
//! launcher can have a checkpoint saved.
//!
//! In the book: `docs/design.md#three-layers`.
#![expect(unsafe_code, reason = "installs signal handlers")]

use std::io::{self, ErrorKind, Read};
use std::mem::{self, MaybeUninit};
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use libc::{SA_ONSTACK, SA_RESTART, SIG_DFL, SIG_IGN, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use libc::{c_int, sigaction, sighandler_t};

/// Signals that the launcher also receives, and handles for all ranks.
///
/// They are ignored and not caught: the launcher reads from `/proc` which signals a rank catches,
/// and passes those on. It must find only handlers of the program.
const IGNORED: [c_int; 4] = [SIGINT, SIGHUP, SIGUSR1, SIGUSR2];

/// Descriptor that the handler writes to; -1 without a handler.
static PIPE: AtomicI32 = AtomicI32::new(-1);
/// The process that installed the handler. A forked child has the handler, too.
static OWNER: AtomicI32 = AtomicI32::new(0);
/// A bit per signal of [`IGNORED`]: whether this module made the process ignore it. A signal that
/// was already ignored stays ignored.
static TAKEN: AtomicU64 = AtomicU64::new(0);
/// Whether a SIGTERM was caught.
static CAUGHT: AtomicBool = AtomicBool::new(false);
/// Whether a SIGTERM terminates the process.
static ENDS: AtomicBool = AtomicBool::new(false);

/// The SIGTERMs that this process catches.
#[derive(Debug)]
pub struct Terminations(UnixStream);

impl Terminations {
    /// Waits for the next SIGTERM. Signals in quick succession may count as one.
    ///
    /// # Errors
    /// If the pipe of the handler cannot be read.
    pub fn wait(&mut self) -> io::Result<()> {
        loop {
            match self.0.read(&mut [0; 64]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Leaves the signals that stop a job, or make a request, to the launcher: this process ignores
/// SIGINT, SIGHUP, SIGUSR1 and SIGUSR2, and catches SIGTERM. A signal whose action the program has
/// already set stays as it is, and the program may set actions later. Returns `None` if the program
/// has set the action of SIGTERM, or SIGTERM is already caught.
///
/// # Errors
/// If no pipe can be created.
pub fn leave_to_launcher() -> io::Result<Option<Terminations>> {
    for signal in IGNORED {
        if replace(signal, SIG_DFL, SIG_IGN) {
            TAKEN.fetch_or(1 << signal, Ordering::SeqCst);
        }
    }
    if action(SIGTERM) != SIG_DFL || PIPE.load(Ordering::SeqCst) >= 0 {
        return Ok(None);
    }
    let (reader, writer) = UnixStream::pair()?;
    // A handler must not block. If the pipe is full, the reader wakes up anyway.
    writer.set_nonblocking(true)?;
    OWNER.store(std::process::id().cast_signed(), Ordering::SeqCst);
    // The descriptor stays open while the process lives, since the handler may run at any time.
    PIPE.store(writer.into_raw_fd(), Ordering::SeqCst);
    replace(SIGTERM, SIG_DFL, handler());
    Ok(Some(Terminations(reader)))
}

/// Restores the default action of SIGTERM, if [`leave_to_launcher`] replaced it.
pub fn restore_termination() {
    replace(SIGTERM, handler(), SIG_DFL);
}

/// Restores the default actions of all signals that [`leave_to_launcher`] replaced.
pub fn restore() {
    restore_termination();
    let taken = TAKEN.swap(0, Ordering::SeqCst);
    for signal in IGNORED.into_iter().filter(|signal| taken & 1 << signal != 0) {
        replace(signal, SIG_IGN, SIG_DFL);
    }
}

/// Lets a SIGTERM terminate this process: the next one, or one that was caught before. Has no
/// effect if the program handles SIGTERM itself.
pub fn end_by_termination() {
    // The handler may be running in another thread. Either the handler sees `ENDS`, or this
    // function sees `CAUGHT` below.
    ENDS.store(true, Ordering::SeqCst);
    restore_termination();
    if CAUGHT.load(Ordering::SeqCst) && action(SIGTERM) == SIG_DFL {
        // SAFETY: sends a signal; touches no memory.
        unsafe { libc::kill(libc::getpid(), SIGTERM) };
    }
}

/// Runs in any thread, at any point of its work. It may use only atomics and async-signal-safe
/// functions (signal-safety(7)).
extern "C" fn caught(signal: c_int) {
    // SAFETY: all of these functions are async-signal-safe. `errno` belongs to this thread, which
    // may be about to read it.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        let mut current = MaybeUninit::<sigaction>::uninit();
        let is_known = libc::sigaction(signal, ptr::null(), current.as_mut_ptr()) == 0;
        // An action other than the default is a handler that the program has installed since, and
        // that calls this one as its predecessor. If the action is the default, this handler was
        // started before `restore_termination`.
        if is_known && ![handler(), SIG_DFL].contains(&current.assume_init_ref().sa_sigaction) {
            *errno = before;
            return;
        }
        CAUGHT.store(true, Ordering::SeqCst);
        if ENDS.load(Ordering::SeqCst) || libc::getpid() != OWNER.load(Ordering::SeqCst) {
            // The signal is delivered once this function returns.
            libc::signal(signal, SIG_DFL);
            libc::raise(signal);
        } else {
            libc::write(PIPE.load(Ordering::SeqCst), [1_u8].as_ptr().cast(), 1);
        }
        *errno = before;
    }
}

fn handler() -> sighandler_t {
    caught as extern "C" fn(c_int) as sighandler_t
}

/// Returns the action of a signal.
fn action(signal: c_int) -> sighandler_t {
    let mut current = MaybeUninit::<sigaction>::uninit();
    // SAFETY: there is room for the result, which is read only if it was written.
    unsafe {
        match libc::sigaction(signal, ptr::null(), current.as_mut_ptr()) {
            0 => current.assume_init().sa_sigaction,
            _ => SIG_DFL,
        }
    }
}

/// Replaces the action of a signal, and returns whether it was `old`.
fn replace(signal: c_int, old: sighandler_t, new: sighandler_t) -> bool {
    if action(signal) != old {
        return false;
    }
    // SAFETY: all zero is an action with an empty mask; `new` is a constant of the system or the
    // handler above.
    unsafe {
        let mut action: sigaction = mem::zeroed();
        (action.sa_sigaction, action.sa_flags) = (new, SA_RESTART | SA_ONSTACK);
        libc::sigaction(signal, &action, ptr::null_mut()) == 0
    }
}
