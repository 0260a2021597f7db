use ice_worker::Worker;
use tch::{Device, Tensor};

use super::*;

fn worker() -> Worker {
    Worker::alone(Device::Cpu)
}

fn value(meter: &impl Meter) -> f64 {
    meter.evaluate().unwrap().value
}

fn part(meter: &impl Meter, name: &str) -> f64 {
    let parts = meter.evaluate().unwrap().parts;
    parts.iter().find(|(part, _)| part == name).unwrap_or_else(|| panic!("no {name} in {parts:?}")).1
}

/// Feeds a meter. In the middle its state is saved as text, and another meter continues from it.
fn fed<M: Meter>(make: impl Fn() -> M, batches: &[M::Input], saved_after: usize) -> M {
    let mut meter = make();
    for (index, batch) in batches.iter().enumerate() {
        if index == saved_after {
            let text = serde_json::to_string(&meter.state()).unwrap();
            meter = make();
            meter.load_state(&serde_json::from_str(&text).unwrap()).unwrap();
        }
        meter.update(batch).unwrap();
    }
    meter.sync(&worker()).unwrap();
    meter
}

fn check<M: Meter>(make: impl Fn() -> M, batches: &[M::Input], expected: f64) {
    for saved_after in 0..=batches.len() {
        let found = value(&fed(&make, batches, saved_after));
        assert!(found == expected, "{found} and not {expected}, saved after {saved_after}");
    }
    let mut meter = fed(&make, batches, 0);
    meter.reset();
    let (mut after, fresh) = (value(&meter), value(&make()));
    assert!(after == fresh || (after.is_nan() && fresh.is_nan()), "{after} after a reset, {fresh} at first");
    meter.sync(&worker()).unwrap();
    after = value(&meter);
    assert!(after == fresh || (after.is_nan() && fresh.is_nan()), "{after} after a reset and a sync");
}

#[test]
fn each_meter_by_hand_and_saved_in_between() {
    let batches = [&[1.0, 2.0, 4.5][..], &[0.5], &[2.0, 8.0]].map(Tensor::from_slice);
    check(Average::new, &batches, 18.0 / 6.0);
    check(Summation::new, &batches, 18.0);
    check(Value::new, &batches, 5.0);
    check(|| MovingAverage::window(2.try_into().unwrap()), &batches, 10.5 / 3.0);
    check(|| MovingAverage::window(9.try_into().unwrap()), &batches, 18.0 / 6.0);
    let (sum, count) = (7.5 / 4.0 + 0.5 / 2.0 + 10.0, 3.0 / 4.0 + 1.0 / 2.0 + 2.0);
    check(|| MovingAverage::decay(0.5), &batches, sum / count);
}

#[test]
fn a_sum_that_is_no_number_or_has_many_digits_is_saved_as_it_is() {
    for last in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.1 + 0.2, 1.0 / 3.0, 5e-324] {
        let whole = value(&fed(Summation::new, &[Tensor::from_slice(&[last])], 1));
        let saved =
            value(&fed(Summation::new, &[Tensor::from_slice(&[last]), Tensor::from_slice(&[0.0])], 1));
        assert_eq!(whole.to_bits(), saved.to_bits(), "{last}");
    }
}

#[test]
fn a_batch_without_samples_is_a_batch_to_those_that_count_batches() {
    let two = Tensor::from_slice(&[2.0]);
    let feed = |meter: &mut dyn Meter<Input = Tensor>| {
        meter.update(&two).unwrap();
        meter.skip();
        meter.skip();
        meter.evaluate().unwrap().value
    };
    assert!(feed(&mut Value::new()).is_nan());
    assert!(feed(&mut MovingAverage::window(2.try_into().unwrap())).is_nan());
    assert_eq!(feed(&mut MovingAverage::window(3.try_into().unwrap())), 2.0);
    assert_eq!(feed(&mut Average::new()), 2.0);
}

#[test]
fn a_dict_measures_each_name_and_goes_by_the_first() {
    let batch = |pairs: &[(&str, f64)]| -> Vec<(String, Tensor)> {
        pairs.iter().map(|(name, value)| ((*name).into(), Tensor::from_slice(&[*value]))).collect()
    };
    let batches =
        [batch(&[("z", 1.0), ("a", 3.0)]), batch(&[("a", 5.0)]), batch(&[("new", 7.0), ("z", 2.0)])];
    for saved_after in 0..3 {
        let meter = fed(Dict::default, &batches, saved_after);
        let measured = meter.evaluate().unwrap();
        assert_eq!(measured.value, 1.5);
        assert_eq!(measured.parts, [("z".into(), 1.5), ("a".into(), 4.0), ("new".into(), 7.0)]);
    }
    let of_windows = fed(|| Dict::new(|| MovingAverage::window(2.try_into().unwrap())), &batches, 1);
    assert_eq!(part(&of_windows, "a"), 5.0);
    assert!(value(&Dict::default()).is_nan());
}

fn scores() -> (Tensor, Tensor) {
    let scores = [[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.3, 0.1, 0.6], [0.2, 0.5, 0.3], [0.4, 0.5, 0.1]];
    (Tensor::from_slice2(&scores), Tensor::from_slice(&[1_i64, 1, 0, 0, 2]))
}

#[test]
fn accuracy_by_hand() {
    check(Accuracy::new, &[scores(), scores()], 1.0 / 5.0);
    check(|| Accuracy::top(2), &[scores()], 3.0 / 5.0);
    check(|| Accuracy::top(3), &[scores()], 1.0);
    let flat = (Tensor::from_slice(&[0.1, 0.2]), Tensor::from_slice(&[1_i64]));
    let message = Accuracy::new().update(&flat).unwrap_err().to_string();
    assert!(message.contains("[2]") && message.contains("[1]"), "{message}");
    // Equal scores for all classes, and scores that are all NaN, are right by chance only.
    let same = Tensor::from_slice2(&[[0.5; 4]; 4]);
    for scores in [same.shallow_clone(), same * f64::NAN] {
        let meter = fed(Accuracy::new, &[(scores, Tensor::from_slice(&[0_i64, 1, 2, 3]))], 0);
        assert_eq!(value(&meter), 0.25);
    }
}

#[test]
fn confusion_by_hand() {
    let labels = Tensor::from_slice(&[0_i64, 0, 0, 1, 1, 2]);
    let guesses = Tensor::from_slice(&[0_i64, 0, 1, 1, 2, 1]);
    check(|| ConfusionMatrix::new(4), &[(guesses.shallow_clone(), labels.shallow_clone())], 3.0 / 6.0);
    let meter = fed(|| ConfusionMatrix::new(4), &[(guesses, labels)], 0);
    assert_eq!(meter.counts().unwrap(), [[2, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]);
    for (name, expected) in [
        ("precision.0", 1.0),
        ("precision.1", 1.0 / 3.0),
        ("precision.2", 0.0),
        ("recall.0", 2.0 / 3.0),
        ("recall.1", 0.5),
        ("recall.2", 0.0),
    ] {
        assert_eq!(part(&meter, name), expected, "{name}");
    }
    assert!(part(&meter, "precision.3").is_nan() && part(&meter, "recall.3").is_nan());

    let of_scores = fed(|| ConfusionMatrix::new(3), &[scores()], 0);
    assert_eq!(of_scores.counts().unwrap(), [[0, 1, 1], [1, 1, 0], [0, 1, 0]]);
}

#[test]
fn a_label_that_is_no_class_is_an_error_and_no_other_cell() {
    for (guess, label) in [(0, 3), (3, 0), (-1, 1), (1, -100)] {
        let batch = (Tensor::from_slice(&[0_i64, guess]), Tensor::from_slice(&[0_i64, label]));
        let message = fed(|| ConfusionMatrix::new(3), &[batch], 0).evaluate().unwrap_err().to_string();
        assert!(message.contains("1 samples") && message.contains("0 to 2"), "{message}");
    }
}

#[test]
fn the_state_of_another_meter_is_refused() {
    let state = Average::new().state();
    for message in [
        Summation::new().load_state(&state).unwrap_err().to_string(),
        Dict::default().load_state(&state).unwrap_err().to_string(),
        MovingAverage::window(2.try_into().unwrap()).load_state(&state).unwrap_err().to_string(),
        ConfusionMatrix::new(2).load_state(&state).unwrap_err().to_string(),
    ] {
        assert!(message.contains("cannot resume"), "{message}");
    }
}
