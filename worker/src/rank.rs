//! The rank as seen by the rest of the runtime.

use std::cell::{Cell, RefCell};
use std::env;
use std::time::{Duration, SystemTime};

use ice_c10d::{ProcessGroup, ReduceOp, Store, Work};
use ice_proto::backend::RankDevice;
use ice_proto::env::{ICE_SPARE, OMP_NUM_THREADS, RANK, RankEnv};
use ice_proto::error_file::{self, ErrorRecord};
use ice_proto::link::{BoundaryRequest, FromRank, TrainingProgress};
use tch::{Device, Tensor};

use crate::round::Membership;
use crate::store::LinkStore;
use crate::{Error, Link, device, group};

/// A process of a job, bound to its device and a member of the process group of a round, or a
/// process without a launcher.
pub struct Worker {
    device: Cell<Device>,
    round: RefCell<Membership>,
    /// Properties of the process, independent of the round.
    job: Job,
    /// Whether the process has not yet joined the round that it was started for.
    is_fresh: Cell<bool>,
    /// Whether it will bind a GPU that is not assigned yet.
    is_unbound: Cell<bool>,
    link: Link,
}

/// A running collective or transfer.
#[must_use]
pub struct PendingCollective {
    doing: &'static str,
    work: Option<Work>,
    link: Link,
}

impl PendingCollective {
    /// Waits until it is complete. On a GPU this orders later operations after it;
    /// [`Worker::confirm`] checks whether its result may be used.
    ///
    /// # Errors
    /// [`Error::Collective`] if a rank is lost or the shapes differ.
    pub fn wait(self) -> Result<(), Error> {
        let _waiting = self.link.waiting();
        self.work.map_or(Ok(()), Work::wait).map_err(collective(self.doing))
    }
}

/// Properties that do not change.
struct Job {
    run_id: String,
    run_stamp: Option<String>,
}

impl Worker {
    /// Returns whether a launcher started this process, as a rank or as a spare.
    pub fn is_rank() -> bool {
        env::var_os(RANK).is_some() || env::var_os(ICE_SPARE).is_some()
    }

    /// Joins the job that the environment describes. Blocks until all ranks of the round have
    /// joined.
    ///
    /// # Errors
    /// [`Error`] names the missing part: a variable, the device, the store, or other ranks.
    pub fn join() -> Result<Self, Error> {
        let worker = Self::open(false)?;
        let env = worker.round.borrow().env.clone();
        let member = Membership::form(env, worker.device(), &worker.link)?;
        worker.round.replace(member);
        worker.is_fresh.set(false);
        Ok(worker)
    }

    /// Becomes a process of the job that the environment describes: binds the device and opens the
    /// link, without joining a round.
    ///
    /// # Errors
    /// [`Error`] names the missing part: a variable, or the device.
    pub fn start() -> Result<Self, Error> {
        Self::open(true)
    }

    fn open(stays: bool) -> Result<Self, Error> {
        ice_c10d::memory::keep_freed_memory();
        set_threads(env::var(OMP_NUM_THREADS).ok().as_deref());
        let lookup = |name: &str| env::var(name).ok();
        let spare = env::var_os(ICE_SPARE).is_some();
        let env = match RankEnv::read(lookup)? {
            _ if spare => RankEnv::read_spare(lookup)?,
            Some(env) => env,
            None => return Err(ice_proto::env::EnvError::Missing { name: RANK }.into()),
        };
        // Only an agent can announce a next round.
        if stays && env.link_fd.is_some() && env.device.is_some_and(|device| device != RankDevice::Cpu) {
            ice_c10d::nccl::keep_process_after_errors();
        }
        if env.link_fd.is_some() && Link::current().is_open() {
            return Err(Error::JoinedBefore);
        }
        let (rank, round) = ((!spare).then_some(env.rank), (!spare).then_some(env.round));
        let link = match env.link_fd {
            Some(fd) => Link::open(fd, rank, round).map_err(|source| Error::Link { source })?,
            None => Link::default(),
        };
        link.take_signals().map_err(|source| Error::Link { source })?;
        let wanted = env.device.unwrap_or(RankDevice::Cpu);
        let is_unbound = spare && wanted != RankDevice::Cpu;
        let device = match is_unbound {
            // Loading takes most of the time.
            true => device::load().map(|()| Device::Cpu)?,
            false => device::bind(wanted)?,
        };
        Ok(Self {
            device: Cell::new(device),
            job: Job { run_id: env.run_id.clone(), run_stamp: env.run_stamp.clone() },
            round: RefCell::new(Membership { env, group: None, store: None }),
            is_fresh: Cell::new(!spare),
            is_unbound: Cell::new(is_unbound),
            link,
        })
    }

    /// Creates a worker without a group and without an agent: rank 0 of 1. For eager use and tests.
    pub fn alone(device: Device) -> Self {
        let env = RankEnv::standalone();
        Self {
            device: Cell::new(device),
            job: Job { run_id: env.run_id.clone(), run_stamp: None },
            round: RefCell::new(Membership { env, group: None, store: None }),
            is_fresh: Cell::new(false),
            is_unbound: Cell::new(false),
            link: Link::default(),
        }
    }

    /// Creates a worker for a group that the program made itself, without an agent. The ranks agree
    /// on checkpoints through the store.
    pub fn of_group(group: ProcessGroup, store: Store, device: Device) -> Self {
        let mut worker = Self::alone(device);
        let member = worker.round.get_mut();
        (member.env.rank, member.env.world_size) = (group.rank() as u32, group.world_size() as u32);
        if let Err(error) =
            worker.link.join_group(&LinkStore(store.clone()), group.rank() as u32, group.world_size())
        {
            tracing::warn!(%error, "this rank takes no part in the agreements of the group");
        }
        (member.group, member.store) = (Some(group), Some(store));
        worker
    }

    /// Tells the agent that this process keeps its state when its round ends, and takes part in the
    /// next one: by [`Worker::enter_round`] after [`Worker::leave_round`].
    pub fn stay(&self) {
        self.link.send(&FromRank::Stays);
    }

    /// Returns whether the process can take part in another round.
    pub fn can_stay(&self) -> bool {
        self.link.is_open()
    }

    /// Joins a round: the one that the process was started for, or the next one. Blocks until all
    /// ranks of the round have joined. Without a launcher this does nothing. Returns `false` if no
    /// further round will start, so that the process should exit.
    ///
    /// # Errors
    /// [`Error`] if the group cannot be formed for another reason than lost ranks.
    pub fn enter_round(&self) -> Result<bool, Error> {
        let env = self.round.borrow().env.clone();
        let is_fresh = self.is_fresh.replace(false);
        if self.round.borrow().group.is_some() || (!is_fresh && !self.can_stay()) {
            return Ok(true);
        }
        let formed = is_fresh.then(|| Membership::form(env, self.device(), &self.link)).transpose();
        let next = || Membership::next(|env| self.bind(env), &self.link);
        let member = match formed {
            Ok(Some(member)) => Some(member),
            Ok(None) => next()?,
            Err(error @ (Error::Collective { .. } | Error::RoundOver)) if self.can_stay() => {
                self.link.report_lost_round(&error.to_string());
                next()?
            }
            Err(error) => return Err(error),
        };
        let is_there = member.is_some();
        self.round.replace_with(|old| {
            member.unwrap_or(Membership { env: old.env.clone(), group: None, store: None })
        });
        Ok(is_there)
    }

    /// Returns the device of the rank. A spare binds it with its first round.
    fn bind(&self, env: &RankEnv) -> Result<Device, Error> {
        if self.is_unbound.replace(false) {
            self.device.set(device::bind(env.device.unwrap_or(RankDevice::Cpu))?);
        }
        Ok(self.device())
    }

    /// Leaves the round after a failed collective, or because the round is over. The caller must
    /// have dropped all other handles of the group. Waits until the agents know that the round is
    /// over.
    pub fn leave_round(&self, why: &str) {
        self.link.report_lost_round(why);
        self.drop_group();
    }

    /// Leaves the round like [`Worker::leave_round`], for a round that other ranks end: waits until
    /// the agent announces the end.
    pub fn await_end_of_round(&self) {
        self.link.wait_for_round_end();
        self.drop_group();
    }

    fn drop_group(&self) {
        let mut member = self.round.borrow_mut();
        (member.group, member.store) = (None, None);
    }

    /// Returns whether this process is a spare that will bind a GPU once it becomes a rank.
    pub fn is_unbound(&self) -> bool {
        self.is_unbound.get()
    }

    /// Returns the rank within the job.
    pub fn rank(&self) -> usize {
        self.round.borrow().env.rank as usize
    }

    /// Returns the rank within the node.
    pub fn local_rank(&self) -> usize {
        self.round.borrow().env.local_rank as usize
    }

    /// Returns the number of ranks in the job.
    pub fn world_size(&self) -> usize {
        self.round.borrow().env.world_size as usize
    }

    /// Returns the number of restarts of the worker group so far.
    pub fn restart_count(&self) -> usize {
        self.round.borrow().env.restart_count as usize
    }

    /// Returns the identifier of the job.
    pub fn run_id(&self) -> &str {
        &self.job.run_id
    }

    /// Returns the run stamp, equal on all ranks and in all rounds, which distinguishes two runs of
    /// one job; `None` if the launcher sets none.
    pub fn run_stamp(&self) -> Option<&str> {
        self.job.run_stamp.as_deref()
    }

    /// Returns whether this is rank 0, which prints and writes for all ranks.
    pub fn is_main(&self) -> bool {
        self.rank() == 0
    }

    /// Returns the device that the rank is bound to.
    pub fn device(&self) -> Device {
        self.device.get()
    }

    /// Returns the process group of the round; `None` without a launcher, or between rounds.
    pub fn group(&self) -> Option<ProcessGroup> {
        self.round.borrow().group.clone()
    }

    /// Returns the store of the round, shared by all its ranks; `None` without a launcher, or
    /// between rounds.
    pub fn store(&self) -> Option<Store> {
        self.round.borrow().store.clone()
    }

    /// Returns the node rank of this rank's node, from 0.
    pub fn node(&self) -> u32 {
        self.round.borrow().env.group_rank
    }

    /// Returns the source address of connections to the store.
    pub(crate) fn local_address(&self) -> Option<String> {
        let member = self.round.borrow();
        group::local_address(&member.env.master_addr, member.env.master_port)
    }

    /// Returns the number of the round.
    pub fn round(&self) -> u64 {
        self.round.borrow().env.round
    }

    /// Returns the link to the agent.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Sums the tensor over all ranks in place: exactly the elements that it views, whatever its
    /// strides. The sum of bools is their logical or.
    ///
    /// # Errors
    /// [`Error::Collective`] if a rank is lost or the shapes differ. Also, before any byte is sent,
    /// for a tensor that cannot be summed: of a type that no backend adds (Int16, complex numbers),
    /// sparse, or expanded.
    pub fn all_reduce_sum(&self, tensor: &Tensor) -> Result<(), Error> {
        self.exchange("all-reduce", |group| group.all_reduce(tensor, ReduceOp::Sum))
    }

    /// Overwrites the tensor on every rank with that of rank 0, for any type and strides.
    ///
    /// # Errors
    /// [`Error::Collective`] if a rank is lost or the shapes differ. Also, before any byte is sent,
    /// for a sparse or expanded tensor.
    pub fn broadcast(&self, tensor: &Tensor) -> Result<(), Error> {
        self.broadcast_from(0, tensor)
    }

    /// Overwrites the tensor on every rank with that of rank `source`.
    ///
    /// # Errors
    /// [`Error::Collective`] if a rank is lost or the shapes differ.
    pub fn broadcast_from(&self, source: usize, tensor: &Tensor) -> Result<(), Error> {
        self.exchange("broadcast", |group| group.broadcast(tensor, source))
    }

    /// Starts a [`Worker::broadcast_from`]. The tensor must not be used until it is complete. All
    /// ranks start theirs in the same order; several at once take less time than one after the
    /// other.
    ///
    /// # Errors
    /// [`Error::Collective`] if it cannot be started.
    pub fn begin_broadcast(&self, source: usize, tensor: &Tensor) -> Result<PendingCollective, Error> {
        self.begin("broadcast", |group| group.broadcast(tensor, source))
    }

    /// Starts to send the tensor to another rank, which [receives](Worker::begin_receive) it. The
    /// tensor must not be used until it is sent. Transfers between two ranks arrive in the order in
    /// which they were started.
    ///
    /// # Errors
    /// [`Error::Collective`] if it cannot be started.
    pub fn begin_send(&self, to: usize, tensor: &Tensor) -> Result<PendingCollective, Error> {
        self.begin("sending", |group| group.send(tensor, to))
    }

    /// Starts to overwrite the tensor with one of the same number of bytes that rank `from` sends.
    ///
    /// # Errors
    /// [`Error::Collective`] if it cannot be started.
    pub fn begin_receive(&self, from: usize, tensor: &Tensor) -> Result<PendingCollective, Error> {
        self.begin("receiving", |group| group.receive(tensor, from))
    }

    fn exchange(
        &self,
        doing: &'static str,
        call: impl FnOnce(&ProcessGroup) -> ice_c10d::Result<Work>,
    ) -> Result<(), Error> {
        self.begin(doing, call)?.wait()?;
        self.confirm()
    }

    fn begin(
        &self,
        doing: &'static str,
        call: impl FnOnce(&ProcessGroup) -> ice_c10d::Result<Work>,
    ) -> Result<PendingCollective, Error> {
        let link = self.link.clone();
        let Some(group) = self.group() else { return Ok(PendingCollective { doing, work: None, link }) };
        self.link.collective();
        let work = call(&group).map_err(collective(doing))?;
        Ok(PendingCollective { doing, work: Some(work), link })
    }

    /// Copies the tensor of each rank `i` into row `i` of `all`. The tensors of all ranks have the
    /// same shape and dtype.
    ///
    /// # Errors
    /// [`Error::Collective`] if a rank is lost, the shapes differ, or `all` does not have one row
    /// per rank.
    pub fn all_gather(&self, all: &[Tensor], own: &Tensor) -> Result<(), Error> {
        self.exchange("all-gather", |group| group.all_gather(all, own))
    }

    /// Confirms the results of the collectives so far. On a GPU, a collective that was aborted
    /// because a rank is lost completes like any other and leaves plausible garbage in its output.
    /// Results of a [`PendingCollective`] may be used only after this; the other methods call it
    /// themselves.
    ///
    /// # Errors
    /// [`Error::RoundOver`] if the round ended, so that results may be garbage.
    pub fn confirm(&self) -> Result<(), Error> {
        let Device::Cuda(index) = self.device() else { return Ok(()) };
        if !self.can_stay() || self.world_size() == 1 {
            return Ok(());
        }
        let waiting = self.link.waiting();
        tch::Cuda::synchronize(index as i64);
        drop(waiting);
        if self.link.is_broken() { Err(Error::RoundOver) } else { Ok(()) }
    }

    /// Asks all ranks to leave the task with this number, or with `all` to end the run, at the same
    /// step boundary. Ranks that synchronize in every step reach it at most one step later. Does
    /// nothing without other ranks. [`Link::boundary`] returns the request once the boundary is
    /// reached.
    ///
    /// # Errors
    /// [`Error::Collective`] if the store of the round is gone.
    pub fn ask_to_leave(&self, all: bool, task: u64) -> Result<(), Error> {
        let Some(store) = self.store() else { return Ok(()) };
        ice_link::publish(&LinkStore(store), BoundaryRequest::Leave { all, task })
            .map_err(collective("the request to leave"))
    }

    /// Leaves the current step before its end, and waits until it is known whether all ranks do so.
    /// Returns a rank that does not; that rank waits for this one in a collective.
    ///
    /// # Errors
    /// [`Error::Collective`] or [`Error::RoundOver`] if another rank or the store is gone.
    pub fn leave_step(&self) -> Result<Option<u64>, Error> {
        let Some(store) = self.store().filter(|_| self.world_size() > 1) else { return Ok(None) };
        let request = self.link.leave_step();
        ice_link::publish(&LinkStore(store), request).map_err(collective("the request to leave"))?;
        let _waiting = self.link.waiting();
        Ok(self.link.await_left_step()?)
    }

    /// Waits until every rank has called this.
    ///
    /// # Errors
    /// [`Error::Collective`] if a rank is lost.
    pub fn barrier(&self) -> Result<(), Error> {
        self.exchange("barrier", ProcessGroup::barrier)
    }

    /// Tells the agent that the first training step of the round is applied, and how many steps are
    /// repeated because an earlier round ended within them.
    pub fn first_step(&self, step: u64, repeated: u64) {
        self.link.send(&FromRank::FirstStep { round: self.round(), step, repeated });
    }

    /// Reports progress to the agent.
    pub fn progress(&self, progress: TrainingProgress) {
        self.link.send(&FromRank::Progress(progress));
    }

    /// Leaves the job, and tells the agent. Unless this rank was asked to stop, the ranks should
    /// [wait for each other](Worker::barrier) first, so that no rank sees a broken connection.
    pub fn leave(&self) {
        self.link.finish();
        self.drop_group();
    }

    /// Reports a failure to the agent and in the error file. `message` is one line, `detail` may
    /// have several.
    pub fn report_failure(message: &str, detail: &str) {
        let link = Link::current();
        link.send(&FromRank::Error { message: message.into() });
        let Some(path) = link.error_file() else { return };
        let timestamp =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        let record = ErrorRecord { message: message.into(), callstack: detail.into(), timestamp };
        if let Err(error) = error_file::write(&path, &record) {
            tracing::warn!(%error, path = %path.display(), "cannot write the error file");
        }
    }
}

/// Sets libtorch's number of threads to `OMP_NUM_THREADS`. By default libtorch uses MKL's number,
/// which is `MKL_NUM_THREADS` but at most the machine's cores; so sums would depend on the machine.
fn set_threads(omp_num_threads: Option<&str>) {
    // OpenMP accepts a list with a number for each level of nested teams. libtorch has one level.
    let outermost = omp_num_threads.and_then(|list| list.split(',').next());
    if let Some(threads) =
        outermost.and_then(|number| number.trim().parse().ok()).filter(|number| *number > 0)
    {
        tch::set_num_threads(threads);
    }
}

fn collective(doing: &str) -> impl Fn(ice_c10d::Error) -> Error {
    let doing = format!("{doing} failed");
    move |source| Error::Collective { doing: doing.clone(), source }
}
