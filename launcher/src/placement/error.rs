use std::io;
use std::path::PathBuf;

/// Reasons why ranks cannot be bound to CPUs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlacementError {
    /// Sysfs lacks a file, for example in a container.
    #[error("cannot read {}: {source}: this machine does not show what the binding needs, leave --numa-binding out", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// A file of sysfs has content that no kernel writes.
    #[error("`{text}` in {} is not {expected}: leave --numa-binding out", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Its content.
        text: String,
        /// The expected content.
        expected: &'static str,
    },
    /// The affinity mask or the cpuset excludes all CPUs of the place.
    #[error(
        "the launcher may use CPUs {allowed}, none of which belongs to {place}: widen its taskset or cpuset, or leave --numa-binding out"
    )]
    NoCpu {
        /// The node or socket that the ranks belong to.
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
        /// Number of ranks that belong to the node.
        ranks: usize,
        /// Number of cores that they may use.
        cores: usize,
    },
}
