//! Command lines that cannot be carried out.

use std::net::TcpListener;

use crate::TWO;
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

#[test]
fn values_that_cannot_mean_anything_end_with_2_before_anything_is_started() {
    let long = "x".repeat(201);
    for (options, words) in [
        (&["--tee", "9:3"][..], &["--tee", "no local rank 9", "0 to 1"][..]),
        (&["--redirects", "2:1"], &["--redirects", "no local rank 2"]),
        (&["--local-ranks-filter", "5"], &["--local-ranks-filter", "no local rank 5"]),
        (&["--local-ranks-filter", "0,,1"], &["--local-ranks-filter", "``"]),
        (&["--tee", "0:1,0:2"], &["--tee", "rank 0 twice"]),
        (&["--redirects", "0:1,"], &["--redirects", "``"]),
        (&["--spares", "1000000"], &["--spares", "at most 4096"]),
        (&["--preempt-notice", "http://"], &["--preempt-notice", "no host"]),
        (&["--preempt-notice", "http://host:99999/"], &["--preempt-notice", "99999"]),
        (&["--rdzv-endpoint", "a:1", "--master-addr", "b"], &["--rdzv-endpoint", "--master-addr b"]),
        (&["--rdzv-endpoint", "a:1", "--master-port", "2"], &["--rdzv-endpoint", "--master-port 2"]),
        (&["--rdzv-endpoint", ""], &["--rdzv-endpoint", "HOST:PORT"]),
        (&["--rdzv-conf", "join_timeout=3,,is_host=1"], &["--rdzv-conf", "KEY=VALUE"]),
        (&["--run-id", "a\nb"], &["--run-id", "\"a\\nb\"", "control characters"]),
        (&["--run-id", "a\u{7f}b"], &["--run-id", "control characters"]),
        (&["--run-id", ""], &["--run-id", "empty"]),
        (&["--run-id", &long], &["--run-id", "at most 200"]),
        (&["--role", "a\tb"], &["--role", "control characters"]),
        (&["--log-prefix", "${nonsense}"], &["--log-prefix", "${nonsense}", "${hostname}"]),
        (&["--log-line-prefix-template", "${rank"], &["--log-prefix", "`${rank`"]),
        (&["--hang-timeout", "-1"], &["'-1'", "--hang-timeout", "number of seconds from 0"]),
        (&["--hang-timeout", "nan"], &["'nan'", "--hang-timeout"]),
        (&["--shutdown-timeout", "inf"], &["'inf'", "--shutdown-timeout"]),
        (&["--restart-backoff", "-0.5"], &["'-0.5'", "--restart-backoff"]),
        (&["--restart-window", "0"], &["--restart-window", "leave it out"]),
        (&["--max-restarts", "-1"], &["'-1'", "--max-restarts", "from 0 to 4294967295"]),
        (&["--max-restarts", "4294967296"], &["--max-restarts", "from 0 to 4294967295"]),
        (&["--spares", ""], &["--spares", "whole number"]),
        (&["--log-keep", "+1"], &["'+1'", "--log-keep"]),
        (&["--log-keep", "4294967295"], &["--log-keep", "at most 1000"]),
        (&["--master-port", "65536"], &["--master-port", "from 0 to 65535"]),
        (&["--master-addr", ""], &["--master-addr", "host name"]),
        (&["--node-rank", "-1", "--nnodes", "2"], &["'-1'", "--node-rank"]),
        (&["--nnodes", "+2"], &["--nnodes", "`+2`"]),
        (&["--nnodes", "1:1000000"], &["--nnodes", "at most 100000"]),
        (&["--nnodes", "2", "--node-rank", "0", "--master-port", "0"], &["--master-port", "free port"]),
        (&["--omp-num-threads", "0"], &["--omp-num-threads"]),
        (&["--omp-num-threads", "100000"], &["--omp-num-threads", "100000"]),
        (&["--fatal-exit-codes", "0"], &["--fatal-exit-codes", "has not failed"]),
        (&["--fatal-exit-codes", "2,,3"], &["--fatal-exit-codes", "``"]),
        (&["--requeue-exit-code", "-1"], &["'-1'", "--requeue-exit-code"]),
        (&["--requeue-exit-code", "0"], &["--requeue-exit-code"]),
        (&["--signals-to-handle", "SIGTERM,"], &["--signals-to-handle", "empty part"]),
        (&["--signals-to-handle", "SIGBREAK"], &["--signals-to-handle", "SIGBREAK"]),
        (&["--duplicate-stdout-filters", "a,"], &["--duplicate-stdout-filters", "empty part"]),
        (&["--log-dir", ""], &["--log-dir", "a value is required"]),
        (&["--events", ""], &["--events", "a value is required"]),
        (&["--progress-interval", "-1"], &["'-1'", "--progress-interval"]),
        (&["--log-max-size", "0"], &["--log-max-size", "`0`"]),
    ] {
        let outcome = run(launch(&[&TWO[..], options].concat(), "echo started"));
        assert!(outcome.expect(2, words).stdout.is_empty(), "{outcome:#?}");
        assert!(!outcome.stderr.contains("use '-- "), "{outcome:#?}");
    }
    let mut command = launch(&TWO, "echo started");
    command.env("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "${what}");
    run(command).expect(2, &["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "${what}"]);
    run(launch(&["--nproc-per-node", "5000"], "echo started")).expect(2, &["--nproc-per-node", "4096"]);
}

#[test]
fn short_help_fits_a_terminal_and_long_help_has_everything() {
    let help = |flag: &str| {
        let mut command = ice_launch();
        command.arg(flag).env("COLUMNS", "80");
        run(command).expect(0, &[]).stdout.clone()
    };
    let (short, long) = (help("-h"), help("--help"));
    assert!(short.len() <= 24, "{} lines: {short:#?}", short.len());
    assert!(short.iter().all(|line| line.chars().count() <= 80), "{short:#?}");
    let options = |lines: &[String]| lines.iter().filter(|line| line.trim_start().starts_with('-')).count();
    assert!((12..=16).contains(&options(&short)), "{short:#?}");
    assert_eq!(short.iter().filter(|line| line.starts_with("  ice-launch ")).count(), 3, "{short:#?}");
    for part in ["Ranks:", "Nodes:", "Failures:", "Output:", "--numa-binding", "--rdzv-conf", "Exit codes"] {
        assert!(long.iter().any(|line| line.contains(part)), "{part}: {long:#?}");
    }
}

#[test]
fn help_of_the_program_is_the_programs() {
    let mut command = ice_launch();
    command.args(["--devices", "cpu", "echo", "-h", "--help"]);
    assert_eq!(run(command).expect(0, &[]).stdout, ["-h --help"]);
}
