use std::time::{Duration, Instant};

use ice_proto::link::TrainingProgress;

/// Weight of the newest report in the moving average of a task's speed.
const WEIGHT: f64 = 0.3;

/// Lines about the job's progress: at an interval and at the end of each epoch, or for every report
/// if the line is rewritten in place.
pub(crate) struct ProgressLines {
    every: Duration,
    rewritten: bool,
    last: Option<Instant>,
    pace: Pace,
}

/// Speed of a task, in iterations per second.
#[derive(Default)]
struct Pace {
    task: String,
    per_second: Option<f64>,
    /// The last report: epoch, iterations, and time.
    last: Option<(u64, u64, Instant)>,
}

impl ProgressLines {
    /// Creates the lines. If `every` is 0, no line is ever due.
    pub(crate) fn new(every: Duration, rewritten: bool) -> Self {
        Self { every, rewritten, last: None, pace: Pace::default() }
    }

    /// Whether one line is rewritten in place.
    pub(crate) fn is_rewritten(&self) -> bool {
        self.rewritten
    }

    /// Returns the line to print, if one is due.
    pub(crate) fn due(&mut self, progress: &TrainingProgress, now: Instant) -> Option<String> {
        self.pace.report(progress, now);
        let (done, total) = progress.iteration;
        let due = self.rewritten
            || done == total
            || self.last.is_none_or(|last| now.duration_since(last) >= self.every);
        if !due || self.every.is_zero() {
            return None;
        }
        self.last = Some(now);
        Some(line(progress, self.pace.per_second))
    }

    /// Records that the job pauses. The time until the next report does not count for the speed.
    pub(crate) fn pause(&mut self) {
        self.pace.last = None;
    }
}

impl Pace {
    fn report(&mut self, progress: &TrainingProgress, now: Instant) {
        if self.task != progress.task {
            *self = Self { task: progress.task.clone(), ..Self::default() };
        }
        let ((epoch, _), (done, _)) = (progress.epoch, progress.iteration);
        if let Some((_, before, at)) = self.last.filter(|last| last.0 == epoch && last.1 < done) {
            let new = (done - before) as f64 / now.duration_since(at).as_secs_f64().max(1e-6);
            self.per_second = Some(self.per_second.map_or(new, |old| old + WEIGHT * (new - old)));
        }
        self.last = Some((epoch, done, now));
    }
}

fn line(progress: &TrainingProgress, per_second: Option<f64>) -> String {
    let epoch = match progress.epoch {
        (0, _) => String::new(),
        epoch => format!("  epoch {}", position(epoch)),
    };
    let step = position(progress.iteration);
    let loss = progress.loss.map(|loss| format!("  loss {loss:.4}")).unwrap_or_default();
    let rate = match progress.samples_per_second {
        0.0 => String::new(),
        rate if rate >= 10_000.0 => format!("  {:.1}k samples/s", rate / 1000.0),
        rate => format!("  {rate:.0} samples/s"),
    };
    let eta = per_second.map(|rate| eta(progress, rate)).unwrap_or_default();
    format!("{}{epoch}  step {step}{loss}{rate}{eta}", progress.task)
}

/// Returns a number and the total, if the total is known.
fn position((number, total): (u64, u64)) -> String {
    if total > 0 { format!("{number}/{total}") } else { number.to_string() }
}

/// Returns the time left for the epoch and for all epochs. Assumes that later epochs are as long
/// and that no other task runs between them.
fn eta(progress: &TrainingProgress, per_second: f64) -> String {
    let ((epoch, epochs), (done, total)) = (progress.epoch, progress.iteration);
    let left = total.saturating_sub(done);
    let time = |iterations: u64| clock(iterations as f64 / per_second);
    let later = epochs.saturating_sub(epoch);
    match (left, later) {
        (0, 0) => String::new(),
        (_, 0) => format!("  ETA {}", time(left)),
        _ => format!("  ETA {}, all epochs {}", time(left), time(left + later * total)),
    }
}

fn clock(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(epoch: (u64, u64), iteration: (u64, u64)) -> TrainingProgress {
        TrainingProgress { task: "train".into(), epoch, iteration, samples_per_second: 1.0, loss: None }
    }

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Whether reports of these numbers of iterations, at these numbers of seconds, make a line.
    fn due(mut lines: ProgressLines) -> [bool; 5] {
        let start = Instant::now();
        [(1, 0), (2, 1), (3, 2), (4, 3), (9, 3)]
            .map(|(done, second)| lines.due(&at((1, 1), (done, 9)), start + s(second)).is_some())
    }

    #[test]
    fn lines_come_now_and_then_and_at_the_end_of_an_epoch() {
        assert_eq!(due(ProgressLines::new(s(2), false)), [true, false, true, false, true]);
        assert_eq!(due(ProgressLines::new(s(2), true)), [true; 5], "a line that is rewritten costs no room");
        assert_eq!(due(ProgressLines::new(s(0), false)), [false; 5]);
    }

    #[test]
    fn a_line_says_where_the_job_is() {
        let progress =
            TrainingProgress { samples_per_second: 12_345.0, loss: Some(0.21344), ..at((1, 3), (240, 469)) };
        let place = "train  epoch 1/3  step 240/469  loss 0.2134  12.3k samples/s";
        assert_eq!(line(&progress, None), place);
        assert_eq!(line(&progress, Some(2.0)), format!("{place}  ETA 1:55, all epochs 9:44"));
        // A loop of the program's own, which knows its epoch and not their number.
        assert_eq!(line(&at((2, 0), (3, 9)), Some(2.0)), "train  epoch 2  step 3/9  1 samples/s  ETA 0:03");
        let unknown = TrainingProgress { samples_per_second: 0.0, ..at((0, 0), (7, 0)) };
        assert_eq!(line(&unknown, Some(2.0)), "train  step 7");
    }

    #[test]
    fn what_is_left_is_told_from_the_pace() {
        let start = Instant::now();
        let mut lines = ProgressLines::new(s(1), false);
        let mut eta = |epoch, done, second| {
            let line = lines.due(&at((epoch, 2), (done, 7300)), start + s(second)).unwrap();
            line.split_once("ETA ").map(|(_, eta)| eta.to_owned())
        };
        assert_eq!(eta(1, 100, 0), None, "nothing to go by yet");
        assert_eq!(eta(1, 110, 10).unwrap(), "1:59:50, all epochs 4:01:30");
        // The next epoch continues at the pace of this one.
        assert_eq!(eta(2, 1, 20).unwrap(), "2:01:39");
        lines.pause();
        let line = lines.due(&at((2, 2), (11, 7300)), start + s(9000)).unwrap();
        assert!(line.ends_with("ETA 2:01:29"), "a pause counts as time: {line}");
        assert!(!lines.due(&at((2, 2), (7300, 7300)), start + s(20_000)).unwrap().contains("ETA"));
    }
}
