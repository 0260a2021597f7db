//! The reducer against gradients averaged by hand.
#![expect(clippy::unwrap_used, reason = "outside the test functions too")]

mod common;

use common::ranks;
use ice_c10d::{ErrorKind, ProcessGroup, ReduceOp, Reducer, ReducerOptions, run_backward};
use tch::{Device, Kind, Tensor};

/// Returns two layers, and one that a rank may leave out of its loss. The values depend on the
/// index of the element only, so that all ranks begin alike.
fn parameters() -> Vec<(String, Tensor)> {
    let make = |name: &str, shape: &[i64], scale: f64| {
        let count = shape.iter().product::<i64>();
        let values = (Tensor::arange(count, (Kind::Float, Device::Cpu)) * scale).sin().reshape(shape);
        (name.to_owned(), values.set_requires_grad(true))
    };
    vec![make("first", &[8, 16], 0.7), make("second", &[16, 4], 0.3), make("extra", &[4], 0.9)]
}

fn loss(parameters: &[(String, Tensor)], rank: usize, step: usize, extra: bool) -> Tensor {
    let input =
        (Tensor::arange(24, (Kind::Float, Device::Cpu)) * (1.0 + rank as f64 + 0.1 * step as f64)).cos();
    let hidden = input.reshape([3, 8]).matmul(&parameters[0].1).tanh().matmul(&parameters[1].1);
    let output = if extra { hidden * &parameters[2].1 } else { hidden };
    output.square().mean(Kind::Float)
}

fn by_hand(group: &ProcessGroup, step: usize, extra: bool) -> Vec<Tensor> {
    let parameters = parameters();
    loss(&parameters, group.rank(), step, extra).backward();
    let average = |parameter: &Tensor| {
        let gradient = parameter.grad();
        let gradient = if gradient.defined() { gradient } else { parameter.detach().zeros_like() };
        group.all_reduce(&gradient, ReduceOp::Sum).unwrap().wait().unwrap();
        gradient / group.world_size() as f64
    };
    parameters.iter().map(|(_, parameter)| average(parameter)).collect()
}

fn averages_match(find_unused_parameters: bool, gradient_as_bucket_view: bool) {
    ranks(2, |group| {
        // Buckets smaller than the model, so that the reducer makes several.
        let options = ReducerOptions {
            bucket_cap_bytes: 300,
            first_bucket_bytes: 100,
            find_unused_parameters,
            gradient_as_bucket_view,
            static_graph: false,
        };
        let parameters = parameters();
        let mut reducer = Reducer::new(&parameters, group, &options).unwrap();
        for step in 0..3 {
            // With the search for unused parameters, rank 1 leaves `extra` out and rank 0 uses it.
            let extra = !find_unused_parameters || group.rank() == 0;
            let expected = by_hand(group, step, extra);
            reducer.prepare_forward().unwrap();
            let loss = loss(&parameters, group.rank(), step, extra);
            reducer.prepare_backward(&[&loss]).unwrap();
            run_backward(&loss).unwrap();
            reducer.regroup().unwrap();
            for ((name, parameter), expected) in parameters.iter().zip(&expected) {
                let mut gradient = parameter.grad();
                assert!(expected.abs().max().double_value(&[]) > 1e-4, "{name}: nothing to compare");
                let difference = (&gradient - expected).abs().max().double_value(&[]);
                assert!(difference < 1e-6, "{name} in step {step}: {difference}");
                let _ = gradient.zero_();
            }
        }
    });
}

#[test]
fn gradients_are_averages() {
    averages_match(false, false);
}

#[test]
fn gradients_are_averages_in_bucket_views() {
    averages_match(false, true);
}

#[test]
fn gradients_are_averages_with_unused_parameters() {
    averages_match(true, false);
}

#[test]
fn gradients_are_averages_with_unused_parameters_in_bucket_views() {
    averages_match(true, true);
}

#[test]
fn a_static_graph_may_leave_parameters_out_of_all_steps() {
    ranks(2, |group| {
        let options = ReducerOptions {
            bucket_cap_bytes: 300,
            first_bucket_bytes: 100,
            static_graph: true,
            ..ReducerOptions::default()
        };
        let parameters = parameters();
        let mut reducer = Reducer::new(&parameters, group, &options).unwrap();
        for step in 0..4 {
            let expected = by_hand(group, step, false);
            reducer.prepare_forward().unwrap();
            let loss = loss(&parameters, group.rank(), step, false);
            reducer.prepare_backward(&[&loss]).unwrap();
            run_backward(&loss).unwrap();
            for ((name, parameter), expected) in parameters.iter().zip(&expected).take(2) {
                let mut gradient = parameter.grad();
                assert!(expected.abs().max().double_value(&[]) > 1e-4, "{name}: nothing to compare");
                let difference = (&gradient - expected).abs().max().double_value(&[]);
                assert!(difference < 1e-6, "{name} in step {step}: {difference}");
                let _ = gradient.zero_();
            }
        }
    });
}

#[test]
fn gradients_of_several_passes_are_averaged_once() {
    ranks(2, |group| {
        let parameters = parameters();
        let mut reducer = Reducer::new(&parameters, group, &ReducerOptions::default()).unwrap();
        let expected: Vec<Tensor> =
            by_hand(group, 0, true).iter().zip(by_hand(group, 1, true)).map(|(a, b)| a + b).collect();
        // A backward pass without `prepare_backward` only accumulates: the ranks exchange nothing.
        run_backward(&loss(&parameters, group.rank(), 0, true)).unwrap();
        reducer.prepare_forward().unwrap();
        let last = loss(&parameters, group.rank(), 1, true);
        reducer.prepare_backward(&[&last]).unwrap();
        run_backward(&last).unwrap();
        for ((name, parameter), expected) in parameters.iter().zip(&expected) {
            let difference = (parameter.grad() - expected).abs().max().double_value(&[]);
            assert!(difference < 1e-6, "{name}: {difference}");
        }
    });
}

#[test]
fn ranks_with_different_parameters_are_told() {
    ranks(2, |group| {
        let shape = [2 + group.rank() as i64];
        let parameter = Tensor::zeros(shape, (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let error =
            Reducer::new(&[("weight".into(), parameter)], group, &ReducerOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    });
}

#[test]
fn a_parameter_without_gradient_is_refused() {
    ranks(1, |group| {
        let frozen = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        let error =
            Reducer::new(&[("weight".into(), frozen)], group, &ReducerOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("weight"), "{error}");
    });
}

#[test]
fn a_failing_backward_is_an_error() {
    let error = run_backward(&Tensor::zeros([2], (Kind::Float, Device::Cpu))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Torch, "{error}");
}

#[test]
fn a_peer_that_leaves_during_backward_is_an_error() {
    ranks(2, |group| {
        let parameters = parameters();
        let mut reducer = Reducer::new(&parameters, group, &ReducerOptions::default()).unwrap();
        if group.rank() == 0 {
            reducer.prepare_forward().unwrap();
            let loss = loss(&parameters, 0, 0, true);
            reducer.prepare_backward(&[&loss]).unwrap();
            let error = run_backward(&loss).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Network, "{error}");
        }
    });
}

#[test]
fn a_reducer_made_in_the_order_that_was_learned_groups_alike() {
    ranks(2, |group| {
        let options = ReducerOptions { bucket_cap_bytes: 300, first_bucket_bytes: 100, ..Default::default() };
        let mut parameters = parameters();
        // A different order from the one in which the forward pass uses the parameters.
        parameters.rotate_left(1);
        let mut orders = Vec::new();
        for _ in 0..2 {
            let mut reducer = Reducer::new(&parameters, group, &options).unwrap();
            let mut regroupings = Vec::new();
            for step in 0..3 {
                reducer.prepare_forward().unwrap();
                let used: Vec<_> = ["first", "second", "extra"]
                    .into_iter()
                    .map(|name| parameters.iter().find(|(own, _)| own == name).unwrap())
                    .map(|(name, parameter)| (name.clone(), parameter.shallow_clone()))
                    .collect();
                let loss = loss(&used, group.rank(), step, true);
                reducer.prepare_backward(&[&loss]).unwrap();
                run_backward(&loss).unwrap();
                regroupings.push(reducer.regroup().unwrap());
            }
            assert_eq!(regroupings, [true, false, false]);
            let order = reducer.order().unwrap();
            orders.push(order.clone());
            parameters = order
                .into_iter()
                .map(|place| {
                    let (name, parameter) = &parameters[place];
                    (name.clone(), parameter.detach().set_requires_grad(true))
                })
                .collect();
        }
        assert_ne!(orders[0], [0, 1, 2]);
        assert_eq!(orders[1], [0, 1, 2]);
    });
}
