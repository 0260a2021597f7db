//! Whom the coordinator lets in, and which place each node gets.

use std::time::Duration;

use ice_proto::rendezvous::{Hello, KeepAlive, LONGEST_ROLE, MOST_NODES};

use super::coordinator::host;
use super::nodes::Nodes;

/// Ranks that one node can have; more are a mistake.
const MOST_RANKS: u32 = 1 << 14;
// What is kept of each node is a few hundred bytes, and every rank is a number that torch can hold.
const _: () = assert!(MOST_NODES <= i32::MAX as u32 / MOST_RANKS);
/// Bytes of a host name, which is Linux's limit.
const LONGEST_HOST: usize = 64;
/// Bytes of an address, which may be a name in the DNS.
const LONGEST_ADDRESS: usize = 255;

/// Checks a newcomer against the job and against the nodes that are there already. Once the job has begun, one that asks for the place of
/// another waits for it: it may be that node, come back before it was missed.
pub(super) fn check(run_id: &str, nodes: &Nodes, newcomer: &Hello, begun: bool) -> Result<(), String> {
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
            ("--rdzv-conf keep_alive", alive(newcomer.keep_alive), alive(first.keep_alive)),
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
                    host(newcomer),
                    host(first)
                ));
            }
        }
    }
    let (fewest, most) = newcomer.nnodes;
    if fewest == 0
        || fewest > most
        || most > MOST_NODES
        || !(1..=MOST_RANKS).contains(&newcomer.local_world_size)
    {
        return Err(format!(
            "--nnodes {} with {} ranks per node makes no job",
            range(newcomer.nnodes),
            newcomer.local_world_size
        ));
    }
    if let Some(rank) = newcomer.node_rank {
        if rank >= most {
            return Err(format!(
                "--node-rank {rank} with --nnodes {most}: node ranks go from 0 to {}",
                most - 1
            ));
        }
        if let Some(other) = nodes.asking(rank).map(|node| &node.hello).filter(|_| !begun) {
            return Err(format!(
                "--node-rank {rank} was given on {} (pid {}) and on {} (pid {})",
                host(other),
                other.pid,
                host(newcomer),
                newcomer.pid
            ));
        }
    }
    if newcomer.host.len() > LONGEST_HOST {
        return Err(format!(
            "a host name of {} bytes is over the limit of {LONGEST_HOST}",
            newcomer.host.len()
        ));
    }
    if newcomer.role.len() > LONGEST_ROLE {
        return Err(format!("--role of {} bytes is over the limit of {LONGEST_ROLE}", newcomer.role.len()));
    }
    if let Some(store) = newcomer.ranks_store.as_ref().filter(|store| store.host.len() > LONGEST_ADDRESS) {
        return Err(format!(
            "--local-addr of {} bytes is over the limit of {LONGEST_ADDRESS}",
            store.host.len()
        ));
    }
    if nodes.len() >= MOST_NODES as usize {
        return Err(format!("{} nodes are here already, which is the most", nodes.len()));
    }
    Ok(())
}

/// Whether rank 0 is to serve the ranks' store, as the variable says it.
fn by_rank(hello: &Hello) -> String {
    let by_rank = hello.ranks_store.as_ref().is_some_and(|store| store.by_rank);
    if by_rank { "1".into() } else { "not set".into() }
}

fn seconds(time: Option<Duration>) -> String {
    time.map_or_else(|| "not given".into(), |time| format!("{} s", time.as_secs_f64()))
}

fn alive(keep_alive: KeepAlive) -> String {
    format!("{} times {} s", keep_alive.attempts, keep_alive.interval.as_secs_f64())
}

fn range((fewest, most): (u32, u32)) -> String {
    if fewest == most { most.to_string() } else { format!("{fewest}:{most}") }
}
