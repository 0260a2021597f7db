use std::fmt;
use std::path::Path;

/// A description of the launch, in one line.
pub(crate) struct Outline<'a> {
    pub(crate) run_id: &'a str,
    pub(crate) ranks: u32,
    pub(crate) nodes: u32,
    /// The interpreter, if a shell would choose another one.
    pub(crate) interpreter: Option<&'a Path>,
    /// Folder of the logs, if the user wants any.
    pub(crate) logs: Option<&'a Path>,
}

impl fmt::Display for Outline<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let noun = |count, noun| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
        write!(f, "run {}: {} on {}", self.run_id, noun(self.ranks, "rank"), noun(self.nodes, "node"))?;
        if let Some(interpreter) = self.interpreter {
            write!(f, ", {}", interpreter.display())?;
        }
        self.logs.map_or(Ok(()), |logs| write!(f, ", logs in {}", logs.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_outlined_in_one_line() {
        let (interpreter, logs) = (Some(Path::new("/venv/bin/python")), Some(Path::new("logs/none_1")));
        let mut outline = Outline { run_id: "digits", ranks: 8, nodes: 2, interpreter, logs };
        assert_eq!(
            outline.to_string(),
            "run digits: 8 ranks on 2 nodes, /venv/bin/python, logs in logs/none_1"
        );
        outline = Outline { run_id: "none", ranks: 1, nodes: 1, interpreter: None, logs: None };
        assert_eq!(outline.to_string(), "run none: 1 rank on 1 node");
    }
}
