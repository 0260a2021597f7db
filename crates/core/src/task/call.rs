use std::cell::Cell;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::run::Leave;
use crate::task::carried::{Carried, Carry};
use crate::task::once::{Once, Stage};
use crate::{Result, Run};

/// A closure in the list of tasks. It runs once on every rank. A run that resumes does not run it
/// again if it had run.
///
/// Afterwards the ranks agree on whether to leave the repetition that contains it, or to end the
/// run. If any rank has asked for it, by [`Run::stop_task`] or [`Run::stop_all_tasks`], all ranks
/// do. All ranks therefore wait for each other there.
pub struct Call<F> {
    function: F,
    stage: Cell<Stage>,
}

impl<F: Fn(&Run) -> Result<()>> Call<F> {
    /// Calls `function` in its turn.
    pub fn new(function: F) -> Self {
        Self { function, stage: Cell::default() }
    }
}

impl<F: Fn(&Run) -> Result<()>> Once for Call<F> {
    const WHAT: &'static str = "a closure";
    const VOTES: bool = true;

    fn stage(&self) -> &Cell<Stage> {
        &self.stage
    }

    fn perform(&self, run: &Run) -> Result<()> {
        asked_for((self.function)(run), run)
    }
}

/// A closure in the list of tasks with its own state, added by
/// [`Repeat::call_with`](crate::Repeat::call_with).
///
/// The state lasts as long as the repetition that contains the closure. Checkpoints store it, and a
/// restarted rank adopts it from the other ranks. It is serialized in CBOR, which keeps infinities
/// and NaN.
pub struct CallWith<S, F> {
    function: F,
    state: Carried<S>,
    stage: Cell<Stage>,
}

impl<S: Serialize + DeserializeOwned, F: Fn(&Run, &mut S) -> Result<()>> CallWith<S, F> {
    /// Calls `function` with a state that starts as `initial`.
    pub fn new(initial: S, function: F) -> Self {
        Self { function, state: Carried::new(initial), stage: Cell::default() }
    }
}

impl<S: Serialize + DeserializeOwned, F: Fn(&Run, &mut S) -> Result<()>> Once for CallWith<S, F> {
    const WHAT: &'static str = "a closure with a state";
    const VOTES: bool = true;

    fn stage(&self) -> &Cell<Stage> {
        &self.stage
    }

    fn perform(&self, run: &Run) -> Result<()> {
        asked_for(self.state.change(|state| (self.function)(run, state)), run)
    }

    fn carried(&self) -> Option<&dyn Carry> {
        Some(&self.state)
    }
}

/// Turns an error that leaves a task or the run into a request to leave.
fn asked_for(outcome: Result<()>, run: &Run) -> Result<()> {
    match outcome {
        Err(error) if Leave::of(&error) > Leave::Nothing => {
            run.ask_to_leave(Leave::of(&error));
            Ok(())
        }
        outcome => outcome,
    }
}
