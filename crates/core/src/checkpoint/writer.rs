//! Saving without blocking the run: the state is copied at once, and a thread writes the copy.
//!
//! [`Writer::save`] copies the state into buffers and hands them over to the thread. At most one
//! thread exists at a time: [`Writer::finish`] joins it and takes back buffers and outcome. An
//! error of a write therefore surfaces in the next call of `save` or `finish`.
//!
//! Ranks that write together agree over the store, since the process group is busy with training:
//! each rank posts what it has written, rank 0 commits the checkpoint and posts the outcome. If the
//! round ends meanwhile, every rank abandons its files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use ice_checkpoint::{FileInfo, MODEL_INDEX, Manifest, Staging, forget_contents, keep_best, keep_last};
use ice_worker::{Link, Worker};

use super::exchange::{Exchange, IsOver, wait};
use super::snapshot::{Buffers, Snapshot, WriterShare};
use super::{Selection, UnclaimedState};
use crate::{CheckpointOptions, Error, HyperGraph, Result};

/// Writes checkpoints in a thread, one at a time.
pub(crate) struct Writer {
    link: Link,
    rank: usize,
    world_size: usize,
    split: bool,
    upload_to: Option<String>,
    /// Distinguishes the attempts of this round from others. The same on all ranks.
    attempt: String,
    /// Number of saves in this round that several ranks took part in. The same on all ranks.
    shared_saves: u64,
    exchange: Option<Arc<dyn Exchange>>,
    is_over: Arc<IsOver>,
    memory: Memory,
    under_way: Option<JoinHandle<(Buffers, Result<()>)>>,
    last_saved_ms: u64,
    protected: Option<PathBuf>,
    /// Files that the previous save has written.
    before: Vec<PathBuf>,
}

enum Memory {
    There(Buffers),
    Coming(JoinHandle<Buffers>),
}

/// A checkpoint to save.
pub(crate) struct Request {
    pub(crate) folder: PathBuf,
    pub(crate) manifest: Manifest,
    pub(crate) keep: Keep,
}

/// The checkpoints to keep once a new one is complete.
#[derive(Debug, Clone)]
pub(crate) enum Keep {
    All,
    Last(usize),
    Best { measure: String, keep: usize },
}

/// The work of the thread.
struct Job {
    request: Request,
    snapshot: Snapshot,
    share: WriterShare,
    attempt: String,
    exchange: Option<Arc<dyn Exchange>>,
    is_over: Arc<IsOver>,
    link: Link,
    protected: Option<PathBuf>,
    upload_to: Option<String>,
}

impl Writer {
    pub(crate) fn new(worker: &Worker, options: &CheckpointOptions) -> Self {
        let link = worker.link().clone();
        Self {
            is_over: Arc::new({
                let link = link.clone();
                move || link.is_broken()
            }),
            link,
            rank: worker.rank(),
            world_size: worker.world_size(),
            split: options.split,
            upload_to: options.upload_to.clone(),
            attempt: attempt_of(worker),
            shared_saves: 0,
            exchange: None,
            memory: Memory::There(Buffers::default()),
            under_way: None,
            last_saved_ms: 0,
            protected: None,
            before: Vec::new(),
        }
    }

    /// Creates the writer of one of several ranks, which exchange messages in memory.
    #[cfg(test)]
    pub(super) fn of_several(
        rank: usize,
        world_size: usize,
        split: bool,
        exchange: Arc<dyn Exchange>,
        is_over: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Self {
        let alone = Self::new(&Worker::alone(tch::Device::Cpu), &CheckpointOptions::default());
        Self {
            rank,
            world_size,
            split,
            attempt: "test".into(),
            exchange: Some(exchange),
            is_over: Arc::new(is_over),
            ..alone
        }
    }

    /// Provides the memory for saves while the run starts, unless the writer already has some.
    pub(crate) fn prepare(&mut self, graph: &HyperGraph) {
        if !matches!(&self.memory, Memory::There(buffers) if buffers.is_empty()) {
            return;
        }
        let share = self.share(graph, &Selection::All);
        if share.rank >= share.writers {
            return;
        }
        // If the state cannot be saved, the error is reported by the save itself.
        let Ok(lengths) = Snapshot::lengths(graph, share) else { return };
        if let Ok(thread) = Buffers::prepare(lengths) {
            self.memory = Memory::Coming(thread);
        }
    }

    /// Adapts to the ranks of a new round. A checkpoint that several ranks were writing together
    /// cannot be completed.
    pub(crate) fn enter_round(&mut self, worker: &Worker) {
        if let Err(error) = self.finish() {
            tracing::warn!("the checkpoint that was being written when the round ended is lost: {error}");
        }
        (self.rank, self.world_size) = (worker.rank(), worker.world_size());
        (self.attempt, self.shared_saves, self.exchange) = (attempt_of(worker), 0, None);
    }

    /// Notes the checkpoint that the run resumed from: it is protected from removal.
    pub(crate) fn resumed(&mut self, from: &Path, manifest: &Manifest) {
        self.protected = Some(from.to_owned());
        self.last_saved_ms = self.last_saved_ms.max(manifest.saved_unix_ms);
    }

    /// Waits for the previous save, copies the state, and starts to write. Every rank calls it.
    pub(crate) fn save(
        &mut self,
        mut request: Request,
        graph: &HyperGraph,
        selection: &Selection,
        kept: &UnclaimedState,
        store: Option<&ice_c10d::Store>,
    ) -> Result<()> {
        self.finish()?;
        let share = self.share(graph, selection);
        if share.rank >= share.writers {
            return Ok(());
        }
        if share.writers > 1 {
            self.shared_saves += 1;
            if let (None, Some(store)) = (&self.exchange, store) {
                self.exchange = Some(Arc::new(store.reconnect()?));
            }
        }
        // If the clock was set back, an old checkpoint must not look newer than this one.
        self.last_saved_ms = request.manifest.saved_unix_ms.max(self.last_saved_ms + 1);
        request.manifest.saved_unix_ms = self.last_saved_ms;

        let mut buffers = self.take_memory();
        let snapshot = match Snapshot::take(graph, selection, kept, share, &mut buffers) {
            Ok(snapshot) => snapshot,
            Err(problem) => return Err(ice_checkpoint::Error::checkpoint(&request.folder, problem).into()),
        };
        let written = snapshot.files.iter().map(|file| request.folder.join(&file.name)).collect();
        let before = std::mem::replace(&mut self.before, written);
        let job = Job {
            attempt: format!("{}-{}", self.attempt, self.shared_saves),
            exchange: (share.writers > 1).then(|| self.exchange.clone()).flatten(),
            is_over: Arc::clone(&self.is_over),
            link: self.link.clone(),
            protected: self.protected.clone(),
            upload_to: self.upload_to.clone(),
            request,
            snapshot,
            share,
        };
        let hold = self.link.exit_guard();
        let write = move || {
            let _hold = hold;
            let outcome = job.run(&buffers);
            if outcome.is_ok() {
                // Drops the previous checkpoint from the page cache, since the next save needs the
                // memory. The newest checkpoint stays cached, for a restart.
                before.iter().for_each(|file| forget_contents(file));
            }
            (buffers, outcome)
        };
        let thread = thread::Builder::new().name("ice-checkpoint".into()).spawn(write);
        self.under_way = Some(thread.map_err(Error::io(Path::new("checkpoint thread")))?);
        Ok(())
    }

    /// Waits for the save in progress, and returns its outcome.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let Some(thread) = self.under_way.take() else { return Ok(()) };
        match thread.join() {
            Ok((buffers, outcome)) => {
                self.memory = Memory::There(buffers);
                outcome
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    fn share(&self, graph: &HyperGraph, selection: &Selection) -> WriterShare {
        let sharded = || selection.of(graph).any(|entry| entry.node.borrow().is_sharded());
        let several = self.world_size > 1 && (self.split || sharded());
        WriterShare { rank: self.rank, writers: if several { self.world_size } else { 1 }, split: self.split }
    }

    fn take_memory(&mut self) -> Buffers {
        match std::mem::replace(&mut self.memory, Memory::There(Buffers::default())) {
            Memory::There(buffers) => buffers,
            Memory::Coming(thread) => thread.join().unwrap_or_default(),
        }
    }
}

/// Returns a name for the attempts of this round. The same on all ranks.
fn attempt_of(worker: &Worker) -> String {
    if worker.store().is_none() { std::process::id().to_string() } else { format!("round{}", worker.round()) }
}

/// The files that a rank has written, or the reason that it could not.
type Written = std::result::Result<BTreeMap<String, FileInfo>, String>;

impl Job {
    fn run(mut self, buffers: &Buffers) -> Result<()> {
        let folder = self.request.folder.clone();
        let staging = Staging::begin(&folder, &self.attempt);
        let written = staging.as_ref().map_err(ToString::to_string).and_then(|staging| {
            if self.share.rank == 0 {
                staging.remove_others().map_err(|error| error.to_string())?;
            }
            self.write(staging, buffers).map_err(|error| error.to_string())
        });
        let outcome = match (self.exchange.clone(), written) {
            (Some(exchange), written) => self.agree(&*exchange, staging.as_ref().ok(), written),
            (None, Ok(files)) => staging.as_ref().map_or(Ok(()), |staging| self.commit(staging, files)),
            (None, Err(problem)) => Err(Error::Save(problem)),
        };
        if outcome.is_err()
            && let Ok(staging) = staging
        {
            staging.abandon();
        }
        outcome
    }

    fn write(&self, staging: &Staging, buffers: &Buffers) -> Result<BTreeMap<String, FileInfo>> {
        let mut files = BTreeMap::new();
        for (number, file) in self.snapshot.files.iter().enumerate() {
            let info = staging.write(&file.name, &[file.layout.header(), buffers.file(number)])?;
            files.insert(file.name.clone(), info);
        }
        if let Some(index) = &self.snapshot.index {
            files.insert(MODEL_INDEX.into(), staging.write(MODEL_INDEX, &[index])?);
        }
        Ok(files)
    }

    /// Agrees on the outcome: rank 0 receives the results of all ranks, commits, and sends them the
    /// outcome.
    fn agree(&mut self, exchange: &dyn Exchange, staging: Option<&Staging>, written: Written) -> Result<()> {
        let fail = |error: serde_json::Error| Error::Save(error.to_string());
        let key = |what: &dyn std::fmt::Display| format!("checkpoint/{}/{what}", self.attempt);
        let ended = key(&"outcome");
        if self.share.rank > 0 {
            exchange.post(&key(&self.share.rank), &serde_json::to_vec(&written).map_err(fail)?)?;
            let outcome = wait(exchange, &ended, &*self.is_over, &self.request.folder)?;
            let outcome: std::result::Result<(), String> = serde_json::from_slice(&outcome).map_err(fail)?;
            return outcome.map_err(Error::Save);
        }
        let mut all = written;
        for rank in 1..self.share.writers {
            let message = wait(exchange, &key(&rank), &*self.is_over, &self.request.folder)?;
            exchange.forget(&key(&rank));
            let theirs: Written = serde_json::from_slice(&message).map_err(fail)?;
            all = match (all, theirs) {
                (Ok(mut all), Ok(theirs)) => {
                    all.extend(theirs);
                    Ok(all)
                }
                (Err(problem), _) => Err(problem),
                (Ok(_), Err(problem)) => Err(format!("rank {rank}: {problem}")),
            };
        }
        let outcome = match (all, staging) {
            (Ok(files), Some(staging)) => self.commit(staging, files),
            (Err(problem), _) => Err(Error::Save(problem)),
            (Ok(_), None) => Ok(()),
        };
        let told = outcome.as_ref().map_err(ToString::to_string);
        exchange.post(&ended, &serde_json::to_vec(&told).map_err(fail)?)?;
        outcome
    }

    fn commit(&mut self, staging: &Staging, files: BTreeMap<String, FileInfo>) -> Result<()> {
        for (name, info) in &files {
            staging.expect(name, info)?;
        }
        let manifest = &mut self.request.manifest;
        manifest.files = files;
        manifest.nodes = std::mem::take(&mut self.snapshot.nodes);
        let (step, is_whole) = (manifest.counters.train_steps, manifest.tags.is_none());
        staging.clone().commit(manifest)?;
        // The agent names this checkpoint as the one to resume from, so it must contain all nodes.
        if is_whole {
            self.link.checkpoint_saved(&self.request.folder, step);
        }
        self.make_room();
        match &self.upload_to {
            Some(address) => Ok(ice_checkpoint::upload(&self.request.folder, address)?),
            None => Ok(()),
        }
    }

    /// Removes checkpoints that are not to be kept. If an old checkpoint cannot be removed, only
    /// warns.
    fn make_room(&self) {
        let Some(holder) = self.request.folder.parent() else { return };
        let protected = self.protected.as_deref();
        let removed = match &self.request.keep {
            Keep::All => return,
            Keep::Last(keep) => keep_last(holder, *keep, protected),
            Keep::Best { measure, keep } => keep_best(holder, measure, *keep, protected),
        };
        match removed {
            Ok(removed) => removed.iter().for_each(|path| tracing::info!("removed {}", path.display())),
            Err(error) => tracing::warn!("an old checkpoint stays: {error}"),
        }
    }
}
