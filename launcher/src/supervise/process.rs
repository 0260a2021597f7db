//! The process of a rank.

#![expect(unsafe_code, reason = "code between fork and exec")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use ice_proto::env::{ICE_LINK_FD, ICE_RDZV_TLS, ICE_RDZV_TOKEN, TORCHELASTIC_ERROR_FILE};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, killpg, pthread_sigmask};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, getpid, getppid, setsid};
use tokio::io::unix::AsyncFd;

use super::drain::{Ending, Orders, Remains, drain, due};
use super::proc::Process;
use super::stuck::{Stuck, obstacles};
use super::{ProcessId, ProcessTree, TEMPLATE, limits, mark};
use crate::cli::Program;
use ice_agent::Exit;

/// Destination of a stream of a rank.
pub(crate) enum Stdio {
    Inherit,
    /// `/dev/null`.
    Null,
    File(File),
    Pipe(OwnedFd),
}

impl Stdio {
    /// Returns the descriptor for a stream: `number` if it is inherited, `null` for `/dev/null`.
    /// `None` if the inherited stream is closed.
    pub(crate) fn descriptor<'a>(
        &'a self,
        number: BorrowedFd<'a>,
        null: BorrowedFd<'a>,
    ) -> Option<BorrowedFd<'a>> {
        match self {
            Self::Inherit => rustix::io::fcntl_getfd(number).is_ok().then_some(number),
            Self::Null => Some(null),
            Self::File(file) => Some(file.as_fd()),
            Self::Pipe(end) => Some(end.as_fd()),
        }
    }
}

impl From<Stdio> for std::process::Stdio {
    fn from(stdio: Stdio) -> Self {
        match stdio {
            Stdio::Inherit => Self::inherit(),
            Stdio::Null => Self::null(),
            Stdio::File(file) => file.into(),
            Stdio::Pipe(end) => end.into(),
        }
    }
}

/// A rank that was started, which leads its own session and process group.
pub(crate) struct Rank {
    id: ProcessId,
    tree: Arc<ProcessTree>,
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
}

/// Parameters of a start.
pub(crate) struct Start<'a> {
    pub(crate) id: ProcessId,
    pub(crate) program: &'a Program,
    /// Path by which the program's file is executed.
    pub(crate) executable: &'a Path,
    pub(crate) local_rank: u32,
    pub(crate) cpus: Option<&'a BTreeSet<u32>>,
    pub(crate) variables: Vec<(&'static str, String)>,
    /// The rank's end of the link.
    pub(crate) link: &'a UnixStream,
    pub(crate) stdin: Stdio,
    /// Destinations of stdout and stderr.
    pub(crate) output: [Stdio; 2],
}

/// Starts a rank. The calling thread must live as long as the agent: the kernel kills the rank when
/// that thread ends (`PR_SET_PDEATHSIG`).
pub(crate) fn spawn(tree: &Arc<ProcessTree>, start: Start<'_>) -> io::Result<Rank> {
    let Start { id, program, executable, local_rank, cpus, variables, link, stdin, output } = start;
    let [stdout, stderr] = output;
    let mark = tree.mark_of(id);
    let mut command = Command::new(executable);
    command.arg0(&program.path);
    // The launcher's own error file must not become the error file of a rank.
    command.env_remove(TORCHELASTIC_ERROR_FILE);
    command.args(program.args_of(local_rank)).envs(variables).env(ICE_LINK_FD, link.as_raw_fd().to_string());
    command.env_remove(ICE_RDZV_TOKEN).env_remove(ICE_RDZV_TLS);
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    let cpus = cpus.map(cpu_set).transpose()?;
    let (link_fd, agent) = (link.as_raw_fd(), getpid());
    let open_files = limits::inherited_open_files();
    let file_size_ends = limits::file_size_ends();
    let before_exec = move || {
        setsid()?;
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // If the agent died before the line above, the death signal does not arrive.
        if getppid() != agent {
            return Err(nix::Error::ESRCH.into());
        }
        if let Some(mark) = mark {
            mark::set(mark)?;
        }
        if let Some(cpus) = &cpus {
            sched_setaffinity(Pid::from_raw(0), cpus)?;
        }
        if let Some(inherited) = open_files {
            limits::set_open_files(inherited)?;
        }
        if file_size_ends {
            limits::restore_file_size()?;
        }
        pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
        // SAFETY: the caller holds the descriptor open over the fork.
        let link = unsafe { BorrowedFd::borrow_raw(link_fd) };
        fcntl(link, FcntlArg::F_SETFD(FdFlag::empty()))?;
        Ok(())
    };
    // SAFETY: the closure makes system calls only; it allocates nothing and takes no lock.
    unsafe { command.pre_exec(before_exec) };
    let mut child = command.spawn()?;
    match Rank::open(tree, id, child.id()) {
        Ok(rank) => Ok(rank),
        Err(error) => {
            child.kill()?;
            child.wait()?;
            Err(error)
        }
    }
}

fn cpu_set(cpus: &BTreeSet<u32>) -> nix::Result<CpuSet> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu as usize)?;
    }
    Ok(set)
}

impl Rank {
    /// Opens a pidfd of a child of this process.
    fn open(tree: &Arc<ProcessTree>, id: ProcessId, pid: u32) -> io::Result<Self> {
        let number = rustix::process::Pid::from_raw(pid.cast_signed()).ok_or(io::ErrorKind::InvalidInput)?;
        let pidfd = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty())?;
        // SAFETY: the pidfd is owned by the AsyncFd, which closes it when it is dropped and not
        // before.
        let pidfd = unsafe { AsyncFd::register(pidfd) }.map_err(io::Error::from)?;
        tree.started(pid);
        Ok(Self { id, pid, pidfd, tree: Arc::clone(tree) })
    }

    /// Adopts a process that the template has forked for this agent. The process waits for its first
    /// message and does nothing else; it has the template's mark.
    ///
    /// # Errors
    /// The process has ended, or is not this process's child.
    pub(crate) fn adopt(tree: &Arc<ProcessTree>, pid: u32) -> io::Result<Self> {
        let rank = Self::open(tree, TEMPLATE, pid)?;
        // The reaper may have waited for the process before it was noted, and the number be another's.
        let is_ours = Process::read(pid).is_some_and(|process| {
            process.lives() && process.parent == std::process::id() && process.session == pid
        });
        if !is_ours {
            rank.discard();
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(rank)
    }

    /// Gives an adopted process its number and its mark.
    pub(crate) fn assign(&mut self, id: ProcessId) -> io::Result<()> {
        if let Some(mark) = self.tree.mark_of(id) {
            mark::set_of(self.pid, mark)?;
        }
        self.id = id;
        Ok(())
    }

    /// Binds it to CPUs; for a process that has not begun its work.
    pub(crate) fn bind(&self, cpus: &BTreeSet<u32>) -> io::Result<()> {
        Ok(sched_setaffinity(self.group(), &cpu_set(cpus)?)?)
    }

    /// Kills a process that has not begun its work, and waits for it.
    pub(crate) fn discard(self) {
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), rustix::process::Signal::KILL);
        let _ = self.reap();
    }

    /// Waits for the end of the process, but not for descendants.
    fn reap(&self) -> io::Result<Option<rustix::process::WaitStatus>> {
        let pid = rustix::process::Pid::from_raw(self.pid.cast_signed());
        let status = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty());
        self.tree.waited_for(self.pid);
        Ok(status?.map(|(_, status)| status))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns the process group, for signals while the rank lives.
    pub(crate) fn group(&self) -> Pid {
        Pid::from_raw(self.pid.cast_signed())
    }

    /// Waits for the end of the process and of all its descendants.
    ///
    /// The process is reaped last. Until then its id, which is also the id of its session and its
    /// process group, cannot belong to another process.
    pub(crate) async fn wait(self, mut orders: Orders, say: impl Fn(Remains)) -> Exit {
        let pid = self.pid();
        let mut stuck = None;
        let gone = loop {
            let killed = *orders.ending.borrow_and_update() == Ending::Killed;
            let stuck = killed.then(|| stuck.get_or_insert_with(Stuck::new));
            tokio::select! {
                gone = self.pidfd.readable() => break gone.map(|_| ()),
                Ok(()) = orders.ending.changed() => {}
                () = due(stuck) => {
                    let left: Vec<_> = Process::read(pid).into_iter().collect();
                    say(Remains::Stuck(obstacles(&left)));
                }
            }
        };
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        let well = matches!(waitid(Id::Pid(self.group()), flags), Ok(WaitStatus::Exited(_, 0)));
        drain(&self.tree, (self.id, pid), well, orders, say).await;
        // The group may contain processes that `/proc` could not show.
        let _ = killpg(self.group(), Signal::SIGKILL);
        let status = gone.and_then(|()| self.reap()).ok().flatten();
        let code = status.and_then(|status| status.exit_status());
        match (code, status.and_then(|status| status.terminating_signal())) {
            (Some(code), _) => Exit::Code(code),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => Exit::Code(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn start(path: &str, args: &[&str], output: [Stdio; 2]) -> io::Result<Rank> {
        let (_ours, theirs) = UnixStream::pair()?;
        let args = args.iter().map(Into::into).collect();
        let program = Program { path: path.into(), args };
        let (program, link, variables) = (&program, &theirs, Vec::new());
        let tree = ProcessTree::for_tests();
        let executable = &program.path;
        let stdin = Stdio::Inherit;
        spawn(
            &tree,
            Start { id: 1, program, executable, local_rank: 0, cpus: None, variables, link, stdin, output },
        )
    }

    async fn wait(rank: Rank) -> Exit {
        let (_keep, ending) = tokio::sync::watch::channel(Ending::Unasked);
        let orders = Orders { ending, timeout: Duration::from_secs(30) };
        let wait = rank.wait(orders, |_| {});
        tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap()
    }

    async fn end(script: &str) -> Exit {
        wait(start("/bin/sh", &["-c", script], [Stdio::Inherit, Stdio::Inherit]).unwrap()).await
    }

    #[tokio::test]
    async fn codes_and_signals_are_told_apart() {
        assert_eq!(end("exit 0").await, Exit::Code(0));
        assert_eq!(end("exit 3").await, Exit::Code(3));
        assert_eq!(end("kill -KILL $$").await, Exit::Signal(9));
    }

    #[tokio::test]
    async fn child_left_behind_in_the_group_ends_with_its_rank() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let rank =
            start("/bin/sh", &["-c", "sleep 1000 & exit 0"], [Stdio::Pipe(writer), Stdio::Inherit]).unwrap();
        assert_eq!(wait(rank).await, Exit::Code(0));
        // The sleeper also holds the pipe, so the pipe ends only when the sleeper is gone.
        let mut rest = Vec::new();
        let read =
            tokio::task::spawn_blocking(move || io::Read::read_to_end(&mut File::from(reader), &mut rest));
        assert_eq!(tokio::time::timeout(Duration::from_secs(20), read).await.unwrap().unwrap().unwrap(), 0);
    }

    #[tokio::test]
    async fn what_cannot_be_executed_is_an_error() {
        let start = |path| start(path, &[], [Stdio::Inherit, Stdio::Inherit]).err().unwrap().kind();
        assert_eq!(start("/etc/passwd"), io::ErrorKind::PermissionDenied);
        assert_eq!(start("/nowhere/program"), io::ErrorKind::NotFound);
    }
}
