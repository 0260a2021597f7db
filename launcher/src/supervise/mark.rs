//! The mark that every process of a job carries: its hard limit of `RLIMIT_LOCKS`.
//!
//! Linux has ignored this limit since 2.4.25 (getrlimit(2)), but fork and exec still pass it on,
//! and a process without `CAP_SYS_RESOURCE` can only lower it. A session of its own, a double fork,
//! a cleared environment or other credentials do not remove the mark. The mark therefore finds
//! descendants that no ancestry leads to.
//!
//! The number is `01`, 30 random bits for the job, 16 bits for the process that the agent started,
//! and 16 bits for a job within that process. An agent that runs as a rank of another job lowers
//! the mark that it has inherited. The outer job still recognises the processes of the inner one.

use std::io;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};

use super::ProcessId;

const TAG: u64 = 1;
const ALL: u64 = 0xFFFF;

/// Number of the template that ranks are forked from. Its mark is the highest of the job, so that
/// the mark of each rank can be set by lowering it.
pub(crate) const TEMPLATE: ProcessId = ProcessId::MAX;

/// The common part of the marks of one job's processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    /// A job that is not part of another job: its 32 upper bits.
    Outer(u64),
    /// A job within a process of another job: all of its bits.
    Inner(u64),
}

impl Mark {
    /// Chooses the mark of this agent's job. `None` if its processes cannot be marked.
    pub(super) fn choose() -> io::Result<Option<Self>> {
        let (_, hard) = getrlimit(Resource::RLIMIT_LOCKS)?;
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
        Ok(Self::below(hard, u64::from_ne_bytes(bytes)))
    }

    fn below(hard: rlim_t, random: u64) -> Option<Self> {
        match hard {
            RLIM_INFINITY => Some(Self::Outer(TAG << 30 | random >> 34)),
            _ if hard >> 62 == TAG && hard & ALL == ALL => Some(Self::Inner(hard & !ALL | (random % ALL))),
            _ => None,
        }
    }

    /// Returns the limit for a process that the agent starts.
    pub(crate) fn of(self, process: ProcessId) -> rlim_t {
        match self {
            Self::Outer(job) => {
                let number = if process == TEMPLATE { ALL } else { process % ALL };
                job << 32 | number << 16 | ALL
            }
            Self::Inner(mark) => mark,
        }
    }

    /// Whether a process with this limit belongs to the job.
    pub(super) fn covers(self, limit: rlim_t) -> bool {
        match self {
            Self::Outer(job) => limit >> 32 == job,
            Self::Inner(mark) => limit == mark,
        }
    }

    /// Whether a process with this limit descends from this process of the agent.
    pub(super) fn came_of(self, limit: rlim_t, process: ProcessId) -> bool {
        matches!(self, Self::Outer(_)) && limit | ALL == self.of(process)
    }
}

/// Marks the calling process. A system call and nothing else, so that it may run after fork.
pub(super) fn set(mark: rlim_t) -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_LOCKS, mark, mark)
}

/// Marks a child of this process that the template has forked as a rank.
pub(super) fn set_of(pid: u32, mark: rlim_t) -> io::Result<()> {
    let mark = rustix::process::Rlimit { current: Some(mark), maximum: Some(mark) };
    let pid = rustix::process::Pid::from_raw(pid.cast_signed());
    rustix::process::prlimit(pid, rustix::process::Resource::Locks, mark)?;
    Ok(())
}

/// Returns the hard limit of locks in `/proc/<pid>/limits`, without allocating.
pub(super) fn parse(limits: &[u8]) -> Option<rlim_t> {
    let line = limits.split(|byte| *byte == b'\n').find(|line| line.starts_with(b"Max file locks"))?;
    let mut fields = line.split(|byte| *byte == b' ').filter(|field| !field.is_empty());
    // The fields are three words of the name, the soft limit, and the hard limit.
    let hard = fields.nth(4)?;
    hard.iter().try_fold(0_u64, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mark_of_each_process_belongs_to_its_job_alone() {
        let job = Mark::below(RLIM_INFINITY, u64::MAX / 3).unwrap();
        let other = Mark::below(RLIM_INFINITY, u64::MAX / 5).unwrap();
        for process in [1, 2, 65_534, 65_535, 65_536, u64::MAX] {
            assert!(job.covers(job.of(process)) && !other.covers(job.of(process)));
            assert!(job.came_of(job.of(process), process));
        }
        for process in [1, 65_534, 65_535] {
            assert!(job.of(process) < job.of(TEMPLATE), "a limit can only be lowered");
            assert!(!job.came_of(job.of(TEMPLATE), process) && !job.came_of(job.of(process), TEMPLATE));
        }
        assert!(job.covers(job.of(TEMPLATE)) && job.came_of(job.of(TEMPLATE), TEMPLATE));
        assert!(!job.came_of(job.of(1), 2) && !job.covers(RLIM_INFINITY));
    }

    #[test]
    fn inner_job_is_covered_by_the_outer_one_and_not_the_reverse() {
        let outer = Mark::below(RLIM_INFINITY, 42 << 40).unwrap();
        let inner = Mark::below(outer.of(7), 12_345).unwrap();
        let limit = inner.of(3);
        assert!(limit < outer.of(7), "a limit can only be lowered");
        assert!(outer.covers(limit) && outer.came_of(limit, 7) && !outer.came_of(limit, 3));
        assert!(inner.covers(limit) && !inner.covers(outer.of(7)));
        // A third level of jobs has no bits left.
        assert_eq!(Mark::below(limit, 1), None);
        assert_eq!(Mark::below(100, 1), None);
    }

    #[test]
    fn limit_is_read_from_proc() {
        let limits = std::fs::read("/proc/self/limits").unwrap();
        let (_, hard) = getrlimit(Resource::RLIMIT_LOCKS).unwrap();
        assert_eq!(parse(&limits), (hard != RLIM_INFINITY).then_some(hard));
        let line = b"Limit Soft\nMax file locks            12                   345                  locks\n";
        assert_eq!(parse(line), Some(345));
        assert_eq!(parse(b"Max file locks 1"), None);
    }
}
