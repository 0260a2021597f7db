mod averaging;
mod buffers;
mod collected;
mod flat;
mod groups;
mod over_ranks;
mod script;
mod sharding;
mod shared;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use ice_c10d::ReducerOptions;
use ice_c10d::optim::{clear_gradients, clip_grad_norm};
use ice_worker::Worker;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use tch::Tensor;
use tch::nn::{Path, VarStore};

use self::averaging::Averaging;
use self::buffers::Buffers;
use self::collected::Collected;
use self::groups::Groups;
use self::over_ranks::over_ranks;
pub use self::script::TorchScript;
pub use self::shared::SharedNode;
use self::shared::{Parts, Slot};
use crate::node::copy_tensors;
use crate::optim::Optimizer;
use crate::{Context, Error, LrReduction, Node, NodeState, Outputs, Result, Round, Value};

/// Creates the module under a path. The flag says whether the module has an optimizer.
type Build<M> = dyn FnOnce(&Path, bool) -> Result<M>;
type Forward<M, T> = dyn Fn(&M, &Outputs) -> Result<T>;

/// A module with parameters, its forward pass, and the optimizers that train it.
///
/// Every rank builds the module from the same seed and adopts rank 0's parameters. The reducer of
/// PyTorch's DistributedDataParallel averages the ranks' gradients in buckets while the backward
/// pass is still running. Parameters without an optimizer are frozen.
pub struct ModuleNode<M, T> {
    build: Option<Box<Build<M>>>,
    forward: Box<Forward<M, T>>,
    groups: Groups,
    clip: Option<f64>,
    sharded: bool,
    broadcast_buffers: bool,
    sync_batch_norm: bool,
    histograms: bool,
    options: ReducerOptions,
    ready: Option<Ready<M>>,
    slot: Rc<Slot<M>>,
}

struct Ready<M> {
    module: Rc<M>,
    store: VarStore,
    /// Trainable parameters in order of creation.
    trainable: Vec<(String, Tensor)>,
    /// The same without names.
    parameters: Vec<Tensor>,
    buffers: Rc<Buffers>,
    /// The buffers at the start of the step, if the step may have to be repeated.
    before: Vec<Tensor>,
    in_step: bool,
    worker: Rc<Worker>,
    averaging: Option<Averaging>,
    /// Gradients of passes in which a node runs backward itself.
    collected: Collected,
    /// The learned order in which forward uses the parameters.
    order: Vec<String>,
    /// Norm of the gradients of the last step, before clipping.
    norm: Option<Tensor>,
    /// Factor of the learning rates for the number of ranks.
    lr_factor: f64,
}

/// The values of a module in a checkpoint, in addition to its tensors.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Values {
    /// Positions of schedules, by pattern.
    optimizers: Json,
    /// The trained parameters in the order in which forward uses them. Empty if a single rank has
    /// trained.
    order: Vec<String>,
    /// Reduced learning rates by pattern, before any factor of a schedule or of the number of
    /// ranks.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    rates: BTreeMap<String, f64>,
}

impl<M: 'static, T: 'static> ModuleNode<M, T> {
    /// Creates a module and its forward pass. `build` creates the module's parameters under the
    /// given path. `forward` computes the output of a step, of any type.
    pub fn new(
        build: impl FnOnce(&Path) -> M + 'static,
        forward: impl Fn(&M, &Outputs) -> Result<T> + 'static,
    ) -> Self {
        Self::with_build(|path, _| Ok(build(path)), forward)
    }

    fn with_build(
        build: impl FnOnce(&Path, bool) -> Result<M> + 'static,
        forward: impl Fn(&M, &Outputs) -> Result<T> + 'static,
    ) -> Self {
        Self {
            build: Some(Box::new(build)),
            forward: Box::new(forward),
            groups: Groups::default(),
            clip: None,
            sharded: false,
            broadcast_buffers: true,
            sync_batch_norm: false,
            histograms: false,
            // Gradients may be views of the buckets: each step creates new ones, and no other code
            // keeps them.
            options: ReducerOptions { gradient_as_bucket_view: true, ..ReducerOptions::default() },
            ready: None,
            slot: Rc::default(),
        }
    }

    /// Creates another node that uses this module. Example: a discriminator judges the output of a
    /// generator, in the task that trains the generator.
    ///
    /// In a step that also trains this node, gradients of both uses accumulate in the module. In
    /// other steps its parameters are constants: gradients flow through it to its inputs. This node
    /// alone owns the parameters, buffers and optimizers, and must be in the graph.
    ///
    /// ```
    /// use ice_core::ModuleNode;
    /// use tch::nn::{self, Module as _};
    ///
    /// let critic = ModuleNode::new(
    ///     |path| nn::linear(path, 2, 1, Default::default()),
    ///     |net: &nn::Linear, x| Ok(net.forward(&x.tensor("real")?) - net.forward(&x.tensor("fake")?)),
    /// );
    /// let judge = critic.share(|net, x| Ok(net.forward(&x.tensor("fake")?)));
    /// ```
    pub fn share<U: 'static>(
        &self,
        forward: impl Fn(&M, &Outputs) -> Result<U> + 'static,
    ) -> SharedNode<M, U> {
        SharedNode::new(Rc::clone(&self.slot), Box::new(forward))
    }

    /// Trains all parameters that no other optimizer has with this optimizer.
    #[must_use]
    pub fn optimizer(self, optimizer: impl Optimizer + 'static) -> Self {
        self.optimizer_for("", optimizer)
    }

    /// Trains the parameters whose name matches the regular expression `pattern` with this
    /// optimizer, unless an earlier optimizer has them. Names are those of checkpoints:
    /// `encoder.layer1.weight`.
    ///
    /// A checkpoint stores the positions of schedules by pattern.
    #[must_use]
    pub fn optimizer_for(mut self, pattern: &str, optimizer: impl Optimizer + 'static) -> Self {
        self.groups.add(pattern, optimizer);
        self
    }

    /// Scales the averaged gradients so that their joint 2-norm is at most this.
    #[must_use]
    pub fn clip_grad_norm(mut self, largest: f64) -> Self {
        self.clip = Some(largest);
        self
    }

    /// Sets whether each rank keeps the optimizers' state of only its share of the parameters. The
    /// rank updates this shard and sends it to the others: the first stage of ZeRO (Rajbhandari et
    /// al., 2020). The result is that of whole optimizers. A checkpoint contains the whole state,
    /// in files of all ranks. Any number of ranks can load it, with or without sharding.
    ///
    /// A custom optimizer then receives parameters and gradients as rows of elements, some of them
    /// empty. It must treat every element alike, independent of its position.
    #[must_use]
    pub fn shard_optimizer(mut self, shard: bool) -> Self {
        self.sharded = shard;
        self
    }

    /// Sets whether every batch norm of `ice::nn` in the module computes its training statistics
    /// over the batches of all ranks, like after PyTorch's `convert_sync_batchnorm`. A
    /// [`SyncBatchNorm`](ice_nn::SyncBatchNorm) always does.
    #[must_use]
    pub fn sync_batch_norm(mut self, sync: bool) -> Self {
        self.sync_batch_norm = sync;
        self
    }

    /// Allows steps in which the loss does not depend on every parameter. All ranks must set this.
    #[must_use]
    pub fn find_unused_parameters(mut self, find: bool) -> Self {
        self.options.find_unused_parameters = find;
        self
    }

    /// Declares that every step uses the same parameters as the first, on all ranks. Parameters
    /// without gradients are then allowed, and need no search.
    #[must_use]
    pub fn static_graph(mut self, is_static: bool) -> Self {
        self.options.static_graph = is_static;
        self
    }

    /// Sets whether all ranks adopt rank 0's buffers, such as the statistics of a batch norm, after
    /// each training pass. Default: true, like in DistributedDataParallel.
    #[must_use]
    pub fn broadcast_buffers(mut self, broadcast: bool) -> Self {
        self.broadcast_buffers = broadcast;
        self
    }

    /// Sets whether to show histograms of the trained parameters and their last gradients at the
    /// end of each training epoch.
    #[must_use]
    pub fn histograms(mut self, show: bool) -> Self {
        self.histograms = show;
        self
    }

    /// Sets the size of a gradient bucket in MiB. Default: 25.
    #[must_use]
    pub fn bucket_cap_mb(mut self, mebibytes: usize) -> Self {
        self.options.bucket_cap_bytes = mebibytes << 20;
        self
    }

    /// Returns the module, after its set-up.
    ///
    /// # Errors
    /// [`Error::Graph`] if the module was not set up.
    pub fn module(&self) -> Result<&M> {
        Ok(&self.ready()?.module)
    }

    fn values(&self, ready: &Ready<M>) -> Json {
        let optimizers = self.groups.values();
        let (order, rates) = (ready.order(), self.groups.reduced_rates());
        if optimizers.is_null() && order.is_empty() && rates.is_empty() {
            return Json::Null;
        }
        serde_json::to_value(Values { optimizers, order, rates }).unwrap_or_default()
    }

    /// Sends rank 0's buffers to all ranks. Done here rather than before the next pass, so that an
    /// evaluation and a checkpoint see the same buffers.
    fn share_buffers(&self) -> Result<()> {
        let ready = self.ready()?;
        if self.broadcast_buffers { ready.buffers.broadcast(&ready.worker) } else { Ok(()) }
    }

    fn ready(&self) -> Result<&Ready<M>> {
        self.ready.as_ref().ok_or_else(|| Error::Graph("the module was not set up".into()))
    }

    fn ready_mut(&mut self) -> Result<&mut Ready<M>> {
        self.ready.as_mut().ok_or_else(|| Error::Graph("the module was not set up".into()))
    }
}

impl<M: 'static, T: 'static> Node for ModuleNode<M, T> {
    fn set_up(&mut self, context: &Context) -> Result<()> {
        if !self.groups.is_empty() && script::is_of_tch::<M>() {
            return Err(Error::Graph(
                "tch does not tell the buffers of a CModule, which checkpoints would lack: use ModuleNode::torch_script"
                    .into(),
            ));
        }
        let build = self.build.take().ok_or_else(|| Error::Graph("the module was set up twice".into()))?;
        tch::manual_seed(context.seed as i64);
        let worker = &context.worker;
        let store = VarStore::new(worker.device());
        let module = Rc::new(build(&store.root(), !self.groups.is_empty())?);
        let mut trainable = in_order(&store);
        self.groups.use_clock(&context.clock);
        let frozen = self.groups.set_up(&trainable)?;
        if !self.sharded {
            self.groups.begin(None)?;
        }
        for (_, parameter) in &frozen {
            let _ = parameter.set_requires_grad(false);
        }
        let parameters: HashSet<_> = trainable.iter().map(|(_, tensor)| tensor.data_ptr()).collect();
        let mut buffers = named(&store.variables());
        buffers.retain(|(_, tensor)| !parameters.contains(&tensor.data_ptr()));
        trainable.retain(|(_, parameter)| parameter.requires_grad());
        let buffers = Rc::new(Buffers::new(buffers.into_iter().map(|(_, tensor)| tensor).collect()));
        let before = if worker.can_stay() { buffers.copies() } else { Vec::new() };
        let parameters: Vec<_> = trainable.iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
        *self.slot.parts.borrow_mut() = Some(Parts {
            module: Rc::clone(&module),
            trainable: parameters.iter().map(Tensor::shallow_clone).collect(),
            buffers: Rc::clone(&buffers),
            broadcast_buffers: self.broadcast_buffers,
            sync_batch_norm: self.sync_batch_norm,
        });
        let worker = Rc::clone(worker);
        let (averaging, order, norm) = (None, Vec::new(), None);
        self.ready = Some(Ready {
            module,
            store,
            trainable,
            parameters,
            buffers,
            before,
            in_step: false,
            worker,
            averaging,
            collected: Collected::default(),
            order,
            norm,
            lr_factor: 1.0,
        });
        Ok(())
    }

    fn enter_round(&mut self, round: &Round) -> Result<()> {
        if self.sharded {
            self.groups.begin(Some(&round.worker).filter(|worker| worker.world_size() > 1))?;
        }
        let options = self.options.clone();
        let before = std::mem::replace(&mut self.ready_mut()?.lr_factor, round.lr_factor);
        if before != round.lr_factor {
            self.groups.scale_learning_rates(round.lr_factor / before);
        }
        let ready = self.ready_mut()?;
        if round.is_fresh {
            // Other ranks may not have the same order, so all start without one.
            ready.order.clear();
        }
        ready.averaging = match round.worker.group().filter(|group| group.world_size() > 1) {
            Some(group) if !ready.trainable.is_empty() => {
                Some(Averaging::new(&ready.trainable, &ready.order, &group, &options)?)
            }
            _ => None,
        };
        Ok(())
    }

    fn leave_round(&mut self) {
        if let Some(ready) = &mut self.ready {
            ready.order = ready.order();
            // The gradients are views of the reducer's buckets.
            let cleared = clear_gradients(&ready.parameters);
            drop((cleared, ready.averaging.take()));
        }
    }

    fn before_step(&mut self) -> Result<()> {
        self.slot.is_trained.set(true);
        let ready = self.ready_mut()?;
        ready.in_step = true;
        ready.collected.clear();
        ready.buffers.save(&ready.before)?;
        Ok(clear_gradients(&ready.parameters)?)
    }

    fn step_end(&mut self) -> Result<()> {
        self.slot.is_trained.set(false);
        self.groups.step_counts();
        self.ready_mut()?.in_step = false;
        Ok(())
    }

    fn roll_back(&mut self) {
        self.slot.is_trained.set(false);
        // An evaluation changes no buffers, so only a training step restores them.
        if let Some(ready) = self.ready.as_mut().filter(|ready| ready.in_step) {
            ready.in_step = false;
            ready.buffers.restore(&ready.before);
        }
    }

    fn before_pass(&mut self, last: bool) -> Result<()> {
        match &self.ready()?.averaging {
            Some(averaging) if last => averaging.prepare_forward(),
            _ => Ok(()),
        }
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let ready = self.ready()?;
        let forward = || (self.forward)(&ready.module, x);
        Ok(Value::new(over_ranks(&ready.worker, x, self.sync_batch_norm, forward)?))
    }

    fn before_backward(&mut self, loss: &Tensor, last: bool) -> Result<()> {
        match &mut self.ready_mut()?.averaging {
            Some(averaging) if last => averaging.prepare_backward(loss),
            _ => Ok(()),
        }
    }

    fn after_backward(&mut self, last: bool) -> Result<()> {
        self.share_buffers()?;
        match &mut self.ready_mut()?.averaging {
            Some(averaging) if last => averaging.after_backward(),
            _ => Ok(()),
        }
    }

    fn collect_gradients(&mut self, factor: f64, last: bool, exchange: bool) -> Result<()> {
        self.share_buffers()?;
        let ready = self.ready_mut()?;
        ready.collected.add(&ready.parameters, factor, last)?;
        if exchange { ready.collected.average(&ready.parameters, &ready.worker) } else { Ok(()) }
    }

    fn gradients(&self) -> Vec<Tensor> {
        let parameters = self.ready.iter().flat_map(|ready| &ready.parameters);
        parameters.map(Tensor::grad).filter(Tensor::defined).collect()
    }

    fn sparse_gradients(&self) -> Vec<String> {
        let trainable = self.ready.iter().flat_map(|ready| &ready.trainable);
        let is_sparse = |tensor: &Tensor| tensor.grad().defined() && tensor.grad().is_sparse();
        trainable.filter(|(_, tensor)| is_sparse(tensor)).map(|(name, _)| name.clone()).collect()
    }

    fn update(&mut self) -> Result<()> {
        if let Some(largest) = self.clip {
            let gradients = self.gradients();
            if !gradients.is_empty() {
                self.ready_mut()?.norm = Some(clip_grad_norm(&gradients, largest)?);
            }
        }
        self.groups.step()
    }

    fn reduce_learning_rates(&mut self, reduction: &LrReduction) -> usize {
        let lr_factor = self.ready.as_ref().map_or(1.0, |ready| ready.lr_factor);
        self.groups.reduce_learning_rates(reduction, lr_factor)
    }

    fn scalars(&self) -> Vec<(String, f64)> {
        let rates = self.groups.learning_rates().map(|(pattern, rate)| match pattern {
            "" => ("lr".to_owned(), rate),
            pattern => (format!("lr of {pattern}"), rate),
        });
        let norm = self.ready.as_ref().and_then(|ready| ready.norm.as_ref());
        rates.chain(norm.map(|norm| ("gradient norm".to_owned(), norm.double_value(&[])))).collect()
    }

    fn histograms(&self) -> Vec<(String, Tensor)> {
        let Some(ready) = self.ready.as_ref().filter(|_| self.histograms) else { return Vec::new() };
        let trained = in_order(&ready.store).into_iter().filter(|(_, tensor)| tensor.requires_grad());
        let with_gradient = |(name, tensor): (String, Tensor)| {
            let gradient = Some(tensor.grad()).filter(Tensor::defined);
            let gradient = gradient.map(|gradient| (format!("{name}.gradient"), gradient));
            std::iter::once((name, tensor)).chain(gradient)
        };
        trained.flat_map(with_gradient).collect()
    }

    fn state(&self) -> NodeState {
        let Some(ready) = &self.ready else { return NodeState::default() };
        let (optimizer, optimizer_parts) = self.groups.state();
        NodeState {
            model: named(&ready.store.variables()),
            optimizer,
            optimizer_parts,
            values: self.values(ready),
            ..NodeState::default()
        }
    }

    fn requires_values(&self) -> bool {
        !self.groups.values().is_null()
    }

    fn is_sharded(&self) -> bool {
        self.sharded
    }

    fn is_partially_updated(&self) -> bool {
        self.groups.are_partially_updated()
    }

    fn check_values(&self, values: &Json) -> Result<()> {
        self.groups.check_values(&parse(values)?.optimizers)
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        let state = self.state();
        copy_tensors(&saved.model, &state.model, "parameters")?;
        copy_tensors(&saved.optimizer, &state.optimizer, "optimizer's tensors")?;
        let values = parse(&saved.values)?;
        let options = self.options.clone();
        let ready = self.ready_mut()?;
        if ready.order() != values.order {
            ready.order = values.order;
            if let (Some(_), Some(group)) = (ready.averaging.take(), ready.worker.group()) {
                ready.averaging = Some(Averaging::new(&ready.trainable, &ready.order, &group, &options)?);
            }
        }
        let lr_factor = ready.lr_factor;
        self.groups.load_values(&values.optimizers)?;
        self.groups.load_rates(&values.rates, lr_factor);
        Ok(())
    }
}

impl<M> Ready<M> {
    /// Returns the names of the trained parameters in the order in which forward uses them. Empty
    /// if the order is not known.
    fn order(&self) -> Vec<String> {
        match &self.averaging {
            Some(averaging) => averaging.order().into_iter().map(ToOwned::to_owned).collect(),
            None => self.order.clone(),
        }
    }
}

/// Parses the saved values. Null is accepted, since a checkpoint that is loaded in part may have
/// none.
fn parse(values: &Json) -> Result<Values> {
    if values.is_null() {
        return Ok(Values::default());
    }
    Values::deserialize(values)
        .map_err(|error| Error::Resume(format!("what is saved of the optimizers does not fit: {error}")))
}

/// Returns the variables in order of their names.
fn named(variables: &HashMap<String, Tensor>) -> Vec<(String, Tensor)> {
    let mut named: Vec<_> =
        variables.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    named
}

/// Returns the trainable variables in order of their creation. The reducer's buckets follow this
/// order, which is close to the order in which the forward pass uses the variables.
fn in_order(store: &VarStore) -> Vec<(String, Tensor)> {
    let names: HashMap<_, _> =
        store.variables().into_iter().map(|(name, tensor)| (tensor.data_ptr(), name)).collect();
    store
        .trainable_variables()
        .into_iter()
        .filter_map(|tensor| Some((names.get(&tensor.data_ptr())?.clone(), tensor)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use ice_worker::Worker;
    use tch::{Device, Kind, nn};

    use super::*;
    use crate::optim::Sgd;

    fn node() -> ModuleNode<nn::Linear, Tensor> {
        let build = |path: &Path| nn::linear(path / "layer", 3, 2, nn::LinearConfig::default());
        let mut node = ModuleNode::new(build, |_, x| x.tensor("x")).optimizer(Sgd::new(0.5).momentum(0.9));
        node.set_up(&Context::new(Rc::new(Worker::alone(Device::Cpu)), 3)).unwrap();
        node
    }

    fn step(node: &mut ModuleNode<nn::Linear, Tensor>) {
        node.before_step().unwrap();
        let weight = &node.ready().unwrap().module.ws;
        weight.square().sum(Kind::Float).backward();
        node.update().unwrap();
    }

    #[test]
    fn parameters_have_pytorchs_names() {
        let names: Vec<_> = node().state().model.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["layer.bias", "layer.weight"]);
    }

    #[test]
    fn each_parameter_has_the_first_optimizer_whose_pattern_fits_and_others_are_frozen() {
        let build = |path: &Path| {
            let layer = |name: &str| nn::linear(path / name, 2, 2, nn::LinearConfig::default());
            [layer("first"), layer("second")]
        };
        let mut node = ModuleNode::new(build, |_, x| x.tensor("x"))
            .optimizer_for(r"^first\.bias$", Sgd::new(1.0))
            .optimizer_for("first", Sgd::new(10.0));
        node.set_up(&Context::new(Rc::new(Worker::alone(Device::Cpu)), 3)).unwrap();
        let before: Vec<_> = node.state().model.into_iter().map(|(_, tensor)| tensor.copy()).collect();
        node.before_step().unwrap();
        let layers = &node.ready().unwrap().module;
        let sum: Tensor = layers
            .iter()
            .map(|layer| layer.ws.sum(Kind::Float) + layer.bs.as_ref().unwrap().sum(Kind::Float))
            .sum();
        sum.backward();
        node.update().unwrap();
        let moved: Vec<_> = node
            .state()
            .model
            .iter()
            .zip(&before)
            .map(|((name, after), before)| (name.clone(), (before - after).max().double_value(&[])))
            .collect();
        let expected =
            [("first.bias", 1.0), ("first.weight", 10.0), ("second.bias", 0.0), ("second.weight", 0.0)];
        for ((name, moved), (expected_name, expected)) in moved.iter().zip(expected) {
            assert!(name == expected_name && (moved - expected).abs() < 1e-5, "{name}: {moved}");
        }
        assert!(!node.ready().unwrap().module[1].ws.requires_grad());
        let rates: Vec<f64> = node.scalars().into_iter().map(|(_, rate)| rate).collect();
        assert_eq!(rates, [1.0, 10.0]);
    }

    #[test]
    fn gradients_are_clipped_before_the_step() {
        let mut node = node().clip_grad_norm(0.5);
        let before = node.ready().unwrap().module.ws.copy();
        step(&mut node);
        let moved = (before - &node.ready().unwrap().module.ws).norm().double_value(&[]);
        assert!((moved - 0.5 * 0.5).abs() < 1e-5, "{moved}");
        assert_eq!(node.scalars().len(), 2);
    }

    #[test]
    fn a_pattern_that_is_none_is_named() {
        let build = |path: &Path| nn::linear(path / "layer", 3, 2, nn::LinearConfig::default());
        let mut node = ModuleNode::new(build, |_, x| x.tensor("x")).optimizer_for("(", Sgd::new(1.0));
        let error = node.set_up(&Context::new(Rc::new(Worker::alone(Device::Cpu)), 3)).unwrap_err();
        assert!(error.is_usage() && error.to_string().contains("`(`"), "{error}");
    }

    #[test]
    fn state_carries_over_to_a_new_node_exactly() {
        let (mut first, mut second) = (node(), node());
        step(&mut first);
        let copy = |tensors: Vec<(String, Tensor)>| tensors.into_iter().map(|(k, t)| (k, t.copy())).collect();
        let state = first.state();
        let saved =
            NodeState { model: copy(state.model), optimizer: copy(state.optimizer), ..NodeState::default() };
        second.load_state(&saved).unwrap();
        step(&mut first);
        step(&mut second);
        for ((name, a), (_, b)) in first.state().model.iter().zip(&second.state().model) {
            assert_eq!(a, b, "{name}");
        }
    }

    #[test]
    fn a_missing_key_is_named() {
        let mut node = node();
        let mut saved = NodeState::default();
        saved.model.push(("layer.weight".into(), Tensor::zeros([2, 3], (Kind::Float, Device::Cpu))));
        let message = node.load_state(&saved).unwrap_err().to_string();
        assert!(message.contains("layer.bias"), "{message}");
    }
}
