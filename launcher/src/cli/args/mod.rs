//! The command line as clap reads it. Help, man page and completions are made from the same definition.

mod conf;
mod launch;
mod torchrun;

use std::ffi::OsString;

use clap::{Parser, ValueEnum};

pub(crate) use conf::{EtcdArgs, RendezvousArgs};
pub use launch::LaunchArgs;
pub use torchrun::TorchrunArgs;
pub(crate) use torchrun::ignored_variables;

const AFTER_HELP: &str = "\
Every option has torchrun's second spelling with underscores, and most have a variable: PET_NNODES for --nnodes. Under Slurm, \
Open MPI, PMI and Kubernetes what is not given is taken from the cluster's variables, and a line says so.

Exit codes: 0 all ranks succeeded · 1 the job failed · 2 wrong usage, nothing was started · 126/127 the program cannot be \
executed or found · 75 preempted, start it again · 128+n ended by signal n · else the failed rank's own

The book, in docs/ of the sources and of the release: docs/start.md to begin with, docs/torchrun.md for who comes from torchrun, \
docs/clusters.md for job scripts, docs/elasticity.md, docs/troubleshooting.md for messages.";

/// Starts a program once per device, on one or many nodes, and watches over it.
#[derive(Parser, Debug)]
#[command(name = "ice-launch", version, after_help = AFTER_HELP, infer_long_args = true, max_term_width = 120)]
pub struct Cli {
    /// The program and its arguments; a `.py` file runs with the `python` of the PATH. ${local_rank} in an argument becomes the rank's
    #[arg(
        required_unless_present = "generate",
        trailing_var_arg = true,
        value_names = ["PROGRAM", "ARGS"],
        help_heading = "Program"
    )]
    pub command: Vec<OsString>,
    /// How to launch.
    #[command(flatten)]
    pub launch: LaunchArgs,
    /// torchrun's ways to say it.
    #[command(flatten)]
    pub torchrun: TorchrunArgs,
    /// Print this, made from the definition of the options, and leave: man, bash, zsh or fish
    #[arg(long, value_name = "WHAT", exclusive = true, hide_possible_values = true, help_heading = "Help")]
    pub generate: Option<Generate>,
}

/// What is made from the definition of the command line.
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
