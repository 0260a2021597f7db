//! Lets the examples find libtorch at run time: a link argument of a dependency does not apply to
//! them. For the same reason, a program's build script gets the folder as `DEP_ICE_LIBTORCH_LIB`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Ok(lib) = std::env::var("DEP_ICE_C10D_LIBTORCH_LIB") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
        println!("cargo::metadata=LIBTORCH_LIB={lib}");
    }
}
