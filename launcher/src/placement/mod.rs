//! Places ranks on CPUs and GPUs. The topology is read from sysfs below a path that is an argument,
//! so that tests can make up machines.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::OnceLock;

use ice_proto::backend::RankDevice;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

mod binding;
mod cpulist;
mod error;
mod gpus;
#[cfg(test)]
mod tests;
mod topology;
mod visible;

pub(crate) use binding::NumaBinding;
use binding::bind;
use gpus::gpu_addresses;
pub(crate) use visible::{CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES, Placed};
pub(crate) use visible::{hip_visible_devices, place, visible_devices};

/// Returns the number of logical CPUs that this process may use. A quota of its cgroup counts.
/// They are counted once, since a restart would wait for it.
pub(crate) fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// Returns the default for the threads of a rank: the cores that this process may use, divided by
/// the ranks that share them, at least 1.
pub(crate) fn threads_per_rank(allowed: usize, ranks: u32) -> u32 {
    let allowed = u32::try_from(allowed).unwrap_or(u32::MAX);
    (allowed / ranks.max(1)).max(1)
}

/// Returns the logical CPUs that this process may use.
pub(crate) fn allowed_cpus() -> BTreeSet<u32> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return BTreeSet::new() };
    let is_in = |cpu: &u32| set.is_set(*cpu as usize).unwrap_or(false);
    (0..u32::try_from(CpuSet::count()).unwrap_or(0)).filter(is_in).collect()
}

/// Returns the CPUs that each rank of this node is bound to. `devices` are the ranks' devices.
pub(crate) fn bind_ranks(binding: NumaBinding, devices: &[RankDevice]) -> Result<Vec<BTreeSet<u32>>, String> {
    let addresses = gpu_addresses(Path::new("/proc"));
    let visible = visible_devices();
    let gpus = devices.iter().map(|device| match device {
        RankDevice::Cpu => Ok(None),
        RankDevice::Cuda(index) => address(*index, visible.as_deref(), &addresses).map(Some),
    });
    let gpus = gpus.collect::<Result<Vec<_>, String>>()?;
    bind(binding, &gpus, Path::new("/sys"), &allowed_cpus()).map_err(|error| error.to_string())
}

/// Returns the PCI address of the GPU that CUDA shows under this index.
fn address(index: u32, visible: Option<&str>, addresses: &[String]) -> Result<String, String> {
    let entry = visible.map(|list| visible::entry(list, index).unwrap_or_default());
    let physical = match entry {
        None => Some(index as usize),
        Some(entry) => entry.parse().ok(),
    };
    let address = physical.and_then(|physical| addresses.get(physical)).cloned();
    address.ok_or_else(|| {
        let named = entry.map(|entry| format!(", `{entry}` in CUDA_VISIBLE_DEVICES,")).unwrap_or_default();
        format!("where cuda:{index}{named} is plugged in is not known: name GPUs by their numbers, or leave it out")
    })
}
