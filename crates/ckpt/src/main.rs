//! `ice-ckpt`: inspects checkpoints, and copies parameters out of them and into them. It needs no
//! libtorch.

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
    /// Lists the checkpoints in a folder, the newest last. The folder is a run's, or one with runs
    /// in it, or one with checkpoints in it.
    List {
        /// The folder.
        dir: PathBuf,
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
    },
    /// Prints the manifest of a checkpoint. Its tensors are not read.
    Inspect {
        /// The checkpoint's folder.
        checkpoint: PathBuf,
        /// Print all tensors' names, dtypes and shapes too.
        #[arg(long)]
        keys: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Reads checkpoints whole and reports damage. The exit code is 1 if any of them is damaged.
    Verify {
        /// Folders of checkpoints.
        #[arg(required = true)]
        checkpoints: Vec<PathBuf>,
    },
    /// Compares two checkpoints: keys, shapes, dtypes and values. The exit code is 1 if they
    /// differ.
    Diff {
        /// One checkpoint.
        a: PathBuf,
        /// The other.
        b: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Writes the tensors of a checkpoint into one safetensors file, however many files hold them.
    Export {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// The file. It must not exist yet.
        file: PathBuf,
        /// The optimizers' state too.
        #[arg(long)]
        optimizer: bool,
        /// Only the tensors of this node, without its name in their keys, as PyTorch's module has
        /// them.
        #[arg(long, value_name = "NAME")]
        node: Option<String>,
    },
    /// Makes a checkpoint from a safetensors file, to load parameters from.
    Import {
        /// The file.
        file: PathBuf,
        /// The checkpoint's folder. It must not exist yet.
        checkpoint: PathBuf,
        /// The node that the parameters belong to. Their keys get its name as a prefix.
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
