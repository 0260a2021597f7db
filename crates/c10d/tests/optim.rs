//! Optimizer steps against the formulas written out.
#![expect(clippy::unwrap_used, reason = "outside the test functions too")]

use ice_c10d::ErrorKind;
use ice_c10d::optim::{
    AdamState, AdamStep, RmspropStep, SgdStep, clip_grad_norm, foreach_rmsprop, fused_adam, fused_sgd,
};
use tch::{Device, Kind, Tensor};

fn wave(count: i64, scale: f64) -> Tensor {
    (Tensor::arange(count, (Kind::Float, Device::Cpu)) * scale).sin()
}

fn close(got: &Tensor, expected: &Tensor) {
    let difference = (got.detach() - expected).abs().max().double_value(&[]);
    assert!(difference < 1e-6, "{difference}");
}

#[test]
fn adam_is_its_formula() {
    for (amsgrad, decoupled) in [(false, true), (false, false), (true, true)] {
        let options = AdamStep {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 0.05,
            eps: 1e-8,
            amsgrad,
            decoupled,
            maximize: false,
        };
        check_adam(&options);
    }
}

fn check_adam(s: &AdamStep) {
    let params = [wave(33, 0.3).set_requires_grad(true), wave(7, 0.9).set_requires_grad(true)];
    let zeros = || params.each_ref().map(|p| p.detach().zeros_like());
    let (first, second, largest) = (zeros(), zeros(), zeros());
    let most: &[Tensor] = if s.amsgrad { &largest } else { &[] };
    let steps = params.each_ref().map(|_| Tensor::from(0.0_f32));
    let state = AdamState { exp_avgs: &first, exp_avg_sqs: &second, max_exp_avg_sqs: most, steps: &steps };
    let mut expected = params.each_ref().map(|p| {
        let zero = || p.detach().zeros_like();
        (p.detach().copy(), zero(), zero(), zero())
    });
    for step in 1..=4 {
        // The gradients shrink, so that AMSGrad's largest second moment comes from an earlier step.
        let grads = params
            .each_ref()
            .map(|p| (wave(p.numel() as i64, 0.4 * f64::from(step)) + 0.2) / f64::from(step));
        for count in &steps {
            let _ = count.shallow_clone().fill_(f64::from(step));
        }
        fused_adam(&params, &grads, state, s).unwrap();
        for ((p, m, v, most), g) in expected.iter_mut().zip(&grads) {
            let g = if s.decoupled { g.copy() } else { g + &*p * s.weight_decay };
            *m = &*m * s.beta1 + &g * (1.0 - s.beta1);
            *v = &*v * s.beta2 + g.square() * (1.0 - s.beta2);
            *most = most.max_other(v);
            let v = if s.amsgrad { &*most } else { &*v };
            let (m_hat, v_hat) = (&*m / (1.0 - s.beta1.powi(step)), v / (1.0 - s.beta2.powi(step)));
            let kept = if s.decoupled { 1.0 - s.lr * s.weight_decay } else { 1.0 };
            *p = &*p * kept - m_hat / (v_hat.sqrt() + s.eps) * s.lr;
        }
        for (index, (p, m, v, _)) in expected.iter().enumerate() {
            close(&params[index], p);
            close(&first[index], m);
            close(&second[index], v);
        }
    }
}

#[test]
fn rmsprop_is_its_formula() {
    for (momentum, centered) in [(0.0, false), (0.8, false), (0.8, true)] {
        let s = RmspropStep { lr: 0.1, alpha: 0.9, eps: 1e-6, weight_decay: 0.02, momentum };
        let params = [wave(33, 0.3).set_requires_grad(true)];
        let zeros = |wanted: bool| if wanted { vec![params[0].detach().zeros_like()] } else { Vec::new() };
        let (squares, averages, buffers) = (zeros(true), zeros(centered), zeros(momentum > 0.0));
        let (mut p, mut square, mut average, mut buffer) =
            (params[0].detach().copy(), squares[0].copy(), squares[0].copy(), squares[0].copy());
        for step in 0..4 {
            let grads = [wave(33, 0.4 + f64::from(step))];
            foreach_rmsprop(&params, &grads, &squares, &averages, &buffers, &s).unwrap();
            let g = &grads[0] + &p * s.weight_decay;
            square = square * s.alpha + g.square() * (1.0 - s.alpha);
            average = average * s.alpha + &g * (1.0 - s.alpha);
            let variance = if centered { &square - average.square() } else { square.copy() };
            let update = g / (variance.sqrt() + s.eps);
            buffer = buffer * s.momentum + update;
            p -= &buffer * s.lr;
            close(&params[0], &p);
            close(&squares[0], &square);
        }
    }
}

#[test]
fn gradients_are_clipped_by_their_common_norm() {
    let grads = [Tensor::from_slice(&[3.0_f32, 0.0]), Tensor::from_slice(&[4.0_f32])];
    assert_eq!(clip_grad_norm(&grads, 10.0).unwrap().double_value(&[]), 5.0);
    close(&grads[0], &Tensor::from_slice(&[3.0_f32, 0.0]));
    assert_eq!(clip_grad_norm(&grads, 1.0).unwrap().double_value(&[]), 5.0);
    close(&grads[0], &Tensor::from_slice(&[0.6_f32, 0.0]));
    close(&grads[1], &Tensor::from_slice(&[0.8_f32]));
    let none: [Tensor; 0] = [];
    assert_eq!(clip_grad_norm(&none, 1.0).unwrap_err().kind(), ErrorKind::InvalidArgument);
}

#[test]
fn sgd_is_its_formula() {
    for nesterov in [false, true] {
        let mut s = SgdStep { lr: 0.1, momentum: 0.8, weight_decay: 0.02, nesterov, ..SgdStep::default() };
        let params = [wave(33, 0.3).set_requires_grad(true)];
        let buffers = [params[0].detach().zeros_like()];
        let (mut p, mut buffer) = (params[0].detach().copy(), buffers[0].copy());
        for step in 0..4 {
            s.is_first_step = step == 0;
            let grads = [wave(33, 0.4 + f64::from(step))];
            fused_sgd(&params, &grads, &buffers, &s).unwrap();
            let g = &grads[0] + &p * s.weight_decay;
            buffer = if step == 0 { g.copy() } else { buffer * s.momentum + &g };
            p -= if nesterov { &g + &buffer * s.momentum } else { buffer.copy() } * s.lr;
            close(&params[0], &p);
            close(&buffers[0], &buffer);
        }
    }
}

#[test]
fn sgd_without_momentum_needs_no_buffers_and_can_ascend() {
    let params = [wave(9, 0.3)];
    let grads = [wave(9, 0.7)];
    let expected = &params[0] + &grads[0] * 0.5;
    fused_sgd(&params, &grads, &[], &SgdStep { lr: 0.5, maximize: true, ..SgdStep::default() }).unwrap();
    close(&params[0], &expected);
}

#[test]
fn lists_that_do_not_fit_are_refused() {
    let params = [wave(9, 0.3)];
    let s = SgdStep { lr: 0.5, momentum: 0.9, ..SgdStep::default() };
    for (grads, buffers) in
        [(vec![], vec![wave(9, 1.0)]), (vec![wave(9, 1.0)], vec![]), (vec![wave(8, 1.0)], vec![wave(9, 1.0)])]
    {
        let error = fused_sgd(&params, &grads, &buffers, &s).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    }
    let none: [Tensor; 0] = [];
    let state = AdamState { exp_avgs: &params, exp_avg_sqs: &params, max_exp_avg_sqs: &none, steps: &none };
    let error = fused_adam(&params, &params, state, &AdamStep::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
}
