use tch::{Kind, Tensor};

use crate::Result;

/// Number of buckets, which have equal width.
const BUCKETS: i64 = 64;

/// Histogram of the finite elements of a tensor.
#[derive(Debug)]
pub(crate) struct Histogram {
    pub(super) min: f64,
    pub(super) max: f64,
    pub(super) sum: f64,
    pub(super) sum_of_squares: f64,
    /// Upper end of each bucket.
    pub(super) limits: Vec<f64>,
    pub(super) counts: Vec<f64>,
}

impl Histogram {
    /// Returns the histogram, or `None` if no element is finite.
    pub(crate) fn of(tensor: &Tensor) -> Result<Option<Self>> {
        tch::no_grad(|| {
            let all = tensor.detach().f_to_kind(Kind::Float)?.f_flatten(0, -1)?;
            let finite = all.f_masked_select(&all.f_isfinite()?)?;
            if finite.numel() == 0 {
                return Ok(None);
            }
            let doubles = finite.f_to_kind(Kind::Double)?;
            let figures = [
                doubles.f_min()?,
                doubles.f_max()?,
                doubles.f_sum(Kind::Double)?,
                doubles.f_square()?.f_sum(Kind::Double)?,
            ];
            let figures: Vec<f64> = Vec::try_from(Tensor::f_stack(&figures, 0)?)?;
            let (min, max) = (figures[0], figures[1]);
            let (limits, counts) = if min == max {
                (vec![max], vec![finite.numel() as f64])
            } else {
                let width = (max - min) / BUCKETS as f64;
                let inner = (1..BUCKETS).map(|bucket| min + width * bucket as f64);
                let counts = Vec::try_from(finite.f_histc(BUCKETS)?.f_to_kind(Kind::Double)?)?;
                (inner.chain([max]).collect(), counts)
            };
            Ok(Some(Self { min, max, sum: figures[2], sum_of_squares: figures[3], limits, counts }))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_element_is_in_a_bucket() {
        let values = [-2.0_f32, f32::NAN, 0.5, 1.0, f32::INFINITY, 2.0, 2.0];
        let histogram = Histogram::of(&Tensor::from_slice(&values)).unwrap().unwrap();
        assert_eq!((histogram.min, histogram.max, histogram.sum), (-2.0, 2.0, 3.5));
        assert_eq!(histogram.sum_of_squares, 4.0 + 0.25 + 1.0 + 8.0);
        assert_eq!(histogram.counts.iter().sum::<f64>(), 5.0);
        let below_one: f64 = histogram
            .limits
            .iter()
            .zip(&histogram.counts)
            .filter(|(limit, _)| **limit <= 0.9)
            .map(|(_, count)| count)
            .sum();
        assert_eq!((histogram.counts[0], histogram.counts[63], below_one), (1.0, 2.0, 2.0));
    }

    #[test]
    fn what_has_no_width_is_one_bucket_and_what_has_no_number_is_none() {
        let histogram = Histogram::of(&Tensor::from_slice(&[3.0_f32; 4])).unwrap().unwrap();
        assert_eq!((histogram.limits, histogram.counts), (vec![3.0], vec![4.0]));
        assert!(Histogram::of(&Tensor::from_slice(&[f32::NAN])).unwrap().is_none());
    }
}
