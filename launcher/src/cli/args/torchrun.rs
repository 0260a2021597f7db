use std::env;

use clap::Args;
use clap::builder::FalseyValueParser;

use ice_proto::env::TORCHELASTIC_TIMER_FILE;

use super::{LaunchArgs, RdzvArgs};
use crate::cli::plan::ENABLE_FILE_TIMER;
use crate::cli::program::Form;
use crate::cli::{UsageError, devices};
use crate::placement;

/// torchrun's ways to say what [`LaunchArgs`] says, and those of its options that have no meaning
/// here.
#[derive(Args, Debug, Clone, Default, PartialEq)]
#[command(next_help_heading = "torchrun's names")]
pub struct TorchrunArgs {
    /// Ranks of this node, instead of --devices
    ///
    /// A number, auto, cpu or gpu
    #[arg(long, alias = "nproc_per_node", value_name = "N", env = "PET_NPROC_PER_NODE", hide_env = true)]
    pub nproc_per_node: Option<String>,
    /// One node on a free port; other options about nodes are ignored
    #[arg(
        long,
        env = "PET_STANDALONE",
        hide_env = true,
        value_parser = FalseyValueParser::new(),
        hide_short_help = true
    )]
    pub standalone: bool,
    /// The program is a Python module
    ///
    /// Like `python -m`
    #[arg(
        short,
        long,
        env = "PET_MODULE",
        hide_env = true,
        value_parser = FalseyValueParser::new()
    )]
    pub module: bool,
    /// Execute the program itself, even if it is a `.py` file
    #[arg(
        long,
        alias = "no_python",
        env = "PET_NO_PYTHON",
        hide_env = true,
        value_parser = FalseyValueParser::new(),
        hide_short_help = true
    )]
    pub no_python: bool,
    /// The program is a Python script, whatever its name
    #[arg(
        long,
        alias = "run_path",
        env = "PET_RUN_PATH",
        hide_env = true,
        value_parser = FalseyValueParser::new(),
        hide_short_help = true
    )]
    pub run_path: bool,
    /// No effect: every rank is a new process
    #[arg(
        long,
        alias = "start_method",
        value_name = "HOW",
        env = "PET_START_METHOD",
        hide_env = true,
        hide_short_help = true
    )]
    pub start_method: Option<String>,
    /// No effect: --events writes them to a file
    #[arg(
        long,
        alias = "event_log_handler",
        value_name = "NAME",
        env = "PET_EVENT_LOG_HANDLER",
        hide_env = true,
        hide_short_help = true
    )]
    pub event_log_handler: Option<String>,
    /// No effect: it names a Python class
    #[arg(long, alias = "logs_specs", value_name = "NAME", hide_short_help = true)]
    pub logs_specs: Option<String>,
}

/// torchrun's variables that have no meaning here, with what to use instead.
const IGNORED: [(&str, &str); 2] = [
    ("TORCHELASTIC_HEALTH_CHECK_PORT", "there is no health check port; --events FILE says what happens"),
    ("TORCHELASTIC_UNINTERRUPTIBLE_STATE_TIMEOUT", "--hang-timeout finds ranks that stand still"),
];

/// Returns a note for each of torchrun's variables that is set but has no effect.
pub(crate) fn ignored_variables(lookup: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let note = |(name, instead): &(&str, &str)| {
        lookup(name).map(|value| format!("{name}={value} has no effect: {instead}"))
    };
    let mut notes: Vec<String> = IGNORED.iter().filter_map(note).collect();
    let enabled = lookup(ENABLE_FILE_TIMER);
    if enabled.as_deref() != Some("1") {
        let timers =
            [(ENABLE_FILE_TIMER, enabled), (TORCHELASTIC_TIMER_FILE, lookup(TORCHELASTIC_TIMER_FILE))];
        let set = timers.into_iter().find_map(|(name, value)| Some(format!("{name}={}", value?)));
        notes.extend(
            set.map(|set| format!("{set} has no effect: {ENABLE_FILE_TIMER}=1 lets ranks set timers")),
        );
    }
    notes
}

impl TorchrunArgs {
    /// Returns how the program is executed.
    pub(crate) fn form(&self) -> Result<Form, UsageError> {
        match (self.module, self.no_python, self.run_path) {
            (true, true, _) => Err(UsageError::new(
                "--module",
                "contradicts --no-python: a module runs with python; drop one of the two".into(),
            )),
            (true, false, _) => Ok(Form::Module),
            // Like in torchrun, --run-path has precedence over --no-python.
            (false, _, true) => Ok(Form::Script),
            (false, true, false) => Ok(Form::Executable),
            (false, false, false) => Ok(Form::Guess),
        }
    }

    /// Translates torchrun's options into those of the launcher. `notes` gets a line for each
    /// option that works differently from torchrun.
    pub(crate) fn translate(&self, args: &mut LaunchArgs, notes: &mut Vec<String>) -> Result<(), UsageError> {
        self.ranks(args, notes)?;
        self.nodes(args)?;
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
        let from_variable = env::var("PET_NPROC_PER_NODE").is_ok_and(|value| value == *text);
        if from_variable && args.devices.is_some() {
            // An operator sets the variable for all pods, and a user gives the option for this one.
            return Ok(());
        }
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
                Ok(count) if count > devices::MOST => {
                    return Err(wrong(format!("more than {} ranks on one node", devices::MOST)));
                }
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
        if !self.standalone {
            return Ok(());
        }
        if let Some(nodes) = args.nnodes.as_deref().filter(|nodes| !matches!(*nodes, "1" | "1:1")) {
            return Err(UsageError::new("--standalone", format!("is for one node, and --nnodes is {nodes}")));
        }
        // One node was asked for explicitly, whatever the cluster says.
        args.nnodes = Some("1".into());
        (args.node_rank, args.master_addr, args.master_port) = (None, Some("127.0.0.1".into()), None);
        args.rdzv = RdzvArgs { rdzv_backend: None, rdzv_endpoint: None, ..args.rdzv.clone() };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn translated(args: &[&str]) -> Result<(LaunchArgs, Vec<String>), String> {
        let cli = Cli::try_parse_from(["ice-launch"].iter().chain(args).chain(&["prog"])).unwrap();
        let (mut launch, mut notes) = (cli.launch, Vec::new());
        cli.torchrun.translate(&mut launch, &mut notes).map_err(|error| error.to_string())?;
        Ok((launch, notes))
    }

    #[test]
    fn number_of_ranks_and_a_single_node() {
        let (args, _) = translated(&["--nproc_per_node=3"]).unwrap();
        assert_eq!(args.devices.as_deref(), Some("cpu:0-2"));
        let (args, _) =
            translated(&["--standalone", "--rdzv-endpoint", "a:1", "--nproc-per-node", "cpu"]).unwrap();
        assert_eq!((args.master_addr.as_deref(), args.master_port), (Some("127.0.0.1"), None));
        assert_eq!(args.rdzv.rdzv_endpoint, None);
    }

    #[test]
    fn what_has_no_effect_is_said() {
        let (_, notes) =
            translated(&["--start-method=fork", "--logs-specs=mine", "--event-log-handler=console"]).unwrap();
        for part in ["--start-method fork", "--logs-specs mine", "--events"] {
            assert!(notes.iter().any(|note| note.contains(part)), "{part}: {notes:?}");
        }
        let (_, notes) = translated(&["--start-method=spawn", "--event-log-handler=null"]).unwrap();
        assert_eq!(notes, [""; 0]);
    }

    #[test]
    fn variables_without_effect_are_named() {
        let notes = |port: Option<&str>, enable: Option<&str>, file: Option<&str>| {
            ignored_variables(&|name| {
                let value = match name {
                    "TORCHELASTIC_HEALTH_CHECK_PORT" => port,
                    ENABLE_FILE_TIMER => enable,
                    TORCHELASTIC_TIMER_FILE => file,
                    _ => None,
                };
                value.map(str::to_owned)
            })
        };
        let [port] = &notes(Some("80"), Some("1"), Some("/tmp/t"))[..] else { panic!("one note") };
        assert!(port.contains("TORCHELASTIC_HEALTH_CHECK_PORT=80"), "{port}");
        for (enable, file, said) in [
            (None, Some("/tmp/t"), "TORCHELASTIC_TIMER_FILE=/tmp/t has no effect"),
            (Some("true"), Some("/tmp/t"), "TORCHELASTIC_ENABLE_FILE_TIMER=true has no effect"),
        ] {
            let [note] = &notes(None, enable, file)[..] else { panic!("one note") };
            assert!(note.contains(said) && note.contains("TORCHELASTIC_ENABLE_FILE_TIMER=1"), "{note}");
        }
        assert_eq!(notes(None, None, None), [""; 0]);
    }

    #[test]
    fn contradictions_name_both_sides() {
        for (args, parts) in [
            (&["--nproc-per-node=2", "--devices=cpu:0-2"][..], &["--nproc-per-node", "2 ranks", "are 3"][..]),
            (&["--nproc-per-node=0"], &["`0`", "from 1"]),
            (&["--nproc-per-node=xpu"], &["`xpu`"]),
            (&["--standalone", "--nnodes=2"], &["--standalone", "2"]),
            (&["--nproc-per-node=99999"], &["--nproc-per-node", "`99999`", "4096"]),
        ] {
            let error = translated(args).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{args:?}: {error}");
        }
        let cli = Cli::try_parse_from(["ice-launch", "-m", "--no-python", "prog"]).unwrap();
        assert!(cli.torchrun.form().unwrap_err().to_string().contains("--no-python"));
    }
}
