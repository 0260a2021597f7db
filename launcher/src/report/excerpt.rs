//! A list in a report that stays small however long a job runs.

use serde::Serialize;

/// The first item of a list and its newest ones, [`Excerpt::MAX`] in all. The first failure of a
/// job is often the cause of later ones.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub(crate) struct Excerpt<T> {
    items: Vec<T>,
    #[serde(skip)]
    left_out: u64,
}

impl<T> Default for Excerpt<T> {
    fn default() -> Self {
        Self { items: Vec::new(), left_out: 0 }
    }
}

impl<T> Excerpt<T> {
    /// Maximum number of items.
    const MAX: usize = 100;

    /// Adds an item, and removes the second one if the list is full. Returns the added item.
    pub(crate) fn push(&mut self, item: T) -> &T {
        if self.items.len() == Self::MAX {
            self.items.remove(1);
            self.left_out += 1;
        }
        self.items.push(item);
        &self.items[self.items.len() - 1]
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Returns the number of items that were removed.
    pub(crate) fn left_out(&self) -> u64 {
        self.left_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_and_newest_items_are_kept_and_the_others_counted() {
        let mut numbers = Excerpt::default();
        assert!(numbers.is_empty());
        for number in 0..250 {
            assert_eq!(*numbers.push(number), number);
        }
        let expected: Vec<_> = [0].into_iter().chain(151..250).collect();
        assert_eq!((numbers.items.as_slice(), numbers.left_out()), (&expected[..], 150));
        assert_eq!(serde_json::to_value(&numbers).unwrap(), serde_json::to_value(&expected).unwrap());
    }
}
