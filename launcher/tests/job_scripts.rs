//! The files of docs/examples and the commands of docs/clusters.md, which users copy. The launcher,
//! the programs, the shells and systemd accept them, and they name all variables that the launcher
//! reads.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use clap::{Arg, ArgAction, Args, CommandFactory, Parser, value_parser};
use ice_launch::cli::{Cli, LaunchArgs};

/// Jobs that Slurm or Kubernetes describes, so that options for nodes, ranks and endpoint are not
/// given.
const DESCRIBED: [&str; 4] = ["train.sbatch", "train-ddp.sbatch", "jobset.yaml", "trainjob.yaml"];
/// Other files that start a job. Some of them give a range of nodes or a run id.
const OTHERS: [&str; 5] =
    ["train-elastic.sbatch", "jobset-elastic.yaml", "pytorchjob.yaml", "pytorchjob-elastic.yaml", "train.sh"];
/// Variables that Slurm and systemd set and a script reads itself.
const OF_SCRIPTS: [&str; 2] = ["SLURM_CPUS_PER_TASK", "CREDENTIALS_DIRECTORY"];
/// Variables of the launcher that do not belong to an option.
const OF_LAUNCHER: [&str; 2] = ["ICE_RDZV_TOKEN", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"];

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file)
}

fn text(file: &str) -> String {
    fs::read_to_string(path(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn example(file: &str) -> String {
    text(&format!("docs/examples/{file}"))
}

fn examples() -> Vec<String> {
    let entries =
        fs::read_dir(path("docs/examples")).unwrap_or_else(|error| panic!("docs/examples: {error}"));
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// Returns the words of a shell's command, up to its end. A quoted part is one word.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in line.chars() {
        match quote {
            Some(mark) if c == mark => quote = None,
            None if c == '"' || c == '\'' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            None if "&;|>#".contains(c) && word.is_none() => break,
            None if c == ';' => break,
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// Returns the command lines of the launcher in a script, a manifest, a unit or a block of code.
fn commands(text: &str) -> Vec<Vec<String>> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let joined = code.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    let launcher = |word: &String| word.rsplit('/').next() == Some("ice-launch");
    let command = |line: &str| {
        let words = words(line);
        let first = words.iter().position(launcher)?;
        let rest = words[first + 1..].iter().filter(|word| *word != "…" && *word != "...");
        Some(rest.cloned().collect::<Vec<_>>())
    };
    joined
        .lines()
        .filter_map(command)
        .filter(|words| words.iter().any(|word| word.starts_with('-')))
        .collect()
}

/// Returns the code of a Markdown page: fences, indented lines, and spans between backticks.
fn code(page: &str) -> String {
    let (mut code, mut in_fence) = (String::new(), false);
    for line in page.lines() {
        if line.trim_start().starts_with("```") {
            in_fence = !in_fence;
        } else if in_fence || line.starts_with("    ") {
            code.push_str(line);
            code.push('\n');
        } else {
            for span in line.split('`').skip(1).step_by(2) {
                code.push_str(span);
                code.push('\n');
            }
        }
    }
    code
}

/// Parses a command line for a machine without GPUs and without the job's files.
fn parsed(place: &str, arguments: &[String], token: &Path) -> Cli {
    let mut arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
    if let Some(option) = arguments.iter().position(|argument| argument == "--rdzv-token-file") {
        arguments[option + 1] = token.into();
    }
    for argument in &mut arguments {
        if argument == "cuda:*" {
            *argument = "cpu".into();
        } else if let Some(name) = argument.to_str().and_then(|text| text.strip_prefix('$')) {
            // Variables of the scripts hold absolute paths.
            *argument = format!("/{name}").into();
        }
    }
    let line = || [OsString::from("ice-launch")].into_iter().chain(arguments.clone());
    // The text may leave out the program, but a file may not.
    let cli = Cli::try_parse_from(line()).or_else(|_| Cli::try_parse_from(line().chain(["true".into()])));
    cli.unwrap_or_else(|error| panic!("{place}: {arguments:?}: {error}"))
}

/// Checks values that clap does not check: devices, notices, lists, and contradicting options. The
/// program is replaced, because it is not on this machine.
fn check_plan(place: &str, mut cli: Cli) {
    cli.command = vec!["true".into()];
    // A cluster sets the node rank. Apart from that, no option may require another one.
    if cli.launch.nnodes.is_some() && cli.launch.rdzv.rdzv_backend.is_none() {
        cli.launch.node_rank = Some(0);
    }
    if let Err(error) = cli.plan() {
        panic!("{place}: {error}");
    }
}

/// Returns an option of the command line. clap keeps names for as long as the process lives.
fn option(name: String) -> Arg {
    let name: &'static str = name.leak();
    Arg::new(name).long(name)
}

/// Returns the options of a Rust program, read from the fields of the struct that clap derives them
/// from.
fn derived(source: &str) -> Vec<Arg> {
    let (mut options, mut is_option) = (Vec::new(), false);
    for line in source.lines().map(str::trim) {
        if line.starts_with("#[arg(") {
            is_option = line.contains("long");
        } else if let Some((name, kind)) = line.split_once(": ").filter(|_| is_option) {
            let option = option(name.trim_start_matches("pub ").replace('_', "-"));
            options.push(match kind.trim_end_matches(',') {
                "bool" => option.action(ArgAction::SetTrue),
                kind if kind.contains("u64") || kind.contains("size") => {
                    option.value_parser(value_parser!(u64))
                }
                "f64" => option.value_parser(value_parser!(f64)),
                _ => option,
            });
            is_option = false;
        }
    }
    options
}

/// Returns the options of `crates/ice/examples/mnist.rs`: its own, the runtime's, and the
/// launcher's.
fn mnist() -> clap::Command {
    let (own, run) = (text("crates/ice/examples/mnist.rs"), text("crates/ice/src/options.rs"));
    let (own, run) = (derived(&own), derived(&run));
    assert!(own.len() >= 7 && run.len() >= 12, "{own:?} {run:?}");
    LaunchArgs::augment_args(clap::Command::new("mnist").args(own).args(run))
}

/// Returns the options of `docs/examples/ddp.py`.
fn ddp() -> clap::Command {
    let source = example("ddp.py");
    let lines = source.lines().filter_map(|line| line.trim().strip_prefix("add(\"--")?.split_once('"'));
    let options: Vec<_> = lines
        .map(|(name, rest)| {
            let option = option(name.to_owned()).required(rest.contains("required=True"));
            if rest.contains("type=int") { option.value_parser(value_parser!(u64)) } else { option }
        })
        .collect();
    assert!(options.len() >= 5, "{options:?}");
    clap::Command::new("ddp.py").args(options)
}

/// Whether the command is one of the programs of this repository, whose arguments are then checked.
fn check_program(place: &str, command: &[OsString]) -> bool {
    let name = Path::new(&command[0]).file_name().unwrap_or_default();
    let program = match name.to_str() {
        Some("mnist") => mnist(),
        Some("ddp.py") => ddp(),
        _ => return false,
    };
    if let Err(error) = program.try_get_matches_from(command) {
        panic!("{place}: {command:?}: {error}");
    }
    true
}

/// Returns the variables that a module reads by name.
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

/// Returns words of a text that look like variables with such a prefix.
fn named(text: &str, prefixes: &[&str]) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let is_named = |word: &&str| prefixes.iter().any(|prefix| word.starts_with(prefix) && *word != *prefix);
    words.filter(is_named).map(ToOwned::to_owned).collect()
}

/// Returns scripts that a manifest passes to a shell: the blocks after a line `- |`.
fn embedded_scripts(manifest: &str) -> Vec<String> {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let lines: Vec<_> = manifest.lines().collect();
    let begins = lines.iter().enumerate().filter(|(_, line)| line.trim() == "- |");
    let script = |(index, line): (usize, &&str)| {
        let body = lines[index + 1..].iter().take_while(|next| indent(next) > indent(line));
        body.copied().collect::<Vec<_>>().join("\n")
    };
    begins.map(script).collect()
}

#[test]
fn shells_accept_the_scripts() {
    let accepts = |shell: &str, script: &str, place: &str| {
        let checked = Command::new(shell).args(["-n", "-c", script]).output().unwrap();
        assert!(checked.status.success(), "{place}: {}", String::from_utf8_lossy(&checked.stderr));
    };
    let mut embedded = 0;
    for file in examples() {
        let text = example(&file);
        match Path::new(&file).extension().and_then(|extension| extension.to_str()) {
            Some("sbatch") => accepts("bash", &text, &file),
            Some("sh") => accepts("sh", &text, &file),
            Some("yaml") => {
                for script in embedded_scripts(&text) {
                    accepts("sh", &script, &file);
                    embedded += 1;
                }
            }
            _ => {}
        }
    }
    assert_eq!(embedded, 5);
}

#[test]
fn launcher_and_programs_accept_the_options_of_the_examples() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    fs::write(&token, "0123456789abcdef0123456789abcdef").unwrap();
    for file in DESCRIBED.iter().chain(&OTHERS) {
        let commands = commands(&example(file));
        assert_eq!(commands.len(), 1, "{file}: {commands:?}");
        let cli = parsed(file, &commands[0], &token);
        let described = ["--nnodes", "--node-rank", "--master-addr", "--master-port", "--run-id"];
        let given = commands[0].iter().find(|argument| described.contains(&argument.as_str()));
        assert!(given.is_none() || !DESCRIBED.contains(file), "{file}: {given:?}");
        assert!(check_program(file, &cli.command), "{file}: {:?}", cli.command);
        // Failures lead to restarts, there is a source of notices, and saving has more time than by
        // default. An elastic PyTorchJob has its number of restarts in the manifest.
        let restarts = cli.launch.max_restarts > 0 || example(file).contains("maxRestarts: 4");
        let saves = cli.launch.shutdown_timeout > Some(30.0) && !cli.launch.preempt_notice.is_empty();
        assert!(restarts && saves, "{file}");
        check_plan(file, cli);
    }
    // No file of the folder is left out.
    let others = ["ddp.py", "elastic.py", "storage.yaml", "train.service"];
    let known: BTreeSet<_> = DESCRIBED.into_iter().chain(OTHERS).chain(others).map(str::to_owned).collect();
    assert_eq!(examples().into_iter().collect::<BTreeSet<_>>(), known);
}

#[test]
fn launcher_accepts_the_commands_of_the_text() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    fs::write(&token, "0123456789abcdef0123456789abcdef").unwrap();
    let commands = commands(&code(&text("docs/clusters.md")));
    assert!(commands.len() >= 3, "{commands:?}");
    for arguments in commands {
        let place = format!("docs/clusters.md: {arguments:?}");
        let cli = parsed(&place, &arguments, &token);
        check_program(&place, &cli.command);
        // TLS needs a token, which another line gives.
        if !cli.launch.rdzv_tls || cli.launch.rdzv_token_file.is_some() {
            check_plan(&place, cli);
        }
    }
}

#[test]
fn variables_of_the_examples_are_known() {
    let mut known: BTreeSet<_> =
        ["slurm", "mpi", "kubernetes"].iter().flat_map(|module| variables(module)).collect();
    known.extend(OF_SCRIPTS.iter().chain(&OF_LAUNCHER).map(|name| (*name).to_owned()));
    let command = Cli::command();
    let of_options = command.get_arguments().filter_map(|option| option.get_env()?.to_str());
    known.extend(of_options.map(ToOwned::to_owned));
    let prefixes =
        ["SLURM_", "PET_", "ICE_", "TORCH", "JOBSET_", "JOB_", "REPLICATED_", "MASTER_", "KUBERNETES_"];
    let mut checked = 0;
    for file in examples() {
        for variable in named(&example(&file), &prefixes) {
            assert!(known.contains(&variable), "{file}: {variable}");
            checked += 1;
        }
    }
    assert!(checked >= 30, "{checked}");
}

#[test]
fn the_text_and_the_manifest_name_what_is_read() {
    let (guide, manifest) = (text("docs/clusters.md"), example("jobset.yaml"));
    for (module, fewest) in [("slurm", 15), ("mpi", 10), ("kubernetes", 8)] {
        let variables = variables(module);
        assert!(variables.len() >= fewest, "{module}: {variables:?}");
        for variable in variables {
            // Of variables that differ only in their number, the text names the first one.
            let (name, number) = variable.rsplit_once('_').unwrap();
            let named = if number.parse::<u32>().is_ok() { format!("{name}_0") } else { variable.clone() };
            assert!(guide.contains(&named) || guide.contains(&variable), "docs/clusters.md: {variable}");
            assert!(module != "kubernetes" || manifest.contains(&variable), "jobset.yaml: {variable}");
        }
    }
    for file in examples() {
        assert!(guide.contains(&format!("(examples/{file})")), "docs/clusters.md: {file}");
    }
}

/// Returns the number after a key in a file.
fn number(text: &str, key: &str) -> u32 {
    let rest = text.split_once(key).unwrap_or_else(|| panic!("{key}")).1;
    let digits = rest.trim_start_matches([' ', '=', ':']).chars().map_while(|c| c.to_digit(10));
    digits.fold(0, |number, digit| number * 10 + digit)
}

#[test]
fn clusters_wait_for_longer_than_the_launcher() {
    for file in DESCRIBED.iter().chain(&OTHERS) {
        let text = example(file);
        let code: String = text.lines().filter(|l| !l.trim_start().starts_with("# ")).collect();
        let launcher = number(&code, "--shutdown-timeout");
        let cluster = match Path::new(file).extension().and_then(|extension| extension.to_str()) {
            Some("sbatch") => number(&code, "--signal=B:USR1@"),
            Some("yaml") => number(&code, "terminationGracePeriodSeconds"),
            _ => number(&example("train.service"), "\nTimeoutStopSec"),
        };
        assert!(cluster >= launcher + 30, "{file}: {cluster} s, and the launcher takes {launcher} s");
    }
}

/// A preempted launcher is started again, so each manager has to know its exit code.
#[test]
fn managers_start_preempted_jobs_again() {
    let cli = |file| parsed(file, &commands(&example(file))[0], Path::new("/dev/null"));
    for file in ["jobset.yaml", "jobset-elastic.yaml", "trainjob.yaml"] {
        let (code, manifest) = (cli(file).launch.requeue_exit_code, example(file));
        assert!(manifest.contains(&format!("values: [{code}]")), "{file}: {code}");
        assert!(manifest.contains("- type: DisruptionTarget"), "{file}");
    }
    for file in ["train.sbatch", "train-ddp.sbatch"] {
        let code = cli(file).launch.requeue_exit_code;
        assert!(example(file).contains(&format!("-ne {code} ] || scontrol requeue")), "{file}: {code}");
    }
    // IsRetryableExitCode of training-operator 1.9.
    for file in ["pytorchjob.yaml", "pytorchjob-elastic.yaml"] {
        let code = cli(file).launch.requeue_exit_code;
        assert!(code >= 128 && example(file).contains("restartPolicy: ExitCode"), "{file}: {code}");
    }
    let (code, unit) = (cli("train.sh").launch.requeue_exit_code, example("train.service"));
    assert!(unit.contains(&format!("\nRestartForceExitStatus={code}\n")), "{code}");
}

#[test]
fn systemd_accepts_the_unit() {
    let folder = tempfile::tempdir().unwrap();
    let unit = folder.path().join("train.service");
    // The program and the user exist only on another machine.
    let text = example("train.service").replace("/srv/train/train.sh", "/bin/true");
    fs::write(&unit, text).unwrap();
    let Ok(checked) = Command::new("systemd-analyze").arg("verify").arg(&unit).output() else {
        eprintln!("systemd-analyze is not here: the unit is not verified");
        return;
    };
    let said = String::from_utf8_lossy(&checked.stderr);
    let own: Vec<_> = said.lines().filter(|line| line.contains("train.service")).collect();
    assert!(checked.status.success() && own.is_empty(), "{own:?} {said}");
}
