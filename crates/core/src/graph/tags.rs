use std::collections::BTreeSet;

use crate::{Error, Result};

/// A set of tags: of a node, or in a query.
///
/// Converts from `"train"`, `"train,val"` and arrays of names. A node tagged `*` takes part in
/// every task. A node with plain tags takes part if the query names **all** of them. A node with
/// `#tag` takes part if the query names **any** of its `#` tags. In a query, `*` selects all nodes.
///
/// ```
/// use ice_core::Tags;
/// let both = Tags::from("train,big");
/// assert!(both.selected_by(&"big,train,other".into()));
/// assert!(!both.selected_by(&"train".into()));
/// assert!(Tags::from("#train,#val").selected_by(&"val".into()));
/// assert!(Tags::from("*").selected_by(&"anything".into()));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Tags(BTreeSet<String>);

impl Tags {
    /// Whether a node with these tags takes part in a task with this `query`.
    pub fn selected_by(&self, query: &Self) -> bool {
        if query.0.contains("*") || self.0.contains("*") {
            return true;
        }
        let any = self.0.iter().filter(|tag| tag.starts_with('#'));
        if any.clone().any(|tag| query.0.contains(tag) || query.0.contains(&tag[1..])) {
            return true;
        }
        let mut plain = self.plain().peekable();
        plain.peek().is_some() && plain.all(|tag| query.0.contains(tag))
    }

    /// Returns the unique identifier of a node: its plain tags in order, joined by `,`, then `/`
    /// and the name. Without plain tags it is `*/name`, with a single `#` tag `#tag/name`.
    pub fn uid(&self, name: &str) -> String {
        let plain: Vec<&str> = self.plain().collect();
        let mut any = self.0.iter().filter(|tag| tag.starts_with('#'));
        match (plain.is_empty(), any.next(), any.next()) {
            (false, ..) => format!("{}/{name}", plain.join(",")),
            (true, Some(only), None) => format!("{only}/{name}"),
            (true, ..) => format!("*/{name}"),
        }
    }

    /// Whether a selected node of the same name, without `*`, replaces a node with these tags.
    pub(crate) fn is_general(&self) -> bool {
        self.0.contains("*")
    }

    pub(crate) fn contains(&self, tag: &str) -> bool {
        self.0.contains(tag)
    }

    /// Returns the first element that is not a valid tag.
    fn find_bad(&self) -> Option<&str> {
        self.0.iter().map(String::as_str).find(|tag| tag.is_empty() || *tag == "#" || tag.contains('/'))
    }

    /// Checks a query. Queries consist of tags; a uid identifies a single node and is refused.
    pub(crate) fn check_query(&self) -> Result<()> {
        match self.find_bad() {
            Some(uid) if uid.contains('/') => Err(Error::Graph(format!(
                "`{uid}` is not a tag but looks like the uid of a node: give tags, or use HyperGraph::node or HyperGraph::remove_node"
            ))),
            Some(tag) => Err(Error::Graph(format!("`{tag}` is not a tag: it is empty"))),
            None => Ok(()),
        }
    }

    pub(crate) fn check(&self, name: &str) -> Result<()> {
        match self.find_bad() {
            _ if self.0.is_empty() => {
                Err(Error::Graph(format!("node `{name}` has no tags: use `*` for every task")))
            }
            Some(tag) => {
                Err(Error::Graph(format!("node `{name}`: `{tag}` is not a tag: it is empty or has a `/`")))
            }
            None => Ok(()),
        }
    }

    fn plain(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str).filter(|tag| !tag.starts_with('#') && *tag != "*")
    }
}

impl From<&str> for Tags {
    fn from(list: &str) -> Self {
        Self(list.split(',').map(|tag| tag.trim().to_owned()).collect())
    }
}

impl<const N: usize> From<[&str; N]> for Tags {
    fn from(tags: [&str; N]) -> Self {
        Self(tags.into_iter().map(str::to_owned).collect())
    }
}

impl From<&Tags> for Tags {
    fn from(tags: &Tags) -> Self {
        tags.clone()
    }
}

impl std::fmt::Display for Tags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, tag) in self.0.iter().enumerate() {
            write!(f, "{}{tag}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_are_the_same_for_any_order_of_tags() {
        for (tags, uid) in [
            ("train", "train/x"),
            ("val,train", "train,val/x"),
            ("train,val", "train,val/x"),
            ("*", "*/x"),
            ("#val", "#val/x"),
            ("#val,#train", "*/x"),
            ("#val,train", "train/x"),
        ] {
            assert_eq!(Tags::from(tags).uid("x"), uid, "{tags}");
        }
    }

    #[test]
    fn selection() {
        for (tags, query, selected) in [
            ("train", "train", true),
            ("train", "val", false),
            ("train,a", "train", false),
            ("train,a", "a,b,train", true),
            ("#train,#val", "val", true),
            ("#train,a", "train", true),
            ("*", "val", true),
            ("train", "*", true),
        ] {
            assert_eq!(Tags::from(tags).selected_by(&query.into()), selected, "{tags} by {query}");
        }
    }
}
