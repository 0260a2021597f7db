//! Collectives over real gloo groups.
#![expect(clippy::unwrap_used, reason = "outside the test functions too")]

mod common;

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::ranks;
use ice_c10d::{ErrorKind, ProcessGroup, ReduceOp};
use tch::{Kind, Tensor};

const KINDS: [Kind; 4] = [Kind::Float, Kind::Double, Kind::Int64, Kind::BFloat16];

fn tensor(values: &[f64], kind: Kind) -> Tensor {
    Tensor::from_slice(values).to_kind(kind)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
}

fn reduced(group: &ProcessGroup, kind: Kind, op: ReduceOp) -> Vec<f64> {
    let mine = if group.rank() == 0 { [1.0, 8.0, -3.0] } else { [3.0, 2.0, -5.0] };
    let tensor = tensor(&mine, kind);
    group.all_reduce(&tensor, op).unwrap().wait().unwrap();
    values(&tensor)
}

#[test]
fn all_reduce_combines_every_kind_in_every_way() {
    let all = [
        (ReduceOp::Sum, [4.0, 10.0, -8.0]),
        (ReduceOp::Average, [2.0, 5.0, -4.0]),
        (ReduceOp::Min, [1.0, 2.0, -5.0]),
        (ReduceOp::Max, [3.0, 8.0, -3.0]),
        (ReduceOp::Product, [3.0, 16.0, 15.0]),
    ];
    ranks(2, |group| {
        for (op, expected) in all {
            for kind in KINDS {
                if op != ReduceOp::Average || kind != Kind::Int64 {
                    assert_eq!(reduced(group, kind, op), expected, "{op:?} of {kind:?}");
                }
            }
        }
    });
}

#[test]
fn an_average_of_integers_is_refused() {
    ranks(2, |group| {
        let error = group.all_reduce(&tensor(&[1.0], Kind::Int64), ReduceOp::Average).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert_eq!(reduced(group, Kind::Int64, ReduceOp::Sum), [4.0, 10.0, -8.0], "the group still works");
    });
}

#[test]
fn broadcast_copies_the_root() {
    ranks(3, |group| {
        let tensor = tensor(&[group.rank() as f64, 7.0], Kind::Float);
        group.broadcast(&tensor, 2).unwrap().wait().unwrap();
        assert_eq!(values(&tensor), [2.0, 7.0]);
        assert_eq!(group.broadcast(&tensor, 3).unwrap_err().kind(), ErrorKind::InvalidArgument);
    });
}

#[test]
fn all_gather_orders_by_rank() {
    ranks(3, |group| {
        let outputs: Vec<_> = (0..3).map(|_| tensor(&[0.0, 0.0], Kind::Int64)).collect();
        let input = tensor(&[group.rank() as f64, 10.0], Kind::Int64);
        group.all_gather(&outputs, &input).unwrap().wait().unwrap();
        let gathered: Vec<_> = outputs.iter().map(values).collect();
        assert_eq!(gathered, [[0.0, 10.0], [1.0, 10.0], [2.0, 10.0]]);
        let error = group.all_gather(&outputs[..2], &input).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    });
}

#[test]
fn reduce_scatter_leaves_each_rank_its_part() {
    ranks(2, |group| {
        let rank = group.rank() as f64;
        let inputs = [tensor(&[rank, 1.0], Kind::Float), tensor(&[10.0 + rank, 5.0], Kind::Float)];
        let output = tensor(&[0.0, 0.0], Kind::Float);
        group.reduce_scatter(&output, &inputs, ReduceOp::Sum).unwrap().wait().unwrap();
        assert_eq!(values(&output), if group.rank() == 0 { [1.0, 2.0] } else { [21.0, 10.0] });
    });
}

#[test]
fn what_one_rank_sends_another_receives_in_order() {
    ranks(3, |group| {
        let [previous, next] = [(group.rank() + 2) % 3, (group.rank() + 1) % 3];
        // Of different sizes: one taken for another would not fit.
        let sent: Vec<_> =
            (1..100).map(|n| tensor(&vec![(group.rank() * 100 + n) as f64; n], KINDS[n % 4])).collect();
        let received: Vec<_> = (1..100).map(|n| tensor(&vec![-1.0; n], KINDS[n % 4])).collect();
        let receives: Vec<_> = received.iter().map(|t| group.receive(t, previous).unwrap()).collect();
        let sends: Vec<_> = sent.iter().map(|t| group.send(t, next).unwrap()).collect();
        receives.into_iter().chain(sends).for_each(|work| work.wait().unwrap());
        for (n, received) in (1..100).zip(&received) {
            let sent = tensor(&vec![(previous * 100 + n) as f64; n], KINDS[n % 4]);
            assert_eq!(values(received), values(&sent));
        }
    });
}

#[test]
fn what_cannot_be_sent_is_refused() {
    ranks(2, |group| {
        let row = tensor(&[1.0, 2.0], Kind::Float);
        let other = 1 - group.rank();
        let column = Tensor::ones([2, 3], (Kind::Float, tch::Device::Cpu)).transpose(0, 1);
        for error in [
            group.send(&row, 2).unwrap_err(),
            group.send(&row, group.rank()).unwrap_err(),
            group.receive(&row, 2).unwrap_err(),
            group.send(&column, other).unwrap_err(),
            group.receive(&column, other).unwrap_err(),
            group.send(&Tensor::new(), other).unwrap_err(),
            group.receive(&Tensor::new(), other).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        }
    });
}

#[test]
fn a_barrier_holds_until_all_have_come() {
    let arrived = AtomicUsize::new(0);
    ranks(3, |group| {
        arrived.fetch_add(1, Ordering::SeqCst);
        group.barrier().unwrap().wait().unwrap();
        assert_eq!(arrived.load(Ordering::SeqCst), 3);
    });
}

#[test]
fn an_operation_goes_on_while_its_caller_does_something_else() {
    let started = Barrier::new(2);
    ranks(2, |group| {
        let (one, two) = (tensor(&[1.0], Kind::Float), tensor(&[2.0], Kind::Float));
        if group.rank() == 0 {
            // Rank 1 joins in only after this rank has come back from both calls.
            let works = [one.shallow_clone(), two.shallow_clone()]
                .map(|t| group.all_reduce(&t, ReduceOp::Sum).unwrap());
            assert!(works.iter().all(|work| !work.is_completed()));
            started.wait();
            for work in works {
                work.wait().unwrap();
            }
        } else {
            started.wait();
            group.all_reduce(&one, ReduceOp::Sum).unwrap().wait().unwrap();
            group.all_reduce(&two, ReduceOp::Sum).unwrap().wait().unwrap();
        }
        assert_eq!((values(&one), values(&two)), (vec![2.0], vec![4.0]));
    });
}

#[test]
fn waiting_ends_at_a_timeout_of_its_own() {
    let given_up = Barrier::new(2);
    ranks(2, |group| {
        let tensor = tensor(&[1.0], Kind::Float);
        if group.rank() == 0 {
            let work = group.all_reduce(&tensor, ReduceOp::Sum).unwrap();
            let error = work.wait_timeout(Duration::from_millis(50)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
            given_up.wait();
        } else {
            given_up.wait();
            group.all_reduce(&tensor, ReduceOp::Sum).unwrap().wait().unwrap();
        }
    });
}

#[test]
fn a_peer_that_leaves_is_a_network_error() {
    // A peer that leaves earlier breaks the other's forming of the group, and not its collective.
    let formed = std::sync::Barrier::new(2);
    let kinds = ranks(2, |group| {
        formed.wait();
        if group.rank() == 1 {
            return None;
        }
        let tensor = tensor(&[1.0], Kind::Float);
        let error = group.all_reduce(&tensor, ReduceOp::Sum).and_then(ice_c10d::Work::wait).unwrap_err();
        Some((error.kind(), error.to_string()))
    });
    let (kind, message) = kinds[0].clone().unwrap();
    assert_eq!(kind, ErrorKind::Network, "{message}");
}

#[test]
fn a_rank_beyond_the_world_is_refused() {
    let (_server, port) = ice_c10d::testing::serve_store().unwrap();
    let store = ice_c10d::Store::tcp("127.0.0.1", port, common::TIMEOUT).unwrap();
    let error = ProcessGroup::gloo(&store, 2, 2, &Default::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
}
