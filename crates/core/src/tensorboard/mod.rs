//! The TensorBoard events of a run, in event files in the run's folder. Rank 0 writes them.
//!
//! The x axis is always the number of training steps. A run that resumes from a checkpoint
//! therefore replaces exactly the events of the steps that it repeats. This module does not depend
//! on graphs and ranks.

mod histogram;
mod hparams;
mod messages;
mod records;
mod wire;
mod writer;

use std::num::NonZeroU64;
use std::path::Path;
use std::time::{Instant, SystemTime};

pub(crate) use histogram::Histogram;
pub use hparams::HParam;
use messages::{Content, Event, Item};
use writer::Writer;

/// The event file of a run, on rank 0, and the schedule of writes to it, on all ranks.
pub(crate) struct Board {
    writer: Option<Writer>,
    every: Option<NonZeroU64>,
    since: Instant,
    samples: u64,
}

impl Board {
    /// Creates a board that shows every `every`-th step. Writes nothing before [`Board::open`].
    pub(crate) fn new(every: Option<NonZeroU64>) -> Self {
        Self { writer: None, every, since: Instant::now(), samples: 0 }
    }

    /// Creates a new file in the folder. Events of earlier files of this run count up to `step`,
    /// from which the run continues.
    pub(crate) fn open(&mut self, folder: &Path, step: u64, hparams: &[(String, HParam)]) {
        let writer = match Writer::open(folder) {
            Ok(writer) => writer,
            // Missing events must not end a run.
            Err(error) => return tracing::warn!("no TensorBoard events in {}: {error}", folder.display()),
        };
        self.writer = Some(writer);
        self.write(0, Content::Version);
        // TensorBoard's Python loader discards nothing at the first session start that it sees, so
        // the first file has one, too.
        self.write(step + 1, Content::SessionStart);
        if !hparams.is_empty() {
            self.write(step, Content::Summary(vec![hparams::start(hparams, seconds())]));
        }
        self.since = Instant::now();
    }

    /// Whether events are written.
    pub(crate) fn is_open(&self) -> bool {
        self.writer.is_some()
    }

    /// Adds the samples of a step, over all ranks. Returns whether the step is to be shown, which
    /// is the same on all ranks.
    pub(crate) fn count(&mut self, step: u64, samples: u64) -> bool {
        self.samples += samples;
        self.every.is_some_and(|every| step.is_multiple_of(every.get()))
    }

    /// Returns the samples per second since the last call.
    pub(crate) fn rate(&mut self) -> f64 {
        let seconds = self.since.elapsed().as_secs_f64().max(1e-6);
        self.since = Instant::now();
        std::mem::take(&mut self.samples) as f64 / seconds
    }

    pub(crate) fn scalars(&self, step: u64, scalars: impl IntoIterator<Item = (String, f64)>) {
        let item = |(tag, value): (String, f64)| Item::Scalar { tag: clean(&tag), value: value as f32 };
        self.write(step, Content::Summary(scalars.into_iter().map(item).collect()));
    }

    pub(crate) fn histogram(&self, step: u64, tag: &str, histogram: Histogram) {
        self.write(step, Content::Summary(vec![Item::Histogram { tag: clean(tag), histogram }]));
    }

    /// Records how the run ended, unless it will continue, and waits until everything is written.
    pub(crate) fn finish(&mut self, step: u64, succeeded: Option<bool>) {
        if let Some(succeeded) = succeeded {
            self.write(step, Content::Summary(vec![hparams::end(succeeded, seconds())]));
        }
        self.writer = None;
    }

    fn write(&self, step: u64, content: Content) {
        if let Some(writer) = &self.writer {
            writer.write(Event { wall_time: seconds(), step, content });
        }
    }
}

/// Seconds since the Unix epoch.
fn seconds() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |passed| passed.as_secs_f64())
}

/// Replaces characters that TensorFlow does not allow in a tag.
fn clean(tag: &str) -> String {
    let allowed = |c: char| c.is_alphanumeric() || "-_./".contains(c);
    tag.chars().map(|c| if allowed(c) { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_file_says_where_its_session_starts_the_first_included() {
        let folder = tempfile::tempdir().unwrap();
        for step in [0, 5] {
            let mut board = Board::new(None);
            board.open(folder.path(), step, &[]);
            board.finish(step, None);
        }
        let mut files: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let steps: Vec<_> = files
            .iter()
            .map(|file| {
                let bytes = fs::read(file).unwrap();
                // The step as a varint, followed by the session start as a message of one field.
                let at = bytes.windows(4).position(|window| window == [0x3a, 2, 8, 1]).unwrap();
                (bytes[at - 2], bytes[at - 1])
            })
            .collect();
        assert_eq!(steps, [(0x10, 1), (0x10, 6)]);
    }
}
