//! Mixed precision on the CPU.

use ice_c10d::amp::{Autocast, ScaleUpdate, unscale, update_scale};
use ice_c10d::{ErrorKind, run_backward};
use tch::{Device, Kind, Tensor};

fn product() -> Kind {
    let a = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
    a.matmul(&a).kind()
}

#[test]
fn autocast_holds_for_its_range_and_can_be_nested() {
    assert_eq!(product(), Kind::Float);
    {
        let _outer = Autocast::begin(Device::Cpu, Kind::BFloat16).unwrap();
        assert_eq!(product(), Kind::BFloat16);
        {
            let _inner = Autocast::begin(Device::Cpu, Kind::Half).unwrap();
            assert_eq!(product(), Kind::Half);
        }
        assert_eq!(product(), Kind::BFloat16);
        // BFloat16 is too coarse for sums: autocast computes them in Float.
        let sums = Tensor::ones([2], (Kind::BFloat16, Device::Cpu))
            .mse_loss(&Tensor::zeros([2], (Kind::BFloat16, Device::Cpu)), tch::Reduction::Mean);
        assert_eq!(sums.kind(), Kind::Float);
        // Another thread has its own setting.
        assert_eq!(std::thread::spawn(product).join().unwrap(), Kind::Float);
    }
    assert_eq!(product(), Kind::Float);
    let error = Autocast::begin(Device::Cpu, Kind::Float).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn casts_of_parameters_do_not_outlive_the_range() {
    let weight = Tensor::ones([2, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let x = Tensor::ones([1, 2], (Kind::Float, Device::Cpu));
    let forward = || {
        let _range = Autocast::begin(Device::Cpu, Kind::BFloat16).unwrap();
        x.matmul(&weight).sum(Kind::Float)
    };
    let loss = forward();
    run_backward(&loss).unwrap();
    assert_eq!(weight.grad().kind(), Kind::Float);
    let _ = tch::no_grad(|| weight.shallow_clone().fill_(2.0));
    assert_eq!(forward().double_value(&[]), 8.0);
}

#[test]
fn gradients_are_unscaled_and_checked() {
    let scalar = |value: f32| Tensor::from(value);
    let grads = [Tensor::from_slice(&[8.0_f32, 4.0])];
    let (found, inverse) = (scalar(0.0), scalar(0.25));
    unscale(&grads, &found, &inverse).unwrap();
    assert_eq!(Vec::<f32>::try_from(&grads[0]).unwrap(), [2.0, 1.0]);
    assert_eq!(found.double_value(&[]), 0.0);
    for bad in [f32::INFINITY, f32::NAN] {
        let found = scalar(0.0);
        unscale(&[Tensor::from_slice(&[1.0, bad])], &found, &inverse).unwrap();
        assert_eq!(found.double_value(&[]), 1.0);
    }
}

#[test]
fn the_scale_grows_after_an_interval_and_falls_at_once() {
    let update = ScaleUpdate { growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 3 };
    let (scale, tracker) = (Tensor::from(8.0_f32), Tensor::from(0_i32));
    let scales: Vec<f64> = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
        .map(|found: f32| {
            update_scale(&scale, &tracker, &Tensor::from(found), &update).unwrap();
            scale.double_value(&[])
        })
        .to_vec();
    assert_eq!(scales, [8.0, 8.0, 16.0, 8.0, 8.0, 8.0, 16.0]);
}
