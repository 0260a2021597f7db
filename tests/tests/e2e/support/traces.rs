//! Traces of a training of `trainee`, however often it is disturbed: the samples that each rank has
//! trained on, checkpoints, and its agents' records of the rounds. `ICE_KEEP_TRACES=1` keeps them
//! after the test.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::{TempDir, tempdir};

use super::{Program, built, checkpoints};
use ice_testing::Random;

/// Number of samples, the same as in the trainee.
pub(crate) const SAMPLES: usize = 46;

/// The folder of a training.
pub(crate) struct Traces(TempDir);

/// A line that a rank has written: the samples of a pass.
pub(crate) struct Pass {
    pub(crate) rank: usize,
    /// Number of the life of the training, from 1.
    pub(crate) life: u64,
    pub(crate) number: u64,
    /// `None` if the rank was killed while it wrote.
    pub(crate) indices: Option<Vec<usize>>,
}

/// Files of a checkpoint by name, and values of its manifest.
type End = (BTreeMap<String, Vec<u8>>, Vec<Value>);

impl Traces {
    pub(crate) fn new() -> Self {
        let mut folder = tempdir().unwrap();
        folder.disable_cleanup(std::env::var_os("ICE_KEEP_TRACES").is_some());
        fs::create_dir(folder.path().join("seen")).unwrap();
        Self(folder)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// Makes a launcher launch the trainee.
    pub(crate) fn trainee(&self, launcher: Program, life: u64) -> Program {
        let (seen, out) = (self.path("seen"), self.path("out"));
        launcher.arg(built("trainee")).args(["--seen", &seen, "--life", &life.to_string(), "--out-dir", &out])
    }

    pub(crate) fn checkpoints(&self) -> Vec<PathBuf> {
        checkpoints(Path::new(&self.path("out")))
    }

    /// Returns all samples that ranks have recorded, rank by rank.
    pub(crate) fn passes(&self) -> Vec<Pass> {
        let file = |rank: usize| {
            let path = Path::new(&self.path("seen")).join(format!("rank{rank}.txt"));
            Some((rank, fs::read_to_string(path).ok()?))
        };
        let pass = |rank: usize, line: &str| {
            let mut parts = line.splitn(3, ' ');
            let mut number = || parts.next().unwrap().parse().unwrap();
            let (life, number) = (number(), number());
            let indices = parts.next().and_then(|indices| serde_json::from_str(indices).ok());
            Pass { rank, life, number, indices }
        };
        let files = (0..).map_while(file);
        files.flat_map(|(rank, text)| text.lines().map(|line| pass(rank, line)).collect::<Vec<_>>()).collect()
    }

    /// Returns the agents' records of the rounds.
    pub(crate) fn rounds(&self) -> Vec<Value> {
        let folders = fs::read_dir(self.path("logs")).unwrap().map(|entry| entry.unwrap().path());
        let texts = folders.filter_map(|folder| fs::read_to_string(folder.join("rounds.jsonl")).ok());
        let rounds = texts.flat_map(|text| text.lines().map(serde_json::from_str).collect::<Vec<_>>());
        // A killed agent may have left half a line.
        rounds.filter_map(Result::ok).collect()
    }

    /// Returns the files of the last checkpoint, and the values of its manifest under these keys.
    fn end(&self, keys: &[&str]) -> End {
        let last = self.checkpoints().pop().unwrap();
        let files = fs::read_dir(&last).unwrap().map(|entry| entry.unwrap().path());
        let mut files: BTreeMap<_, _> = files
            .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap()))
            .collect();
        let manifest: Value = serde_json::from_slice(&files.remove("manifest.json").unwrap()).unwrap();
        (files, keys.iter().map(|key| manifest[*key].clone()).collect())
    }

    /// Fails with an additional text if the last checkpoint differs from that of another training
    /// in a bit, or its manifest differs under one of these keys.
    #[track_caller]
    pub(crate) fn assert_same_end(&self, undisturbed: &Self, keys: &[&str], beside: &str) {
        let ((files, says), (expected, said)) = (self.end(keys), undisturbed.end(keys));
        for (says, said) in says.iter().zip(&said) {
            assert_eq!(says, said, "{beside}");
        }
        assert_eq!(files.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{beside}");
        for (name, bytes) in &files {
            assert!(*bytes == expected[name], "{name} has other bits\n{beside}");
        }
    }
}

/// Fails if an epoch of this order does not contain every sample once.
#[track_caller]
pub(crate) fn assert_epochs(order: &[usize]) {
    for (number, epoch) in order.chunks_exact(SAMPLES).enumerate() {
        let mut epoch = epoch.to_vec();
        epoch.sort_unstable();
        assert!(epoch.iter().copied().eq(0..SAMPLES), "epoch {number}: {epoch:?}");
    }
}

/// Returns the number of the last pass that rank 0 has printed.
pub(crate) fn last_pass(text: &str) -> u64 {
    text.lines().filter_map(|line| line.strip_prefix("pass ")?.parse().ok()).max().unwrap_or(0)
}

/// Returns a random generator, and prints its seed. A variable may set the seed.
pub(crate) fn random(variable: &str) -> Random {
    let seed = std::env::var(variable).ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("{variable}={seed} replays it");
    Random::new(seed)
}
