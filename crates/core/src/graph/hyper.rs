use std::any::Any;
use std::cell::{RefCell, RefMut};
use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::rc::Rc;

use ice_worker::Worker;

use crate::graph::{ExecutableGraph, Tags};
use crate::optim::RunClock;
use crate::precision::Precision;
use crate::{Autocast, Context, Error, GradScaler, HParam, Node, Probe, Result, Round};

/// Uid of the gradient scaler.
const SCALER: &str = "*/grad_scaler";

/// A node with its name and tags.
pub(crate) struct Entry {
    pub(crate) uid: String,
    pub(crate) name: String,
    pub(crate) tags: Tags,
    pub(crate) node: Rc<RefCell<dyn Node>>,
}

/// The nodes of a program, by name and tags.
///
/// ```
/// use ice_core::{HyperGraph, MetricNode};
/// let mut graph = HyperGraph::new();
/// graph.add("accuracy", MetricNode::average(|x| x.tensor("hits")), "val")?;
/// assert_eq!(graph.uids().collect::<Vec<_>>(), ["val/accuracy"]);
/// # Ok::<(), ice_core::Error>(())
/// ```
pub struct HyperGraph {
    entries: Vec<Rc<Entry>>,
    precision: Precision,
    passes: NonZeroU64,
    hparams: Vec<(String, HParam)>,
    sources: Vec<PathBuf>,
    set_up: RefCell<bool>,
    /// Selected nodes by query, as a cache.
    selections: RefCell<BTreeMap<Tags, Rc<ExecutableGraph>>>,
    /// Clock of the run, for schedules.
    clock: RunClock,
    /// Nodes that are prepared at present.
    prepared: RefCell<Vec<Rc<Entry>>>,
}

impl Default for HyperGraph {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            precision: Precision::default(),
            passes: NonZeroU64::MIN,
            hparams: Vec::new(),
            sources: Vec::new(),
            set_up: RefCell::default(),
            selections: RefCell::default(),
            clock: RunClock::default(),
            prepared: RefCell::default(),
        }
    }
}

impl HyperGraph {
    /// Creates a graph without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn clock(&self) -> &RunClock {
        &self.clock
    }

    /// Adds a node under a name. Several nodes may share a name if no task selects two of them.
    ///
    /// # Errors
    /// A uid (tags and name) that is taken, an empty name, or an invalid tag.
    pub fn add(&mut self, name: &str, node: impl Node + 'static, tags: impl Into<Tags>) -> Result<&mut Self> {
        self.place(name, Rc::new(RefCell::new(node)), tags.into())?;
        Ok(self)
    }

    fn place(&mut self, name: &str, node: Rc<RefCell<dyn Node>>, tags: Tags) -> Result<()> {
        tags.check(name)?;
        if name.is_empty() || name.contains(['/', '.']) {
            return Err(Error::Graph(format!(
                "`{name}` is not a name for a node: it is empty or has a `/` or a `.`"
            )));
        }
        let uid = tags.uid(name);
        if let Some(other) = self.entries.iter().find(|entry| entry.uid == uid) {
            return Err(Error::Graph(format!(
                "node `{name}` with the tags `{tags}` has the uid `{uid}`, which node `{}` with the tags `{}` has already",
                other.name, other.tags
            )));
        }
        self.changed();
        self.entries.push(Rc::new(Entry { uid, name: name.into(), tags, node }));
        Ok(())
    }

    /// Copies a file or folder to `src` in the run's folder when the run begins. Of a folder, files
    /// that git ignores are left out, like files above 8 MiB. May be called several times. The
    /// sources of the program itself are in `env!("CARGO_MANIFEST_DIR")`. A failure to copy is a
    /// warning.
    pub fn backup_source_files(&mut self, path: impl Into<PathBuf>) -> &mut Self {
        self.sources.push(path.into());
        self
    }

    pub(crate) fn sources(&self) -> &[PathBuf] {
        &self.sources
    }

    /// Removes the nodes that a query selects, and returns their uids. Like in a task, any query
    /// also selects nodes tagged `*`. [`HyperGraph::remove_node`] removes a single node.
    ///
    /// # Errors
    /// [`Error::Graph`] if the query selects no node, with a list of the nodes; or if the query is
    /// not made of tags, such as a uid.
    pub fn remove(&mut self, query: impl Into<Tags>) -> Result<Vec<String>> {
        let query = query.into();
        query.check_query()?;
        let removed: Vec<_> = self.select_nodes(query.clone()).map(str::to_owned).collect();
        if removed.is_empty() {
            return Err(self.nothing(&query));
        }
        self.drop_nodes(&removed);
        Ok(removed)
    }

    /// Removes only the node with this uid.
    ///
    /// ```
    /// use ice_core::{HyperGraph, MetricNode};
    ///
    /// let mut graph = HyperGraph::new();
    /// graph.add("hits", MetricNode::average(|x| x.tensor("hit")), "val")?;
    /// graph.add("net", MetricNode::average(|x| x.tensor("x")), "*")?;
    /// graph.remove_node("val/hits")?;
    /// assert_eq!(graph.uids().collect::<Vec<_>>(), ["*/net"]);
    /// # Ok::<(), ice_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`] if there is no such node, with a list of the nodes.
    pub fn remove_node(&mut self, uid: &str) -> Result<()> {
        if self.entries.iter().all(|entry| entry.uid != uid) {
            return Err(Error::Graph(format!("there is no node `{uid}`; there are {}", self.listing())));
        }
        self.drop_nodes(&[uid.to_owned()]);
        Ok(())
    }

    fn drop_nodes(&mut self, uids: &[String]) {
        self.entries.retain(|entry| !uids.contains(&entry.uid));
        if uids.iter().any(|uid| uid == SCALER) {
            self.precision.scaler = None;
        }
        self.changed();
    }

    /// Returns the uids of the nodes that a query selects, in the order of their addition. Any
    /// query also selects nodes tagged `*`. A query that is not made of tags, such as a uid,
    /// selects no node.
    pub fn select_nodes(&self, query: impl Into<Tags>) -> impl Iterator<Item = &str> {
        let query = query.into();
        let is_query = query.check_query().is_ok();
        let selected = self.entries.iter().filter(move |entry| is_query && entry.tags.selected_by(&query));
        selected.map(|entry| entry.uid.as_str())
    }

    /// Returns the node with this uid, or with a name that only one node has.
    ///
    /// ```
    /// use ice_core::{HyperGraph, MetricNode};
    ///
    /// let mut graph = HyperGraph::new();
    /// graph.add("hits", MetricNode::average(|x| x.tensor("hit")), "val")?;
    /// assert!(graph.node::<MetricNode>("val/hits").is_ok() && graph.node::<MetricNode>("hits").is_ok());
    /// # Ok::<(), ice_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Graph`] if there is no such node or there are several, or if the node is of another
    /// type or in use.
    pub fn node<N: Node>(&self, uid: &str) -> Result<RefMut<'_, N>> {
        let exact = self.entries.iter().filter(|entry| entry.uid == uid).collect::<Vec<_>>();
        let found = match exact.is_empty() {
            true => self.entries.iter().filter(|entry| entry.name == uid).collect(),
            false => exact,
        };
        let entry = match found[..] {
            [entry] => entry,
            [] => {
                return Err(Error::Graph(format!("there is no node `{uid}`; there are {}", self.listing())));
            }
            _ => {
                let uids: Vec<_> = found.iter().map(|entry| format!("`{}`", entry.uid)).collect();
                return Err(Error::Graph(format!("`{uid}` may be {}: give the uid", uids.join(" or "))));
            }
        };
        let node = entry
            .node
            .try_borrow_mut()
            .map_err(|_| Error::Graph(format!("the node `{}` is running", entry.uid)))?;
        RefMut::filter_map(node, |node| (node as &mut dyn Any).downcast_mut::<N>()).map_err(|_| {
            Error::Graph(format!("the node `{}` is no `{}`", entry.uid, std::any::type_name::<N>()))
        })
    }

    /// Drops the cached selections after a change of the graph.
    fn changed(&mut self) {
        self.selections.get_mut().clear();
    }

    /// Lets operations of forward passes, in training and evaluation, run in a smaller type if that
    /// is safe. `Kind::Half` also needs a [`GradScaler`]; `Kind::BFloat16` does not.
    pub fn autocast(&mut self, autocast: Autocast) -> &mut Self {
        self.precision.autocast = Some(autocast);
        self.changed();
        self
    }

    /// Whether forward passes run in a smaller type.
    pub fn is_autocast_enabled(&self) -> bool {
        self.precision.autocast.is_some()
    }

    /// Scales losses, by the node `*/grad_scaler`.
    ///
    /// # Errors
    /// [`Error::Graph`] if the graph already has a scaler.
    pub fn grad_scaler(&mut self, scaler: GradScaler) -> Result<&mut Self> {
        let scaler = Rc::new(RefCell::new(scaler));
        self.place(SCALER.trim_start_matches("*/"), Rc::clone(&scaler) as Rc<RefCell<dyn Node>>, "*".into())?;
        self.precision.scaler = Some(scaler);
        Ok(self)
    }

    /// Whether losses are scaled.
    pub fn is_grad_scaler_enabled(&self) -> bool {
        self.precision.scaler.as_ref().is_some_and(|scaler| scaler.borrow().is_enabled())
    }

    /// Accumulates the gradients of this many batches for one step of the optimizers, with the same
    /// weight for each sample. At the end of an epoch there may be fewer batches. The ranks
    /// exchange gradients once per step.
    pub fn accumulate_gradients(&mut self, batches: NonZeroU64) -> &mut Self {
        self.passes = batches;
        self.changed();
        self
    }

    /// Shows a hyper-parameter in TensorBoard. A later value of the same name replaces an earlier
    /// one.
    pub fn hparam(&mut self, name: &str, value: impl Into<HParam>) -> &mut Self {
        self.hparams.retain(|(known, _)| known != name);
        self.hparams.push((name.into(), value.into()));
        self
    }

    pub(crate) fn hparams(&self) -> &[(String, HParam)] {
        &self.hparams
    }

    /// Adds a node that prints the outputs of other nodes.
    ///
    /// ```
    /// use ice_core::{HyperGraph, Probe};
    /// let mut graph = HyperGraph::new();
    /// graph.print_forward_output(Probe::of(["net", "loss"]).total(3).train_only(), "train")?;
    /// # Ok::<(), ice_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// An invalid tag.
    pub fn print_forward_output(&mut self, probe: Probe, tags: impl Into<Tags>) -> Result<&mut Self> {
        let name = format!("probe_{}", self.entries.len());
        self.add(&name, probe, tags)
    }

    /// Returns the uids of all nodes, in the order of their addition.
    pub fn uids(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.uid.as_str())
    }

    pub(crate) fn entries(&self) -> &[Rc<Entry>] {
        &self.entries
    }

    /// Returns the nodes that take part in a task with these tags. A selected node replaces a node
    /// of the same name that is tagged `*`.
    pub(crate) fn select(&self, query: &Tags) -> Result<Rc<ExecutableGraph>> {
        if let Some(known) = self.selections.borrow().get(query) {
            return Ok(Rc::clone(known));
        }
        let chosen = self.choose(query)?;
        let graph = Rc::new(ExecutableGraph::new(chosen, self.precision.clone(), self.passes));
        self.selections.borrow_mut().insert(query.clone(), Rc::clone(&graph));
        Ok(graph)
    }

    fn choose(&self, query: &Tags) -> Result<Vec<Rc<Entry>>> {
        query.check_query()?;
        let mut chosen: Vec<Rc<Entry>> = Vec::new();
        for entry in self.entries.iter().filter(|entry| entry.tags.selected_by(query)) {
            let Some(rival) = chosen.iter_mut().find(|other| other.name == entry.name) else {
                chosen.push(Rc::clone(entry));
                continue;
            };
            match (rival.tags.is_general(), entry.tags.is_general()) {
                (true, false) => *rival = Rc::clone(entry),
                (false, true) => {}
                _ => {
                    return Err(Error::Graph(format!(
                        "the tags `{query}` select two nodes named `{}`: `{}` and `{}`",
                        entry.name, rival.uid, entry.uid
                    )));
                }
            }
        }
        if chosen.is_empty() {
            return Err(self.nothing(query));
        }
        Ok(chosen)
    }

    fn nothing(&self, query: &Tags) -> Error {
        Error::Graph(format!("the tags `{query}` select no node; there are {}", self.listing()))
    }

    /// Switches from the prepared nodes to `next`: cleans up nodes that are no longer used, and
    /// prepares nodes that are new.
    pub(crate) fn switch_to(&self, next: &[Rc<Entry>]) -> Result<()> {
        let before = self.prepared.replace(next.to_vec());
        let is_in = |list: &[Rc<Entry>], entry: &Rc<Entry>| list.iter().any(|other| Rc::ptr_eq(other, entry));
        for entry in before.iter().filter(|entry| !is_in(next, entry)) {
            entry.node.borrow_mut().clean_up().map_err(|error| error.at(&entry.uid, "clean-up"))?;
        }
        for entry in next.iter().filter(|entry| !is_in(&before, entry)) {
            entry.node.borrow_mut().prepare().map_err(|error| error.at(&entry.uid, "preparation"))?;
        }
        Ok(())
    }

    /// Sets up every node on the device of the rank, once.
    pub(crate) fn set_up(&self, context: &Context) -> Result<()> {
        if self.set_up.replace(true) {
            return Ok(());
        }
        for entry in &self.entries {
            entry.node.borrow_mut().set_up(context).map_err(|error| error.at(&entry.uid, "set-up"))?;
        }
        Ok(())
    }

    /// Prepares every node for the ranks of a round. Collective.
    pub(crate) fn enter_round(&self, round: &Round) -> Result<()> {
        for entry in &self.entries {
            let entered = entry.node.borrow_mut().enter_round(round);
            entered.map_err(|error| error.at(&entry.uid, "start of a round"))?;
        }
        Ok(())
    }

    /// Synchronizes the measures of every node over the ranks. Collective.
    pub(crate) fn sync_measures(&self, worker: &Worker) -> Result<()> {
        for entry in &self.entries {
            let outcome = entry.node.borrow_mut().sync_measures(worker);
            outcome.map_err(|error| error.at(&entry.uid, "before a checkpoint"))?;
        }
        Ok(())
    }

    fn listing(&self) -> String {
        match self.entries.is_empty() {
            true => "no nodes at all".into(),
            false => self.uids().map(|uid| format!("`{uid}`")).collect::<Vec<_>>().join(", "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MetricNode;

    fn node() -> impl Node {
        MetricNode::average(|x| x.tensor("x"))
    }

    fn selected(graph: &HyperGraph, query: &str) -> Vec<String> {
        graph.select(&query.into()).unwrap().entries().iter().map(|entry| entry.uid.clone()).collect()
    }

    #[test]
    fn a_specific_node_stands_in_for_a_general_one() {
        let mut graph = HyperGraph::new();
        graph.add("net", node(), "*").unwrap().add("net", node(), "val").unwrap();
        assert_eq!(selected(&graph, "train"), ["*/net"]);
        assert_eq!(selected(&graph, "val"), ["val/net"]);
    }

    #[test]
    fn two_specific_nodes_of_one_name_are_an_error_that_names_both() {
        let mut graph = HyperGraph::new();
        graph.add("net", node(), "train").unwrap().add("net", node(), "val").unwrap();
        let message = graph.select(&"train,val".into()).err().unwrap().to_string();
        assert!(message.contains("`train/net` and `val/net`"), "{message}");
    }

    #[test]
    fn what_is_removed_is_not_selected_any_more() {
        let mut graph = HyperGraph::new();
        graph.add("net", node(), "*").unwrap().add("loss", node(), "train").unwrap();
        assert_eq!(selected(&graph, "train"), ["*/net", "train/loss"]);
        assert_eq!(graph.select_nodes("val").collect::<Vec<_>>(), ["*/net"]);
        graph.grad_scaler(GradScaler::new()).unwrap();
        assert_eq!(selected(&graph, "train"), ["*/net", "train/loss", "*/grad_scaler"]);
        assert_eq!(graph.remove("*").unwrap(), ["*/net", "train/loss", "*/grad_scaler"]);
        assert!(!graph.is_grad_scaler_enabled());
        let message = graph.remove("train").unwrap_err().to_string();
        assert!(message.contains("no nodes at all"), "{message}");
    }

    #[test]
    fn uid_removes_its_node_alone_and_is_not_a_query() {
        let mut graph = HyperGraph::new();
        for (name, tags) in [("net", "*"), ("acc", "val"), ("loss", "train")] {
            graph.add(name, node(), tags).unwrap();
        }
        for query in ["val/acc", "val,", "#"] {
            assert_eq!(graph.select_nodes(query).count(), 0, "{query}");
            assert!(graph.remove(query).unwrap_err().to_string().contains("is not a tag"), "{query}");
            assert!(
                graph.select(&query.into()).err().unwrap().to_string().contains("is not a tag"),
                "{query}"
            );
        }
        assert!(graph.remove_node("acc").unwrap_err().to_string().contains("`val/acc`"));
        graph.remove_node("val/acc").unwrap();
        assert_eq!(graph.uids().collect::<Vec<_>>(), ["*/net", "train/loss"]);
        graph.grad_scaler(GradScaler::new()).unwrap();
        graph.remove_node(SCALER).unwrap();
        assert!(!graph.is_grad_scaler_enabled());
    }

    #[test]
    fn a_node_is_found_by_its_uid_or_its_only_name() {
        let mut graph = HyperGraph::new();
        graph.add("net", node(), "train").unwrap().add("net", node(), "val").unwrap();
        graph.add("hits", node(), "val").unwrap();
        assert!(graph.node::<MetricNode>("val/net").is_ok() && graph.node::<MetricNode>("hits").is_ok());
        let message = |uid: &str| graph.node::<MetricNode>(uid).err().unwrap().to_string();
        assert!(message("net").contains("`train/net` or `val/net`"));
        assert!(message("nothing").contains("`val/hits`"));
        let other = graph.node::<GradScaler>("hits").err().unwrap().to_string();
        assert!(other.contains("GradScaler"), "{other}");
    }

    #[test]
    fn nodes_are_prepared_and_cleaned_up_where_the_graph_switches() {
        struct Noted(Rc<RefCell<Vec<String>>>, &'static str);
        impl Node for Noted {
            fn set_up(&mut self, _: &Context) -> Result<()> {
                Ok(())
            }
            fn forward(&mut self, _: &crate::Outputs) -> Result<crate::Value> {
                Ok(crate::Value::new(()))
            }
            fn prepare(&mut self) -> Result<()> {
                self.0.borrow_mut().push(format!("prepare {}", self.1));
                Ok(())
            }
            fn clean_up(&mut self) -> Result<()> {
                self.0.borrow_mut().push(format!("clean up {}", self.1));
                Ok(())
            }
        }
        let notes = Rc::new(RefCell::new(Vec::new()));
        let mut graph = HyperGraph::new();
        for (name, tags) in [("both", "*"), ("a", "train"), ("b", "val")] {
            graph.add(name, Noted(Rc::clone(&notes), name), tags).unwrap();
        }
        for query in ["train", "train", "val"] {
            graph.switch_to(graph.select(&query.into()).unwrap().entries()).unwrap();
        }
        graph.switch_to(&[]).unwrap();
        let expected =
            ["prepare both", "prepare a", "clean up a", "prepare b", "clean up both", "clean up b"];
        assert_eq!(*notes.borrow(), expected);
    }

    #[test]
    fn a_uid_is_taken_once() {
        let mut graph = HyperGraph::new();
        graph.add("net", node(), "a,b").unwrap();
        let message = graph.add("net", node(), "b,a").err().unwrap().to_string();
        assert!(message.contains("`a,b/net`"), "{message}");
    }

    #[test]
    fn an_empty_selection_says_what_there_is() {
        let mut graph = HyperGraph::new();
        graph.add("net", node(), "train").unwrap();
        let message = graph.select(&"val".into()).err().unwrap().to_string();
        assert!(message.contains("`train/net`"), "{message}");
    }
}
