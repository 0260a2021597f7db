//! Command lines that cannot be carried out.

use std::net::TcpListener;

use crate::support::{ice_launch, launch, run};

#[test]
fn usage_errors_end_with_2_before_anything_is_started() {
    for (options, words) in [
        (&["--devices", "tpu"][..], &["--devices", "`tpu`", "cuda:0-2,7"][..]),
        (&["--devices", "cpu:2-1"], &["--devices", "`2-1`"]),
        (&["--devices", "cpu", "--nnodes", "0"], &["--nnodes", "`0`"]),
        (&["--devices", "cpu", "--nnodes", "2"], &["--node-rank"]),
        (&["--devices", "cpu", "--tee", "4"], &["--tee", "`4`"]),
        (&["--devices", "cpu", "--dist-backend", "mpi"], &["--dist-backend", "`mpi`"]),
        (&["--devices", "cpu", "--rdzv-tls"], &["--rdzv-tls", "openssl rand", "--rdzv-token-file token"]),
        (&["--devises", "cpu"], &["--devices"]),
    ] {
        let outcome = run(launch(options, "echo started"));
        assert!(outcome.expect(2, words).stdout.is_empty(), "{outcome:#?}");
    }
    let mut command = ice_launch();
    command.args(["--devices", "cpu", "no-such-program-anywhere"]);
    run(command).expect(2, &["`no-such-program-anywhere`", "PATH"]);
}

#[test]
fn a_gpu_that_is_not_there_is_a_usage_error() {
    let mut command = launch(&["--devices", "cuda:4095"], "echo started");
    command.env("CUDA_VISIBLE_DEVICES", "0");
    assert!(run(command).expect(2, &["--devices", "cuda:4095", "this node has"]).stdout.is_empty());
}

#[test]
fn a_busy_port_is_a_usage_error() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let outcome = run(launch(&["--devices", "cpu", "--master-port", &port], "echo started"));
    assert!(outcome.expect(2, &[&port, "--master-port"]).stdout.is_empty());
}
