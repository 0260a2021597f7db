use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::Counters;

/// The version of the layout that this release writes and reads.
pub(super) const FORMAT_VERSION: u32 = 1;

/// What a checkpoint says about itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the layout.
    pub format_version: u32,
    /// The job that saved it.
    pub run_id: String,
    /// Ranks of the job.
    pub world_size: usize,
    /// Seed of the run. The random numbers of a step follow from it, the rank and the step.
    pub seed: u64,
    /// When it was saved, in milliseconds since the Unix epoch.
    pub saved_unix_ms: u64,
    /// Steps and epochs done.
    pub counters: Counters,
    /// Progress of the tree of tasks.
    pub tasks: Json,
    /// What was measured last, by uid. A value that is no number is left out.
    pub measures: BTreeMap<String, f64>,
    /// Positions of data and sums of meters, by uid.
    pub nodes: BTreeMap<String, Json>,
    /// The other files.
    pub files: BTreeMap<String, FileInfo>,
}

/// What a file must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32C of the whole file.
    pub crc32c: u32,
}

impl Manifest {
    pub(crate) fn new(
        run_id: &str,
        world_size: usize,
        seed: u64,
        counters: &Counters,
        tasks: Json,
        measures: BTreeMap<String, f64>,
    ) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self {
            format_version: FORMAT_VERSION,
            run_id: run_id.into(),
            world_size,
            seed,
            saved_unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            counters: counters.clone(),
            tasks,
            measures: measures.into_iter().filter(|(_, value)| value.is_finite()).collect(),
            nodes: BTreeMap::new(),
            files: BTreeMap::new(),
        }
    }
}

impl FileInfo {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, crc32c: crc32c::crc32c(bytes) }
    }
}
