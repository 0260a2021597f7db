//! Generates the man page and the completions from the definition of the command line.

use std::io::{self, Write};

use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;
use super::args::{Generate, program_name};

/// Writes the page or the completions of `what`.
///
/// # Errors
/// Returns the error of the writer.
pub fn generate(what: Generate, out: &mut dyn Write) -> io::Result<()> {
    let mut command = Cli::command();
    // A link to the launcher, such as `torchrun`, has completions for its own name.
    let name = std::env::args_os().next().as_ref().map_or_else(|| "ice-launch".into(), program_name);
    let shell = match what {
        Generate::Man => return clap_mangen::Man::new(command).render(out),
        Generate::Bash => Shell::Bash,
        Generate::Zsh => Shell::Zsh,
        Generate::Fish => Shell::Fish,
    };
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut text);
    out.write_all(&text)
}
