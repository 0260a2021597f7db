//! The rank as the rest of the runtime sees it.

use std::cell::{Cell, RefCell};
use std::env;
use std::time::{Duration, SystemTime};

use ice_c10d::{ProcessGroup, ReduceOp, Store, Work};
use ice_proto::backend::RankDevice;
use ice_proto::env::{ICE_SPARE, OMP_NUM_THREADS, RANK, RankEnv};
use ice_proto::error_file::{self, ErrorRecord};
use ice_proto::link::{Progress, Request, Up};
use tch::{Device, Tensor};

use crate::round::{Membership, settle};
use crate::{Error, Link, agree, device, group};

/// One process of a job, bound to its device and a member of the process group of a round; or a process on its own.
pub struct Worker {
    device: Cell<Device>,
    round: RefCell<Membership>,
    /// Of the process, whichever round it is in.
    job: Job,
    /// Whether the process has yet to join the round that it was started for.
    is_fresh: Cell<bool>,
    /// Whether it is to bind a GPU that it does not know yet.
    is_unbound: Cell<bool>,
    link: Link,
}

/// An exchange with other ranks under way.
#[must_use]
pub struct Begun {
    doing: &'static str,
    work: Option<Work>,
    link: Link,
}

impl Begun {
    /// Waits until it is done; on a GPU, until what is computed from now on comes after it. There [`Worker::confirm`] says whether
    /// what it left may be used.
    ///
    /// # Errors
    /// [`Error::Collective`] when a rank is lost or the shapes differ.
    pub fn wait(self) -> Result<(), Error> {
        let _waiting = self.link.waiting();
        self.work.map_or(Ok(()), Work::wait).map_err(collective(self.doing))
    }
}

/// What does not change.
struct Job {
    run_id: String,
    run_stamp: Option<String>,
}

impl Worker {
    /// Whether this process was started by a launcher: as a rank, or as a spare for one.
    pub fn is_rank() -> bool {
        env::var_os(RANK).is_some() || env::var_os(ICE_SPARE).is_some()
    }

    /// Joins the job that the environment describes. Blocks until all ranks of the round have joined.
    ///
    /// # Errors
    /// [`Error`] says what is missing: a variable, the device, the store, or the other ranks.
    pub fn join() -> Result<Self, Error> {
        let worker = Self::open(false)?;
        let env = worker.round.borrow().env.clone();
        let member = Membership::form(env, worker.device(), &worker.link)?;
        worker.round.replace(member);
        worker.is_fresh.set(false);
        Ok(worker)
    }

    /// Becomes a process of the job that the environment describes: binds its device and opens the link, and is in no round yet.
    ///
    /// # Errors
    /// [`Error`] says what is missing: a variable, or the device.
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
        // Without an agent nobody would tell of the next round.
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
            // What takes the time is there then.
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

    /// A process on its own: rank 0 of 1, without a group and without an agent. For eager use and tests.
    pub fn alone(device: Device) -> Self {
        let env = RankEnv::alone();
        Self {
            device: Cell::new(device),
            job: Job { run_id: env.run_id.clone(), run_stamp: None },
            round: RefCell::new(Membership { env, group: None, store: None }),
            is_fresh: Cell::new(false),
            is_unbound: Cell::new(false),
            link: Link::default(),
        }
    }

    /// A rank of a group that the program made itself, without an agent. The ranks agree on checkpoints over the store.
    pub fn of_group(group: ProcessGroup, store: Store, device: Device) -> Self {
        let mut worker = Self::alone(device);
        let member = worker.round.get_mut();
        (member.env.rank, member.env.world_size) = (group.rank() as u32, group.world_size() as u32);
        if let Err(error) = worker.link.join_group(&store, group.rank() as u32, group.world_size()) {
            tracing::warn!(%error, "this rank takes no part in the agreements of the group");
        }
        (member.group, member.store) = (Some(group), Some(store));
        worker
    }

    /// Says that this process keeps its state when its round ends, and takes part in the next one: by [`Worker::enter_round`] after
    /// [`Worker::leave_round`].
    pub fn stay(&self) {
        self.link.send(&Up::Stays);
    }

    /// Whether the process can take part in another round.
    pub fn can_stay(&self) -> bool {
        self.link.is_open()
    }

    /// Takes part in a round: the one that the process was started for, where it is in none yet, or the next one. Blocks until all its ranks
    /// are there. Without a launcher there is nothing to do. False where no round will come any more, and the process is to end.
    ///
    /// # Errors
    /// [`Error`] where the group cannot be formed, and not because other ranks are gone.
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
                settle(&error.to_string(), &self.link);
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

    /// The device of a rank; a spare learns it with its first round.
    fn bind(&self, env: &RankEnv) -> Result<Device, Error> {
        if self.is_unbound.replace(false) {
            self.device.set(device::bind(env.device.unwrap_or(RankDevice::Cpu))?);
        }
        Ok(self.device())
    }

    /// Leaves the round, after a failure of one of its collectives or because it is over. Nobody else may hold its group any more. Waits
    /// until the agents know that it is over.
    pub fn leave_round(&self, why: &str) {
        settle(why, &self.link);
        self.drop_group();
    }

    /// As [`Worker::leave_round`], where other ranks leave it and their agent will say so once they have.
    pub fn await_end_of_round(&self) {
        self.link.wait_for_the_end();
        self.drop_group();
    }

    fn drop_group(&self) {
        let mut member = self.round.borrow_mut();
        (member.group, member.store) = (None, None);
    }

    /// Whether this process waits to become a rank, and is to bind its GPU only then.
    pub fn is_unbound(&self) -> bool {
        self.is_unbound.get()
    }

    /// Rank within the job.
    pub fn rank(&self) -> usize {
        self.round.borrow().env.rank as usize
    }

    /// Rank within the node.
    pub fn local_rank(&self) -> usize {
        self.round.borrow().env.local_rank as usize
    }

    /// Ranks in the job.
    pub fn world_size(&self) -> usize {
        self.round.borrow().env.world_size as usize
    }

    /// Restarts of the worker group so far.
    pub fn restart_count(&self) -> usize {
        self.round.borrow().env.restart_count as usize
    }

    /// Identifier of the job.
    pub fn run_id(&self) -> &str {
        &self.job.run_id
    }

    /// What tells two runs of one job apart, the same on all ranks and in all rounds; `None` where the launcher has none.
    pub fn run_stamp(&self) -> Option<&str> {
        self.job.run_stamp.as_deref()
    }

    /// Whether this is rank 0, which prints and writes for all.
    pub fn is_main(&self) -> bool {
        self.rank() == 0
    }

    /// The device that the rank is bound to.
    pub fn device(&self) -> Device {
        self.device.get()
    }

    /// The process group of the round; `None` for a process on its own, or between rounds.
    pub fn group(&self) -> Option<ProcessGroup> {
        self.round.borrow().group.clone()
    }

    /// The store of the round, which all its ranks share; `None` for a process on its own, or between rounds.
    pub fn store(&self) -> Option<Store> {
        self.round.borrow().store.clone()
    }

    /// The node that this rank is on, counted from 0.
    pub fn node(&self) -> u32 {
        self.round.borrow().env.group_rank
    }

    /// The address of this host on the way to the store.
    pub(crate) fn local_address(&self) -> Option<String> {
        let member = self.round.borrow();
        group::local_address(&member.env.master_addr, member.env.master_port)
    }

    /// Number of the round.
    pub fn round(&self) -> u64 {
        self.round.borrow().env.round
    }

    /// The connection to the agent.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// Sums the tensor over all ranks, in place: the elements that it views and no others, whatever its strides. The sum of bools
    /// is whether any is true.
    ///
    /// # Errors
    /// [`Error::Collective`] when a rank is lost or the shapes differ, and before anything is sent for a tensor that cannot be
    /// summed: one of a type that no backend adds (Int16, complex numbers), a sparse one, or an expanded one.
    pub fn all_reduce_sum(&self, tensor: &Tensor) -> Result<(), Error> {
        self.exchange("all-reduce", |group| group.all_reduce(tensor, ReduceOp::Sum))
    }

    /// Overwrites the tensor on every rank with rank 0's, whatever its type and strides.
    ///
    /// # Errors
    /// [`Error::Collective`] when a rank is lost or the shapes differ, and before anything is sent for a sparse or expanded one.
    pub fn broadcast(&self, tensor: &Tensor) -> Result<(), Error> {
        self.broadcast_from(0, tensor)
    }

    /// Overwrites the tensor on every rank with that of rank `source`.
    ///
    /// # Errors
    /// [`Error::Collective`] when a rank is lost or the shapes differ.
    pub fn broadcast_from(&self, source: usize, tensor: &Tensor) -> Result<(), Error> {
        self.exchange("broadcast", |group| group.broadcast(tensor, source))
    }

    /// Begins what [`Worker::broadcast_from`] does. The tensor must not be touched until it is done. All ranks begin theirs in the same order;
    /// several under way take less time than one after the other.
    ///
    /// # Errors
    /// [`Error::Collective`] when it cannot be begun.
    pub fn begin_broadcast(&self, source: usize, tensor: &Tensor) -> Result<Begun, Error> {
        self.begin("broadcast", |group| group.broadcast(tensor, source))
    }

    /// Begins to send the tensor to another rank, which [receives](Worker::begin_receive) it. It must not be touched until it is sent. What goes from one rank to another arrives in the order in which it was sent.
    ///
    /// # Errors
    /// [`Error::Collective`] when it cannot be begun.
    pub fn begin_send(&self, to: usize, tensor: &Tensor) -> Result<Begun, Error> {
        self.begin("sending", |group| group.send(tensor, to))
    }

    /// Begins to overwrite the tensor with the one of as many bytes that rank `from` sends.
    ///
    /// # Errors
    /// [`Error::Collective`] when it cannot be begun.
    pub fn begin_receive(&self, from: usize, tensor: &Tensor) -> Result<Begun, Error> {
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
    ) -> Result<Begun, Error> {
        let link = self.link.clone();
        let Some(group) = self.group() else { return Ok(Begun { doing, work: None, link }) };
        self.link.collective();
        let work = call(&group).map_err(collective(doing))?;
        Ok(Begun { doing, work: Some(work), link })
    }

    /// Copies the tensor of each rank `i` into row `i` of `all`. Those of all ranks have the same shape and dtype.
    ///
    /// # Errors
    /// [`Error::Collective`] when a rank is lost, or the shapes differ, or `all` has not one row per rank.
    pub fn all_gather(&self, all: &[Tensor], own: &Tensor) -> Result<(), Error> {
        self.exchange("all-gather", |group| group.all_gather(all, own))
    }

    /// Makes sure that what the ranks have exchanged so far is what they have computed. On a GPU a collective that is given up, since a rank is
    /// lost, ends like any other and leaves anything behind. What is [begun](Begun) needs this before its result counts; the others do it
    /// themselves.
    ///
    /// # Errors
    /// [`Error::RoundOver`] where that may be so.
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

    /// Asks all ranks to leave the task of this number, or with `all` to end the run, at the same step boundary. Ranks that wait for each
    /// other in every step reach it at most one step later; without other ranks this does nothing. [`Link::boundary`] says when it is there.
    ///
    /// # Errors
    /// [`Error::Collective`] when the store of the round is gone.
    pub fn ask_to_leave(&self, all: bool, task: u64) -> Result<(), Error> {
        let Some(store) = self.store() else { return Ok(()) };
        agree::publish(&store, Request::Leave { all, task }).map_err(collective("the request to leave"))
    }

    /// Leaves the step that is under way before its end, and waits until it is known whether all ranks do so. Returns a rank that does not;
    /// that one waits for this one in a collective.
    ///
    /// # Errors
    /// [`Error::Collective`] or [`Error::RoundOver`] when another rank or the store is gone.
    pub fn leave_step(&self) -> Result<Option<u64>, Error> {
        let Some(store) = self.store().filter(|_| self.world_size() > 1) else { return Ok(None) };
        let request = self.link.leave_step();
        agree::publish(&store, request).map_err(collective("the request to leave"))?;
        let _waiting = self.link.waiting();
        self.link.await_left()
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    /// [`Error::Collective`] when a rank is lost.
    pub fn barrier(&self) -> Result<(), Error> {
        self.exchange("barrier", ProcessGroup::barrier)
    }

    /// Tells the agent that the first training step in the round has been applied, and how many had been begun before and are done again.
    pub fn first_step(&self, step: u64, repeated: u64) {
        self.link.send(&Up::FirstStep { round: self.round(), step, repeated });
    }

    /// Reports progress to the agent.
    pub fn progress(&self, progress: Progress) {
        self.link.send(&Up::Progress(progress));
    }

    /// Leaves the job, and says so to the agent. The ranks had better [wait for each other](Worker::barrier) before, so that none sees a
    /// broken connection, unless this one was told to stop.
    pub fn leave(&self) {
        self.link.finish();
        self.drop_group();
    }

    /// Leaves word of a failure with the agent and in the error file. `message` is one line, `detail` may be many.
    pub fn report_failure(message: &str, detail: &str) {
        let link = Link::current();
        link.send(&Up::Error { message: message.into() });
        let Some(path) = link.error_file() else { return };
        let timestamp =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        let record = ErrorRecord { message: message.into(), callstack: detail.into(), timestamp };
        if let Err(error) = error_file::write(&path, &record) {
            tracing::warn!(%error, path = %path.display(), "cannot write the error file");
        }
    }
}

/// Makes libtorch compute with as many threads as `OMP_NUM_THREADS` says. By itself libtorch takes MKL's number, which is
/// `MKL_NUM_THREADS` and never more than the machine's cores, so that one number would mean other sums on another machine.
fn set_threads(omp_num_threads: Option<&str>) {
    // OpenMP takes a list, with a number for each level of nested teams. libtorch has one level.
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
