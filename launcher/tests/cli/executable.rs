//! Ranks run the program that the job was started with, and the Python that the launcher belongs
//! to.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::tempdir;

use crate::support::{Gate, Job, copy, executable, ice_launch, run, without_ours};

/// Returns a job whose program prints its first argument, or its own name, and fails at first.
fn failing(program: &Path, replaced: &str) -> Command {
    let mut command = ice_launch();
    command.args(["--devices", "cpu", "--max-restarts", "1"]).arg(program);
    command.args(["-c", "echo \"$0 of $TORCHELASTIC_RESTART_COUNT\"; read -r go < $GATE; exit $((3 * (1 - TORCHELASTIC_RESTART_COUNT)))", replaced]);
    command
}

/// Copies a real shell into the folder, so that the test can replace it.
fn shell(folder: &Path) -> std::path::PathBuf {
    let shell = folder.join("shell");
    copy("/bin/sh", &shell);
    shell
}

#[test]
fn replaced_or_removed_executable_is_started_as_it_was() {
    for replace in [true, false] {
        let folder = tempdir().unwrap();
        let program = shell(folder.path());
        let mut command = failing(&program, "shell");
        let gate = Gate::new(&mut command);
        let mut job = Job::start(command);
        job.expect_line("shell of 0");
        if replace {
            let other = folder.path().join("other");
            executable(&other, "#!/bin/sh\necho another program\nexit 1\n");
            fs::rename(&other, &program).unwrap();
        } else {
            fs::remove_file(&program).unwrap();
        }
        gate.open();
        job.expect_line("shell of 1");
        gate.open();
        let how = if replace { "replaced" } else { "removed" };
        let said =
            format!("shell` has been {how} since the job started: ranks start from the file that it was");
        job.finish().expect(0, &[&said]);
    }
}

#[test]
fn script_that_has_changed_runs_with_its_new_text_and_that_is_said() {
    let folder = tempdir().unwrap();
    let script = folder.path().join("train.sh");
    executable(&script, "#!/bin/sh\necho old; read -r go < $GATE; exit 3\n");
    let mut command = ice_launch();
    command.args(["--devices", "cpu", "--max-restarts", "1"]).arg(&script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    job.expect_line("old");
    executable(&script, "#!/bin/sh\necho the new text\n");
    gate.open();
    job.expect_line("the new text");
    job.finish()
        .expect(0, &["train.sh` has been changed since the job started: ranks start with its new content"]);
}

#[test]
fn launcher_in_an_environment_that_is_not_activated_takes_its_python() {
    for marker in ["pyvenv.cfg", "conda-meta/history"] {
        let folder = tempdir().unwrap();
        let bin = folder.path().join("bin");
        fs::create_dir_all(&bin).unwrap();
        let marker = folder.path().join(marker);
        fs::create_dir_all(marker.parent().unwrap()).unwrap();
        fs::write(marker, "").unwrap();
        let launcher = bin.join("ice-launch");
        copy(env!("CARGO_BIN_EXE_ice-launch"), &launcher);
        // A shell under the name of a Python, which only prints its own name.
        copy("/bin/sh", &bin.join("python3"));
        let script = folder.path().join("train.py");
        fs::write(&script, "echo \"by $0\"\n").unwrap();
        let mut command = without_ours(Command::new(&launcher));
        command.env_remove("VIRTUAL_ENV").env_remove("CONDA_PREFIX").env_remove("PYTHON_EXEC");
        command.args(["--devices", "cpu"]).arg(&script);
        let finished = run(command);
        finished.expect(0, &[]);
        assert_eq!(finished.stdout, [format!("by {}", script.display())], "{finished:#?}");
    }
}
