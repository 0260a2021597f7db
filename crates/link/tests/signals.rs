//! The actions of signals belong to the process. So each case runs in a process of its own: this
//! program again, with the name of the case in the variable `CHILD`.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "installs a handler as a program would")]

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use ice_link::process::signals;
use libc::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, c_int};

static OWN: AtomicU32 = AtomicU32::new(0);

extern "C" fn own(_: c_int) {
    OWN.fetch_add(1, Ordering::SeqCst);
}

fn handle(signal: c_int) {
    // SAFETY: the handler adds to an atomic.
    unsafe { libc::signal(signal, own as extern "C" fn(c_int) as libc::sighandler_t) };
}

fn raise(signal: c_int) {
    // SAFETY: sends a signal to this process.
    unsafe { libc::raise(signal) };
}

/// Runs one case, and prints `done` at its end. Without `CHILD`, in the test run itself, nothing
/// happens.
#[test]
fn child() {
    let Ok(case) = env::var("CHILD") else { return };
    match case.as_str() {
        "all" => {
            let mut terminations = signals::leave_to_launcher().unwrap().unwrap();
            [SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGTERM].into_iter().for_each(raise);
            terminations.wait().unwrap();
            raise(SIGTERM);
            terminations.wait().unwrap();
            assert!(signals::leave_to_launcher().unwrap().is_none(), "once");
        }
        "before" => {
            handle(SIGTERM);
            handle(SIGUSR1);
            assert!(signals::leave_to_launcher().unwrap().is_none());
            raise(SIGTERM);
            raise(SIGUSR1);
            signals::end_by_termination();
            signals::restore();
            raise(SIGTERM);
            assert_eq!(OWN.load(Ordering::SeqCst), 3);
        }
        "after" => {
            let _terminations = signals::leave_to_launcher().unwrap().unwrap();
            raise(SIGTERM);
            handle(SIGTERM);
            signals::end_by_termination();
            raise(SIGTERM);
            assert_eq!(OWN.load(Ordering::SeqCst), 1);
        }
        "caught" => {
            let mut terminations = signals::leave_to_launcher().unwrap().unwrap();
            raise(SIGTERM);
            terminations.wait().unwrap();
            signals::end_by_termination();
        }
        "later" => {
            let _terminations = signals::leave_to_launcher().unwrap().unwrap();
            signals::end_by_termination();
            raise(SIGTERM);
        }
        "finished" => {
            let _terminations = signals::leave_to_launcher().unwrap().unwrap();
            raise(SIGTERM);
            signals::restore_termination();
            raise(SIGUSR1);
            println!("lives");
            raise(SIGTERM);
        }
        "restored" => {
            let _terminations = signals::leave_to_launcher().unwrap().unwrap();
            signals::restore();
            raise(SIGUSR1);
        }
        "forked" => {
            let _terminations = signals::leave_to_launcher().unwrap().unwrap();
            // SAFETY: the new process makes system calls only.
            let status = unsafe {
                let pid = libc::fork();
                if pid == 0 {
                    libc::raise(SIGTERM);
                    libc::_exit(0);
                }
                let mut status = 0;
                libc::waitpid(pid, &mut status, 0);
                status
            };
            assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == SIGTERM);
        }
        other => panic!("{other}"),
    }
    println!("\ndone");
    std::process::exit(0);
}

/// Runs a case in a process that a shell starts after the commands of `before`. Returns the signal
/// that ended the process, or `None` if the case reached its end.
fn end(case: &str, before: &str) -> Option<i32> {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{before} exec \"$@\""), "sh"]).arg(env::current_exe().unwrap());
    let output = command.args(["--exact", "child", "--nocapture"]).env("CHILD", case).output().unwrap();
    let is_done = String::from_utf8_lossy(&output.stdout).lines().any(|line| line == "done");
    assert!(output.status.signal().is_some() || (is_done && output.status.success()), "{case}: {output:?}");
    output.status.signal()
}

#[test]
fn signals_are_ignored_and_terminations_are_told() {
    assert_eq!(end("all", ""), None);
}

#[test]
fn a_handler_of_the_program_wins() {
    assert_eq!(end("before", ""), None);
    assert_eq!(end("after", ""), None);
}

#[test]
fn terminate_ends_the_process_once_the_launcher_says_so() {
    assert_eq!(end("caught", ""), Some(SIGTERM));
    assert_eq!(end("later", ""), Some(SIGTERM));
}

#[test]
fn a_process_that_has_finished_ends_by_terminate_but_not_by_the_others() {
    assert_eq!(end("finished", ""), Some(SIGTERM));
}

#[test]
fn default_actions_come_back_where_they_were() {
    assert_eq!(end("restored", ""), Some(SIGUSR1));
    assert_eq!(end("restored", "trap '' USR1;"), None, "it was ignored before");
}

#[test]
fn a_forked_process_ends_by_terminate() {
    assert_eq!(end("forked", ""), None);
}
