use std::cell::Cell;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::run::Leave;
use crate::task::carried::Carry;
use crate::task::parse;
use crate::{Error, Result, Run, TaskItem};

/// Progress of an item that runs once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Stage {
    #[default]
    Open,
    /// Executed on this rank, before the vote of the ranks.
    Performed,
    Finished,
}

/// An item that runs once. Its progress is whether it is finished, and the state that it carries.
pub(super) trait Once {
    /// Name of the item in messages.
    const WHAT: &'static str;

    /// Whether the item saves a checkpoint.
    const SAVES: bool = false;

    /// Whether all ranks vote after the item on what they leave.
    const VOTES: bool = false;

    /// Returns the progress of the item.
    fn stage(&self) -> &Cell<Stage>;

    /// Executes the item. If it saves a checkpoint that must record the item as finished, it sets
    /// the stage before.
    fn perform(&self, run: &Run) -> Result<()>;

    /// Returns the state that the item carries from one repetition to the next.
    fn carried(&self) -> Option<&dyn Carry> {
        None
    }
}

/// Saved progress of an item that carries a state.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    finished: bool,
    carried: Vec<u8>,
}

impl<T: Once> TaskItem for T {
    fn run(&self, run: &Run) -> Result<()> {
        // If only the vote failed, because a rank was lost, this rank votes again and does not
        // execute the item twice.
        if self.stage().get() != Stage::Performed {
            // The item may take any time: the hang check resumes with the next step.
            let alone = run.worker().link().alone();
            let done = self.perform(run);
            drop(alone);
            done.inspect_err(|_| {
                // An interrupted item is executed again.
                self.stage().set(Stage::Open);
                self.carried().into_iter().for_each(Carry::revert);
            })?;
        }
        let mut leave = Leave::Nothing;
        if T::VOTES {
            self.stage().set(Stage::Performed);
            leave = run.vote()?;
        }
        self.carried().into_iter().for_each(Carry::settle);
        self.stage().set(Stage::Finished);
        run.passed();
        match leave {
            Leave::Nothing => Ok(()),
            Leave::Task => {
                run.item_is_left();
                Err(Error::StopTask)
            }
            Leave::Run => {
                run.end_early();
                Err(Error::StopAllTasks)
            }
        }
    }

    fn is_finished(&self) -> bool {
        self.stage().get() == Stage::Finished
    }

    fn reset(&self) {
        self.repeat();
        if let Some(carried) = self.carried() {
            carried.reset();
        }
    }

    fn repeat(&self) {
        self.stage().take();
    }

    fn state(&self) -> Json {
        let finished = self.is_finished();
        let Some(carried) = self.carried() else { return finished.into() };
        let state = carried.encode().map(|carried| State { finished, carried });
        state.ok().and_then(|state| serde_json::to_value(state).ok()).unwrap_or(Json::Null)
    }

    fn load_state(&self, state: &Json, dry_run: bool) -> Result<()> {
        let finished = match self.carried() {
            None => parse(state, T::WHAT)?,
            Some(carried) => {
                let state: State = parse(state, T::WHAT)?;
                carried.decode(&state.carried, dry_run)?;
                state.finished
            }
        };
        if !dry_run {
            self.stage().set(if finished { Stage::Finished } else { Stage::Open });
        }
        Ok(())
    }

    fn skip(&self) {
        self.stage().set(Stage::Finished);
    }

    fn epochs(&self, _: bool) -> u64 {
        0
    }

    fn saves(&self) -> bool {
        T::SAVES
    }
}
