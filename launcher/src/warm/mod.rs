//! Warm starts: ranks of Python are forked from a process that has imported their modules.
//!
//! - **WS-1** The template is a process of the launcher: it carries the job's mark, and dies with the
//!   launcher.
//! - **WS-2** A forked process does nothing before the launcher has adopted it and sent its message.
//! - **WS-3** Whatever is wrong with the template, the rank starts as without it, and one line says why.
//!
//! In the book: `docs/warm-start.md`.

mod command;
mod template;
mod wire;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use ice_proto::env as names;
use tokio::sync::oneshot;

use crate::LaunchPlan;
use crate::cli::Program;
use crate::logs::{Console, Files};
use crate::placement::{CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES};
use crate::supervise::{ProcessId, ProcessTree, Rank, Start, Stdio, TEMPLATE, expected_thread_variables};
use command::PythonCommand;
use template::{Failure, Outcome, Setup, Template, Trouble, Waiting};
use wire::Message;

/// Templates that a job starts at most: after that something ends each of them.
const MOST_TEMPLATES: u32 = 10;

/// The template of this node, and what it is made from.
pub(crate) struct Warm {
    /// Words of `--preload`.
    modules: Vec<String>,
    program: Program,
    /// How many spares are kept.
    wanted: usize,
    /// CPUs of the rank that is bound to the fewest, if ranks are bound.
    cpus: Option<usize>,
    /// The variables that differ from rank to rank.
    rank_variables: Vec<&'static str>,
    tree: Arc<ProcessTree>,
    console: Console,
    files: Files,
    state: RefCell<State>,
}

struct State {
    phase: Phase,
    /// Forked processes that wait to become ranks.
    spares: Vec<Waiting>,
    /// The thread variables of the template.
    variables: Vec<(&'static str, String)>,
    started: u32,
    /// Modules that `auto` leaves out, as words for the template.
    left_out: Vec<String>,
    /// Last message to the user, which is not repeated.
    said: String,
}

enum Phase {
    Off,
    Starting(Template, oneshot::Receiver<Outcome>),
    Ready(Template),
}

impl Warm {
    /// Starts the template of a job that has one.
    pub(crate) fn new(
        plan: &LaunchPlan,
        tree: &Arc<ProcessTree>,
        (console, files): (&Console, &Files),
    ) -> Self {
        let is_fixed = |name: &str| name == names::OMP_NUM_THREADS || name == names::MKL_NUM_THREADS;
        let contract = names::ALL.iter().map(|(name, _)| *name).filter(|name| !is_fixed(name));
        let warm = Self {
            modules: plan.preload.clone(),
            program: plan.program.clone(),
            wanted: plan.spares as usize,
            cpus: plan.cpus.as_ref().and_then(|cpus| cpus.iter().map(BTreeSet::len).min()),
            rank_variables: contract.chain([CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES]).collect(),
            tree: Arc::clone(tree),
            console: console.clone(),
            files: files.clone(),
            state: RefCell::new(State {
                phase: Phase::Off,
                spares: Vec::new(),
                variables: expected_thread_variables(plan),
                started: 0,
                left_out: Vec::new(),
                said: String::new(),
            }),
        };
        if !warm.modules.is_empty() {
            warm.renew(&plan.program.path);
        }
        warm
    }

    /// Waits until the template can fork, or is known not to.
    pub(crate) async fn ready(&self) {
        loop {
            let phase = std::mem::replace(&mut self.state.borrow_mut().phase, Phase::Off);
            match phase {
                Phase::Starting(template, outcome) => {
                    self.judge(template, outcome.await.unwrap_or_else(ended));
                }
                phase => return self.state.borrow_mut().phase = phase,
            }
        }
    }

    /// Its process, which is no rank's.
    pub(crate) fn process(&self) -> Option<(ProcessId, u32)> {
        match &self.state.borrow().phase {
            Phase::Off => None,
            Phase::Starting(template, _) | Phase::Ready(template) => Some((TEMPLATE, template.pid)),
        }
    }

    /// Forks a rank. `None` if it has to be started without the template; why was said then.
    pub(crate) fn start(&self, start: &Start<'_>, threads: &[(&'static str, String)]) -> Option<Rank> {
        self.look();
        let phase = std::mem::replace(&mut self.state.borrow_mut().phase, Phase::Off);
        let mut template = match phase {
            Phase::Off => return None,
            Phase::Starting(..) => {
                self.state.borrow_mut().phase = phase;
                self.say("the template is not ready");
                return None;
            }
            Phase::Ready(template) => template,
        };
        let trouble = if self.state.borrow().variables == threads {
            match self.fork(&mut template, start) {
                Ok(rank) => {
                    self.state.borrow_mut().phase = Phase::Ready(template);
                    return Some(rank);
                }
                Err(trouble) => trouble,
            }
        } else {
            let now: Vec<_> = threads.iter().map(|(name, value)| format!("{name}={value}")).collect();
            self.state.borrow_mut().variables = threads.to_vec();
            Trouble(format!("the template was started without {}", now.join(" ")))
        };
        drop(template);
        let spares = std::mem::take(&mut self.state.borrow_mut().spares);
        spares.into_iter().for_each(Waiting::discard);
        self.say(&trouble.0);
        self.renew(start.executable);
        None
    }

    /// Notes that a template that was being started is ready.
    fn look(&self) {
        let mut state = self.state.borrow_mut();
        state.phase = match std::mem::replace(&mut state.phase, Phase::Off) {
            Phase::Starting(template, mut outcome) => match outcome.try_recv() {
                Ok(outcome) => {
                    drop(state);
                    return self.judge(template, outcome);
                }
                Err(_) => Phase::Starting(template, outcome),
            },
            phase => phase,
        };
    }

    /// Notes how the start of a template has ended. Starts another one if a module is to be left out.
    fn judge(&self, template: Template, outcome: Outcome) {
        match outcome {
            Ok(()) => self.state.borrow_mut().phase = Phase::Ready(template),
            Err(Failure::Other(why)) => self.say(&why),
            Err(Failure::Misfit { module, why }) => {
                let executable = template.executable.clone();
                drop(template);
                self.console.note(&format!("--preload auto leaves a module to the ranks: {why}"));
                self.state.borrow_mut().left_out.push(format!("-{module}"));
                self.renew(&executable);
            }
        }
    }

    /// Starts a template, with which this round's ranks, or those of the next one, are started.
    fn renew(&self, executable: &Path) {
        let Some(command) = command_of(&self.program, 0) else {
            return self.say("the program is not run by Python");
        };
        let (variables, left_out) = {
            let mut state = self.state.borrow_mut();
            if state.started == MOST_TEMPLATES {
                return;
            }
            state.started += 1;
            (state.variables.clone(), state.left_out.clone())
        };
        if let Some(why) = self.cpus.and_then(|cpus| unbindable(cpus, &variables)) {
            return self.say(&why);
        }
        let started = Template::start(Setup {
            tree: &self.tree,
            executable: command.interpreter.as_deref().unwrap_or(executable),
            command: &command,
            modules: &[&self.modules[..], &left_out].concat(),
            variables,
            rank_variables: &self.rank_variables,
            output: (&self.console, &self.files),
        });
        match started {
            Ok((template, outcome)) => {
                self.state.borrow_mut().phase = Phase::Starting(template, outcome);
            }
            Err(error) => self.say(&format!("the template cannot be started: {error}")),
        }
    }

    fn fork(&self, template: &mut Template, start: &Start<'_>) -> Result<Rank, Trouble> {
        let command = command_of(start.program, start.local_rank).filter(PythonCommand::is_source);
        let command = command.ok_or_else(|| Trouble("the program is no Python source".into()))?;
        let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
        let own = (io::stdin(), io::stdout(), io::stderr());
        let own = [own.0.as_fd(), own.1.as_fd(), own.2.as_fd()];
        let [stdout, stderr] = &start.output;
        let streams: [&Stdio; 3] = [&start.stdin, stdout, stderr];
        let message = Message {
            launcher: std::process::id(),
            streams: std::array::from_fn(|at| streams[at].descriptor(own[at], null.as_fd())),
            link: start.link.as_fd(),
            name: command.name.as_deref(),
            words: &command.words[command.at..],
            variables: &start.variables,
        };
        let waiting = match self.spare() {
            Some(spare) => spare,
            None => template.fork(&self.tree)?,
        };
        waiting.begin(start.id, start.cpus, &message)
    }

    /// A spare that lives.
    fn spare(&self) -> Option<Waiting> {
        let mut state = self.state.borrow_mut();
        let spares = std::iter::from_fn(|| state.spares.pop());
        let (mut living, ended): (Vec<_>, Vec<_>) = spares.partition(Waiting::lives);
        ended.into_iter().for_each(Waiting::discard);
        let spare = living.pop();
        state.spares = living;
        spare
    }

    /// Forks what is missing of the spares; returns their processes.
    pub(crate) fn park(&self) -> Vec<u32> {
        self.look();
        let mut state = self.state.borrow_mut();
        let (mut parked, mut trouble) = (Vec::new(), None);
        while let State { phase: Phase::Ready(template), spares, .. } = &mut *state
            && spares.len() < self.wanted
            && trouble.is_none()
        {
            match template.fork(&self.tree) {
                Ok(spare) => {
                    parked.push(spare.pid());
                    spares.push(spare);
                }
                Err(Trouble(why)) => trouble = Some(why),
            }
        }
        drop(state);
        if let Some(why) = trouble {
            self.console.note(&format!("a spare could not be forked: {why}"));
        }
        parked
    }

    /// Says why ranks start cold, once.
    fn say(&self, why: &str) {
        let mut state = self.state.borrow_mut();
        if state.said != why {
            state.said = why.to_owned();
            self.console.note(&format!("ranks start without --preload: {why}"));
        }
    }
}

fn ended<E>(_: E) -> Outcome {
    Err(Failure::Other("the template has ended".into()))
}

/// Variables by which OpenMP divides the CPUs that it finds when it is loaded.
const OF_PLACES: [&str; 4] = ["OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"];

/// Why ranks cannot be bound to this number of CPUs after their libraries were loaded. Libraries count
/// the CPUs then, unless variables say how many threads to start.
fn unbindable(cpus: usize, variables: &[(&'static str, String)]) -> Option<String> {
    let value = |name| {
        let given = variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.clone());
        given.or_else(|| std::env::var(name).ok())
    };
    if let Some(name) = OF_PLACES.into_iter().find(|name| value(*name).is_some()) {
        return Some(format!("{name} takes effect before --numa-binding does"));
    }
    let is_fixed =
        |name| value(name).and_then(|value| value.parse().ok()).is_some_and(|it: usize| it <= cpus);
    let names = [names::OMP_NUM_THREADS, names::MKL_NUM_THREADS];
    let name = names.into_iter().find(|name| !is_fixed(name))?;
    Some(format!("{name} is not a number up to {cpus}, the CPUs to which --numa-binding binds a rank"))
}

/// Whether ranks of this program can be forked.
pub(crate) fn is_python(program: &Program) -> bool {
    command_of(program, 0).is_some()
}

/// The command line of a rank.
fn command_of(program: &Program, local_rank: u32) -> Option<PythonCommand> {
    let args = program.args_of(local_rank).map(|word| OsString::from(&*word)).collect();
    PythonCommand::new(program, args)
}
