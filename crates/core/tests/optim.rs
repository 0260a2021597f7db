//! Optimizers and schedules compared with torch's numbers, which tests/python/optim_reference.py
//! generates.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;

use ice_core::optim::{Adam, AdamW, Field, Optimizer, RmsProp, Schedule, Sgd};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

#[derive(Deserialize)]
struct Reference {
    optimizers: BTreeMap<String, Vec<Vec<f64>>>,
    schedules: BTreeMap<String, Vec<f64>>,
}

fn reference() -> Reference {
    serde_json::from_str(include_str!("reference/optim.json")).unwrap()
}

fn lambda(value: impl Fn(f64) -> f64 + 'static) -> Schedule {
    Schedule::lambda(move |step| value(step as f64))
}

fn wave(count: i64, scale: f64) -> Tensor {
    (Tensor::arange(count, (Kind::Float, Device::Cpu)) * scale).sin()
}

fn close(got: &[f64], expected: &[f64], limit: f64, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (got, expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() <= limit, "{what}: {got} for {expected}");
    }
}

#[test]
fn every_step_of_every_optimizer_is_torchs() {
    let optimizers: [(&str, Box<dyn Optimizer>); 11] = [
        ("adam", Box::new(Adam::new(0.1))),
        ("adam with penalty", Box::new(Adam::new(0.1).betas(0.8, 0.95).epsilon(1e-6).weight_decay(0.1))),
        ("adam amsgrad", Box::new(Adam::new(0.1).amsgrad(true))),
        ("adamw", Box::new(AdamW::new(0.1).weight_decay(0.05))),
        ("sgd", Box::new(Sgd::new(0.1).weight_decay(0.01))),
        ("sgd nesterov", Box::new(Sgd::new(0.1).momentum(0.9).nesterov(true))),
        ("rmsprop", Box::new(RmsProp::new(0.1))),
        (
            "rmsprop centered",
            Box::new(RmsProp::new(0.1).alpha(0.9).momentum(0.8).centered(true).weight_decay(0.01)),
        ),
        (
            "sgd courses",
            Box::new(
                Sgd::new(0.1)
                    .momentum(0.9)
                    .weight_decay(0.1)
                    .value_of(
                        Field::Momentum,
                        lambda(|step| if [2.0, 4.0].contains(&step) { 0.0 } else { 0.5 + 0.05 * step }),
                    )
                    .schedule_of(Field::WeightDecay, lambda(|step| 1.0 + step)),
            ),
        ),
        (
            "adamw courses",
            Box::new(
                AdamW::new(0.1)
                    .weight_decay(0.05)
                    .schedule(Schedule::exponential(0.5))
                    .value_of(Field::Beta1, lambda(|step| 0.9 - 0.02 * step))
                    .value_of(Field::Beta2, lambda(|step| 0.99 + 0.001 * step))
                    .schedule_of(Field::WeightDecay, lambda(|step| 1.0 + step)),
            ),
        ),
        (
            "rmsprop courses",
            Box::new(
                RmsProp::new(0.1)
                    .alpha(0.9)
                    .momentum(0.8)
                    .value_of(Field::Momentum, lambda(|step| if step == 3.0 { 0.0 } else { 0.8 }))
                    .value_of(Field::Alpha, lambda(|step| 0.9 + 0.01 * step))
                    .schedule_of(Field::Epsilon, lambda(|step| 1.0 + step)),
            ),
        ),
    ];
    let reference = reference().optimizers;
    assert_eq!(reference.len(), optimizers.len());
    for (name, mut optimizer) in optimizers {
        let parameters = [wave(6, 0.3).reshape([3, 2]), wave(4, 0.9)];
        optimizer.set_up(&parameters);
        for (step, expected) in (1..).zip(&reference[name]) {
            let step = f64::from(step);
            // The second parameter takes no part in step 3.
            let second = if step == 3.0 { Tensor::new() } else { wave(4, 0.7 + step) };
            let gradients = [wave(6, 0.4 * step).reshape([3, 2]) + 0.2, second];
            optimizer.step(&parameters, &gradients).unwrap();
            let values = parameters
                .each_ref()
                .map(|p| Vec::<f64>::try_from(p.flatten(0, -1).to_kind(Kind::Double)).unwrap());
            close(&values.concat(), expected, 1e-6, &format!("{name}, step {step}"));
        }
    }
}

#[test]
fn every_schedule_is_torchs() {
    let lowest = 0.05 / 0.5;
    let schedules = [
        ("step", Schedule::step(7, 0.3)),
        ("milestones", Schedule::milestones([3, 20], 0.1)),
        ("exponential", Schedule::exponential(0.9)),
        ("linear", Schedule::linear(0.2, 0.9, 15)),
        ("cosine", Schedule::cosine(30, lowest)),
        ("one cycle", Schedule::one_cycle(40)),
        // These are the values themselves. The other schedules are rates of an optimizer with a
        // rate of 0.5.
        ("one cycle momentum", Schedule::one_cycle_momentum(40).times(Schedule::lambda(|_| 2.0))),
        ("warm-up and cosine", Schedule::linear(0.1, 1.0, 10).then(10, Schedule::cosine(30, lowest))),
    ];
    let reference = reference().schedules;
    assert_eq!(reference.len(), schedules.len());
    for (name, schedule) in schedules {
        let mut optimizer = Sgd::new(0.5).schedule(schedule);
        let parameters = [Tensor::zeros([1], (Kind::Float, Device::Cpu))];
        optimizer.set_up(&parameters);
        for (step, expected) in reference[name].iter().enumerate() {
            close(&[optimizer.learning_rate()], &[*expected], 1e-9, &format!("{name}, step {step}"));
            optimizer.step(&parameters, &parameters).unwrap();
        }
    }
}

#[test]
fn field_that_the_optimizer_does_not_have_is_named_in_the_first_step() {
    let parameters = [Tensor::zeros([1], (Kind::Float, Device::Cpu))];
    let mut optimizer = Sgd::new(0.1).value_of(Field::Momentum, Schedule::constant());
    optimizer.set_up(&parameters);
    let error = optimizer.step(&parameters, &parameters).unwrap_err().to_string();
    assert!(error.contains("no Momentum"), "{error}");
    // Without a run, the length of the training is not known.
    let mut optimizer = Sgd::new(0.1).schedule(Schedule::cosine(10, 0.0).over_run(10));
    optimizer.set_up(&parameters);
    let error = optimizer.step(&parameters, &parameters).unwrap_err().to_string();
    assert!(error.contains("all training tasks a number of epochs"), "{error}");
}

#[test]
fn a_schedule_goes_on_where_it_was_saved() {
    let parameters = [Tensor::zeros([1], (Kind::Float, Device::Cpu))];
    let make = || {
        let mut optimizer = AdamW::new(1.0).schedule(Schedule::linear_warmup(4));
        optimizer.set_up(&parameters);
        optimizer
    };
    let mut first = make();
    let rates: Vec<f64> = (0..6)
        .map(|_| {
            first.step(&parameters, &parameters).unwrap();
            first.learning_rate()
        })
        .collect();
    close(&rates, &[0.4, 0.6, 0.8, 1.0, 1.0, 1.0], 1e-12, "warm-up");
    let mut second = make();
    second.step(&parameters, &parameters).unwrap();
    let mut third = make();
    third.load_values(&second.values()).unwrap();
    assert_eq!(third.learning_rate(), second.learning_rate());
    assert!(third.load_values(&serde_json::Value::Null).is_err());
}
