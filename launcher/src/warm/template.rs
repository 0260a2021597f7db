//! The template: a Python process that has imported the modules of `--preload`, and forks ranks.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::AsyncReadExt;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout_at};

use super::command::PythonCommand;
use super::wire::{self, Answer, Message};
use crate::cli::Program;
use crate::logs::{Console, Files, Pump, Sink, Target, pipe};
use crate::supervise::{Ending, Orders, ProcessId, ProcessTree, Rank, Start, Stdio, TEMPLATE, spawn};

/// How long imports may take before ranks start without the template.
const IMPORT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long what a template leaves behind may take to end.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// Put before what modules print while they are imported.
const PREFIX: &str = "[preload]: ";

const BOOT: &str = include_str!("boot.py");
const TEXT: &str = concat!(include_str!("template.py"), include_str!("imports.py"), include_str!("rank.py"));

/// A template. Dropping it kills it; ranks that it has forked are not affected.
pub(super) struct Template {
    pub(super) pid: u32,
    /// File of the interpreter.
    pub(super) executable: PathBuf,
    control: UnixStream,
    ending: watch::Sender<Ending>,
}

/// Settings of a template at its start.
pub(super) struct Setup<'a> {
    pub(super) tree: &'a Arc<ProcessTree>,
    pub(super) executable: &'a Path,
    pub(super) command: &'a PythonCommand,
    /// The modules to import.
    pub(super) modules: &'a [String],
    /// The variables that libraries read when they are loaded.
    pub(super) variables: Vec<(&'static str, String)>,
    /// Variables that differ from rank to rank.
    pub(super) rank_variables: &'a [&'static str],
    pub(super) output: (&'a Console, &'a Files),
}

/// Whether the modules have been imported, or why not.
pub(super) type Outcome = Result<(), Failure>;

/// Why a template has not become ready.
pub(super) enum Failure {
    /// One module cannot be shared, and another template can do without it.
    Misfit {
        module: String,
        why: String,
    },
    Other(String),
}

impl Template {
    /// Starts a template, and the task that waits until it is ready.
    pub(super) fn start(setup: Setup<'_>) -> io::Result<(Self, oneshot::Receiver<Outcome>)> {
        let Setup { tree, executable, command, modules, variables, rank_variables, output } = setup;
        let (mut control, theirs) = UnixStream::pair()?;
        let names: Vec<_> = rank_variables.iter().map(|name| format!("'{name}'")).collect();
        // The socket holds it until the interpreter reads it, so this does not wait.
        control.set_nonblocking(true)?;
        control.write_all(format!("RANK_VARIABLES = {{{}}}\n{TEXT}", names.join(", ")).as_bytes())?;
        let mut args = command.options().to_vec();
        args.extend(["-c", BOOT, command.kind.name()].map(OsString::from));
        args.push(command.target().to_owned());
        args.extend(modules.iter().map(OsString::from));
        let program = Program { path: command.words[0].clone().into(), args };
        let ((stdout, to_stdout), (stderr, to_stderr)) = (pipe()?, pipe()?);
        let start = Start {
            id: TEMPLATE,
            program: &program,
            executable,
            local_rank: 0,
            cpus: None,
            variables,
            link: &theirs,
            // A module that reads it finds its end. Ranks get the launcher's.
            stdin: Stdio::Null,
            output: [to_stdout, to_stderr].map(Stdio::Pipe),
        };
        let rank = spawn(tree, start)?;
        let (lives, ended) = watch::channel(());
        let (console, files) = output;
        for stream in [stdout, stderr] {
            let sink = Sink {
                console: console.clone(),
                target: Some(Target::Stderr),
                prefix: PREFIX.into(),
                file: None,
                filtered: None,
                files: files.clone(),
            };
            // It continues by itself.
            Pump::start(stream, sink, ended.clone())?;
        }
        let (ending, orders) = watch::channel(Ending::Unasked);
        let pid = rank.pid();
        tokio::spawn(async move {
            let orders = Orders { ending: orders, timeout: SHUTDOWN_TIMEOUT };
            rank.wait(orders, |_| {}).await;
            drop(lives);
        });
        let (told, outcome) = oneshot::channel();
        let reader = tokio::net::UnixStream::from_std(control.try_clone()?)?;
        tokio::spawn(async move { told.send(ready(reader).await) });
        Ok((Self { pid, executable: executable.to_owned(), control, ending }, outcome))
    }

    /// Forks a process that waits at a gate.
    pub(super) fn fork(&mut self, tree: &Arc<ProcessTree>) -> Result<Waiting, Trouble> {
        let (gate, theirs) = UnixStream::pair()?;
        wire::bound(&self.control)?;
        wire::bound(&gate)?;
        match wire::ask_to_fork(&mut self.control, theirs.as_fd())? {
            Answer::Forked(pid) => Ok(Waiting { rank: Rank::adopt(tree, pid)?, gate }),
            Answer::Refused(why) => Err(Trouble(why)),
            _ => Err(Trouble("the template answers something else".into())),
        }
    }
}

/// A forked process that waits for the message that makes it a rank.
pub(super) struct Waiting {
    rank: Rank,
    gate: UnixStream,
}

impl Waiting {
    pub(super) fn pid(&self) -> u32 {
        self.rank.pid()
    }

    /// Whether it has not ended.
    pub(super) fn lives(&self) -> bool {
        let mut end = [PollFd::new(&self.gate, PollFlags::IN)];
        // It says nothing by itself, so that there is something to read when its end is closed.
        poll(&mut end, Some(&Timespec::default())) == Ok(0)
    }

    /// Makes it the rank of this number.
    pub(super) fn begin(
        mut self,
        id: ProcessId,
        cpus: Option<&BTreeSet<u32>>,
        message: &Message<'_>,
    ) -> Result<Rank, Trouble> {
        let prepared = self.rank.assign(id).and_then(|()| cpus.map_or(Ok(()), |cpus| self.rank.bind(cpus)));
        let answer = prepared.and_then(|()| message.send(&mut self.gate));
        let trouble = match answer {
            Ok(Answer::Ready) => return Ok(self.rank),
            Ok(Answer::Refused(why)) => Trouble(why),
            Ok(_) => Trouble("a forked process answers something else".into()),
            Err(error) => error.into(),
        };
        self.rank.discard();
        Err(trouble)
    }

    /// Ends it.
    pub(super) fn discard(self) {
        self.rank.discard();
    }
}

impl Drop for Template {
    fn drop(&mut self) {
        // The task that waits for it has not waited for its end, unless the number is gone.
        if !self.ending.is_closed() {
            self.ending.send_replace(Ending::Killed);
            let _ = killpg(Pid::from_raw(self.pid.cast_signed()), Signal::SIGKILL);
        }
    }
}

/// Why no rank was forked.
pub(super) struct Trouble(pub(super) String);

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self(match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "the template does not answer".into(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                "the template has ended".into()
            }
            _ => format!("the template cannot be used: {error}"),
        })
    }
}

/// Waits until the template has imported its modules.
async fn ready(mut control: tokio::net::UnixStream) -> Outcome {
    let (deadline, mut importing) = (Instant::now() + IMPORT_TIMEOUT, None);
    let (mut received, mut buffer) = (Vec::new(), [0; 512]);
    let at = |importing: &Option<String>| match importing {
        Some(module) => format!("while it imported `{module}`"),
        None => "before it imported anything".into(),
    };
    loop {
        while let Some(text) = wire::take(&mut received) {
            match Answer::parse(&text) {
                Some(Answer::Importing(module)) => importing = Some(module),
                Some(Answer::Ready) => return Ok(()),
                Some(Answer::Failed(why)) => return Err(Failure::Other(why)),
                Some(Answer::Misfit(module, why)) => return Err(Failure::Misfit { module, why }),
                _ => {}
            }
        }
        match timeout_at(deadline, control.read(&mut buffer)).await {
            Ok(Ok(read @ 1..)) => received.extend_from_slice(&buffer[..read]),
            Ok(_) => return Err(Failure::Other(format!("the template ended {}", at(&importing)))),
            Err(_) => {
                let seconds = IMPORT_TIMEOUT.as_secs();
                let why = format!("the template was not ready after {seconds} s, {}", at(&importing));
                return Err(Failure::Other(why));
            }
        }
    }
}
