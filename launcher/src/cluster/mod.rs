//! Takes this node's part in the job from the cluster that started this process, so that a job
//! script names no nodes, ranks or addresses. Pure: the module reads only the variables that it is
//! handed. Options that were given win; the command line sees to that.

mod hostlist;
mod kubernetes;
mod mpi;
mod slurm;
mod variables;

use std::fmt;

use variables::Variables;

/// A value, and the variable or variables that it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Taken<T> {
    pub(crate) value: T,
    pub(crate) variable: &'static str,
}

/// This node's part in the job according to a cluster's own variables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cluster {
    /// `Slurm`, `Open MPI`, `PMI` or `Kubernetes`.
    pub(crate) manager: &'static str,
    /// Number of nodes.
    pub(crate) nnodes: Option<Taken<u32>>,
    /// Rank of this node. An indexed job of Kubernetes may have one without `nnodes`. The rank
    /// counts only if the job has several nodes.
    pub(crate) node_rank: Option<Taken<u32>>,
    /// Host of node 0, if there are several nodes.
    pub(crate) master_addr: Option<Taken<String>>,
    /// Port of node 0, if there are several nodes.
    pub(crate) master_port: Option<Taken<u16>>,
    /// Identifier of the job.
    pub(crate) run_id: Option<Taken<String>>,
    /// Number of GPUs of this node that belong to the job.
    pub(crate) gpus: Option<Taken<u32>>,
    /// A line to print if the job has several nodes and this process was not started on each of
    /// them.
    pub(crate) hint: Option<String>,
}

/// A variable with an impossible value: its name, its value, and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: `{value}`: {problem}")]
pub(crate) struct ClusterError {
    pub(crate) variable: &'static str,
    pub(crate) value: String,
    pub(crate) problem: String,
}

impl ClusterError {
    fn new(taken: &Taken<String>, problem: impl Into<String>) -> Self {
        Self { variable: taken.variable, value: taken.value.clone(), problem: problem.into() }
    }
}

/// Detects the cluster from the variables that `lookup` returns. `None` outside of any cluster, and
/// in a rank: a launcher that a rank starts is a job of its own, and the cluster's variables belong
/// to the parent job.
///
/// # Errors
/// Returns a [`ClusterError`] that names variable, value and remedy.
pub(crate) fn detect(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Option<Cluster>, ClusterError> {
    let variables = Variables::new(lookup);
    if variables.text(&["TORCHELASTIC_RUN_ID", "ICE_ROUND"]).is_some() {
        return Ok(None);
    }
    // mpirun and mpiexec start their daemons through Slurm, so their processes also have Slurm's
    // variables. Slurm is therefore checked after them.
    for detect in [mpi::open_mpi, mpi::hydra, slurm::detect, kubernetes::detect] {
        if let Some(cluster) = detect(&variables)? {
            return cluster.checked().map(Some);
        }
    }
    Ok(None)
}

impl Cluster {
    /// Whether the job has one node. In that case an endpoint is of no use: the launcher chooses
    /// its own.
    fn is_alone(&self) -> bool {
        self.nnodes.as_ref().is_some_and(|nnodes| nnodes.value == 1)
    }

    fn checked(self) -> Result<Self, ClusterError> {
        let Some(nnodes) = &self.nnodes else { return Ok(self) };
        let wrong = |taken: &Taken<u32>, problem: String| {
            let taken = Taken { value: taken.value.to_string(), variable: taken.variable };
            Err(ClusterError::new(&taken, problem))
        };
        if nnodes.value == 0 {
            return wrong(nnodes, "a job needs at least 1 node: unset it and give --nnodes".into());
        }
        match &self.node_rank {
            Some(rank) if rank.value >= nnodes.value => {
                let problem = format!(
                    "node ranks go from 0 to {}, as {} is {}: correct one of them",
                    nnodes.value - 1,
                    nnodes.variable,
                    nnodes.value
                );
                wrong(rank, problem)
            }
            _ => Ok(self),
        }
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted = |taken: &Taken<u32>, one: &str| {
            let Taken { value, variable } = taken;
            format!("{value} {one}{} ({variable})", if *value == 1 { "" } else { "s" })
        };
        let master = match (&self.master_addr, &self.master_port) {
            (Some(host), Some(port)) if host.variable == port.variable => {
                Some(format!("master {}:{} ({})", host.value, port.value, host.variable))
            }
            (Some(host), Some(port)) => {
                Some(format!("master {}:{} ({}, {})", host.value, port.value, host.variable, port.variable))
            }
            (Some(host), None) => Some(format!("master {} ({})", host.value, host.variable)),
            (None, Some(port)) => Some(format!("master port {} ({})", port.value, port.variable)),
            (None, None) => None,
        };
        let parts = [
            self.nnodes.as_ref().map(|nnodes| counted(nnodes, "node")),
            self.node_rank.as_ref().map(|rank| format!("node rank {} ({})", rank.value, rank.variable)),
            master,
            self.run_id.as_ref().map(|id| format!("run id {} ({})", id.value, id.variable)),
            self.gpus.as_ref().map(|gpus| counted(gpus, "GPU")),
        ];
        let parts: Vec<_> = parts.into_iter().flatten().collect();
        let parts = if parts.is_empty() { "nothing taken".to_owned() } else { parts.join(", ") };
        write!(f, "{}: {parts}", self.manager)
    }
}

#[cfg(test)]
mod tests;
