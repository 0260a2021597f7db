#!/usr/bin/env bash
# cargo compiles ring again when it runs inside a test, or after a tool that sets SOURCE_DATE_EPOCH.
#
# Expected: a `cargo build` that a test starts, with the same profile, features and target folder as the cargo
# that runs the test, finds everything built. Nor does a packaging tool's SOURCE_DATE_EPOCH change a crate whose
# object files carry no dates.
# True: ring's build script reports every variable that it reads to cargo, among them OUT_DIR, CARGO_MANIFEST_DIR
# and CARGO_PKG_NAME, which cargo sets for the build script itself. Cargo compares them with its own environment,
# and a test's has the values of the tested package. So ring, its C code and assembler, and all crates above it
# (rustls, HTTP clients) are compiled in the test, and again by the next command in the shell. The cc crate
# asks the same for SOURCE_DATE_EPOCH. Remedy: remove these variables from the environment of the inner cargo.

set -euo pipefail

readonly RING=0.17.14 CC=1.11.3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/probe/src"
cd "$work/probe"
printf '[package]\nname = "probe"\nversion = "0.1.0"\nedition = "2021"\n\n[dependencies]\nring = "=%s"\n' "$RING" >Cargo.toml
echo 'pub fn random() -> ring::rand::SystemRandom { ring::rand::SystemRandom::new() }' >src/lib.rs
unset SOURCE_DATE_EPOCH OUT_DIR CARGO_MANIFEST_DIR
export CARGO_TARGET_DIR=$work/target
cargo update --quiet --package cc --precise "$CC"
cargo --version
cargo build --quiet

# reason [NAME=VALUE]: why a build in this environment compiles ring; nothing where it does not
reason() { env "$@" cargo build --verbose 2>&1 | sed -n 's/^ *Dirty ring v[^:]*: //p'; }

failed=0
# expect WHAT FOUND WANTED
expect() {
    printf '%-34s %s\n' "$1:" "${2:-nothing is compiled}"
    [ "$2" = "$3" ] || failed=1
}
expect "the same environment" "$(reason)" ""
for variable in OUT_DIR CARGO_MANIFEST_DIR SOURCE_DATE_EPOCH; do
    expect "with $variable" "$(reason "$variable=1")" "the env variable $variable changed"
    expect "without it again" "$(reason)" "the env variable $variable changed"
done
exit "$failed"
