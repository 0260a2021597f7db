use std::collections::VecDeque;
use std::num::NonZeroUsize;

use ice_checkpoint::Exact;
use ice_worker::Worker;
use serde_json::Value as Json;
use tch::{Device, Kind, Tensor};

use super::simple::{ratio, sum_and_count};
use super::sums::{exact, parse};
use super::{Meter, Sums};
use crate::{Measure, Result};

/// A moving average over batches, each weighted by its samples on all ranks.
///
/// - [`window`](MovingAverage::window): over the last `w` batches, `Σ sᵢ / Σ nᵢ` for `i` from
///   `t - w + 1` to `t`, where `sᵢ` is the sum and `nᵢ` the number of the elements of batch `i` on
///   all ranks.
/// - [`decay`](MovingAverage::decay): over all batches, with decaying weights,
///   `Σ dᵗ⁻ⁱ sᵢ / Σ dᵗ⁻ⁱ nᵢ`. The divisor has the same weights, so that the first averages are not
///   biased to zero.
///
/// An update takes a tensor with one element per sample. The average is NaN before the first batch.
#[derive(Debug)]
pub struct MovingAverage(Kept);

#[derive(Debug)]
enum Kept {
    Window {
        width: usize,
        /// `[sum, count]` of each batch over all ranks, oldest first.
        total: VecDeque<[f64; 2]>,
        /// `[sum, count]` of each batch of this rank since the last synchronization. `None` for a
        /// batch without samples.
        here: VecDeque<Option<Tensor>>,
    },
    Decay {
        factor: f64,
        sums: Sums,
    },
}

impl MovingAverage {
    /// Averages over the last `batches` batches.
    pub fn window(batches: NonZeroUsize) -> Self {
        Self(Kept::Window { width: batches.get(), total: VecDeque::new(), here: VecDeque::new() })
    }

    /// Averages over all batches. Each has `factor` times the weight of the next batch; `factor` is
    /// from 0 to 1, for example 0.99.
    pub fn decay(factor: f64) -> Self {
        Self(Kept::Decay { factor, sums: Sums::doubles(2) })
    }

    fn step(&mut self, row: Option<Tensor>) -> Result<()> {
        match &mut self.0 {
            Kept::Window { width, here, .. } => {
                here.push_back(row);
                if here.len() > *width {
                    here.pop_front();
                }
                Ok(())
            }
            Kept::Decay { factor, sums } => {
                sums.scale(*factor);
                row.map_or(Ok(()), |row| sums.add(&row))
            }
        }
    }
}

/// Returns the batches of this rank as `[width, 3]`, the last one last: sum, count, and 1 if there
/// was a batch.
fn rows(here: &VecDeque<Option<Tensor>>, width: usize, device: Device) -> Result<Tensor> {
    let rows = Tensor::zeros([width as i64, 3], (Kind::Double, device));
    for (index, row) in (width - here.len()..).zip(here) {
        let into = rows.f_get(index as i64)?;
        let _ = into.f_get(2)?.f_fill_(1.0)?;
        if let Some(row) = row {
            into.f_narrow(0, 0, 2)?.f_copy_(row)?;
        }
    }
    Ok(rows)
}

/// Appends the batches and drops the oldest.
fn append(total: &mut VecDeque<[f64; 2]>, rows: &Tensor, width: usize) -> Result<()> {
    let flat: Vec<f64> = Vec::try_from(rows.f_to_device(Device::Cpu)?.f_flatten(0, -1)?)?;
    // A rank that has fewer batches, since a name is new to it, gets them from the other ranks.
    let batches = flat.chunks_exact(3).filter(|row| row[2] > 0.0);
    total.extend(batches.map(|row| [row[0], row[1]]));
    while total.len() > width {
        total.pop_front();
    }
    Ok(())
}

impl Meter for MovingAverage {
    type Input = Tensor;

    fn reset(&mut self) {
        match &mut self.0 {
            Kept::Window { total, here, .. } => {
                total.clear();
                here.clear();
            }
            Kept::Decay { sums, .. } => sums.clear(),
        }
    }

    fn update(&mut self, values: &Tensor) -> Result<()> {
        self.step(Some(sum_and_count(values)?))
    }

    fn skip(&mut self) {
        // Without a row nothing is added, so this cannot fail.
        let _ = self.step(None);
    }

    fn sync(&mut self, worker: &Worker) -> Result<()> {
        match &mut self.0 {
            Kept::Window { width, total, here } => {
                let rows = rows(here, *width, worker.device())?;
                worker.all_reduce_sum(&rows)?;
                append(total, &rows, *width)?;
                here.clear();
                Ok(())
            }
            Kept::Decay { sums, .. } => sums.sync(worker),
        }
    }

    fn evaluate(&self) -> Result<Measure> {
        let value = match &self.0 {
            Kept::Window { width, total, here } => {
                let mut all = total.clone();
                append(&mut all, &rows(here, *width, Device::Cpu)?, *width)?;
                ratio(&all.iter().fold([0.0; 2], |[sum, count], [s, n]| [sum + s, count + n]))
            }
            Kept::Decay { sums, .. } => ratio(&sums.values()?),
        };
        Ok(value.into())
    }

    fn state(&self) -> Json {
        match &self.0 {
            Kept::Window { width, total, here } => {
                let mut all = total.clone();
                let rows = rows(here, *width, Device::Cpu);
                let rows = rows.and_then(|rows| append(&mut all, &rows, *width));
                let all: Vec<_> = all.iter().map(|row| exact(row)).collect();
                rows.ok().and_then(|()| serde_json::to_value(all).ok()).unwrap_or(Json::Null)
            }
            Kept::Decay { sums, .. } => sums.state(),
        }
    }

    fn load_state(&mut self, state: &Json) -> Result<()> {
        match &mut self.0 {
            Kept::Window { width, total, here } => {
                let saved: Vec<[Exact; 2]> = parse(state)?;
                let skipped = saved.len().saturating_sub(*width);
                *total = saved.iter().skip(skipped).map(|[sum, count]| [sum.0, count.0]).collect();
                here.clear();
                Ok(())
            }
            Kept::Decay { sums, .. } => sums.load_state(state),
        }
    }
}
