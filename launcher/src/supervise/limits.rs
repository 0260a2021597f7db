//! Open files: the agent takes as many as it may have, and its ranks get what the agent was started with.

use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

/// Soft and hard limit that the agent was started with.
static INHERITED: OnceLock<(rlim_t, rlim_t)> = OnceLock::new();

/// Raises the soft limit to the hard one: each rank of the job, wherever it runs, and each agent is a connection of the host.
pub(crate) fn raise_open_files() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if INHERITED.set((soft, hard)).is_ok()
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::debug!(%error, "the limit of open files stays at {soft}");
    }
}

/// What a rank gets; looked up before the fork.
pub(super) fn inherited_open_files() -> Option<(rlim_t, rlim_t)> {
    INHERITED.get().copied()
}

/// Sets a rank's limit; a system call and nothing else.
pub(super) fn set_open_files((soft, hard): (rlim_t, rlim_t)) -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard)
}
