//! Alignment of a saved task list with that of the program, if the lists differ.

use serde_json::Value as Json;

/// Returns the kind of an item, as far as its saved progress shows it.
fn kind(state: &Json) -> String {
    match state {
        Json::Bool(_) => "a closure, save or load".into(),
        state if state.get("tags").is_some() => {
            let what = if state["train"] == true { "training" } else { "evaluation" };
            format!("the {what} of `{}`", state["tags"].as_str().unwrap_or_default())
        }
        state if state.get("items").is_some() => "a repetition".into(),
        state if state.get("carried").is_some() => "an item with a state of its own".into(),
        _ => "an item of another kind".into(),
    }
}

/// Whether the saved item was completed in its turn.
pub(super) fn is_finished(state: &Json) -> bool {
    let at_least = |done: &Json, length: &Json| done.as_u64() >= length.as_u64();
    match state {
        Json::Bool(finished) => *finished,
        state if state.get("tags").is_some() => {
            let (progress, length) = (&state["progress"], &state["length"]);
            let is_long_enough = match length.get("Epochs") {
                Some(epochs) => at_least(&progress["epochs"], epochs),
                None => at_least(&progress["steps"], &length["Steps"]),
            };
            progress["left"] == true || (is_long_enough && progress["ending"] != true)
        }
        state if state.get("items").is_some() => {
            state["left"] == true || at_least(&state["done"], &state["times"])
        }
        state => state["finished"] == true,
    }
}

/// Whether the saved item was started in its turn, or completed.
pub(super) fn has_begun(state: &Json) -> bool {
    let is_some = |number: &Json| number.as_u64() > Some(0);
    is_finished(state)
        || ["epochs", "steps", "iteration"].iter().any(|what| is_some(&state["progress"][what]))
        || is_some(&state["done"])
        || state["items"].as_array().is_some_and(|items| items.iter().any(has_begun))
}

/// Returns the largest set of pairs of a saved item and an item of the program that have the same
/// kind and keep both orders.
pub(super) fn align(saved: &[Json], own: &[Json]) -> Vec<(usize, usize)> {
    let (saved, own): (Vec<_>, Vec<_>) = (saved.iter().map(kind).collect(), own.iter().map(kind).collect());
    // Length of the longest common subsequence of the lists that follow each pair of positions.
    let mut common = vec![vec![0_usize; own.len() + 1]; saved.len() + 1];
    for i in (0..saved.len()).rev() {
        for j in (0..own.len()).rev() {
            common[i][j] = match saved[i] == own[j] {
                true => common[i + 1][j + 1] + 1,
                false => common[i + 1][j].max(common[i][j + 1]),
            };
        }
    }
    let (mut pairs, mut i, mut j) = (Vec::new(), 0, 0);
    while i < saved.len() && j < own.len() {
        if saved[i] == own[j] {
            pairs.push((i, j));
            (i, j) = (i + 1, j + 1);
        } else if common[i + 1][j] >= common[i][j + 1] {
            i += 1;
        } else {
            j += 1;
        }
    }
    pairs
}

/// Describes the items without a counterpart in the other list.
pub(super) fn unpaired(saved: &[Json], own: &[Json], pairs: &[(usize, usize)]) -> Vec<String> {
    let of = |items: &[Json], is_paired: &dyn Fn(usize) -> bool, what: &str| -> Vec<String> {
        let alone = items.iter().enumerate().filter(|(index, _)| !is_paired(*index));
        alone.map(|(_, item)| format!("{} {what}", kind(item))).collect()
    };
    let mut all = of(
        saved,
        &|index| pairs.iter().any(|(saved, _)| *saved == index),
        "is not in the task list any more",
    );
    all.extend(of(own, &|index| pairs.iter().any(|(_, own)| *own == index), "is new in the task list"));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Repeat, SaveCheckpoint, Task, TaskItem};

    #[test]
    fn items_of_one_kind_are_paired_in_order_and_others_are_named() {
        let saved = [
            SaveCheckpoint::new().state(),
            Task::train("train").epochs(3).state(),
            Task::eval("val").state(),
            SaveCheckpoint::new().state(),
        ];
        let own = [
            Task::train("train").epochs(5).state(),
            Task::eval("test").state(),
            Repeat::once().state(),
            SaveCheckpoint::new().state(),
        ];
        let pairs = align(&saved, &own);
        assert_eq!(pairs, [(1, 0), (3, 3)]);
        let expected = [
            "a closure, save or load is not in the task list any more",
            "the evaluation of `val` is not in the task list any more",
            "the evaluation of `test` is new in the task list",
            "a repetition is new in the task list",
        ];
        assert_eq!(unpaired(&saved, &own, &pairs), expected);
    }

    #[test]
    fn items_that_are_skipped_or_of_no_length_are_finished() {
        for item in [
            &Task::train("x").epochs(4) as &dyn TaskItem,
            &Task::eval("x").steps(4),
            &Repeat::new(3),
            &SaveCheckpoint::new(),
        ] {
            assert!(!is_finished(&item.state()), "{}", item.state());
            item.skip();
            assert!(item.is_finished() && is_finished(&item.state()), "{}", item.state());
        }
        assert!(is_finished(&Task::train("x").epochs(0).state()) && is_finished(&Repeat::new(0).state()));
    }
}
