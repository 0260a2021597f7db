use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser};

/// Starts a program once per device, on one or many nodes, and watches over it.
#[derive(Parser, Debug)]
#[command(
    name = "ice-launch",
    version,
    after_help = "Exit codes: 0 all ranks succeeded · 1 the job failed · 2 wrong usage, nothing was started ·\n126/127 the program cannot be executed or found · 128+n ended by signal n · else the failed rank's own"
)]
pub struct Cli {
    /// How to launch.
    #[command(flatten)]
    pub launch: LaunchArgs,
    /// The program and its arguments; a `.py` file runs with the `python` of the PATH.
    #[arg(required = true, trailing_var_arg = true, value_names = ["PROGRAM", "ARGS"])]
    pub command: Vec<OsString>,
}

/// The options of the launcher.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Launch")]
pub struct LaunchArgs {
    /// Devices of this node, one rank each: auto, cpu, cuda, cuda:*, cuda:1,3, cuda:0-2,7, cpu:0-3
    #[arg(long, default_value = "auto")]
    pub devices: String,
    /// Number of nodes
    #[arg(long, value_name = "N", default_value = "1")]
    pub nnodes: String,
    /// Rank of this node, from 0
    #[arg(long, alias = "node_rank", value_name = "RANK")]
    pub node_rank: Option<u32>,
    /// Address of node 0
    #[arg(long, alias = "master_addr", value_name = "HOST", default_value = "127.0.0.1")]
    pub master_addr: String,
    /// Port of node 0; 29500 with several nodes, a free one with one
    #[arg(long, alias = "master_port", value_name = "PORT")]
    pub master_port: Option<u16>,
    /// Backend of the collectives: auto, gloo or nccl
    #[arg(long, alias = "dist_backend", value_name = "NAME", default_value = "auto")]
    pub dist_backend: String,
    /// Identifier of the job
    #[arg(long, alias = "run_id", value_name = "ID", default_value = "none")]
    pub run_id: String,
    /// Name of the role of the ranks
    #[arg(long, default_value = "default")]
    pub role: String,
    /// Threads of each rank; 1 where there are several ranks, unless OMP_NUM_THREADS is set
    #[arg(long, alias = "omp_num_threads", value_name = "N")]
    pub omp_num_threads: Option<u32>,
    /// How often the ranks are started again after a failure
    #[arg(long, alias = "max_restarts", value_name = "N", default_value_t = 0, help_heading = "Supervision")]
    pub max_restarts: u32,
    /// Period of progress lines, in seconds; failures are seen at once
    #[arg(
        long,
        alias = "monitor_interval",
        value_name = "SECONDS",
        default_value_t = 2.0,
        help_heading = "Supervision"
    )]
    pub monitor_interval: f64,
    /// Time from SIGTERM to SIGKILL, in seconds
    #[arg(
        long,
        alias = "shutdown_timeout",
        value_name = "SECONDS",
        default_value_t = 30.0,
        help_heading = "Supervision"
    )]
    pub shutdown_timeout: f64,
    /// Streams that go to files: 0 none, 1 stdout, 2 stderr, 3 both, or rank:value,…
    #[arg(short, long, value_name = "STREAMS", default_value = "0", help_heading = "Output")]
    pub redirects: String,
    /// Streams that go to files and to the console, each line with its rank
    #[arg(short, long, value_name = "STREAMS", default_value = "0", help_heading = "Output")]
    pub tee: String,
    /// Folder for the logs; a temporary one unless given
    #[arg(long, alias = "log_dir", value_name = "DIR", help_heading = "Output")]
    pub log_dir: Option<PathBuf>,
}
