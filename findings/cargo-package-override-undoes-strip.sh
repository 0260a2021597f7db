#!/usr/bin/env bash
# An override of a profile for one package also undoes the profile's strip = "symbols" for that package's programs.
#
# Expected: a package's table below [profile.release.package] changes the settings that it names, and all others come from
# [profile.release]. So a program whose own package is built with opt-level = "s" is stripped as before.
# True: with the override, cargo passes strip=debuginfo to rustc, its default, and the program keeps its symbol table. It is all the
# same whether the override names opt-level or codegen-units. An override of a dependency changes nothing for the program. The program
# is stripped again once the override itself says strip = "symbols". A launcher of 6 MB was 8 MB until its override said so.

set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
unset CARGO_TARGET_DIR RUSTFLAGS
cargo new --quiet --vcs none --lib part
cargo new --quiet --vcs none --bin program

# symbols OVERRIDE: the number of symbols of the program with this table of overrides
symbols() {
    cat >program/Cargo.toml <<TOML
[package]
name = "program"
version = "0.1.0"
edition = "2024"

[dependencies]
part = { path = "../part" }

[profile.release]
strip = "symbols"

[profile.release.package]
$1
TOML
    (cd program && cargo build --quiet --offline --release)
    nm program/target/release/program 2>/dev/null | wc -l
}

cargo --version
failed=0
# check WANTED TABLE: the number of symbols is zero or is not
check() {
    local found
    found=$(symbols "$2")
    printf '%-55s %6d symbols\n' "${2:-no override}" "$found"
    case $1 in
        none) [ "$found" -eq 0 ] || failed=1 ;;
        some) [ "$found" -gt 100 ] || failed=1 ;;
    esac
}
check none ''
check none 'part = { opt-level = "s" }'
check some 'program = { opt-level = "s" }'
check some 'program = { codegen-units = 1 }'
check none 'program = { opt-level = "s", strip = "symbols" }'
[ "$failed" = 0 ] || {
    echo "cargo behaves otherwise than in 1.95.0"
    exit 1
}
