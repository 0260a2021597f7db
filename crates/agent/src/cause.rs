//! Why the kernel ended a process.

use std::fmt;

use serde::Serialize;

/// Cause of a process's end that its exit status does not tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// The kernel killed the process, or one that belongs to it, for lack of memory.
    OutOfMemory(OutOfMemory),
    /// `/dev/shm` has no room for shared memory. Sizes in bytes.
    SharedMemory {
        /// Bytes in use.
        used: u64,
        /// Bytes that fit.
        size: u64,
    },
    /// A write would have made a file longer than `ulimit -f` allows. The rank may have set its own
    /// limit, so the value is not known.
    FileSize,
    /// The process used more CPU time than `ulimit -t` allows.
    CpuTime,
}

/// A lack of memory. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OutOfMemory {
    /// The cgroup whose limit was reached; `None` if the whole machine had no memory left.
    pub cgroup: Option<String>,
    /// Limit of the cgroup.
    pub limit: Option<u64>,
    /// Highest memory usage of the cgroup.
    pub peak: Option<u64>,
    /// Whether the process itself was killed, rather than a process that it had started.
    #[serde(skip)]
    pub itself: bool,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfMemory(memory) => memory.fmt(f),
            Self::SharedMemory { used, size } => {
                write!(
                    f,
                    "/dev/shm is full, {} of {}: raise its size (--shm-size of the container)",
                    size_of(*used),
                    size_of(*size)
                )
            }
            Self::FileSize => f.write_str("a file reached the limit of its size (ulimit -f)"),
            Self::CpuTime => f.write_str("it used all the CPU time that it may (ulimit -t)"),
        }
    }
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.cgroup, self.limit) {
            (Some(cgroup), Some(limit)) => {
                write!(f, "out of memory: the limit of cgroup {cgroup} is {}", size_of(limit))?;
            }
            (Some(cgroup), None) => write!(f, "out of memory: cgroup {cgroup} reached a limit")?,
            (None, _) => f.write_str(
                "out of memory: the machine has none left, or a cgroup above those that are seen from here",
            )?,
        }
        if let Some(peak) = self.peak {
            write!(f, ", its peak was {}", size_of(peak))?;
        }
        f.write_str(if self.itself { "" } else { ", and another process of the job was killed" })
    }
}

/// Formats a number of bytes for people.
fn size_of(bytes: u64) -> String {
    let (mut unit, mut size) = ("B", bytes as f64);
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if size < 1024.0 {
            break;
        }
        (unit, size) = (larger, size / 1024.0);
    }
    // Prints 250 instead of 250.0, but keeps 1.5.
    let text = format!("{size:.1}");
    format!("{} {unit}", text.strip_suffix(".0").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_for_a_person() {
        let sizes = [0, 1023, 1536, 250 << 20, 3 << 40, u64::MAX].map(size_of);
        assert_eq!(sizes, ["0 B", "1023 B", "1.5 KiB", "250 MiB", "3 TiB", "16777216 TiB"]);
    }

    #[test]
    fn a_lack_of_memory_names_limit_and_peak() {
        let all = OutOfMemory {
            cgroup: Some("/job".into()),
            limit: Some(250 << 20),
            peak: Some(249 << 20),
            itself: true,
        };
        let text = "out of memory: the limit of cgroup /job is 250 MiB, its peak was 249 MiB";
        assert_eq!(Cause::OutOfMemory(all.clone()).to_string(), text);
        let none = OutOfMemory { cgroup: None, limit: None, peak: None, itself: false };
        assert_eq!(
            none.to_string(),
            "out of memory: the machine has none left, or a cgroup above those that are seen from here, and another process of the job was killed"
        );
    }
}
