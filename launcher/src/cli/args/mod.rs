//! The definition of the command line for clap. Help, man page and completions are generated from
//! it.

mod conf;
mod launch;
mod python;
mod rendezvous;
mod torchrun;
mod values;

use std::env;
use std::ffi::OsString;
use std::path::Path;

use clap::builder::Resettable;
use clap::error::ContextKind;
use clap::{Arg, Args, Command, CommandFactory, FromArgMatches, Parser, ValueEnum};

pub(crate) use conf::{EtcdArgs, RendezvousArgs};
pub use launch::LaunchArgs;
pub use python::PythonArgs;
pub use rendezvous::RdzvArgs;
pub use torchrun::TorchrunArgs;
pub(crate) use torchrun::ignored_variables;

const AFTER_HELP: &str = "\
Every option has torchrun's second spelling with underscores, and most have a variable: PET_NNODES for --nnodes. Under Slurm, \
Open MPI, PMI and Kubernetes what is not given is taken from the cluster's variables, and a line says so.

Exit codes: 0 all ranks succeeded · 1 the job failed · 2 wrong usage, nothing was started · 126/127 the program cannot be \
executed or found · 75 preempted, start it again · 128+n ended by signal n · else the failed rank's own

The book, in docs/ of the sources and of the release: docs/start.md to begin with, docs/torchrun.md for who comes from torchrun, \
docs/clusters.md for job scripts, docs/elasticity.md, docs/warm-start.md, docs/troubleshooting.md for messages.";

const EXAMPLES: &str = "\
Examples:
  ice-launch --devices cuda:0-3 train.py --lr 0.1
  ice-launch --nproc-per-node 2 --tee 3 --log-dir logs ./a-program its arguments
  ice-launch --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node0 train.py
--help lists all options.";
const SHORT_HELP: &str = "{usage-heading} {usage}\n\n{options}{after-help}";

/// Starts a program once per device, on one or many nodes, and watches over it.
#[derive(Parser, Debug)]
#[command(
    name = "ice-launch",
    version,
    after_help = EXAMPLES,
    after_long_help = AFTER_HELP,
    infer_long_args = true,
    args_override_self = true,
    max_term_width = 120,
    mut_args(without_empty_variable)
)]
pub struct Cli {
    /// The program and its arguments; a `.py` file runs with the `python` of the PATH.
    /// ${local_rank} in an argument becomes the rank's
    #[arg(
        required_unless_present_any = ["generate", "print_completion"],
        hide_short_help = true,
        trailing_var_arg = true,
        value_names = ["PROGRAM", "ARGS"],
        help_heading = "Program"
    )]
    pub command: Vec<OsString>,
    /// How to launch.
    #[command(flatten)]
    pub launch: LaunchArgs,
    /// How ranks of Python are started.
    #[command(flatten)]
    pub python: PythonArgs,
    /// torchrun's ways to say it.
    #[command(flatten)]
    pub torchrun: TorchrunArgs,
    /// Print this and exit: man, bash, zsh or fish
    #[arg(
        long,
        value_name = "WHAT",
        exclusive = true,
        hide_possible_values = true,
        help_heading = "Help",
        hide_short_help = true
    )]
    pub generate: Option<Generate>,
    /// Same as --generate, for a shell: bash, zsh or fish
    #[arg(
        long,
        alias = "print_completion",
        value_name = "SHELL",
        exclusive = true,
        hide_possible_values = true,
        help_heading = "Help",
        hide_short_help = true
    )]
    pub print_completion: Option<CompletionShell>,
}

impl Cli {
    /// Parses the arguments of this process. If they are wrong or ask for help, prints the error or
    /// the help and exits.
    pub fn from_env() -> Self {
        let arguments: Vec<OsString> = env::args_os().collect();
        match Self::from_arguments(arguments) {
            Ok(cli) => cli,
            Err(mut error) => {
                // clap's hint to write `-- --option` is misleading: the launcher would execute
                // `--option` as a program.
                error.remove(ContextKind::Suggested);
                error.exit()
            }
        }
    }

    fn from_arguments(arguments: Vec<OsString>) -> Result<Self, clap::Error> {
        let asks = |flag: &str| arguments.iter().any(|argument| argument == flag);
        let mut command = Self::command();
        if asks("-h") && !asks("--help") {
            // Without headings, the short help fits on a terminal with 24 lines.
            command = command.mut_args(|arg| arg.help_heading(Resettable::Reset)).help_template(SHORT_HELP);
        }
        let mut matches = command.try_get_matches_from(arguments)?;
        Self::from_arg_matches_mut(&mut matches)
    }
}

/// Returns the name that this process was started by, such as `torchrun` by a link.
pub(crate) fn program_name(first: &OsString) -> String {
    Path::new(first)
        .file_name()
        .map_or_else(|| "ice-launch".into(), |name| name.to_string_lossy().into_owned())
}

/// Returns the values of options for a command line without any, whatever the environment. If there
/// are required options, prints an error and exits.
pub fn defaults<T: Args>() -> T {
    let command = T::augment_args(Command::new("")).no_binary_name(true);
    let command = command.mut_args(|arg| arg.env(Resettable::Reset));
    let matches =
        command.try_get_matches_from([""; 0]).and_then(|mut matches| T::from_arg_matches_mut(&mut matches));
    matches.unwrap_or_else(|error| error.exit())
}

/// Treats an empty variable like an unset one. Operators of clusters leave such variables for
/// values that they do not have.
pub(super) fn without_empty_variable(arg: Arg) -> Arg {
    let is_empty = arg.get_env().and_then(env::var_os).is_some_and(|value| value.is_empty());
    if is_empty { arg.env(Resettable::Reset) } else { arg }
}

/// The shells of `--print-completion`. torchrun also supports tcsh.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompletionShell {
    /// Completions for bash.
    Bash,
    /// Completions for zsh.
    Zsh,
    /// Completions for fish.
    Fish,
}

impl From<CompletionShell> for Generate {
    fn from(shell: CompletionShell) -> Self {
        match shell {
            CompletionShell::Bash => Self::Bash,
            CompletionShell::Zsh => Self::Zsh,
            CompletionShell::Fish => Self::Fish,
        }
    }
}

/// Outputs that are generated from the definition of the command line.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generate {
    /// The man page, as troff.
    Man,
    /// Completions for bash.
    Bash,
    /// Completions for zsh.
    Zsh,
    /// Completions for fish.
    Fish,
}
