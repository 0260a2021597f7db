//! torchrun's `--numa-binding`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use super::error::PlacementError;
use super::topology::Topology;

/// Values of torchrun's `--numa-binding`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NumaBinding {
    /// The CPUs of the NUMA node of the rank's GPU.
    Node,
    /// The CPUs of all NUMA nodes of the GPU's socket.
    Socket,
    /// A share of the node's physical cores that no other rank has.
    Exclusive,
    /// One of the node's core complexes, whose cores share their last cache. Ranks have different
    /// core complexes as long as there are enough.
    CoreComplex,
}

impl NumaBinding {
    const ALL: [Self; 4] = [Self::Node, Self::Socket, Self::Exclusive, Self::CoreComplex];
}

impl fmt::Display for NumaBinding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Node => "node",
            Self::Socket => "socket",
            Self::Exclusive => "exclusive",
            Self::CoreComplex => "core-complex",
        })
    }
}

impl FromStr for NumaBinding {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|binding| binding.to_string() == text)
            .ok_or_else(|| format!("`{text}` is none of node, socket, exclusive, core-complex"))
    }
}

/// Returns the logical CPUs that each rank of this node is bound to. A rank's set is never empty
/// and a subset of `allowed`, the agent's own affinity mask. `gpus[i]` is the PCI address
/// (`0000:17:00.0`) of the GPU of local rank `i`, `None` for a rank on the CPU. `sys` is the mount
/// point of sysfs.
pub(crate) fn bind(
    binding: NumaBinding,
    gpus: &[Option<String>],
    sys: &Path,
    allowed: &BTreeSet<u32>,
) -> Result<Vec<BTreeSet<u32>>, PlacementError> {
    let topology = Topology::read(sys, allowed)?;
    let mut ranks_of_nodes = BTreeMap::<u32, Vec<usize>>::new();
    for (rank, gpu) in gpus.iter().enumerate() {
        let node = match gpu {
            Some(address) => topology.node_of_gpu(address)?,
            None => topology.node_of_rank(rank, gpus.len())?,
        };
        ranks_of_nodes.entry(node).or_default().push(rank);
    }
    let mut bound = vec![BTreeSet::new(); gpus.len()];
    for (node, ranks) in ranks_of_nodes {
        let parts = match binding {
            NumaBinding::Node => vec![topology.node(node)?],
            NumaBinding::Socket => vec![topology.socket(node)?],
            NumaBinding::Exclusive => divide(topology.cores(node)?, node, ranks.len())?,
            NumaBinding::CoreComplex => topology.complexes(node)?,
        };
        for (rank, part) in ranks.into_iter().zip(parts.iter().cycle()) {
            bound[rank].clone_from(part);
        }
    }
    Ok(bound)
}

/// Divides cores into ranges, one per rank. The cores that are left over go to the first ranks.
fn divide(cores: Vec<BTreeSet<u32>>, node: u32, ranks: usize) -> Result<Vec<BTreeSet<u32>>, PlacementError> {
    if cores.len() < ranks {
        return Err(PlacementError::FewCores { node, ranks, cores: cores.len() });
    }
    let (each, left_over) = (cores.len() / ranks, cores.len() % ranks);
    let mut cores = cores.into_iter();
    let part = |rank| cores.by_ref().take(each + usize::from(rank < left_over)).flatten().collect();
    Ok((0..ranks).map(part).collect())
}
