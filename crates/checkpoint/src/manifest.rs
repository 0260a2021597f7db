use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::stream::{check_size, read_bounded};
use crate::{Error, MANIFEST, Result};

/// The version of the layout that this release writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// The largest manifest that is read or written. One of 10,000 ranks with a file each has about 2 MB.
const MAX_BYTES: u64 = 64 << 20;
/// In messages about its size.
const KIND: &str = "a manifest";

/// The manifest's own checksum stands in it as eight digits; it is taken with zeros in their place.
const SELF: &str = "\"manifest_crc32c\": \"";
const DIGITS: usize = 8;

/// What a checkpoint says about itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the layout.
    pub format_version: u32,
    /// The job that saved it.
    pub run_id: String,
    /// Number of the run in its program, from 0. A checkpoint of a later run shows that the earlier ones are done.
    #[serde(default, skip_serializing_if = "is_first")]
    pub run: u64,
    /// Ranks of the job.
    pub world_size: usize,
    /// Ranks that it began with, which batches and learning rates of an elastic run refer to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_ranks: Option<usize>,
    /// Seed of the run. The random numbers of a step follow from it, the rank and the step.
    pub seed: u64,
    /// When it was saved, in milliseconds since the Unix epoch.
    pub saved_unix_ms: u64,
    /// Steps and epochs done.
    pub counters: Counts,
    /// The tags of the nodes that it holds, where it does not hold all: a run cannot resume from such a one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<String>,
    /// Why it was kept as one of the best, where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
    /// Progress of the tree of tasks.
    pub tasks: Json,
    /// What was measured last, by uid. JSON has `"NaN"`, `"inf"` or `"-inf"` for a value that is not finite.
    #[serde(with = "crate::exact::map")]
    pub measures: BTreeMap<String, f64>,
    /// Positions of data and sums of meters, by uid.
    pub nodes: BTreeMap<String, Json>,
    /// The other files.
    pub files: BTreeMap<String, FileInfo>,
}

/// Steps and epochs that a run has done.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Optimizer steps applied.
    pub train_steps: u64,
    /// Training epochs completed.
    pub train_epochs: u64,
    /// Iterations without training.
    pub eval_steps: u64,
    /// Epochs without training.
    pub eval_epochs: u64,
}

/// What a file must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32C of the whole file.
    pub crc32c: u32,
}

/// A measure that checkpoints compete by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The uid of the node that measured it.
    pub measure: String,
    /// What it measured.
    #[serde(with = "crate::exact::number")]
    pub value: f64,
    /// Which values win.
    pub better: Better,
}

/// Which of two values is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// The higher one, as of an accuracy.
    Higher,
    /// The lower one, as of a loss.
    Lower,
}

impl Better {
    /// Whether `a` is better than `b`. No number is better than any number.
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
    /// A manifest of now, without files.
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

    /// Reads and checks the manifest of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for one that is missing, damaged, larger than 64 MiB, or of another format.
    pub fn read(checkpoint: &Path) -> Result<Self> {
        let file = checkpoint.join(MANIFEST);
        let bytes = read_bounded(&file, KIND, MAX_BYTES).map_err(|error| Error::checkpoint(&file, error))?;
        Self::parse(&bytes).map_err(|problem| Error::checkpoint(&file, problem))
    }

    /// The bytes of the file, its own checksum included.
    ///
    /// # Errors
    /// The reason that it is not JSON, or that it is larger than 64 MiB.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let sealed = Sealed { manifest: self, manifest_crc32c: "00000000" };
        let mut bytes = serde_json::to_vec_pretty(&sealed).map_err(|error| error.to_string())?;
        let at = digits(&bytes).ok_or("has no place for its checksum")?;
        let crc = format!("{:08x}", crc32c::crc32c(&bytes));
        bytes[at..at + DIGITS].copy_from_slice(crc.as_bytes());
        check_size(bytes.len() as u64, KIND, MAX_BYTES)?;
        Ok(bytes)
    }

    /// What the bytes of a file say, once their checksum fits.
    ///
    /// # Errors
    /// What is wrong with them.
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

/// Where the digits of the manifest's own checksum begin: those of the last field, since what a task says may look like it.
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
