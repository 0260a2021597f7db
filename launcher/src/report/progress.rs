use std::time::{Duration, Instant};

use ice_proto::link::Progress;

/// Says where the job is, now and then and at the end of each epoch.
pub(crate) struct ProgressLines {
    every: Duration,
    last: Option<Instant>,
}

impl ProgressLines {
    pub(crate) fn new(every: Duration) -> Self {
        Self { every, last: None }
    }

    /// The line to print, where one is due.
    pub(crate) fn due(&mut self, progress: &Progress, now: Instant) -> Option<String> {
        let (done, total) = progress.iteration;
        let due = self.last.is_none_or(|last| now.duration_since(last) >= self.every);
        if !due && done != total {
            return None;
        }
        self.last = Some(now);
        Some(line(progress) + "\n")
    }
}

fn line(progress: &Progress) -> String {
    let ((epoch, epochs), (done, total)) = (progress.epoch, progress.iteration);
    let loss = progress.loss.map(|loss| format!("  loss {loss:.4}")).unwrap_or_default();
    let rate = match progress.samples_per_second {
        rate if rate >= 10_000.0 => format!("{:.1}k", rate / 1000.0),
        rate => format!("{rate:.0}"),
    };
    format!("{}  epoch {epoch}/{epochs}  step {done}/{total}{loss}  {rate} samples/s", progress.task)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_now_and_then_and_at_the_end_of_an_epoch() {
        let at = |done| Progress {
            task: "train".into(),
            epoch: (1, 1),
            iteration: (done, 9),
            samples_per_second: 1.0,
            loss: None,
        };
        let mut lines = ProgressLines::new(Duration::from_secs(2));
        let start = Instant::now();
        let due: Vec<_> = [(1, 0), (2, 1), (3, 2), (4, 3), (9, 3)]
            .map(|(done, second)| lines.due(&at(done), start + Duration::from_secs(second)).is_some())
            .into();
        assert_eq!(due, [true, false, true, false, true]);
    }

    #[test]
    fn a_line_says_where_the_job_is() {
        let progress = Progress {
            task: "train".into(),
            epoch: (1, 3),
            iteration: (240, 469),
            samples_per_second: 12_345.0,
            loss: Some(0.21344),
        };
        assert_eq!(line(&progress), "train  epoch 1/3  step 240/469  loss 0.2134  12.3k samples/s");
    }
}
