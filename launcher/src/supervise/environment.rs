//! The variables of ranks: the agent's side of the environment contract.

use std::path::Path;

use ice_proto::env as names;
use ice_proto::link::ToRank;
use ice_proto::rendezvous::Round;

use crate::LaunchPlan;
use crate::placement::{
    CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES, Placed, cores, hip_visible_devices, place, threads_per_rank,
    visible_devices,
};

/// Values that all ranks of this node share in a round.
pub(crate) struct Environment<'a> {
    plan: &'a LaunchPlan,
    round: &'a Round,
    store: (&'a str, u16),
    placed: Vec<Placed>,
    /// Whether each rank sees one ROCm device.
    maps_hip: bool,
    /// Threads of a rank, if they have to be set. `None` if the agent's OMP_NUM_THREADS or a
    /// default applies.
    threads: Option<u32>,
}

impl<'a> Environment<'a> {
    pub(crate) fn new(plan: &'a LaunchPlan, round: &'a Round, store: (&'a str, u16)) -> Self {
        // torchrun maps HIP_VISIBLE_DEVICES only for a virtual local rank.
        let hip = hip_visible_devices().filter(|_| plan.virtual_local_rank);
        let maps_hip = hip.is_some();
        let visible = hip.or_else(visible_devices);
        let placed = place(&plan.devices, visible.as_deref(), plan.virtual_local_rank);
        Self { plan, round, store, placed, maps_hip, threads: threads(plan, round.assignment.ranks_on_host) }
    }

    /// The variables of a rank, for one that lives.
    pub(crate) fn as_message(&self, local_rank: u32, error_file: Option<&Path>) -> ToRank {
        let variables = self.of(local_rank, error_file).into_iter();
        ToRank::Round { variables: variables.map(|(name, value)| (name.to_owned(), value)).collect() }
    }

    /// Returns the variables of a spare. None of them lets a program take itself for a rank.
    pub(crate) fn of_spare(&self) -> Vec<(&'static str, String)> {
        let (plan, round) = (self.plan, self.round);
        let device = self.placed.first().map(|placed| placed.device.to_string());
        let mut variables = vec![
            (names::ICE_SPARE, "1".into()),
            (names::ROLE_NAME, plan.role.clone()),
            (names::TORCHELASTIC_RUN_ID, plan.run_id.clone()),
            (names::ICE_DEVICE, device.unwrap_or_default()),
            (names::ICE_DIST_BACKEND, plan.backend.to_string()),
            (names::ICE_RUN_STAMP, round.run_stamp.clone()),
        ];
        variables.extend(self.thread_variables());
        variables
    }

    /// Returns the variables that libraries read when they are loaded.
    pub(crate) fn thread_variables(&self) -> Vec<(&'static str, String)> {
        thread_variables(self.threads)
    }

    /// Returns the variables of a rank.
    pub(crate) fn of(&self, local_rank: u32, error_file: Option<&Path>) -> Vec<(&'static str, String)> {
        let (plan, round) = (self.plan, self.round);
        let rank = (round.assignment.first_rank + local_rank).to_string();
        let world_size = round.world_size;
        let placed = self.placed.get(local_rank as usize);
        let ranks_store =
            round.ranks_store.as_ref().map_or(self.store, |store| (store.host.as_str(), store.port));
        let by_rank = round.ranks_store.as_ref().is_some_and(|store| store.by_rank);
        let seen_rank = if plan.virtual_local_rank { 0 } else { local_rank };
        let mut variables = vec![
            (names::LOCAL_RANK, seen_rank.to_string()),
            (names::RANK, rank),
            (names::GROUP_RANK, round.assignment.group_rank.to_string()),
            (names::ROLE_RANK, (round.assignment.first_role_rank + local_rank).to_string()),
            (names::ROLE_NAME, plan.role.clone()),
            (names::LOCAL_WORLD_SIZE, plan.local_world_size().to_string()),
            (names::WORLD_SIZE, world_size.to_string()),
            (names::GROUP_WORLD_SIZE, round.nodes.to_string()),
            (names::ROLE_WORLD_SIZE, round.assignment.role_world_size.to_string()),
            (names::MASTER_ADDR, ranks_store.0.to_owned()),
            (names::MASTER_PORT, ranks_store.1.to_string()),
            (names::TORCHELASTIC_RESTART_COUNT, round.restart_count.to_string()),
            (names::TORCHELASTIC_MAX_RESTARTS, plan.restarts.max_restarts.to_string()),
            (names::TORCHELASTIC_RUN_ID, plan.run_id.clone()),
            (names::TORCHELASTIC_USE_AGENT_STORE, if by_rank { "False" } else { "True" }.into()),
            (names::TORCHELASTIC_SIGNALS_TO_HANDLE, signals(plan)),
            (names::ICE_DEVICE, placed.map(|placed| placed.device.to_string()).unwrap_or_default()),
            (names::ICE_DIST_BACKEND, plan.backend.to_string()),
            (names::ICE_STORE, format!("{}:{}", self.store.0, self.store.1)),
            (names::ICE_ROUND, round.number.to_string()),
            (names::ICE_RUN_STAMP, round.run_stamp.clone()),
        ];
        variables.extend(error_file.map(|file| (names::TORCHELASTIC_ERROR_FILE, file.display().to_string())));
        if unset(names::TORCH_NCCL_ASYNC_ERROR_HANDLING) {
            variables.push((names::TORCH_NCCL_ASYNC_ERROR_HANDLING, "1".into()));
        }
        variables.extend(self.thread_variables());
        let visible = placed.and_then(|placed| placed.visible.clone());
        if self.maps_hip {
            variables.extend(visible.clone().map(|visible| (HIP_VISIBLE_DEVICES, visible)));
        }
        variables.extend(visible.map(|visible| (CUDA_VISIBLE_DEVICES, visible)));
        variables
    }
}

/// Returns the thread variables that the ranks of this node will have if all agents of the job run
/// on different machines. These variables are known before the nodes have met.
pub(crate) fn expected_thread_variables(plan: &LaunchPlan) -> Vec<(&'static str, String)> {
    thread_variables(threads(plan, plan.local_world_size()))
}

/// Returns the variables for a number of threads. libtorch takes its number of threads from MKL,
/// which prefers its own variable.
fn thread_variables(threads: Option<u32>) -> Vec<(&'static str, String)> {
    let Some(number) = threads.map(|threads| threads.to_string()) else { return Vec::new() };
    let mkl = Some(names::MKL_NUM_THREADS).filter(|name| unset(name));
    let names = [Some(names::OMP_NUM_THREADS), mkl].into_iter().flatten();
    names.map(|name| (name, number.clone())).collect()
}

/// Returns the number of threads of each rank. By default, that is a rank's share of this machine's
/// cores. Ranks of other nodes of the job on the same machine count. A rank that has the machine to
/// itself keeps its own default.
fn threads(plan: &LaunchPlan, ranks_here: u32) -> Option<u32> {
    if plan.omp_num_threads.is_some() {
        return plan.omp_num_threads;
    }
    if !unset(names::OMP_NUM_THREADS) {
        return None;
    }
    (ranks_here > 1).then(|| threads_per_rank(cores(), ranks_here))
}

fn signals(plan: &LaunchPlan) -> String {
    plan.signals.iter().map(|signal| signal.as_str()).collect::<Vec<_>>().join(",")
}

fn unset(name: &str) -> bool {
    std::env::var_os(name).is_none()
}
