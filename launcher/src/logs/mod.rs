//! Log folders with torchrun's layout, and pipes from ranks to files and to the console.

mod console;
mod files;
mod folder;
mod health;
mod layout;
mod prefix;
mod pump;
mod status;
mod tail;
mod writer;

pub(crate) use console::{Console, Target, can_rewrite};
pub(crate) use files::{Files, LogFile};
pub(crate) use folder::{LogFolder, RankFiles};
pub(crate) use health::Health;
pub(crate) use prefix::{Names, check_template, coloured, prefix};
pub(crate) use pump::{Filtered, Pump, Sink, pipe};
