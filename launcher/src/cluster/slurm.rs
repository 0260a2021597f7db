//! Slurm. `srun` starts a *step*: one process on each of its nodes, which knows its node. The
//! shells of `sbatch` and `salloc` know the job but run once. In such a shell the job has one node,
//! and a hint explains how to use all of them.

use std::collections::BTreeSet;

use super::variables::{Variables, number};
use super::{Cluster, ClusterError, Taken, hostlist};

/// Step ids from here up are Slurm's own: the batch script, the interactive shell, processes from
/// outside.
const SLURMS_OWN_STEPS: u32 = 0xffff_fff0;
/// Range of the ports of jobs. The range is below the ports that Linux assigns by itself, so that
/// no client has one of them by chance.
const FIRST_PORT: u64 = 20_000;
const PORTS: u64 = 10_000;

pub(super) fn detect(variables: &Variables<'_>) -> Result<Option<Cluster>, ClusterError> {
    let Some(job) = variables.text(&["SLURM_JOB_ID", "SLURM_JOBID"]) else { return Ok(None) };
    let mut cluster = Cluster {
        manager: "Slurm",
        run_id: Some(run_id(variables, &job)),
        gpus: gpus(variables)?,
        ..Cluster::default()
    };
    let Some(step) = step(variables) else {
        cluster.hint = hint(variables)?;
        return Ok(Some(cluster));
    };
    one_task_per_node(variables)?;
    cluster.nnodes =
        variables.number(&["SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"], "--nnodes")?;
    cluster.node_rank = variables.number(&["SLURM_NODEID"], "--node-rank")?;
    if let Some(nnodes) = cluster.nnodes.as_ref().map(|nnodes| nnodes.value).filter(|nnodes| *nnodes > 1) {
        if let Some(Taken { value: hosts, variable }) = hosts(variables, nnodes)? {
            cluster.node_rank = own_place(variables, &hosts).or(cluster.node_rank);
            cluster.master_addr = hosts.into_iter().next().map(|value| Taken { value, variable });
        }
        cluster.master_port = Some(master_port(&job, step)?);
        cluster.hint = has_terminal(variables).then(|| {
            format!(
                "the step has {nnodes} nodes and a terminal on one of them (SLURM_PTY_PORT): in a shell of \
                 `srun --pty`, use --standalone for this node alone"
            )
        });
    }
    Ok(Some(cluster))
}

/// Whether `srun --pty` started the step, mostly for a shell. In that shell, the step's variables
/// look like those of a launcher that `srun` started on every node.
fn has_terminal(variables: &Variables<'_>) -> bool {
    variables.text(&["SLURM_PTY_PORT"]).is_some()
}

/// Returns the step that this process is a task of.
fn step(variables: &Variables<'_>) -> Option<u32> {
    let known = |name| variables.text(&[name]).is_some();
    let step = variables.text(&["SLURM_STEP_ID", "SLURM_STEPID"])?.value.parse().ok()?;
    (step < SLURMS_OWN_STEPS && known("SLURM_NODEID") && known("SLURM_PROCID")).then_some(step)
}

fn hint(variables: &Variables<'_>) -> Result<Option<String>, ClusterError> {
    let nnodes =
        variables.number::<u32>(&["SLURM_JOB_NUM_NODES", "SLURM_NNODES"], "--nnodes")?.map(|n| n.value);
    Ok(nnodes.filter(|nnodes| *nnodes > 1).map(|nnodes| {
        format!(
            "the job has {nnodes} nodes and this is one process: start one launcher per node: \
             srun --ntasks-per-node=1 ice-launch …"
        )
    }))
}

/// Returns the run id. A requeued job keeps its id. The tasks of an array share the id of the
/// array, so their index is added.
fn run_id(variables: &Variables<'_>, job: &Taken<String>) -> Taken<String> {
    let array = variables.text(&["SLURM_ARRAY_JOB_ID"]).zip(variables.text(&["SLURM_ARRAY_TASK_ID"]));
    match array {
        Some((array, task)) => Taken {
            value: format!("{}_{}", array.value, task.value),
            variable: "SLURM_ARRAY_JOB_ID, SLURM_ARRAY_TASK_ID",
        },
        None => job.clone(),
    }
}

fn one_task_per_node(variables: &Variables<'_>) -> Result<(), ClusterError> {
    let names = ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"];
    let Some(tasks) = variables.text(&names) else { return Ok(()) };
    for part in tasks.value.split(',') {
        // `2(x3)` means 2 on each of 3 nodes.
        let count = part.split_once("(x").map_or(part, |(count, _)| count).trim();
        match count.parse::<u32>() {
            Ok(0 | 1) => {}
            Ok(_) => {
                let mut problem = "several launchers on a node, of which each would start all its ranks: use srun --ntasks-per-node=1".to_owned();
                if has_terminal(variables) {
                    problem.push_str(", or in a shell of `srun --pty`, --standalone for this node alone");
                }
                return Err(ClusterError::new(&tasks, problem));
            }
            Err(_) => {
                let problem =
                    "not a list of tasks per node such as 2(x3),1: unset it, or use srun --ntasks-per-node=1";
                return Err(ClusterError::new(&tasks, problem));
            }
        }
    }
    Ok(())
}

/// Returns the hosts of the step, in the order of their node ranks. `None` if no list names exactly
/// the step's nodes.
///
/// All nodes of a step see the same lists, so they agree on the order. Slurm sorts its lists, but
/// numbers the nodes of a heterogeneous job by component. The host with `SLURM_NODEID` 0 is then
/// the first host of the first component.
fn hosts(variables: &Variables<'_>, nnodes: u32) -> Result<Option<Taken<Vec<String>>>, ClusterError> {
    let names = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
    let Some(list) = variables.text(&names) else { return Ok(None) };
    let hosts = expand(&list)?;
    if u32::try_from(hosts.len()) != Ok(nnodes) {
        return Ok(None);
    }
    // If `srun` of Slurm 22.05 makes the allocation itself, only the older names are set.
    for lists in [&HET_GROUPS, &PACK_GROUPS] {
        if let Some(ordered) = by_component(variables, lists, &hosts)? {
            return Ok(Some(Taken { value: ordered, variable: lists[0] }));
        }
    }
    Ok(Some(Taken { value: hosts, variable: list.variable }))
}

/// Lists of the components of a heterogeneous job. A job with more components than these is
/// numbered in the order of its sorted list.
const HET_GROUPS: [&str; 8] = [
    "SLURM_JOB_NODELIST_HET_GROUP_0",
    "SLURM_JOB_NODELIST_HET_GROUP_1",
    "SLURM_JOB_NODELIST_HET_GROUP_2",
    "SLURM_JOB_NODELIST_HET_GROUP_3",
    "SLURM_JOB_NODELIST_HET_GROUP_4",
    "SLURM_JOB_NODELIST_HET_GROUP_5",
    "SLURM_JOB_NODELIST_HET_GROUP_6",
    "SLURM_JOB_NODELIST_HET_GROUP_7",
];
/// The same lists, as named by releases before 20.02.
const PACK_GROUPS: [&str; 8] = [
    "SLURM_JOB_NODELIST_PACK_GROUP_0",
    "SLURM_JOB_NODELIST_PACK_GROUP_1",
    "SLURM_JOB_NODELIST_PACK_GROUP_2",
    "SLURM_JOB_NODELIST_PACK_GROUP_3",
    "SLURM_JOB_NODELIST_PACK_GROUP_4",
    "SLURM_JOB_NODELIST_PACK_GROUP_5",
    "SLURM_JOB_NODELIST_PACK_GROUP_6",
    "SLURM_JOB_NODELIST_PACK_GROUP_7",
];

/// Returns the hosts of a step in the order of the job's components, if the step consists of whole
/// components.
fn by_component(
    variables: &Variables<'_>,
    lists: &[&'static str],
    hosts: &[String],
) -> Result<Option<Vec<String>>, ClusterError> {
    let step: BTreeSet<_> = hosts.iter().collect();
    let mut ordered = Vec::new();
    for name in lists {
        let Some(list) = variables.text(&[name]) else { break };
        let component = expand(&list)?;
        // `srun --het-group` may leave out components.
        if component.iter().all(|host| step.contains(host)) {
            ordered.extend(component);
        }
    }
    let is_whole = ordered.len() == hosts.len() && ordered.iter().collect::<BTreeSet<_>>() == step;
    Ok(is_whole.then_some(ordered))
}

/// Returns the index of this node among the hosts of the step. This index equals `SLURM_NODEID` in
/// every step that Slurm 22.05 makes. Should another release number nodes differently, all nodes
/// still agree on the host of node 0.
fn own_place(variables: &Variables<'_>, hosts: &[String]) -> Option<Taken<u32>> {
    let name = variables.text(&["SLURMD_NODENAME"])?;
    let place = hosts.iter().position(|host| *host == name.value)?;
    Some(Taken { value: u32::try_from(place).ok()?, variable: name.variable })
}

fn expand(list: &Taken<String>) -> Result<Vec<String>, ClusterError> {
    hostlist::expand(&list.value).map_err(|problem| {
        ClusterError::new(list, format!("not a host list: {problem}: unset it and give --master-addr"))
    })
}

/// Returns a port that all nodes compute without communication. Consecutive jobs, which are likely
/// to share nodes, have different ports, and so do the steps of a job.
fn master_port(job: &Taken<String>, step: u32) -> Result<Taken<u16>, ClusterError> {
    let job: Taken<u64> = number(job, "--master-port")?;
    // 3571 is coprime to the number of ports, and keeps a step's port far from the next job's.
    let offset = (job.value % PORTS + u64::from(step) * 3571) % PORTS;
    let port = u16::try_from(FIRST_PORT + offset).unwrap_or(u16::MAX);
    Ok(Taken { value: port, variable: job.variable })
}

/// Returns the number of GPUs, from a count or from a list of indices.
fn gpus(variables: &Variables<'_>) -> Result<Option<Taken<u32>>, ClusterError> {
    if let Some(count) = variables.number(&["SLURM_GPUS_ON_NODE"], "--devices")? {
        return Ok(Some(count));
    }
    let Some(list) = variables.text(&["SLURM_STEP_GPUS"]) else { return Ok(None) };
    let mut count: u32 = 0;
    for part in list.value.split(',') {
        let range = part.split_once('-').and_then(|(first, last)| {
            Some((first.trim().parse::<u32>().ok()?, last.trim().parse::<u32>().ok()?))
        });
        let more = match range {
            Some((first, last)) => last.checked_sub(first).and_then(|more| more.checked_add(1)),
            // One index, or the name of a part of a GPU.
            None => Some(1),
        };
        count = more.and_then(|more| count.checked_add(more)).ok_or_else(|| {
            ClusterError::new(&list, "not a list of GPUs such as 0,2-3: unset it and give --devices")
        })?;
    }
    Ok(Some(Taken { value: count, variable: list.variable }))
}
