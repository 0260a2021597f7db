use super::Items;
use crate::Result;
use crate::data::SampleRng;

/// Samples created by [`Items::map`].
pub struct Map<I, F> {
    items: I,
    f: F,
}

impl<I, F> Map<I, F> {
    pub(super) fn new(items: I, f: F) -> Self {
        Self { items, f }
    }
}

impl<I: Items, T: Send + 'static, F: Fn(I::Item) -> Result<T> + Send + Sync> Items for Map<I, F> {
    type Item = T;

    fn len(&self) -> usize {
        self.items.len()
    }

    fn get(&self, index: usize, rng: &mut SampleRng) -> Result<T> {
        (self.f)(self.items.get(index, rng)?)
    }

    fn fingerprint(&self) -> u64 {
        self.items.fingerprint()
    }
}

/// Samples created by [`Items::map_random`].
pub struct MapRandom<I, F> {
    items: I,
    f: F,
}

impl<I, F> MapRandom<I, F> {
    pub(super) fn new(items: I, f: F) -> Self {
        Self { items, f }
    }
}

impl<I, T, F> Items for MapRandom<I, F>
where
    I: Items,
    T: Send + 'static,
    F: Fn(I::Item, &mut SampleRng) -> Result<T> + Send + Sync,
{
    type Item = T;

    fn len(&self) -> usize {
        self.items.len()
    }

    fn get(&self, index: usize, rng: &mut SampleRng) -> Result<T> {
        let item = self.items.get(index, rng)?;
        (self.f)(item, rng)
    }

    fn fingerprint(&self) -> u64 {
        self.items.fingerprint()
    }
}
