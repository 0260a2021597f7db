//! The tensors of a checkpoint, reassembled from the pieces in its files.

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::header::{Stored, elements};

/// The kind of state that a file of tensors belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Section {
    /// Parameters and buffers.
    Model,
    /// State of the optimizers.
    Optimizer,
}

impl Section {
    /// Both sections.
    pub const ALL: [Self; 2] = [Self::Model, Self::Optimizer];

    /// Returns the section of a file by its name, or `None` for a file without tensors.
    pub fn of(file: &str) -> Option<Self> {
        let stem = file.strip_suffix(".safetensors")?;
        let is =
            |name: &str| stem == name || stem.strip_prefix(name).is_some_and(|rest| rest.starts_with('-'));
        if is("model") {
            return Some(Self::Model);
        }
        is("optimizer").then_some(Self::Optimizer)
    }

    /// Returns the name of the file for a rank's shard.
    pub fn shard(self, rank: usize, of: usize) -> String {
        let name = match self {
            Self::Model => "model",
            Self::Optimizer => "optimizer",
        };
        format!("{name}-{rank:05}-of-{of:05}.safetensors")
    }
}

/// A contiguous range of elements of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Name of the file.
    pub file: String,
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// Index of the first element in the tensor.
    pub start: u64,
    /// Number of elements.
    pub len: u64,
}

/// A whole tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Shape of the tensor.
    pub shape: Vec<u64>,
    /// Positions of the elements, in order and without gaps.
    pub extents: Vec<Extent>,
}

impl Saved {
    /// Returns the number of elements.
    pub fn elements(&self) -> u64 {
        self.extents.iter().map(|extent| extent.len).sum()
    }

    /// Returns the length in bytes.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.bitsize() as u64 / 8
    }
}

/// The common elements of two ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overlap {
    /// First common element, counted from the start of the first range.
    pub in_first: u64,
    /// First common element, counted from the start of the second range.
    pub in_second: u64,
    /// Number of common elements.
    pub len: u64,
}

impl Overlap {
    /// Returns the overlap of two ranges, each with its first element and its length, or `None` if
    /// they have no common element.
    pub fn of(first: (u64, u64), second: (u64, u64)) -> Option<Self> {
        let start = first.0.max(second.0);
        let end = (first.0 + first.1).min(second.0 + second.1);
        (start < end).then(|| Self {
            in_first: start - first.0,
            in_second: start - second.0,
            len: end - start,
        })
    }
}

/// The tensors of a checkpoint, by key.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Catalog {
    /// Parameters and buffers.
    pub model: BTreeMap<String, Saved>,
    /// State of the optimizers.
    pub optimizer: BTreeMap<String, Saved>,
}

impl Catalog {
    /// Returns the tensors of a section.
    pub fn section(&self, section: Section) -> &BTreeMap<String, Saved> {
        match section {
            Section::Model => &self.model,
            Section::Optimizer => &self.optimizer,
        }
    }

    fn section_mut(&mut self, section: Section) -> &mut BTreeMap<String, Saved> {
        match section {
            Section::Model => &mut self.model,
            Section::Optimizer => &mut self.optimizer,
        }
    }

    pub(crate) fn add(
        &mut self,
        section: Section,
        file: &str,
        data_start: u64,
        tensors: Vec<Stored>,
    ) -> Result<(), String> {
        for Stored { entry, offset, .. } in tensors {
            let len = elements(&entry.shape).unwrap_or_default();
            let (shape, start) = match entry.part {
                Some(part) => (part.of, part.start),
                None => (entry.shape, 0),
            };
            let extent = Extent { file: file.into(), offset: data_start + offset, start, len };
            let saved = self.section_mut(section).entry(entry.key.clone()).or_insert_with(|| Saved {
                dtype: entry.dtype,
                shape: shape.clone(),
                extents: Vec::new(),
            });
            if (saved.dtype, &saved.shape) != (entry.dtype, &shape) {
                return Err(format!(
                    "has `{}` as {:?} of shape {shape:?}, and another file has it as {:?} of shape {:?}",
                    entry.key, entry.dtype, saved.dtype, saved.shape
                ));
            }
            saved.extents.push(extent);
        }
        Ok(())
    }

    /// Sorts the pieces, after all have been added. Fails if a tensor has a gap, or an element
    /// twice.
    pub(crate) fn complete(&mut self) -> Result<(), String> {
        for (key, saved) in self.model.iter_mut().chain(&mut self.optimizer) {
            saved.extents.sort_by_key(|extent| (extent.start, extent.len));
            let mut end = 0;
            for extent in &saved.extents {
                if extent.start > end {
                    return Err(format!("lacks the elements {end}..{} of `{key}`", extent.start));
                }
                if extent.start < end {
                    return Err(format!("has the element {} of `{key}` twice", extent.start));
                }
                end += extent.len;
            }
            let all = elements(&saved.shape).unwrap_or(u64::MAX);
            if end != all {
                return Err(format!("lacks the elements {end}..{all} of `{key}`"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn files_are_told_by_their_names() {
        for (file, section) in [
            ("model.safetensors", Some(Section::Model)),
            ("model-00000-of-00002.safetensors", Some(Section::Model)),
            ("optimizer-00001-of-00004.safetensors", Some(Section::Optimizer)),
            ("model.safetensors.index.json", None),
            ("modelling.safetensors", None),
        ] {
            assert_eq!(Section::of(file), section, "{file}");
        }
        assert_eq!(Section::Optimizer.shard(1, 4), "optimizer-00001-of-00004.safetensors");
    }

    proptest! {
        #[test]
        fn an_overlap_holds_exactly_the_common_elements(a in 0..20_u64, n in 0..20_u64, b in 0..20_u64, m in 0..20_u64) {
            let common: Vec<u64> = (a..a + n).filter(|element| (b..b + m).contains(element)).collect();
            let found = Overlap::of((a, n), (b, m));
            let elements = found.map_or(Vec::new(), |o| (a + o.in_first..a + o.in_first + o.len).collect());
            prop_assert_eq!(&elements, &common);
            prop_assert!(found.is_none_or(|o| a + o.in_first == b + o.in_second));
        }
    }
}
