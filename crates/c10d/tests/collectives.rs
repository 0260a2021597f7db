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
        let expanded = row.unsqueeze(0).expand([3, 2], false);
        for error in [
            group.send(&row, 2).unwrap_err(),
            group.send(&row, group.rank()).unwrap_err(),
            group.receive(&row, 2).unwrap_err(),
            group.receive(&expanded, other).unwrap_err(),
            group.send(&Tensor::new(), other).unwrap_err(),
            group.receive(&Tensor::new(), other).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        }
    });
}

/// A 4 by 3 matrix of the rank's number and more; its columns have a stride of 3.
fn matrix(group: &ProcessGroup, kind: Kind) -> Tensor {
    let numbers = Tensor::arange(12, (Kind::Double, tch::Device::Cpu)) + 100.0 * group.rank() as f64;
    numbers.reshape([4, 3]).to_kind(kind)
}

#[test]
fn collectives_on_a_column_of_a_matrix_touch_its_elements_alone() {
    ranks(2, |group| {
        let other = 1 - group.rank();
        let around = |matrix: &Tensor| (values(&matrix.select(1, 0)), values(&matrix.select(1, 2)));
        type Collective = fn(&ProcessGroup, &Tensor, usize);
        let collectives: [(Collective, [f64; 4]); 4] = [
            (|g, t, _| g.all_reduce(t, ReduceOp::Sum).unwrap().wait().unwrap(), [102.0, 108.0, 114.0, 120.0]),
            (|g, t, _| g.broadcast(t, 1).unwrap().wait().unwrap(), [101.0, 104.0, 107.0, 110.0]),
            (
                |g, t, other| match other {
                    1 => g.receive(t, 1).unwrap().wait_timeout(common::TIMEOUT).unwrap(),
                    _ => g.send(t, 0).unwrap().wait().unwrap(),
                },
                [101.0, 104.0, 107.0, 110.0],
            ),
            (
                |g, t, _| {
                    let inputs = [t.shallow_clone(), t.copy()];
                    g.reduce_scatter(t, &inputs, ReduceOp::Max).unwrap().wait().unwrap();
                },
                [101.0, 104.0, 107.0, 110.0],
            ),
        ];
        for (collective, expected) in collectives {
            let matrix = matrix(group, Kind::Float);
            let before = around(&matrix);
            let column = matrix.select(1, 1);
            collective(group, &column, other);
            assert_eq!((values(&column), around(&matrix)), (expected.to_vec(), before));
        }
        // Rows of outputs that are columns of one tensor, and a column as the input.
        let all = Tensor::full([4, 2], -1.0, (Kind::Float, tch::Device::Cpu));
        let own = matrix(group, Kind::Float).select(1, 2);
        group.all_gather(&all.unbind(1), &own).unwrap().wait().unwrap();
        assert_eq!(values(&all.flatten(0, 1)), [2.0, 102.0, 5.0, 105.0, 8.0, 108.0, 11.0, 111.0]);
    });
}

#[test]
fn a_rank_whose_tensor_has_another_memory_format_reduces_the_same_elements() {
    ranks(2, |group| {
        let image = Tensor::arange(24, (Kind::Float, tch::Device::Cpu)).reshape([1, 2, 3, 4]);
        let image = match group.rank() {
            0 => image,
            _ => image.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]),
        };
        let expected = values(&(&image * 2.0).flatten(0, -1));
        group.all_reduce(&image, ReduceOp::Sum).unwrap().wait().unwrap();
        assert_eq!(values(&image.flatten(0, -1)), expected);
    });
}

#[test]
fn types_that_cannot_be_reduced_are_moved_and_named() {
    ranks(2, |group| {
        let other = 1 - group.rank();
        for kind in [Kind::Int16, Kind::ComplexFloat] {
            let matrix = matrix(group, Kind::Int64).to_kind(kind);
            let error = group.all_reduce(&matrix, ReduceOp::Sum).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
            let scalar = Tensor::from(group.rank() as i64 + 7).to_kind(kind);
            for tensor in [matrix.select(1, 1), scalar] {
                let (own, outputs) = (tensor.copy(), [tensor.empty_like(), tensor.empty_like()]);
                group.all_gather(&outputs, &own).unwrap().wait().unwrap();
                group.broadcast(&tensor, 1).unwrap().wait().unwrap();
                assert_eq!(tensor, outputs[1], "{kind:?}");
                assert_eq!(own, outputs[group.rank()], "{kind:?}");
                let sent = group.send(&own, other).unwrap();
                let received = tensor.empty_like();
                group.receive(&received, other).unwrap().wait().unwrap();
                sent.wait().unwrap();
                assert_eq!(received, outputs[other], "{kind:?}");
            }
        }
        assert_eq!(reduced(group, Kind::Int64, ReduceOp::Sum), [4.0, 10.0, -8.0], "the group still works");
    });
}

#[test]
fn bools_are_summed_and_multiplied_as_bools() {
    ranks(2, |group| {
        let mine = if group.rank() == 0 { [1.0, 1.0, 0.0] } else { [1.0, 0.0, 0.0] };
        for (op, expected) in [(ReduceOp::Sum, [1u8, 1, 0]), (ReduceOp::Product, [1, 0, 0])] {
            let flags = tensor(&mine, Kind::Bool);
            group.all_reduce(&flags, op).unwrap().wait().unwrap();
            let bytes = Vec::<u8>::try_from(flags.view_dtype(Kind::Uint8)).unwrap();
            assert_eq!(bytes, expected, "{op:?}");
        }
    });
}

#[test]
fn a_tensor_that_is_sparse_or_expanded_is_refused_by_name() {
    ranks(2, |group| {
        let one = tensor(&[1.0], Kind::Float);
        let error = group.all_reduce(&one.expand([3], false), ReduceOp::Sum).unwrap_err();
        assert!(
            error.kind() == ErrorKind::InvalidArgument && error.to_string().contains("expanded"),
            "{error}"
        );
        let error = group.broadcast(&one.to_sparse(None, None::<&[i64]>, None), 0).unwrap_err();
        assert!(
            error.kind() == ErrorKind::InvalidArgument && error.to_string().contains("Sparse"),
            "{error}"
        );
        let outputs = [tensor(&[0.0], Kind::Float), tensor(&[0.0], Kind::Double)];
        let error = group.all_gather(&outputs, &one).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
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
