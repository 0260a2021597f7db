//! Ranks of Python that are forked from a template are what they would be without it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use tempfile::{TempDir, tempdir};

use crate::support::{
    Finished, Gate, Job, SOON, executable, free_port, ice_launch, run, wait_for_text, wait_until_reaped,
};

/// A module that tells a forked rank from others.
const MARKER: &str = "import os\nPID = os.getpid()\n";
/// Says whether the rank was forked from a template.
const TELL: &str = "import os, sys\n\
    marker = sys.modules.get('marker')\n\
    sys.stdout.write('forked\\n' if marker and marker.PID != os.getpid() else 'started\\n')\n";
const WHY: &str = "ice-launch: ranks start without --preload: ";

/// A folder with the programs of these tests.
fn folder() -> TempDir {
    let folder = tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("marker.py", MARKER);
    write("tell.py", TELL);
    write("report.py", include_str!("warm/report.py"));
    write("ends.py", include_str!("warm/ends.py"));
    fs::create_dir(folder.path().join("package")).unwrap();
    write("package/__init__.py", "");
    write("package/report.py", include_str!("warm/report.py"));
    for name in ["children.py", "package/children.py"] {
        write(name, include_str!("warm/children.py"));
    }
    folder
}

fn launched(folder: &Path, options: &[&str]) -> Command {
    let mut command = ice_launch();
    command.current_dir(folder).args(["--devices", "cpu"]).args(options);
    command.env("PYTHON_EXEC", "python3").env("PYTHONDONTWRITEBYTECODE", "1");
    command
}

fn kill(pid: &str) {
    let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
}

/// Runs a program without and with a template; options of the launcher may stand in front of it.
fn both(folder: &Path, program: &[&str]) -> [Finished; 2] {
    [&["--preload", "none"], &["--preload", "marker"]].map(|options| {
        let mut command = launched(folder, options);
        command.args(program).env("PYTHONPATH", folder).env("CUDA_VISIBLE_DEVICES", "3");
        run(command)
    })
}

#[test]
fn forked_rank_sees_what_a_started_one_sees() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let python =
        String::from_utf8(Command::new("sh").args(["-c", "command -v python3"]).output().unwrap().stdout);
    let report = fs::read_to_string(path("report.py")).unwrap();
    executable(&folder.path().join("a-long-console-script"), format!("#!{}{report}", python.unwrap()));
    executable(&folder.path().join("by-env"), format!("#!/usr/bin/env python3\n{report}"));
    let (console, by_env) = (path("a-long-console-script"), path("by-env"));
    for program in [
        &["report.py", "--lr", "", "${local_rank}"][..],
        &["-m", "package.report", "x"],
        &["--run-path", "./package/../report.py"],
        &["python3", "report.py"],
        &["python3", "-Es", "-O", "-X", "dev", "-Wignore", "report.py"],
        &[&console, "-x"],
        &[&by_env],
        &["--tee=3", "--virtual-local-rank", "--omp-num-threads=2", "report.py"],
        &["--redirects=2", "--role=trainer", "report.py"],
        &["--numa-binding=exclusive", "--omp-num-threads=1", "report.py"],
    ] {
        let [started, forked] = both(folder.path(), program);
        assert!(started.stdout.len() > 40, "{started:#?}");
        for (one, other) in started.stdout.iter().zip(&forked.stdout) {
            assert_eq!(one, other, "{program:?}");
        }
        // Folders of logs have random names.
        let lines = |finished: &Finished| {
            let lines = finished.stderr.lines().filter(|line| !line.starts_with("ice-launch: run none"));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(lines(&started), lines(&forked), "{program:?}");
    }
}

#[test]
fn forked_rank_ends_as_a_started_one_ends() {
    let folder = folder();
    fs::write(folder.path().join("wrong.py"), "def f(:\n").unwrap();
    let without_pid = |finished: &Finished| {
        let lines: Vec<_> = finished.stderr.lines().filter(|line| !line.contains("pid ")).collect();
        (finished.code, finished.stdout.clone(), lines.join("\n"))
    };
    let ends = [
        "none",
        "error",
        "chain",
        "interrupt",
        "signal",
        "code",
        "text",
        "abort",
        "hook",
        "thread",
        "partial",
    ];
    for program in
        ends.map(|how| vec!["ends.py", how]).into_iter().chain([vec!["wrong.py"], vec!["-m", "nowhere"]])
    {
        let [started, forked] = both(folder.path(), &program);
        assert_eq!(without_pid(&started), without_pid(&forked), "{program:?}");
    }
}

#[test]
fn forked_rank_starts_processes_in_each_way_of_multiprocessing() {
    let folder = folder();
    for program in [&["children.py"][..], &["-m", "package.children"]] {
        let [started, forked] = both(folder.path(), program);
        assert_eq!(started.expect(0, &[]).stdout.len(), 4, "{started:#?}");
        assert_eq!(started.stdout, forked.stdout, "{forked:#?}");
        // The helpers of multiprocessing end after the rank. The launcher names those that take long.
        for job in [started, forked] {
            let others: Vec<_> =
                job.stderr.lines().filter(|line| !line.contains("sent SIGTERM to")).collect();
            assert!(others.is_empty(), "{program:?}: {others:?}");
        }
    }
}

#[test]
fn restarts_and_all_ranks_are_forked_and_an_edited_script_runs() {
    let folder = folder();
    // `print` writes a line and its end one after the other, and two ranks share the pipe.
    let text = format!("{TELL}\nopen(os.environ['GATE']).read()\nraise SystemExit(1)\n");
    fs::write(folder.path().join("edited.py"), text).unwrap();
    let mut command = launched(folder.path(), &["--devices=cpu:0-1", "--max-restarts=1", "--preload=marker"]);
    let gate = Gate::new(&mut command);
    command.arg("edited.py");
    let mut job = Job::start(command);
    job.expect_line("forked");
    job.expect_line("forked");
    let new =
        format!("{TELL}\nsys.stdout.write('new ' + os.environ['TORCHELASTIC_RESTART_COUNT'] + '\\n')\n");
    fs::write(folder.path().join("edited.py"), new).unwrap();
    gate.open();
    let finished = job.finish();
    finished.expect(0, &["`edited.py` has been changed since the job started"]);
    let count = |line: &str| finished.stdout.iter().filter(|other| *other == line).count();
    assert_eq!((count("forked"), count("new 1"), count("started")), (4, 2, 0), "{finished:#?}");
}

/// Runs a job that preloads a module with this text, which a forked rank must not use.
fn refused(module: &str, why: &str) {
    let folder = folder();
    fs::write(folder.path().join("marker.py"), format!("{MARKER}{module}\n")).unwrap();
    let mut command = launched(folder.path(), &["--preload", "marker"]);
    command.arg("tell.py");
    let finished = run(command);
    finished.expect(0, &[&format!("{WHY}{why}")]);
    assert_eq!((&finished.stdout[..], finished.stderr.matches(WHY).count()), (&["started".into()][..], 1));
}

#[test]
fn module_that_cannot_be_shared_makes_ranks_start_without_the_template() {
    refused("1 / 0", "`marker` cannot be imported: ZeroDivisionError: division by zero");
    refused("import nowhere", "`marker` cannot be imported: No module named 'nowhere'");
    refused("raise SystemExit(3)", "`marker` cannot be imported: SystemExit: 3");
    refused("os._exit(3)", "the template ended while it imported `marker`");
    refused("os.kill(os.getpid(), 9)", "the template ended while it imported `marker`");
    let thread = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()";
    refused(thread, "importing `marker` starts 1 threads, which a fork would lose");
    refused("os.environ.get('LOCAL_RANK')", "`marker` reads LOCAL_RANK when it is imported");
    refused("os.getenv('WORLD_SIZE', 1)", "`marker` reads WORLD_SIZE when it is imported");
}

/// A folder with a program, modules of its own, and installed packages. The program says of each
/// package whether it was preloaded.
fn with_packages(packages: &[(&str, &str)]) -> TempDir {
    let folder = tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    for (name, text) in packages {
        write(&format!("lib/site-packages/{name}.py"), &format!("{MARKER}{text}"));
    }
    write(
        "train.py",
        "import os, sys\nfrom own import tools\n\
         try:\n    import second\nexcept ImportError:\n    second = None\n\
         if len(sys.argv) > 5:\n    import third\n\
         seen = [name for name in ('first', 'first.part', 'second', 'third', 'own.tools') if name in sys.modules]\n\
         forked = [name for name in seen if sys.modules[name].PID != os.getpid()]\n\
         sys.stdout.write('imported %s preloaded %s\\n' % (','.join(seen), ','.join(forked)))\n",
    );
    write("own/__init__.py", "");
    write("own/tools.py", &format!("{MARKER}from .more import *\ndef later():\n    import third\n"));
    write("own/more.py", "from first import part\n");
    folder
}

#[test]
fn installed_packages_that_the_program_imports_at_its_top_are_found() {
    let packages = [("first/__init__", ""), ("first/part", ""), ("second", ""), ("third", "")];
    let folder = with_packages(&packages);
    let run = |program: &[&str]| {
        let mut command = launched(folder.path(), &["--devices=cpu:0-1", "--preload=auto"]);
        command.args(program).env("PYTHONPATH", folder.path().join("lib/site-packages"));
        run(command)
    };
    let expected = ["imported first,first.part,second,own.tools preloaded first,first.part,second"; 2];
    for program in [&["train.py"][..], &["-m", "train"]] {
        let finished = run(program);
        assert_eq!(finished.stdout, expected, "{finished:#?}");
        assert_eq!(finished.expect(0, &[]).stderr, "");
    }
}

#[test]
fn package_that_cannot_be_shared_is_left_to_the_ranks() {
    for (text, why) in [
        ("os.environ.get('RANK')", "`second` reads RANK when it is imported, before it is a rank"),
        (
            "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
            "importing `second` starts 1 threads, which a fork would lose",
        ),
    ] {
        let folder = with_packages(&[("first/__init__", ""), ("first/part", ""), ("second", text)]);
        let mut command = launched(folder.path(), &["--preload=auto"]);
        command.arg("train.py").env("PYTHONPATH", folder.path().join("lib/site-packages"));
        let finished = run(command);
        let expected = ["imported first,first.part,second,own.tools preloaded first,first.part"];
        assert_eq!(finished.stdout, expected, "{finished:#?}");
        finished.expect(0, &[&format!("ice-launch: --preload auto leaves a module to the ranks: {why}")]);
    }
}

#[test]
fn module_that_reads_stdin_or_prints_is_shared() {
    let folder = folder();
    let module =
        format!("{MARKER}import sys\nREAD = sys.stdin.read()\nprint('imported')\nos.environ['SET'] = 'x'\n");
    fs::write(folder.path().join("marker.py"), module).unwrap();
    let program = "import marker, os, sys\nseen = [marker.READ, os.environ['SET'], marker.PID == os.getpid()]\n\
        sys.stdout.write('%s\\n' % seen)\n";
    fs::write(folder.path().join("program.py"), program).unwrap();
    let mut command = launched(folder.path(), &["--devices=cpu:0-1", "--preload=marker"]);
    command.arg("program.py");
    let finished = run(command);
    assert_eq!(finished.stdout, ["['', 'x', False]"; 2], "{finished:#?}");
    assert_eq!(finished.expect(0, &[]).stderr, "[preload]: imported\n");
}

#[test]
fn template_that_is_killed_or_stale_is_replaced() {
    let folder = folder();
    let program = format!(
        "{TELL}\nsys.stdout.write('at %s, from %d\\n' % (os.environ['TORCHELASTIC_RESTART_COUNT'], marker.PID if marker else 0))\nopen(os.environ['GATE']).read()\n\
         raise SystemExit(os.environ['TORCHELASTIC_RESTART_COUNT'] != '3')\n"
    );
    fs::write(folder.path().join("program.py"), program).unwrap();
    let mut command =
        launched(folder.path(), &["--max-restarts=3", "--preload=marker", "--restart-backoff=0"]);
    let gate = Gate::new(&mut command);
    command.arg("program.py");
    let mut job = Job::start(command);
    let template = job.expect_line("at 0, from ");
    kill(&template);
    wait_until_reaped(&template);
    gate.open();
    job.expect_line("at 1, from 0");
    // The next template is ready long before the rank ends.
    let ready = || {
        let children =
            Command::new("pgrep").args(["-P", &job.pid().to_string(), "ice-template"]).output().unwrap();
        let pid = String::from_utf8(children.stdout).unwrap().trim().to_owned();
        let wchan = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
        // recvmsg(2): it waits for requests.
        wchan.starts_with("47 ") || cfg!(not(target_arch = "x86_64"))
    };
    while !ready() {
        std::thread::yield_now();
    }
    gate.open();
    assert_ne!(job.expect_line("at 2, from "), "0");
    fs::write(folder.path().join("marker.py"), format!("{MARKER}\n# edited\n")).unwrap();
    gate.open();
    job.expect_line("at 3, from 0");
    gate.open();
    let finished = job.finish();
    let changed = format!("{WHY}`marker` has changed since it was preloaded");
    finished.expect(0, &[&format!("{WHY}the template has ended"), &changed]);
}

#[test]
fn forked_rank_draws_its_own_random_numbers_and_keys() {
    let folder = folder();
    let program = "import random, sys\nfrom multiprocessing import current_process\n\
        sys.stdout.write('%s %s\\n' % (random.random(), current_process().authkey.hex()))\n";
    fs::write(folder.path().join("program.py"), program).unwrap();
    let mut command =
        launched(folder.path(), &["--devices=cpu:0-1", "--preload=random,multiprocessing.util"]);
    command.arg("program.py");
    let finished = run(command);
    let words: Vec<_> = finished.expect(0, &[]).stdout.iter().flat_map(|line| line.split(' ')).collect();
    assert!(words.len() == 4 && words[0] != words[2] && words[1] != words[3], "{words:?}");
}

#[test]
fn template_started_with_other_threads_than_the_round_has_is_not_used() {
    let folder = folder();
    let port = free_port();
    let jobs = ["0", "1"].map(|rank| {
        let nodes = ["--nnodes=2", "--node-rank", rank, "--master-port", &port, "--preload=marker"];
        let mut command = launched(folder.path(), &nodes);
        command.arg("tell.py");
        Job::start(command)
    });
    for job in jobs {
        let finished = job.finish();
        finished.expect(0, &[&format!("{WHY}the template was started without OMP_NUM_THREADS=")]);
        assert_eq!(finished.stdout, ["started"]);
    }
}

#[test]
fn bound_ranks_are_forked_if_the_number_of_their_threads_is_fixed() {
    let folder = folder();
    let run = |options: &[&str], variables: &[(&str, &str)]| {
        let mut command = launched(folder.path(), &["--preload=marker", "--numa-binding=node"]);
        command.args(options).arg("tell.py").envs(variables.iter().copied());
        run(command)
    };
    assert_eq!(run(&["--omp-num-threads=1"], &[]).expect(0, &[]).stdout, ["forked"]);
    let why = |text: &str| format!("{WHY}{text}");
    run(&[], &[]).expect(0, &[&why("OMP_NUM_THREADS is not a number up to ")]);
    run(&["--omp-num-threads=60000"], &[]).expect(0, &[&why("OMP_NUM_THREADS is not a number up to ")]);
    let places = [("OMP_PLACES", "cores")];
    run(&["--omp-num-threads=1"], &places).expect(0, &[&why("OMP_PLACES takes effect before")]);
}

#[test]
fn template_and_forked_ranks_die_with_the_launcher() {
    let folder = folder();
    fs::write(folder.path().join("program.py"), format!("{TELL}\nimport signal\nsignal.pause()\n")).unwrap();
    let mut command = launched(folder.path(), &["--devices=cpu:0-1", "--preload=marker"]);
    command.arg("program.py");
    let mut job = Job::start(command);
    job.expect_line("forked");
    job.expect_line("forked");
    job.signal(Signal::KILL);
    // It finds what is left.
    assert_eq!(job.finish().signal, Some(9));
}

#[test]
fn signal_during_an_import_ends_the_job_at_once() {
    let folder = folder();
    let module = format!("{MARKER}import sys, time\nsys.stderr.write('importing\\n')\ntime.sleep(600)\n");
    fs::write(folder.path().join("marker.py"), module).unwrap();
    let mut command = launched(folder.path(), &["--preload=marker"]);
    command.arg("tell.py");
    let mut job = Job::start_unread(command);
    job.expect_error("[preload]: importing\n");
    job.signal(Signal::TERM);
    assert_eq!(job.finish().code, Some(143));
}

#[test]
fn spare_is_forked_ahead_and_becomes_the_next_rank() {
    let folder = folder();
    let program = format!(
        "{TELL}sys.stdout.write('pid %d\\n' % os.getpid())\nopen(os.environ['GATE']).read()\n\
         raise SystemExit(os.environ['TORCHELASTIC_RESTART_COUNT'] != '2')\n"
    );
    fs::write(folder.path().join("program.py"), program).unwrap();
    let events = folder.path().join("events");
    let mut command = launched(folder.path(), &["--max-restarts=2", "--preload=marker", "--spares=1"]);
    command.args(["--restart-backoff=0", "--events"]).arg(&events).arg("program.py");
    let gate = Gate::new(&mut command);
    let spare = |number: usize| {
        let mut pids = Vec::new();
        while pids.len() < number {
            let text = wait_for_text(&events, "spare_started");
            let lines = text.lines().filter(|line| line.contains("spare_started"));
            let pid = |line: &str| Some(line.split("\"pid\":").nth(1)?.split(['}', ',']).next()?.to_owned());
            pids = lines.filter_map(pid).collect();
        }
        pids.swap_remove(number - 1)
    };
    let mut job = Job::start(command);
    job.expect_line("pid ");
    gate.open();
    assert_eq!(job.expect_line("pid "), spare(1));
    // A spare that has ended is not used.
    let second = spare(2);
    kill(&second);
    gate.open();
    assert_ne!(job.expect_line("pid "), second);
    gate.open();
    let finished = job.finish();
    assert_eq!(finished.expect(0, &[]).stdout.iter().filter(|line| *line == "forked").count(), 3);
    assert!(!finished.stderr.contains(WHY), "{finished:#?}");
}

/// The Python of an installed PyTorch. `None` if it is missing; with ICE_TEST_PEER that is an error.
fn python_of(peer: &str) -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps").join(peer).join("bin/python");
    if python.exists() {
        return Some(python);
    }
    assert!(std::env::var_os("ICE_TEST_PEER").is_none(), "{} is missing", python.display());
    eprintln!("skipped: {} is missing; scripts/setup --peer --peer-newest makes it", python.display());
    None
}

/// Trains in forked ranks, in each of the ways that a program may end.
fn forked_ranks_train_and_end(peer: &str, preload: &str) {
    let Some(python) = python_of(peer) else { return };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/python/gloo_ends.py");
    let run = |options: &[&str], last: &str| {
        let mut command = launched(Path::new("."), &["--devices=cpu:0-1", "--restart-backoff=0"]);
        command.env("PYTHON_EXEC", &python).args(options).arg(&script).arg(last);
        Job::start(command).finish_within(SOON * 6)
    };
    let started = run(&["--preload=none"], "0");
    let forked = run(&[preload, "--crash-loop-limit=0", "--max-restarts=5"], "5");
    let losses = |finished: &Finished| -> Vec<String> {
        finished.expect(0, &[]).stdout.iter().filter(|line| line.starts_with("loss")).cloned().collect()
    };
    let (expected, losses) = (losses(&started), losses(&forked));
    assert_eq!((expected.len(), losses.len()), (2, 12), "{started:#?} {forked:#?}");
    assert!(losses.iter().all(|loss| *loss == expected[0]), "{losses:?}, not {expected:?}");
    let drawn: BTreeSet<_> = forked.stdout.iter().filter(|line| line.starts_with("drawn")).collect();
    assert_eq!(drawn.len(), 12, "{drawn:?}");
    // A rank that stands in the destructor of its group says nothing more and is killed.
    let ended = forked.stdout.iter().filter(|line| line.ends_with(" ends")).count();
    assert!(ended == 10 && !forked.stderr.contains(WHY), "{forked:#?}");
}

#[test]
fn restart_that_imports_pytorch_again_says_how_to_avoid_that() {
    let Some(python) = python_of("peer") else { return };
    let folder = tempdir().unwrap();
    // Rank 0 fails once rank 1 has imported it.
    let program = "import os, signal\n\
        if os.environ['TORCHELASTIC_RESTART_COUNT'] == '1':\n    raise SystemExit\n\
        if os.environ['RANK'] == '0':\n    open(os.environ['GATE']).read()\n    raise SystemExit(1)\n\
        import torch\nopen(os.environ['GATE'], 'w').close()\nsignal.pause()\n";
    fs::write(folder.path().join("program.py"), program).unwrap();
    let mut command = launched(folder.path(), &["--devices=cpu:0-1", "--max-restarts=1"]);
    let _gate = Gate::new(&mut command);
    command.env("PYTHON_EXEC", python).arg("program.py");
    let finished = run(command);
    let hints =
        finished.stderr.lines().filter(|line| line.contains("hint: the ranks import PyTorch")).count();
    assert_eq!(hints, 1, "{finished:#?}");
    finished.expect(0, &[]);
}

#[test]
fn forked_ranks_train_like_started_ones_and_end() {
    forked_ranks_train_and_end("peer", "--preload=torch");
}

#[test]
fn forked_ranks_of_the_newest_pytorch_train_like_started_ones_and_end() {
    forked_ranks_train_and_end("newest", "--preload=auto");
}
