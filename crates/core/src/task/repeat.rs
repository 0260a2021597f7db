use std::cell::Cell;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::run::Leave;
use crate::task::align::{align, has_begun, is_finished, unpaired};
use crate::task::{Call, CallWith, TrainLength, parse};
use crate::{Error, Result, Run, TaskItem};

/// A list of items, executed in order and repeated a number of times.
///
/// ```
/// use ice_core::{Repeat, SaveCheckpoint, Task, TaskItem};
/// let tasks = Repeat::new(3)
///     .then(Task::train("train").epochs(1))
///     .then(Task::eval("val").epochs(1))
///     .then(SaveCheckpoint::new());
/// assert_eq!(tasks.epochs(true), 3);
/// ```
pub struct Repeat {
    times: u64,
    done: Cell<u64>,
    /// Whether the repetition was left before its end.
    left: Cell<bool>,
    items: Vec<Box<dyn TaskItem>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    times: u64,
    done: u64,
    #[serde(default)]
    left: bool,
    items: Vec<Json>,
}

impl Repeat {
    /// Creates an empty list that runs `times` times.
    pub fn new(times: u64) -> Self {
        Self { times, done: Cell::new(0), left: Cell::new(false), items: Vec::new() }
    }

    /// Creates an empty list that runs once.
    pub fn once() -> Self {
        Self::new(1)
    }

    /// Adds an item at the end.
    #[must_use]
    pub fn then(mut self, item: impl TaskItem + 'static) -> Self {
        self.items.push(Box::new(item));
        self
    }

    /// Adds a closure at the end. It can leave this repetition by [`Run::stop_task`].
    #[must_use]
    pub fn call(self, function: impl Fn(&Run) -> Result<()> + 'static) -> Self {
        self.then(Call::new(function))
    }

    /// Adds a closure at the end with its own state, which starts as `initial` whenever this
    /// repetition starts. Checkpoints store the state and restarted ranks adopt it, unlike a
    /// variable that a closure captures.
    ///
    /// ```
    /// use ice_core::{Repeat, Task};
    /// // Leaves the loop once the loss is above the one before twice in a row.
    /// let tasks = Repeat::new(100).then(Task::train("train")).call_with((f64::INFINITY, 0), |run, (before, worse)| {
    ///     let loss = run.measure("*/loss")?;
    ///     *worse = if loss > *before { *worse + 1 } else { 0 };
    ///     *before = loss;
    ///     if *worse == 2 {
    ///         run.stop_task();
    ///     }
    ///     Ok(())
    /// });
    /// ```
    #[must_use]
    pub fn call_with<S: Serialize + DeserializeOwned + 'static>(
        self,
        initial: S,
        function: impl Fn(&Run, &mut S) -> Result<()> + 'static,
    ) -> Self {
        self.then(CallWith::new(initial, function))
    }
}

impl Repeat {
    /// Parses a saved state. Fails if more turns are completed than this repetition has.
    fn parse(&self, state: &Json) -> Result<State> {
        let state: State = parse(state, "a repetition")?;
        if state.done > self.times {
            return Err(Error::Resume(format!(
                "{} repetitions were done when the checkpoint was saved, and only {} are asked for",
                state.done, self.times
            )));
        }
        Ok(state)
    }

    /// Continues in the saved turn. The items have been loaded before.
    fn take_up(&self, state: &State) {
        self.done.set(state.done);
        self.left.set(state.left);
        if state.done == state.times && !self.is_finished() {
            self.items.iter().for_each(|item| item.repeat());
        }
    }
}

impl TaskItem for Repeat {
    fn run(&self, run: &Run) -> Result<()> {
        while !self.is_finished() {
            for item in self.items.iter().filter(|item| !item.is_finished()) {
                run.item_begins();
                match item.run(run) {
                    Err(error) if Leave::of(&error) > Leave::Nothing => {
                        if run.leave_item(Leave::of(&error))? == Leave::Run {
                            run.end_early();
                            return Err(Error::StopAllTasks);
                        }
                        self.left.set(true);
                        return Ok(());
                    }
                    outcome => outcome?,
                }
            }
            self.done.set(self.done.get() + 1);
            run.passed();
            if !self.is_finished() {
                self.items.iter().for_each(|item| item.repeat());
            }
        }
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.left.get() || self.done.get() >= self.times
    }

    fn reset(&self) {
        self.done.set(0);
        self.left.set(false);
        self.items.iter().for_each(|item| item.reset());
    }

    fn state(&self) -> Json {
        let items = self.items.iter().map(|item| item.state()).collect::<Vec<_>>();
        serde_json::json!({ "times": self.times, "done": self.done.get(), "left": self.left.get(), "items": items })
    }

    /// Loads the state. `times` may differ from the saved number, so that a run can be made longer;
    /// completed turns count.
    fn load_state(&self, state: &Json, dry_run: bool) -> Result<()> {
        let state = self.parse(state)?;
        if state.items.len() != self.items.len() {
            return Err(Error::Resume(format!(
                "a repetition has {} items and had {} when the checkpoint was saved",
                self.items.len(),
                state.items.len()
            )));
        }
        for (item, saved) in self.items.iter().zip(&state.items) {
            item.load_state(saved, dry_run)?;
        }
        if !dry_run {
            self.take_up(&state);
        }
        Ok(())
    }

    fn load_what_fits(&self, state: &Json, dry_run: bool, left_out: &mut Vec<String>) -> Result<()> {
        let state = self.parse(state)?;
        let own: Vec<_> = self.items.iter().map(|item| item.state()).collect();
        let pairs = align(&state.items, &own);
        if dry_run {
            left_out.extend(unpaired(&state.items, &own, &pairs));
        }
        // All items before the position of the run are completed in this turn, even new ones. Items
        // after it are not.
        let place = pairs.iter().rfind(|(saved, _)| has_begun(&state.items[*saved]));
        let place = place.map_or(0, |(_, own)| *own);
        let mut is_longer = false;
        for (index, item) in self.items.iter().enumerate() {
            let saved = pairs.iter().find(|(_, own)| *own == index).map(|(saved, _)| &state.items[*saved]);
            match saved {
                Some(saved) if !is_longer => item.load_what_fits(saved, dry_run, left_out)?,
                None if index < place && !is_longer && !dry_run => item.skip(),
                _ if !dry_run => item.reset(),
                _ => {}
            }
            // A task that was made longer continues, and the items after it run again.
            is_longer |= !dry_run && saved.is_some_and(is_finished) && !item.is_finished();
        }
        if !dry_run {
            self.take_up(&state);
        }
        Ok(())
    }

    fn skip(&self) {
        self.left.set(true);
    }

    fn saves(&self) -> bool {
        self.items.iter().any(|item| item.saves())
    }

    fn train_length(&self) -> TrainLength {
        let all = || self.items.iter().map(|item| item.train_length());
        let epochs = self.times * all().map(|length| length.epochs).sum::<u64>();
        TrainLength { epochs, steps: self.times * all().map(|length| length.steps).sum::<u64>() }
    }

    fn epochs(&self, train: bool) -> u64 {
        self.times * self.items.iter().map(|item| item.epochs(train)).sum::<u64>()
    }
}
