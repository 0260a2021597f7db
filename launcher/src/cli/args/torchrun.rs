use clap::Args;
use clap::builder::FalseyValueParser;

use super::{EtcdArgs, LaunchArgs};
use crate::cli::program::Form;
use crate::cli::{UsageError, devices};
use crate::placement;

/// torchrun's port for `--rdzv-backend c10d`.
const C10D_PORT: u16 = 29400;

/// torchrun's ways to say what [`LaunchArgs`] says, and those of its options that have no meaning here.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "As torchrun says it")]
pub struct TorchrunArgs {
    /// Ranks of this node, instead of --devices: a number, auto, cpu or gpu
    #[arg(long, alias = "nproc_per_node", value_name = "N", env = "PET_NPROC_PER_NODE", hide_env = true)]
    pub nproc_per_node: Option<String>,
    /// static: node 0 by its --node-rank; c10d: whoever the endpoint's address belongs to; etcd [default: static]
    #[arg(long, alias = "rdzv_backend", value_name = "NAME", env = "PET_RDZV_BACKEND", hide_env = true)]
    pub rdzv_backend: Option<String>,
    /// --master-addr and --master-port in one: HOST:PORT; with etcd its members, separated by commas
    #[arg(
        long,
        alias = "rdzv_endpoint",
        value_name = "HOST:PORT",
        env = "PET_RDZV_ENDPOINT",
        hide_env = true
    )]
    pub rdzv_endpoint: Option<String>,
    /// --run-id
    #[arg(long, alias = "rdzv_id", value_name = "ID", env = "PET_RDZV_ID", hide_env = true)]
    pub rdzv_id: Option<String>,
    /// join_timeout, last_call_timeout, close_timeout, keep_alive_interval (seconds), keep_alive_max_attempt, is_host; etcd: see the docs
    #[arg(long, alias = "rdzv_conf", value_name = "KEY=VALUE,…", env = "PET_RDZV_CONF", hide_env = true)]
    pub rdzv_conf: Option<String>,
    /// One node on a free port, whatever else is said about nodes
    #[arg(long, env = "PET_STANDALONE", hide_env = true, value_parser = FalseyValueParser::new())]
    pub standalone: bool,
    /// The program is a Python module, as for `python -m`
    #[arg(short, long, env = "PET_MODULE", hide_env = true, value_parser = FalseyValueParser::new())]
    pub module: bool,
    /// Execute the program itself, even if it is a `.py` file
    #[arg(long, alias = "no_python", env = "PET_NO_PYTHON", hide_env = true, value_parser = FalseyValueParser::new())]
    pub no_python: bool,
    /// The program is a Python script, whatever its name
    #[arg(long, alias = "run_path", env = "PET_RUN_PATH", hide_env = true, value_parser = FalseyValueParser::new())]
    pub run_path: bool,
    /// Of no effect: every rank is a new process
    #[arg(long, alias = "start_method", value_name = "HOW", env = "PET_START_METHOD", hide_env = true)]
    pub start_method: Option<String>,
    /// Of no effect: --events writes them to a file
    #[arg(
        long,
        alias = "event_log_handler",
        value_name = "NAME",
        env = "PET_EVENT_LOG_HANDLER",
        hide_env = true
    )]
    pub event_log_handler: Option<String>,
    /// Of no effect: it names a Python class
    #[arg(long, alias = "logs_specs", value_name = "NAME")]
    pub logs_specs: Option<String>,
    /// Address, host name or interface of this node that agents listen on and connect from
    #[arg(long, alias = "local_addr", value_name = "HOST", env = "PET_LOCAL_ADDR", hide_env = true)]
    pub local_addr: Option<String>,
}

/// torchrun's variables that have no meaning here, with what to use instead.
const IGNORED: [(&str, &str); 4] = [
    ("TORCHELASTIC_HEALTH_CHECK_PORT", "there is no health check port; --events FILE says what happens"),
    ("TORCHELASTIC_ENABLE_FILE_TIMER", HANG_TIMEOUT),
    ("TORCHELASTIC_TIMER_FILE", HANG_TIMEOUT),
    ("TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT", HANG_TIMEOUT),
];
const HANG_TIMEOUT: &str = "--hang-timeout finds ranks that stand still";

/// A line for each of torchrun's variables that is set and not carried out.
pub(crate) fn ignored_variables(lookup: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let note = |(name, instead): &(&str, &str)| {
        lookup(name).map(|value| format!("{name}={value} has no effect: {instead}"))
    };
    IGNORED.iter().filter_map(note).collect()
}

impl TorchrunArgs {
    /// How the program is executed.
    pub(crate) fn form(&self) -> Result<Form, UsageError> {
        match (self.module, self.no_python, self.run_path) {
            (true, true, _) => Err(UsageError::new(
                "--module",
                "contradicts --no-python: a module runs with python; drop one of the two".into(),
            )),
            (true, false, _) => Ok(Form::Module),
            // As in torchrun, it beats --no-python.
            (false, _, true) => Ok(Form::Script),
            (false, true, false) => Ok(Form::Executable),
            (false, false, false) => Ok(Form::Guess),
        }
    }

    /// Says it in our words. `notes` gets a line for each option that is not carried out as torchrun would.
    pub(crate) fn translate(&self, args: &mut LaunchArgs, notes: &mut Vec<String>) -> Result<(), UsageError> {
        self.ranks(args, notes)?;
        self.nodes(args)?;
        args.rendezvous.local_addr.clone_from(&self.local_addr);
        let conf = self.rdzv_conf.as_deref().unwrap_or_default();
        args.rendezvous.apply(conf, &mut args.node_rank, notes)?;
        let mut ignored = |option: &str, value: &Option<String>, usual: &[&str], instead: &str| {
            if let Some(value) = value.as_deref().filter(|value| !usual.contains(value)) {
                notes.push(format!("{option} {value} has no effect: {instead}"));
            }
        };
        ignored(
            "--start-method",
            &self.start_method,
            &["spawn"],
            "every rank is a new process, spawned and executed",
        );
        let events = "--events FILE writes what happens as JSON lines";
        ignored("--event-log-handler", &self.event_log_handler, &["null"], events);
        let logs = "it names a Python class; --log-dir, --redirects and --tee say where output goes";
        ignored("--logs-specs", &self.logs_specs, &[], logs);
        Ok(())
    }

    fn ranks(&self, args: &mut LaunchArgs, notes: &mut Vec<String>) -> Result<(), UsageError> {
        let Some(text) = &self.nproc_per_node else { return Ok(()) };
        let gpus = devices::count_gpus();
        let wrong = |problem: String| UsageError::new("--nproc-per-node", format!("`{text}`: {problem}"));
        let cpus = |count: u32| format!("cpu:0-{}", count - 1);
        let cores = || u32::try_from(placement::cores()).unwrap_or(1);
        let named = match text.as_str() {
            "auto" if gpus > 0 => "cuda:*".into(),
            "auto" | "cpu" => cpus(cores()),
            "gpu" if gpus > 0 => "cuda:*".into(),
            "gpu" => {
                return Err(wrong(
                    "this node has no CUDA device: use a number or cpu, or check nvidia-smi".into(),
                ));
            }
            "xpu" => return Err(wrong("only CUDA devices are counted: give their number".into())),
            number => match number.parse::<u32>() {
                Ok(0) | Err(_) => return Err(wrong("expected a number from 1, auto, cpu or gpu".into())),
                Ok(count) if count <= gpus => format!("cuda:0-{}", count - 1),
                Ok(count) => {
                    if gpus > 0 && args.devices.is_none() {
                        notes.push(format!("{count} ranks and {gpus} GPUs: no rank is bound to one"));
                    }
                    cpus(count)
                }
            },
        };
        let Some(devices) = &args.devices else {
            args.devices = Some(named);
            return Ok(());
        };
        let count = |text: &str| devices::parse(text, gpus).map(|devices| devices.len());
        match (count(devices), count(&named)) {
            (Ok(given), Ok(wanted)) if given != wanted => Err(wrong(format!(
                "{wanted} ranks, and --devices {devices} are {given}: give one of the two, or the same number"
            ))),
            _ => Ok(()),
        }
    }

    fn nodes(&self, args: &mut LaunchArgs) -> Result<(), UsageError> {
        if let Some(id) = &self.rdzv_id {
            let given = args.run_id.get_or_insert_with(|| id.clone());
            if given != id {
                let problem = format!("`{id}`, and --run-id is `{given}`: they are the same thing, give one");
                return Err(UsageError::new("--rdzv-id", problem));
            }
        }
        if self.standalone {
            if let Some(nodes) = args.nnodes.as_deref().filter(|nodes| !matches!(*nodes, "1" | "1:1")) {
                return Err(UsageError::new(
                    "--standalone",
                    format!("is for one node, and --nnodes is {nodes}"),
                ));
            }
            // As said, whatever a cluster says too.
            args.nnodes = Some("1".into());
            (args.node_rank, args.master_addr, args.master_port) = (None, Some("127.0.0.1".into()), None);
            return Ok(());
        }
        let port = match self.rdzv_backend.as_deref() {
            None | Some("static") => None,
            Some("c10d") => {
                args.rendezvous.elect = true;
                Some(C10D_PORT)
            }
            Some("etcd") => {
                let endpoints = self.rdzv_endpoint.as_deref().unwrap_or_default();
                args.rendezvous.etcd = Some(EtcdArgs::new(endpoints)?);
                return Ok(());
            }
            Some("etcd-v2") => {
                let problem =
                    "`etcd-v2`: etcd has no such interface any more: use etcd, which is version 3's";
                return Err(UsageError::new("--rdzv-backend", problem.into()));
            }
            Some(other) => {
                let problem = format!("`{other}` is not supported: expected static, c10d or etcd");
                return Err(UsageError::new("--rdzv-backend", problem));
            }
        };
        let Some(endpoint) = self.rdzv_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty()) else {
            return Ok(());
        };
        let wrong =
            || UsageError::new("--rdzv-endpoint", format!("`{endpoint}`: expected HOST or HOST:PORT"));
        let (host, number) = split_endpoint(endpoint).ok_or_else(wrong)?;
        args.master_addr = Some(host.to_owned());
        args.master_port = number.or(port).or(args.master_port);
        Ok(())
    }
}

/// `host`, `host:port`, `[v6]:port` or a bare v6 address.
fn split_endpoint(endpoint: &str) -> Option<(&str, Option<u16>)> {
    if let Some(rest) = endpoint.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        return match rest.strip_prefix(':') {
            Some(port) => Some((host, Some(port.parse().ok()?))),
            None => rest.is_empty().then_some((host, None)),
        };
    }
    match endpoint.split_once(':') {
        Some((_, rest)) if rest.contains(':') => Some((endpoint, None)),
        Some((host, port)) if !host.is_empty() => Some((host, Some(port.parse().ok()?))),
        Some(_) => None,
        None => Some((endpoint, None)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;

    use super::*;
    use crate::cli::Cli;
    use crate::cli::args::RendezvousArgs;

    fn translated(args: &[&str]) -> Result<(LaunchArgs, Vec<String>), String> {
        let cli = Cli::try_parse_from(["ice-launch"].iter().chain(args).chain(&["prog"])).unwrap();
        let (mut launch, mut notes) = (cli.launch, Vec::new());
        cli.torchrun.translate(&mut launch, &mut notes).map_err(|error| error.to_string())?;
        Ok((launch, notes))
    }

    #[test]
    fn endpoints_of_all_forms() {
        for (text, expected) in [
            ("node7", Some(("node7", None))),
            ("node7:29400", Some(("node7", Some(29400)))),
            ("[::1]:80", Some(("::1", Some(80)))),
            ("[::1]", Some(("::1", None))),
            ("fe80::1:2", Some(("fe80::1:2", None))),
            ("node7:x", None),
            (":80", None),
            ("[::1", None),
            ("[::1]80", None),
        ] {
            assert_eq!(split_endpoint(text), expected, "{text}");
        }
    }

    #[test]
    fn torchruns_words_are_ours() {
        let (args, notes) = translated(&[
            "--nproc_per_node=3",
            "--nnodes=2",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=node0:1234",
            "--rdzv_id=77",
            "--rdzv_conf=join_timeout=20,is_host=true,last_call_timeout=3",
        ])
        .unwrap();
        assert_eq!(notes, [""; 0]);
        assert_eq!(args.devices.as_deref(), Some("cpu:0-2"));
        assert_eq!((args.master_addr.as_deref(), args.master_port), (Some("node0"), Some(1234)));
        assert_eq!(args.run_id.as_deref(), Some("77"));
        let conf = RendezvousArgs {
            elect: true,
            is_host: Some(true),
            join_timeout: Some(Duration::from_secs(20)),
            last_call: Some(Duration::from_secs(3)),
            ..RendezvousArgs::default()
        };
        assert_eq!(args.rendezvous, conf);
        let (args, _) =
            translated(&["--standalone", "--rdzv-endpoint", "a:1", "--nproc-per-node", "cpu"]).unwrap();
        assert_eq!((args.master_addr.as_deref(), args.master_port), (Some("127.0.0.1"), None));
    }

    #[test]
    fn what_has_no_effect_is_said() {
        let (_, notes) = translated(&[
            "--start-method=fork",
            "--logs-specs=mine",
            "--event-log-handler=console",
            "--rdzv-conf=store_type=file",
        ])
        .unwrap();
        for part in ["--start-method fork", "--logs-specs mine", "--events", "store_type"] {
            assert!(notes.iter().any(|note| note.contains(part)), "{part}: {notes:?}");
        }
        let (_, notes) = translated(&["--start-method=spawn", "--event-log-handler=null"]).unwrap();
        assert_eq!(notes, [""; 0]);
    }

    #[test]
    fn variables_without_effect_are_named() {
        let notes = ignored_variables(&|name| name.ends_with("_TIMER_FILE").then(|| "/tmp/t".into()));
        assert_eq!(notes.len(), 1);
        assert!(notes[0].contains("TORCHELASTIC_TIMER_FILE=/tmp/t") && notes[0].contains("--hang-timeout"));
    }

    #[test]
    fn contradictions_name_both_sides() {
        for (args, parts) in [
            (&["--nproc-per-node=2", "--devices=cpu:0-2"][..], &["--nproc-per-node", "2 ranks", "are 3"][..]),
            (&["--nproc-per-node=0"], &["`0`", "from 1"]),
            (&["--nproc-per-node=xpu"], &["`xpu`"]),
            (&["--rdzv-id=a", "--run-id=b"], &["`a`", "`b`"]),
            (&["--standalone", "--nnodes=2"], &["--standalone", "2"]),
            (&["--rdzv-backend=zeus"], &["`zeus`", "c10d"]),
            (&["--rdzv-endpoint=h:x"], &["`h:x`"]),
            (&["--rdzv-conf=join_timeout=soon"], &["join_timeout=soon", "seconds"]),
        ] {
            let error = translated(args).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{args:?}: {error}");
        }
        let cli = Cli::try_parse_from(["ice-launch", "-m", "--no-python", "prog"]).unwrap();
        assert!(cli.torchrun.form().unwrap_err().to_string().contains("--no-python"));
    }
}
