#!/usr/bin/env bash
# A doc comment of a struct of shared options replaces the description of every program that flattens it.
#
# Expected: with clap's derive, `#[command(flatten)]` takes the arguments of a struct over, and the comment of that struct
# is documentation of its Rust type. A program that says `#[command(about = "Trains a model")]` shows that in --help.
# True: the comment of a struct that derives Args becomes the description of the command that flattens it. A program without
# a description of its own gets it. One with `about = …` keeps that in -h alone: if the comment has a second paragraph, clap makes it
# the long description, and --help shows the comment instead. The author of the options cannot see it in their own
# crate, nor can the author of the program in theirs. A doc comment on the program's struct, or `long_about = None` next to
# `about`, wins; in the shared struct, `#[doc = concat!("…")]` is a comment for rustdoc and not for clap.

set -euo pipefail

readonly CLAP=4.6.9
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/probe/src"
cd "$work/probe"
printf '[package]\nname = "probe"\nversion = "0.1.0"\nedition = "2021"\n\n[dependencies]\nclap = { version = "=%s", features = ["derive"] }\n' "$CLAP" >Cargo.toml
cat >src/main.rs <<'RUST'
#![allow(dead_code)]
use clap::{Args, CommandFactory, Parser};

/// Options of a run.
///
/// Each field is also a key of the configuration file.
#[derive(Args)]
struct Shared {
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Parser)]
struct Silent {
    #[command(flatten)]
    shared: Shared,
}

#[derive(Parser)]
#[command(about = "Trains a model")]
struct Described {
    #[command(flatten)]
    shared: Shared,
}

#[derive(Parser)]
#[command(about = "Trains a model", long_about = None)]
struct Guarded {
    #[command(flatten)]
    shared: Shared,
}

/// Trains a model
#[derive(Parser)]
struct Commented {
    #[command(flatten)]
    shared: Shared,
}

#[doc = concat!("Options of a run.")]
#[doc = concat!("")]
#[doc = concat!("Each field is also a key of the configuration file.")]
#[derive(Args)]
struct Hidden {
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Parser)]
#[command(about = "Trains a model")]
struct WithHidden {
    #[command(flatten)]
    hidden: Hidden,
}

fn shown<T: CommandFactory>(name: &str) {
    let first = |help: String| help.lines().next().unwrap_or_default().to_owned();
    let mut command = T::command();
    let (short, long) = (first(command.render_help().to_string()), first(command.render_long_help().to_string()));
    println!("{name}: -h {short:?}, --help {long:?}");
}

fn main() {
    shown::<Silent>("no description");
    shown::<Described>("about");
    shown::<Guarded>("about, long_about = None");
    shown::<Commented>("a comment");
    shown::<WithHidden>("about, concat! in the shared struct");
}
RUST
export CARGO_TARGET_DIR=$work/target
echo "clap $CLAP"
cargo run --quiet | tee "$work/found"
diff "$work/found" - <<'EXPECTED' || {
no description: -h "Options of a run", --help "Options of a run."
about: -h "Trains a model", --help "Options of a run."
about, long_about = None: -h "Trains a model", --help "Trains a model"
a comment: -h "Trains a model", --help "Trains a model"
about, concat! in the shared struct: -h "Trains a model", --help "Trains a model"
EXPECTED
    echo "CHANGED: the comment of a flattened struct is treated otherwise" >&2
    exit 1
}
