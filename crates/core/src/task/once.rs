use std::cell::Cell;

use serde_json::Value as Json;

use crate::task::parse;
use crate::{Result, Run, TaskItem};

/// An item that is done once: all its progress is whether it is finished.
pub(super) trait Once {
    /// What it is, for messages.
    const WHAT: &'static str;

    /// Whether it saves a checkpoint.
    const SAVES: bool = false;

    /// Whether it is finished.
    fn finished(&self) -> &Cell<bool>;

    /// Does it, and notes when it counts as finished.
    fn perform(&self, run: &Run) -> Result<()>;
}

impl<T: Once> TaskItem for T {
    fn run(&self, run: &Run) -> Result<()> {
        // It may take as long as it takes; the next step is awaited again.
        let _alone = run.worker().link().alone();
        // One that was disturbed is done again.
        self.perform(run).inspect_err(|_| self.finished().set(false))?;
        run.passed();
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.finished().get()
    }

    fn reset(&self) {
        self.finished().set(false);
    }

    fn state(&self) -> Json {
        self.finished().get().into()
    }

    fn load_state(&self, state: &Json, dry_run: bool) -> Result<()> {
        let finished = parse(state, T::WHAT)?;
        if !dry_run {
            self.finished().set(finished);
        }
        Ok(())
    }

    fn epochs(&self, _: bool) -> u64 {
        0
    }

    fn saves(&self) -> bool {
        T::SAVES
    }
}
