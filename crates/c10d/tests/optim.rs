//! Fused steps against the formulas written out.

use ice_c10d::ErrorKind;
use ice_c10d::optim::{AdamWStep, SgdStep, fused_adamw, fused_sgd};
use tch::{Device, Kind, Tensor};

fn wave(count: i64, scale: f64) -> Tensor {
    (Tensor::arange(count, (Kind::Float, Device::Cpu)) * scale).sin()
}

fn close(got: &Tensor, expected: &Tensor) {
    let difference = (got.detach() - expected).abs().max().double_value(&[]);
    assert!(difference < 1e-6, "{difference}");
}

#[test]
fn adamw_is_its_formula() {
    let s = AdamWStep { lr: 0.1, beta1: 0.9, beta2: 0.99, weight_decay: 0.05, eps: 1e-8, maximize: false };
    let params = [wave(33, 0.3).set_requires_grad(true), wave(7, 0.9).set_requires_grad(true)];
    let zeros = || params.each_ref().map(|p| p.detach().zeros_like());
    let (first, second) = (zeros(), zeros());
    let steps = params.each_ref().map(|_| Tensor::from(0.0_f32));
    let mut expected =
        params.each_ref().map(|p| (p.detach().copy(), p.detach().zeros_like(), p.detach().zeros_like()));
    for step in 1..=4 {
        let grads = params.each_ref().map(|p| wave(p.numel() as i64, 0.4 * f64::from(step)) + 0.2);
        for count in &steps {
            let _ = count.shallow_clone().fill_(f64::from(step));
        }
        fused_adamw(&params, &grads, &first, &second, &steps, &s).unwrap();
        for ((p, m, v), g) in expected.iter_mut().zip(&grads) {
            *m = &*m * s.beta1 + g * (1.0 - s.beta1);
            *v = &*v * s.beta2 + g.square() * (1.0 - s.beta2);
            let (m_hat, v_hat) = (&*m / (1.0 - s.beta1.powi(step)), &*v / (1.0 - s.beta2.powi(step)));
            *p = &*p * (1.0 - s.lr * s.weight_decay) - m_hat / (v_hat.sqrt() + s.eps) * s.lr;
        }
        for (index, (p, m, v)) in expected.iter().enumerate() {
            close(&params[index], p);
            close(&first[index], m);
            close(&second[index], v);
        }
    }
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
    let error = fused_adamw(&params, &params, &params, &params, &none, &AdamWStep::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
}
