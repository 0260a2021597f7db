//! Compares layers with PyTorch's. `tests/python/nn_reference.py` has written PyTorch's numbers.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path as FilePath;
use std::sync::{Mutex, MutexGuard, OnceLock};

use ice_nn::{self as nn, AttentionMask, Module, ModuleT, Path, VarStore, init};
use tch::{Cuda, Device, Kind, Tensor};

const SEED: i64 = 11;

/// Guards libtorch's only generator of a process. A layer that another test builds in between
/// changes the next draws.
static GENERATOR: Mutex<()> = Mutex::new(());

fn seeded() -> MutexGuard<'static, ()> {
    let guard = GENERATOR.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    tch::manual_seed(SEED);
    guard
}

/// Returns an empty store. Its layers draw when they are built, so that every test gets its store
/// here.
fn seeded_store(device: Device) -> (MutexGuard<'static, ()>, VarStore) {
    (seeded(), VarStore::new(device))
}

/// Returns PyTorch's tensors for a layer, by their keys without the layer's name.
fn reference(layer: &str) -> BTreeMap<String, Tensor> {
    static ALL: OnceLock<Mutex<Vec<(String, Tensor)>>> = OnceLock::new();
    let file = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/layers.safetensors");
    let all = ALL.get_or_init(|| Mutex::new(Tensor::read_safetensors(file).unwrap())).lock().unwrap();
    let own = all.iter().filter_map(|(key, tensor)| {
        Some((key.strip_prefix(layer)?.strip_prefix('/')?.to_owned(), tensor.shallow_clone()))
    });
    own.collect()
}

/// Returns the tensors whose keys begin with `kind`, by the rest of their keys.
fn of_kind<'a>(all: &'a BTreeMap<String, Tensor>, kind: &str) -> BTreeMap<&'a str, &'a Tensor> {
    all.iter()
        .filter_map(|(key, tensor)| Some((key.strip_prefix(kind)?.strip_prefix('/')?, tensor)))
        .collect()
}

fn numbered(all: &BTreeMap<String, Tensor>, kind: &str) -> Vec<Tensor> {
    of_kind(all, kind).into_values().map(Tensor::copy).collect()
}

fn floats_of(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

/// Compares shapes, kinds and elements. The tolerance is for other processors, whose kernels round
/// differently.
#[track_caller]
fn assert_close(name: &str, own: &Tensor, theirs: &Tensor, tolerance: f64) {
    assert_eq!((own.size(), own.kind()), (theirs.size(), theirs.kind()), "{name}");
    for (place, (own, theirs)) in floats_of(own).iter().zip(floats_of(theirs)).enumerate() {
        // Not `>`, which a NaN would pass.
        let close = (own - theirs).abs() <= tolerance * theirs.abs().max(1.0);
        assert!(close, "{name}, element {place}: {own} instead of {theirs}");
    }
}

/// Compares draws, to the bit. On processors without AVX2, libtorch has other kernels: there the
/// draws may differ in the last bits.
#[track_caller]
fn assert_drawn_alike(name: &str, own: &Tensor, theirs: &Tensor) {
    let same = std::arch::is_x86_feature_detected!("avx2");
    assert_close(name, own, theirs, if same { 0.0 } else { 1e-6 });
}

/// Returns the sum whose gradients are in the reference.
fn weighted_sum(outputs: &[Tensor]) -> Tensor {
    let sum = |output: &Tensor| {
        let places = Tensor::arange(output.numel() as i64, (Kind::Float, Device::Cpu)).view_as(output);
        (output * places.sin()).sum(Kind::Float)
    };
    outputs.iter().map(sum).sum()
}

/// Builds the layer, and compares everything that the reference has of it.
#[track_caller]
fn check<L>(name: &str, build: impl Fn(&Path) -> L, call: impl Fn(&L, &[Tensor], bool) -> Vec<Tensor>) {
    let reference = reference(name);
    let (guard, store) = seeded_store(Device::Cpu);
    let layer = build(&store.root());
    let next = Tensor::rand([2], (Kind::Float, Device::Cpu));
    drop(guard);
    assert_drawn_alike(&format!("{name}, the next draw"), &next, &reference["next"]);
    let own: BTreeMap<_, _> = store.variables().into_iter().collect();
    let start = of_kind(&reference, "start");
    assert_eq!(own.keys().map(String::as_str).collect::<Vec<_>>(), start.keys().copied().collect::<Vec<_>>());
    for (key, theirs) in start {
        assert_drawn_alike(&format!("{name}, {key} at the start"), &own[key], theirs);
    }
    let trainable: BTreeSet<_> = store.trainable_variables().iter().map(Tensor::data_ptr).collect();
    let (gradients, buffers) = (of_kind(&reference, "grad"), of_kind(&reference, "after"));
    for (key, tensor) in &own {
        let is_parameter = gradients.contains_key(key.as_str());
        assert_ne!(is_parameter, buffers.contains_key(key.as_str()), "{name}, {key}");
        assert_eq!(
            (is_parameter, is_parameter),
            (tensor.requires_grad(), trainable.contains(&tensor.data_ptr()))
        );
    }

    tch::no_grad(|| {
        of_kind(&reference, "state").iter().for_each(|(key, value)| own[*key].shallow_clone().copy_(value))
    });
    let inputs = numbered(&reference, "in");
    let inputs: Vec<_> = inputs
        .into_iter()
        .map(|x| if x.is_floating_point() { x.set_requires_grad(true) } else { x })
        .collect();
    let compare = |what: &str, own: &[Tensor]| {
        let theirs = numbered(&reference, what);
        assert_eq!(own.len(), theirs.len(), "{name}, {what}");
        for (number, (own, theirs)) in own.iter().zip(&theirs).enumerate() {
            assert_close(&format!("{name}, {what} {number}"), own, theirs, 1e-5);
        }
    };
    let outputs = call(&layer, &inputs, true);
    compare("train", &outputs);
    weighted_sum(&outputs).backward();
    let learned: Vec<_> = inputs.iter().filter(|x| x.requires_grad()).map(Tensor::grad).collect();
    compare("grad_in", &learned);
    for (key, theirs) in gradients {
        assert_close(&format!("{name}, gradient of {key}"), &own[key].grad(), theirs, 1e-5);
    }
    for (key, theirs) in buffers {
        assert_close(&format!("{name}, {key} after training"), &own[key], theirs, 1e-6);
    }
    compare("eval", &tch::no_grad(|| call(&layer, &inputs, false)));
}

/// Runs a layer that has one input and one output.
fn one<L: ModuleT>(layer: &L, inputs: &[Tensor], train: bool) -> Vec<Tensor> {
    vec![layer.forward_t(&inputs[0], train)]
}

#[test]
fn linear_layers_are_pytorchs() {
    check("linear", |p| nn::Linear::new(p, 5, 3), one);
    check("linear_no_bias", |p| nn::Linear::options(5, 3).bias(false).build(p), one);
}

#[test]
fn convolutions_are_pytorchs() {
    let conv1d = |p: &Path| nn::Conv1d::options(4, 6, 3).stride(2).padding(1).dilation(2).groups(2).build(p);
    check("conv1d", conv1d, one);
    check("conv2d", |p| nn::Conv2d::options(2, 3, [3, 2]).stride([2, 1]).padding([1, 0]).build(p), one);
    check("conv2d_groups", |p| nn::Conv2d::options(4, 4, 3).groups(4).bias(false).build(p), one);
    check("conv2d_same", |p| nn::Conv2d::options(2, 2, [4, 3]).padding_same().dilation([1, 2]).build(p), one);
    for (name, mode) in [
        ("reflect", nn::PaddingMode::Reflect),
        ("replicate", nn::PaddingMode::Replicate),
        ("circular", nn::PaddingMode::Circular),
    ] {
        let build = |p: &Path| nn::Conv2d::options(2, 2, 3).padding([2, 1]).padding_mode(mode).build(p);
        check(&format!("conv2d_{name}"), build, one);
    }
    let circular = |p: &Path| {
        nn::Conv1d::options(2, 2, 4).padding_same().padding_mode(nn::PaddingMode::Circular).build(p)
    };
    check("conv1d_same_circular", circular, one);
    check("conv3d", |p| nn::Conv3d::options(2, 2, 2).padding(1).build(p), one);
}

#[test]
fn transposed_convolutions_are_pytorchs() {
    check("conv_transpose1d", |p| nn::ConvTranspose1d::options(2, 4, 3).stride(2).build(p), one);
    let build = |p: &Path| {
        let options = nn::ConvTranspose2d::options(4, 6, 3).stride(2).padding(1).output_padding([1, 0]);
        options.groups(2).dilation([1, 2]).build(p)
    };
    check("conv_transpose2d", build, one);
    check("conv_transpose3d", |p| nn::ConvTranspose3d::options(2, 1, 2).bias(false).build(p), one);
}

#[test]
fn batch_norms_are_pytorchs() {
    check("batch_norm1d", |p| nn::BatchNorm1d::new(p, 3), one);
    check("batch_norm1d_length", |p| nn::BatchNorm1d::options(3).eps(1e-3).momentum(0.3).build(p), one);
    check("batch_norm2d", |p| nn::BatchNorm2d::new(p, 3), one);
    check("batch_norm2d_average", |p| nn::BatchNorm2d::options(3).momentum(None).build(p), one);
    check("batch_norm2d_no_bias", |p| nn::BatchNorm2d::options(3).bias(false).build(p), one);
    let plain = |p: &Path| nn::BatchNorm2d::options(3).affine(false).track_running_stats(false).build(p);
    check("batch_norm2d_plain", plain, one);
    check("batch_norm3d", |p| nn::BatchNorm3d::new(p, 2), one);
}

#[test]
fn other_norms_are_pytorchs() {
    check("layer_norm", |p| nn::LayerNorm::new(p, 6), one);
    check("layer_norm_two", |p| nn::LayerNorm::options([3, 4]).eps(1e-3).bias(false).build(p), one);
    check("layer_norm_plain", |p| nn::LayerNorm::options(4).elementwise_affine(false).build(p), one);
    check("group_norm", |p| nn::GroupNorm::options(2, 4).eps(1e-4).build(p), one);
    check("rms_norm", |p| nn::RMSNorm::new(p, 6), one);
    check("rms_norm_eps", |p| nn::RMSNorm::options([2, 3]).eps(1e-2).build(p), one);
}

#[test]
fn embeddings_are_pytorchs() {
    check("embedding", |p| nn::Embedding::new(p, 3, 4), one);
    check("embedding_padding", |p| nn::Embedding::options(7, 5).padding_idx(-2).build(p), one);
}

#[test]
fn recurrent_layers_are_pytorchs() {
    let lstm = |layer: &nn::LSTM, x: &[Tensor], train: bool| {
        let state = x.get(2).map(|cell| (x[1].shallow_clone(), cell.shallow_clone()));
        let (output, (hidden, cell)) = layer.forward_t(&x[0], state.as_ref(), train);
        vec![output, hidden, cell]
    };
    check("lstm", |p| nn::LSTM::new(p, 3, 4), lstm);
    let deep =
        |p: &Path| nn::LSTM::options(3, 4).num_layers(2).bidirectional(true).batch_first(true).build(p);
    check("lstm_deep", deep, lstm);
    check("lstm_no_bias", |p| nn::LSTM::options(3, 4).bias(false).build(p), lstm);
    check("lstm_state", |p| nn::LSTM::options(3, 4).num_layers(2).build(p), lstm);
    let gru = |layer: &nn::GRU, x: &[Tensor], train: bool| {
        let (output, hidden) = layer.forward_t(&x[0], x.get(1), train);
        vec![output, hidden]
    };
    check("gru", |p| nn::GRU::options(3, 4).num_layers(2).bidirectional(true).build(p), gru);
    check("gru_state", |p| nn::GRU::options(3, 4).batch_first(true).build(p), gru);
}

#[test]
fn attention_is_pytorchs() {
    type Attention = nn::MultiheadAttention;
    let with = |mask: AttentionMask<'static>| {
        move |layer: &Attention, x: &[Tensor], train: bool| {
            let (key, value) = (x.get(1).unwrap_or(&x[0]), x.get(2).unwrap_or(&x[0]));
            vec![layer.forward_t(&x[0], key, value, &mask, train)]
        }
    };
    // The masks are leaked: the process of the tests ends soon.
    let kept = |mask: Tensor| -> &'static Tensor { Box::leak(Box::new(mask)) };
    let batched = |p: &Path| Attention::options(6, 2).batch_first(true).build(p);
    let causal = kept(Tensor::ones([4, 4], (Kind::Bool, Device::Cpu)).triu(1));
    let padding = kept(Tensor::zeros([2, 4], (Kind::Bool, Device::Cpu)));
    let _ = padding.get(1).get(3).fill_(1);
    let scores = kept(Tensor::linspace(-1, 1, 64, (Kind::Float, Device::Cpu)).view([4, 4, 4]));

    check("attention", batched, with(AttentionMask::none()));
    check("attention_length_first", |p| Attention::new(p, 6, 3), with(AttentionMask::none()));
    check("attention_alone", |p| Attention::new(p, 6, 2), with(AttentionMask::none()));
    let no_bias = |p: &Path| Attention::options(6, 2).bias(false).batch_first(true).build(p);
    check("attention_causal", no_bias, with(AttentionMask::causal()));
    check("attention_causal", no_bias, with(AttentionMask::of_pairs(causal)));
    check("attention_causal_padded", batched, with(AttentionMask::causal().and_keys(padding)));
    check("attention_causal_padded", batched, with(AttentionMask::of_pairs(causal).and_keys(padding)));
    check("attention_scores", batched, with(AttentionMask::of_pairs(scores)));
    let sizes = |p: &Path| Attention::options(6, 2).kdim(5).vdim(3).batch_first(true).build(p);
    check("attention_sizes", sizes, with(AttentionMask::none()));
    check("attention_weights", batched, |layer, x, train| {
        let (output, weights) =
            layer.forward_with_weights(&x[0], &x[0], &x[0], &AttentionMask::causal(), train);
        vec![output, weights]
    });
}

#[test]
fn larger_layers_begin_as_pytorchs_do() {
    let compare = |name: &str, build: &dyn Fn(&Path)| {
        let (_guard, store) = seeded_store(Device::Cpu);
        build(&store.root());
        for (key, own) in store.variables() {
            let own = own.to_kind(Kind::Double);
            let numbers = [own.min(), own.max(), own.mean(None), own.std(false)];
            let theirs = &reference(name)[&format!("spread/{key}")];
            assert_close(&format!("{name}, {key}"), &Tensor::stack(&numbers, 0), theirs, 1e-6);
        }
    };
    compare("linear", &|p| drop(nn::Linear::new(p, 300, 200)));
    compare("conv2d", &|p| drop(nn::Conv2d::new(p, 16, 32, 5)));
    compare("conv_transpose2d", &|p| drop(nn::ConvTranspose2d::new(p, 16, 32, 5)));
    compare("embedding", &|p| drop(nn::Embedding::new(p, 200, 64)));
    compare("lstm", &|p| drop(nn::LSTM::options(40, 50).num_layers(2).build(p)));
    compare("attention", &|p| drop(nn::MultiheadAttention::new(p, 64, 4)));
}

/// Compares initial values with the bounds and deviations in PyTorch's documentation.
#[test]
fn parameters_begin_within_the_documented_bounds() {
    let (_guard, store) = seeded_store(Device::Cpu);
    let p = store.root();
    nn::Linear::new(&p / "linear", 400, 300);
    nn::Conv2d::options(32, 64, 3).groups(2).build(&p / "conv");
    nn::ConvTranspose2d::new(&p / "transpose", 32, 48, 3);
    nn::LSTM::new(&p / "lstm", 30, 64);
    nn::GRU::new(&p / "gru", 30, 64);
    nn::MultiheadAttention::new(&p / "attention", 128, 4);
    nn::Embedding::new(&p / "embedding", 500, 64);
    let even = [
        ("linear", 1.0 / 400f64.sqrt(), &["weight", "bias"][..]),
        ("conv", 1.0 / (16.0 * 9.0f64).sqrt(), &["weight", "bias"]),
        ("transpose", 1.0 / (48.0 * 9.0f64).sqrt(), &["weight", "bias"]),
        ("lstm", 1.0 / 64f64.sqrt(), &["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]),
        ("gru", 1.0 / 64f64.sqrt(), &["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]),
        ("attention", (6.0 / (4.0 * 128.0f64)).sqrt(), &["in_proj_weight"]),
    ];
    let variables = store.variables();
    for (layer, bound, names) in even {
        for name in names {
            let values = &variables[&format!("{layer}.{name}")];
            let largest = values.abs().max().double_value(&[]);
            // The fewer values, the larger the chance that the largest of them is far from the
            // bound.
            let least = bound * (1.0 - 10.0 / values.numel() as f64);
            assert!((least..=bound).contains(&largest), "{layer}.{name}: {largest} of {bound}");
            let deviation = values.std(false).double_value(&[]) / (bound / 3f64.sqrt());
            let error = 5.0 / (values.numel() as f64).sqrt();
            assert!((deviation - 1.0).abs() < error, "{layer}.{name}: {deviation} of an even spread's");
        }
    }
    let vectors = &variables["embedding.weight"];
    let (mean, deviation) = (vectors.mean(None).double_value(&[]), vectors.std(false).double_value(&[]));
    assert!(mean.abs() < 0.03 && (deviation - 1.0).abs() < 0.02, "{mean} ± {deviation}");
    for zeros in ["attention.in_proj_bias", "attention.out_proj.bias"] {
        assert_eq!(variables[zeros].abs().max().double_value(&[]), 0.0, "{zeros}");
    }
}

#[test]
fn functions_of_init_draw_as_pytorchs_do() {
    let _guard = seeded();
    let reference = reference("init");
    let weight = Tensor::empty([4, 3, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let compare = |name: &str, draw: &dyn Fn(&Tensor)| {
        tch::manual_seed(SEED);
        draw(&weight);
        assert_drawn_alike(name, &weight, &reference[name]);
    };
    compare("kaiming_uniform", &|w| init::kaiming_uniform_(w, init::Fan::In, init::Nonlinearity::Relu));
    compare("kaiming_normal", &|w| init::kaiming_normal_(w, init::Fan::Out, init::Nonlinearity::Tanh));
    compare("xavier_uniform", &|w| init::xavier_uniform_(w, init::Nonlinearity::Selu.gain()));
    compare("xavier_normal", &|w| init::xavier_normal_(w, 1.0));
    compare("normal", &|w| init::normal_(w, 1.0, 0.02));
    compare("uniform", &|w| init::uniform_(w, -2.0, 1.0));
    compare("trunc_normal", &|w| init::trunc_normal_(w, 0.0, 0.02, -0.02, 0.02));
    compare("trunc_normal_tail", &|w| init::trunc_normal_(w, 0.0, 1.0, 1.0, 4.0));
    tch::manual_seed(SEED);
    init::orthogonal_(&weight, 2.0);
    // LAPACK computes this one, and its rounding differs between processors.
    assert_close("orthogonal", &weight, &reference["orthogonal"], 1e-5);
    assert!(weight.requires_grad() && weight.is_leaf());
}

#[test]
fn dropout_zeroes_what_pytorch_zeroes_and_nothing_in_evaluation() {
    let _guard = seeded();
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let compare = |name: &str, layer: &dyn ModuleT, x: Tensor| {
        tch::manual_seed(SEED);
        assert_close(name, &layer.forward_t(&x, true), &reference(name)["train"], 1e-6);
        assert_eq!(layer.forward_t(&x, false), x, "{name} in evaluation");
    };
    compare("dropout", &nn::Dropout::new(0.3), ones(&[40]));
    compare("dropout2d", &nn::Dropout2d::new(0.5), ones(&[2, 6, 2, 2]));
}

#[test]
fn dropout_within_layers_is_off_in_evaluation() {
    let (_guard, store) = seeded_store(Device::Cpu);
    let p = store.root();
    let lstm = nn::LSTM::options(8, 8).num_layers(2).dropout(0.5).build(&p / "lstm");
    let gru = nn::GRU::options(8, 8).num_layers(2).dropout(0.5).build(&p / "gru");
    let attention = nn::MultiheadAttention::options(8, 2).dropout(0.5).build(&p / "attention");
    let x = Tensor::randn([6, 3, 8], (Kind::Float, Device::Cpu));
    let mask = AttentionMask::none();
    let outputs = |train: bool| {
        [
            lstm.forward_t(&x, None, train).0,
            gru.forward_t(&x, None, train).0,
            attention.forward_t(&x, &x, &x, &mask, train),
            attention.forward_with_weights(&x, &x, &x, &mask, train).0,
        ]
    };
    for (name, train, same) in [("training", true, false), ("evaluation", false, true)] {
        for (number, (first, second)) in outputs(train).iter().zip(&outputs(train)).enumerate() {
            assert_eq!(first == second, same, "layer {number} twice in {name}");
        }
    }
}

/// Returns the message of the panic.
#[track_caller]
fn panics<T>(code: impl FnOnce() -> T) -> String {
    match catch_unwind(AssertUnwindSafe(code)) {
        Ok(_) => panic!("that should not work"),
        Err(panic) => match panic.downcast::<String>() {
            Ok(text) => *text,
            Err(panic) => (*panic.downcast::<&str>().unwrap()).to_owned(),
        },
    }
}

#[test]
fn second_layer_at_a_path_is_an_error_that_names_it() {
    let (_guard, store) = seeded_store(Device::Cpu);
    let p = store.root() / "block";
    nn::Linear::new(&p / "fc", 2, 2);
    let message = panics(|| nn::Linear::new(&p / "fc", 2, 2));
    assert!(message.contains("`block.fc.weight`") && message.contains("a path of its own"), "{message}");
    nn::BatchNorm2d::options(2).affine(false).build(&p / "norm");
    let message = panics(|| nn::BatchNorm2d::options(2).affine(false).build(&p / "norm"));
    assert!(message.contains("`block.norm.running_mean`"), "{message}");
    // The failed layers have stored nothing.
    assert_eq!(store.len(), 5);
    nn::Linear::new(&p / "other", 2, 2);
    assert_eq!(store.len(), 7);
}

#[test]
fn sizes_that_do_not_fit_are_errors_that_name_them() {
    let (_guard, store) = seeded_store(Device::Cpu);
    let p = store.root();
    let wrong: [(&str, &dyn Fn()); 7] = [
        ("3 channels in and 4 out cannot be divided into 2 groups", &|| {
            drop(nn::Conv2d::options(3, 4, 1).groups(2).build(&p / "conv"));
        }),
        ("a stride of [2, 2] does not keep the size", &|| {
            drop(nn::Conv2d::options(2, 2, 3).padding_same().stride(2).build(&p / "same"));
        }),
        ("5 channels cannot be divided into 2 groups", &|| drop(nn::GroupNorm::new(&p / "group", 2, 5))),
        ("5 features cannot be divided into 2 heads", &|| {
            drop(nn::MultiheadAttention::new(&p / "attention", 5, 2));
        }),
        ("no index 7 among 7 embeddings", &|| {
            drop(nn::Embedding::options(7, 2).padding_idx(7).build(&p / "embedding"));
        }),
        ("1.5 is no probability", &|| {
            let _ = nn::Dropout::new(1.5);
        }),
        ("0 layers of 4 cells over 3 features", &|| {
            drop(nn::LSTM::options(3, 4).num_layers(0).build(&p / "lstm"));
        }),
    ];
    for (expected, code) in wrong {
        let message = panics(code);
        assert!(message.contains(expected), "{message}");
    }
    assert!(store.is_empty());
}

#[test]
fn inputs_that_would_broadcast_or_spoil_statistics_are_errors() {
    let (_guard, store) = seeded_store(Device::Cpu);
    let p = store.root();
    let x = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let norm = nn::BatchNorm1d::new(&p / "norm", 3);
    let message = panics(|| norm.forward_t(&x(&[2, 3, 4, 4]), true));
    assert!(message.contains("BatchNorm1d got an input of shape [2, 3, 4, 4]"), "{message}");
    let message = panics(|| norm.forward_t(&x(&[1, 3]), true));
    assert!(message.contains("more than one value per channel"), "{message}");
    let _ = norm.forward_t(&x(&[1, 3]), false);
    let plain = nn::BatchNorm1d::options(3).track_running_stats(false).build(&p / "plain");
    let message = panics(|| plain.forward_t(&x(&[1, 3]), true));
    assert!(message.contains("more than one value per channel"), "{message}");
    let attention = nn::MultiheadAttention::options(4, 2).batch_first(true).build(&p / "attention");
    let (queries, mask) = (x(&[2, 5, 4]), x(&[1, 5]));
    let message =
        panics(|| attention.forward_t(&queries, &queries, &queries, &AttentionMask::of_pairs(&mask), false));
    assert!(message.contains("a mask of shape [1, 5] instead of [5, 5]"), "{message}");
}

#[test]
fn batch_of_one_value_per_channel_leaves_running_statistics_alone() {
    let (_guard, store) = seeded_store(Device::Cpu);
    let norm = nn::BatchNorm1d::new(store.root(), 3);
    let x = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
    let _ = norm.forward_t(&x, true);
    let state =
        || ["running_mean", "running_var", "num_batches_tracked"].map(|name| store.variables()[name].copy());
    let before = state();
    let output = norm.forward_t(&x.narrow(0, 0, 1), true);
    assert_eq!(output.abs().max().double_value(&[]), 0.0);
    assert_eq!(state(), before);
    let _ = norm.forward_t(&x, true);
    assert_ne!(state(), before);
}

/// Runs the paths that only a GPU has: draws are copied to it, and cuDNN needs the weights of
/// recurrent layers in one piece of memory.
#[test]
fn layers_begin_and_compute_on_a_gpu_as_on_the_cpu() {
    if !Cuda::is_available() {
        println!("no GPU here: nothing was compared");
        return;
    }
    let run = |device: Device| {
        let (_guard, store) = seeded_store(device);
        let p = store.root();
        let fc = nn::Linear::new(&p / "fc", 6, 8);
        let norm = nn::BatchNorm1d::new(&p / "norm", 8);
        let lstm = nn::LSTM::options(8, 8).num_layers(2).bidirectional(true).bias(false).build(&p / "lstm");
        let gru = nn::GRU::new(&p / "gru", 16, 8);
        let attention = nn::MultiheadAttention::new(&p / "attention", 8, 2);
        let start: BTreeMap<_, _> = store
            .variables()
            .into_iter()
            .map(|(key, tensor)| (key, tensor.to_device(Device::Cpu).copy()))
            .collect();
        let x = Tensor::arange(60, (Kind::Float, device)).sin().view([10, 6]);
        let x = x.apply(&fc).apply_t(&norm, true).view([5, 2, 8]);
        let x = gru.forward_t(&lstm.forward_t(&x, None, true).0, None, true).0;
        let x = attention.forward_t(&x, &x, &x, &AttentionMask::causal(), true);
        (start, x.to_device(Device::Cpu))
    };
    let ((start, output), (cuda_start, cuda_output)) = (run(Device::Cpu), run(Device::Cuda(0)));
    assert_eq!(start, cuda_start);
    assert_close("output", &cuda_output, &output, 1e-3);
}

#[test]
fn layers_have_the_kind_of_their_store() {
    let (_guard, mut store) = seeded_store(Device::Cpu);
    store.set_kind(Kind::BFloat16);
    let norm = nn::BatchNorm1d::new(store.root(), 3);
    let kinds: BTreeMap<_, _> =
        store.variables().into_iter().map(|(key, tensor)| (key, tensor.kind())).collect();
    for (key, kind) in &kinds {
        let expected = if key == "num_batches_tracked" { Kind::Int64 } else { Kind::BFloat16 };
        assert_eq!(*kind, expected, "{key}");
    }
    assert_eq!(kinds.len(), 5);
    assert_eq!(norm.ws.unwrap().kind(), Kind::BFloat16);
}

#[test]
fn constructors_of_tchs_names_make_the_same_layers() {
    check("linear", |p| nn::linear(p, 5, 3, Default::default()), one);
    check("linear_no_bias", |p| nn::linear(p, 5, 3, nn::LinearConfig { bias: false }), one);
    let config = nn::ConvConfig { groups: 4, bias: false, ..Default::default() };
    check("conv2d_groups", |p| nn::conv2d(p, 4, 4, 3, config), one);
    check("batch_norm1d", |p| nn::batch_norm1d(p, 3, Default::default()), one);
    check("batch_norm2d", |p| -> nn::BatchNorm { nn::batch_norm2d(p, 3, Default::default()) }, one);
    check("layer_norm", |p| nn::layer_norm(p, vec![6], Default::default()), one);
    check("embedding", |p| nn::embedding(p, 3, 4, Default::default()), one);
    check("embedding_padding", |p| nn::embedding(p, 7, 5, nn::EmbeddingConfig { padding_idx: 5 }), one);
}

#[test]
fn sequences_of_layers_are_modules() {
    let (_guard, store) = seeded_store(Device::Cpu);
    let p = store.root();
    let net = nn::seq_t()
        .add(nn::Conv2d::new(&p / 0, 1, 2, 3))
        .add(nn::BatchNorm2d::new(&p / 1, 2))
        .add_fn(Tensor::relu)
        .add(nn::Dropout::new(0.5));
    let x = Tensor::ones([2, 1, 4, 4], (Kind::Float, Device::Cpu));
    assert_eq!(x.apply_t(&net, true).size(), [2, 2, 2, 2]);
    let head = nn::seq().add(nn::Linear::new(&p / "head", 8, 3));
    assert_eq!(x.apply_t(&net, false).flatten(1, -1).apply(&head).size(), [2, 3]);
    assert!(store.variables().contains_key("1.num_batches_tracked"));
    assert_eq!(head.forward(&Tensor::ones([1, 8], (Kind::Float, Device::Cpu))).size(), [1, 3]);
}

// ANCHOR: block
struct Block {
    conv: nn::Conv2d,
    norm: nn::BatchNorm2d,
}

impl Block {
    fn new(path: &nn::Path, width: i64) -> Self {
        Self {
            conv: nn::Conv2d::options(width, width, 3).padding(1).bias(false).build(path / "conv"),
            norm: nn::BatchNorm2d::new(path / "norm", width),
        }
    }

    fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        (x + x.apply(&self.conv).apply_t(&self.norm, train)).relu()
    }
}
// ANCHOR_END: block

/// Runs the code that docs/nn.md shows.
#[test]
fn examples_of_the_book_run() {
    let (_guard, store) = seeded_store(Device::Cpu);
    let (root, train) = (store.root(), true);
    let path = &root;
    // ANCHOR: make
    // With PyTorch's defaults.
    let fc = nn::Linear::new(path / "fc", 320, 50);
    // With options. Sizes are one number, or one for each dimension.
    let conv = nn::Conv2d::options(3, 64, 7).stride(2).padding([3, 3]).bias(false).build(path / "conv");
    // ANCHOR_END: make
    let floats = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    assert_eq!(floats(&[2, 320]).apply(&fc).size(), [2, 50]);
    assert_eq!(floats(&[1, 3, 32, 32]).apply(&conv).size(), [1, 64, 16, 16]);

    let lstm = nn::LSTM::options(8, 8).batch_first(true).build(path / "lstm");
    let attention = nn::MultiheadAttention::options(8, 2).batch_first(true).build(path / "attention");
    let (tokens, more) = (floats(&[2, 5, 8]), floats(&[2, 3, 8]));
    // ANCHOR: call
    let (output, (hidden, cell)) = lstm.forward_t(&tokens, None, train);
    let (next, _) = lstm.forward_t(&more, Some(&(hidden, cell)), train);

    let mask = nn::AttentionMask::causal();
    let seen = attention.forward_t(&tokens, &tokens, &tokens, &mask, train);
    // ANCHOR_END: call
    assert_eq!([output.size(), next.size(), seen.size()], [[2, 5, 8], [2, 3, 8], [2, 5, 8]]);

    let block = Block::new(&(path / "block"), 4);
    assert_eq!(block.forward(&floats(&[2, 4, 6, 6]), train).size(), [2, 4, 6, 6]);
}
