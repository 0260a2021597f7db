use std::collections::HashMap;

use ice_c10d::{Reducer, ReducerOptions};
use tch::Tensor;
use tch::nn::{Path, VarStore};

use crate::node::copy_tensors;
use crate::optim::Optimizer;
use crate::{Context, Error, Node, NodeState, Outputs, Result, Value};

type Build<M> = dyn FnOnce(&Path) -> M;
type Forward<M, T> = dyn Fn(&M, &Outputs) -> Result<T>;

/// A module with parameters, what it does in a step, and the optimizer that trains it.
///
/// Every rank builds the module from the same seed and takes over rank 0's parameters; the gradients of the ranks are averaged in
/// buckets while the backward pass is still running, by the reducer of PyTorch's DistributedDataParallel. Without an
/// optimizer the parameters are frozen.
pub struct ModuleNode<M, T> {
    build: Option<Box<Build<M>>>,
    forward: Box<Forward<M, T>>,
    optimizer: Option<Box<dyn Optimizer>>,
    options: ReducerOptions,
    ready: Option<Ready<M>>,
}

struct Ready<M> {
    module: M,
    store: VarStore,
    trainable: Vec<(String, Tensor)>,
    reducer: Option<Reducer>,
}

impl<M: 'static, T: 'static> ModuleNode<M, T> {
    /// A module and its forward pass. `build` makes the module's parameters under the given path; `forward` makes the output
    /// of a step, of any type.
    pub fn new(
        build: impl FnOnce(&Path) -> M + 'static,
        forward: impl Fn(&M, &Outputs) -> Result<T> + 'static,
    ) -> Self {
        Self {
            build: Some(Box::new(build)),
            forward: Box::new(forward),
            optimizer: None,
            options: ReducerOptions::default(),
            ready: None,
        }
    }

    /// Trains all parameters of the module with this optimizer.
    #[must_use]
    pub fn optimizer(mut self, optimizer: impl Optimizer + 'static) -> Self {
        self.optimizer = Some(Box::new(optimizer));
        self
    }

    /// Allows steps in which the loss does not depend on every parameter. All ranks must then say so.
    #[must_use]
    pub fn find_unused_parameters(mut self, find: bool) -> Self {
        self.options.find_unused_parameters = find;
        self
    }

    /// The size of a gradient bucket in MiB; 25 unless given.
    #[must_use]
    pub fn bucket_cap_mb(mut self, mebibytes: usize) -> Self {
        self.options.bucket_cap_bytes = mebibytes << 20;
        self
    }

    fn ready(&self) -> Result<&Ready<M>> {
        self.ready.as_ref().ok_or_else(|| Error::Graph("the module was not set up".into()))
    }
}

impl<M: 'static, T: 'static> Node for ModuleNode<M, T> {
    fn set_up(&mut self, context: &Context) -> Result<()> {
        let build = self.build.take().ok_or_else(|| Error::Graph("the module was set up twice".into()))?;
        tch::manual_seed(context.seed as i64);
        let mut store = VarStore::new(context.worker.device());
        let module = build(&store.root());
        if self.optimizer.is_none() {
            store.freeze();
        }
        for (_, tensor) in named(&store.variables()) {
            tch::no_grad(|| context.worker.broadcast(&tensor.detach()))?;
        }
        let trainable = in_order(&store);
        let tensors: Vec<_> = trainable.iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
        if let Some(optimizer) = &mut self.optimizer {
            optimizer.set_up(&tensors);
        }
        let reducer = match context.worker.group() {
            Some(group) if group.world_size() > 1 && !trainable.is_empty() => {
                Some(Reducer::new(&trainable, group, &self.options)?)
            }
            _ => None,
        };
        self.ready = Some(Ready { module, store, trainable, reducer });
        Ok(())
    }

    fn before_step(&mut self) -> Result<()> {
        let ready = self.ready()?;
        for (_, parameter) in &ready.trainable {
            let mut gradient = parameter.grad();
            if gradient.defined() {
                let _ = gradient.f_zero_()?;
            }
        }
        match &ready.reducer {
            Some(reducer) => Ok(reducer.prepare_forward()?),
            None => Ok(()),
        }
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let ready = self.ready()?;
        Ok(Value::new((self.forward)(&ready.module, x)?))
    }

    fn before_backward(&mut self, loss: &Tensor) -> Result<()> {
        match &self.ready()?.reducer {
            Some(reducer) => Ok(reducer.prepare_backward(&[loss])?),
            None => Ok(()),
        }
    }

    fn update(&mut self) -> Result<()> {
        let Some(ready) = &self.ready else { return Ok(()) };
        let Some(optimizer) = &mut self.optimizer else { return Ok(()) };
        let (parameters, gradients): (Vec<_>, Vec<_>) = ready
            .trainable
            .iter()
            .map(|(_, parameter)| {
                let gradient = parameter.grad();
                let gradient = if gradient.defined() { gradient } else { parameter.zeros_like() };
                (parameter.detach(), gradient)
            })
            .unzip();
        optimizer.step(&parameters, &gradients)
    }

    fn state(&self) -> NodeState {
        let Some(ready) = &self.ready else { return NodeState::default() };
        let optimizer = self.optimizer.as_ref().map(|optimizer| optimizer_state(optimizer.as_ref(), ready));
        NodeState {
            model: named(&ready.store.variables()),
            optimizer: optimizer.unwrap_or_default(),
            ..NodeState::default()
        }
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        let state = self.state();
        copy_tensors(&saved.model, &state.model, "parameters")?;
        copy_tensors(&saved.optimizer, &state.optimizer, "optimizer's tensors")
    }
}

fn optimizer_state<M>(optimizer: &dyn Optimizer, ready: &Ready<M>) -> Vec<(String, Tensor)> {
    let mut state = Vec::new();
    for (slot, tensors) in optimizer.state() {
        for ((name, _), tensor) in ready.trainable.iter().zip(tensors) {
            state.push((format!("{name}.{slot}"), tensor.shallow_clone()));
        }
    }
    state
}

/// The variables in order of their names.
fn named(variables: &HashMap<String, Tensor>) -> Vec<(String, Tensor)> {
    let mut named: Vec<_> =
        variables.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    named
}

/// The trainable variables in order of their creation, which is nearly the order that the forward pass uses them in: the
/// buckets of the reducer follow it.
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
        node.set_up(&Context { worker: Rc::new(Worker::alone(Device::Cpu)), seed: 3 }).unwrap();
        node
    }

    fn step(node: &mut ModuleNode<nn::Linear, Tensor>) {
        node.before_step().unwrap();
        let weight = &node.ready().unwrap().module.ws;
        weight.square().sum(Kind::Float).backward();
        node.update().unwrap();
    }

    #[test]
    fn parameters_have_pytorchs_names_and_creation_order() {
        let node = node();
        let names: Vec<_> = node.ready().unwrap().trainable.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names.len(), 2);
        assert!(names.contains(&"layer.weight") && names.contains(&"layer.bias"), "{names:?}");
        assert_eq!(
            node.ready().unwrap().trainable.iter().map(|(_, tensor)| tensor.numel()).sum::<usize>(),
            8
        );
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
