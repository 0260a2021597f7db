use ice_worker::Worker;
use serde_json::Value as Json;

use super::sums::parse;
use super::{Average, Meter};
use crate::collectives::gather;
use crate::{Measure, Result};

/// Several named values from one function, each with its own meter. The value of the dict is that
/// of the first name. A node `val/scores` has the measures `val/scores`, `val/scores.f1`,
/// `val/scores.loss`.
///
/// An update may omit names and add new ones. The ranks need not have the same names.
pub struct Dict<M = Average> {
    make: Box<dyn Fn() -> M>,
    meters: Vec<(String, M)>,
}

impl<M: Meter> Dict<M> {
    /// Measures each value with a meter created by `make`.
    pub fn new(make: impl Fn() -> M + 'static) -> Self {
        Self { make: Box::new(make), meters: Vec::new() }
    }

    /// Returns the meters with their names, in the order in which the names first appeared.
    pub fn meters(&self) -> impl Iterator<Item = (&str, &M)> {
        self.meters.iter().map(|(name, meter)| (name.as_str(), meter))
    }

    fn meter(&mut self, name: &str) -> &mut M {
        let index = self.meters.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            self.meters.push((name.to_owned(), (self.make)()));
            self.meters.len() - 1
        });
        &mut self.meters[index].1
    }
}

impl Default for Dict {
    fn default() -> Self {
        Self::new(Average::new)
    }
}

impl<M: Meter> Meter for Dict<M> {
    type Input = Vec<(String, M::Input)>;

    fn reset(&mut self) {
        self.meters.clear();
    }

    fn update(&mut self, values: &Self::Input) -> Result<()> {
        for (name, value) in values {
            self.meter(name).update(value)?;
        }
        let left_out = |(name, _): &&mut (String, M)| !values.iter().any(|(given, _)| given == name);
        self.meters.iter_mut().filter(left_out).for_each(|(_, meter)| meter.skip());
        Ok(())
    }

    fn skip(&mut self) {
        self.meters.iter_mut().for_each(|(_, meter)| meter.skip());
    }

    fn sync(&mut self, worker: &Worker) -> Result<()> {
        let own: Vec<_> = self.meters.iter().map(|(name, _)| name.as_str()).collect();
        let mut order: Vec<String> = Vec::new();
        for name in names_of_all(&own, worker)?.into_iter().flatten() {
            if !order.contains(&name) {
                order.push(name);
            }
        }
        for name in &order {
            self.meter(name).sync(worker)?;
        }
        self.meters.sort_by_key(|(name, _)| order.iter().position(|known| known == name));
        Ok(())
    }

    fn evaluate(&self) -> Result<Measure> {
        let value = |(name, meter): &(String, M)| Ok((name.clone(), meter.evaluate()?.value));
        let parts: Vec<_> = self.meters.iter().map(value).collect::<Result<_>>()?;
        Ok(Measure { value: parts.first().map_or(f64::NAN, |(_, value)| *value), parts })
    }

    fn state(&self) -> Json {
        self.meters
            .iter()
            .map(|(name, meter)| Json::from(vec![name.as_str().into(), meter.state()]))
            .collect()
    }

    fn load_state(&mut self, state: &Json) -> Result<()> {
        self.meters.clear();
        for (name, state) in parse::<Vec<(String, Json)>>(state)? {
            self.meter(&name).load_state(&state)?;
        }
        Ok(())
    }
}

/// Returns the names of all ranks, in order of rank. Collective.
fn names_of_all(own: &[&str], worker: &Worker) -> Result<Vec<Vec<String>>> {
    let mut own = serde_json::to_vec(own).unwrap_or_default();
    let lengths: Vec<usize> =
        gather(&[own.len() as i64], worker)?.into_iter().flatten().map(|len| len as usize).collect();
    own.resize(lengths.iter().copied().max().unwrap_or(0), 0);
    let rows = gather(&own, worker)?.into_iter().zip(lengths);
    Ok(rows.map(|(row, len)| serde_json::from_slice(&row[..len]).unwrap_or_default()).collect())
}
