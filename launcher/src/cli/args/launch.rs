use std::path::PathBuf;

use super::{RdzvArgs, RendezvousArgs, defaults, values, without_empty_variable};
use clap::Args;
use clap::builder::FalseyValueParser;

// A comment that clap can read would become the help text of each program that flattens these
// options.
#[doc = concat!(
    "The options of the launcher. What is `None` is taken from the cluster, or else has the default that its help names.\n\n",
    "The default is a command line without options, whatever the environment."
)]
#[derive(Args, Debug, Clone, PartialEq)]
#[command(mut_args(without_empty_variable))]
pub struct LaunchArgs {
    /// Devices, one rank each: cuda:0-3, cpu:0-1
    ///
    /// Or auto, cpu, cuda, cuda:*, cuda:1,3, cuda:0-2,7 [default: auto]
    #[arg(long, help_heading = "Ranks", value_name = "DEVICES")]
    pub devices: Option<String>,
    /// Backend of the collectives: auto, gloo or nccl
    #[arg(
        long,
        alias = "dist_backend",
        value_name = "NAME",
        default_value = "auto",
        help_heading = "Ranks",
        hide_short_help = true
    )]
    pub dist_backend: String,
    /// Name of the role of the ranks
    #[arg(
        long,
        env = "PET_ROLE",
        hide_env = true,
        default_value = "default",
        help_heading = "Ranks",
        hide_short_help = true
    )]
    pub role: String,
    /// Threads of each rank [default: OMP_NUM_THREADS, else its share of the cores]
    #[arg(
        long,
        alias = "omp_num_threads",
        value_name = "N",
        help_heading = "Ranks",
        value_parser = values::count,
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    pub omp_num_threads: Option<u32>,
    /// Bind each rank to the CPUs near its device: node, socket, exclusive or core-complex
    #[arg(long, alias = "numa_binding", value_name = "HOW", help_heading = "Ranks", hide_short_help = true)]
    pub numa_binding: Option<String>,
    /// Each rank sees one GPU, as device 0, and has LOCAL_RANK 0
    #[arg(
        long,
        alias = "virtual_local_rank",
        env = "PET_VIRTUAL_LOCAL_RANK",
        hide_env = true,
        value_parser = FalseyValueParser::new(),
        help_heading = "Ranks",
        hide_short_help = true
    )]
    pub virtual_local_rank: bool,

    /// Nodes, or MIN:MAX for an elastic job
    ///
    /// A job with MIN:MAX starts with MIN nodes, and may lose and gain some [default: 1]
    #[arg(long, value_name = "N|MIN:MAX", env = "PET_NNODES", hide_env = true, help_heading = "Nodes")]
    pub nnodes: Option<String>,
    /// Rank of this node, from 0
    #[arg(
        long,
        alias = "node_rank",
        value_name = "RANK",
        env = "PET_NODE_RANK",
        hide_env = true,
        help_heading = "Nodes",
        value_parser = values::count,
        allow_hyphen_values = true
    )]
    pub node_rank: Option<u32>,
    /// Address of node 0 [default: 127.0.0.1]
    #[arg(
        long,
        alias = "master_addr",
        value_name = "HOST",
        env = "PET_MASTER_ADDR",
        hide_env = true,
        help_heading = "Nodes"
    )]
    pub master_addr: Option<String>,
    /// Port of node 0 [default: 29500 with several nodes, a free one with one]
    #[arg(
        long,
        alias = "master_port",
        value_name = "PORT",
        env = "PET_MASTER_PORT",
        hide_env = true,
        help_heading = "Nodes",
        value_parser = values::port,
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    pub master_port: Option<u16>,
    /// Identifier of the job, the same on all nodes [default: none]
    #[arg(long, alias = "run_id", value_name = "ID", help_heading = "Nodes", hide_short_help = true)]
    pub run_id: Option<String>,
    /// File with a secret that all agents of the job share; ICE_RDZV_TOKEN may hold the secret
    /// itself
    #[arg(
        long,
        alias = "rdzv_token_file",
        value_name = "FILE",
        help_heading = "Nodes",
        hide_short_help = true
    )]
    pub rdzv_token_file: Option<PathBuf>,
    /// Encrypt the traffic between agents; for all agents of a job or none, and with a token.
    /// ICE_RDZV_TLS=1 does the same
    #[arg(
        long,
        alias = "rdzv_tls",
        env = ice_proto::env::ICE_RDZV_TLS,
        hide_env = true,
        value_parser = FalseyValueParser::new(),
        help_heading = "Nodes",
        hide_short_help = true
    )]
    pub rdzv_tls: bool,
    /// torchrun's ways to say where the nodes meet.
    #[command(flatten)]
    pub rdzv: RdzvArgs,
    /// Settings that `--rdzv-conf` and `--rdzv-backend` add.
    #[arg(skip)]
    pub(crate) rendezvous: RendezvousArgs,

    /// Restarts after failures
    ///
    /// All ranks are started again. A job whose attempts keep failing within 10 s of their start
    /// ends earlier, see --crash-loop-limit
    #[arg(
        long,
        alias = "max_restarts",
        value_name = "N",
        env = "PET_MAX_RESTARTS",
        hide_env = true,
        default_value_t = 0,
        help_heading = "Failures",
        value_parser = values::count,
        allow_hyphen_values = true
    )]
    pub max_restarts: u32,
    /// Only failures within this many seconds count against --max-restarts [default: all of the
    /// job's]
    #[arg(
        long,
        alias = "restart_window",
        value_name = "SECONDS",
        help_heading = "Failures",
        value_parser = values::seconds,
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    pub restart_window: Option<f64>,
    /// Pause before the second restart in a row within 10 s of a start; doubled for each further
    /// one
    #[arg(
        long,
        alias = "restart_backoff",
        value_name = "SECONDS",
        default_value_t = 1.0,
        help_heading = "Failures",
        value_parser = values::seconds,
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    pub restart_backoff: f64,
    /// Give up after this number of attempts in a row that failed within 10 s of their start; 0 for
    /// never, like torchrun [default: 5]
    #[arg(
        long,
        alias = "crash_loop_limit",
        value_name = "N",
        help_heading = "Failures",
        value_parser = values::count,
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    pub crash_loop_limit: Option<u32>,
    /// Exit codes of a rank that no restart can help: 2,64-78
    #[arg(
        long,
        alias = "fatal_exit_codes",
        value_name = "LIST",
        help_heading = "Failures",
        hide_short_help = true
    )]
    pub fatal_exit_codes: Option<String>,
    /// Longest time without progress; 0 for any
    ///
    /// A job without progress for longer has failed. Progress is a step of a program made with ice,
    /// a touch of ICE_HEARTBEAT_FILE, and for other programs CPU time, so that a rank which spins
    /// counts as working [default: 600, any for CPU time]
    #[arg(
        long,
        alias = "hang_timeout",
        value_name = "SECONDS",
        help_heading = "Failures",
        value_parser = values::seconds,
        allow_hyphen_values = true
    )]
    pub hang_timeout: Option<f64>,
    /// Parked processes, started and loaded, that replace dead ranks of this node; for programs
    /// made with ice, and for Python with --preload
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        help_heading = "Failures",
        value_parser = values::count,
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    pub spares: u32,
    /// Interval of checks for --hang-timeout; failures are noticed at once
    #[arg(
        long,
        alias = "monitor_interval",
        value_name = "SECONDS",
        env = "PET_MONITOR_INTERVAL",
        hide_env = true,
        default_value_t = 0.1,
        help_heading = "Failures",
        value_parser = values::seconds,
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    pub monitor_interval: f64,
    /// Time that ranks have to end before they are killed [default: TORCH_ELASTIC_SHUTDOWN_TIMEOUT,
    /// else 30]
    #[arg(
        long,
        alias = "shutdown_timeout",
        value_name = "SECONDS",
        env = "PET_SHUTDOWN_TIMEOUT",
        hide_env = true,
        help_heading = "Failures",
        value_parser = values::seconds,
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    pub shutdown_timeout: Option<f64>,
    /// Signals that stop the job; they are passed on to the ranks
    #[arg(
        long,
        alias = "signals_to_handle",
        value_name = "LIST",
        env = "PET_SIGNALS_TO_HANDLE",
        hide_env = true,
        default_value = "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        help_heading = "Failures",
        hide_short_help = true
    )]
    pub signals_to_handle: String,
    /// Source of a notice that this machine, or the job's time, is taken away: a file that appears,
    /// http://… (status 200), aws, azure, gcp, or a signal; may be repeated. The node leaves after
    /// a checkpoint, like on SIGTERM
    #[arg(
        long,
        alias = "preempt_notice",
        value_name = "SOURCE",
        help_heading = "Failures",
        hide_short_help = true
    )]
    pub preempt_notice: Vec<String>,
    /// Exit code of a job that has to be started again because it was preempted
    #[arg(
        long,
        alias = "requeue_exit_code",
        value_name = "CODE",
        default_value_t = 75,
        value_parser = clap::value_parser!(u8).range(1..),
        help_heading = "Failures",
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    pub requeue_exit_code: u8,

    /// Streams that go to files: 0 none, 1 stdout, 2 stderr, 3 both, or rank:value,…
    #[arg(
        short,
        long,
        value_name = "STREAMS",
        env = "PET_REDIRECTS",
        hide_env = true,
        default_value = "0",
        help_heading = "Output",
        hide_short_help = true
    )]
    pub redirects: String,
    /// To files, too: 1 stdout, 2 stderr, 3 both
    ///
    /// The console gets each line with its rank. 0 for none, or rank:value,… [default: 0]
    #[arg(
        short,
        long,
        value_name = "STREAMS",
        env = "PET_TEE",
        hide_env = true,
        default_value = "0",
        hide_default_value = true,
        help_heading = "Output"
    )]
    pub tee: String,
    /// Folder for logs [default: a temporary one]
    #[arg(
        long,
        alias = "log_dir",
        value_name = "DIR",
        env = "PET_LOG_DIR",
        hide_env = true,
        help_heading = "Output"
    )]
    pub log_dir: Option<PathBuf>,
    /// Only these local ranks reach the console: 0,1,2
    #[arg(
        long,
        alias = "local_ranks_filter",
        value_name = "RANKS",
        env = "PET_LOCAL_RANKS_FILTER",
        hide_env = true,
        default_value = "",
        hide_default_value = true,
        help_heading = "Output",
        hide_short_help = true
    )]
    pub local_ranks_filter: String,
    /// Lines of logged stdout that contain one of these go to filtered_stdout.log too: apple,orange
    /// (`,,` is a comma)
    #[arg(
        long,
        alias = "duplicate_stdout_filters",
        value_name = "TEXTS",
        env = "PET_DUPLICATE_STDOUT_FILTERS",
        hide_env = true,
        default_value = "",
        hide_default_value = true,
        help_heading = "Output",
        hide_short_help = true
    )]
    pub duplicate_stdout_filters: String,
    /// The same for stderr and filtered_stderr.log
    #[arg(
        long,
        alias = "duplicate_stderr_filters",
        value_name = "TEXTS",
        env = "PET_DUPLICATE_STDERR_FILTERS",
        hide_env = true,
        default_value = "",
        hide_default_value = true,
        help_heading = "Output",
        hide_short_help = true
    )]
    pub duplicate_stderr_filters: String,
    /// Put before each line of --tee: ${role_name}, ${rank}, ${local_rank}, ${node_rank},
    /// ${hostname}, ${run_id}
    /// [default: TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE, else [${role_name}${rank}]:]
    #[arg(
        long,
        alias = "log_prefix",
        value_name = "TEMPLATE",
        visible_alias = "log-line-prefix-template",
        alias = "log_line_prefix_template",
        env = "PET_LOG_LINE_PREFIX_TEMPLATE",
        hide_env = true,
        help_heading = "Output",
        hide_short_help = true
    )]
    pub log_prefix: Option<String>,
    /// Size at which a log file is rotated: 100M, 2G [default: never]
    #[arg(
        long,
        alias = "log_max_size",
        value_name = "SIZE",
        help_heading = "Output",
        hide_short_help = true
    )]
    pub log_max_size: Option<String>,
    /// Number of full log files that are kept in addition to the current one
    #[arg(
        long,
        alias = "log_keep",
        value_name = "N",
        default_value_t = 5,
        help_heading = "Output",
        value_parser = values::count,
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    pub log_keep: u32,
    /// Append every event to this file, one JSON object per line
    #[arg(long, value_name = "FILE", help_heading = "Output", hide_short_help = true)]
    pub events: Option<PathBuf>,
    /// Interval of progress lines of ranks that report progress; 0 for none. On a terminal one line
    /// is rewritten in place if all output passes through the launcher
    #[arg(
        long,
        alias = "progress_interval",
        value_name = "SECONDS",
        default_value_t = 2.0,
        help_heading = "Output",
        value_parser = values::seconds,
        allow_hyphen_values = true,
        hide_short_help = true
    )]
    pub progress_interval: f64,
}

impl Default for LaunchArgs {
    fn default() -> Self {
        defaults()
    }
}
