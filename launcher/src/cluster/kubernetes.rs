//! Kubernetes: the variables of Kubeflow's `PyTorchJob`, and those of indexed jobs and JobSets,
//! whose manifests use the same names.
//!
//! | variable | set by | meaning |
//! |---|---|---|
//! | `KUBERNETES_SERVICE_HOST` | Kubernetes | this is a pod |
//! | `WORLD_SIZE` | `PyTorchJob`, or the manifest | number of nodes |
//! | `RANK` | `PyTorchJob`, or the manifest | rank of this node |
//! | `JOB_COMPLETION_INDEX` | Kubernetes, in indexed jobs | rank of this node if `RANK` is not set |
//! | `MASTER_ADDR`, `MASTER_PORT` | `PyTorchJob`, or the manifest | endpoint |
//! | `JOBSET_NAME`, `REPLICATED_JOB_NAME` | the manifest, from annotations | names of the JobSet and of its job, which give the endpoint |
//! | `PET_NNODES` | `PyTorchJob`, or the manifest | read by the command line; if set, `WORLD_SIZE` does not count nodes |

use super::variables::Variables;
use super::{Cluster, ClusterError, Taken};

pub(super) fn detect(variables: &Variables<'_>) -> Result<Option<Cluster>, ClusterError> {
    let known = |name| variables.text(&[name]).is_some();
    let in_pod = known("KUBERNETES_SERVICE_HOST");
    if !in_pod || !(known("JOB_COMPLETION_INDEX") || known("RANK") && known("WORLD_SIZE")) {
        return Ok(None);
    }
    let mut cluster = Cluster {
        manager: "Kubernetes",
        node_rank: variables.number(&["RANK", "JOB_COMPLETION_INDEX"], "--node-rank")?,
        run_id: variables.run_id(&["JOBSET_NAME"]),
        ..Cluster::default()
    };
    // A `PyTorchJob` that sets PET_NNODES counts processes in WORLD_SIZE instead of nodes.
    if !known("PET_NNODES") {
        cluster.nnodes = variables.number(&["WORLD_SIZE"], "--nnodes")?;
    }
    if !cluster.is_alone() {
        cluster.master_addr = variables.text(&["MASTER_ADDR"]).or_else(|| first_pod(variables));
        cluster.master_port = variables.number(&["MASTER_PORT"], "--master-port")?;
    }
    Ok(Some(cluster))
}

/// Returns the stable name of a JobSet's first pod. Its headless service has the JobSet's name.
fn first_pod(variables: &Variables<'_>) -> Option<Taken<String>> {
    let set = variables.text(&["JOBSET_NAME"])?.value;
    let job = variables.text(&["REPLICATED_JOB_NAME"])?.value;
    Some(Taken { value: format!("{set}-{job}-0-0.{set}"), variable: "JOBSET_NAME, REPLICATED_JOB_NAME" })
}
