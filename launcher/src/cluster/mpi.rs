//! `mpirun` and `mpiexec`, which start one launcher per node, so that MPI's ranks are nodes.

use std::net::IpAddr;

use super::variables::Variables;
use super::{Cluster, ClusterError, Taken};

/// Detects Open MPI, of any version.
pub(super) fn open_mpi(variables: &Variables<'_>) -> Result<Option<Cluster>, ClusterError> {
    let (size, rank) = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK");
    if variables.text(&[size]).and(variables.text(&[rank])).is_none() {
        return Ok(None);
    }
    one_process_per_node(variables, "OMPI_COMM_WORLD_LOCAL_SIZE", "mpirun --map-by ppr:1:node")?;
    let mut cluster = Cluster {
        manager: "Open MPI",
        nnodes: variables.number(&[size], "--nnodes")?,
        node_rank: variables.number(&[rank], "--node-rank")?,
        run_id: variables.run_id(&["OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE"]),
        ..Cluster::default()
    };
    if !cluster.is_alone() {
        let first = cluster.node_rank.as_ref().is_some_and(|rank| rank.value == 0);
        cluster.master_addr = mpiruns_host(variables).filter(|_| !first || beside_mpirun(variables));
    }
    Ok(Some(cluster))
}

/// Detects Hydra, the `mpiexec` of MPICH and Intel MPI. Hydra has no variable for the host of rank
/// 0. Other starters with PMI, such as Slurm, do not set `MPI_LOCALNRANKS`.
pub(super) fn hydra(variables: &Variables<'_>) -> Result<Option<Cluster>, ClusterError> {
    let (size, rank, local) = ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS");
    if variables.text(&[size]).and(variables.text(&[rank])).and(variables.text(&[local])).is_none() {
        return Ok(None);
    }
    one_process_per_node(variables, local, "mpiexec -ppn 1")?;
    Ok(Some(Cluster {
        manager: "PMI",
        nnodes: variables.number(&[size], "--nnodes")?,
        node_rank: variables.number(&[rank], "--node-rank")?,
        ..Cluster::default()
    }))
}

fn one_process_per_node(
    variables: &Variables<'_>,
    local: &'static str,
    remedy: &str,
) -> Result<(), ClusterError> {
    match variables.text(&[local]) {
        Some(count) if count.value != "1" => Err(ClusterError::new(
            &count,
            format!("one launcher per node is needed, as it starts the ranks itself: use {remedy}"),
        )),
        _ => Ok(()),
    }
}

/// Returns the host of `mpirun`. This is the host of rank 0, unless `mpirun` starts no process on
/// its own node.
fn mpiruns_host(variables: &Variables<'_>) -> Option<Taken<String>> {
    // Up to version 4: `3195338752.0;tcp://10.1.5.5,172.17.0.1:10000`; older releases have one
    // address per `tcp://`.
    if let Some(uri) = variables.text(&["OMPI_MCA_orte_hnp_uri"]) {
        let value = address(&uri.value)?;
        return Some(Taken { value, variable: uri.variable });
    }
    // From version 5 on: `prterun-node001-4711@1`. The URI of the server is not used: it is this
    // node's, often with a loopback address.
    let job = variables.text(&["PMIX_NAMESPACE"])?;
    let name = job.value.strip_prefix("prterun-").or_else(|| job.value.strip_prefix("prte-"))?;
    let (host, process) = name.split_once('@')?.0.rsplit_once('-')?;
    let known = !host.is_empty() && !host.starts_with("localhost") && process.parse::<u32>().is_ok();
    known.then(|| Taken { value: host.to_owned(), variable: job.variable })
}

/// Whether the daemon of this node is `mpirun` itself, which has number 0. Only rank 0 can tell. If
/// the number is unknown, the answer is yes.
fn beside_mpirun(variables: &Variables<'_>) -> bool {
    let uri = variables.text(&[
        "OMPI_MCA_orte_local_daemon_uri",
        "PMIX_SERVER_URI41",
        "PMIX_SERVER_URI4",
        "PMIX_SERVER_URI3",
        "PMIX_SERVER_URI21",
        "PMIX_SERVER_URI2",
    ]);
    let number = uri.as_ref().and_then(|uri| uri.value.split(';').next()?.rsplit_once('.')?.1.parse().ok());
    number.is_none_or(|number: u32| number == 0)
}

/// Returns the first address of a URI that other nodes can reach.
fn address(uri: &str) -> Option<String> {
    let endpoints = uri.split(';').filter_map(|part| part.strip_prefix("tcp")?.split_once("://"));
    let addresses = endpoints.filter_map(|(_, endpoint)| endpoint.rsplit_once(':'));
    let addresses = addresses.flat_map(|(hosts, _)| hosts.trim_matches(['[', ']']).split(','));
    let mut reachable =
        addresses.filter_map(|address| address.parse::<IpAddr>().ok()).filter(|ip| match ip {
            IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local() && !ip.is_unspecified(),
            IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local() && !ip.is_unspecified(),
        });
    reachable.next().map(|ip| ip.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_every_age() {
        for (uri, expected) in [
            ("3236233216.0;tcp://172.20.102.82:33559;tcp://172.40.102.82:33559", Some("172.20.102.82")),
            ("3195338752.0;tcp://10.153.72.131,172.17.0.1:10000", Some("10.153.72.131")),
            ("723386368.0;usock;tcp://192.168.0.103:56672", Some("192.168.0.103")),
            ("1.0;tcp://127.0.0.1,169.254.95.120,10.3.1.121:1", Some("10.3.1.121")),
            ("1.0;tcp6://[fe80::1,2001:db8::7]:1", Some("2001:db8::7")),
            ("1.0;tcp://127.0.0.1:1", None),
            ("1.0", None),
            ("", None),
            ("1.0;tcp://:;tcp://", None),
        ] {
            assert_eq!(address(uri).as_deref(), expected, "{uri}");
        }
    }
}
