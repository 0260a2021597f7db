//! Optimizer state that is sharded over the ranks: the first stage of ZeRO (Rajbhandari et al.,
//! 2020).

use std::rc::Rc;

use ice_worker::Worker;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Alignment of a rank's piece of a parameter, in elements. With it, kernels compute a piece like
/// the whole parameter.
const ALIGNMENT: u64 = 64;
/// Most bytes that a rank sends at a time. Meanwhile, each rank needs a buffer of as much memory
/// per rank.
const AT_ONCE: u64 = 32 << 20;

/// A range of elements of a flattened parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) len: u64,
}

impl Piece {
    /// Returns these elements of a contiguous tensor, as a row.
    fn of(self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.detach().f_view([-1])?.f_narrow(0, self.start as i64, self.len as i64)?)
    }
}

/// The division of the parameters among ranks, and the exchange of updated elements.
pub(super) struct Sharding {
    worker: Rc<Worker>,
    /// This rank's piece of each parameter.
    pub(super) own: Vec<Piece>,
    /// Transfers in order. Each holds, by rank, the pieces with the numbers of their parameters.
    transfers: Vec<Vec<Vec<(usize, Piece)>>>,
}

impl Sharding {
    /// Divides the parameters evenly over all ranks.
    pub(super) fn new(worker: &Rc<Worker>, names: &[String], parameters: &[Tensor]) -> Result<Self> {
        let mut named = names.iter().zip(parameters);
        if let Some((name, _)) = named.find(|(_, parameter)| !parameter.is_contiguous()) {
            return Err(Error::Usage(format!(
                "`{name}` is not contiguous, and its optimizer's state cannot be sharded: make it with .contiguous()"
            )));
        }
        let sizes: Vec<_> = parameters.iter().map(|parameter| parameter.numel() as u64).collect();
        let width = |parameter: &Tensor| parameter.kind().elt_size_in_bytes() as u64;
        let widths: Vec<_> = parameters.iter().map(width).collect();
        let mut shards = divide(&sizes, worker.world_size());
        let parts: Vec<_> = shards.iter().map(|shard| portions(shard, &widths)).collect();
        let count = parts.iter().map(Vec::len).max().unwrap_or(0);
        let nth = |n: usize| parts.iter().map(|parts| parts.get(n).cloned().unwrap_or_default()).collect();
        let transfers = (0..count).map(nth).collect();
        Ok(Self { worker: Rc::clone(worker), own: shards.swap_remove(worker.rank()), transfers })
    }

    /// Returns this rank's elements of each tensor, which has the shape of the parameter. An
    /// undefined tensor stays undefined.
    pub(super) fn own_of(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        let own = |(tensor, piece): (&Tensor, &Piece)| match tensor.defined() {
            true => piece.of(&tensor.detach().f_contiguous()?),
            false => Ok(Tensor::new()),
        };
        tensors.iter().zip(&self.own).map(own).collect()
    }

    /// Sends the elements that each rank has updated to all ranks. Collective.
    pub(super) fn share(&self, parameters: &[Tensor]) -> Result<()> {
        let device = parameters.first().map_or(Device::Cpu, Tensor::device);
        let bytes = |&(number, piece): &(usize, Piece)| -> Result<Tensor> {
            Ok(piece.of(&parameters[number])?.f_view_dtype(Kind::Uint8)?)
        };
        for transfer in &self.transfers {
            let views = transfer.iter().map(|pieces| pieces.iter().map(bytes).collect::<Result<Vec<_>>>());
            let views = views.collect::<Result<Vec<_>>>()?;
            let lengths = views.iter().map(|views| views.iter().map(|view| view.numel() as i64).sum::<i64>());
            let longest = lengths.max().unwrap_or(0);
            let all = Tensor::f_empty([views.len() as i64, longest], (Kind::Uint8, device))?.f_unbind(0)?;
            let own = Tensor::f_empty([longest], (Kind::Uint8, device))?;
            for (mut place, view) in side_by_side(&own, &views[self.worker.rank()])? {
                place.f_copy_(view)?;
            }
            self.worker.all_gather(&all, &own)?;
            for (rank, (views, all)) in views.iter().zip(&all).enumerate() {
                if rank != self.worker.rank() {
                    for (place, view) in side_by_side(all, views)? {
                        view.shallow_clone().f_copy_(&place)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Returns the views, each with its part of a row that holds all of them one after the other.
fn side_by_side<'a>(row: &Tensor, views: &'a [Tensor]) -> Result<Vec<(Tensor, &'a Tensor)>> {
    let mut start = 0;
    let place = |view: &'a Tensor| {
        let len = view.numel() as i64;
        start += len;
        Ok((row.f_narrow(0, start - len, len)?, view))
    };
    views.iter().map(place).collect()
}

/// Returns, for each rank, its piece of each parameter, which may be empty. The same on every rank.
fn divide(sizes: &[u64], ranks: usize) -> Vec<Vec<Piece>> {
    let total: u64 = sizes.iter().sum();
    let even = |rank: usize| (u128::from(total) * rank as u128 / ranks as u128) as u64;
    let shard = |rank: usize| {
        let (from, to) = (even(rank), even(rank + 1));
        let mut first = 0;
        let piece = |&size: &u64| {
            let border = |at: u64| match at.saturating_sub(first).min(size) {
                within if within == size => size,
                within => within / ALIGNMENT * ALIGNMENT,
            };
            let (start, end) = (border(from), border(to));
            first += size;
            Piece { start, len: end - start }
        };
        sizes.iter().map(piece).collect()
    };
    (0..ranks).map(shard).collect()
}

/// Cuts a rank's shard into portions that are sent at a time. `widths` are the bytes of an element
/// of each parameter.
fn portions(shard: &[Piece], widths: &[u64]) -> Vec<Vec<(usize, Piece)>> {
    let (mut portions, mut room) = (Vec::new(), 0);
    for (number, (piece, width)) in shard.iter().zip(widths).enumerate() {
        let (mut start, end) = (piece.start, piece.start + piece.len);
        while start < end {
            if room < *width {
                portions.push(Vec::new());
                room = AT_ONCE;
            }
            let len = (end - start).min(room / width);
            if let Some(portion) = portions.last_mut() {
                portion.push((number, Piece { start, len }));
            }
            (start, room) = (start + len, room - len * width);
        }
    }
    portions
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_element_is_one_ranks(sizes in prop::collection::vec(0_u64..3000, 0..9), ranks in 1_usize..9) {
            let shards = divide(&sizes, ranks);
            prop_assert_eq!(shards.len(), ranks);
            for (number, size) in sizes.iter().enumerate() {
                let mut next = 0;
                for piece in shards.iter().map(|shard| shard[number]) {
                    prop_assert!(piece.start == next && (piece.start % ALIGNMENT == 0 || piece.len == 0));
                    next += piece.len;
                }
                prop_assert_eq!(next, *size);
            }
            let even = sizes.iter().sum::<u64>() / ranks as u64;
            let most = shards.iter().map(|shard| shard.iter().map(|piece| piece.len).sum::<u64>()).max();
            prop_assert!(most <= Some(even + ALIGNMENT + 1), "{:?} of {}", most, even);
        }

        #[test]
        fn what_is_sent_is_all_that_there_is(lens in prop::collection::vec(0_u64..40 << 20, 0..5), wide: bool) {
            let widths = vec![if wide { 8 } else { 2 }; lens.len()];
            let shard: Vec<_> = lens.iter().map(|&len| Piece { start: 64, len }).collect();
            let mut left: Vec<_> = shard.iter().map(|piece| (piece.start, piece.len)).collect();
            for portion in portions(&shard, &widths) {
                let bytes: u64 = portion.iter().map(|(number, piece)| piece.len * widths[*number]).sum();
                prop_assert!(0 < bytes && bytes <= AT_ONCE);
                for (number, piece) in portion {
                    let (start, len) = &mut left[number];
                    prop_assert_eq!(piece.start, *start);
                    (*start, *len) = (*start + piece.len, *len - piece.len);
                }
            }
            prop_assert!(left.iter().all(|(_, len)| *len == 0));
        }
    }
}
