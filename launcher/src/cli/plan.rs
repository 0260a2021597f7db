use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use ice_proto::backend::{DistBackend, RankDevice};

use super::{LaunchArgs, PerRank, Program, devices};

/// torchrun's port.
const DEFAULT_PORT: u16 = 29500;

/// An option that cannot be carried out: its name, its value, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{option}: {problem}")]
pub struct UsageError {
    option: &'static str,
    problem: String,
}

impl UsageError {
    pub(crate) fn new(option: &'static str, problem: String) -> Self {
        Self { option, problem }
    }
}

/// What is to be launched, checked as far as that is possible before anything is started.
#[derive(Debug, Clone)]
pub struct LaunchPlan {
    /// What is started.
    pub program: Program,
    /// One device per rank of this node.
    pub devices: Vec<RankDevice>,
    /// Backend of the collectives.
    pub backend: DistBackend,
    /// Number of nodes.
    pub nnodes: u32,
    /// Rank of this node, where given.
    pub node_rank: Option<u32>,
    /// Host of node 0.
    pub master_addr: String,
    /// Port of node 0; 0 for a free one.
    pub master_port: u16,
    /// Identifier of the job.
    pub run_id: String,
    /// Name of the role.
    pub role: String,
    /// Restarts of the worker group.
    pub max_restarts: u32,
    /// Period of progress lines.
    pub monitor_interval: Duration,
    /// Time from SIGTERM to SIGKILL.
    pub shutdown_timeout: Duration,
    /// Threads per rank, where given.
    pub omp_num_threads: Option<u32>,
    /// Streams that go to files.
    pub redirects: PerRank,
    /// Streams that go to files and to the console.
    pub tee: PerRank,
    /// Folder for the logs, where given.
    pub log_dir: Option<PathBuf>,
}

impl LaunchPlan {
    /// Checks the arguments.
    ///
    /// # Errors
    /// [`UsageError`] names the option.
    pub fn new(args: &LaunchArgs, program: Program) -> Result<Self, UsageError> {
        let devices = devices::parse(&args.devices, devices::count_gpus())
            .map_err(|problem| UsageError::new("--devices", format!("`{}`: {problem}", args.devices)))?;
        let nnodes = nnodes(&args.nnodes)?;
        if nnodes > 1 && args.node_rank.is_none() {
            let problem = format!(
                "missing, and --nnodes is {nnodes}: give each node its own, from 0 to {}",
                nnodes - 1
            );
            return Err(UsageError::new("--node-rank", problem));
        }
        if let Some(rank) = args.node_rank.filter(|rank| *rank >= nnodes) {
            let problem = format!("{rank} with --nnodes {nnodes}: node ranks go from 0 to {}", nnodes - 1);
            return Err(UsageError::new("--node-rank", problem));
        }
        if args.run_id.is_empty() || args.run_id.contains('/') {
            return Err(UsageError::new(
                "--run-id",
                format!("`{}` is part of file names: no `/`", args.run_id),
            ));
        }
        if args.omp_num_threads == Some(0) {
            return Err(UsageError::new("--omp-num-threads", "0: a rank needs a thread".into()));
        }
        let streams =
            |option, text: &str| PerRank::parse(text).map_err(|problem| UsageError::new(option, problem));
        Ok(Self {
            program,
            backend: backend(&args.dist_backend, &devices)?,
            devices,
            nnodes,
            node_rank: args.node_rank,
            master_addr: args.master_addr.clone(),
            master_port: args.master_port.unwrap_or(if nnodes > 1 { DEFAULT_PORT } else { 0 }),
            run_id: args.run_id.clone(),
            role: args.role.clone(),
            max_restarts: args.max_restarts,
            monitor_interval: seconds("--monitor-interval", args.monitor_interval)?,
            shutdown_timeout: seconds("--shutdown-timeout", args.shutdown_timeout)?,
            omp_num_threads: args.omp_num_threads,
            redirects: streams("--redirects", &args.redirects)?,
            tee: streams("--tee", &args.tee)?,
            log_dir: args.log_dir.clone(),
        })
    }

    /// Whether this agent hosts the coordinator and the store.
    pub fn is_host(&self) -> bool {
        self.node_rank.unwrap_or(0) == 0
    }
}

fn nnodes(text: &str) -> Result<u32, UsageError> {
    let wrong = |problem: &str| UsageError::new("--nnodes", format!("`{text}`: {problem}"));
    let number = |text: &str| text.parse::<u32>().map_err(|_| wrong("expected N, or MIN:MAX with MIN = MAX"));
    let (fewest, most) = text.split_once(':').unwrap_or((text, text));
    let (fewest, most) = (number(fewest)?, number(most)?);
    if fewest == 0 {
        return Err(wrong("a job needs at least 1 node"));
    }
    if fewest != most {
        return Err(wrong("static endpoints need a fixed number of nodes: give N"));
    }
    Ok(most)
}

fn backend(text: &str, devices: &[RankDevice]) -> Result<DistBackend, UsageError> {
    let on_cpu = devices.contains(&RankDevice::Cpu);
    let shared = devices.iter().collect::<BTreeSet<_>>().len() < devices.len();
    let wrong = |problem: String| UsageError::new("--dist-backend", problem);
    match text {
        "auto" if on_cpu => Ok(DistBackend::Gloo),
        "auto" if shared => {
            tracing::warn!("the same GPU serves several ranks, which NCCL cannot: using gloo");
            Ok(DistBackend::Gloo)
        }
        "auto" => Ok(DistBackend::Nccl),
        "nccl" if on_cpu => Err(wrong("nccl needs --devices cuda: use gloo for cpu".into())),
        _ => text.parse().map_err(|error| wrong(format!("{error}, or `auto`"))),
    }
}

fn seconds(option: &'static str, value: f64) -> Result<Duration, UsageError> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| UsageError::new(option, format!("{value} is not a number of seconds")))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn plan(args: &[&str]) -> Result<LaunchPlan, String> {
        let cli = Cli::try_parse_from(["ice-launch"].iter().chain(args).chain(&["sh"])).unwrap();
        let program = Program { path: "/bin/sh".into(), args: Vec::new() };
        LaunchPlan::new(&cli.launch, program).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults() {
        let plan = plan(&["--devices", "cpu"]).unwrap();
        assert_eq!((plan.nnodes, plan.master_port, plan.max_restarts), (1, 0, 0));
        assert!(plan.is_host() && plan.redirects.is_empty());
        assert_eq!(plan.backend, DistBackend::Gloo);
    }

    #[test]
    fn several_nodes_use_torchruns_port() {
        let plan = plan(&["--nnodes", "2:2", "--node_rank", "1", "--devices", "cpu:0-1"]).unwrap();
        assert_eq!((plan.nnodes, plan.master_port, plan.is_host()), (2, 29500, false));
    }

    #[test]
    fn mistakes_name_option_value_and_remedy() {
        for (args, named) in [
            (&["--nnodes", "0"][..], &["--nnodes", "`0`", "at least 1"][..]),
            (&["--nnodes", "x"], &["--nnodes", "`x`"]),
            (&["--nnodes", "1:3"], &["`1:3`", "fixed number"]),
            (&["--nnodes", "2"], &["--node-rank", "0 to 1"]),
            (&["--nnodes", "2", "--node-rank", "2"], &["--node-rank", "2", "0 to 1"]),
            (&["--devices", "cpu:a"], &["--devices", "`cpu:a`", "`a`"]),
            (&["--devices", "cpu", "--dist-backend", "nccl"], &["--dist-backend", "gloo"]),
            (&["--devices", "cpu", "--dist-backend", "mpi"], &["--dist-backend", "`mpi`"]),
            (&["--devices", "cpu", "--tee", "9"], &["--tee", "`9`"]),
            (&["--devices", "cpu", "--shutdown-timeout=-1"], &["--shutdown-timeout", "-1"]),
        ] {
            let error = plan(args).unwrap_err();
            assert!(named.iter().all(|part| error.contains(part)), "{args:?}: {error}");
        }
    }

    #[test]
    fn the_programs_own_options_are_left_alone() {
        let cli =
            Cli::try_parse_from(["ice-launch", "--devices", "cpu", "prog", "--devices", "x", "-t"]).unwrap();
        assert_eq!(cli.command, ["prog", "--devices", "x", "-t"]);
        assert_eq!(cli.launch.devices, "cpu");
    }
}
