//! Where the output of ranks goes: torchrun's folders, and pipes to the console.

mod folder;
mod pump;

pub(crate) use folder::{LogFolder, RankFiles};
pub(crate) use pump::{Pump, TAIL_LINES};
