//! Information about processes from `/proc`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::sync::OnceLock;
use std::time::Duration;
use std::{fmt, fs, io};

use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Returns the CPU time that the processes of each of these sessions have used, including processes
/// that have ended and were waited for. Each rank leads its own session. Empty if `/proc` belongs
/// to another PID namespace.
pub(crate) fn cpu_times(sessions: impl IntoIterator<Item = u32>) -> BTreeMap<u32, Duration> {
    let mut times: BTreeMap<u32, Duration> =
        sessions.into_iter().map(|session| (session, Duration::ZERO)).collect();
    if !is_usable() {
        return BTreeMap::new();
    }
    for process in processes() {
        if let Some(time) = times.get_mut(&process.session) {
            *time += process.cpu;
        }
    }
    times
}

/// A process according to `/proc/<pid>/stat`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) name: String,
    /// State of proc_pid_stat(5), one letter: `R`, `S`, `D`, `T`, `Z`, …
    pub(crate) state: char,
    pub(crate) parent: u32,
    pub(crate) group: u32,
    pub(crate) session: u32,
    /// Start in clock ticks since the machine started. Together with the process id, it identifies
    /// a process.
    pub(super) started: u64,
    /// CPU time of the process, and of its children that were waited for.
    cpu: Duration,
}

impl Process {
    pub(crate) fn read(pid: u32) -> Option<Self> {
        if !is_usable() {
            return None;
        }
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        // The name in parentheses may contain any characters, parentheses included.
        let (head, rest) = stat.rsplit_once(')')?;
        let (pid, name) = head.split_once('(')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse().ok();
        let ticks: u64 = fields.get(11..15)?.iter().filter_map(|field| field.parse::<u64>().ok()).sum();
        Some(Self {
            pid: pid.trim().parse().ok()?,
            name: name.to_owned(),
            state: fields.first()?.chars().next()?,
            parent: number(1)?,
            group: number(2)?,
            session: number(3)?,
            started: fields.get(19)?.parse().ok()?,
            // The kernel shows 100 ticks per second on every Linux that libtorch runs on.
            cpu: Duration::from_millis(ticks.saturating_mul(10)),
        })
    }

    /// Whether the process has not ended.
    pub(crate) fn lives(&self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }

    /// Sends a signal to this process, but never to another process that has received its id since.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid.cast_signed());
        let Some(open) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else { return };
        if Self::read(self.pid).is_some_and(|now| now.started == self.started) {
            // The process may have ended meanwhile.
            let _ = pidfd_send_signal(&open, signal);
        }
    }

    /// Returns the reason why a killed process does not end, as far as the kernel shows it.
    pub(crate) fn obstacle(&self) -> &'static str {
        match self.state {
            _ if self.is_frozen() => "frozen by its cgroup",
            'D' => "in an uninterruptible sleep of the kernel (state D), as on a disk or network that hangs",
            'T' | 't' => "stopped",
            _ => "not finished by the kernel yet",
        }
    }

    /// Whether the process's cgroup is frozen. A frozen cgroup of version 1 keeps even killed
    /// processes; version 2 lets them end.
    fn is_frozen(&self) -> bool {
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).unwrap_or_default();
        let freezer = groups.lines().find_map(|line| line.split_once(":freezer:").map(|(_, path)| path));
        let state = |path| fs::read_to_string(format!("/sys/fs/cgroup/freezer{path}/freezer.state"));
        freezer.and_then(|path| state(path).ok()).is_some_and(|state| state.trim() != "THAWED")
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.pid, self.name.escape_default())
    }
}

/// Returns the children that the calling thread has started, and those that this process has adopted.
///
/// The kernel has a list of children for each thread. A subreaper adopts with its main thread, which
/// lives as long as the process. A restart looks for remaining processes several times, so it skips
/// the lists of all other threads, which start nothing.
pub(crate) fn own_children() -> Vec<u32> {
    let own = std::process::id();
    let thread = nix::unistd::gettid().as_raw().cast_unsigned();
    let lists = [Some(own), (thread != own).then_some(thread)].into_iter().flatten();
    let lists = lists.map(|thread| read_text(&format!("/proc/self/task/{thread}/children")));
    match lists.collect::<io::Result<Vec<_>>>() {
        Ok(lists) => lists.iter().flat_map(|list| numbers(list)).collect(),
        // The kernel lacks these lists.
        Err(_) => children(own),
    }
}

/// Reads a file of the kernel. `fs::read_to_string` would ask for its size, which is 0, and then read
/// it in small pieces.
fn read_text(path: &str) -> io::Result<String> {
    let mut text = Vec::with_capacity(4 << 10);
    File::open(path)?.take(u64::MAX).read_to_end(&mut text)?;
    String::from_utf8(text).map_err(io::Error::other)
}

fn numbers(list: &str) -> impl Iterator<Item = u32> {
    list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok())
}

/// Returns the children of a process, whichever of its threads started or adopted them.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let threads: Vec<_> = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().collect();
    let lists = threads.iter().map(|thread| fs::read_to_string(thread.path().join("children")));
    match lists.collect::<io::Result<Vec<_>>>() {
        Ok(lists) => lists.iter().flat_map(|list| numbers(list)).collect(),
        // A thread has ended between the two reads, or the kernel lacks these lists.
        Err(_) => processes().filter(|process| process.parent == pid).map(|process| process.pid).collect(),
    }
}

/// Returns processes and all of their descendants, parents before their children.
pub(crate) fn descendants(roots: impl IntoIterator<Item = u32>) -> Vec<Process> {
    let mut found: Vec<Process> = roots.into_iter().filter_map(Process::read).collect();
    let mut next = 0;
    while let Some(process) = found.get(next) {
        next += 1;
        let children = children(process.pid);
        found.extend(children.into_iter().filter_map(Process::read));
    }
    found
}

/// Returns all processes that `/proc` shows.
fn processes() -> impl Iterator<Item = Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| Process::read(entry.file_name().to_str()?.parse().ok()?))
}

/// Whether the ids in `/proc` are those of this process's PID namespace.
fn is_usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| unusable().is_none())
}

/// Returns the reason why `/proc` cannot be used to find processes, `None` if it can.
pub(crate) fn unusable() -> Option<String> {
    let own = std::process::id().to_string();
    match fs::read_link("/proc/self") {
        Ok(shown) if shown.as_os_str() == own.as_str() => None,
        Ok(shown) => Some(format!(
            "it shows this process as {}, not as {own}: it belongs to another PID namespace",
            shown.display()
        )),
        Err(error) => Some(error.to_string()),
    }
}

/// Whether a process has a handler for a signal.
pub(crate) fn handles(pid: u32, signal: i32) -> bool {
    is_usable() && mask(&format!("/proc/{pid}/status"), "SigCgt:").is_some_and(|mask| is_in(mask, signal))
}

/// Whether this process was started with a signal ignored, for example by nohup.
pub(super) fn ignores(signal: i32) -> bool {
    mask("/proc/self/status", "SigIgn:").is_some_and(|mask| is_in(mask, signal))
}

fn mask(path: &str, name: &str) -> Option<u64> {
    let status = fs::read_to_string(path).ok()?;
    let text = status.lines().find_map(|line| line.strip_prefix(name))?;
    u64::from_str_radix(text.trim(), 16).ok()
}

fn is_in(mask: u64, signal: i32) -> bool {
    u32::try_from(signal - 1).ok().and_then(|bit| mask.checked_shr(bit)).is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_of_a_process_may_hold_anything() {
        let stat = "7 (a) b (c) S 1 8 42 0 -1 4194560 1 0 0 0 10 20 30 40 20 0 1 0 100 0 0";
        let process = Process::parse(stat).unwrap();
        assert_eq!((process.pid, process.name.as_str(), process.state), (7, "a) b (c", 'S'));
        assert_eq!((process.parent, process.group, process.session, process.started), (1, 8, 42, 100));
        assert_eq!(process.cpu, Duration::from_secs(1));
        assert_eq!(Process::parse("7 (x) S 1"), None);
    }

    #[test]
    fn own_children_are_found() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        assert!(children(std::process::id()).contains(&child.id()));
        assert!(own_children().contains(&child.id()));
        let found = descendants([child.id()]);
        found[0].signal(Signal::KILL);
        child.wait().unwrap();
        assert_eq!((found.len(), unusable()), (1, None));
    }

    #[test]
    fn masks_have_a_bit_per_signal() {
        assert!(is_in(1 << 9, 10) && !is_in(1 << 9, 9) && !is_in(u64::MAX, 0));
    }
}
