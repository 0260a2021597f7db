//! The assignment of parameters to optimizers.

use std::collections::BTreeMap;
use std::rc::Rc;

use ice_checkpoint::Part;
use ice_worker::Worker;
use regex::Regex;
use serde_json::Value as Json;
use tch::Tensor;

use super::sharding::Sharding;
use crate::optim::{Optimizer, RunClock};
use crate::{Error, LrReduction, Result};

/// An optimizer and the parameters that it trains.
struct Group {
    /// Regular expression for names of parameters. An empty pattern matches all.
    pattern: String,
    optimizer: Box<dyn Optimizer>,
    /// The learning rate that the optimizer was created with, and the reduced rate, both before
    /// factors.
    rate: f64,
    reduced_rate: Option<f64>,
    names: Vec<String>,
    parameters: Vec<Tensor>,
    /// Present if each rank has the state of its own elements only.
    sharding: Option<Sharding>,
}

/// The optimizers of a module. A parameter belongs to the first optimizer whose pattern matches its
/// name.
#[derive(Default)]
pub(super) struct Groups {
    groups: Vec<Group>,
    /// Number of this rank's shard of the state, and number of shards, once the state exists.
    division: Option<(usize, usize)>,
    /// Whether the unfinished step has applied gradients to shards.
    partially_updated: bool,
}

impl Groups {
    pub(super) fn add(&mut self, pattern: &str, optimizer: impl Optimizer + 'static) {
        self.groups.push(Group {
            pattern: pattern.into(),
            rate: optimizer.base_learning_rate(),
            reduced_rate: None,
            optimizer: Box::new(optimizer),
            names: Vec::new(),
            parameters: Vec::new(),
            sharding: None,
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Assigns each parameter to its optimizer, and returns the parameters without an optimizer.
    pub(super) fn set_up(&mut self, parameters: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>> {
        let patterns = self.groups.iter().map(|group| {
            Regex::new(&group.pattern).map_err(|error| {
                Error::Usage(format!("`{}` is no pattern of parameter names: {error}", group.pattern))
            })
        });
        let patterns = patterns.collect::<Result<Vec<_>>>()?;
        let mut left = Vec::new();
        for (name, parameter) in parameters {
            match patterns.iter().position(|pattern| pattern.is_match(name)) {
                Some(index) => {
                    self.groups[index].names.push(name.clone());
                    self.groups[index].parameters.push(parameter.shallow_clone());
                }
                None => left.push((name.clone(), parameter.shallow_clone())),
            }
        }
        for group in &mut self.groups {
            if group.parameters.is_empty() && !parameters.is_empty() {
                let names: Vec<_> = parameters.iter().map(|(name, _)| name.as_str()).collect();
                tracing::warn!(
                    "the pattern `{}` has no parameter left for its optimizer; there are {}",
                    group.pattern,
                    names.join(", ")
                );
            }
        }
        Ok(left)
    }

    /// Creates the optimizers' state, sharded over the ranks of the worker if there is one.
    /// Existing state is kept if it is sharded in the same way.
    pub(super) fn begin(&mut self, sharded_over: Option<&Rc<Worker>>) -> Result<()> {
        let division = sharded_over.map_or((0, 1), |worker| (worker.rank(), worker.world_size()));
        // Partially updated state is loaded again in the new round.
        self.partially_updated = false;
        if self.division.replace(division) == Some(division) {
            return Ok(());
        }
        for group in &mut self.groups {
            group.sharding = match sharded_over {
                Some(worker) => Some(Sharding::new(worker, &group.names, &group.parameters)?),
                None => None,
            };
            match &group.sharding {
                Some(sharding) => group.optimizer.set_up(&sharding.own_of(&group.parameters)?),
                None => group.optimizer.set_up(&group.parameters),
            }
        }
        Ok(())
    }

    /// Applies the gradients.
    pub(super) fn step(&mut self) -> Result<()> {
        self.partially_updated = self.groups.iter().any(|group| group.sharding.is_some());
        for Group { optimizer, parameters, sharding, .. } in &mut self.groups {
            let gradients: Vec<_> = parameters.iter().map(Tensor::grad).collect();
            match sharding {
                Some(sharding) => {
                    optimizer.step(&sharding.own_of(parameters)?, &sharding.own_of(&gradients)?)?;
                    sharding.share(parameters)?;
                }
                None => {
                    let parameters: Vec<_> = parameters.iter().map(Tensor::detach).collect();
                    optimizer.step(&parameters, &gradients)?;
                }
            }
        }
        Ok(())
    }

    /// Notes that the step in which gradients were applied counts.
    pub(super) fn step_counts(&mut self) {
        self.partially_updated = false;
    }

    pub(super) fn are_partially_updated(&self) -> bool {
        self.partially_updated
    }

    /// Returns the state as `<parameter>.<slot>`, and describes the tensors that are shards.
    pub(super) fn state(&self) -> (Vec<(String, Tensor)>, BTreeMap<String, Part>) {
        let (mut state, mut parts) = (Vec::new(), BTreeMap::new());
        for group in &self.groups {
            for (slot, tensors) in group.optimizer.state() {
                for (index, (name, tensor)) in group.names.iter().zip(tensors).enumerate() {
                    let key = format!("{name}.{slot}");
                    // Counters of steps are scalars and the same on every rank: they are not
                    // sharded.
                    if let Some(sharding) = group.sharding.as_ref().filter(|_| tensor.dim() > 0) {
                        let start = sharding.own[index].start;
                        parts.insert(key.clone(), Part::flat(start, &group.parameters[index].size()));
                    }
                    state.push((key, tensor.shallow_clone()));
                }
            }
        }
        (state, parts)
    }

    /// Returns the other values of a checkpoint by pattern, or null if there are none.
    pub(super) fn values(&self) -> Json {
        let values: serde_json::Map<_, _> = self
            .groups
            .iter()
            .map(|group| (group.pattern.clone(), group.optimizer.values()))
            .filter(|(_, values)| !values.is_null())
            .collect();
        if values.is_empty() { Json::Null } else { values.into() }
    }

    pub(super) fn check_values(&self, saved: &Json) -> Result<()> {
        let scheduled = self.groups.iter().filter(|group| !group.optimizer.values().is_null());
        match scheduled.map(|group| &group.pattern).find(|pattern| saved.get(pattern.as_str()).is_none()) {
            Some(pattern) => Err(Error::Resume(format!(
                "the checkpoint has nothing of an optimizer for `{pattern}` that follows a schedule"
            ))),
            None => Ok(()),
        }
    }

    pub(super) fn load_values(&mut self, saved: &Json) -> Result<()> {
        self.check_values(saved)?;
        for Group { pattern, optimizer, .. } in &mut self.groups {
            if let Some(values) = saved.get(pattern.as_str()) {
                optimizer.load_values(values)?;
            }
        }
        Ok(())
    }

    /// Multiplies all learning rates.
    pub(super) fn scale_learning_rates(&mut self, factor: f64) {
        self.groups.iter_mut().for_each(|group| group.optimizer.scale_learning_rate(factor));
    }

    pub(super) fn use_clock(&mut self, clock: &RunClock) {
        self.groups.iter_mut().for_each(|group| group.optimizer.use_clock(clock));
    }

    /// Reduces all learning rates. `lr_factor` is the factor for the number of ranks. Returns the
    /// number of optimizers.
    pub(super) fn reduce_learning_rates(&mut self, reduction: &LrReduction, lr_factor: f64) -> usize {
        for group in &mut self.groups {
            if let Some(rate) = reduction.of(group.reduced_rate.unwrap_or(group.rate)) {
                group.reduced_rate = Some(rate);
                group.optimizer.set_learning_rate(rate * lr_factor);
            }
        }
        self.groups.len()
    }

    /// Returns the reduced learning rates, by pattern.
    pub(super) fn reduced_rates(&self) -> BTreeMap<String, f64> {
        let reduced = |group: &Group| Some((group.pattern.clone(), group.reduced_rate?));
        self.groups.iter().filter_map(reduced).collect()
    }

    /// Loads reduced learning rates. All other rates return to those that the optimizers were
    /// created with.
    pub(super) fn load_rates(&mut self, reduced: &BTreeMap<String, f64>, lr_factor: f64) {
        for group in &mut self.groups {
            let saved = reduced.get(&group.pattern).copied();
            if saved != group.reduced_rate {
                group.reduced_rate = saved;
                group.optimizer.set_learning_rate(saved.unwrap_or(group.rate) * lr_factor);
            }
        }
    }

    /// Returns the learning rates, by pattern.
    pub(super) fn learning_rates(&self) -> impl Iterator<Item = (&str, f64)> {
        self.groups.iter().map(|group| (group.pattern.as_str(), group.optimizer.learning_rate()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ice_c10d::testing::serve_store;
    use ice_c10d::{GlooOptions, ProcessGroup, Store};
    use tch::{Device, Kind};

    use super::*;
    use crate::optim::Sgd;

    #[test]
    fn parts_are_torn_from_their_update_until_the_step_counts() {
        let (_server, port) = serve_store().unwrap();
        let store = Store::tcp("127.0.0.1", port, Duration::from_secs(60)).unwrap();
        let group = ProcessGroup::gloo(&store, 0, 1, &GlooOptions::default()).unwrap();
        let worker = Rc::new(Worker::of_group(group, store, Device::Cpu));
        for (sharded_over, partially_updated) in [(None, false), (Some(&worker), true)] {
            let mut groups = Groups::default();
            groups.add("", Sgd::new(0.5));
            let parameter = Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            groups.set_up(&[("w".into(), parameter.shallow_clone())]).unwrap();
            groups.begin(sharded_over).unwrap();
            parameter.sum(Kind::Float).backward();
            groups.step().unwrap();
            assert_eq!(groups.are_partially_updated(), partially_updated);
            groups.step_counts();
            assert!(!groups.are_partially_updated());
            groups.step().unwrap();
            // A new round loads the shards.
            groups.begin(sharded_over).unwrap();
            assert!(!groups.are_partially_updated());
        }
    }
}
