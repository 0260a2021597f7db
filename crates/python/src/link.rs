//! The classes of the module.

use std::collections::BTreeMap;
use std::env;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ice_link::process::Connections;
use ice_link::{Alone, Boundary, Stop, Waiting};
use ice_proto::env::{EnvError, ICE_SPARE, RankEnv};
use ice_proto::link::{FromRank, TrainingProgress};
use pyo3::exceptions::{PyConnectionError, PyOSError, PyValueError};
use pyo3::prelude::*;

use crate::store::RoundStore;

/// A round as seen by one rank: its place among the others, and the address of their store.
#[pyclass(frozen, module = "ice_launch._link")]
pub(crate) struct Round {
    env: RankEnv,
    /// Variables of a rank that would be started now. Empty for the round that the process was
    /// started for, whose variables are in the environment already.
    #[pyo3(get)]
    variables: BTreeMap<String, String>,
}

#[pymethods]
impl Round {
    /// Number of the round, from 0.
    #[getter]
    fn number(&self) -> u64 {
        self.env.round
    }

    /// Rank of this process within the job.
    #[getter]
    fn rank(&self) -> u32 {
        self.env.rank
    }

    /// Number of ranks of the job.
    #[getter]
    fn world_size(&self) -> u32 {
        self.env.world_size
    }

    /// Host of the store of the ranks.
    #[getter]
    fn store_host(&self) -> &str {
        &self.env.master_addr
    }

    /// Port of the store of the ranks.
    #[getter]
    fn store_port(&self) -> u16 {
        self.env.master_port
    }

    /// Prefix of the keys of the round.
    #[getter]
    fn prefix(&self) -> String {
        format!("ice/round_{}", self.env.round)
    }

    fn __repr__(&self) -> String {
        let RankEnv { round, rank, world_size, .. } = &self.env;
        format!("<round {round}: rank {rank} of {world_size}>")
    }
}

/// The link of this process to its agent.
#[pyclass(frozen, module = "ice_launch._link")]
pub(crate) struct Link {
    link: ice_link::Link,
    env: RankEnv,
    is_spare: bool,
    guards: Mutex<Guards>,
}

#[derive(Default)]
struct Guards {
    /// Connections of a group that is being formed.
    connections: Option<Connections>,
    /// Set while the rank works alone.
    alone: Option<Alone>,
    /// Set while a group is being formed: other ranks may be missing.
    waiting: Option<Waiting>,
}

/// A group that has no handle here: its collectives end with its connections.
struct ByConnections;

impl ice_link::Group for ByConnections {
    fn abort(&self) {}
}

/// Opens the link of this process. Returns `None` without an agent that offers one.
///
/// Raises `ValueError` if a variable of the agent is missing or invalid, and `OSError` if the link
/// cannot be used, for example because it was opened before.
#[pyfunction]
pub(crate) fn connect() -> PyResult<Option<Link>> {
    let lookup = |name: &str| env::var(name).ok();
    let is_spare = env::var_os(ICE_SPARE).is_some();
    let env = match is_spare {
        true => Some(RankEnv::read_spare(lookup)),
        false => RankEnv::read(lookup).transpose(),
    };
    let invalid = |error: EnvError| PyValueError::new_err(error.to_string());
    let Some(env) = env.transpose().map_err(invalid)? else { return Ok(None) };
    let Some(fd) = env.link_fd else { return Ok(None) };
    let (rank, round) = ((!is_spare).then_some(env.rank), (!is_spare).then_some(env.round));
    let link = ice_link::Link::open(fd, rank, round)
        .and_then(|link| link.take_signals().map(|()| link))
        .map_err(|error| PyOSError::new_err(format!("cannot use the link to the agent: {error}")))?;
    link.leave_stuck_to_agent();
    Ok(Some(Link { link, env, is_spare, guards: Mutex::default() }))
}

#[pymethods]
impl Link {
    /// Returns the round that the process was started for; `None` for a spare.
    fn first_round(&self) -> Option<Round> {
        let env = || self.env.clone();
        (!self.is_spare).then(|| Round { env: env(), variables: BTreeMap::new() })
    }

    /// Tells the agent that this process keeps its state when a round ends, and joins the next one.
    fn stay(&self) {
        self.link.send(&FromRank::Stays);
    }

    /// Begins a round. Connections that any thread opens until `join` belong to it, and are closed
    /// when the round ends.
    fn begin_round(&self, round: &Round) {
        let connections = self.link.begin_round(&round.env);
        let waiting = self.link.waiting();
        let mut guards = self.guards();
        (guards.connections, guards.waiting) = (Some(connections), Some(waiting));
    }

    /// Joins a round whose process group is formed. Raises `ConnectionError` if the store of the
    /// round is gone.
    fn join(&self, python: Python<'_>, round: &Round) -> PyResult<()> {
        let connections = self.guards().connections.take();
        connections.iter().for_each(Connections::are_complete);
        self.guards().waiting = None;
        let joined = python.detach(|| {
            let RankEnv { master_addr, master_port, .. } = &round.env;
            let store = RoundStore::connect(master_addr, *master_port, &round.prefix())
                .map_err(std::io::Error::other)?;
            self.link.join_round(&store, Arc::new(ByConnections), &round.env)
        });
        joined.map_err(|error| PyConnectionError::new_err(error.to_string()))
    }

    /// Returns whether the round is over: a rank is lost, or nodes join or leave.
    fn is_over(&self) -> bool {
        self.link.is_broken()
    }

    /// Waits until the round is over, at most this number of seconds. Returns whether it is. The
    /// caller must then leave the round.
    fn wait_for_end(&self, python: Python<'_>, seconds: f64) -> PyResult<bool> {
        let timeout = Duration::try_from_secs_f64(seconds)
            .map_err(|_| PyValueError::new_err(format!("{seconds} is not a number of seconds")))?;
        Ok(python.detach(|| self.link.wait_for_stop(timeout)) == Some(Stop::Broken))
    }

    /// Leaves a round that other ranks may not know to be over, for this reason.
    fn leave_round(&self, python: Python<'_>, reason: &str) {
        python.detach(|| self.link.report_lost_round(reason));
    }

    /// Leaves a round that other ranks end.
    fn await_end(&self, python: Python<'_>) {
        python.detach(|| self.link.wait_for_round_end());
    }

    /// Waits for the next round; `None` if this process should exit. The process group of the last
    /// round must be gone.
    fn next_round(&self, python: Python<'_>) -> Option<Round> {
        let next = python.detach(|| self.link.next_round())?;
        Some(Round { env: next.env, variables: next.variables })
    }

    /// Notes that this process begins to train, and from now on waits for other ranks.
    fn begin_run(&self) {
        self.link.begin_run();
    }

    /// Notes that all ranks of the round begin to work.
    fn begin(&self) {
        self.link.begin();
    }

    /// Arrives at a step boundary. Waits while the job is paused. Returns the name of the action,
    /// which is equal on all ranks: `continue`, `save`, `stop` (this rank ends), `leave` (ranks of
    /// another node end), `regroup` or `broken`; and whether to save before `stop` and `leave`.
    fn boundary(&self, python: Python<'_>) -> (&'static str, bool) {
        match python.detach(|| self.link.boundary(false)) {
            Boundary::Continue | Boundary::Leave { .. } => ("continue", false),
            Boundary::Save => ("save", true),
            Boundary::Stop { here: true, save } => ("stop", save),
            Boundary::Stop { here: false, save } => ("leave", save),
            Boundary::Regroup => ("regroup", false),
            Boundary::Broken => ("broken", false),
        }
    }

    /// Notes a committed step, with the number of steps so far.
    fn advance(&self, step: u64) {
        self.link.advance(step);
    }

    /// Notes progress within a step. If a job hangs, the rank with the least progress is named.
    fn note_activity(&self) {
        self.link.note_activity();
    }

    /// Notes the seconds of an applied step.
    fn applied(&self, seconds: f64) {
        self.link.applied(Duration::try_from_secs_f64(seconds).unwrap_or_default());
    }

    /// Reports the position in the training: the epoch from 1, or 0 without epochs; the steps done
    /// in it, and their number, or 0 if it is not known.
    fn progress(&self, epoch: u64, done: u64, total: u64, samples_per_second: f64, loss: Option<f64>) {
        let (epoch, iteration) = ((epoch, 0), (done, total));
        let progress = TrainingProgress { task: "train".into(), epoch, iteration, samples_per_second, loss };
        self.link.send(&FromRank::Progress(progress));
    }

    /// Reports the first step of a round, and how many steps the round repeats.
    fn first_step(&self, step: u64, repeated: u64) {
        self.link.send(&FromRank::FirstStep { round: self.link.round(), step, repeated });
    }

    /// Reports a checkpoint that is complete on disk.
    fn checkpoint_saved(&self, path: String, step: u64) {
        self.link.send(&FromRank::CheckpointSaved { path, step });
    }

    /// Marks this rank as working alone, or as working with the others again. The agent does not
    /// take time alone for a hang.
    fn set_alone(&self, alone: bool) {
        self.guards().alone = alone.then(|| self.link.alone());
    }

    /// Notes that no step boundary follows in this round.
    fn end(&self) {
        self.link.end();
    }

    /// Notes that the process has finished to train.
    fn end_run(&self) {
        self.link.end_run();
    }

    /// Tells the agent that the process is about to exit.
    fn announce_exit(&self) {
        self.link.announce_exit();
    }
}

impl Link {
    fn guards(&self) -> MutexGuard<'_, Guards> {
        self.guards.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
