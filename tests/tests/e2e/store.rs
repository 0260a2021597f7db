//! torch's own clients and what torch.distributed does through them, on the store that the launcher
//! serves.

use tempfile::tempdir;

use crate::support::{Finished, Program, SOON, peer, python_script};

/// How many cases a script has passed.
fn passed(outcome: &Finished) -> usize {
    outcome.stdout.lines().filter(|line| line.contains("ok ")).count()
}

#[test]
fn every_operation_of_torchs_client() {
    let Some(python) = peer("store::every_operation_of_torchs_client") else { return };
    let outcome = Program::ice_launch(["--devices", "cpu:0"])
        .arg(python)
        .arg(python_script("store_client.py"))
        .run(SOON * 2);
    outcome.expect_code(0);
    assert_eq!(passed(&outcome), 13, "{}", outcome.transcript());
}

#[test]
fn collectives_barriers_and_checkpoints() {
    let Some(python) = peer("store::collectives_barriers_and_checkpoints") else { return };
    let folder = tempdir().unwrap();
    let outcome = Program::ice_launch(["--devices", "cpu:0-3"])
        .arg(python)
        .arg(python_script("store_collectives.py"))
        .arg(folder.path())
        .run(SOON * 3);
    outcome.expect_code(0);
    assert_eq!(passed(&outcome), 6, "{}", outcome.transcript());
}

#[test]
fn what_torchs_own_store_answers() {
    let Some(python) = peer("store::what_torchs_own_store_answers") else { return };
    let outcome = Program::ice_launch(["--devices", "cpu:0"])
        .arg(python)
        .arg(python_script("store_differential.py"))
        .run(SOON * 2);
    outcome.expect_code(0);
    assert_eq!(passed(&outcome), 1, "{}", outcome.transcript());
}
