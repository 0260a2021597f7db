//! The GPUs that each rank sees, and their indices there.

use ice_proto::backend::RankDevice;

/// CUDA's variable for the devices that a process sees, in its order.
pub(crate) const CUDA_VISIBLE_DEVICES: &str = "CUDA_VISIBLE_DEVICES";

/// ROCm's variable, which has precedence over CUDA's there.
pub(crate) const HIP_VISIBLE_DEVICES: &str = "HIP_VISIBLE_DEVICES";

/// Returns the agent's own list of ROCm devices, if there is one.
pub(crate) fn hip_visible_devices() -> Option<String> {
    std::env::var(HIP_VISIBLE_DEVICES).ok().filter(|list| !list.is_empty())
}

/// Returns the agent's own list of CUDA devices, if there is one.
pub(crate) fn visible_devices() -> Option<String> {
    std::env::var(CUDA_VISIBLE_DEVICES).ok()
}

/// Returns the entry that CUDA shows under an index.
pub(super) fn entry(visible: &str, index: u32) -> Option<&str> {
    visible.split(',').nth(index as usize).map(str::trim)
}

/// The device of a rank, and the variable for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    /// The device by the name that the rank has to use.
    pub(crate) device: RankDevice,
    /// CUDA_VISIBLE_DEVICES of the rank, if it differs from the agent's own.
    pub(crate) visible: Option<String>,
}

/// Places the ranks of a node. `visible` is the agent's own CUDA_VISIBLE_DEVICES; `devices` are
/// indices of its entries.
///
/// A program written for torchrun uses `cuda:<local rank>`. If that is not the device that the user
/// named, the ranks see only the named devices, in the order of the ranks. With a virtual local
/// rank, each rank sees only its own device. A rank on the CPU then sees the entry at its local
/// rank, like under torchrun.
pub(crate) fn place(devices: &[RankDevice], visible: Option<&str>, virtual_local_rank: bool) -> Vec<Placed> {
    let name = |index: u32| {
        visible.and_then(|list| entry(list, index)).map_or_else(|| index.to_string(), ToOwned::to_owned)
    };
    let mut distinct: Vec<u32> = Vec::new();
    for device in devices {
        if let RankDevice::Cuda(index) = device
            && !distinct.contains(index)
        {
            distinct.push(*index);
        }
    }
    let in_order = distinct.iter().zip(0..).all(|(index, place)| *index == place);
    let all = || distinct.iter().map(|index| name(*index)).collect::<Vec<_>>().join(",");
    let place = |(device, local_rank): (&RankDevice, u32)| match *device {
        RankDevice::Cpu if virtual_local_rank => Placed {
            device: RankDevice::Cpu,
            visible: visible.map_or_else(
                || Some(local_rank.to_string()),
                |list| entry(list, local_rank).map(ToOwned::to_owned),
            ),
        },
        RankDevice::Cpu => Placed { device: RankDevice::Cpu, visible: None },
        RankDevice::Cuda(index) if virtual_local_rank => {
            Placed { device: RankDevice::Cuda(0), visible: Some(name(index)) }
        }
        RankDevice::Cuda(index) if in_order => Placed { device: RankDevice::Cuda(index), visible: None },
        RankDevice::Cuda(index) => {
            let seen_as =
                distinct.iter().zip(0..).find(|(other, _)| **other == index).map_or(0, |(_, at)| at);
            Placed { device: RankDevice::Cuda(seen_as), visible: Some(all()) }
        }
    };
    devices.iter().zip(0..).map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns device and visible devices of each rank.
    fn placed(gpus: &[u32], visible: Option<&str>, virtual_local_rank: bool) -> String {
        let devices: Vec<_> = gpus.iter().map(|index| RankDevice::Cuda(*index)).collect();
        let placed = place(&devices, visible, virtual_local_rank);
        let text =
            |placed: &Placed| format!("{} [{}]", placed.device, placed.visible.as_deref().unwrap_or(""));
        placed.iter().map(text).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn ranks_in_order_keep_the_agents_view() {
        assert_eq!(placed(&[0, 1], None, false), "cuda:0 []; cuda:1 []");
        assert_eq!(placed(&[0, 1], Some("5,7"), false), "cuda:0 []; cuda:1 []");
    }

    #[test]
    fn other_ranks_see_theirs_as_the_first_ones() {
        assert_eq!(placed(&[2, 3], None, false), "cuda:0 [2,3]; cuda:1 [2,3]");
        assert_eq!(placed(&[1, 0], Some("5,7"), false), "cuda:0 [7,5]; cuda:1 [7,5]");
        assert_eq!(placed(&[1, 1], Some("GPU-a, GPU-b"), false), "cuda:0 [GPU-b]; cuda:0 [GPU-b]");
    }

    #[test]
    fn with_a_virtual_local_rank_each_sees_one() {
        assert_eq!(placed(&[0, 1], Some("5,7"), true), "cuda:0 [5]; cuda:0 [7]");
        assert_eq!(placed(&[0, 1], None, true), "cuda:0 [0]; cuda:0 [1]");
    }

    #[test]
    fn on_the_cpu_it_is_torchruns() {
        let seen = |visible| {
            let placed = place(&[RankDevice::Cpu; 2], visible, true);
            placed.into_iter().map(|placed| placed.visible).collect::<Vec<_>>()
        };
        assert_eq!(seen(None), [Some("0".to_owned()), Some("1".into())]);
        assert_eq!(seen(Some("5, 7")), [Some("5".to_owned()), Some("7".into())]);
        // torchrun refuses to start if the list is too short. Ranks on the CPU do not need the
        // entry.
        assert_eq!(seen(Some("5")), [Some("5".to_owned()), None]);
    }
}
