//! Slurm. `srun` starts a *step*, a process on each of its nodes that knows its node. The shells of `sbatch` and `salloc` know the job
//! but run once: there this is one node, and a hint says how to have all of them.

use super::variables::{Variables, number};
use super::{Cluster, ClusterError, Taken, hostlist};

/// Step ids from here up are Slurm's own: the batch script, the interactive shell, processes from outside.
const SLURMS_OWN_STEPS: u32 = 0xffff_fff0;
/// Ports of jobs: below those that Linux hands out by itself, so that no client has one by chance.
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
    if let Some(nnodes) = cluster.nnodes.as_ref().filter(|nnodes| nnodes.value > 1) {
        cluster.master_addr = master_addr(variables, nnodes.value)?;
        cluster.master_port = Some(master_port(&job, step)?);
    }
    Ok(Some(cluster))
}

/// The step this is a task of.
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

/// A requeued job keeps its id. The tasks of an array share the array's, so the index belongs to it.
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
        // `2(x3)`: 2 on each of 3 nodes.
        let count = part.split_once("(x").map_or(part, |(count, _)| count).trim();
        match count.parse::<u32>() {
            Ok(0 | 1) => {}
            Ok(_) => {
                let problem = "several launchers on a node, of which each would start all its ranks: use srun --ntasks-per-node=1";
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

/// The first host of the step. A list of other nodes than the step's, where the step has none of its own, is of no use.
fn master_addr(variables: &Variables<'_>, nnodes: u32) -> Result<Option<Taken<String>>, ClusterError> {
    let names = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
    let Some(list) = variables.text(&names) else { return Ok(None) };
    let hosts = hostlist::expand(&list.value).map_err(|problem| {
        ClusterError::new(&list, format!("not a host list: {problem}: unset it and give --master-addr"))
    })?;
    let complete = u32::try_from(hosts.len()) == Ok(nnodes);
    let first = hosts.into_iter().next().filter(|_| complete);
    Ok(first.map(|value| Taken { value, variable: list.variable }))
}

/// The same on all nodes without a word between them. Jobs that follow one another, which are those that share nodes, have different
/// ports; so have the steps of a job.
fn master_port(job: &Taken<String>, step: u32) -> Result<Taken<u16>, ClusterError> {
    let job: Taken<u64> = number(job, "--master-port")?;
    // Prime to the number of ports, and far from the next job's.
    let offset = (job.value % PORTS + u64::from(step) * 3571) % PORTS;
    let port = u16::try_from(FIRST_PORT + offset).unwrap_or(u16::MAX);
    Ok(Taken { value: port, variable: job.variable })
}

/// A count, or a list of indices.
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
