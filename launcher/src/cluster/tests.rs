use std::collections::HashMap;

use super::*;

/// Returns the cluster that is detected if these variables are set: `NAME=value`, one per line.
fn detected(environment: &str) -> Result<Option<Cluster>, String> {
    let variables: HashMap<_, _> =
        environment.lines().filter_map(|line| line.trim().split_once('=')).collect();
    detect(&|name| variables.get(name).map(ToString::to_string)).map_err(|error| error.to_string())
}

fn line(environment: &str) -> String {
    match detected(environment) {
        Ok(Some(cluster)) => cluster.to_string(),
        Ok(None) => "none".into(),
        Err(error) => format!("error {error}"),
    }
}

/// A step of two of the job's four nodes.
const STEP: &str = "SLURM_JOB_ID=4711
    SLURM_JOBID=4711
    SLURM_JOB_NAME=train
    SLURM_JOB_NODELIST=node[001-004]
    SLURM_JOB_NUM_NODES=4
    SLURM_NNODES=2
    SLURM_NODELIST=node[001-004]
    SLURM_NODEID=1
    SLURM_PROCID=1
    SLURM_LOCALID=0
    SLURM_NTASKS=2
    SLURM_STEPID=0
    SLURM_STEP_ID=0
    SLURM_STEP_NODELIST=node[003-004]
    SLURM_STEP_NUM_NODES=2
    SLURM_STEP_NUM_TASKS=2
    SLURM_STEP_TASKS_PER_NODE=1(x2)
    SLURM_GPUS_ON_NODE=8";

const BATCH: &str = "SLURM_JOB_ID=4711
    SLURM_JOB_NODELIST=node[001-004]
    SLURM_JOB_NUM_NODES=4
    SLURM_NNODES=4
    SLURM_NODEID=0
    SLURM_PROCID=0
    SLURM_LOCALID=0
    SLURM_TASKS_PER_NODE=8(x4)
    SLURM_GPUS_ON_NODE=8";

const OPEN_MPI_4: &str = "OMPI_COMM_WORLD_SIZE=2
    OMPI_COMM_WORLD_RANK=1
    OMPI_COMM_WORLD_LOCAL_SIZE=1
    OMPI_COMM_WORLD_LOCAL_RANK=0
    OMPI_MCA_ess_base_jobid=3195338753
    OMPI_MCA_orte_hnp_uri=3195338752.0;tcp://10.153.72.131,172.17.0.1:10000
    OMPI_MCA_orte_local_daemon_uri=3195338752.1;tcp://10.153.72.238,172.17.0.1:10000
    PMIX_NAMESPACE=3195338753
    PMIX_SERVER_URI2=3195338752.1;tcp4://127.0.0.1:37757";

const OPEN_MPI_5: &str = "OMPI_COMM_WORLD_SIZE=2
    OMPI_COMM_WORLD_RANK=0
    OMPI_COMM_WORLD_LOCAL_SIZE=1
    PMIX_NAMESPACE=prterun-gpu-a-3903919@1
    PMIX_SERVER_URI41=prterun-gpu-a-3903919@0.0;tcp4://127.0.0.1:57983";

const PYTORCH_JOB: &str = "KUBERNETES_SERVICE_HOST=10.96.0.1
    MASTER_ADDR=digits-master-0
    MASTER_PORT=23456
    WORLD_SIZE=3
    RANK=2";

const JOB_SET: &str = "KUBERNETES_SERVICE_HOST=10.96.0.1
    JOB_COMPLETION_INDEX=3
    WORLD_SIZE=4
    JOBSET_NAME=train
    REPLICATED_JOB_NAME=node";

#[test]
fn every_manager() {
    for (environment, expected) in [
        (
            STEP,
            "Slurm: 2 nodes (SLURM_STEP_NUM_NODES), node rank 1 (SLURM_NODEID), master node003:24711 \
             (SLURM_STEP_NODELIST, SLURM_JOB_ID), run id 4711 (SLURM_JOB_ID), 8 GPUs (SLURM_GPUS_ON_NODE)",
        ),
        (BATCH, "Slurm: run id 4711 (SLURM_JOB_ID), 8 GPUs (SLURM_GPUS_ON_NODE)"),
        (
            OPEN_MPI_4,
            "Open MPI: 2 nodes (OMPI_COMM_WORLD_SIZE), node rank 1 (OMPI_COMM_WORLD_RANK), master \
             10.153.72.131 (OMPI_MCA_orte_hnp_uri), run id 3195338753 (OMPI_MCA_ess_base_jobid)",
        ),
        (
            OPEN_MPI_5,
            "Open MPI: 2 nodes (OMPI_COMM_WORLD_SIZE), node rank 0 (OMPI_COMM_WORLD_RANK), master gpu-a \
             (PMIX_NAMESPACE), run id prterun-gpu-a-3903919@1 (PMIX_NAMESPACE)",
        ),
        (
            "PMI_SIZE=2\nPMI_RANK=1\nMPI_LOCALNRANKS=1\nMPI_LOCALRANKID=0",
            "PMI: 2 nodes (PMI_SIZE), node rank 1 (PMI_RANK)",
        ),
        (
            PYTORCH_JOB,
            "Kubernetes: 3 nodes (WORLD_SIZE), node rank 2 (RANK), master digits-master-0:23456 \
             (MASTER_ADDR, MASTER_PORT)",
        ),
        (
            JOB_SET,
            "Kubernetes: 4 nodes (WORLD_SIZE), node rank 3 (JOB_COMPLETION_INDEX), master \
             train-node-0-0.train (JOBSET_NAME, REPLICATED_JOB_NAME), run id train (JOBSET_NAME)",
        ),
    ] {
        assert_eq!(line(environment), expected);
    }
}

/// The variables of each manager, with some of them changed.
#[test]
fn variations() {
    for (environment, changes, expected) in [
        // An older Slurm, whose steps have no variables of their own.
        (
            STEP,
            "SLURM_STEP_NUM_NODES=\nSLURM_NNODES=4\nSLURM_STEP_NODELIST=\nSLURM_STEP_TASKS_PER_NODE=",
            "4 nodes (SLURM_NNODES), node rank 1 (SLURM_NODEID), master node001:24711 (SLURM_JOB_NODELIST,",
        ),
        // The job's list does not apply to a smaller step.
        (STEP, "SLURM_STEP_NODELIST=", "node rank 1 (SLURM_NODEID), master port 24711 (SLURM_JOB_ID)"),
        (STEP, "SLURM_STEP_ID=1", "master node003:28282"),
        (STEP, "SLURM_JOB_ID=4294967295", "master node003:27295"),
        (
            STEP,
            "SLURM_ARRAY_JOB_ID=4700\nSLURM_ARRAY_TASK_ID=11",
            "master node003:24711 (SLURM_STEP_NODELIST, SLURM_JOB_ID), \
             run id 4700_11 (SLURM_ARRAY_JOB_ID, SLURM_ARRAY_TASK_ID)",
        ),
        (
            STEP,
            "SLURM_STEP_NUM_NODES=1\nSLURM_NODEID=0\nSLURM_STEP_TASKS_PER_NODE=1",
            "Slurm: 1 node (SLURM_STEP_NUM_NODES), node rank 0 (SLURM_NODEID), run id",
        ),
        (STEP, "SLURM_GPUS_ON_NODE=\nSLURM_STEP_GPUS=0,2-3", "3 GPUs (SLURM_STEP_GPUS)"),
        (STEP, "SLURM_GPUS_ON_NODE=1", "1 GPU (SLURM_GPUS_ON_NODE)"),
        // With Slurm's pmi2 plugin, the manager is still Slurm.
        (STEP, "PMI_RANK=1\nPMI_SIZE=2\nPMI_FD=7", "Slurm: 2 nodes"),
        // mpirun within a job of Slurm: mpirun's daemons are tasks of a step.
        (STEP, "OMPI_COMM_WORLD_SIZE=2\nOMPI_COMM_WORLD_RANK=0", "Open MPI: 2 nodes"),
        // The shell of `salloc` on a node of the job is a step of Slurm's own.
        (
            STEP,
            "SLURM_STEP_ID=4294967290\nSLURM_STEP_TASKS_PER_NODE=8",
            "Slurm: run id 4711 (SLURM_JOB_ID), 8 GPUs",
        ),
        (OPEN_MPI_4, "OMPI_MCA_orte_hnp_uri=1.0;tcp://127.0.0.1:1", "(OMPI_COMM_WORLD_RANK), run id"),
        // mpirun's node is not a node of the job, which only rank 0 can see.
        (OPEN_MPI_4, "OMPI_COMM_WORLD_RANK=0", "node rank 0 (OMPI_COMM_WORLD_RANK), run id"),
        (
            OPEN_MPI_5,
            "PMIX_SERVER_URI41=prterun-gpu-a-3903919@0.1;tcp4://10.0.0.7:57983",
            "node rank 0 (OMPI_COMM_WORLD_RANK), run id",
        ),
        (
            OPEN_MPI_5,
            "OMPI_COMM_WORLD_SIZE=1",
            "1 node (OMPI_COMM_WORLD_SIZE), node rank 0 (OMPI_COMM_WORLD_RANK), run",
        ),
        (PYTORCH_JOB, "WORLD_SIZE=1\nRANK=0", "1 node (WORLD_SIZE), node rank 0 (RANK)"),
        // A newer PyTorchJob with 8 processes on each of 3 nodes.
        (
            PYTORCH_JOB,
            "WORLD_SIZE=24\nPET_NNODES=3\nPET_NODE_RANK=2",
            "Kubernetes: node rank 2 (RANK), master digits-master-0:23456",
        ),
        (JOB_SET, "RANK=1", "node rank 1 (RANK)"),
        (JOB_SET, "MASTER_ADDR=a\nMASTER_PORT=1", "master a:1 (MASTER_ADDR, MASTER_PORT)"),
        (JOB_SET, "REPLICATED_JOB_NAME=", "node rank 3 (JOB_COMPLETION_INDEX), run id"),
        // A sweep of jobs with one node each.
        (JOB_SET, "WORLD_SIZE=\nJOBSET_NAME=", "Kubernetes: node rank 3 (JOB_COMPLETION_INDEX)"),
    ] {
        let line = line(&format!("{environment}\n{changes}"));
        assert!(line.contains(expected), "{changes}: {line}");
    }
}

/// Returns the variables of a node of a step on 127.0.0.1, .2 and .4 whose first component is .4,
/// like Slurm 22.05 sets them. `names` is the word for components in the variables' names.
fn heterogeneous(node: u32, id: u32, names: &str) -> String {
    format!(
        "SLURMD_NODENAME=127.0.0.{node}
        SLURM_HET_SIZE=2
        SLURM_JOB_ID=5
        SLURM_JOB_NODELIST=127.0.0.[1-2,4]
        SLURM_JOB_NODELIST_{names}_GROUP_0=127.0.0.4
        SLURM_JOB_NODELIST_{names}_GROUP_1=127.0.0.[1-2]
        SLURM_JOB_NUM_NODES=3
        SLURM_NNODES=3
        SLURM_NODEID={id}
        SLURM_PROCID={id}
        SLURM_STEP_ID=0
        SLURM_STEP_NODELIST=127.0.0.[1-2,4]
        SLURM_STEP_NUM_NODES=3
        SLURM_STEP_TASKS_PER_NODE=1(x3)"
    )
}

/// Returns node rank and master.
fn place(environment: &str) -> (u32, String) {
    let cluster = detected(environment).unwrap().unwrap();
    (cluster.node_rank.unwrap().value, cluster.master_addr.unwrap().value)
}

#[test]
fn node_0_of_a_heterogeneous_job_is_the_first_host_of_its_first_component() {
    for names in ["HET", "PACK"] {
        for (node, id) in [(4, 0), (1, 1), (2, 2)] {
            assert_eq!(place(&heterogeneous(node, id, names)), (id, "127.0.0.4".into()), "{names} {node}");
        }
    }
    // `srun --het-group=1`: the step consists of the second component.
    for (node, id) in [(1, 0), (2, 1)] {
        let changes = "SLURM_NNODES=2\nSLURM_STEP_NUM_NODES=2\nSLURM_STEP_NODELIST=127.0.0.[1-2]";
        let environment = format!("{}\n{changes}", heterogeneous(node, id, "HET"));
        assert_eq!(place(&environment), (id, "127.0.0.1".into()));
    }
    // A step on some nodes of a component has the order of its own list.
    let changes = "SLURM_NNODES=2\nSLURM_STEP_NUM_NODES=2\nSLURM_STEP_NODELIST=127.0.0.[2,4]";
    assert_eq!(place(&format!("{}\n{changes}", heterogeneous(4, 1, "HET"))), (1, "127.0.0.2".into()));
}

#[test]
fn node_ranks_follow_the_list_that_the_master_is_taken_from() {
    // `srun -m arbitrary` on 127.0.0.3, .1 and .2: SLURM_PROCID follows the file, and the list is
    // sorted. If a release numbered the nodes by the file as well, node 0 would be another host
    // than the first of the list.
    for numbered in [["2", "0", "1"], ["0", "1", "2"]] {
        for (place_of_node, node) in ["3", "1", "2"].iter().enumerate() {
            let environment = format!(
                "{STEP}\nSLURM_STEP_NODELIST=127.0.0.[1-3]\nSLURM_STEP_NUM_NODES=3\nSLURM_STEP_TASKS_PER_NODE=1(x3)
                SLURM_DISTRIBUTION=arbitrary\nSLURMD_NODENAME=127.0.0.{node}\nSLURM_NODEID={}",
                numbered[place_of_node]
            );
            let rank = node.parse::<u32>().unwrap() - 1;
            assert_eq!(place(&environment), (rank, "127.0.0.1".into()), "{numbered:?} {node}");
        }
    }
    // If its name is not in the list, a node keeps SLURM_NODEID.
    assert_eq!(place(&format!("{STEP}\nSLURMD_NODENAME=other")), (1, "node003".into()));
}

#[test]
fn a_shell_of_srun_with_a_terminal_is_told_of_standalone() {
    let shell = format!("{STEP}\nSLURM_PTY_PORT=41875");
    let hint = detected(&shell).unwrap().unwrap().hint.unwrap();
    assert!(hint.contains("--standalone") && hint.contains("2 nodes"), "{hint}");
    let error = detected(&format!("{shell}\nSLURM_STEP_TASKS_PER_NODE=8")).unwrap_err();
    assert!(error.contains("--standalone"), "{error}");
    let error = detected(&format!("{STEP}\nSLURM_STEP_TASKS_PER_NODE=8")).unwrap_err();
    assert!(!error.contains("--standalone"), "{error}");
    let one = format!("{shell}\nSLURM_STEP_NUM_NODES=1\nSLURM_NODEID=0\nSLURM_STEP_TASKS_PER_NODE=1");
    assert_eq!(detected(&one).unwrap().unwrap().hint, None);
}

#[test]
fn outside_of_a_cluster_nothing_is_taken() {
    for environment in [
        "",
        "MASTER_ADDR=a\nMASTER_PORT=1\nRANK=1\nWORLD_SIZE=2",
        // A pod that is not part of a job.
        "KUBERNETES_SERVICE_HOST=10.96.0.1",
        "KUBERNETES_SERVICE_HOST=10.96.0.1\nMASTER_ADDR=a\nWORLD_SIZE=2",
        "JOB_COMPLETION_INDEX=1\nRANK=1\nWORLD_SIZE=2",
        "PMI_RANK=0\nPMI_SIZE=2",
        "SLURM_NODEID=1\nSLURM_NNODES=4",
        "SLURM_JOB_ID=",
        // In a rank.
        &format!("{PYTORCH_JOB}\nICE_ROUND=0"),
        &format!("{PYTORCH_JOB}\nTORCHELASTIC_RUN_ID=none"),
        &format!("{STEP}\nICE_ROUND=0"),
    ] {
        assert_eq!(line(environment), "none", "{environment}");
    }
}

#[test]
fn a_shell_of_a_job_of_several_nodes_is_told_how_to_start_on_all() {
    let hint = |environment: &str| detected(environment).unwrap().unwrap().hint.unwrap_or_default();
    let salloc = "SLURM_JOB_ID=7\nSLURM_NNODES=2\nSLURM_JOB_NODELIST=a,b";
    let interactive = format!("{STEP}\nSLURM_STEP_ID=4294967290\nSLURM_NODEID=0");
    for environment in [BATCH, salloc, &interactive] {
        let hint = hint(environment);
        assert!(hint.contains("srun --ntasks-per-node=1 ice-launch") && !hint.contains('\n'), "{hint}");
    }
    for environment in [STEP, &format!("{BATCH}\nSLURM_JOB_NUM_NODES=1\nSLURM_NNODES=1")] {
        assert_eq!(hint(environment), "");
    }
}

#[test]
fn mistakes_name_variable_value_and_remedy() {
    for (environment, changes, named) in [
        (
            STEP,
            "SLURM_STEP_TASKS_PER_NODE=2(x3),1",
            &["SLURM_STEP_TASKS_PER_NODE", "`2(x3),1`", "--ntasks-per-node=1"][..],
        ),
        (STEP, "SLURM_STEP_TASKS_PER_NODE=1(x3),4", &["`1(x3),4`", "--ntasks-per-node=1"]),
        (STEP, "SLURM_STEP_TASKS_PER_NODE=\nSLURM_NTASKS_PER_NODE=8", &["SLURM_NTASKS_PER_NODE", "`8`"]),
        (STEP, "SLURM_STEP_TASKS_PER_NODE=x", &["`x`", "2(x3),1"]),
        (STEP, "SLURM_NODEID=2", &["SLURM_NODEID", "`2`", "0 to 1", "SLURM_STEP_NUM_NODES"]),
        (STEP, "SLURM_NODEID=-1", &["SLURM_NODEID", "`-1`", "--node-rank"]),
        (STEP, "SLURM_STEP_NUM_NODES=0", &["SLURM_STEP_NUM_NODES", "`0`", "--nnodes"]),
        (STEP, "SLURM_STEP_NODELIST=node[3-", &["SLURM_STEP_NODELIST", "`node[3-`", "--master-addr"]),
        (STEP, "SLURM_JOB_ID=abc", &["SLURM_JOB_ID", "`abc`", "--master-port"]),
        (STEP, "SLURM_GPUS_ON_NODE=many", &["SLURM_GPUS_ON_NODE", "`many`", "--devices"]),
        (STEP, "SLURM_GPUS_ON_NODE=\nSLURM_STEP_GPUS=3-1", &["SLURM_STEP_GPUS", "`3-1`", "--devices"]),
        (
            OPEN_MPI_4,
            "OMPI_COMM_WORLD_LOCAL_SIZE=8",
            &["OMPI_COMM_WORLD_LOCAL_SIZE", "`8`", "--map-by ppr:1:node"],
        ),
        ("PMI_SIZE=2\nPMI_RANK=1", "MPI_LOCALNRANKS=2", &["MPI_LOCALNRANKS", "`2`", "-ppn 1"]),
        // Kubernetes sets this value in every pod if there is a service with the name `master`.
        (
            PYTORCH_JOB,
            "MASTER_PORT=tcp://10.0.0.1:80",
            &["MASTER_PORT", "`tcp://10.0.0.1:80`", "--master-port"],
        ),
        (PYTORCH_JOB, "RANK=3", &["RANK", "`3`", "WORLD_SIZE is 3"]),
        (JOB_SET, "WORLD_SIZE=four", &["WORLD_SIZE", "`four`", "--nnodes"]),
    ] {
        let error = detected(&format!("{environment}\n{changes}")).unwrap_err();
        assert!(named.iter().all(|part| error.contains(part)), "{changes}: {error}");
    }
}
