use std::fmt;
use std::path::PathBuf;

use crate::agent::Exit;

/// All that is known of the rank that failed first.
pub(crate) struct Failure {
    pub(crate) host: String,
    pub(crate) node: u32,
    pub(crate) rank: u32,
    pub(crate) local_rank: u32,
    pub(crate) pid: Option<u32>,
    pub(crate) exit: Exit,
    /// What the rank itself said, from its error file or over the link.
    pub(crate) message: Option<String>,
    pub(crate) stderr: Vec<String>,
    pub(crate) log: PathBuf,
    pub(crate) program: PathBuf,
    pub(crate) others: Vec<u32>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pid = self.pid.map_or_else(|| "none".into(), |pid| pid.to_string());
        writeln!(f, "ice-launch: rank {} failed: {}", self.rank, self.exit)?;
        writeln!(f, "  node     {} ({})", self.node, self.host)?;
        writeln!(f, "  rank     {} (local rank {}), pid {pid}", self.rank, self.local_rank)?;
        writeln!(f, "  program  {}", self.program.display())?;
        if let Some(message) = &self.message {
            writeln!(f, "  error    {message}")?;
        }
        if !self.stderr.is_empty() {
            writeln!(f, "  stderr   (last {} lines)", self.stderr.len())?;
            for line in &self.stderr {
                writeln!(f, "    {line}")?;
            }
        }
        writeln!(f, "  logs     {}", self.log.display())?;
        if !self.others.is_empty() {
            let others: Vec<_> = self.others.iter().map(ToString::to_string).collect();
            writeln!(f, "  stopped  ranks {}", others.join(", "))?;
        }
        Ok(())
    }
}
