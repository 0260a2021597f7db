//! The job scripts of the documentation: the shell and the command line accept them, and they and the text name all variables that are read.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, iter};

use clap::Parser;
use ice_launch::cli::Cli;

const JOB_SCRIPTS: [&str; 2] = ["docs/examples/train.sbatch", "docs/examples/jobset.yaml"];

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file)
}

fn text(file: &str) -> String {
    fs::read_to_string(path(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// The arguments of the launcher in a job script, up to the `--` before the program. In a manifest each is an item of a list.
fn arguments(file: &str) -> Vec<String> {
    let text = text(file);
    let code = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let words = code.flat_map(str::split_whitespace).filter(|word| !["-", "\\"].contains(word));
    let arguments = words.skip_while(|word| *word != "ice-launch").skip(1).take_while(|word| *word != "--");
    arguments.map(|word| word.trim_matches(['"', '\'']).to_owned()).collect()
}

/// The variables that a module asks for by name.
fn variables(module: &str) -> Vec<String> {
    let text = text(&format!("launcher/src/cluster/{module}.rs"));
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let quoted = code.flat_map(|line| line.split('"').skip(1).step_by(2)).flat_map(|text| text.split(", "));
    let name = |text: &&str| {
        text.contains('_') && text.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    };
    let open_mpis_own = |text: &&str| text.starts_with("OMPI_MCA_");
    quoted.filter(|text| name(text) || open_mpis_own(text)).map(ToOwned::to_owned).collect()
}

#[test]
fn the_shell_accepts_the_batch_script() {
    let checked = Command::new("bash").arg("-n").arg(path("docs/examples/train.sbatch")).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn the_launcher_accepts_their_options() {
    let help = Command::new(env!("CARGO_BIN_EXE_ice-launch")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let known: Vec<_> = help.split_whitespace().map(|word| word.trim_end_matches(',')).collect();
    for file in JOB_SCRIPTS {
        let arguments = arguments(file);
        assert!(arguments.iter().any(|argument| argument == "--devices"), "{file}: {arguments:?}");
        for option in arguments.iter().filter(|argument| argument.starts_with('-')) {
            let option = option.split('=').next().unwrap();
            assert!(known.contains(&option), "{file}: {option}");
        }
        // What the cluster says is not said again.
        for option in ["--nnodes", "--node-rank", "--master-addr", "--master-port", "--run-id"] {
            assert!(!arguments.iter().any(|argument| argument.starts_with(option)), "{file}: {option}");
        }
        let line =
            iter::once("ice-launch").chain(arguments.iter().map(String::as_str)).chain(["--", "train"]);
        let cli = Cli::try_parse_from(line).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert_eq!(cli.command, ["train"], "{file}");
    }
}

#[test]
fn the_text_and_the_manifest_name_what_is_read() {
    let (guide, manifest) = (text("docs/clusters.md"), text("docs/examples/jobset.yaml"));
    for (module, fewest) in [("slurm", 15), ("mpi", 10), ("kubernetes", 8)] {
        let variables = variables(module);
        assert!(variables.len() >= fewest, "{module}: {variables:?}");
        for variable in variables {
            assert!(guide.contains(&variable), "docs/clusters.md: {variable}");
            assert!(module != "kubernetes" || manifest.contains(&variable), "jobset.yaml: {variable}");
        }
    }
}
