use std::time::{Duration, Instant};

use ice_proto::link::Progress;

/// Prints where the job is, now and then and at the end of each epoch.
pub(crate) struct ProgressLines {
    every: Duration,
    last: Option<Instant>,
}

impl ProgressLines {
    pub(crate) fn new(every: Duration) -> Self {
        Self { every, last: None }
    }

    pub(crate) fn show(&mut self, progress: &Progress, now: Instant) {
        let (done, total) = progress.iteration;
        let due = self.last.is_none_or(|last| now.duration_since(last) >= self.every);
        if due || done == total {
            self.last = Some(now);
            eprintln!("{}", line(progress));
        }
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
