use serde::Deserialize;
use serde_json::Value as Json;
use tch::Tensor;

use crate::optim::elapsed::{Elapsed, RunClock};
use crate::optim::{Field, Optimizer, Schedule};
use crate::{Error, Result};

/// An optimizer with fields that each follow a [`Schedule`].
pub struct Scheduled<O> {
    optimizer: O,
    courses: Vec<Course>,
    steps: u64,
    clock: RunClock,
}

/// A field and its schedule.
struct Course {
    field: Field,
    schedule: Schedule,
    /// Value that the schedule multiplies.
    base: f64,
    /// Whether the optimizer has the field.
    is_known: bool,
}

impl<O: Optimizer> Scheduled<O> {
    pub(super) fn new(optimizer: O) -> Self {
        Self { optimizer, courses: Vec::new(), steps: 0, clock: RunClock::default() }
    }

    /// Lets the learning rate follow a schedule, instead of its current schedule.
    #[must_use]
    pub fn schedule(self, schedule: Schedule) -> Self {
        self.schedule_of(Field::LearningRate, schedule)
    }

    /// Multiplies the value of another field by a schedule. See [`Optimizer::schedule_of`].
    #[must_use]
    pub fn schedule_of(self, field: Field, schedule: Schedule) -> Self {
        let base = self.courses.iter().find(|course| course.field == field).map(|course| course.base);
        let base = base.or_else(|| self.optimizer.field(field));
        self.with(Course { field, schedule, base: base.unwrap_or(0.0), is_known: base.is_some() })
    }

    /// Sets another field to the values of a schedule. See [`Optimizer::value_of`].
    #[must_use]
    pub fn value_of(self, field: Field, schedule: Schedule) -> Self {
        let is_known = self.optimizer.field(field).is_some();
        self.with(Course { field, schedule, base: 1.0, is_known })
    }

    fn with(mut self, course: Course) -> Self {
        self.courses.retain(|other| other.field != course.field);
        self.courses.push(course);
        self.follow();
        self
    }

    fn now(&self) -> Elapsed {
        Elapsed { steps: self.steps as f64, ..self.clock.read() }
    }

    fn follow(&mut self) {
        let now = self.now();
        for course in &self.courses {
            self.optimizer.set_field(course.field, course.base * course.schedule.at(now));
        }
    }

    /// Fails if a schedule cannot be followed.
    fn check(&self) -> Result<()> {
        let total = self.clock.read().total;
        for Course { field, schedule, is_known, .. } in &self.courses {
            if !is_known {
                return Err(Error::Graph(format!(
                    "the optimizer has no {field:?} that could follow a schedule: use another field, or give Sgd and RmsProp a momentum first"
                )));
            }
            if schedule.needs_share() && total == 0.0 {
                return Err(Error::Graph(
                    "a schedule over the run needs its length: give all training tasks a number of epochs, or all a number of steps, \
                     or use a schedule by steps or by epochs"
                        .into(),
                ));
            }
        }
        Ok(())
    }

    fn course_of_rate(&mut self) -> Option<&mut Course> {
        self.courses.iter_mut().find(|course| course.field == Field::LearningRate)
    }
}

impl<O: Optimizer> Optimizer for Scheduled<O> {
    fn set_up(&mut self, parameters: &[Tensor]) {
        // Sets the base values first: an optimizer that starts with a momentum of 0 would create no
        // buffers.
        for course in self.courses.iter().filter(|course| course.base != 0.0) {
            self.optimizer.set_field(course.field, course.base);
        }
        self.optimizer.set_up(parameters);
        self.follow();
    }

    fn step(&mut self, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()> {
        if self.steps == 0 || self.courses.iter().any(|course| course.schedule.reads_clock()) {
            self.check()?;
            self.follow();
        }
        self.optimizer.step(parameters, gradients)?;
        self.steps += 1;
        self.follow();
        Ok(())
    }

    fn state(&self) -> Vec<(&'static str, &[Tensor])> {
        self.optimizer.state()
    }

    fn values(&self) -> Json {
        serde_json::json!({ "scheduled_steps": self.steps, "optimizer": self.optimizer.values() })
    }

    fn load_values(&mut self, values: &Json) -> Result<()> {
        let steps = values.get("scheduled_steps").map(u64::deserialize);
        self.steps = match steps {
            Some(Ok(steps)) => steps,
            _ => return Err(Error::Resume("the checkpoint knows no steps of this schedule".into())),
        };
        self.optimizer.load_values(values.get("optimizer").unwrap_or(&Json::Null))?;
        self.follow();
        Ok(())
    }

    fn use_clock(&mut self, clock: &RunClock) {
        self.clock = clock.clone();
        self.optimizer.use_clock(clock);
    }

    /// Returns the rate of the next step. With a schedule by epochs or over the run, the rate of
    /// the last step.
    fn learning_rate(&self) -> f64 {
        self.optimizer.learning_rate()
    }

    fn base_learning_rate(&self) -> f64 {
        let course = self.courses.iter().find(|course| course.field == Field::LearningRate);
        course.map_or_else(|| self.optimizer.base_learning_rate(), |course| course.base)
    }

    fn scale_learning_rate(&mut self, factor: f64) {
        match self.course_of_rate() {
            Some(course) => {
                course.base *= factor;
                self.follow();
            }
            None => self.optimizer.scale_learning_rate(factor),
        }
    }

    /// Sets the rate that the schedule multiplies.
    fn set_learning_rate(&mut self, learning_rate: f64) {
        match self.course_of_rate() {
            Some(course) => {
                course.base = learning_rate;
                self.follow();
            }
            None => self.optimizer.set_learning_rate(learning_rate),
        }
    }

    fn field(&self, field: Field) -> Option<f64> {
        self.optimizer.field(field)
    }

    fn set_field(&mut self, field: Field, value: f64) {
        match self.courses.iter_mut().find(|course| course.field == field) {
            Some(course) => {
                course.base = value;
                self.follow();
            }
            None => self.optimizer.set_field(field, value),
        }
    }
}
