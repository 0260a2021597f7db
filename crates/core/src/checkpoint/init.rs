//! Initial parameters, from files of PyTorch and other programs.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use ice_checkpoint::{Checkpoint, Saved, Section};
use ice_worker::Worker;
use regex::Regex;
use safetensors::Dtype;
use tch::{Kind, Tensor};

use super::compat::Report;
use super::load::{Loading, Target, owner};
use super::{Selection, dtype, key_prefix};
use crate::graph::Entry;
use crate::{Error, HyperGraph, NodeState, Result};

/// Counter of PyTorch's batch norms. Only batch norms without a momentum read it.
const BATCH_COUNTER: &str = "num_batches_tracked";

/// Initial parameters of a run, from safetensors files instead of random values.
///
/// The files must contain every parameter and buffer, in its shape, and nothing else.
/// Floating-point types are converted into each other. The counters `num_batches_tracked` of
/// PyTorch's batch norms may be missing on either side.
///
/// ```
/// use ice_core::InitFrom;
///
/// // A ResNet that was trained with DistributedDataParallel on other classes.
/// let init = InitFrom::new("resnet18.safetensors").rename(r"^module\.", "")?.skip(r"^fc\.")?;
/// # Ok::<(), ice_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct InitFrom {
    path: PathBuf,
    renames: Vec<(Regex, String)>,
    skips: Vec<Regex>,
    strict: bool,
}

impl InitFrom {
    /// Reads the parameters from `path`. The keys are those of a checkpoint's model, or PyTorch's
    /// own keys if a single node has all parameters. `path` is one of:
    ///
    /// - a safetensors file, or the index of a sharded model (`*.index.json`);
    /// - a folder with `model.safetensors.index.json` or `model.safetensors`;
    /// - the folder of a checkpoint;
    /// - the folder of a run (its newest checkpoint), or the folder `best` in it.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), renames: Vec::new(), skips: Vec::new(), strict: true }
    }

    /// Replaces the first match of the regular expression `pattern` in each key of the files. `$1`
    /// in `replacement` is the first group of the pattern. Several replacements are applied in the
    /// given order.
    ///
    /// # Errors
    /// [`Error::Usage`] if `pattern` is not a regular expression.
    pub fn rename(mut self, pattern: &str, replacement: &str) -> Result<Self> {
        self.renames.push((regex(pattern)?, replacement.to_owned()));
        Ok(self)
    }

    /// Skips the parameters whose key matches the regular expression `pattern`, both of the program
    /// and of the files. They start with random values. Keys of the files are matched after
    /// renaming, with or without the name of the node.
    ///
    /// # Errors
    /// [`Error::Usage`] if `pattern` is not a regular expression.
    pub fn skip(mut self, pattern: &str) -> Result<Self> {
        self.skips.push(regex(pattern)?);
        Ok(self)
    }

    /// Sets whether the files must contain all parameters and no others. If false, missing
    /// parameters start with random values, and a warning names them and the unexpected ones, like
    /// `strict=False` of PyTorch's `load_state_dict`. Different shapes are always an error.
    /// Default: true.
    #[must_use]
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Finds the parameters of the graph, and returns them under the keys of a checkpoint.
    pub(crate) fn find(&self, graph: &HyperGraph) -> Result<Checkpoint> {
        let found = Checkpoint::of_parameters(&self.path)?;
        let found = found.map_keys(|key| self.renamed(key)).map_err(|error| {
            Error::Usage(format!("{}: --init-rename makes keys equal: {error}", self.path.display()))
        })?;
        let prefix = prefix(&found.catalog().model.keys().map(String::as_str).collect::<Vec<_>>(), graph);
        Ok(found.map_keys(|key| format!("{prefix}{key}"))?)
    }

    /// Loads the parameters on every rank. Rank 0 reads for all. Collective.
    pub(crate) fn load(&self, found: &Checkpoint, graph: &HyperGraph, worker: &Worker) -> Result<()> {
        let (mut loading, fit) = self.fit(found, graph, Use::Begin)?;
        if worker.is_main() {
            println!("beginning with {}", fit.summary(&self.path, loading.targets.len()));
            fit.warn(&self.path);
        }
        loading.fill(found, None, graph, &Selection::All, worker)
    }

    /// Loads the nodes of a graph that is run by hand, both tensors and other values. Ignores other
    /// nodes of the files.
    pub(crate) fn load_trained(&self, graph: &HyperGraph, worker: &Worker) -> Result<()> {
        let found = self.find(graph)?;
        let (mut loading, fit) = self.fit(&found, graph, Use::Trained)?;
        fit.warn(&self.path);
        let nodes = &found.manifest().nodes;
        let mut states = Vec::new();
        for entry in graph.entries() {
            let node = entry.node.borrow();
            if let Some(values) = nodes.get(&entry.uid)
                && !node.is_measure()
                && node.remaining().is_none()
            {
                node.check_values(values).map_err(|error| error.at(&entry.uid, "check of the checkpoint"))?;
                states.push((entry, NodeState { values: values.clone(), ..node.state() }));
            }
        }
        loading.fill(&found, None, graph, &Selection::All, worker)?;
        for (entry, state) in states {
            entry.node.borrow_mut().load_state(&state).map_err(|error| error.at(&entry.uid, "load"))?;
        }
        Ok(())
    }

    /// Compares files and graph. Differences are one error that names all of them, or are returned
    /// for a warning.
    fn fit(&self, found: &Checkpoint, graph: &HyperGraph, usage: Use) -> Result<(Loading, Fit)> {
        let mut fit = Fit::default();
        let loading = self.compare(found, graph, usage, &mut fit)?;
        let differs = !fit.different.is_none();
        let problem = if differs || self.strict && !fit.absent.is_none() {
            "does not have the parameters of this program"
        } else if loading.targets.is_empty() {
            "has no parameter of this program"
        } else {
            return Ok((loading, fit));
        };
        let reports = [&fit.different, &fit.absent].map(|report| report.to_string());
        let reports: Vec<_> = reports.into_iter().filter(|report| !report.is_empty()).collect();
        Err(Error::Usage(format!(
            "{} {problem}: {}\n  hint: {}",
            self.path.display(),
            reports.join("\n  "),
            self.hint(found, graph, differs, usage)
        )))
    }

    fn compare(&self, found: &Checkpoint, graph: &HyperGraph, usage: Use, fit: &mut Fit) -> Result<Loading> {
        let mut loading = Loading::default();
        let mut left: BTreeSet<_> = found.catalog().model.keys().collect();
        for entry in graph.entries() {
            let prefix = key_prefix(&entry.uid);
            let state = entry.node.borrow().state();
            for (key, tensor) in &state.model {
                let (full, part) = (format!("{prefix}{key}"), state.model_parts.get(key));
                if self.skips(&full, key) {
                    continue;
                }
                left.remove(&full);
                let Some(saved) = found.catalog().model.get(&full) else {
                    if !is_batch_counter(key) {
                        fit.absent.of(&entry.uid).missing.push(key.clone());
                    }
                    continue;
                };
                let shape = part.map_or_else(|| dtype::shape(tensor), |part| part.of.clone());
                if let Some(difference) = difference(key, tensor.kind(), &shape, saved) {
                    fit.different.of(&entry.uid).different.push(difference);
                    continue;
                }
                if dtype::kind(saved.dtype) != Ok(tensor.kind()) {
                    let types = format!("{:?} to {:?}", saved.dtype, tensor.kind());
                    *fit.converted.entry(types).or_default() += 1;
                }
                loading.targets.insert((Section::Model, full), Target::new(tensor, part)?);
            }
        }
        for full in left {
            let uid = owner(graph, full);
            let key = uid.map_or(full.as_str(), |uid| &full[key_prefix(uid).len()..]);
            match uid {
                _ if is_batch_counter(full) || self.skips(full, key) => {}
                Some(uid) => fit.absent.of(uid).unexpected.push(key.into()),
                None if usage == Use::Trained => {}
                None => fit.absent.nobodys(full),
            }
        }
        Ok(loading)
    }

    fn renamed(&self, key: &str) -> String {
        self.renames.iter().fold(key.to_owned(), |key, (pattern, replacement)| {
            pattern.replace(&key, replacement.as_str()).into_owned()
        })
    }

    fn skips(&self, full: &str, key: &str) -> bool {
        self.skips.iter().any(|pattern| pattern.is_match(full) || pattern.is_match(key))
    }

    /// Returns the remedy for parameters that do not fit.
    fn hint(&self, found: &Checkpoint, graph: &HyperGraph, differs: bool, usage: Use) -> String {
        if let Some(first) = common_prefix(found, graph).map(|first| regex::escape(&first)) {
            return match usage {
                Use::Begin => format!("--init-rename '^{first}='"),
                Use::Trained => format!("InitFrom::new(path).rename(r\"^{first}\", \"\")?"),
            };
        }
        match differs {
            _ if usage == Use::Trained => "InitFrom has rename for keys, skip for parameters to leave out, and strict(false)".into(),
            true => "--init-skip PATTERN leaves out the parameters whose keys have a match, of the program and of the file".into(),
            false => "--init-rename PATTERN=REPLACEMENT renames keys of the file, --init-skip PATTERN leaves keys out, \
                      and --init-partial loads what there is"
                .into(),
        }
    }
}

/// Returns the common prefix of all keys of the files, up to the first dot, if more keys fit
/// without it.
fn common_prefix(found: &Checkpoint, graph: &HyperGraph) -> Option<String> {
    let node = only_owner(graph).unwrap_or_default();
    let keys = found.catalog().model.keys().map(|key| key.strip_prefix(&node).unwrap_or(key));
    let keys: Vec<_> = keys.collect();
    let (first, _) = keys.first()?.split_once('.')?;
    let first = format!("{first}.");
    let rest: Vec<_> = keys.iter().map(|key| key.strip_prefix(&first)).collect::<Option<_>>()?;
    let fitting =
        |keys: &[&str]| [&node, ""].map(|prefix| fitting(keys, prefix, &wanted(graph))).into_iter().max();
    (fitting(&rest) > fitting(&keys)).then_some(first)
}

impl From<PathBuf> for InitFrom {
    fn from(path: PathBuf) -> Self {
        Self::new(path)
    }
}

impl From<&Path> for InitFrom {
    fn from(path: &Path) -> Self {
        Self::new(path)
    }
}

impl From<&str> for InitFrom {
    fn from(path: &str) -> Self {
        Self::new(path)
    }
}

/// The purpose of the parameters.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// A run starts with them. Parameters that belong to no node are an error.
    Begin,
    /// They are used unchanged, possibly by a part of the trained graph.
    Trained,
}

/// Result of comparing files and graph.
#[derive(Default)]
struct Fit {
    /// Parameters that only one side has.
    absent: Report,
    different: Report,
    /// Number of converted tensors, by conversion.
    converted: BTreeMap<String, usize>,
}

impl Fit {
    fn summary(&self, path: &Path, loaded: usize) -> String {
        let of_types =
            self.converted.iter().map(|(types, count)| format!(", {count} converted from {types}"));
        let plural = if loaded == 1 { "" } else { "s" };
        format!("{loaded} tensor{plural} of {}{}", path.display(), of_types.collect::<String>())
    }

    fn warn(&self, path: &Path) {
        if !self.absent.is_none() {
            tracing::warn!("{} was loaded in part: {}", path.display(), self.absent);
        }
    }
}

/// Returns the reason that a saved tensor cannot be loaded into a tensor of this kind and shape, if
/// there is one.
fn difference(key: &str, kind: Kind, shape: &[u64], saved: &Saved) -> Option<String> {
    let is_float = |kind: Kind| matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double);
    let fits = match dtype::kind(saved.dtype) {
        Ok(own) => own == kind || is_float(own) && is_float(kind),
        Err(_) => false,
    };
    if shape != saved.shape {
        return Some(format!("`{key}` has the shape {:?} in the file and {shape:?} here", saved.shape));
    }
    (!fits).then(|| {
        format!(
            "`{key}` is {:?} in the file and {kind:?} here, and only {} are converted",
            saved.dtype,
            [Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64].map(|dtype| format!("{dtype:?}")).join(", ")
        )
    })
}

/// Whether this is the counter of a batch norm. PyTorch's own loader lets files without versions
/// omit it.
fn is_batch_counter(key: &str) -> bool {
    key.rsplit('.').next() == Some(BATCH_COUNTER)
}

/// Returns the keys of all parameters and buffers of the graph.
fn wanted(graph: &HyperGraph) -> BTreeSet<String> {
    let of_node = |entry: &Rc<Entry>| {
        let prefix = key_prefix(&entry.uid);
        let state = entry.node.borrow().state();
        state.model.into_iter().map(move |(key, _): (String, Tensor)| format!("{prefix}{key}"))
    };
    graph.entries().iter().flat_map(of_node).collect()
}

/// Returns how many of the keys are wanted when the prefix is added.
fn fitting(keys: &[&str], prefix: &str, wanted: &BTreeSet<String>) -> usize {
    keys.iter().filter(|key| wanted.contains(&format!("{prefix}{key}"))).count()
}

/// Returns the key prefix of the only node with parameters, if there is only one.
fn only_owner(graph: &HyperGraph) -> Option<String> {
    let mut owners = graph.entries().iter().filter(|entry| !entry.node.borrow().state().model.is_empty());
    let only = owners.next().filter(|_| owners.next().is_none())?;
    Some(key_prefix(&only.uid))
}

/// Returns the prefix that the keys of a file lack: the name of the only node with parameters, if
/// more keys fit with it. If as many fit either way, the prefix is added unless a key already has
/// it, since PyTorch's keys never do.
fn prefix(keys: &[&str], graph: &HyperGraph) -> String {
    let Some(only) = only_owner(graph) else { return String::new() };
    let (wanted, has_name) = (wanted(graph), keys.iter().any(|key| key.starts_with(&only)));
    match fitting(keys, &only, &wanted).cmp(&fitting(keys, "", &wanted)) {
        Ordering::Greater => only,
        Ordering::Equal if !has_name => only,
        _ => String::new(),
    }
}

fn regex(pattern: &str) -> Result<Regex> {
    Regex::new(pattern)
        .map_err(|error| Error::Usage(format!("`{pattern}` is not a regular expression for keys: {error}")))
}
