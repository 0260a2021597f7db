//! Mixed precision: the type of forward passes, and the scale of the loss.

mod scaler;

use std::cell::RefCell;
use std::rc::Rc;

use ice_c10d::amp;
use tch::{Device, Kind};

pub use scaler::GradScaler;

use crate::Result;

/// Lets operations of forward passes run in a smaller type if that is safe, like `torch.autocast`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Autocast {
    kind: Option<Kind>,
}

impl Autocast {
    /// Uses `Kind::Half` on CUDA and `Kind::BFloat16` on the CPU.
    pub fn new() -> Self {
        Self::default()
    }

    /// Uses this type: `Kind::Half` or `Kind::BFloat16`.
    pub fn of(kind: Kind) -> Self {
        Self { kind: Some(kind) }
    }

    pub(crate) fn kind(self, device: Device) -> Kind {
        self.kind.unwrap_or(if device.is_cuda() { Kind::Half } else { Kind::BFloat16 })
    }
}

/// Precision options of the steps of a graph.
#[derive(Default, Clone)]
pub(crate) struct Precision {
    pub(crate) autocast: Option<Autocast>,
    pub(crate) scaler: Option<Rc<RefCell<GradScaler>>>,
}

impl Precision {
    /// Enters autocast for a forward pass, until the result is dropped.
    pub(crate) fn begin(&self, device: Device) -> Result<Option<amp::Autocast>> {
        let range = self.autocast.map(|autocast| amp::Autocast::begin(device, autocast.kind(device)));
        Ok(range.transpose()?)
    }
}
