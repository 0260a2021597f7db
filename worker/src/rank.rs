//! The rank as the rest of the runtime sees it.

use std::env;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use ice_c10d::{ProcessGroup, ReduceOp, Store};
use ice_proto::backend::RankDevice;
use ice_proto::env::{RankEnv, TORCHELASTIC_ERROR_FILE};
use ice_proto::error_file::{self, ErrorRecord};
use ice_proto::link::{Progress, Up};
use tch::{Device, Tensor};

use crate::{Error, Link, device, group};

/// One process of a job, bound to its device and a member of the process group; or a process on its own.
pub struct Worker {
    env: RankEnv,
    device: Device,
    group: Option<ProcessGroup>,
    store: Option<Store>,
    link: Link,
}

impl Worker {
    /// Whether this process was started as a rank.
    pub fn is_rank() -> bool {
        env::var_os(ice_proto::env::RANK).is_some()
    }

    /// Joins the job that the environment describes. Blocks until all ranks of the round have joined.
    ///
    /// # Errors
    /// [`Error`] says what is missing: a variable, the device, the store, or the other ranks.
    pub fn join() -> Result<Self, Error> {
        ice_c10d::memory::keep_freed_memory();
        let lookup = |name: &str| env::var(name).ok();
        let Some(env) = RankEnv::read(lookup)? else {
            return Err(ice_proto::env::EnvError::Missing { name: ice_proto::env::RANK }.into());
        };
        let link = match env.link_fd {
            Some(fd) => Link::open(fd, env.rank).map_err(|source| Error::Link { fd, source })?,
            None => Link::default(),
        };
        let device = device::bind(env.device.unwrap_or(RankDevice::Cpu))?;
        let (group, store) = group::join(&env, device)?;
        if let Some(fd) = env.link_fd {
            link.join_round(&store, env.group_rank, env.world_size as usize)
                .map_err(|source| Error::Link { fd, source })?;
        }
        Ok(Self { env, device, group: Some(group), store: Some(store), link })
    }

    /// A process on its own: rank 0 of 1, without a group and without an agent. For eager use and tests.
    pub fn alone(device: Device) -> Self {
        let env = RankEnv {
            local_rank: 0,
            rank: 0,
            group_rank: 0,
            local_world_size: 1,
            world_size: 1,
            group_world_size: 1,
            role: "default".into(),
            master_addr: String::new(),
            master_port: 0,
            restart_count: 0,
            run_id: "none".into(),
            device: None,
            backend: None,
            link_fd: None,
            round: 0,
            run_stamp: None,
        };
        Self { env, device, group: None, store: None, link: Link::default() }
    }

    /// A rank of a group that the program made itself, without an agent. The ranks agree on checkpoints over the store.
    pub fn of_group(group: ProcessGroup, store: Store, device: Device) -> Self {
        let mut worker = Self::alone(device);
        (worker.env.rank, worker.env.world_size) = (group.rank() as u32, group.world_size() as u32);
        (worker.group, worker.store) = (Some(group), Some(store));
        worker
    }

    /// Rank within the job.
    pub fn rank(&self) -> usize {
        self.env.rank as usize
    }

    /// Rank within the node.
    pub fn local_rank(&self) -> usize {
        self.env.local_rank as usize
    }

    /// Ranks in the job.
    pub fn world_size(&self) -> usize {
        self.env.world_size as usize
    }

    /// Restarts of the worker group so far.
    pub fn restart_count(&self) -> usize {
        self.env.restart_count as usize
    }

    /// Identifier of the job.
    pub fn run_id(&self) -> &str {
        &self.env.run_id
    }

    /// What tells two runs of one job apart, the same on all ranks and in all rounds; `None` where the launcher has none.
    pub fn run_stamp(&self) -> Option<&str> {
        self.env.run_stamp.as_deref()
    }

    /// Whether this is rank 0, which prints and writes for all.
    pub fn is_main(&self) -> bool {
        self.env.rank == 0
    }

    /// The device that the rank is bound to.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The process group; `None` for a process on its own.
    pub fn group(&self) -> Option<&ProcessGroup> {
        self.group.as_ref()
    }

    /// The store of the round, which all its ranks share; `None` for a process on its own.
    pub fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    /// Number of the round that the rank was started in.
    pub fn round(&self) -> u64 {
        self.env.round
    }

    /// The connection to the agent.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Sums the tensor over all ranks, in place.
    ///
    /// # Errors
    /// [`Error::Collective`] when a rank is lost or the shapes differ.
    pub fn all_reduce_sum(&self, tensor: &Tensor) -> Result<(), Error> {
        let Some(group) = &self.group else { return Ok(()) };
        self.link.tick();
        group
            .all_reduce(tensor, ReduceOp::Sum)
            .and_then(ice_c10d::Work::wait)
            .map_err(collective("all-reduce"))
    }

    /// Overwrites the tensor on every rank with rank 0's.
    ///
    /// # Errors
    /// [`Error::Collective`] when a rank is lost or the shapes differ.
    pub fn broadcast(&self, tensor: &Tensor) -> Result<(), Error> {
        let Some(group) = &self.group else { return Ok(()) };
        self.link.tick();
        group.broadcast(tensor, 0).and_then(ice_c10d::Work::wait).map_err(collective("broadcast"))
    }

    /// Copies the tensor of each rank `i` into row `i` of `all`. Those of all ranks have the same shape and dtype.
    ///
    /// # Errors
    /// [`Error::Collective`] when a rank is lost, or the shapes differ, or `all` has not one row per rank.
    pub fn all_gather(&self, all: &[Tensor], own: &Tensor) -> Result<(), Error> {
        let Some(group) = &self.group else { return Ok(()) };
        self.link.tick();
        group.all_gather(all, own).and_then(ice_c10d::Work::wait).map_err(collective("all-gather"))
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    /// [`Error::Collective`] when a rank is lost.
    pub fn barrier(&self) -> Result<(), Error> {
        let Some(group) = &self.group else { return Ok(()) };
        self.link.tick();
        group.barrier().and_then(ice_c10d::Work::wait).map_err(collective("barrier"))
    }

    /// Reports progress to the agent.
    pub fn progress(&self, progress: Progress) {
        self.link.send(&Up::Progress(progress));
    }

    /// Leaves the job: waits for the other ranks, so that none sees a broken connection, and says so to the agent. A rank
    /// that was told to stop waits for nobody, since the others may have come further.
    ///
    /// # Errors
    /// [`Error::Collective`] when a rank is lost.
    pub fn leave(&self) -> Result<(), Error> {
        if self.link.stop().is_none() {
            self.barrier()?;
        }
        self.link.finish();
        Ok(())
    }

    /// Leaves word of a failure with the agent and in the error file. `message` is one line, `detail` may be many.
    pub fn report_failure(message: &str, detail: &str) {
        Link::current().send(&Up::Error { message: message.into() });
        let Some(path) = env::var_os(TORCHELASTIC_ERROR_FILE).map(PathBuf::from) else { return };
        let timestamp =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        let record = ErrorRecord { message: message.into(), callstack: detail.into(), timestamp };
        if let Err(error) = error_file::write(&path, &record) {
            tracing::warn!(%error, path = %path.display(), "cannot write the error file");
        }
    }
}

fn collective(doing: &str) -> impl Fn(ice_c10d::Error) -> Error {
    let doing = format!("{doing} failed");
    move |source| Error::Collective { doing: doing.clone(), source }
}
