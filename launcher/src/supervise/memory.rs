//! Detects whether the kernel killed a process for lack of memory. Compares counters of its cgroup,
//! of the cgroups above it, and of the machine with their values at the start of the round.

use std::cell::Cell;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use super::limits::may_hold_files;
use ice_agent::{Cause, Exit, OutOfMemory};

/// A limit of a cgroup of version 1 from here on means no limit: the kernel shows the largest
/// multiple of a page.
const NO_LIMIT: u64 = 1 << 62;
const SHARED_MEMORY: &str = "/dev/shm";
/// Exit code of a shell whose program was killed by SIGKILL.
const KILLED: i32 = 128 + 9;

/// The counters at the start of a round.
pub(crate) struct MemoryWatch {
    /// The cgroup of the agent, in which its ranks start, and those above it up to the root of the
    /// mount.
    groups: Vec<Group>,
    /// Counters of this machine.
    machine: Option<Counters>,
    /// Processes that were killed on this machine.
    killed: Option<u64>,
    /// Ranks among the killed processes whose end was explained.
    explained: Cell<u64>,
}

struct Group {
    folder: PathBuf,
    /// Its path below the root of the mount.
    name: String,
    files: Files,
    before: Counts,
}

/// The files of a cgroup that have counters.
enum Files {
    /// Version 2. `events` includes the cgroups below, `local` does not.
    Second { events: Counters, local: Option<Counters> },
    /// Version 1. `reached` is the number of times that the limit was reached.
    First { reached: Option<Counters>, killed: Option<Counters> },
}

/// A file of the kernel with names and numbers.
struct Counters {
    path: PathBuf,
    /// The open file. A restart waits until all counters are read twice.
    held: Option<File>,
}

impl Counters {
    /// Returns `None` if the kernel has no such file.
    fn open(path: PathBuf) -> Option<Self> {
        let file = File::open(&path).ok()?;
        Some(Self { path, held: may_hold_files().then_some(file) })
    }

    /// Returns a number that the file shows now. Reads pieces of the file, which are whole lines,
    /// until `of` finds the number.
    fn find(&self, of: impl Fn(&str) -> Option<u64>) -> Option<u64> {
        let opened = if self.held.is_none() { File::open(&self.path).ok() } else { None };
        let file = self.held.as_ref().or(opened.as_ref())?;
        let (mut piece, mut at) = ([0; 4 << 10], 0);
        loop {
            let read = file.read_at(&mut piece, at).ok().filter(|read| *read > 0)?;
            if let Some(number) = std::str::from_utf8(&piece[..read]).ok().and_then(&of) {
                return Some(number);
            }
            at += read as u64;
        }
    }

    fn named(&self, name: &str) -> Option<u64> {
        self.find(|text| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value?.trim().parse().ok()
        })
    }
}

impl Files {
    fn open(folder: &Path) -> Self {
        let open = |name: &str| Counters::open(folder.join(name));
        match open("memory.events") {
            // `memory.events` counts the cgroups below as well, so every cgroup above shows the
            // limit of one.
            Some(events) => Self::Second { events, local: open("memory.events.local") },
            None => Self::First { reached: open("memory.failcnt"), killed: open("memory.oom_control") },
        }
    }

    fn read(&self) -> Counts {
        let (out, killed) = match self {
            Self::Second { events, local } => {
                (local.as_ref().unwrap_or(events).named("oom"), events.named("oom_kill"))
            }
            Self::First { reached, killed } => (
                reached.as_ref().and_then(|file| file.find(|text| text.trim().parse().ok())),
                killed.as_ref().and_then(|file| file.named("oom_kill")),
            ),
        };
        Counts { out: out.unwrap_or(0), killed: killed.unwrap_or(0) }
    }
}

/// How often memory ran out.
#[derive(Default, Clone, Copy)]
struct Counts {
    /// How often the limit of this very cgroup was reached.
    out: u64,
    /// Processes that were killed in it.
    killed: u64,
}

impl MemoryWatch {
    /// Finds the cgroups of this process, once: `mountinfo` has thousands of lines on some hosts,
    /// and a restart would wait for it.
    pub(crate) fn new() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let folder = find(&read("/proc/self/cgroup"), &read("/proc/self/mountinfo"));
        let groups = folder.map(|(mount, folder)| groups(&mount, &folder)).unwrap_or_default();
        let machine = Counters::open("/proc/vmstat".into());
        Self { groups, machine, killed: None, explained: Cell::new(0) }
    }

    /// Notes the counters at the start of a round.
    pub(crate) fn start_round(&mut self) {
        self.groups.iter_mut().for_each(|group| group.before = group.files.read());
        self.killed = self.killed_on_machine();
        self.explained.set(0);
    }

    /// Returns the cause of an end, if the kernel knows more than the exit status says. `exit` is
    /// that of a process that the agent did not kill.
    pub(crate) fn cause(&self, exit: &Exit) -> Option<Cause> {
        match exit {
            Exit::Signal(nix::libc::SIGKILL) | Exit::Code(KILLED) => self.out_of_memory(true),
            Exit::Signal(nix::libc::SIGBUS) => {
                full(Path::new(SHARED_MEMORY)).or_else(|| self.out_of_memory(false))
            }
            Exit::Signal(nix::libc::SIGXFSZ) => Some(Cause::FileSize),
            Exit::Signal(nix::libc::SIGXCPU) => Some(Cause::CpuTime),
            Exit::Code(code) if *code != 0 => self.out_of_memory(false),
            _ => None,
        }
    }

    /// Returns a lack of memory as the cause if killed processes are not explained yet. An exit
    /// code that a program chose itself is explained only by its own cgroup: the counters of the
    /// cgroups above include processes killed elsewhere.
    fn out_of_memory(&self, itself: bool) -> Option<Cause> {
        let now: Vec<(&Group, Counts)> =
            self.groups.iter().map(|group| (group, group.files.read())).collect();
        let killed = now.iter().map(|(group, now)| now.killed.saturating_sub(group.before.killed));
        let killed = match itself {
            true => {
                let now = self.killed_on_machine();
                let on_machine = now.zip(self.killed).map(|(now, before)| now.saturating_sub(before));
                killed.chain(on_machine).max()
            }
            false => killed.take(1).max(),
        };
        if killed.unwrap_or_default() <= self.explained.get() {
            return None;
        }
        if itself {
            self.explained.set(self.explained.get() + 1);
        }
        // Only a limit that was reached counts, because the machine may run out of memory although
        // all limits are kept.
        let ran_out = |(group, now): &(&Group, Counts)| now.out > group.before.out;
        let reached = now.iter().filter(|both| ran_out(both)).find_map(|(group, _)| {
            let folder = &group.folder;
            Some((group.name.clone(), limit(folder)?, peak(folder)))
        });
        let memory = match reached {
            Some((name, limit, peak)) => OutOfMemory { cgroup: Some(name), limit: Some(limit), peak, itself },
            None => OutOfMemory { cgroup: None, limit: None, peak: None, itself },
        };
        Some(Cause::OutOfMemory(memory))
    }

    fn killed_on_machine(&self) -> Option<u64> {
        self.machine.as_ref()?.named("oom_kill")
    }
}

/// Finds where the memory of this process is limited. Returns the mount point, and the folder of
/// the process's cgroup below it. Version 1 has a line with the name of the controller, version 2 a
/// line without names.
fn find(cgroups: &str, mounts: &str) -> Option<(PathBuf, PathBuf)> {
    let path_of = |wanted: &dyn Fn(&str, &str) -> bool| {
        cgroups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (number, names, path) = (parts.next()?, parts.next()?, parts.next()?);
            wanted(number, names).then(|| path.to_owned())
        })
    };
    let first =
        path_of(&|_, names| names.split(',').any(|name| name == "memory")).map(|path| ("cgroup", path));
    let second = path_of(&|number, names| number == "0" && names.is_empty()).map(|path| ("cgroup2", path));
    [first, second].into_iter().flatten().find_map(|(kind, path)| {
        mounts.lines().find_map(|line| {
            // proc_pid_mountinfo(5): the fields after the lone hyphen are type, source and options.
            let (left, right) = line.split_once(" - ")?;
            let (left, right): (Vec<&str>, Vec<&str>) =
                (left.split(' ').collect(), right.split(' ').collect());
            let has_memory = kind == "cgroup2" || right.get(2)?.split(',').any(|option| option == "memory");
            if *right.first()? != kind || !has_memory {
                return None;
            }
            let (root, mount) = (Path::new(*left.get(3)?), PathBuf::from(*left.get(4)?));
            // A container may see only a part of the hierarchy.
            let below = Path::new(&path).strip_prefix(root).unwrap_or_else(|_| Path::new(""));
            let folder = mount.join(below);
            Some((mount, folder))
        })
    })
}

/// Returns a cgroup and the cgroups above it, up to the root of the mount.
fn groups(mount: &Path, folder: &Path) -> Vec<Group> {
    let within = folder.ancestors().take_while(|folder| folder.starts_with(mount));
    within
        .map(|folder| {
            let name =
                folder.strip_prefix(mount).map(|name| format!("/{}", name.display())).unwrap_or_default();
            Group { folder: folder.to_owned(), name, files: Files::open(folder), before: Counts::default() }
        })
        .collect()
}

fn first_number(folder: &Path, files: [&str; 2]) -> Option<u64> {
    let text = |file: &&str| fs::read_to_string(folder.join(file)).ok();
    files.iter().find_map(text)?.trim().parse().ok()
}

fn limit(folder: &Path) -> Option<u64> {
    // `max`, for no limit, is not a number.
    first_number(folder, ["memory.max", "memory.limit_in_bytes"]).filter(|limit| *limit < NO_LIMIT)
}

fn peak(folder: &Path) -> Option<u64> {
    first_number(folder, ["memory.peak", "memory.max_usage_in_bytes"])
}

/// Returns a lack of shared memory as the cause if less than a twentieth of a file system is free.
/// Files that only the ended process used may already be gone, so the file system need not be full.
fn full(folder: &Path) -> Option<Cause> {
    let found = statvfs(folder).ok()?;
    let block = found.fragment_size();
    let (size, free) = (found.blocks() * block, found.blocks_available() * block);
    (size > 0 && free < size / 20).then_some(Cause::SharedMemory { used: size - free, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KILL: Exit = Exit::Signal(nix::libc::SIGKILL);

    /// Makes a mount with a cgroup in another one, like in version 2.
    fn two_levels() -> (tempfile::TempDir, PathBuf) {
        let mount = tempfile::tempdir().unwrap();
        let inner = mount.path().join("job/step");
        fs::create_dir_all(&inner).unwrap();
        set(&mount.path().join("job"), "memory.max", "104857600\n");
        set(&mount.path().join("job"), "memory.peak", "104853504\n");
        set(&inner, "memory.max", "max\n");
        for folder in [mount.path().join("job"), inner.clone()] {
            set(&folder, "memory.events", "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\noom_group_kill 0\n");
            set(&folder, "memory.events.local", "low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n");
        }
        (mount, inner)
    }

    fn set(folder: &Path, file: &str, text: &str) {
        fs::write(folder.join(file), text).unwrap();
    }

    fn watch(mount: &Path, folder: &Path) -> MemoryWatch {
        let mut watch = MemoryWatch {
            groups: groups(mount, folder),
            machine: None,
            killed: None,
            explained: Cell::new(0),
        };
        watch.start_round();
        // The machine may run out of memory for another reason.
        watch.killed = Some(u64::MAX);
        watch
    }

    #[test]
    fn the_cgroup_whose_limit_was_reached_is_named() {
        let (mount, inner) = two_levels();
        let watch = watch(mount.path(), &inner);
        assert_eq!(watch.cause(&KILL), None, "nothing has changed");
        set(&inner, "memory.events", "oom 1\noom_kill 2\n");
        set(&mount.path().join("job"), "memory.events", "oom 2\noom_kill 2\n");
        set(&mount.path().join("job"), "memory.events.local", "oom 2\noom_kill 1\n");
        let memory = |itself| OutOfMemory {
            cgroup: Some("/job".into()),
            limit: Some(100 << 20),
            peak: Some((100 << 20) - 4096),
            itself,
        };
        assert_eq!(watch.cause(&Exit::Code(1)), Some(Cause::OutOfMemory(memory(false))));
        assert_eq!(watch.cause(&KILL), Some(Cause::OutOfMemory(memory(true))));
        // Only one process was killed: the rank above.
        assert_eq!((watch.cause(&KILL), watch.cause(&Exit::Code(1))), (None, None));
        set(&inner, "memory.events", "oom 1\noom_kill 3\n");
        assert_eq!(watch.cause(&Exit::Code(137)), Some(Cause::OutOfMemory(memory(true))));
        assert_eq!(watch.cause(&Exit::Code(0)), None);
        assert_eq!(watch.cause(&Exit::Signal(nix::libc::SIGTERM)), None);
    }

    #[test]
    fn what_was_killed_elsewhere_explains_no_exit_code() {
        let (mount, inner) = two_levels();
        let watch = watch(mount.path(), &inner);
        set(&mount.path().join("job"), "memory.events", "oom 2\noom_kill 2\n");
        assert_eq!(watch.cause(&Exit::Code(1)), None);
        assert!(watch.cause(&KILL).is_some(), "a program may have moved its rank into a cgroup beside");
    }

    #[test]
    fn a_limit_that_was_not_reached_is_not_blamed() {
        let (mount, inner) = two_levels();
        let watch = watch(mount.path(), &inner);
        set(&inner, "memory.events", "oom 1\noom_kill 2\n");
        let memory = OutOfMemory { cgroup: None, limit: None, peak: None, itself: true };
        assert_eq!(watch.cause(&KILL), Some(Cause::OutOfMemory(memory)));
    }

    #[test]
    fn version_1_counts_in_other_files() {
        let mount = tempfile::tempdir().unwrap();
        let folder = mount.path().join("job");
        fs::create_dir(&folder).unwrap();
        set(&folder, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n");
        set(&folder, "memory.limit_in_bytes", "262144000\n");
        set(&folder, "memory.max_usage_in_bytes", "262144000\n");
        set(&folder, "memory.failcnt", "8\n");
        set(mount.path(), "memory.limit_in_bytes", "9223372036854771712\n");
        let watch = watch(mount.path(), &folder);
        set(&folder, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n");
        set(&folder, "memory.failcnt", "9\n");
        let text = watch.cause(&KILL).unwrap().to_string();
        assert_eq!(text, "out of memory: the limit of cgroup /job is 250 MiB, its peak was 250 MiB");
    }

    #[test]
    fn the_cgroup_is_found_in_both_versions_and_in_containers() {
        let first = "35 31 0:32 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                     36 31 0:33 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n";
        let second = "30 23 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";
        let part = "30 23 0:27 /docker/7 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        for (cgroups, mounts, mount, folder) in [
            ("5:cpu:/x\n4:memory:/job\n0::/\n", first, "/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory/job"),
            ("0::/user.slice/a:b\n", second, "/sys/fs/cgroup", "/sys/fs/cgroup/user.slice/a:b"),
            ("0::/docker/7/job\n", part, "/sys/fs/cgroup", "/sys/fs/cgroup/job"),
            ("0::/other\n", part, "/sys/fs/cgroup", "/sys/fs/cgroup"),
            ("4:memory:/\n0::/job\n", second, "/sys/fs/cgroup", "/sys/fs/cgroup/job"),
        ] {
            assert_eq!(find(cgroups, mounts), Some((mount.into(), folder.into())), "{cgroups}");
        }
        assert_eq!(find("", first), None);
    }
}
