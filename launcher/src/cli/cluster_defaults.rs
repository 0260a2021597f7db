//! Takes values that are not on the command line from the cluster.

use super::{LaunchArgs, UsageError, devices};
use crate::cluster::{self, Cluster};

/// Fills in missing options from a cluster's variables, and adds one line to `notes` that names
/// values and sources.
pub(super) fn fill(
    args: &mut LaunchArgs,
    notes: &mut Vec<String>,
    lookup: &dyn Fn(&str) -> Option<String>,
) -> Result<(), UsageError> {
    let nnodes_given = args.nnodes.is_some();
    let mut cluster = match cluster::detect(lookup) {
        Ok(Some(cluster)) => cluster,
        Ok(None) => return Ok(()),
        // With --nnodes, the job does not depend on the cluster, so contradictory variables do not
        // matter.
        Err(_) if nnodes_given => return Ok(()),
        Err(error) => {
            return Err(UsageError::new(error.variable, format!("`{}`: {}", error.value, error.problem)));
        }
    };
    if let Some(hint) = cluster.hint.take().filter(|_| !nnodes_given) {
        notes.push(hint);
    }
    if nnodes_given {
        cluster.nnodes = None;
    }
    if let Some(nnodes) = &cluster.nnodes {
        args.nnodes = Some(nnodes.value.to_string());
    }
    let several = !matches!(args.nnodes.as_deref(), None | Some("1" | "1:1"));
    if several {
        take(&mut args.node_rank, &mut cluster.node_rank);
        take(&mut args.master_addr, &mut cluster.master_addr);
        take(&mut args.master_port, &mut cluster.master_port);
        if args.master_addr.is_none() && cluster.nnodes.is_some() {
            let problem =
                format!("missing, and {} does not say where node 0 is: give its host", cluster.manager);
            return Err(UsageError::new("--master-addr", problem));
        }
    } else {
        (cluster.node_rank, cluster.master_addr, cluster.master_port) = (None, None, None);
    }
    take(&mut args.run_id, &mut cluster.run_id);
    cluster.gpus = cluster.gpus.take().filter(|gpus| {
        // The other GPUs of this node may belong to other jobs, so the cluster's count limits the
        // ranks.
        let counts = args.devices.is_none() && (1..devices::count_gpus()).contains(&gpus.value);
        if counts {
            args.devices = Some(format!("cuda:0-{}", gpus.value - 1));
        }
        counts
    });
    if has_anything(&cluster) {
        notes.push(cluster.to_string());
    }
    Ok(())
}

/// Fills in a missing option. An option that was given is removed from `taken`, because it does not
/// come from the cluster.
fn take<T: Clone>(given: &mut Option<T>, taken: &mut Option<cluster::Taken<T>>) {
    match given {
        Some(_) => *taken = None,
        None => *given = taken.as_ref().map(|taken| taken.value.clone()),
    }
}

fn has_anything(cluster: &Cluster) -> bool {
    cluster.nnodes.is_some()
        || cluster.node_rank.is_some()
        || cluster.master_addr.is_some()
        || cluster.master_port.is_some()
        || cluster.run_id.is_some()
        || cluster.gpus.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: [(&str, &str); 7] = [
        ("SLURM_JOB_ID", "4711"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "1"),
        ("SLURM_NODEID", "1"),
        ("SLURM_STEP_NUM_NODES", "2"),
        ("SLURM_STEP_NODELIST", "node[03-04]"),
        ("SLURM_STEP_TASKS_PER_NODE", "1(x2)"),
    ];

    fn filled(mut args: LaunchArgs, variables: &[(&str, &str)]) -> Result<(LaunchArgs, Vec<String>), String> {
        let mut notes = Vec::new();
        let lookup =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        fill(&mut args, &mut notes, &lookup).map_err(|error| error.to_string())?;
        Ok((args, notes))
    }

    #[test]
    fn a_step_of_slurm_needs_no_flags() {
        let (args, notes) = filled(LaunchArgs::default(), &STEP).unwrap();
        assert_eq!((args.nnodes.as_deref(), args.node_rank), (Some("2"), Some(1)));
        assert_eq!((args.master_addr.as_deref(), args.run_id.as_deref()), (Some("node03"), Some("4711")));
        assert_eq!(notes.len(), 1, "{notes:?}");
        assert!(
            notes[0].contains("Slurm") && notes[0].contains("2 nodes (SLURM_STEP_NUM_NODES)"),
            "{notes:?}"
        );
    }

    #[test]
    fn a_flag_wins_and_is_not_said_to_be_the_clusters() {
        let given = LaunchArgs {
            nnodes: Some("2".into()),
            node_rank: Some(0),
            run_id: Some("mine".into()),
            master_addr: Some("here".into()),
            master_port: Some(7),
            ..LaunchArgs::default()
        };
        let (args, notes) = filled(given, &STEP).unwrap();
        assert_eq!((args.node_rank, args.run_id.as_deref()), (Some(0), Some("mine")));
        assert_eq!((args.master_addr.as_deref(), args.master_port), (Some("here"), Some(7)));
        assert_eq!(notes, [""; 0]);
        let (args, _) =
            filled(LaunchArgs { nnodes: Some("1".into()), ..LaunchArgs::default() }, &STEP).unwrap();
        assert_eq!((args.node_rank, args.master_addr), (None, None));
    }

    #[test]
    fn a_cluster_that_makes_no_sense_is_an_error_unless_nobody_asks_it() {
        let mut two = STEP;
        two[6].1 = "2(x2)";
        let error = filled(LaunchArgs::default(), &two).unwrap_err();
        assert!(error.contains("--ntasks-per-node=1"), "{error}");
        let one = LaunchArgs { nnodes: Some("1".into()), ..LaunchArgs::default() };
        assert!(filled(one, &two).is_ok());
    }

    #[test]
    fn where_node_0_is_must_be_known() {
        let hydra = [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALNRANKS", "1")];
        let error = filled(LaunchArgs::default(), &hydra).unwrap_err();
        assert!(error.contains("--master-addr"), "{error}");
    }
}
