use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A copy of one rank's part of a state.
#[derive(Debug, PartialEq, Eq)]
pub struct Parcel {
    /// Number of the copy, the same for all ranks that copy their parts of one state.
    pub number: u64,
    /// Rank of the owner, when it was made.
    pub owner: usize,
    /// Ranks among which the state was divided.
    pub of: usize,
    /// Training steps that the state has behind it.
    pub step: u64,
    /// Runs of bytes, each with a name.
    pub parts: Vec<(String, Vec<u8>)>,
}

impl Parcel {
    /// The part of this name.
    pub fn part(&self, name: &str) -> Option<&[u8]> {
        self.parts.iter().find(|(own, _)| own == name).map(|(_, bytes)| bytes.as_slice())
    }
}

/// The copies in this process's memory. A clone is the same shelf.
#[derive(Debug, Clone, Default)]
pub struct Shelf(Arc<Mutex<Vec<Arc<Parcel>>>>);

impl Shelf {
    /// Takes in a copy, in place of one of its number and owner.
    pub fn put(&self, parcel: Arc<Parcel>) {
        let mut parcels = self.lock();
        parcels.retain(|other| (other.number, other.owner) != (parcel.number, parcel.owner));
        parcels.push(parcel);
    }

    /// All that is there.
    pub fn parcels(&self) -> Vec<Arc<Parcel>> {
        self.lock().clone()
    }

    /// Gives up the copies of an owner, but for that of this number. Those that nobody else uses come back, for their memory.
    pub fn give_up(&self, owner: usize, but: Option<u64>) -> Vec<Parcel> {
        let stays = |parcel: &Arc<Parcel>| parcel.owner != owner || Some(parcel.number) == but;
        self.remove(stays)
    }

    /// Gives up all copies but those of this number.
    pub fn keep(&self, number: Option<u64>) {
        self.remove(|parcel| Some(parcel.number) == number);
    }

    fn remove(&self, stays: impl Fn(&Arc<Parcel>) -> bool) -> Vec<Parcel> {
        let mut parcels = self.lock();
        let (stay, go) = std::mem::take(&mut *parcels).into_iter().partition(stays);
        *parcels = stay;
        drop(parcels);
        let go: Vec<Arc<Parcel>> = go;
        go.into_iter().filter_map(Arc::into_inner).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Parcel>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
