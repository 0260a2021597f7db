//! Notices that this machine, or the job's time, is about to be taken away: `--preempt-notice`.

mod file;
mod http;

use std::path::PathBuf;
use std::thread;

use nix::sys::signal::Signal;
use tokio::sync::mpsc::UnboundedSender;

use self::http::Question;
use crate::dispatcher::RankEvent;

/// Source of a notice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// A file that appears.
    File(PathBuf),
    /// The answer of a web server.
    Http(Question),
    /// A signal to the launcher, for example from Slurm before the time limit.
    Signal(Signal),
}

impl Source {
    /// Parses a path, an address, a cloud, or a signal of the command line.
    ///
    /// # Errors
    /// Returns a message about the mistake.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (name, base) = text.split_once('=').map_or((text, None), |(name, base)| (name, Some(base)));
        if let Some(question) = Question::of_cloud(name, base)? {
            return Ok(Self::Http(question));
        }
        if text.starts_with("http://") {
            return Ok(Self::Http(Question::of_address(text)?));
        }
        if text.contains("://") {
            return Err(format!(
                "`{text}`: only http:// addresses are asked, as those of metadata servers are"
            ));
        }
        if text.contains('/') {
            return Ok(Self::File(text.into()));
        }
        match crate::cli::signals(text)?[..] {
            [signal] => Ok(Self::Signal(signal)),
            _ => Err(format!(
                "`{text}` is no path, no http:// address, no cloud (aws, azure, gcp), and no signal"
            )),
        }
    }
}

/// Watches for notices in threads, which end with the process. Each notice is sent once, and so is
/// each obstacle to receiving one.
pub(crate) fn watch(sources: &[Source], events: &UnboundedSender<RankEvent>) {
    for source in sources.iter().cloned() {
        let warn = {
            let events = events.clone();
            move |problem: String| _ = events.send(RankEvent::Warned(problem))
        };
        let (events, warned) = (events.clone(), warn.clone());
        let wait = move || {
            let notice = match source {
                Source::File(path) => file::wait(&path),
                Source::Http(question) => question.wait(&warned),
                // The event loop receives the signal.
                Source::Signal(_) => return,
            };
            let _ = events.send(RankEvent::Noticed(notice));
        };
        if let Err(error) = thread::Builder::new().name("preempt".into()).spawn(wait) {
            warn(format!("--preempt-notice is not watched: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart() {
        let file = |path: &str| Ok(Source::File(path.into()));
        assert_eq!(Source::parse("/run/preempt"), file("/run/preempt"));
        assert_eq!(Source::parse("./preempt"), file("./preempt"));
        assert_eq!(Source::parse("usr1"), Ok(Source::Signal(Signal::SIGUSR1)));
        let asked = |text: &str| match Source::parse(text) {
            Ok(Source::Http(question)) => question.url,
            other => panic!("{other:?}"),
        };
        assert_eq!(asked("http://10.0.0.1/soon"), "http://10.0.0.1/soon");
        assert_eq!(asked("gcp"), "http://metadata.google.internal/computeMetadata/v1/instance/preempted");
        assert_eq!(asked("aws=http://[::1]:80"), "http://[::1]:80/latest/meta-data/spot/instance-action");
        for (text, named) in [
            ("https://10.0.0.1/", "only http://"),
            ("http://", "no host"),
            ("http:///path", "no host"),
            ("http://host:99999/", "99999"),
            ("http://host:/", "`http://host:/`"),
            ("http://a b/", "`http://a b/`"),
            ("aws=http://host:99999", "99999"),
            ("aws=10.0.0.1", "`10.0.0.1`"),
            ("preempt", "`preempt`"),
            ("SIGKILL", "cannot be handled"),
            ("", "no path"),
            ("USR1,USR2", "no signal"),
        ] {
            let problem = Source::parse(text).unwrap_err();
            assert!(problem.contains(named), "{text}: {problem}");
        }
    }
}
