//! Times of the nodes of timed tasks.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tch::{Cuda, Device};

use crate::{Error, Result};

/// Times of one task.
#[derive(Debug)]
pub(crate) struct Timers {
    device: Device,
    /// Rows by node and phase, in order of appearance.
    rows: RefCell<Vec<(String, &'static str, Figures)>>,
    /// For each active node, the time of the nodes that it waited for.
    nested: RefCell<Vec<Duration>>,
}

#[derive(Debug, Clone, Copy)]
struct Figures {
    count: u64,
    min: Duration,
    max: Duration,
    total: Duration,
}

impl Timers {
    pub(crate) fn new(device: Device) -> Self {
        Self { device, rows: RefCell::default(), nested: RefCell::default() }
    }

    /// Times the work of a node, without the work that other nodes do for it meanwhile.
    /// Synchronizes with a GPU before and after.
    pub(crate) fn time<T>(&self, uid: &str, phase: &'static str, work: impl FnOnce() -> T) -> T {
        self.nested.borrow_mut().push(Duration::ZERO);
        let begun = self.now();
        let outcome = work();
        let took = self.now() - begun;
        let mut nested = self.nested.borrow_mut();
        let of_others = nested.pop().unwrap_or_default();
        if let Some(outer) = nested.last_mut() {
            *outer += took;
        }
        self.add(uid, phase, took.saturating_sub(of_others));
        outcome
    }

    fn now(&self) -> Instant {
        if let Device::Cuda(index) = self.device {
            Cuda::synchronize(index as i64);
        }
        Instant::now()
    }

    fn add(&self, uid: &str, phase: &'static str, took: Duration) {
        let mut rows = self.rows.borrow_mut();
        let index = rows.iter().position(|(node, of, _)| node == uid && *of == phase).unwrap_or_else(|| {
            let none = Figures { count: 0, min: Duration::MAX, max: Duration::ZERO, total: Duration::ZERO };
            rows.push((uid.to_owned(), phase, none));
            rows.len() - 1
        });
        let figures = &mut rows[index].2;
        figures.count += 1;
        figures.min = figures.min.min(took);
        figures.max = figures.max.max(took);
        figures.total += took;
    }
}

/// The timers of all timed tasks, by task.
#[derive(Default)]
pub(crate) struct AllTimers(RefCell<BTreeMap<String, Rc<Timers>>>);

impl AllTimers {
    /// Returns the timers of a task. Tasks with the same name, and all repetitions of a task, share
    /// their timers.
    pub(crate) fn of(&self, task: &str, device: Device) -> Rc<Timers> {
        let mut all = self.0.borrow_mut();
        Rc::clone(all.entry(task.to_owned()).or_insert_with(|| Rc::new(Timers::new(device))))
    }

    /// Writes all times so far, unless there are none. Replaces the file.
    pub(crate) fn write(&self, file: &Path) -> Result<()> {
        let all = self.0.borrow();
        if all.is_empty() {
            return Ok(());
        }
        let mut csv = "task,node,phase,count,mean_ms,min_ms,max_ms,total_ms\n".to_owned();
        for (task, timers) in &*all {
            for (node, phase, figures) in &*timers.rows.borrow() {
                let ms = |time: Duration| time.as_secs_f64() * 1e3;
                let Figures { count, min, max, total } = *figures;
                let mean = ms(total) / count as f64;
                let _ = writeln!(
                    csv,
                    "\"{task}\",\"{node}\",{phase},{count},{mean:.6},{:.6},{:.6},{:.6}",
                    ms(min),
                    ms(max),
                    ms(total)
                );
            }
        }
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        let beside = file.with_extension("csv.partial");
        fs::write(&beside, csv).map_err(Error::io(&beside))?;
        fs::rename(&beside, file).map_err(Error::io(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spin(time: Duration) {
        let begun = Instant::now();
        while begun.elapsed() < time {}
    }

    #[test]
    fn a_node_is_not_charged_for_those_that_it_waits_for() {
        let (short, long) = (Duration::from_millis(1), Duration::from_millis(20));
        let timers = Timers::new(Device::Cpu);
        for _ in 0..2 {
            timers.time("outer", "forward", || {
                timers.time("inner", "forward", || spin(long));
                timers.time("inner", "forward", || spin(short));
                spin(short);
            });
        }
        let rows = timers.rows.borrow();
        let of = |name: &str| rows.iter().find(|(node, ..)| node == name).unwrap().2;
        let (inner, outer) = (of("inner"), of("outer"));
        assert_eq!((inner.count, outer.count), (4, 2));
        assert!(inner.total >= 2 * (long + short) && inner.max >= long && inner.min < long, "{inner:?}");
        assert!(outer.min >= short && outer.min < long, "{outer:?}");
    }
}
