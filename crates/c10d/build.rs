//! Compiles the C++ shim against the libtorch in `LIBTORCH`. If the CUDA headers are next to that
//! libtorch, also compiles the NCCL half as a separate shared object.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs};

/// The release that tch and the layout of the gloo stubs support.
const TORCH_VERSION: &str = "2.13.0";
const SOURCES: [&str; 8] = [
    "cpp/error.cpp",
    "cpp/store.cpp",
    "cpp/group.cpp",
    "cpp/reducer.cpp",
    "cpp/batch_norm.cpp",
    "cpp/optim.cpp",
    "cpp/amp.cpp",
    "cpp/script.cpp",
];
const HEADERS: [&str; 3] = ["cpp/shim.h", "cpp/shim_internal.h", "cpp/gloo-stubs"];
const NCCL_SOURCES: [&str; 2] = ["cpp/nccl.cpp", "cpp/error.cpp"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    for path in SOURCES.iter().chain(&HEADERS).chain(&NCCL_SOURCES) {
        println!("cargo:rerun-if-changed={path}");
    }
    let libtorch = match libtorch() {
        Ok(libtorch) => libtorch,
        Err(problem) => {
            let scripts = manifest_dir().join("../../scripts");
            let scripts = fs::canonicalize(&scripts).unwrap_or(scripts);
            eprintln!("{problem}: libtorch {TORCH_VERSION} is needed");
            eprintln!(
                "hint: in a project of your own run {0}/ice-setup, in the checkout {0}/setup",
                scripts.display()
            );
            exit(1);
        }
    };
    println!("cargo:rustc-env=ICE_TORCH_VERSION={TORCH_VERSION}");

    let lib = libtorch.join("lib");
    compiler(&libtorch)
        .define("USE_C10D_GLOO", None)
        .include("cpp/gloo-stubs")
        .file(one_unit())
        .compile("ice_c10d_shim");
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo:libtorch_lib={}", lib.display());

    let nccl = cuda_includes(&libtorch).map(|includes| compile_nccl(&libtorch, &includes));
    let nccl = nccl.map(|path| path.display().to_string()).unwrap_or_default();
    println!("cargo:rustc-env=ICE_NCCL_BUILT={nccl}");
}

/// Returns the verified libtorch to build against, with every symbolic link resolved: it becomes
/// the run-time search path.
fn libtorch() -> Result<PathBuf, String> {
    let named = env::var_os("LIBTORCH").filter(|value| !value.is_empty());
    let named = PathBuf::from(named.ok_or("LIBTORCH is not set")?);
    let libtorch = fs::canonicalize(&named)
        .map_err(|error| format!("LIBTORCH names {}, which cannot be opened ({error})", named.display()))?;
    let header = named.join("include/torch/headeronly/version.h");
    // Uses the path through the symbolic link: if the link changes to another libtorch, this header
    // is a newer file.
    println!("cargo:rerun-if-changed={}", header.display());
    let text = fs::read_to_string(&header).map_err(|error| {
        format!("{} holds no usable libtorch: {} ({error})", named.display(), header.display())
    })?;
    let part = |name: &str| -> Result<&str, String> {
        let value =
            text.lines().find_map(|line| line.strip_prefix("#define TORCH_VERSION_")?.strip_prefix(name));
        value.map(str::trim).ok_or(format!("{} names no {name} version", header.display()))
    };
    let found = format!("{}.{}.{}", part("MAJOR ")?, part("MINOR ")?, part("PATCH ")?);
    if found != TORCH_VERSION {
        return Err(format!("{} is libtorch {found}, but {TORCH_VERSION} is needed", named.display()));
    }
    Ok(libtorch)
}

/// Writes a file that includes all sources. libtorch's headers take 9 of the 12 s that each source
/// needs alone, so that one translation unit takes less than a third of the total time.
fn one_unit() -> PathBuf {
    let folder = manifest_dir();
    let lines = SOURCES.map(|source| format!("#include \"{}\"\n", folder.join(source).display()));
    let path = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("shim.cpp");
    fs::write(&path, lines.concat()).expect("cargo makes OUT_DIR");
    path
}

fn manifest_dir() -> PathBuf {
    PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"))
}

fn compiler(libtorch: &Path) -> cc::Build {
    let include = libtorch.join("include");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .pic(true)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .flag("-fvisibility=hidden")
        .flag("-fvisibility-inlines-hidden")
        // libtorch's headers cause many warnings. -isystem silences them and keeps the shim's own
        // warnings.
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include"))
        .flag("-isystem")
        .flag(include)
        .flag("-Wno-unused-parameter")
        .opt_level(1)
        .debug(false);
    build
}

/// Returns the include folders of CUDA and NCCL next to this libtorch, if all exist.
fn cuda_includes(libtorch: &Path) -> Option<Vec<PathBuf>> {
    let nvidia = libtorch.parent()?.join("nvidia");
    let cuda = nvidia.join("cu13/include");
    let nccl = nvidia.join("nccl/include");
    let all = ["cuda_runtime_api.h", "crt/host_defines.h", "cublas_v2.h", "cusparse.h", "cusolverDn.h"];
    let whole = all.iter().all(|header| cuda.join(header).is_file()) && nccl.join("nccl.h").is_file();
    let cccl = cuda.join("cccl");
    whole.then(|| vec![cuda, cccl, nccl])
}

/// Links the NCCL half, and returns the path of the shared object.
fn compile_nccl(libtorch: &Path, includes: &[PathBuf]) -> PathBuf {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("libice_nccl.so");
    let lib = libtorch.join("lib");
    let mut build = compiler(libtorch);
    build.define("USE_C10D_NCCL", None).cargo_metadata(false);
    for include in includes {
        build.flag("-isystem").flag(include);
    }
    let objects = build.files(NCCL_SOURCES).compile_intermediates();
    let mut command: Command = build.get_compiler().to_command();
    command.arg("-shared").arg("-o").arg(&out).args(objects).arg("-L").arg(&lib);
    command.args(["-Wl,--no-as-needed", "-ltorch_cuda", "-lc10_cuda", "-ltorch_cpu", "-lc10"]);
    command.arg(format!("-Wl,-rpath,{}", lib.display()));
    let status = command.status().expect("the C++ compiler has just run");
    assert!(status.success(), "linking {} failed: {status}", out.display());
    out
}
