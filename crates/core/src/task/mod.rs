//! The program of a run: tasks over parts of the graph, repetitions, checkpoints, and closures.

mod align;
mod best;
mod call;
mod carried;
mod early_stop;
mod epochs;
mod load;
mod once;
mod plateau;
mod repeat;
mod save;

use serde::de::DeserializeOwned;
use serde_json::Value as Json;

pub use best::SaveBest;
pub use call::{Call, CallWith};
pub use early_stop::EarlyStop;
pub use epochs::Task;
pub use load::LoadCheckpoint;
pub use plateau::ReduceLROnPlateau;
pub use repeat::Repeat;
pub use save::SaveCheckpoint;

use crate::{Error, Result, Run};

/// Amount of training in a part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TrainLength {
    /// Epochs of tasks with a number of epochs.
    pub epochs: u64,
    /// Steps of tasks with a number of steps.
    pub steps: u64,
}

/// A piece of a run. Its progress changes behind a shared reference, so that a checkpoint taken
/// within a task contains the whole tree.
pub trait TaskItem {
    /// Executes the remaining work.
    ///
    /// # Errors
    /// The first failure, which ends the run. [`Error::StopTask`] leaves the [`Repeat`] that
    /// contains the item, and [`Error::StopAllTasks`] ends the run successfully. All ranks must
    /// return these two at the same item, and the most that any rank asks for counts. If only some
    /// ranks do, the run fails with an error that names one rank of each kind. To let one rank
    /// decide for all, use a closure ([`Repeat::call`]).
    fn run(&self, run: &Run) -> Result<()>;

    /// Whether the item is completed.
    fn is_finished(&self) -> bool;

    /// Resets all progress.
    fn reset(&self);

    /// Prepares for the next repetition. Like [`TaskItem::reset`], except for state that is kept
    /// from one repetition to the next.
    fn repeat(&self) {
        self.reset();
    }

    /// Returns the progress, for a checkpoint.
    fn state(&self) -> Json;

    /// Loads saved progress. With `dry_run` only checks that it fits, so that nothing is half
    /// loaded.
    ///
    /// # Errors
    /// [`Error::Resume`] names what does not fit.
    fn load_state(&self, state: &Json, dry_run: bool) -> Result<()>;

    /// Like [`TaskItem::load_state`], but saved progress may differ in parts. Adds the name of each
    /// part that is left out, or has changed, to `left_out`. Default: everything must fit.
    ///
    /// # Errors
    /// [`Error::Resume`] names what does not fit.
    fn load_what_fits(&self, state: &Json, dry_run: bool, _left_out: &mut Vec<String>) -> Result<()> {
        self.load_state(state, dry_run)
    }

    /// Marks the item as completed in this repetition without running it. Called for an item that
    /// was added to the list before the position of a resumed run.
    fn skip(&self) {}

    /// Returns the total number of epochs of this item: of training with `train`, else of
    /// evaluation.
    fn epochs(&self, train: bool) -> u64;

    /// Returns the total amount of training of this item, for schedules over the run.
    fn train_length(&self) -> TrainLength {
        TrainLength::default()
    }

    /// Whether the item will save checkpoints, so that memory for them should be prepared.
    fn saves(&self) -> bool {
        false
    }
}

fn parse<T: DeserializeOwned>(state: &Json, what: &str) -> Result<T> {
    T::deserialize(state)
        .map_err(|error| Error::Resume(format!("the saved progress of {what} does not fit: {error}")))
}
