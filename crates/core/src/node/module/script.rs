//! Modules that Python has saved as TorchScript.

use std::any::TypeId;
use std::cell::RefCell;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

use ice_c10d::ScriptModule;
use tch::{CModule, Tensor, TrainableCModule, nn};

use super::ModuleNode;
use crate::{Error, Outputs, Result};

/// A TorchScript module in a [`ModuleNode`], created by [`ModuleNode::torch_script`].
pub struct TorchScript(RefCell<ScriptModule>);

impl TorchScript {
    /// Runs `forward` of the module on these tensors, in training mode in a training step and in
    /// evaluation mode otherwise.
    ///
    /// # Errors
    /// The failure of an operation, or an output that is not a single tensor.
    /// [`TorchScript::forward_all`] returns several tensors.
    pub fn forward(&self, x: &Outputs, inputs: &[Tensor]) -> Result<Tensor> {
        let outputs = self.forward_all(x, inputs)?;
        match <[Tensor; 1]>::try_from(outputs) {
            Ok([output]) => Ok(output),
            Err(outputs) => Err(Error::Graph(format!(
                "forward of the TorchScript module returns {} tensors: take them with forward_all",
                outputs.len()
            ))),
        }
    }

    /// Like [`TorchScript::forward`], for a module that returns several tensors in a tuple or a
    /// list.
    ///
    /// # Errors
    /// The failure of an operation, or an output with anything other than tensors.
    pub fn forward_all(&self, x: &Outputs, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(self.0.borrow_mut().forward(inputs, x.is_training())?)
    }
}

impl<T: 'static> ModuleNode<TorchScript, T> {
    /// Creates a module that Python has saved with `torch.jit.script(module).save(path)`, and its
    /// forward pass. The file must exist on each node.
    ///
    /// Its parameters and buffers have PyTorch's names. Like those of other modules, they are
    /// saved, resumed and sent to restarted ranks, and gradients are averaged.
    ///
    /// ```
    /// use ice_core::ModuleNode;
    /// use ice_core::optim::Sgd;
    ///
    /// let net = ModuleNode::torch_script("net.pt", |net, x| net.forward(x, &[x.tensor("images")?]));
    /// let net = net.optimizer(Sgd::new(0.1));
    /// ```
    ///
    /// The set-up fails if the file is missing. With an optimizer, it also fails if the module has
    /// no parameters, or was traced with a batch norm or a dropout: tracing fixes their mode.
    pub fn torch_script(
        file: impl Into<PathBuf>,
        forward: impl Fn(&TorchScript, &Outputs) -> Result<T> + 'static,
    ) -> Self {
        let file = file.into();
        Self::with_build(move |path, is_trained| load(&file, path, is_trained), forward)
    }
}

/// Whether this is a TorchScript module type of tch itself.
pub(super) fn is_of_tch<M: 'static>() -> bool {
    [TypeId::of::<CModule>(), TypeId::of::<TrainableCModule>()].contains(&TypeId::of::<M>())
}

fn load(file: &Path, path: &nn::Path, is_trained: bool) -> Result<TorchScript> {
    let fail = |problem: &str| Error::Data { path: file.to_owned(), problem: problem.to_owned() };
    let module = ScriptModule::load(file, path.device()).map_err(|error| {
        fail(&format!("cannot be loaded as a TorchScript module, which torch.jit.script(module).save(path) writes: {error}"))
    })?;
    if is_trained && module.parameters().is_empty() {
        return Err(fail(
            "has no parameters to train: torch.jit.freeze makes them constants, so save the module without it",
        ));
    }
    if is_trained && module.has_fixed_mode()? {
        return Err(fail(
            "has a batch norm or a dropout whose mode is a constant, as torch.jit.trace makes it: save the module with torch.jit.script, \
             and give functions such as dropout `self.training`",
        ));
    }
    let mut known = HashSet::new();
    let mut add = |name: &str, tensor: &Tensor, is_trainable: bool| {
        // A tensor with two names is one parameter, under its first name.
        if tensor.numel() > 0 && !known.insert(tensor.data_ptr()) {
            return;
        }
        let (folders, name) =
            name.rsplit_once('.').map_or((None, name), |(folders, name)| (Some(folders), name));
        let folders = folders.into_iter().flat_map(|folders| folders.split('.'));
        let at = folders.fold(path.set_group(0), |path, folder| path.sub(folder));
        let _ = at.add(name, tensor.shallow_clone(), is_trainable);
    };
    for (name, tensor) in module.parameters() {
        add(name, tensor, tensor.requires_grad());
    }
    for (name, tensor) in module.buffers() {
        add(name, tensor, false);
    }
    Ok(TorchScript(RefCell::new(module)))
}
