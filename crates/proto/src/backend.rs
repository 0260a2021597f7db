//! The collective backends and device kinds that a job can name.
//!
//! In the book: `docs/placement.md`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The library that carries the collectives of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DistBackend {
    /// c10d's gloo process group: CPU tensors over TCP.
    Gloo,
    /// c10d's NCCL process group: CUDA tensors.
    Nccl,
}

impl DistBackend {
    /// Returns the name that PyTorch uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gloo => "gloo",
            Self::Nccl => "nccl",
        }
    }
}

/// The one device that a rank is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum RankDevice {
    /// The processors of the host.
    Cpu,
    /// The CUDA device with this index, as the process sees it.
    Cuda(u32),
}

/// An unknown name of a backend or a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not a {what}: expected {expected}")]
pub struct UnknownName {
    /// Kind of thing that was expected.
    pub what: &'static str,
    /// The name that was given.
    pub given: String,
    /// The names that are accepted.
    pub expected: &'static str,
}

impl fmt::Display for DistBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DistBackend {
    type Err = UnknownName;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "gloo" => Ok(Self::Gloo),
            "nccl" => Ok(Self::Nccl),
            _ => Err(UnknownName { what: "backend", given: s.into(), expected: "`gloo` or `nccl`" }),
        }
    }
}

impl fmt::Display for RankDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for RankDevice {
    type Err = UnknownName;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let unknown = || UnknownName { what: "device", given: s.into(), expected: "`cpu` or `cuda:<index>`" };
        match s.split_once(':') {
            None if s == "cpu" => Ok(Self::Cpu),
            Some(("cuda", index)) => index.parse().map(Self::Cuda).map_err(|_| unknown()),
            _ => Err(unknown()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_backends_and_devices_round_trip() {
        for device in [RankDevice::Cpu, RankDevice::Cuda(0), RankDevice::Cuda(15)] {
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        for backend in [DistBackend::Gloo, DistBackend::Nccl] {
            assert_eq!(backend.to_string().parse(), Ok(backend));
        }
    }

    #[test]
    fn unknown_names_are_refused_by_value() {
        for bad in ["", "cuda", "cuda:", "cuda:-1", "cpu:0", "tpu:1"] {
            let error = bad.parse::<RankDevice>().unwrap_err();
            assert_eq!(error.given, bad);
        }
    }
}
