use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use ice_agent::HangTimeout;
use ice_proto::backend::{DistBackend, RankDevice};
use ice_proto::env::TORCHELASTIC_TIMER_FILE;
use ice_proto::rendezvous::{MAX_NODES, MAX_ROLE_LEN, RestartPolicy};
use ice_rendezvous::{Backend, RendezvousConfig};
use nix::sys::signal::Signal;

use crate::placement::{self, NumaBinding};
use crate::preempt::Source;

use crate::logs::check_template;

use super::{LaunchArgs, PerRank, Program, cluster_defaults, devices, rendezvous, value_parsers};

/// torchrun's variable; with the value 1, ranks may set timers.
pub(super) const ENABLE_FILE_TIMER: &str = "TORCHELASTIC_ENABLE_FILE_TIMER";
/// Default of `--shutdown-timeout`, and torchrun's.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);
/// Default of `--crash-loop-limit`.
const CRASH_LOOP_LIMIT: u32 = 5;
/// Lower limit of `--monitor-interval`.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(1);
/// Maximum length of a run id in bytes. The name of a folder, which has at most 255 bytes, consists
/// of the run id and a few more.
const LONGEST_RUN_ID: usize = 200;
/// Limit for the threads of a rank, exclusive. A larger number is a typing error.
const MOST_THREADS: u32 = 1 << 16;
/// Maximum number of rotated log files. Each of them is renamed at every rotation.
const MOST_KEPT: u32 = 1000;
/// Default of `--log-prefix`.
const PREFIX: &str = "[${role_name}${rank}]:";
/// torchrun's variable for `--log-prefix`.
const PREFIX_VARIABLE: &str = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE";

/// An option that cannot be carried out: its name, its value, and the remedy.
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

/// The plan of a launch, checked as far as possible before any process is started.
#[derive(Debug, Clone)]
pub struct LaunchPlan {
    pub(crate) program: Program,
    /// Modules that ranks of Python programs find imported (`--preload`).
    pub(crate) preload: Vec<String>,
    /// Devices, one per rank of this node.
    pub(crate) devices: Vec<RankDevice>,
    pub(crate) backend: DistBackend,
    pub(crate) role: String,
    /// Threads per rank, if given.
    pub(crate) omp_num_threads: Option<u32>,
    pub(crate) virtual_local_rank: bool,
    /// CPUs of each rank, if ranks are bound to CPUs.
    pub(crate) cpus: Option<Vec<BTreeSet<u32>>>,
    /// Minimum and maximum number of nodes.
    pub(crate) nnodes: (u32, u32),
    /// Rank of this node, if given.
    pub(crate) node_rank: Option<u32>,
    pub(crate) place: Backend,
    /// Whether the agents use a rendezvous that torchrun calls dynamic.
    pub(crate) dynamic: bool,
    /// Whether rank 0 serves the ranks' store: `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`.
    pub(crate) rank_serves_store: bool,
    pub(crate) meeting: RendezvousConfig,
    /// Time that the host waits for the other agents to leave after the end of the job.
    pub(crate) close_timeout: Duration,
    pub(crate) run_id: String,
    pub(crate) restarts: RestartPolicy,
    /// Exit codes that end the job even if restarts are left.
    pub(crate) fatal_exit_codes: BTreeSet<u8>,
    pub(crate) hang_timeout: HangTimeout,
    /// Path of the pipe for torchrun's timers, if ranks may set them.
    pub(crate) file_timer: Option<FileTimer>,
    /// Number of parked processes that replace ranks which die.
    pub(crate) spares: u32,
    /// Interval of the checks for hangs.
    pub(crate) monitor_interval: Duration,
    /// Time from the request to end to SIGKILL.
    pub(crate) shutdown_timeout: Duration,
    /// Signals that stop the job.
    pub(crate) signals: Vec<Signal>,
    /// Sources of a notice that this node, or the job, will have to end.
    pub(crate) notices: Vec<Source>,
    pub(crate) requeue_exit_code: u8,
    pub(crate) logs: LogPlan,
    /// File for the events, if given.
    pub(crate) events: Option<PathBuf>,
    pub(crate) progress_interval: Duration,
    /// Notes for the user before the start, one line each.
    pub(crate) notes: Vec<String>,
}

/// Destinations of the ranks' output.
#[derive(Debug, Clone)]
pub(crate) struct LogPlan {
    /// Streams that go to files.
    pub(crate) redirects: PerRank,
    /// Streams that go to files and to the console.
    pub(crate) tee: PerRank,
    pub(crate) folder: Option<PathBuf>,
    /// Local ranks whose output reaches the console. `None` for all.
    pub(crate) console_ranks: Option<BTreeSet<u32>>,
    /// Texts that select lines of stdout and of stderr for the filtered log files.
    pub(crate) filters: [Vec<String>; 2],
    /// Template of the prefix of a line.
    pub(crate) prefix: String,
    pub(crate) rotation: Option<Rotation>,
}

impl LogPlan {
    /// Whether the user asked for log files.
    pub(crate) fn are_wanted(&self) -> bool {
        self.folder.is_some() || !self.redirects.is_empty() || !self.tee.is_empty()
    }
}

/// Rotation of log files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rotation {
    /// Size at which a log file is rotated, in bytes.
    pub(crate) size: u64,
    /// Number of files kept in addition to the current one.
    pub(crate) keep: u32,
}

/// Location of the pipe on which ranks request timers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FileTimer {
    /// In a temporary folder.
    Anywhere,
    At(PathBuf),
}

impl LaunchPlan {
    /// Takes missing values from the cluster that this process runs in, and checks all values.
    ///
    /// # Errors
    /// Returns a [`UsageError`] that names the option or the variable.
    pub fn new(args: &LaunchArgs, program: Program) -> Result<Self, UsageError> {
        let (mut args, mut notes) = (args.clone(), Vec::new());
        let rdzv = args.rdzv.clone();
        rdzv.translate(&mut args, &mut notes, &|name| std::env::var(name).ok())?;
        cluster_defaults::fill(&mut args, &mut notes, &|name| std::env::var(name).ok())?;
        let mut plan = Self::check(&args, program)?;
        plan.notes.splice(0..0, notes);
        Ok(plan)
    }

    /// Returns the number of ranks of this node.
    pub(crate) fn local_world_size(&self) -> u32 {
        u32::try_from(self.devices.len()).unwrap_or(u32::MAX)
    }

    /// Returns the signals that are a notice.
    pub(crate) fn notice_signals(&self) -> Vec<Signal> {
        let signal = |source: &Source| match source {
            Source::Signal(signal) => Some(*signal),
            _ => None,
        };
        self.notices.iter().filter_map(signal).collect()
    }

    /// Whether the job continues or restarts when a node is lost.
    pub(crate) fn outlives_nodes(&self) -> bool {
        let (fewest, most) = self.nnodes;
        fewest < most || self.restarts.max_restarts > 0
    }

    fn check(args: &LaunchArgs, program: Program) -> Result<Self, UsageError> {
        let text = args.devices.as_deref().unwrap_or("auto");
        let devices = devices::parse(text, devices::count_gpus())
            .map_err(|problem| UsageError::new("--devices", format!("`{text}`: {problem}")))?;
        let nnodes = nnodes(args.nnodes.as_deref().unwrap_or("1"))?;
        let run_id = args.run_id.clone().unwrap_or_else(|| "none".into());
        check_names(&run_id, &args.role)?;
        check_numbers(args, nnodes)?;
        let named = |option| move |problem| UsageError::new(option, problem);
        let seconds = |option, value| value_parsers::seconds(value).map_err(named(option));
        let shutdown_timeout = match args.shutdown_timeout {
            Some(value) => seconds("--shutdown-timeout", value)?,
            None => shutdown_timeout_of_torch()?,
        };
        let restarts = RestartPolicy {
            max_restarts: args.max_restarts,
            window: args.restart_window.map(|value| seconds("--restart-window", value)).transpose()?,
            backoff: seconds("--restart-backoff", args.restart_backoff)?,
            crash_loop: args.crash_loop_limit.unwrap_or(CRASH_LOOP_LIMIT),
        };
        let cpus = args.numa_binding.as_deref().map(|text| {
            let binding = text.parse::<NumaBinding>()?;
            placement::bind_ranks(binding, &devices)
        });
        let cpus = cpus.transpose().map_err(named("--numa-binding"))?;
        let fixed = [("--numa-binding", cpus.is_some()), ("--virtual-local-rank", args.virtual_local_rank)];
        if let Some((other, _)) = fixed.into_iter().find(|(_, given)| *given && args.spares > 0) {
            return Err(UsageError::new(
                "--spares",
                format!("with {other}: a spare does not know its rank when it starts"),
            ));
        }
        let dynamic = rendezvous::is_dynamic(args, nnodes.1);
        let unshared = std::env::var(rendezvous::UNSHARED_STORE).is_ok_and(|value| value == "1");
        let mut notes = Vec::new();
        if unshared && !dynamic {
            notes.push(format!(
                "{}=1 has no effect with --rdzv-backend static, as in torchrun: use --rdzv-backend c10d",
                rendezvous::UNSHARED_STORE
            ));
        }
        if args.crash_loop_limit.is_none() && args.max_restarts >= CRASH_LOOP_LIMIT {
            notes.push(format!(
                "not all {} restarts are for a job that keeps failing within 10 s of its start: it ends after {CRASH_LOOP_LIMIT} \
                 such attempts in a row; --crash-loop-limit 0 restarts it all the same",
                args.max_restarts
            ));
        }
        let (signals, unknown) =
            value_parsers::known_signals(&args.signals_to_handle).map_err(named("--signals-to-handle"))?;
        if signals.is_empty() && !unknown.is_empty() {
            let problem = format!("`{}` names no signal that this system has", args.signals_to_handle);
            return Err(UsageError::new("--signals-to-handle", problem));
        }
        notes.extend(unknown.iter().map(|name| {
            format!(
                "--signals-to-handle: `{name}` is not the name of a signal, and is left out, as in torchrun"
            )
        }));
        let codes = args.fatal_exit_codes.as_deref().unwrap_or_default();
        let fatal_exit_codes = value_parsers::numbers(codes).map_err(named("--fatal-exit-codes"))?;
        if fatal_exit_codes.contains(&0) {
            return Err(UsageError::new(
                "--fatal-exit-codes",
                "0: a rank that ends so has not failed".into(),
            ));
        }
        let logs = logs(args, devices.len())?;
        Ok(Self {
            program,
            preload: Vec::new(),
            backend: backend(&args.dist_backend, &devices)?,
            devices,
            role: args.role.clone(),
            omp_num_threads: args.omp_num_threads,
            virtual_local_rank: args.virtual_local_rank,
            cpus,
            nnodes,
            node_rank: args.node_rank,
            place: rendezvous::place(args, nnodes.1)?,
            dynamic,
            rank_serves_store: unshared && dynamic,
            meeting: rendezvous::config(args, &run_id, nnodes.1)?,
            close_timeout: args.rendezvous.close_timeout.unwrap_or(rendezvous::CLOSE_TIMEOUT),
            run_id,
            restarts,
            fatal_exit_codes,
            hang_timeout: match args.hang_timeout {
                None => HangTimeout::Default,
                Some(0.0) => HangTimeout::Never,
                Some(value) => HangTimeout::After(seconds("--hang-timeout", value)?),
            },
            file_timer: file_timer(&|name| std::env::var(name).ok()),
            spares: args.spares,
            // 0 means as often as possible.
            monitor_interval: seconds("--monitor-interval", args.monitor_interval)?.max(SHORTEST_INTERVAL),
            shutdown_timeout,
            signals,
            notices: args
                .preempt_notice
                .iter()
                .map(|text| Source::parse(text).map_err(named("--preempt-notice")))
                .collect::<Result<_, _>>()?,
            requeue_exit_code: args.requeue_exit_code,
            logs,
            events: args.events.clone(),
            progress_interval: seconds("--progress-interval", args.progress_interval)?,
            notes,
        })
    }
}

/// Checks names that become parts of file names, variables and lines of output.
fn check_names(run_id: &str, role: &str) -> Result<(), UsageError> {
    let has_control = |text: &str| text.chars().any(char::is_control);
    let problem = match run_id {
        "" => Some("is empty: leave it out, or give a name".into()),
        id if id.contains('/') || has_control(id) => {
            Some(format!("{id:?} is part of file names: no `/` and no control characters"))
        }
        id if id.len() > LONGEST_RUN_ID => {
            Some(format!("{} bytes, and it is part of file names: at most {LONGEST_RUN_ID}", id.len()))
        }
        _ => None,
    };
    if let Some(problem) = problem {
        return Err(UsageError::new("--run-id", problem));
    }
    // TorchX passes an empty role if a job has none.
    if has_control(role) || role.len() > MAX_ROLE_LEN {
        let problem = format!("{role:?}: at most {MAX_ROLE_LEN} bytes, and no control characters");
        return Err(UsageError::new("--role", problem));
    }
    Ok(())
}

/// Rejects numbers that have no meaning.
fn check_numbers(args: &LaunchArgs, nnodes: (u32, u32)) -> Result<(), UsageError> {
    let wrong = |option, problem: String| Err(UsageError::new(option, problem));
    match args.omp_num_threads {
        Some(0) => return wrong("--omp-num-threads", "0: a rank needs a thread".into()),
        Some(many @ MOST_THREADS..) => {
            return wrong("--omp-num-threads", format!("{many}: fewer than {MOST_THREADS}"));
        }
        _ => {}
    }
    if args.restart_window == Some(0.0) {
        let problem = "0: no failure would ever count; leave it out to count all of the job's";
        return wrong("--restart-window", problem.into());
    }
    if args.spares > devices::MOST {
        return wrong("--spares", format!("{}: at most {}", args.spares, devices::MOST));
    }
    if args.log_keep > MOST_KEPT {
        return wrong("--log-keep", format!("{}: at most {MOST_KEPT}", args.log_keep));
    }
    if nnodes.1 > 1 && args.master_port == Some(0) && args.rendezvous.etcd.is_none() {
        let problem = "0 with several nodes: the others cannot know a free port; give one, such as 29500";
        return wrong("--master-port", problem.into());
    }
    Ok(())
}

fn logs(args: &LaunchArgs, ranks_here: usize) -> Result<LogPlan, UsageError> {
    let exists = |option, rank: Option<u32>| match rank.filter(|rank| *rank as usize >= ranks_here) {
        Some(rank) => {
            let there = if ranks_here == 1 { "0 alone".into() } else { format!("0 to {}", ranks_here - 1) };
            Err(UsageError::new(option, format!("there is no local rank {rank}: this node has {there}")))
        }
        None => Ok(()),
    };
    let streams = |option, text: &str| {
        let streams = PerRank::parse(text).map_err(|problem| UsageError::new(option, problem))?;
        exists(option, streams.highest())?;
        Ok(streams)
    };
    let ranks = value_parsers::numbers(&args.local_ranks_filter)
        .map_err(|problem| UsageError::new("--local-ranks-filter", problem))?;
    exists("--local-ranks-filter", ranks.last().copied())?;
    let texts =
        |option, text: &str| value_parsers::texts(text).map_err(|problem| UsageError::new(option, problem));
    let of_variable = || std::env::var(PREFIX_VARIABLE).ok().filter(|template| !template.is_empty());
    let prefix = match &args.log_prefix {
        Some(template) => (template.clone(), "--log-prefix"),
        None => of_variable().map_or((PREFIX.into(), ""), |template| (template, PREFIX_VARIABLE)),
    };
    check_template(&prefix.0).map_err(|problem| UsageError::new(prefix.1, problem))?;
    let size = args.log_max_size.as_deref().map(value_parsers::bytes).transpose();
    let size = size.map_err(|problem| UsageError::new("--log-max-size", problem))?;
    Ok(LogPlan {
        redirects: streams("--redirects", &args.redirects)?,
        tee: streams("--tee", &args.tee)?,
        folder: args.log_dir.clone(),
        console_ranks: (!ranks.is_empty()).then_some(ranks),
        filters: [
            texts("--duplicate-stdout-filters", &args.duplicate_stdout_filters)?,
            texts("--duplicate-stderr-filters", &args.duplicate_stderr_filters)?,
        ],
        prefix: prefix.0,
        rotation: size.map(|size| Rotation { size, keep: args.log_keep }),
    })
}

/// Returns the value of torchrun's variable for `--shutdown-timeout`, or the default.
fn shutdown_timeout_of_torch() -> Result<Duration, UsageError> {
    const NAME: &str = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT";
    let text = std::env::var(NAME).ok().filter(|text| !text.is_empty());
    let Some(text) = text else { return Ok(SHUTDOWN_TIMEOUT) };
    let seconds = text.trim().parse().map_err(|_| format!("`{text}` is not a number of seconds"));
    seconds.and_then(value_parsers::seconds).map_err(|problem| UsageError::new(NAME, problem))
}

/// Returns where ranks request timers, according to torchrun's variables.
fn file_timer(lookup: &dyn Fn(&str) -> Option<String>) -> Option<FileTimer> {
    lookup(ENABLE_FILE_TIMER).filter(|value| value == "1")?;
    let path = lookup(TORCHELASTIC_TIMER_FILE).filter(|path| !path.is_empty());
    Some(path.map_or(FileTimer::Anywhere, |path| FileTimer::At(path.into())))
}

fn nnodes(text: &str) -> Result<(u32, u32), UsageError> {
    let wrong = |problem: &str| UsageError::new("--nnodes", format!("`{text}`: {problem}"));
    let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse::<u32>().map_err(|_| wrong("expected N or MIN:MAX")),
        false => Err(wrong("expected N or MIN:MAX")),
    };
    let (fewest, most) = text.split_once(':').unwrap_or((text, text));
    let (fewest, most) = (number(fewest)?, number(most)?);
    if fewest == 0 {
        return Err(wrong("a job needs at least 1 node"));
    }
    if fewest > most {
        return Err(wrong("MIN is more than MAX"));
    }
    if most > MAX_NODES {
        return Err(wrong(&format!("a job has at most {MAX_NODES} nodes")));
    }
    Ok((fewest, most))
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

#[cfg(test)]
mod tests {
    use clap::Parser;
    use ice_rendezvous::{Endpoint, ServedBy};

    use super::*;
    use crate::cli::Cli;

    fn plan(args: &[&str]) -> Result<LaunchPlan, String> {
        let cli = Cli::try_parse_from(["ice-launch"].iter().chain(args).chain(&["sh"])).unwrap();
        cli.plan().map_err(|error| error.to_string())
    }

    fn endpoint(plan: LaunchPlan) -> Endpoint {
        let Backend::Endpoint(endpoint) = plan.place else { panic!("etcd") };
        endpoint
    }

    #[test]
    fn defaults() {
        let plan = plan(&["--devices", "cpu"]).unwrap();
        assert_eq!((plan.nnodes, plan.restarts.max_restarts), ((1, 1), 0));
        assert!(plan.logs.redirects.is_empty());
        assert_eq!(plan.signals.len(), 4);
        assert_eq!(plan.backend, DistBackend::Gloo);
        let host = "127.0.0.1".into();
        assert_eq!(endpoint(plan), Endpoint { host, port: 0, served_by: ServedBy::This });
    }

    #[test]
    fn timers_are_served_where_torchruns_variable_is_one() {
        let of = |enable: Option<&str>, path: Option<&str>| {
            file_timer(&|name| match name {
                ENABLE_FILE_TIMER => enable.map(str::to_owned),
                _ => path.map(str::to_owned),
            })
        };
        assert_eq!(of(None, Some("/t")), None);
        assert_eq!(of(Some("0"), Some("/t")), None);
        assert_eq!(of(Some("1"), None), Some(FileTimer::Anywhere));
        assert_eq!(of(Some("1"), Some("/t")), Some(FileTimer::At("/t".into())));
    }

    #[test]
    fn several_nodes_use_torchruns_port() {
        let plan = plan(&["--nnodes", "2:2", "--node_rank", "1", "--devices", "cpu:0-1"]).unwrap();
        assert_eq!(plan.nnodes, (2, 2));
        let endpoint = endpoint(plan);
        assert_eq!((endpoint.port, endpoint.served_by), (29500, ServedBy::Other));
    }

    #[test]
    fn who_hosts() {
        let host = |args: &[&str]| {
            endpoint(plan(&[&["--nnodes=2", "--devices=cpu"], args].concat()).unwrap()).served_by
        };
        assert_eq!(host(&["--node-rank=0"]), ServedBy::This);
        assert_eq!(host(&["--node-rank=1"]), ServedBy::Other);
        assert_eq!(host(&["--rdzv-backend=c10d"]), ServedBy::Elect);
        assert_eq!(host(&["--rdzv-backend=c10d", "--rdzv-conf=is_host=0"]), ServedBy::Other);
        assert_eq!(
            endpoint(plan(&["--rdzv-backend=c10d", "--devices=cpu"]).unwrap()).served_by,
            ServedBy::This
        );
    }

    #[test]
    fn program_that_launches_itself_says_where_its_nodes_meet() {
        #[derive(Parser)]
        struct Own {
            #[command(flatten)]
            launch: crate::cli::LaunchArgs,
        }
        let options = ["--devices=cpu", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=10.0.0.1:7"];
        let more = ["--rdzv-id=job", "--rdzv-conf=is_host=0,join_timeout=3"];
        let own = Own::try_parse_from(["own"].iter().chain(&options).chain(&more)).unwrap();
        let program = Program { path: "/bin/true".into(), args: Vec::new() };
        let plan = LaunchPlan::new(&own.launch, program).unwrap();
        assert_eq!((plan.run_id.as_str(), plan.meeting.join_timeout), ("job", Duration::from_secs(3)));
        let host = "10.0.0.1".into();
        assert_eq!(endpoint(plan), Endpoint { host, port: 7, served_by: ServedBy::Other });
    }

    #[test]
    fn mistakes_name_option_value_and_remedy() {
        for (args, named) in [
            (&["--nnodes", "0"][..], &["--nnodes", "`0`", "at least 1"][..]),
            (&["--nnodes", "x"], &["--nnodes", "`x`"]),
            (&["--nnodes", "3:1"], &["`3:1`", "more than MAX"]),
            (&["--nnodes", "2"], &["--node-rank", "0 to 1"]),
            (&["--nnodes", "2", "--node-rank", "2"], &["--node-rank", "2", "0 to 1"]),
            (&["--devices", "cpu:a"], &["--devices", "`cpu:a`", "`a`"]),
            (&["--devices", "cpu", "--dist-backend", "nccl"], &["--dist-backend", "gloo"]),
            (&["--devices", "cpu", "--dist-backend", "mpi"], &["--dist-backend", "`mpi`"]),
            (&["--devices", "cpu", "--tee", "9"], &["--tee", "`9`"]),
            (&["--devices", "cpu", "--fatal-exit-codes=2,x"], &["--fatal-exit-codes", "`x`"]),
            (&["--devices", "cpu", "--signals-to-handle=SIGKILL"], &["--signals-to-handle", "`SIGKILL`"]),
            (&["--devices", "cpu", "--log-max-size=1X"], &["--log-max-size", "`1X`"]),
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
        assert_eq!(cli.launch.devices.as_deref(), Some("cpu"));
    }
}
