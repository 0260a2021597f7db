use clap::Args;

use crate::cli::UsageError;

/// How ranks of Python are started.
#[derive(Args, Debug, Clone, Default, PartialEq)]
#[command(next_help_heading = "Python")]
pub struct PythonArgs {
    /// Import these modules once and fork all ranks from that process: auto, torch, none, or a list
    /// such as torch,transformers
    ///
    /// `auto` stands for the installed packages that the program and its own modules import at their
    /// top, `torch` for what a DistributedDataParallel program imports. Restarts are forked from
    /// the same process, so that they take a fraction of a second [default: none]
    #[arg(long, value_name = "MODULES", hide_short_help = true)]
    pub preload: Option<String>,
}

impl PythonArgs {
    /// Returns the modules to preload.
    pub(crate) fn modules(&self) -> Result<Vec<String>, UsageError> {
        let text = self.preload.as_deref().unwrap_or("none");
        if text.is_empty() || text == "none" {
            return Ok(Vec::new());
        }
        let is_name = |part: &str| {
            part.starts_with(|c: char| c.is_alphabetic() || c == '_')
                && part.chars().all(|c| c.is_alphanumeric() || c == '_')
        };
        let modules: Vec<_> = text.split(',').map(|name| name.trim().to_owned()).collect();
        match modules.iter().find(|name| !name.split('.').all(is_name) || *name == "none") {
            Some(wrong) => {
                let problem =
                    format!("`{wrong}` is not the name of a module: torch,numpy,a.module, auto, or none");
                Err(UsageError::new("--preload", problem))
            }
            None => Ok(modules),
        }
    }
}
