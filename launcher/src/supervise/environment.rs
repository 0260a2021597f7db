//! The environment contract, agent's side.

use std::path::Path;

use ice_proto::env as names;
use ice_proto::rendezvous::Round;

use crate::LaunchPlan;

/// What all ranks of this node have in common in a round.
pub(crate) struct Environment<'a> {
    pub(crate) plan: &'a LaunchPlan,
    pub(crate) round: &'a Round,
    pub(crate) master_port: u16,
}

impl Environment<'_> {
    /// Rank of the first process of this node.
    pub(crate) fn first_rank(&self) -> u32 {
        self.round.members.get(self.round.you as usize).map_or(0, |member| member.first_rank)
    }

    /// Whether ranks get one thread because nobody said how many. Threads decide the order of floating-point sums, so their number
    /// must not depend on how ranks lie over nodes.
    pub(crate) fn limits_threads(&self) -> bool {
        self.plan.omp_num_threads.is_none() && self.round.world_size() > 1 && unset(names::OMP_NUM_THREADS)
    }

    /// The variables of a rank.
    pub(crate) fn of(&self, local_rank: u32, error_file: &Path) -> Vec<(&'static str, String)> {
        let (plan, round) = (self.plan, self.round);
        let rank = (self.first_rank() + local_rank).to_string();
        let world_size = round.world_size();
        let device = plan.devices.get(local_rank as usize).map(ToString::to_string).unwrap_or_default();
        let mut variables = vec![
            (names::LOCAL_RANK, local_rank.to_string()),
            (names::RANK, rank.clone()),
            (names::GROUP_RANK, round.you.to_string()),
            (names::ROLE_RANK, rank),
            (names::ROLE_NAME, plan.role.clone()),
            (names::LOCAL_WORLD_SIZE, plan.devices.len().to_string()),
            (names::WORLD_SIZE, world_size.to_string()),
            (names::GROUP_WORLD_SIZE, round.members.len().to_string()),
            (names::ROLE_WORLD_SIZE, world_size.to_string()),
            (names::MASTER_ADDR, plan.master_addr.clone()),
            (names::MASTER_PORT, self.master_port.to_string()),
            (names::TORCHELASTIC_RESTART_COUNT, round.restart_count.to_string()),
            (names::TORCHELASTIC_MAX_RESTARTS, plan.max_restarts.to_string()),
            (names::TORCHELASTIC_RUN_ID, plan.run_id.clone()),
            (names::TORCHELASTIC_USE_AGENT_STORE, "True".into()),
            (names::TORCHELASTIC_ERROR_FILE, error_file.display().to_string()),
            (names::ICE_DEVICE, device),
            (names::ICE_DIST_BACKEND, plan.backend.to_string()),
            (names::ICE_ROUND, round.number.to_string()),
            (names::ICE_RUN_STAMP, round.run_stamp.clone()),
        ];
        if unset(names::TORCH_NCCL_ASYNC_ERROR_HANDLING) {
            variables.push((names::TORCH_NCCL_ASYNC_ERROR_HANDLING, "1".into()));
        }
        let threads = plan.omp_num_threads.or(self.limits_threads().then_some(1));
        variables.extend(threads.map(|threads| (names::OMP_NUM_THREADS, threads.to_string())));
        variables
    }
}

fn unset(name: &str) -> bool {
    std::env::var_os(name).is_none()
}
