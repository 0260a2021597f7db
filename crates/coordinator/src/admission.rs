//! Checks of an agent's hello: whether it belongs to this job and agrees with the other agents.

use std::time::Duration;

use ice_proto::rendezvous::{Hello, KeepAlive, MAX_NODES, MAX_ROLE_LEN};

use crate::nodes::{Nodes, host_label};

/// Maximum of ranks per node; a larger number is a mistake of the user.
const MAX_RANKS_PER_NODE: u32 = 1 << 14;
// The memory per node is a few hundred bytes. With both maxima every rank still fits into torch's
// `int`.
const _: () = assert!(MAX_NODES <= i32::MAX as u32 / MAX_RANKS_PER_NODE);
/// Maximum length of a host name in bytes: that of Linux.
const MAX_HOST_LEN: usize = 64;
/// Maximum length of an address in bytes: that of a name in the DNS.
const MAX_ADDRESS_LEN: usize = 255;

/// Checks a newcomer against the job and against the nodes that are present. A requested node rank
/// that is taken is an error before the first round. After it the newcomer waits for that rank: it
/// may be the same node, back before its loss was noticed.
pub(super) fn check(run_id: &str, nodes: &Nodes, newcomer: &Hello, has_begun: bool) -> Result<(), String> {
    if newcomer.run_id != run_id {
        return Err(format!(
            "this endpoint serves the job `{run_id}`, not `{}`: use the same --run-id on all nodes, or another port",
            newcomer.run_id
        ));
    }
    if let Some(first) = nodes.any().map(|node| &node.hello) {
        for (option, theirs, ours) in [
            ("--nnodes", range(newcomer.nnodes), range(first.nnodes)),
            (
                "--max-restarts",
                newcomer.restarts.max_restarts.to_string(),
                first.restarts.max_restarts.to_string(),
            ),
            ("--rdzv-conf keep_alive", keep_alive(newcomer.keep_alive), keep_alive(first.keep_alive)),
            ("--restart-window", seconds(newcomer.restarts.window), seconds(first.restarts.window)),
            (
                "--restart-backoff",
                seconds(Some(newcomer.restarts.backoff)),
                seconds(Some(first.restarts.backoff)),
            ),
            (
                "--crash-loop-limit",
                newcomer.restarts.crash_loop.to_string(),
                first.restarts.crash_loop.to_string(),
            ),
            ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", by_rank(newcomer), by_rank(first)),
        ] {
            if theirs != ours {
                return Err(format!(
                    "{option} is {theirs} on {} and {ours} on {}",
                    host_label(newcomer),
                    host_label(first)
                ));
            }
        }
    }
    let (min_nodes, max_nodes) = newcomer.nnodes;
    if min_nodes == 0
        || min_nodes > max_nodes
        || max_nodes > MAX_NODES
        || !(1..=MAX_RANKS_PER_NODE).contains(&newcomer.local_world_size)
    {
        return Err(format!(
            "--nnodes {} with {} ranks per node makes no job",
            range(newcomer.nnodes),
            newcomer.local_world_size
        ));
    }
    if let Some(rank) = newcomer.node_rank {
        if rank >= max_nodes {
            return Err(format!(
                "--node-rank {rank} with --nnodes {max_nodes}: node ranks go from 0 to {}",
                max_nodes - 1
            ));
        }
        if let Some(other) = nodes.requesting(rank).map(|node| &node.hello).filter(|_| !has_begun) {
            return Err(format!(
                "--node-rank {rank} was given on {} (pid {}) and on {} (pid {})",
                host_label(other),
                other.pid,
                host_label(newcomer),
                newcomer.pid
            ));
        }
    }
    if newcomer.host.len() > MAX_HOST_LEN {
        return Err(format!(
            "a host name of {} bytes is over the limit of {MAX_HOST_LEN}",
            newcomer.host.len()
        ));
    }
    if newcomer.role.len() > MAX_ROLE_LEN {
        return Err(format!("--role of {} bytes is over the limit of {MAX_ROLE_LEN}", newcomer.role.len()));
    }
    if let Some(store) = newcomer.ranks_store.as_ref().filter(|store| store.host.len() > MAX_ADDRESS_LEN) {
        return Err(format!(
            "--local-addr of {} bytes is over the limit of {MAX_ADDRESS_LEN}",
            store.host.len()
        ));
    }
    if nodes.len() >= MAX_NODES as usize {
        return Err(format!("{} nodes are here already, which is the most", nodes.len()));
    }
    Ok(())
}

/// Returns whether rank 0 serves the ranks' store, as the value of torchrun's variable.
fn by_rank(hello: &Hello) -> String {
    let by_rank = hello.ranks_store.as_ref().is_some_and(|store| store.by_rank);
    if by_rank { "1".into() } else { "not set".into() }
}

fn seconds(time: Option<Duration>) -> String {
    time.map_or_else(|| "not given".into(), |time| format!("{} s", time.as_secs_f64()))
}

fn keep_alive(keep_alive: KeepAlive) -> String {
    format!("{} times {} s", keep_alive.attempts, keep_alive.interval.as_secs_f64())
}

fn range((min_nodes, max_nodes): (u32, u32)) -> String {
    if min_nodes == max_nodes { max_nodes.to_string() } else { format!("{min_nodes}:{max_nodes}") }
}
