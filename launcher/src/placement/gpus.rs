//! PCI addresses of the GPUs of this node.

use std::fs;
use std::path::Path;

/// Returns the PCI addresses of this node's NVIDIA GPUs in the order of their indices. `proc` is
/// the mount point of procfs.
///
/// The order is that of the PCI bus. CUDA itself puts the fastest GPU first unless
/// `CUDA_DEVICE_ORDER=PCI_BUS_ID` is set. On a node with GPUs of several models, the two orders
/// agree only with that variable. GPUs of one model are always in the order of the bus.
pub(crate) fn gpu_addresses(proc: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(proc.join("driver/nvidia/gpus")) else { return Vec::new() };
    let mut addresses: Vec<_> = entries
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("information")).ok())
        .filter_map(|information| {
            let address = information.lines().find_map(|line| line.strip_prefix("Bus Location:"))?;
            let address = address.trim().to_ascii_lowercase();
            Some((position(&address)?, address))
        })
        .collect();
    addresses.sort_unstable();
    addresses.into_iter().map(|(_, address)| address).collect()
}

/// Parses domain, bus, device and function as numbers. Domains may have more than four digits, so
/// texts would not sort right.
fn position(address: &str) -> Option<Vec<u32>> {
    address.split([':', '.']).map(|part| u32::from_str_radix(part, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_stand_in_the_order_of_the_bus() {
        let proc = tempfile::tempdir().unwrap();
        for address in ["0000:C8:00.0", "10000:01:00.0", "0000:17:00.0", "2000:01:00.0"] {
            let folder = proc.path().join("driver/nvidia/gpus").join(address);
            fs::create_dir_all(&folder).unwrap();
            let information = format!(
                "Model: \t\t NVIDIA H100 80GB HBM3\nBus Type: \t PCIe\nBus Location: \t {address}\nDevice Minor: \t 0\n"
            );
            fs::write(folder.join("information"), information).unwrap();
        }
        fs::create_dir(proc.path().join("driver/nvidia/gpus/unreadable")).unwrap();
        let expected = ["0000:17:00.0", "0000:c8:00.0", "2000:01:00.0", "10000:01:00.0"];
        assert_eq!(gpu_addresses(proc.path()), expected);
    }

    #[test]
    fn a_node_without_the_driver_has_none() {
        assert!(gpu_addresses(tempfile::tempdir().unwrap().path()).is_empty());
    }
}
