//! Settings that the agent changes for itself, and restores for its ranks between fork and exec:
//! the number of open files, of which the agent takes as many as it may have, and SIGXFSZ, which
//! the agent ignores.

#![expect(unsafe_code, reason = "the action of a signal")]

use std::fs;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::Error;

/// Open files of the agent itself, and of each rank: its link, its process, two pipes, and its
/// connection to the store.
const FILES_OF_AGENT: u64 = 20;
const FILES_OF_RANK: u64 = 5;
/// Limit of open files from which on the agent holds files open only to save time.
const FILES_TO_HOLD_SOME: u64 = 1024;
/// Threads of the agent: console, files, names of hosts, a source of notices.
const THREADS: usize = 4;

/// Soft and hard limit that the agent was started with.
static INHERITED: OnceLock<(rlim_t, rlim_t)> = OnceLock::new();

/// Raises the soft limit to the hard one. On the host, each rank of the job, wherever it runs, and
/// each agent is a connection.
pub(crate) fn raise_open_files() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if INHERITED.set((soft, hard)).is_ok()
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::debug!(%error, "the limit of open files stays at {soft}");
    }
}

/// Whether the limit leaves room for files that could also be opened each time.
pub(super) fn may_hold_files() -> bool {
    getrlimit(Resource::RLIMIT_NOFILE).is_ok_and(|(soft, _)| soft >= FILES_TO_HOLD_SOME)
}

/// Returns the limits for a rank. Looked up before the fork.
pub(super) fn inherited_open_files() -> Option<(rlim_t, rlim_t)> {
    INHERITED.get().copied()
}

/// Sets a rank's limits. A system call and nothing else, so that it may run after fork.
pub(super) fn set_open_files((soft, hard): (rlim_t, rlim_t)) -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard)
}

/// Whether SIGXFSZ had its default action when the agent was started.
static HAD_DEFAULT: OnceLock<bool> = OnceLock::new();

/// Ignores SIGXFSZ, so that a file which reaches its size limit (`ulimit -f`) is an error, like a
/// full disk, instead of the end of the agent.
pub(crate) fn survive_file_size() {
    // SAFETY: nothing else in this process depends on the action of this signal, and no handler is
    // set.
    match unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) } {
        Ok(before) => _ = HAD_DEFAULT.set(matches!(before, SigHandler::SigDfl)),
        Err(error) => tracing::debug!(%error, "SIGXFSZ is not ignored"),
    }
}

/// Whether a rank gets the default action. Looked up before the fork.
pub(super) fn file_size_ends() -> bool {
    HAD_DEFAULT.get().copied().unwrap_or(false)
}

/// Restores the default action. A system call and nothing else, so that it may run after fork.
pub(super) fn restore_file_size() -> nix::Result<()> {
    // SAFETY: this is the only thread of a process that is about to become another program.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigDfl) }.map(drop)
}

/// Checks that the agent and this number of ranks can be started at all.
///
/// # Errors
/// Returns an error that names the limit, its value and the way to raise it.
pub(crate) fn check_limits(ranks: u32) -> Result<(), Error> {
    let open = fs::read_dir("/proc/self/fd").map_or(0, |files| files.count() as u64);
    let needed = open + FILES_OF_AGENT + FILES_OF_RANK * u64::from(ranks);
    if getrlimit(Resource::RLIMIT_NOFILE).is_ok_and(|(soft, _)| soft < needed) {
        let (limit, hint) = limit(nix::libc::EMFILE);
        return Err(Error::Limit(format!("{needed} open files are needed{limit}\nhint: {hint}")));
    }
    threads_start().map_err(|error| {
        let hint = error.raw_os_error().map(|errno| limit(errno).1).unwrap_or_default();
        Error::Limit(format!("a thread: {}\nhint: {hint}", explained(&error)))
    })
}

/// Whether threads can be started. Otherwise the runtime would panic later.
fn threads_start() -> io::Result<()> {
    let all_run = Arc::new(Mutex::new(()));
    let held = all_run.lock().unwrap_or_else(PoisonError::into_inner);
    let mut threads = Vec::new();
    for _ in 0..THREADS {
        let all_run = Arc::clone(&all_run);
        threads.push(thread::Builder::new().spawn(move || drop(all_run.lock()))?);
    }
    drop(held);
    threads.into_iter().for_each(|thread| _ = thread.join());
    Ok(())
}

/// Returns the text of a system error with the limit that causes it.
pub(crate) fn explained(error: &io::Error) -> String {
    format!("{error}{}", error.raw_os_error().map(|errno| limit(errno).0).unwrap_or_default())
}

/// Returns the limits that an error number stands for with their values, and the way to raise them.
fn limit(errno: i32) -> (String, &'static str) {
    let value =
        |resource| getrlimit(resource).ok().map(|(soft, _)| soft).filter(|soft| *soft != RLIM_INFINITY);
    let limited = |what: &str, resource| {
        let text = |value| format!(": {what} limited to {value}");
        value(resource).map(text).unwrap_or_default()
    };
    let memory = limited("bytes of memory of a process are", Resource::RLIMIT_AS);
    match errno {
        nix::libc::EMFILE => (
            limited("open files are", Resource::RLIMIT_NOFILE),
            "ulimit -Hn 65536 as root; for a container --ulimit nofile=65536",
        ),
        // A thread without memory for its stack also fails with EAGAIN.
        nix::libc::EAGAIN => (
            memory + &limited("processes and threads of this user are", Resource::RLIMIT_NPROC),
            "ulimit -u unlimited; ulimit -v unlimited; for a container --pids-limit -1",
        ),
        nix::libc::ENOMEM => (memory, "ulimit -v unlimited; free -h"),
        _ => (String::new(), ""),
    }
}
