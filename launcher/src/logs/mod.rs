//! Where the output of ranks goes: torchrun's folders, and pipes to the console.

mod console;
mod folder;
mod pump;

pub(crate) use console::{Console, Target};
pub(crate) use folder::{LogFolder, RankFiles};
pub(crate) use pump::{Pump, Sink, TAIL_LINES};
