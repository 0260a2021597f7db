//! Statistics over the batches of all ranks.

use std::cell::RefCell;
use std::rc::Rc;

use ice_c10d::{BatchStatistics, ProcessGroup};
use tch::{Kind, Tensor};

/// The ranks that run a module together, for its [`SyncBatchNorm`](crate::SyncBatchNorm)s.
///
/// Layers return tensors and no errors. If an exchange fails, the implementation keeps the error,
/// and the layers return tensors of the right shape. The caller of [`over_ranks`] must then ask the
/// implementation for the error.
pub trait Ranks {
    /// The group of all ranks.
    fn group(&self) -> &ProcessGroup;

    /// Gathers the tensors of all ranks, which have the shape and kind of `own`. Returns `None` if
    /// this exchange fails, or if one before it has failed.
    fn gather(&self, own: &Tensor) -> Option<Vec<Tensor>>;

    /// Keeps the error of an operation that followed an exchange.
    fn fail(&self, error: ice_c10d::Error);
}

#[derive(Clone)]
struct Scope {
    ranks: Rc<dyn Ranks>,
    every_layer: bool,
}

thread_local! {
    static SCOPE: RefCell<Option<Scope>> = const { RefCell::new(None) };
}

/// Runs the forward pass of a module that all ranks run together. In training, its
/// [`SyncBatchNorm`](crate::SyncBatchNorm)s take their statistics over all ranks. With
/// `every_layer`, all its batch norms do.
pub fn over_ranks<T>(ranks: Rc<dyn Ranks>, every_layer: bool, forward: impl FnOnce() -> T) -> T {
    struct Restore(Option<Scope>);
    impl Drop for Restore {
        fn drop(&mut self) {
            SCOPE.set(self.0.take());
        }
    }
    let _restore = Restore(SCOPE.replace(Some(Scope { ranks, every_layer })));
    forward()
}

/// Returns the ranks over which a layer is to take its statistics now, if any.
pub(crate) fn ranks(is_sync: bool) -> Option<Rc<dyn Ranks>> {
    SCOPE.with_borrow(|scope| {
        scope.as_ref().filter(|scope| is_sync || scope.every_layer).map(|scope| Rc::clone(&scope.ranks))
    })
}

/// Returns the statistics of all ranks' batches together. `x` is this rank's batch,
/// `[n, features, size…]`. Returns `None` if the exchange fails.
pub(crate) fn statistics(x: &Tensor, ranks: &dyn Ranks) -> Option<BatchStatistics> {
    tch::no_grad(|| {
        let gathered = ranks.gather(&of_this_rank(x))?;
        let kind = if x.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        Some(of_all(&gathered, kind))
    })
}

/// Returns the means, the variances and the number of values per feature, as Double of
/// `[2·features + 1]`.
fn of_this_rank(x: &Tensor) -> Tensor {
    let size = x.size();
    let dims: Vec<i64> = (0..size.len() as i64).filter(|dim| *dim != 1).collect();
    // Half precision is too coarse for sums.
    let x = if x.kind() == Kind::Double { x.shallow_clone() } else { x.to_kind(Kind::Float) };
    let (var, mean) = x.var_mean_correction(&dims[..], 0, false);
    let count = Tensor::from_slice(&[x.numel() as f64 / size[1].max(1) as f64]).to_device(x.device());
    Tensor::cat(&[mean.to_kind(Kind::Double), var.to_kind(Kind::Double), count], 0)
}

/// Combines the statistics of the ranks by the parallel algorithm of Chan, Golub and LeVeque
/// (1979).
fn of_all(ranks: &[Tensor], kind: Kind) -> BatchStatistics {
    let rows = Tensor::stack(ranks, 0);
    let features = (rows.size()[1] - 1) / 2;
    let (means, vars) = (rows.narrow(1, 0, features), rows.narrow(1, features, features));
    let counts = rows.narrow(1, 2 * features, 1);
    let count = counts.sum(Kind::Double).double_value(&[]);
    let average = |values: Tensor| (values * &counts).sum_dim_intlist(0, false, Kind::Double) / count;
    let mean = average(means.shallow_clone());
    let var = average(vars + (means - &mean).square());
    BatchStatistics { mean: mean.to_kind(kind), var: var.to_kind(kind), count }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::thread;
    use std::time::Duration;

    use ice_c10d::testing::serve_store;
    use ice_c10d::{GlooOptions, ReduceOp, Store};
    use tch::Device;
    use tch::nn::{ModuleT, VarStore};

    use super::*;
    use crate::{BatchNorm2d, SyncBatchNorm};

    #[test]
    fn parts_of_a_batch_give_its_statistics() {
        tch::manual_seed(7);
        let x = Tensor::randn([5, 3, 4], (Kind::Float, Device::Cpu)) * 3.0 + 100.0;
        for sizes in [vec![5], vec![1, 4], vec![2, 1, 2]] {
            let parts = x.split_with_sizes(&sizes, 0).iter().map(of_this_rank).collect::<Vec<_>>();
            let all = of_all(&parts, Kind::Double);
            let (var, mean) = x.to_kind(Kind::Double).var_mean_correction(&[0_i64, 2][..], 0, false);
            assert_eq!(all.count, 20.0);
            assert!(all.mean.allclose(&mean, 1e-6, 0.0, false), "{sizes:?}");
            assert!(all.var.allclose(&var, 1e-5, 0.0, false), "{sizes:?}");
        }
    }

    struct Threads {
        group: ProcessGroup,
        has_failed: Cell<bool>,
    }

    impl Ranks for Threads {
        fn group(&self) -> &ProcessGroup {
            &self.group
        }

        fn gather(&self, own: &Tensor) -> Option<Vec<Tensor>> {
            let all: Vec<_> = (0..self.group.world_size()).map(|_| own.empty_like()).collect();
            let gathered = self.group.all_gather(&all, own).and_then(|work| work.wait());
            self.has_failed.set(gathered.is_err());
            gathered.ok().map(|()| all)
        }

        fn fail(&self, _: ice_c10d::Error) {
            self.has_failed.set(true);
        }
    }

    /// Runs `rank` on `count` ranks, each a thread of this process.
    fn ranks<T: Send>(count: usize, rank: impl Fn(&Rc<Threads>) -> T + Sync) -> Vec<T> {
        let (_server, port) = serve_store().unwrap();
        let join = |r| {
            let timeout = Duration::from_secs(30);
            let store = Store::tcp("127.0.0.1", port, timeout).unwrap();
            let options = GlooOptions { timeout, hostname: Some("127.0.0.1".into()), interface: None };
            let group = ProcessGroup::gloo(&store, r, count, &options).unwrap();
            rank(&Rc::new(Threads { group, has_failed: Cell::new(false) }))
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..count).map(|r| scope.spawn(move || join(r))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// Runs a training step of the layer. Returns the output, the gradients of x, weight and bias,
    /// and the running mean and variance.
    fn step(layer: &dyn ModuleT, store: &VarStore, x: &Tensor, factors: &Tensor) -> Vec<Tensor> {
        let x = x.copy().set_requires_grad(true);
        let out = layer.forward_t(&x, true);
        ice_c10d::run_backward(&(out.square() * factors).sum(Kind::Float)).unwrap();
        let variables = store.variables();
        let grad = |name: &str| variables[name].grad();
        let buffer = |name: &str| variables[name].copy();
        vec![
            out.detach(),
            x.grad(),
            grad("weight"),
            grad("bias"),
            buffer("running_mean"),
            buffer("running_var"),
        ]
    }

    /// Returns a batch, and factors for the loss. The features differ in scale, so that an error in
    /// any of them shows.
    fn batch() -> (Tensor, Tensor) {
        let numbers = Tensor::arange(7 * 3 * 2 * 4, (Kind::Float, Device::Cpu)).view([7, 3, 2, 4]);
        let scales = Tensor::from_slice(&[0.1_f32, 1.0, 30.0]).view([3, 1, 1]);
        ((&numbers * 0.7).sin() * &scales + scales, (numbers * 1.3).cos())
    }

    fn set(store: &VarStore) {
        tch::no_grad(|| {
            for (name, value) in [("weight", [0.5_f32, 2.0, -1.0]), ("bias", [0.1, -0.2, 0.3])] {
                store.variables()[name].shallow_clone().copy_(&Tensor::from_slice(&value));
            }
        });
    }

    #[test]
    fn ranks_with_parts_of_a_batch_compute_what_one_with_all_of_it_does() {
        let (x, factors) = batch();
        let store = VarStore::new(Device::Cpu);
        let layer = BatchNorm2d::new(store.root(), 3);
        set(&store);
        let expected = step(&layer, &store, &x, &factors);
        // A `SyncBatchNorm`; and with `every_layer` an ordinary batch norm.
        for every_layer in [false, true] {
            let parts: Vec<_> = ranks(3, |ranks| {
                let (start, length) = [(0, 1), (1, 4), (5, 2)][ranks.group.rank()];
                let store = VarStore::new(Device::Cpu);
                let layer: Box<dyn ModuleT> = match every_layer {
                    true => Box::new(BatchNorm2d::new(store.root(), 3)),
                    false => Box::new(SyncBatchNorm::new(store.root(), 3)),
                };
                set(&store);
                // A tensor cannot be shared with a thread.
                let (x, factors) = batch();
                let (x, factors) = (x.narrow(0, start, length), factors.narrow(0, start, length));
                let scope = Rc::clone(ranks) as Rc<dyn Ranks>;
                let found = over_ranks(scope, every_layer, || step(&*layer, &store, &x, &factors));
                for gradient in &found[2..4] {
                    ranks.group.all_reduce(gradient, ReduceOp::Sum).unwrap().wait().unwrap();
                }
                assert_eq!(store.variables()["num_batches_tracked"].int64_value(&[]), 1);
                assert!(!ranks.has_failed.get());
                found
            });
            let close = |found: &Tensor, expected: &Tensor, what: &str| {
                let difference = (found - expected).abs().max().double_value(&[]);
                assert!(found.allclose(expected, 1e-4, 1e-4, false), "{what} differs by {difference}");
            };
            for (place, what) in ["the output", "the gradient of x"].into_iter().enumerate() {
                let found: Vec<_> = parts.iter().map(|part| &part[place]).collect();
                close(&Tensor::cat(&found, 0), &expected[place], what);
            }
            let of_all = [
                "the gradient of weight",
                "the gradient of bias",
                "the running mean",
                "the running variance",
            ];
            for (place, what) in of_all.into_iter().enumerate() {
                parts.iter().for_each(|part| close(&part[place + 2], &expected[place + 2], what));
            }
        }
    }

    #[test]
    fn evaluations_and_other_layers_exchange_nothing() {
        let (x, factors) = batch();
        let (other, sync) = (VarStore::new(Device::Cpu), VarStore::new(Device::Cpu));
        let layers = (BatchNorm2d::new(other.root(), 3), SyncBatchNorm::new(sync.root(), 3));
        set(&other);
        let expected = step(&layers.0, &other, &x, &factors);
        ranks(1, |ranks| {
            struct Nothing(Rc<Threads>);
            impl Ranks for Nothing {
                fn group(&self) -> &ProcessGroup {
                    &self.0.group
                }
                fn gather(&self, _: &Tensor) -> Option<Vec<Tensor>> {
                    panic!("an exchange");
                }
                fn fail(&self, _: ice_c10d::Error) {}
            }
            let (x, factors) = batch();
            let scope = Rc::new(Nothing(Rc::clone(ranks)));
            over_ranks(scope, false, || {
                let store = VarStore::new(Device::Cpu);
                let layer = BatchNorm2d::new(store.root(), 3);
                set(&store);
                assert_eq!(step(&layer, &store, &x, &factors)[0].size(), x.size());
                let layer = SyncBatchNorm::new(store.root() / "sync", 3);
                let _ = layer.forward_t(&x, false);
            });
        });
        // Outside `over_ranks`, a `SyncBatchNorm` is an ordinary batch norm.
        set(&sync);
        let found = step(&layers.1, &sync, &x, &factors);
        assert!(found.iter().zip(&expected).all(|(found, expected)| found.equal(expected)));
    }
}
