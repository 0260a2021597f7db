use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A replica of one rank's shards of a state.
#[derive(Debug, PartialEq, Eq)]
pub struct ShardReplica {
    /// Number of the replica, equal for all ranks that replicate one state.
    pub number: u64,
    /// Rank of the owner when the replica was made.
    pub owner: usize,
    /// Number of ranks among which the state was sharded.
    pub of: usize,
    /// Training steps of the state.
    pub step: u64,
    /// Named parts.
    pub parts: Vec<(String, Vec<u8>)>,
}

impl ShardReplica {
    /// Returns the bytes of a part.
    pub fn part(&self, name: &str) -> Option<&[u8]> {
        self.parts.iter().find(|(own, _)| own == name).map(|(_, bytes)| bytes.as_slice())
    }
}

/// The replicas in this process's memory. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct ReplicaStore(Arc<Mutex<Vec<Arc<ShardReplica>>>>);

impl ReplicaStore {
    /// Stores a replica, and replaces one with the same number and owner.
    pub fn put(&self, replica: Arc<ShardReplica>) {
        let mut replicas = self.lock();
        replicas.retain(|other| (other.number, other.owner) != (replica.number, replica.owner));
        replicas.push(replica);
    }

    /// Returns all replicas.
    pub fn all(&self) -> Vec<Arc<ShardReplica>> {
        self.lock().clone()
    }

    /// Removes the replicas of an owner, except that with this number. Returns those without other
    /// users, for reuse of their memory.
    pub fn release(&self, owner: usize, except: Option<u64>) -> Vec<ShardReplica> {
        let keeps = |replica: &Arc<ShardReplica>| replica.owner != owner || Some(replica.number) == except;
        self.remove(keeps)
    }

    /// Removes all replicas except those with this number.
    pub fn keep(&self, number: Option<u64>) {
        self.remove(|replica| Some(replica.number) == number);
    }

    fn remove(&self, keeps: impl Fn(&Arc<ShardReplica>) -> bool) -> Vec<ShardReplica> {
        let mut replicas = self.lock();
        let (stay, go) = std::mem::take(&mut *replicas).into_iter().partition(keeps);
        *replicas = stay;
        drop(replicas);
        let go: Vec<Arc<ShardReplica>> = go;
        go.into_iter().filter_map(Arc::into_inner).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<ShardReplica>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
