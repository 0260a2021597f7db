//! A run: a graph, its tasks, and the rank that executes them.

mod elastic;
mod leave;
mod metrics_log;
mod recovery_plan;
mod regroup;
mod replicas;
mod resume;
mod runs;
mod save;
mod sources;
mod state_transfer;
mod straggler;
mod timers;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ice_checkpoint::folder_of_run;
use ice_worker::{Boundary, Stop, Worker};

pub use self::elastic::{ElasticBatch, LrRule};
pub(crate) use self::leave::Leave;
use self::leave::Leaving;
use self::regroup::{Beginning, Progress};
use self::replicas::Copies;
pub use self::runs::Runs;
use self::straggler::Pace;
use self::timers::AllTimers;
pub(crate) use self::timers::Timers;
use crate::checkpoint::{UnclaimedState, Writer};
use crate::graph::{ExecutableGraph, Step, StepPlace};
use crate::optim::Elapsed;
use crate::task::TrainLength;
use crate::tensorboard::Board;
use crate::{
    CheckpointOptions, Context, Counters, Error, HyperGraph, InitFrom, Measure, Result, ResumeFrom, TaskItem,
};

/// Time to wait for a request to stop after a failed collective, since such a request explains the
/// failure: other ranks may have received it first.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// Configuration of a run, in addition to its graph and tasks.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// Seed of all randomness of the run: initial parameters, order of samples, dropout.
    pub seed: u64,
    /// Folder in which each run creates its own folder.
    pub out_dir: PathBuf,
    /// Number of training steps between two checkpoints. Default: no periodic checkpoints.
    pub save_every_steps: Option<u64>,
    /// Checkpoint to resume from.
    pub resume_from: Option<ResumeFrom>,
    /// Initial parameters, if the run does not resume from a checkpoint.
    pub init_from: Option<InitFrom>,
    /// Options for saving and resuming.
    pub checkpoints: CheckpointOptions,
    /// Number of training steps between two that show losses, learning rates and speed as
    /// TensorBoard events. `None` shows only the ends of epochs.
    pub log_every: Option<NonZeroU64>,
    /// Folder of the TensorBoard events. Default: the run's own folder. Runs that resume from each
    /// other with the same folder continue one curve.
    pub events_dir: Option<PathBuf>,
    /// Effect on batches and learning rates when nodes join or leave.
    pub elastic_batch: ElasticBatch,
    /// Number of training steps between two replicas of sharded state. Each rank sends a copy of
    /// its shard to another rank, on another node if there are several. When a rank is lost, all
    /// ranks return to the replica instead of a checkpoint. Has no effect if no state is sharded.
    pub copy_shards_every: Option<NonZeroU64>,
    /// Whether to check the gradients of every step. The run ends before it applies gradients that
    /// are not finite, and names the ranks that they came from. Has no effect when losses are
    /// scaled, because the scaler skips such steps. Every step then synchronizes with the GPU.
    pub check_finite: bool,
}

impl Default for RunConfig {
    /// Seed 0, folders in `out`, only the checkpoints of the tasks, replicas of shards every 20
    /// steps, every 50th step shown.
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

/// Position of a run among the runs of its program.
#[derive(Debug, Clone, Copy, Default)]
struct RunPosition {
    /// Number of runs before this one.
    number: u64,
    /// Whether this process has completed the previous run. The checkpoint to resume from is then
    /// of an earlier run.
    has_done_the_last: bool,
}

/// How a run ended.
enum End {
    Done,
    /// The job was asked to stop, or has no place for this rank.
    Stopped,
    /// The run was completed earlier, like all runs before number `due`.
    Skipped {
        due: u64,
    },
}

/// A run in progress, as seen by tasks and closures.
pub struct Run<'a> {
    graph: &'a HyperGraph,
    tasks: &'a dyn TaskItem,
    worker: Rc<Worker>,
    config: RunConfig,
    place: RunPosition,
    /// Set once a step of this program is done, by this rank or by those whose state it adopted.
    has_begun: &'a Cell<bool>,
    folder: Rc<Path>,
    counters: Counters,
    measures: RefCell<BTreeMap<String, f64>>,
    writer: RefCell<Writer>,
    unclaimed: RefCell<UnclaimedState>,
    board: RefCell<Board>,
    timers: AllTimers,
    /// Total length of all training tasks, for schedules.
    length: TrainLength,
    progress: Progress,
    leaving: Leaving,
    copies: Copies,
    pace: Pace,
}

impl<'a> Run<'a> {
    /// Sets up the graph, resumes if configured to, and runs the tasks to their end. Collective:
    /// every rank calls it with the same graph, tasks and configuration. [`Runs`] executes several
    /// runs in one program.
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
        place: RunPosition,
        has_begun: &'a Cell<bool>,
    ) -> Result<End> {
        let run = Self {
            graph,
            tasks,
            place,
            has_begun,
            folder: folder_of_run(&first_folder(&config, &worker), place.number).into(),
            writer: RefCell::new(Writer::new(&worker, &config.checkpoints)),
            worker,
            board: RefCell::new(Board::new(config.log_every)),
            timers: AllTimers::default(),
            length: tasks.train_length(),
            config,
            counters: Counters::default(),
            measures: RefCell::default(),
            unclaimed: RefCell::default(),
            progress: Progress::default(),
            leaving: Leaving::default(),
            copies: Copies::default(),
            pace: Pace::default(),
        };
        let worker = &run.worker;
        worker.stay();
        worker.link().begin_run();
        // A spare on the CPU sets up its graph before a round needs it. A spare whose GPU is not
        // bound yet enters the round first, which binds it.
        let mut is_in = if worker.is_unbound() { worker.enter_round()? } else { true };
        let clock = graph.clock().clone();
        graph.set_up(&Context { worker: Rc::clone(worker), seed: run.config.seed, clock })?;
        is_in = is_in && worker.enter_round()?;
        let mut outcome = Ok(End::Stopped);
        while is_in {
            outcome = run.take_part();
            match &outcome {
                // The ranks of a node that was asked to stop leave, whatever happens to the other
                // nodes.
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
            // Another rank has left, and with it the checkpoint that it had a part in.
            Ok(()) | Err(Error::Stopped) => Ok(end),
            Err(error) => Err(error),
        });
        run.close_board(outcome.is_ok());
        worker.link().end_run();
        outcome
    }

    /// Runs the tasks in one round, to their end if the round lasts that long.
    fn take_part(&self) -> Result<End> {
        if let Some(due) = self.meet_in_run()? {
            return Ok(End::Skipped { due });
        }
        let from_memory = match self.begin_round()? {
            Beginning::Later { due } => return Ok(End::Skipped { due }),
            beginning => matches!(beginning, Beginning::FromMemory),
        };
        self.has_begun.set(self.has_begun.get() || from_memory);
        if !self.is_main() {
            // This rank may have been rank 0 in the previous round: its board must be closed.
            self.board.borrow_mut().finish(self.counters.train_steps(), None);
        } else if !from_memory || !self.board.borrow().is_open() {
            self.remove_leftovers()?;
            self.keep_sources();
            self.open_board();
        }
        self.prepare_to_save();
        self.copy_parts()?;
        self.worker.link().begin();
        // The ranks may have agreed to end the run before one of them was lost.
        let outcome = if self.is_over_early() { Ok(()) } else { self.tasks.run(self) };
        match outcome {
            Err(Error::Stopped) if !self.worker.link().is_broken() => return Ok(End::Stopped),
            Err(error) if Leave::of(&error) > Leave::Nothing => {
                self.leave_item(Leave::of(&error))?;
                self.end_early();
            }
            outcome => outcome?,
        }
        // If a rank is lost in the very last step, its replacement needs the others: no rank ends
        // before all are done.
        self.worker.link().end();
        self.worker.barrier()?;
        Ok(End::Done)
    }

    /// Whether the error means that the ranks continue in another round.
    fn is_over_for_all(&self, error: &Error) -> bool {
        let link = self.worker.link();
        if !self.worker.can_stay() {
            return false;
        }
        match error.root() {
            Error::Stopped => link.is_broken(),
            Error::NodesLeave => true,
            error if error.is_lost() => true,
            // The other ranks may have received the notice of the end of the round first.
            error => error.is_collective() && link.wait_for_stop(STOP_GRACE) == Some(Stop::Broken),
        }
    }

    /// Returns the graph.
    pub fn graph(&self) -> &HyperGraph {
        self.graph
    }

    /// Returns the rank that executes the run.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// Whether this process is rank 0, which prints for all ranks.
    pub fn is_main(&self) -> bool {
        self.worker.is_main()
    }

    /// Returns the numbers of steps and epochs so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Returns the folder of this run: `<out_dir>/<run id>_<MMDDHHmm>_<random>`. The second run of
    /// a program has the suffix `.2`.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn shared_folder(&self) -> &Rc<Path> {
        &self.folder
    }

    /// Returns the identifier of the job.
    pub fn run_id(&self) -> &str {
        self.worker.run_id()
    }

    /// Returns the last epoch's measure of the node with this uid, over all ranks.
    ///
    /// # Errors
    /// [`Error::Graph`] if the node has measured nothing. The message lists the nodes with
    /// measures.
    pub fn measure(&self, uid: &str) -> Result<f64> {
        let measures = self.measures.borrow();
        measures.get(uid).copied().ok_or_else(|| {
            Error::Graph(format!(
                "nothing was measured by `{uid}`; there are {:?}",
                measures.keys().collect::<Vec<_>>()
            ))
        })
    }

    /// Counts a completed step of training, or an iteration of an evaluation.
    pub(crate) fn count_step(&self, train: bool) {
        self.counters.count_step(train);
        self.has_begun.set(true);
    }

    pub(crate) fn total_epochs(&self, train: bool) -> u64 {
        self.tasks.epochs(train)
    }

    /// Obeys, at a step boundary, a request that all ranks have agreed on.
    fn obey(&self, boundary: Boundary) -> Result<()> {
        match boundary {
            Boundary::Continue | Boundary::Leave { .. } => Ok(()),
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

    /// Sets the clock of the schedules, before a training step.
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

    /// Executes the next training step of this run on these nodes.
    pub(crate) fn train_step(&self, graph: &ExecutableGraph) -> Result<Step> {
        self.seed_step();
        self.step_begins(graph.entries());
        let begun = Instant::now();
        let step = match graph.train_step(&self.worker, self.config.check_finite)? {
            Some(step) => step,
            None => {
                // The same seed repeats the step: each rank computes it alone, to find whose
                // gradients are not finite.
                self.seed_step();
                return Err(graph.blame(&self.worker, self.counters.train_steps() + 1)?);
            }
        };
        self.worker.link().applied(begun.elapsed());
        self.took(step.own);
        Ok(step)
    }

    /// Executes the next iteration of an evaluation. Returns the number of samples on all ranks.
    pub(crate) fn eval_step(&self, graph: &ExecutableGraph) -> Result<u64> {
        self.seed_from(false, self.counters.eval_steps());
        graph.eval_step(&self.worker)
    }

    /// Makes the random numbers of a training step a function of the seed, the rank and the step. A
    /// resumed run thus draws the numbers of an undisturbed run.
    fn seed_step(&self) {
        self.seed_from(true, self.counters.train_steps());
    }

    fn seed_from(&self, train: bool, step: u64) {
        // The 25th byte separates the random numbers of evaluations from those of training, which
        // hashes 24 bytes.
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

/// Returns the folder of the first run of the program.
fn first_folder(config: &RunConfig, worker: &Worker) -> PathBuf {
    let stamp = worker.run_stamp().unwrap_or("local");
    config.out_dir.join(format!("{}_{stamp}", worker.run_id()))
}

/// Formats a measure for the line of an epoch. More than `MOST` parts, like those of a confusion
/// matrix, would fill the screen and are omitted.
fn printed(uid: &str, measure: &Measure) -> String {
    const MOST: usize = 8;
    let name = uid.rsplit('/').next().unwrap_or(uid);
    if (1..=MOST).contains(&measure.parts.len()) {
        return measure.parts.iter().map(|(part, value)| format!("  {name}.{part} {value:.4}")).collect();
    }
    format!("  {name} {:.4}", measure.value)
}
