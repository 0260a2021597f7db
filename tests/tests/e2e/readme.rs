//! Every command of the README works. Each command is either run here, made small and adapted to
//! this machine, or listed with the place that runs it. A new command that is neither is an error.

use std::fs;
use std::path::Path;

use tempfile::tempdir;

use crate::support::{Program, SOON, TRAINING, built, free_port, mnist_data, root, shell_script};

/// Commands that are not run here, with the script that runs them.
const ELSEWHERE: [(&str, &str); 5] = [
    ("scripts/test", "runs these tests"),
    ("scripts/fetch-text", "scripts/check-parity"),
    ("scripts/setup --peer", "scripts/test, in CI"),
    ("scripts/setup --peer-newest", "whoever compares with the newest torchrun"),
    ("scripts/setup --cuda", "nobody: 4.7 GB; it differs from --peer in where a link leads to"),
];

/// Returns the commands of code blocks, without their comments.
fn commands(readme: &str) -> Vec<String> {
    let code = readme.lines().filter_map(|line| line.strip_prefix("$ "));
    let command = |line: &str| line.split(" #").next().unwrap_or_default().trim().to_owned();
    code.map(command).collect()
}

#[test]
fn every_command_of_the_readme_works() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let folder = tempdir().unwrap();
    fs::write(
        folder.path().join("train.py"),
        "import os, sys\nsys.stdout.write(f\"rank {os.environ['RANK']}\\n\")\n",
    )
    .unwrap();
    shell_script(folder.path(), "a-program", "echo rank $RANK");
    let commands = commands(&readme);
    assert!(commands.len() > 10, "{commands:?}");
    for command in commands {
        println!("{command}");
        let words: Vec<&str> = command.split_whitespace().collect();
        match words[..] {
            ["ice-launch", ref words @ ..] => launch(words, folder.path()),
            ["cargo", "run", "--release", "--example", example, "--", ref words @ ..] => {
                train(example, words, folder.path())
            }
            ["scripts/demo"] => demo(folder.path()),
            _ if ELSEWHERE.iter().any(|(known, _)| *known == command) => {}
            _ => panic!("the README has the command `{command}`, which no test runs"),
        }
    }
}

/// Launches ranks on this machine, with a CPU for each GPU. A command for two nodes is run by two
/// agents.
fn launch(words: &[&str], folder: &Path) {
    let nodes = if words.contains(&"2") && words.contains(&"--nnodes") { 2 } else { 1 };
    let port = free_port().to_string();
    let agent = |node: usize| {
        let mut last = "";
        let words: Vec<String> = words
            .iter()
            .map(|word| match (std::mem::replace(&mut last, word), *word) {
                ("--devices", "cuda") => "cpu:0".into(),
                ("--devices", devices) => devices.replace("cuda", "cpu"),
                ("--node-rank", _) => node.to_string(),
                ("--master-addr", _) => "127.0.0.1".into(),
                ("--master-port", _) => port.clone(),
                ("--rdzv-endpoint", _) => format!("127.0.0.1:{port}"),
                (_, program @ ("train.py" | "./a-program")) => {
                    folder.join(program).to_str().unwrap().to_owned()
                }
                (_, word) => word.to_owned(),
            })
            .collect();
        Program::ice_launch(words).start()
    };
    let agents: Vec<_> = (0..nodes).map(agent).collect();
    let mut ranks: Vec<String> = Vec::new();
    for agent in agents {
        let outcome = agent.finish(SOON);
        outcome.expect_code(0);
        ranks.extend(outcome.stdout.lines().map(ToOwned::to_owned));
    }
    ranks.sort();
    let expected: Vec<String> = (0..ranks.len()).map(|rank| format!("rank {rank}")).collect();
    assert!(ranks.len() >= 2 && ranks == expected, "{words:?} ran {ranks:?}");
}

/// Runs a few steps of an example that launches itself, always in the same output folder, like for
/// a reader of the README.
fn train(example: &str, words: &[&str], folder: &Path) {
    let out = folder.join(example);
    let license = root().join("LICENSE-APACHE");
    let program = Program::new(built(example)).args(words).args(["--out-dir".as_ref(), out.as_os_str()]);
    let program = match example {
        "mnist" => program.args(["--epochs", "1", "--steps", "3", "--data"]).arg(mnist_data()),
        "gpt" => program
            .args(["--layers", "1", "--width", "32", "--context", "16", "--steps", "3", "--eval-every", "3"])
            .arg("--text")
            .arg(license),
        _ => panic!("the README has the example `{example}`, which is not known here"),
    };
    let outcome = program.run(TRAINING);
    outcome.expect_code(0);
    if words.contains(&"--resume-from") {
        assert!(outcome.stdout.starts_with("resuming from "), "{}", outcome.transcript());
    }
}

fn demo(folder: &Path) {
    let options = ["--debug", "--epochs", "1", "--steps", "20", "--out-dir"];
    let outcome =
        Program::new(root().join("scripts/demo")).args(options).arg(folder.join("demo")).run(TRAINING);
    outcome.expect_code(0);
    assert!(outcome.last_line().starts_with("val accuracy 0."), "{}", outcome.transcript());
}
