//! What a run does, in order: tasks over parts of the graph, repetitions, checkpoints, and any closure.

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

/// How much training a part of a run does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TrainLength {
    /// Epochs of tasks that have a number of epochs.
    pub epochs: u64,
    /// Steps of tasks that have a number of steps.
    pub steps: u64,
}

/// A piece of a run. Its progress changes behind a shared reference, so that a checkpoint taken from inside a task can see
/// the whole tree.
pub trait TaskItem {
    /// Does what is left to do.
    ///
    /// # Errors
    /// The first failure; the run then ends. [`Error::StopTask`] leaves the [`Repeat`] that the item is in, and [`Error::StopAllTasks`] ends
    /// the run as well done. All ranks return them at the same item, and the most that any rank asks for counts; if only some ranks do,
    /// the run fails with an error that names one of each. To let one rank decide for all, use a closure ([`Repeat::call`]).
    fn run(&self, run: &Run) -> Result<()>;

    /// Whether nothing is left to do.
    fn is_finished(&self) -> bool;

    /// Forgets all progress.
    fn reset(&self);

    /// Makes ready for the next repetition. Like [`TaskItem::reset`], unless something is kept from one repetition to the next.
    fn repeat(&self) {
        self.reset();
    }

    /// The progress, for a checkpoint.
    fn state(&self) -> Json;

    /// Takes over saved progress; with `dry_run` only checks that it fits, so that nothing is half-loaded.
    ///
    /// # Errors
    /// [`Error::Resume`] says what does not fit.
    fn load_state(&self, state: &Json, dry_run: bool) -> Result<()>;

    /// Like [`TaskItem::load_state`], if the saved progress need not fit in everything: what is left out, or is another than it was, is added to
    /// `left_out`, by name. By default everything must fit.
    ///
    /// # Errors
    /// [`Error::Resume`] says what does not fit.
    fn load_what_fits(&self, state: &Json, dry_run: bool, _left_out: &mut Vec<String>) -> Result<()> {
        self.load_state(state, dry_run)
    }

    /// Counts as done in this repetition without being run: it was added to the list before the place that a resumed run is at.
    fn skip(&self) {}

    /// Epochs that this item runs in all, of training or else of evaluation.
    fn epochs(&self, train: bool) -> u64;

    /// How much training this item does in all, for schedules over the run.
    fn train_length(&self) -> TrainLength {
        TrainLength::default()
    }

    /// Whether it will save checkpoints, so that memory for them is worth having ready.
    fn saves(&self) -> bool {
        false
    }
}

fn parse<T: DeserializeOwned>(state: &Json, what: &str) -> Result<T> {
    T::deserialize(state)
        .map_err(|error| Error::Resume(format!("the saved progress of {what} does not fit: {error}")))
}
