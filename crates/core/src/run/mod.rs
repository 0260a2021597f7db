//! A run: a graph, its tasks, and the rank that they run on.

mod copies;
mod elastic;
mod leave;
mod pace;
mod parts;
mod regroup;
mod resume;
mod runs;
mod save;
mod show;
mod sources;
mod timers;
mod transfer;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ice_checkpoint::folder_of_run;
use ice_worker::{Boundary, Stop, Worker};

use self::copies::Copies;
pub use self::elastic::{ElasticBatch, LrRule};
pub(crate) use self::leave::Leave;
use self::leave::Leaving;
use self::pace::Pace;
use self::regroup::{Beginning, Progress};
pub use self::runs::Runs;
use self::timers::AllTimers;
pub(crate) use self::timers::Timers;
use crate::board::Board;
use crate::checkpoint::{Kept, Writer};
use crate::graph::{ExecutableGraph, Step, StepPlace};
use crate::optim::Elapsed;
use crate::task::TrainLength;
use crate::{
    CheckpointOptions, Context, Counters, Error, HyperGraph, InitFrom, Measure, Result, ResumeFrom, TaskItem,
};

/// After a collective failed, how long a request to stop may take to arrive that would explain it: the other ranks may have
/// been asked first.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// What a run needs to know beside its graph and tasks.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// All randomness of the run follows from it: initial parameters, the order of samples, dropout.
    pub seed: u64,
    /// Each run makes a folder of its own in it.
    pub out_dir: PathBuf,
    /// Saves a checkpoint whenever this many training steps are done.
    pub save_every_steps: Option<u64>,
    /// The checkpoint to go on from.
    pub resume_from: Option<ResumeFrom>,
    /// The parameters to begin with, unless the run resumes from a checkpoint.
    pub init_from: Option<InitFrom>,
    /// How to save and resume.
    pub checkpoints: CheckpointOptions,
    /// Shows the losses, learning rates and speed of every such training step as TensorBoard events; `None` for the ends of epochs
    /// alone.
    pub log_every: Option<NonZeroU64>,
    /// Folder of the TensorBoard events; `None` for the run's own folder. Runs that resume from each other with one folder continue
    /// one curve.
    pub events_dir: Option<PathBuf>,
    /// What becomes of the batches when nodes come or go.
    pub elastic_batch: ElasticBatch,
    /// Whenever so many training steps are done, each rank gives another, of another node where there is one, a copy of what it alone has of
    /// the state. If it is lost, all go back to that and not to a checkpoint. Without effect where nothing is sharded.
    pub copy_shards_every: Option<NonZeroU64>,
    /// Looks at the gradients of every step, and ends the run before any that are not finite are applied, naming the ranks that they came
    /// from. Without effect where losses are scaled, which leaves such steps out. A GPU is waited for in every step.
    pub check_finite: bool,
}

impl Default for RunConfig {
    /// Seed 0, folders in `out`, no checkpoints but those of the tasks, copies of shards every 20 steps, every 50th step shown.
    fn default() -> Self {
        Self {
            seed: 0,
            out_dir: "out".into(),
            save_every_steps: None,
            resume_from: None,
            init_from: None,
            checkpoints: CheckpointOptions::default(),
            log_every: NonZeroU64::new(50),
            events_dir: None,
            elastic_batch: ElasticBatch::default(),
            copy_shards_every: NonZeroU64::new(20),
            check_finite: false,
        }
    }
}

/// Which of the runs of its program a run is.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// Runs before it.
    number: u64,
    /// Whether this process has done the run before it. The checkpoint to resume from is then an older one.
    has_done_the_last: bool,
}

/// How a run ended.
enum End {
    Done,
    /// The job is told to stop, or has no place for this rank.
    Stopped,
    /// It was done before, as are all before the one of this number.
    Skipped {
        due: u64,
    },
}

/// A run under way, as tasks and closures see it.
pub struct Run<'a> {
    graph: &'a HyperGraph,
    tasks: &'a dyn TaskItem,
    worker: Rc<Worker>,
    config: RunConfig,
    place: Place,
    folder: Rc<Path>,
    counters: Counters,
    measures: RefCell<BTreeMap<String, f64>>,
    writer: RefCell<Writer>,
    kept: RefCell<Kept>,
    board: RefCell<Board>,
    timers: AllTimers,
    /// Of all training tasks.
    length: TrainLength,
    progress: Progress,
    leaving: Leaving,
    copies: Copies,
    pace: Pace,
}

impl<'a> Run<'a> {
    /// Sets the graph up, resumes where that is asked for, and runs the tasks to their end. Collective: every rank calls
    /// it with the same graph, tasks and configuration. A program with several runs has them done by [`Runs`].
    ///
    /// # Errors
    /// The first failure, named by node and phase.
    pub fn execute(
        graph: &'a HyperGraph,
        tasks: &'a dyn TaskItem,
        worker: Rc<Worker>,
        config: RunConfig,
    ) -> Result<()> {
        let runs = Runs::new(worker);
        runs.execute(graph, tasks, config)?;
        runs.finish()
    }

    fn perform(
        graph: &'a HyperGraph,
        tasks: &'a dyn TaskItem,
        worker: Rc<Worker>,
        config: RunConfig,
        place: Place,
    ) -> Result<End> {
        let run = Self {
            graph,
            tasks,
            place,
            folder: folder_of_run(&first_folder(&config, &worker), place.number).into(),
            writer: RefCell::new(Writer::new(&worker, &config.checkpoints)),
            worker,
            board: RefCell::new(Board::new(config.log_every)),
            timers: AllTimers::default(),
            length: tasks.train_length(),
            config,
            counters: Counters::default(),
            measures: RefCell::default(),
            kept: RefCell::default(),
            progress: Progress::default(),
            leaving: Leaving::default(),
            copies: Copies::default(),
            pace: Pace::default(),
        };
        let worker = &run.worker;
        worker.stay();
        worker.link().begin_run();
        // A spare does what takes long before it is needed, where that does not take a GPU.
        let mut is_in = if worker.is_unbound() { worker.enter_round()? } else { true };
        let clock = graph.clock().clone();
        graph.set_up(&Context { worker: Rc::clone(worker), seed: run.config.seed, clock })?;
        is_in = is_in && worker.enter_round()?;
        let mut outcome = Ok(End::Stopped);
        while is_in {
            outcome = run.take_part();
            match &outcome {
                // The ranks of a node that was told to stop leave, whatever becomes of the others.
                Err(error) if error.is_collective() && worker.link().stop() == Some(Stop::Requested) => {
                    outcome = Ok(End::Stopped);
                    break;
                }
                Err(error) if run.is_over_for_all(error) => is_in = run.change_round(error)?,
                _ => break,
            }
        }
        if !is_in {
            outcome = Ok(End::Stopped);
        }
        if let Ok(skipped @ End::Skipped { .. }) = outcome {
            run.leave_nodes();
            return Ok(skipped);
        }
        worker.link().end();
        let outcome = outcome.and_then(|end| graph.switch_to(&[]).map(|()| end));
        let written = run.writer.borrow_mut().finish();
        let outcome = outcome.and_then(|end| match written {
            // Another rank is gone, and the checkpoint that it had a part in with it.
            Ok(()) | Err(Error::Stopped) => Ok(end),
            Err(error) => Err(error),
        });
        run.close_board(outcome.is_ok());
        worker.link().end_run();
        outcome
    }

    /// Runs the tasks in one round, to their end if it lasts so long.
    fn take_part(&self) -> Result<End> {
        if let Some(due) = self.meet_in_run()? {
            return Ok(End::Skipped { due });
        }
        let from_memory = match self.begin_round()? {
            Beginning::Later { due } => return Ok(End::Skipped { due }),
            beginning => matches!(beginning, Beginning::FromMemory),
        };
        if !self.is_main() {
            // It may have been.
            self.board.borrow_mut().finish(self.counters.train_steps(), None);
        } else if !from_memory || !self.board.borrow().is_open() {
            self.remove_leftovers()?;
            self.keep_sources();
            self.open_board();
        }
        self.prepare_to_save();
        self.copy_parts()?;
        self.worker.link().begin();
        // The ranks may have agreed on the end of the run before one of them was lost.
        let outcome = if self.is_over_early() { Ok(()) } else { self.tasks.run(self) };
        match outcome {
            Err(Error::Stopped) if !self.worker.link().is_broken() => return Ok(End::Stopped),
            Err(error) if Leave::of(&error) > Leave::Nothing => {
                self.leave_item(Leave::of(&error))?;
                self.end_early();
            }
            outcome => outcome?,
        }
        // A rank may be lost in the very last step, and the others are needed for it then.
        self.worker.link().end();
        self.worker.barrier()?;
        Ok(End::Done)
    }

    /// Whether an error means that the ranks go on in another round.
    fn is_over_for_all(&self, error: &Error) -> bool {
        let link = self.worker.link();
        if !self.worker.can_stay() {
            return false;
        }
        match error.root() {
            Error::Stopped => link.is_broken(),
            Error::NodesLeave => true,
            error if error.is_lost() => true,
            // The others may have been told first.
            error => error.is_collective() && link.wait_for_stop(STOP_GRACE) == Some(Stop::Broken),
        }
    }

    /// The graph.
    pub fn graph(&self) -> &HyperGraph {
        self.graph
    }

    /// The rank.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// Whether this is rank 0, which prints for all.
    pub fn is_main(&self) -> bool {
        self.worker.is_main()
    }

    /// Steps and epochs so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The folder of this run: `<out_dir>/<run id>_<MMDDHHmm>_<random>`, of the second run of a program with `.2` behind it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn shared_folder(&self) -> &Rc<Path> {
        &self.folder
    }

    /// The identifier of the job.
    pub fn run_id(&self) -> &str {
        self.worker.run_id()
    }

    /// What the node with this uid measured in the last epoch that it was in, over all ranks.
    ///
    /// # Errors
    /// [`Error::Graph`] where it has measured nothing; says what there is.
    pub fn measure(&self, uid: &str) -> Result<f64> {
        let measures = self.measures.borrow();
        measures.get(uid).copied().ok_or_else(|| {
            Error::Graph(format!(
                "nothing was measured by `{uid}`; there are {:?}",
                measures.keys().collect::<Vec<_>>()
            ))
        })
    }

    pub(crate) fn total_epochs(&self, train: bool) -> u64 {
        self.tasks.epochs(train)
    }

    /// Does at a step boundary what all ranks were asked for.
    fn obey(&self, boundary: Boundary) -> Result<()> {
        match boundary {
            Boundary::GoOn | Boundary::Leave { .. } => Ok(()),
            Boundary::Save => self.save_checkpoint(None, None),
            Boundary::Stop { here, save } => {
                if save && self.counters.train_steps() > 0 {
                    let saved = self.save_checkpoint(None, None);
                    saved.inspect_err(|error| tracing::warn!("ended without a checkpoint: {error}"))?;
                }
                if here {
                    return Err(Error::Stopped);
                }
                if self.worker.can_stay() { Err(Error::NodesLeave) } else { Ok(()) }
            }
            Boundary::Regroup | Boundary::Broken => Err(ice_worker::Error::RoundOver.into()),
        }
    }

    /// Sets the clock that schedules read, before a training step.
    pub(crate) fn tick(&self, place: StepPlace) {
        let (done, total) = match self.length {
            TrainLength { epochs: 1.., steps: 0 } => {
                let iterations = place.epoch_iterations.unwrap_or(0).max(1);
                let of_epoch = place.iteration as f64 / iterations as f64;
                (place.train_epochs as f64 + of_epoch, self.length.epochs)
            }
            TrainLength { epochs: 0, steps: 1.. } => (place.train_steps as f64, self.length.steps),
            _ => (0.0, 0),
        };
        let elapsed = Elapsed { steps: 0.0, epochs: place.train_epochs, done, total: total as f64 };
        self.graph.clock().set(elapsed);
    }

    /// The training step that this run is at, on these nodes.
    pub(crate) fn train_step(&self, graph: &ExecutableGraph) -> Result<Step> {
        self.seed_step();
        self.step_begins(graph.entries());
        let begun = Instant::now();
        let step = match graph.train_step(&self.worker, self.config.check_finite)? {
            Some(step) => step,
            None => {
                // Whose they were is seen where each rank does the step by itself.
                self.seed_step();
                return Err(graph.blame(&self.worker, self.counters.train_steps() + 1)?);
            }
        };
        self.worker.link().applied(begun.elapsed());
        self.took(step.own);
        Ok(step)
    }

    /// The iteration of an evaluation that this run is at. Returns the samples of all ranks.
    pub(crate) fn eval_step(&self, graph: &ExecutableGraph) -> Result<u64> {
        self.seed_from(false, self.counters.eval_steps());
        graph.eval_step(&self.worker)
    }

    /// Makes the random numbers of a training step a function of the seed, the rank and the step, so that a resumed run
    /// draws what an undisturbed one would have drawn.
    fn seed_step(&self) {
        self.seed_from(true, self.counters.train_steps());
    }

    fn seed_from(&self, train: bool, step: u64) {
        // One byte more keeps the numbers of evaluations apart from those of training.
        let mut bytes = [1; 25];
        bytes[..8].copy_from_slice(&self.config.seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&(self.worker.rank() as u64).to_le_bytes());
        bytes[16..24].copy_from_slice(&step.to_le_bytes());
        let bytes = if train { &bytes[..24] } else { &bytes[..] };
        let (low, high) = (crc32c::crc32c(bytes), crc32c::crc32c_append(!0, bytes));
        tch::manual_seed((i64::from(high) << 31) ^ i64::from(low));
    }

    pub(crate) fn epoch_ended(&self, measures: &[(String, Measure)], heading: &str, took: Duration) {
        let all = measures.iter().flat_map(|(uid, measure)| measure.named(uid));
        self.measures.borrow_mut().extend(all);
        if self.is_main() {
            let values: String = measures.iter().map(|(uid, measure)| printed(uid, measure)).collect();
            println!("{heading}{values}  ({:.1} s)", took.as_secs_f64());
        }
    }
}

/// The folder of the first run of the program.
fn first_folder(config: &RunConfig, worker: &Worker) -> PathBuf {
    let stamp = worker.run_stamp().unwrap_or("local");
    config.out_dir.join(format!("{}_{stamp}", worker.run_id()))
}

/// As the line of an epoch has it. Many parts, as those of a confusion matrix, would fill the screen.
fn printed(uid: &str, measure: &Measure) -> String {
    const MOST: usize = 8;
    let name = uid.rsplit('/').next().unwrap_or(uid);
    if (1..=MOST).contains(&measure.parts.len()) {
        return measure.parts.iter().map(|(part, value)| format!("  {name}.{part} {value:.4}")).collect();
    }
    format!("  {name} {:.4}", measure.value)
}
