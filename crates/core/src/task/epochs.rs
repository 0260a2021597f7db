use std::cell::Cell;
use std::time::{Duration, Instant};

use ice_worker::TrainingProgress;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::graph::{ExecutableGraph, StepPlace, Tags};
use crate::run::Leave;
use crate::task::{TrainLength, parse};
use crate::{Error, Measure, Result, Run, TaskItem};

/// Interval of rank 0's progress reports.
const REPORT_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Length {
    Epochs(u64),
    Steps(u64),
}

/// Runs the nodes that its tags select for a number of epochs or steps, with or without training.
pub struct Task {
    train: bool,
    tags: Tags,
    length: Length,
    /// Whether all steps together are one epoch.
    whole: bool,
    timed: bool,
    progress: Cell<Progressed>,
    /// The most that a node of this rank asks to leave, until the ranks agree on it.
    asked: Cell<Leave>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Progressed {
    epochs: u64,
    steps: u64,
    /// Completed iterations of the current epoch.
    iteration: u64,
    /// Whether the task was left before its end.
    left: bool,
    /// Whether all iterations of the epoch, or of the pass over the data, are completed, but not
    /// what follows them.
    #[serde(default)]
    ending: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    train: bool,
    tags: String,
    length: Length,
    progress: Progressed,
}

impl Task {
    /// Creates a training task: forward, backward, update. Default: one epoch.
    pub fn train(tags: impl Into<Tags>) -> Self {
        Self::new(true, tags.into())
    }

    /// Creates an evaluation task: forward only, without gradients. Default: one epoch.
    pub fn eval(tags: impl Into<Tags>) -> Self {
        Self::new(false, tags.into())
    }

    fn new(train: bool, tags: Tags) -> Self {
        let (progress, asked) = (Cell::default(), Cell::default());
        Self { train, tags, length: Length::Epochs(1), whole: false, timed: false, progress, asked }
    }

    /// Sets the number of epochs. An epoch ends with the dataset that ends first.
    #[must_use]
    pub fn epochs(mut self, epochs: u64) -> Self {
        self.length = Length::Epochs(epochs);
        self
    }

    /// Sets the number of steps, over as many epochs as they take. A training step is one step of
    /// the optimizers.
    #[must_use]
    pub fn steps(mut self, steps: u64) -> Self {
        self.length = Length::Steps(steps);
        self
    }

    /// Makes all steps together one epoch, even if datasets end several times meanwhile: losses and
    /// metrics cover all steps. Has no effect on a task of epochs.
    #[must_use]
    pub fn simulate_epoch(mut self) -> Self {
        self.whole = true;
        self
    }

    /// Measures the time of each node in each phase, and writes it to `timers.csv` in the run's
    /// folder: count, mean, minimum, maximum and sum by task, node and phase. The tag `timer` has
    /// the same effect. Each measurement synchronizes with a GPU, which costs time.
    #[must_use]
    pub fn timed(mut self) -> Self {
        self.timed = true;
        self
    }

    /// Executes a pass over the data, and what follows it.
    fn epoch(&self, run: &Run, graph: &ExecutableGraph) -> Result<()> {
        let mut report = Report::new(self, run, graph);
        let progress = self.progress.get();
        if !self.train && progress.iteration == 0 && !progress.ending {
            run.mark(graph.entries());
        }
        match self.is_whole() {
            true if progress.steps == 0 => graph.epoch_start(),
            false if progress.iteration == 0 => graph.epoch_start(),
            _ => {}
        }
        while graph.remaining() != Some(0) && !self.is_at_end() && !self.is_finished() {
            self.step(run, graph, &mut report)?;
        }
        if self.is_whole() {
            if graph.remaining() == Some(0) {
                graph.next_pass(run.worker())?;
                self.pass_ended();
            }
            if self.is_at_end() {
                let measures = graph.epoch_end(run.worker(), |node| node.remaining().is_none())?;
                self.ended(run, graph, &report, &measures)?;
            }
        } else if graph.remaining() == Some(0) {
            let measures = graph.epoch_end(run.worker(), |_| true)?;
            self.pass_ended();
            self.ended(run, graph, &report, &measures)?;
        }
        Ok(())
    }

    fn is_whole(&self) -> bool {
        self.whole && matches!(self.length, Length::Steps(_))
    }

    /// Whether all steps are completed.
    fn is_at_end(&self) -> bool {
        matches!(self.length, Length::Steps(steps) if self.progress.get().steps >= steps)
    }

    fn pass_ended(&self) {
        let progress = self.progress.get();
        let ending = self.is_whole() && self.is_at_end();
        self.progress.set(Progressed { epochs: progress.epochs + 1, iteration: 0, ending, ..progress });
    }

    fn ended(
        &self,
        run: &Run,
        graph: &ExecutableGraph,
        report: &Report,
        measures: &[(String, Measure)],
    ) -> Result<()> {
        self.progress.set(Progressed { ending: false, ..self.progress.get() });
        run.unmark();
        run.synced();
        run.counters().count_epoch(self.train);
        run.epoch_ended(measures, &report.heading(), report.started.elapsed());
        run.show_epoch(&self.tags, self.train, graph, measures)
    }

    fn step(&self, run: &Run, graph: &ExecutableGraph, report: &mut Report) -> Result<()> {
        match run.at_boundary(self.asked.get())? {
            Leave::Nothing => {}
            leave => return self.leave(run, graph, leave),
        }
        let (counters, progress) = (run.counters(), self.progress.get());
        graph.set_place(StepPlace {
            train_steps: counters.train_steps(),
            train_epochs: counters.train_epochs(),
            epochs: counters.epochs(self.train),
            iteration: if self.is_whole() { progress.steps } else { progress.iteration },
            epoch_iterations: report.epoch_iterations,
        });
        let (passes, samples, loss) = if self.train {
            run.tick(graph.place());
            let step = run.train_step(graph)?;
            (step.passes, step.samples, Some(step.loss))
        } else {
            (1, run.eval_step(graph)?, None)
        };
        let mut progress = self.progress.get();
        (progress.steps, progress.iteration) = (progress.steps + 1, progress.iteration + passes);
        self.progress.set(progress);
        // A checkpoint saved within this step must record that the end of the epoch is still due.
        progress.ending = graph.remaining() == Some(0) || (self.is_whole() && self.is_at_end());
        self.progress.set(progress);
        match self.train {
            true => run.step_counts(),
            false => {
                run.count_step(false);
                run.passed();
            }
        }
        match graph.asked_to_leave() {
            Leave::Nothing => {}
            Leave::Task => self.asked.set(Leave::Task),
            // The request also holds for the tasks that follow.
            Leave::Run => run.ask_to_leave(Leave::Run),
        }
        run.show_scalars(graph.take_scalars());
        run.worker().link().advance(run.counters().train_steps());
        report.step(samples, loss.as_ref());
        if !self.train {
            return Ok(());
        }
        run.show_step(&self.tags, graph, samples)?;
        run.copy_if_due()?;
        run.save_if_due()
    }

    /// Leaves the task on all ranks, which have agreed to.
    fn leave(&self, run: &Run, graph: &ExecutableGraph, what: Leave) -> Result<()> {
        self.asked.take();
        self.progress.set(Progressed { left: true, ..self.progress.get() });
        run.task_was_left(graph.entries(), self.train);
        match what {
            Leave::Run => {
                run.end_early();
                Err(Error::StopAllTasks)
            }
            _ => Ok(()),
        }
    }
}

impl TaskItem for Task {
    fn run(&self, run: &Run) -> Result<()> {
        let timed = self.timed || self.tags.contains("timer");
        let timers = timed.then(|| run.timers(&self.tags)).flatten();
        let graph = run.graph().select(&self.tags)?.for_task(run.shared_folder(), timers);
        if matches!(self.length, Length::Epochs(_)) && graph.remaining().is_none() {
            return Err(Error::Graph(format!(
                "no node with the tags `{}` has a size, so an epoch never ends: add a dataset or use steps",
                self.tags
            )));
        }
        run.graph().switch_to(graph.entries())?;
        run.task_begins();
        while !self.is_finished() {
            let before = self.progress.get();
            match self.epoch(run, &graph) {
                Err(error) if Leave::of(&error) > Leave::Nothing && !self.is_finished() => {
                    let leave = run.leave_step_by_error(&self.tags, Leave::of(&error))?;
                    self.leave(run, &graph, leave)?;
                }
                outcome => outcome?,
            }
            if self.progress.get() == before {
                return Err(Error::Graph(format!(
                    "the task `{}` gets nowhere: its data are at another place than it is itself ({before:?})",
                    self.tags
                )));
            }
        }
        self.asked.take();
        if timed { run.write_timers() } else { Ok(()) }
    }

    fn is_finished(&self) -> bool {
        let progress = self.progress.get();
        match self.length {
            _ if progress.left => true,
            _ if progress.ending => false,
            Length::Epochs(epochs) => progress.epochs >= epochs,
            Length::Steps(steps) => progress.steps >= steps,
        }
    }

    fn reset(&self) {
        self.progress.take();
    }

    fn state(&self) -> Json {
        let progress = self.progress.get();
        let state = State { train: self.train, tags: self.tags.to_string(), length: self.length, progress };
        serde_json::to_value(state).unwrap_or(Json::Null)
    }

    fn skip(&self) {
        self.progress.set(Progressed { left: true, ..Progressed::default() });
    }

    fn load_what_fits(&self, state: &Json, dry_run: bool, left_out: &mut Vec<String>) -> Result<()> {
        let mut state: State = parse(state, &format!("the task `{}`", self.tags))?;
        let done = match (state.length, self.length) {
            (Length::Epochs(before), Length::Epochs(now)) if before != now => {
                Some((state.progress.epochs, now))
            }
            (Length::Steps(before), Length::Steps(now)) if before != now => Some((state.progress.steps, now)),
            _ => None,
        };
        if let Some((done, now)) = done {
            if done > now {
                return Err(Error::Resume(format!(
                    "{done} of the task `{}` were done when the checkpoint was saved, and only {:?} are asked for",
                    self.tags, self.length
                )));
            }
            if dry_run {
                left_out.push(format!(
                    "the task `{}` has {:?} and had {:?}",
                    self.tags, self.length, state.length
                ));
            }
            state.length = self.length;
        }
        self.load_state(&serde_json::to_value(state).unwrap_or(Json::Null), dry_run)
    }

    fn load_state(&self, state: &Json, dry_run: bool) -> Result<()> {
        let state: State = parse(state, &format!("the task `{}`", self.tags))?;
        if (state.train, &state.tags, state.length) != (self.train, &self.tags.to_string(), self.length) {
            return Err(Error::Resume(format!(
                "the task `{}` ({:?}) was `{}` ({:?}) when the checkpoint was saved",
                self.tags, self.length, state.tags, state.length
            )));
        }
        if !dry_run {
            self.progress.set(state.progress);
        }
        Ok(())
    }

    fn train_length(&self) -> TrainLength {
        match self.length {
            _ if !self.train => TrainLength::default(),
            Length::Epochs(epochs) => TrainLength { epochs, steps: 0 },
            Length::Steps(steps) => TrainLength { epochs: 0, steps },
        }
    }

    fn epochs(&self, train: bool) -> u64 {
        match self.length {
            Length::Epochs(epochs) if train == self.train => epochs,
            Length::Steps(_) if train == self.train && self.whole => 1,
            _ => 0,
        }
    }
}

/// The progress reports of rank 0 to the agent, for an epoch.
struct Report<'a> {
    task: &'a Task,
    run: &'a Run<'a>,
    iterations: u64,
    /// Iterations of the whole epoch, even if another task completes it.
    epoch_iterations: Option<u64>,
    started: Instant,
    sent: Instant,
    samples: u64,
}

impl<'a> Report<'a> {
    fn new(task: &'a Task, run: &'a Run<'a>, graph: &ExecutableGraph) -> Self {
        let progress = task.progress.get();
        let left = match task.length {
            Length::Steps(steps) => {
                let passes = if task.train { graph.passes() } else { 1 };
                let left = (steps - progress.steps).saturating_mul(passes);
                graph.remaining().unwrap_or(u64::MAX).min(left)
            }
            Length::Epochs(_) => graph.remaining().unwrap_or(0),
        };
        let now = Instant::now();
        let epoch_iterations = match task.length {
            Length::Steps(steps) if task.whole => Some(steps),
            _ => graph.remaining().map(|left| progress.iteration + left),
        };
        Self {
            epoch_iterations,
            task,
            run,
            iterations: progress.iteration + left,
            started: now,
            sent: now,
            samples: 0,
        }
    }

    fn epoch(&self) -> (u64, u64) {
        let epoch = self.run.counters().epochs(self.task.train) + 1;
        (epoch, self.run.total_epochs(self.task.train).max(epoch))
    }

    fn heading(&self) -> String {
        let done = self.run.counters().epochs(self.task.train);
        format!("{} epoch {done}/{}", self.task.tags, self.run.total_epochs(self.task.train).max(done))
    }

    fn step(&mut self, samples: u64, loss: Option<&tch::Tensor>) {
        self.samples += samples;
        let iteration = self.task.progress.get().iteration;
        let elapsed = self.sent.elapsed();
        let last = iteration == self.iterations;
        if !self.run.worker().is_main() || (elapsed < REPORT_EVERY && !last) {
            return;
        }
        self.run.worker().progress(TrainingProgress {
            task: self.task.tags.to_string(),
            epoch: self.epoch(),
            iteration: (iteration, self.iterations),
            samples_per_second: self.samples as f64 / elapsed.as_secs_f64().max(1e-6),
            loss: loss.map(|loss| loss.double_value(&[])),
        });
        (self.sent, self.samples) = (Instant::now(), 0);
    }
}
