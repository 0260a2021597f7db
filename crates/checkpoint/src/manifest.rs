use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::stream::{check_size, read_bounded};
use crate::{Error, MANIFEST, Result};

/// Version of the layout that this release writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Largest manifest that is read or written, in bytes. A manifest of 10,000 ranks with a file each
/// has about 2 MB.
const MAX_BYTES: u64 = 64 << 20;
/// Name of a manifest in messages about its size.
const KIND: &str = "a manifest";

/// The manifest contains its own checksum as eight digits, computed with zeros in their place.
const SELF: &str = "\"manifest_crc32c\": \"";
const DIGITS: usize = 8;

/// Manifest of a checkpoint: its description.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the layout.
    pub format_version: u32,
    /// Identifier of the job that saved the checkpoint.
    pub run_id: String,
    /// Number of the run in its program, from 0. A checkpoint of a later run shows that the earlier
    /// runs are completed.
    #[serde(default, skip_serializing_if = "is_first")]
    pub run: u64,
    /// Number of ranks of the job.
    pub world_size: usize,
    /// Number of ranks at the start of the run, which batches and learning rates of an elastic run
    /// refer to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_ranks: Option<usize>,
    /// Seed of the run. It determines the random numbers of a step, together with the rank and the
    /// step.
    pub seed: u64,
    /// Time of the save, in milliseconds since the Unix epoch.
    pub saved_unix_ms: u64,
    /// Completed steps and epochs.
    pub counters: Counts,
    /// Tags of the saved nodes, if not all nodes are saved. A run cannot resume from such a
    /// checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<String>,
    /// The measure for which the checkpoint was kept as one of the best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
    /// Progress of the tree of tasks.
    pub tasks: Json,
    /// Last measures, by uid. JSON has `"NaN"`, `"inf"` or `"-inf"` for a value that is not finite.
    #[serde(with = "crate::exact::map")]
    pub measures: BTreeMap<String, f64>,
    /// Positions of data and sums of meters, by uid.
    pub nodes: BTreeMap<String, Json>,
    /// Descriptions of the other files, by name.
    pub files: BTreeMap<String, FileInfo>,
}

/// Completed steps and epochs of a run.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Optimizer steps applied.
    pub train_steps: u64,
    /// Training epochs completed.
    pub train_epochs: u64,
    /// Iterations of evaluations.
    pub eval_steps: u64,
    /// Epochs of evaluations.
    pub eval_epochs: u64,
}

/// Expected properties of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32C of the whole file.
    pub crc32c: u32,
}

/// A measure by which checkpoints compete.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Uid of the node that measured it.
    pub measure: String,
    /// Value of the measure.
    #[serde(with = "crate::exact::number")]
    pub value: f64,
    /// Direction in which values are better.
    pub better: Better,
}

/// The direction in which values are better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Higher values, like those of an accuracy.
    Higher,
    /// Lower values, like those of a loss.
    Lower,
}

impl Better {
    /// Whether `a` is better than `b`. Any number is better than NaN, and NaN is never better.
    pub fn prefers(self, a: f64, b: f64) -> bool {
        match self {
            _ if a.is_nan() => false,
            _ if b.is_nan() => true,
            Self::Higher => a > b,
            Self::Lower => a < b,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_first(run: &u64) -> bool {
    *run == 0
}

#[derive(Serialize)]
struct Sealed<'a> {
    #[serde(flatten)]
    manifest: &'a Manifest,
    manifest_crc32c: &'static str,
}

impl Manifest {
    /// Creates a manifest with the current time and without files.
    pub fn new(run_id: &str, world_size: usize, seed: u64, counters: Counts, tasks: Json) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self {
            format_version: FORMAT_VERSION,
            run_id: run_id.into(),
            run: 0,
            world_size,
            base_ranks: None,
            seed,
            saved_unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            counters,
            tags: None,
            best: None,
            tasks,
            measures: BTreeMap::new(),
            nodes: BTreeMap::new(),
            files: BTreeMap::new(),
        }
    }

    /// Reads and verifies the manifest of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the manifest is missing, damaged, larger than 64 MiB, or of another
    /// format.
    pub fn read(checkpoint: &Path) -> Result<Self> {
        let file = checkpoint.join(MANIFEST);
        let bytes = read_bounded(&file, KIND, MAX_BYTES).map_err(|error| Error::checkpoint(&file, error))?;
        Self::parse(&bytes).map_err(|problem| Error::checkpoint(&file, problem))
    }

    /// Returns the bytes of the file, including its own checksum.
    ///
    /// # Errors
    /// The reason that the manifest is not JSON, or its size if it is larger than 64 MiB.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let sealed = Sealed { manifest: self, manifest_crc32c: "00000000" };
        let mut bytes = serde_json::to_vec_pretty(&sealed).map_err(|error| error.to_string())?;
        let at = digits(&bytes).ok_or("has no place for its checksum")?;
        let crc = format!("{:08x}", crc32c::crc32c(&bytes));
        bytes[at..at + DIGITS].copy_from_slice(crc.as_bytes());
        check_size(bytes.len() as u64, KIND, MAX_BYTES)?;
        Ok(bytes)
    }

    /// Parses the bytes of a file, after verifying their checksum.
    ///
    /// # Errors
    /// Description of the damage.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let damaged = || "is damaged: its checksum does not fit".to_owned();
        let at = digits(bytes).ok_or_else(|| "is damaged: it ends early or has no checksum".to_owned())?;
        let mut zeroed = bytes.to_vec();
        zeroed[at..at + DIGITS].fill(b'0');
        if format!("{:08x}", crc32c::crc32c(&zeroed)).as_bytes() != &bytes[at..at + DIGITS] {
            return Err(damaged());
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if manifest.format_version != FORMAT_VERSION {
            return Err(format!(
                "is of format {}, and this release reads {FORMAT_VERSION}",
                manifest.format_version
            ));
        }
        Ok(manifest)
    }
}

/// Returns the position of the checksum's digits. They are in the last field of this name, since
/// the progress of a task may contain the same text.
fn digits(bytes: &[u8]) -> Option<usize> {
    let at = bytes.windows(SELF.len()).rposition(|window| window == SELF.as_bytes())? + SELF.len();
    (bytes.len() >= at + DIGITS).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_flipped_bit_of_a_manifest_is_noticed() {
        let mut manifest = Manifest::new("job", 2, 7, Counts::default(), serde_json::json!([1, "x"]));
        manifest.files.insert("model.safetensors".into(), FileInfo { bytes: 3, crc32c: 9 });
        let bytes = manifest.to_bytes().unwrap();
        assert_eq!(Manifest::parse(&bytes).unwrap().files, manifest.files);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                assert!(Manifest::parse(&flipped).is_err(), "byte {at}, bit {bit}");
            }
        }
        for len in 0..bytes.len() {
            assert!(Manifest::parse(&bytes[..len]).is_err(), "{len} bytes");
        }
    }
}
