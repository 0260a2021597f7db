use ice_checkpoint::Exact;
use ice_worker::Worker;
use serde::Deserialize;
use serde_json::Value as Json;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// A row of sums. The sums of all ranks up to the last synchronization are kept apart from this
/// rank's sums since, which stay on its device.
#[derive(Debug)]
pub(crate) struct Sums {
    total: Tensor,
    here: Option<Tensor>,
}

impl Sums {
    /// Creates `len` sums of `Kind::Double`.
    pub(crate) fn doubles(len: i64) -> Self {
        Self { total: Tensor::zeros([len], (Kind::Double, Device::Cpu)), here: None }
    }

    /// Creates `len` counts.
    pub(crate) fn counts(len: i64) -> Self {
        Self { total: Tensor::zeros([len], (Kind::Int64, Device::Cpu)), here: None }
    }

    pub(crate) fn clear(&mut self) {
        self.total = self.total.zeros_like();
        self.here = None;
    }

    /// Adds a row of this rank.
    pub(crate) fn add(&mut self, row: &Tensor) -> Result<()> {
        tch::no_grad(|| {
            let row = row.detach().f_to_kind(self.total.kind())?;
            self.here = Some(match self.here.take() {
                Some(here) => here.f_add(&row)?,
                None => row,
            });
            Ok(())
        })
    }

    /// Multiplies all sums by a factor.
    pub(crate) fn scale(&mut self, factor: f64) {
        self.total = &self.total * factor;
        self.here = self.here.take().map(|here| here * factor);
    }

    /// Adds the rows of all ranks since the last call. Collective.
    pub(crate) fn sync(&mut self, worker: &Worker) -> Result<()> {
        let here = match &self.here {
            Some(here) => here.f_to_device(worker.device())?.copy(),
            None => self.total.zeros_like().f_to_device(worker.device())?,
        };
        worker.all_reduce_sum(&here)?;
        self.total = self.total.f_add(&here.f_to_device(Device::Cpu)?)?;
        self.here = None;
        Ok(())
    }

    /// Returns the sums, including those of this rank.
    fn now(&self) -> Result<Tensor> {
        Ok(match &self.here {
            Some(here) => self.total.f_add(&here.f_to_device(Device::Cpu)?)?,
            None => self.total.shallow_clone(),
        })
    }

    /// Returns the sums of `Kind::Double`.
    pub(crate) fn values(&self) -> Result<Vec<f64>> {
        Ok(Vec::try_from(self.now()?)?)
    }

    /// Returns the counts.
    pub(crate) fn integers(&self) -> Result<Vec<i64>> {
        Ok(Vec::try_from(self.now()?)?)
    }

    pub(crate) fn state(&self) -> Json {
        let state = match self.total.kind() {
            Kind::Int64 => self.integers().map(serde_json::to_value),
            _ => self.values().map(|values| serde_json::to_value(exact(&values))),
        };
        // A device that fails here also fails in the next step, which reports the error.
        state.ok().and_then(Result::ok).unwrap_or(Json::Null)
    }

    pub(crate) fn load_state(&mut self, state: &Json) -> Result<()> {
        let total = match self.total.kind() {
            Kind::Int64 => parse(state).map(|counts: Vec<i64>| Tensor::from_slice(&counts))?,
            _ => parse(state).map(|sums: Vec<Exact>| Tensor::from_slice(&inexact(&sums)))?,
        };
        if total.size() != self.total.size() {
            return Err(Error::Resume(format!(
                "a meter has {} sums and had {} when the checkpoint was saved",
                self.total.numel(),
                total.numel()
            )));
        }
        (self.total, self.here) = (total, None);
        Ok(())
    }
}

/// Parses the saved state of a meter.
pub(super) fn parse<T: for<'a> Deserialize<'a>>(state: &Json) -> Result<T> {
    T::deserialize(state)
        .map_err(|error| Error::Resume(format!("what was measured so far does not fit: {error}")))
}

pub(super) fn exact(values: &[f64]) -> Vec<Exact> {
    values.iter().copied().map(Exact).collect()
}

pub(super) fn inexact(values: &[Exact]) -> Vec<f64> {
    values.iter().map(|value| value.0).collect()
}
