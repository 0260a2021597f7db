//! `ice-ckpt`: looks into checkpoints and moves parameters in and out of them. It needs no libtorch.

mod convert;
mod diff;
mod show;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "ice-ckpt",
    version,
    about = "Looks into checkpoints and moves parameters in and out of them"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The checkpoints in a folder, the newest last: a run's, one with runs in it, or one with checkpoints in it.
    List {
        /// The folder.
        dir: PathBuf,
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
    },
    /// What a checkpoint says about itself. Its files are not read through.
    Inspect {
        /// The checkpoint's folder.
        checkpoint: PathBuf,
        /// All tensors too.
        #[arg(long)]
        keys: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Reads checkpoints whole and says what is damaged. The exit code is 1 where something is.
    Verify {
        /// Folders of checkpoints.
        #[arg(required = true)]
        checkpoints: Vec<PathBuf>,
    },
    /// What differs between two checkpoints: keys, shapes, dtypes and values. The exit code is 1 where something does.
    Diff {
        /// One checkpoint.
        a: PathBuf,
        /// The other.
        b: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Writes the tensors of a checkpoint into one safetensors file, however many files they lie in.
    Export {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// The file; it must not be there yet.
        file: PathBuf,
        /// The optimizers' state too.
        #[arg(long)]
        optimizer: bool,
        /// The tensors of this node alone, without its name in their keys, as PyTorch's module has them.
        #[arg(long, value_name = "NAME")]
        node: Option<String>,
    },
    /// Makes a checkpoint of a safetensors file, to load parameters from.
    Import {
        /// The file.
        file: PathBuf,
        /// The checkpoint's folder; it must not be there yet.
        checkpoint: PathBuf,
        /// The node whose parameters they are: its name begins the keys.
        #[arg(long, value_name = "NAME")]
        node: Option<String>,
    },
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .without_time()
        .with_max_level(tracing_level())
        .init();
    let outcome = match Arguments::parse().command {
        Command::List { dir, json } => show::list(&dir, json),
        Command::Inspect { checkpoint, keys, json } => show::inspect(&checkpoint, keys, json),
        Command::Verify { checkpoints } => show::verify(&checkpoints),
        Command::Diff { a, b, json } => diff::diff(&a, &b, json),
        Command::Export { checkpoint, file, optimizer, node } => {
            convert::export(&checkpoint, &file, optimizer, node.as_deref())
        }
        Command::Import { file, checkpoint, node } => convert::import(&file, &checkpoint, node.as_deref()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn tracing_level() -> tracing_subscriber::filter::LevelFilter {
    tracing_subscriber::filter::LevelFilter::WARN
}
