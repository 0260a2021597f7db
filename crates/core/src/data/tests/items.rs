use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::seat;
use crate::data::{BatchLoader, Dataset, Items, Labelled, Pass, PrefetchOptions, Sampler, items};
use crate::{Error, Result};

fn faulty(index: usize) -> Result<i64> {
    match index {
        5 => Err(Error::Usage("a hole".into())),
        9 => panic!("a bug"),
        _ => Ok(index as i64),
    }
}

#[test]
fn errors_and_panics_name_the_sample_with_any_number_of_workers() {
    for workers in [0, 1, 4] {
        let dataset = items(12, faulty).map(|number| Ok(number * 2)).stack();
        let ahead = PrefetchOptions { workers, prefetch: None };
        let mut feed =
            BatchLoader::new(Arc::new(dataset), Sampler::new(12, 4, None, false), 0, ahead, seat(0, 1), 1)
                .unwrap();
        let mut next = || {
            let made = feed.next().map(|(batch, _)| Vec::<i64>::try_from(batch).unwrap());
            feed.advance();
            made
        };
        assert_eq!(next().unwrap(), [0, 2, 4, 6]);
        assert_eq!(next().unwrap_err().to_string(), "sample 5: a hole");
        assert_eq!(next().unwrap_err().to_string(), "sample 9: panicked: a bug");
    }
}

#[test]
fn random_transforms_depend_on_pass_and_sample_alone() {
    let dataset = items(50, |index| Ok(index as i64))
        .map_random(|number, rng| Ok((number, rng.uniform())))
        .map_random(|(number, first), rng| Ok((number, first, rng.uniform())))
        .stack();
    let make = |pass, indices: &[i64]| dataset.batch_in(&Pass::new(1, pass), indices, Device::Cpu).unwrap();
    let all = make(0, &Vec::from_iter(0..50));
    let some = make(0, &[17, 3]);
    for (at, index) in [(0, 17), (1, 3)] {
        assert_eq!(some.0.int64_value(&[at]), index);
        assert_eq!(some.1.double_value(&[at]), all.1.double_value(&[index]));
        assert_eq!(some.2.double_value(&[at]), all.2.double_value(&[index]));
        assert_ne!(some.1.double_value(&[at]), some.2.double_value(&[at]));
    }
    assert_ne!(make(1, &[17]).1.double_value(&[0]), some.1.double_value(&[0]));
}

#[test]
fn stacks_have_a_new_first_dimension_and_refuse_what_differs() {
    let images = |wide: usize| {
        items(4, move |index| {
            let width = if index == wide { 3 } else { 2 };
            Ok((Tensor::full([1, width], index as i64, (Kind::Uint8, Device::Cpu)), index as i64))
        })
    };
    let Labelled { images: batch, labels } =
        images(9).collate(Labelled::collate).batch(&[2, 0, 3], Device::Cpu).unwrap();
    assert_eq!((batch.size(), batch.kind()), (vec![3, 1, 2], Kind::Uint8));
    assert_eq!(Vec::<i64>::try_from(labels).unwrap(), [2, 0, 3]);
    let message = images(3).stack().batch(&[2, 3], Device::Cpu).unwrap_err().to_string();
    assert!(message.contains("[1, 2]") && message.contains("[1, 3]"), "{message}");

    let numbers = [(true, 1_u8, 0.5_f32), (false, 2, 1.5)];
    let (a, b, c) = items(2, move |index| Ok(numbers[index])).stack().batch(&[1, 0], Device::Cpu).unwrap();
    assert_eq!((a.kind(), b.kind(), c.kind()), (Kind::Bool, Kind::Uint8, Kind::Float));
    assert_eq!((a.int64_value(&[0]), b.int64_value(&[0]), c.double_value(&[0])), (0, 2, 1.5));
}
