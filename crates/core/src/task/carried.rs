use std::cell::RefCell;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// State that an item keeps from one repetition to the next, and that checkpoints and rounds pass
/// on.
pub(super) trait Carry {
    /// Returns the state in a form that keeps all floating-point numbers.
    fn encode(&self) -> Result<Vec<u8>>;

    /// Loads an encoded state. With `dry_run` only checks that it fits.
    fn decode(&self, state: &[u8], dry_run: bool) -> Result<()>;

    /// Returns to the initial state of the program.
    fn reset(&self);

    /// Makes the last change count.
    fn settle(&self);

    /// Reverts the last change, which does not count.
    fn revert(&self);
}

/// A state of any serializable type.
pub(super) struct Carried<S> {
    now: RefCell<S>,
    initial: Result<Vec<u8>, String>,
    /// The state before a change that does not count yet. Checkpoints and other ranks get this
    /// state.
    before: RefCell<Option<Vec<u8>>>,
}

impl<S: Serialize + DeserializeOwned> Carried<S> {
    pub(super) fn new(initial: S) -> Self {
        let encoded = encode(&initial);
        Self { now: RefCell::new(initial), initial: encoded, before: RefCell::default() }
    }

    /// Lets a function change the state. The change counts once it is settled.
    pub(super) fn change<T>(&self, function: impl FnOnce(&mut S) -> Result<T>) -> Result<T> {
        self.before.replace(Some(self.encode()?));
        function(&mut self.now.borrow_mut())
    }
}

impl<S: Serialize + DeserializeOwned> Carry for Carried<S> {
    fn encode(&self) -> Result<Vec<u8>> {
        if let Some(before) = &*self.before.borrow() {
            return Ok(before.clone());
        }
        encode(&*self.now.borrow()).map_err(|problem| Error::Save(unfit(&problem)))
    }

    fn decode(&self, state: &[u8], dry_run: bool) -> Result<()> {
        let state: S =
            ciborium::from_reader(state).map_err(|error| Error::Resume(unfit(&error.to_string())))?;
        if !dry_run {
            self.now.replace(state);
            self.settle();
        }
        Ok(())
    }

    fn settle(&self) {
        self.before.replace(None);
    }

    fn revert(&self) {
        // This cannot fail: the bytes were encoded from the same type.
        self.before.take().into_iter().for_each(|before| drop(self.decode(&before, false)));
    }

    fn reset(&self) {
        self.settle();
        // A state that cannot be encoded is reported when the closure is called.
        if let Some(initial) =
            self.initial.as_ref().ok().and_then(|bytes| ciborium::from_reader(&**bytes).ok())
        {
            self.now.replace(initial);
        }
    }
}

fn encode(state: &impl Serialize) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    ciborium::into_writer(state, &mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn unfit(problem: &str) -> String {
    format!("the state that a closure carries does not fit: {problem}")
}
