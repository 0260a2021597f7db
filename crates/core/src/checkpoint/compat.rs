//! Comparison of a checkpoint with the state of the nodes.

use std::collections::BTreeMap;
use std::fmt;

use ice_checkpoint::{Part, Saved};
use tch::Tensor;

use super::dtype;

/// Differences between a node and a checkpoint, by key.
#[derive(Debug, Default)]
pub(super) struct Misfit {
    pub(super) missing: Vec<String>,
    pub(super) unexpected: Vec<String>,
    pub(super) different: Vec<String>,
}

impl Misfit {
    pub(super) fn is_none(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.different.is_empty()
    }

    /// Compares a tensor of the node with the saved tensor of the same key. Returns whether it can
    /// be loaded.
    pub(super) fn check(
        &mut self,
        key: &str,
        own: &Tensor,
        part: Option<&Part>,
        saved: Option<&Saved>,
    ) -> bool {
        let Some(saved) = saved else {
            self.missing.push(key.into());
            return false;
        };
        let shape = part.map_or_else(|| dtype::shape(own), |part| part.of.clone());
        let kind = dtype::kind(saved.dtype);
        if kind.as_ref() == Ok(&own.kind()) && shape == saved.shape {
            return true;
        }
        self.different.push(format!(
            "`{key}` is {:?} of shape {:?} in the checkpoint and {:?} of shape {shape:?} here",
            saved.dtype,
            saved.shape,
            own.kind()
        ));
        false
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |keys: &[String]| keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        let mut said = Vec::new();
        if !self.missing.is_empty() {
            said.push(format!("missing {}", list(&self.missing)));
        }
        if !self.unexpected.is_empty() {
            said.push(format!("unexpected {}", list(&self.unexpected)));
        }
        said.extend(self.different.iter().cloned());
        f.write_str(&said.join("; "))
    }
}

/// Differences of all nodes, by uid.
#[derive(Default)]
pub(super) struct Report(pub(super) BTreeMap<String, Misfit>);

impl Report {
    pub(super) fn is_none(&self) -> bool {
        self.0.values().all(Misfit::is_none)
    }

    /// Records a key of the checkpoint that belongs to no node.
    pub(super) fn nobodys(&mut self, key: &str) {
        let (node, rest) = key.split_once('.').unwrap_or((key, ""));
        self.of(node).unexpected.push(rest.into());
    }

    pub(super) fn of(&mut self, uid: &str) -> &mut Misfit {
        self.0.entry(uid.into()).or_default()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nodes = self.0.iter().filter(|(_, misfit)| !misfit.is_none());
        for (number, (uid, misfit)) in nodes.enumerate() {
            write!(f, "{}node `{uid}`: {misfit}", if number > 0 { "\n  " } else { "" })?;
        }
        Ok(())
    }
}
