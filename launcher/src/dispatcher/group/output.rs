//! Routes the output of ranks.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::Path;

use tokio::sync::watch;

use super::Group;
use crate::logs::{Filtered, LogFile, Pump, Sink, Target, coloured, pipe};
use crate::supervise::Stdio;

/// One of the two output streams of a rank.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

/// Destinations of one stream.
pub(super) struct Route {
    target: Target,
    to_file: bool,
    /// Whether the rank's output may appear on the console.
    is_shown: bool,
    to_console: bool,
    prefix: String,
    filtered: Option<Filtered>,
}

impl Group<'_> {
    /// Returns the file or pipe that a rank's stream is connected to, and the pump that reads the
    /// pipe.
    pub(super) fn stream(
        &self,
        stream: Stream,
        local_rank: u32,
        path: Option<&Path>,
        prefix: &str,
        filter: Option<&LogFile>,
        ended: &watch::Receiver<()>,
    ) -> io::Result<(Stdio, Option<Pump>)> {
        let route = self.route(stream, local_rank, prefix, filter);
        if route.to_file
            && !route.to_console
            && route.filtered.is_none()
            && self.plan.logs.rotation.is_none()
            && let Some(path) = path
        {
            match File::create(path) {
                Ok(file) => return Ok((Stdio::File(file), None)),
                Err(error) => self.files.health().failed(path, &error),
            }
        }
        // Stderr always goes through the agent, because the report needs its last lines.
        let over_status = self.rewrites && route.to_console && io::stdout().is_terminal();
        if !route.to_file && stream == Stream::Stdout && !over_status {
            return Ok((if route.to_console { Stdio::Inherit } else { Stdio::Null }, None));
        }
        let (reader, writer) = pipe()?;
        let sink = self.sink(route, path);
        Ok((Stdio::Pipe(writer), Some(Pump::start(reader, sink, ended.clone())?)))
    }

    /// Returns the destinations of a rank's stream.
    pub(super) fn route(
        &self,
        stream: Stream,
        local_rank: u32,
        prefix: &str,
        filter: Option<&LogFile>,
    ) -> Route {
        let logs = &self.plan.logs;
        let pick = |streams: &crate::cli::PerRank| {
            let streams = streams.of(local_rank);
            if stream == Stream::Stdout { streams.stdout } else { streams.stderr }
        };
        let (redirected, teed) = (pick(&logs.redirects), pick(&logs.tee));
        let shown = logs.console_ranks.as_ref().is_none_or(|ranks| ranks.contains(&local_rank));
        let to_file = redirected || teed;
        let target = match stream {
            Stream::Stdout => Target::Stdout,
            Stream::Stderr => Target::Stderr,
        };
        let shown_prefix = match (to_file, target.is_coloured()) {
            (false, _) => String::new(),
            (true, false) => prefix.to_owned(),
            (true, true) => coloured(prefix, local_rank),
        };
        let texts = &logs.filters[usize::from(stream == Stream::Stderr)];
        let filtered = filter.filter(|_| to_file).map(|file| Filtered {
            texts: texts.clone(),
            prefix: prefix.to_owned(),
            file: file.clone(),
        });
        let to_console = shown && (teed || !redirected);
        Route { target, to_file, is_shown: shown, to_console, prefix: shown_prefix, filtered }
    }

    /// Opens the destinations of a stream. If its file cannot be opened, its output goes to the
    /// console.
    pub(super) fn sink(&self, route: Route, path: Option<&Path>) -> Sink {
        let open = |path: &Path| match self.files.append_to(path, self.plan.logs.rotation) {
            Ok(file) => Some(file),
            Err(error) => {
                self.files.health().failed(path, &error);
                None
            }
        };
        let file = path.filter(|_| route.to_file).and_then(open);
        let to_console = route.to_console || (route.is_shown && route.to_file && file.is_none());
        Sink {
            console: self.console.clone(),
            target: to_console.then_some(route.target),
            prefix: route.prefix,
            file,
            filtered: route.filtered,
            files: self.files.clone(),
        }
    }
}
