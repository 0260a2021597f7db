use std::str::FromStr;

use super::{ClusterError, Taken};

/// The environment for the detection of managers. An empty value counts as unset: manifests and
/// scripts leave empty variables behind.
pub(super) struct Variables<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
}

impl<'a> Variables<'a> {
    pub(super) fn new(lookup: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { lookup }
    }

    /// Returns the first of these variables that is set.
    pub(super) fn text(&self, names: &[&'static str]) -> Option<Taken<String>> {
        names.iter().find_map(|variable| {
            let value = (self.lookup)(variable)?;
            let value = value.trim();
            (!value.is_empty()).then(|| Taken { value: value.to_owned(), variable })
        })
    }

    /// Returns the first of these variables that is set, as a number. The error message suggests
    /// `flag` instead.
    pub(super) fn number<T: FromStr>(
        &self,
        names: &[&'static str],
        flag: &str,
    ) -> Result<Option<Taken<T>>, ClusterError> {
        self.text(names).map(|taken| number(&taken, flag)).transpose()
    }

    /// Returns the run id in the first of these variables that is set. A value with `/` is ignored,
    /// because the run id becomes part of file names.
    pub(super) fn run_id(&self, names: &[&'static str]) -> Option<Taken<String>> {
        self.text(names).filter(|id| !id.value.contains('/'))
    }
}

/// Converts a text to a number. The error message suggests `flag` instead.
pub(super) fn number<T: FromStr>(taken: &Taken<String>, flag: &str) -> Result<Taken<T>, ClusterError> {
    let value = taken.value.parse();
    let value = value
        .map_err(|_| ClusterError::new(taken, format!("not a number that fits: unset it and give {flag}")))?;
    Ok(Taken { value, variable: taken.variable })
}
