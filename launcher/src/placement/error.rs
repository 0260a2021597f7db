use std::io;
use std::path::PathBuf;

/// Why ranks cannot be bound to CPUs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlacementError {
    /// Sysfs lacks a file, as it may in a container.
    #[error("cannot read {}: {source}: this machine does not show what the binding needs, leave --numa-binding out", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of sysfs says what no kernel writes.
    #[error("`{text}` in {} is not {expected}: leave --numa-binding out", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it says.
        text: String,
        /// What belongs there.
        expected: &'static str,
    },
    /// The affinity mask or the cpuset shuts the ranks out.
    #[error(
        "the launcher may use CPUs {allowed}, none of which belongs to {place}: widen its taskset or cpuset, or leave --numa-binding out"
    )]
    NoCpu {
        /// Where the ranks belong.
        place: String,
        /// The CPUs of the affinity mask.
        allowed: String,
    },
    /// Ranks would have to share cores, which `exclusive` rules out.
    #[error(
        "{ranks} ranks belong to NUMA node {node}, where the launcher may use {cores} physical cores: start at most {cores} ranks there, or use --numa-binding node"
    )]
    FewCores {
        /// The NUMA node.
        node: u32,
        /// Its ranks.
        ranks: usize,
        /// Its cores.
        cores: usize,
    },
}
