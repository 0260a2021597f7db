//! Communication between ranks, apart from gradients and tensors of their state. All functions are
//! collective.

use ice_worker::Worker;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::kind::Element;
use tch::{Device, Kind, TchError, Tensor};

use crate::{Error, Result};

/// Returns the decision of rank 0 on every rank.
pub(crate) fn decide(decision: bool, worker: &Worker) -> Result<bool> {
    let decision = Tensor::from_slice(&[i64::from(decision)]).to_device(worker.device());
    worker.broadcast(&decision)?;
    Ok(decision.f_int64_value(&[0])? != 0)
}

/// Sends the value of the rank `source` to every rank. Only that rank passes `Some`.
pub(crate) fn broadcast<T: Serialize + DeserializeOwned>(
    own: Option<T>,
    source: usize,
    worker: &Worker,
) -> Result<T> {
    let fail = |error: serde_json::Error| Error::Resume(error.to_string());
    let bytes = own.map_or(Ok(Vec::new()), |own| serde_json::to_vec(&own)).map_err(fail)?;
    serde_json::from_slice(&broadcast_bytes(&bytes, source, worker)?).map_err(fail)
}

/// Sends the bytes of the rank `source` to every rank.
pub(crate) fn broadcast_bytes(bytes: &[u8], source: usize, worker: &Worker) -> Result<Vec<u8>> {
    let len = Tensor::from_slice(&[bytes.len() as i64]).to_device(worker.device());
    worker.broadcast_from(source, &len)?;
    let len = len.f_int64_value(&[0])?;
    let data = match worker.rank() == source {
        true => Tensor::from_slice(bytes),
        false => Tensor::zeros([len], (Kind::Uint8, Device::Cpu)),
    };
    let data = data.to_device(worker.device());
    if len > 0 {
        worker.broadcast_from(source, &data)?;
    }
    let mut bytes = vec![0; len as usize];
    data.f_copy_data_u8(&mut bytes, len as usize)?;
    Ok(bytes)
}

/// Returns the values of all ranks on every rank, in order of rank.
pub(crate) fn gather_all<T: Serialize + DeserializeOwned>(own: &T, worker: &Worker) -> Result<Vec<T>> {
    let fail = |error: serde_json::Error| Error::Resume(error.to_string());
    let mut bytes = serde_json::to_vec(own).map_err(fail)?;
    let lens = gather(&[bytes.len() as i64], worker)?.concat();
    let longest = lens.iter().max().map_or(0, |len| *len as usize);
    bytes.resize(longest, 0);
    let rows = gather(&bytes, worker)?.into_iter().zip(lens);
    rows.map(|(row, len)| serde_json::from_slice(&row[..len as usize]).map_err(fail)).collect()
}

/// Returns the rows of all ranks, in order of rank. All rows must have the same length.
pub(crate) fn gather<T: Element + Clone>(own: &[T], worker: &Worker) -> Result<Vec<Vec<T>>>
where
    Vec<T>: TryFrom<Tensor, Error = TchError>,
{
    if worker.world_size() == 1 {
        return Ok(vec![own.to_vec()]);
    }
    let options = (T::KIND, worker.device());
    let all = Tensor::f_zeros([worker.world_size() as i64, own.len() as i64], options)?.f_unbind(0)?;
    worker.all_gather(&all, &Tensor::f_from_slice(own)?.f_to_device(worker.device())?)?;
    all.iter().map(|row| Ok(Vec::try_from(row.f_to_device(Device::Cpu)?)?)).collect()
}
