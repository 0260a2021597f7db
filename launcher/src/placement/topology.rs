//! Nodes, sockets, cores and caches according to sysfs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

use super::cpulist;
use super::error::PlacementError;

type Cpus = BTreeSet<u32>;

/// The part of the machine that an affinity mask allows.
pub(super) struct Topology<'a> {
    sys: &'a Path,
    allowed: &'a Cpus,
    /// CPUs by NUMA node, whether allowed or not. `None` if the kernel or the container shows no
    /// nodes.
    nodes: Option<BTreeMap<u32, Cpus>>,
}

impl<'a> Topology<'a> {
    pub(super) fn read(sys: &'a Path, allowed: &'a Cpus) -> Result<Self, PlacementError> {
        let folder = sys.join("devices/system/node");
        let mut nodes = BTreeMap::new();
        for (node, path) in numbered(&folder, "node").unwrap_or_default() {
            nodes.insert(node, read_cpus(path.join("cpulist"))?);
        }
        let nodes = if nodes.is_empty() { None } else { Some(nodes) };
        Ok(Self { sys, allowed, nodes })
    }

    /// Returns the NUMA node of a GPU.
    pub(super) fn node_of_gpu(&self, address: &str) -> Result<u32, PlacementError> {
        if self.nodes.is_none() {
            return Ok(0);
        }
        let path = self.sys.join("bus/pci/devices").join(address).join("numa_node");
        // -1 if the firmware does not name the node, which is common with a single node.
        let node = read_number(path)?;
        Ok(u32::try_from(node).unwrap_or(0))
    }

    /// Returns the NUMA node of a rank without a GPU. Such ranks are spread evenly over the usable
    /// nodes.
    pub(super) fn node_of_rank(&self, rank: usize, ranks: usize) -> Result<u32, PlacementError> {
        let nodes: Vec<u32> = match &self.nodes {
            None => vec![0],
            Some(nodes) => {
                let usable = nodes.iter().filter(|(_, cpus)| !cpus.is_disjoint(self.allowed));
                usable.map(|(node, _)| *node).collect()
            }
        };
        let node = nodes.get(rank * nodes.len() / ranks).copied();
        node.ok_or_else(|| self.no_cpu("any NUMA node".into()))
    }

    /// Returns the usable CPUs of a NUMA node.
    pub(super) fn node(&self, node: u32) -> Result<Cpus, PlacementError> {
        self.usable(self.cpus(node).iter(), || format!("NUMA node {node}"))
    }

    /// Returns the usable CPUs of all NUMA nodes of the socket that a node belongs to.
    pub(super) fn socket(&self, node: u32) -> Result<Cpus, PlacementError> {
        let Some(nodes) = &self.nodes else { return self.node(node) };
        let Some(socket) = self.socket_of(self.cpus(node))? else { return self.node(node) };
        let mut cpus = Vec::new();
        for candidate in nodes.values() {
            if self.socket_of(candidate)? == Some(socket) {
                cpus.extend(candidate);
            }
        }
        self.usable(cpus.into_iter(), || format!("socket {socket}"))
    }

    /// Returns the physical cores of a NUMA node, ordered by their first hyper-thread.
    pub(super) fn cores(&self, node: u32) -> Result<Vec<Cpus>, PlacementError> {
        let siblings = |cpu| read_cpus(self.cpu(cpu).join("topology/thread_siblings_list"));
        Ok(group(self.node(node)?, siblings)?.into_values().collect())
    }

    /// Returns the core complexes of a NUMA node, the largest first. The cores of a core complex
    /// share the last cache.
    pub(super) fn complexes(&self, node: u32) -> Result<Vec<Cpus>, PlacementError> {
        let complexes = group(self.node(node)?, |cpu| last_cache(&self.cpu(cpu).join("cache")))?;
        let mut complexes: Vec<Cpus> = complexes.into_values().collect();
        complexes.sort_by_key(|cpus| std::cmp::Reverse(cpus.len()));
        Ok(complexes)
    }

    fn cpu(&self, cpu: u32) -> PathBuf {
        self.sys.join(format!("devices/system/cpu/cpu{cpu}"))
    }

    fn cpus(&self, node: u32) -> &Cpus {
        const NONE: &Cpus = &Cpus::new();
        self.nodes.as_ref().map_or(self.allowed, |nodes| nodes.get(&node).unwrap_or(NONE))
    }

    /// Returns the socket of these CPUs. `None` for a node that has only memory.
    fn socket_of(&self, cpus: &Cpus) -> Result<Option<i64>, PlacementError> {
        let first = cpus.first().map(|cpu| self.cpu(*cpu).join("topology/physical_package_id"));
        first.map(read_number).transpose()
    }

    fn usable<'b>(
        &self,
        cpus: impl Iterator<Item = &'b u32>,
        place: impl FnOnce() -> String,
    ) -> Result<Cpus, PlacementError> {
        let cpus: Cpus = cpus.filter(|cpu| self.allowed.contains(cpu)).copied().collect();
        if cpus.is_empty() { Err(self.no_cpu(place())) } else { Ok(cpus) }
    }

    fn no_cpu(&self, place: String) -> PlacementError {
        PlacementError::NoCpu { place, allowed: cpulist::format(self.allowed) }
    }
}

/// Groups CPUs that share something, by the lowest CPU of each group.
fn group(
    cpus: Cpus,
    sharing: impl Fn(u32) -> Result<Cpus, PlacementError>,
) -> Result<BTreeMap<u32, Cpus>, PlacementError> {
    let mut groups = BTreeMap::<u32, Cpus>::new();
    for cpu in cpus {
        // The lowest CPU only identifies the group, so it may be outside the mask.
        let name = sharing(cpu)?.first().copied().unwrap_or(cpu);
        groups.entry(name).or_default().insert(cpu);
    }
    Ok(groups)
}

/// Returns the CPUs that share the cache of the highest level. Caches for instructions are ignored.
fn last_cache(folder: &Path) -> Result<Cpus, PlacementError> {
    let fail = |source| PlacementError::Read { path: folder.to_owned(), source };
    let mut last = None;
    for (_, cache) in numbered(folder, "index").map_err(fail)? {
        if read(&cache.join("type"))? == "Instruction" {
            continue;
        }
        let level = read_number(cache.join("level"))?;
        if last.as_ref().is_none_or(|(highest, _)| level > *highest) {
            last = Some((level, cache));
        }
    }
    let (_, cache) = last.ok_or_else(|| fail(io::ErrorKind::NotFound.into()))?;
    read_cpus(cache.join("shared_cpu_list"))
}

/// Returns the entries of a folder whose names are a word and a number, in the order of the
/// numbers.
fn numbered(folder: &Path, word: &str) -> io::Result<BTreeMap<u32, PathBuf>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(word)?.parse().ok());
        found.extend(number.map(|number| (number, entry.path())));
    }
    Ok(found)
}

fn read(path: &Path) -> Result<String, PlacementError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(source) => Err(PlacementError::Read { path: path.to_owned(), source }),
    }
}

fn read_cpus(path: PathBuf) -> Result<Cpus, PlacementError> {
    let text = read(&path)?;
    match cpulist::parse(&text) {
        Some(cpus) => Ok(cpus),
        None => Err(PlacementError::Malformed { path, text, expected: "a list of CPUs" }),
    }
}

fn read_number(path: PathBuf) -> Result<i64, PlacementError> {
    let text = read(&path)?;
    match text.parse() {
        Ok(number) => Ok(number),
        Err(_) => Err(PlacementError::Malformed { path, text, expected: "a number" }),
    }
}
