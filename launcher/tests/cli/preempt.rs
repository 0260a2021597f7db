//! Notices that a machine, or the job's time, is taken away.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;

use rustix::process::Signal;
use tempfile::tempdir;

use crate::STAY;
use crate::support::{Gate, Job, free_port, launch, run};

#[test]
fn a_file_a_signal_or_one_of_several_sources_ends_the_job_with_the_code_that_says_again() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("preempted");
    let path = file.to_str().unwrap();
    for (code, options) in [(75, &[][..]), (99, &["--requeue-exit-code", "99"])] {
        for by_signal in [false, true] {
            let _ = std::fs::remove_file(&file);
            let logs = folder.path().join(format!("{code}-{by_signal}"));
            let notices = ["--devices", "cpu", "--preempt-notice", path, "--preempt-notice", "usr1"];
            let logged = ["--log-dir", logs.to_str().unwrap()];
            let mut job = Job::start(launch(
                &[&notices[..], &logged, options].concat(),
                &format!("echo ready; {STAY}"),
            ));
            job.expect_line("ready");
            let what = if by_signal {
                job.signal(Signal::USR1);
                "SIGUSR1".to_owned()
            } else {
                std::fs::write(&file, "").unwrap();
                format!("{path} is there")
            };
            let again = format!("preempted: start the job again (exit code {code})");
            job.finish().expect(code, &[&format!("preempted: {what}"), &again]);
            let report =
                std::fs::read_dir(&logs).unwrap().next().unwrap().unwrap().path().join("report.json");
            let report = std::fs::read_to_string(report).unwrap();
            assert!(report.contains("\"outcome\": \"preempted\""), "{report}");
        }
    }
}

#[test]
fn terminate_that_follows_the_notice_takes_no_time_from_the_ranks_and_interrupt_does() {
    for again in [false, true] {
        let options = ["--devices", "cpu", "--preempt-notice", "SIGUSR1", "--shutdown-timeout", "600"];
        let script = "trap 'echo asked; read -r go < $GATE; exit 0' TERM; echo ready; while :; do sleep 600 & wait $!; done";
        let mut command = launch(&options, script);
        let gate = Gate::new(&mut command);
        let mut job = Job::start_unread(command);
        job.expect_line("ready");
        job.signal(Signal::USR1);
        job.expect_line("asked");
        job.signal(Signal::TERM);
        job.expect_error("told to stop by SIGTERM, as was noticed before");
        job.read_stderr();
        if again {
            job.signal_until_it_ends(Signal::INT);
            job.finish().expect(75, &["told to stop again: killing"]);
        } else {
            gate.open();
            let finished = job.finish();
            assert!(
                !finished.expect(75, &["start the job again"]).stderr.contains("killing"),
                "{finished:#?}"
            );
        }
    }
}

#[test]
fn a_job_that_ends_well_is_not_to_be_started_again() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("never");
    run(launch(&["--devices", "cpu", "--preempt-notice", file.to_str().unwrap()], "exit 0")).expect(0, &[]);
    run(launch(&["--devices", "cpu", "--preempt-notice", file.to_str().unwrap()], "exit 3")).expect(3, &[]);
}

#[test]
fn all_nodes_of_a_job_that_cannot_go_on_without_one_say_again_and_others_do_go_on() {
    // With 2:3, the remaining node waits for another one in vain, so the job cannot continue
    // either.
    let wait = ["--rdzv-conf", "last_call_timeout=1,join_timeout=15"];
    for (nnodes, conf, code) in [("2", &[][..], 75), ("1:2", &[], 0), ("2:3", &wait, 75)] {
        let port = free_port();
        let endpoint = format!("127.0.0.1:{port}");
        let job = |rank: &str| {
            let options = ["--devices", "cpu", "--nnodes", nnodes, "--rdzv-backend", "c10d"];
            let more = ["--rdzv-endpoint", &endpoint, "--node-rank", rank, "--preempt-notice", "USR1"];
            let script = "echo \"$RANK of $WORLD_SIZE\"; [ $WORLD_SIZE = 1 ] || exec sleep 600";
            Job::start(launch(&[&options[..], &more, conf].concat(), script))
        };
        let mut jobs = [job("0"), job("1")];
        // The job runs with both nodes, although an elastic job may begin with one of them.
        jobs[0].expect_line("0 of 2");
        jobs[1].expect_line("1 of 2");
        jobs[1].signal(Signal::USR1);
        let [first, second] = jobs.map(Job::finish);
        second.expect(75, &["preempted: SIGUSR1"]);
        first.expect(code, &["left: preempted: SIGUSR1"]);
    }
}

/// Starts a metadata server that answers requests by their first line, and sends the headers that
/// it received.
fn serve(answers: Vec<(&'static str, &'static str, &'static str)>) -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (told, hears) = mpsc::channel();
    thread::spawn(move || {
        let mut left = answers.into_iter().peekable();
        while left.peek().is_some() {
            let (stream, _) = listener.accept().unwrap();
            answer(stream, &mut left, &told);
        }
    });
    (address, hears)
}

fn answer(
    stream: TcpStream,
    left: &mut impl Iterator<Item = (&'static str, &'static str, &'static str)>,
    told: &mpsc::Sender<String>,
) {
    let mut reader = BufReader::new(&stream);
    loop {
        let mut request = String::new();
        while !request.ends_with("\r\n\r\n") {
            if reader.read_line(&mut request).unwrap_or(0) == 0 {
                return;
            }
        }
        let Some((start, status, body)) = left.next() else { return };
        assert!(request.starts_with(start), "{request} instead of {start}");
        told.send(request).unwrap();
        let len = body.len();
        write!(&stream, "HTTP/1.1 {status}\r\nContent-Length: {len}\r\n\r\n{body}").unwrap();
    }
}

#[test]
fn clouds_are_asked_as_they_want_it() {
    let (token, action) = ("PUT /latest/api/token ", "GET /latest/meta-data/spot/instance-action ");
    let aws = vec![
        (token, "200 OK", "secret"),
        (action, "404 Not Found", "no"),
        (token, "200 OK", "secret"),
        (action, "200 OK", "{\"action\": \"terminate\"}"),
    ];
    let preempted = "GET /computeMetadata/v1/instance/preempted ";
    let gcp = vec![(preempted, "200 OK", "FALSE"), (preempted, "200 OK", "TRUE")];
    let events = "GET /metadata/scheduledevents?api-version=2020-07-01 ";
    let azure = vec![
        (events, "200 OK", "{\"Events\": []}"),
        (events, "500 Broken", ""),
        (events, "200 OK", "{\"Events\": [{\"EventType\": \"Preempt\"}]}"),
    ];
    let clouds = [
        ("aws", aws, "x-aws-ec2-metadata-token: secret", ""),
        ("gcp", gcp, "metadata-flavor: google", ""),
        ("azure", azure, "metadata: true", "status"),
    ];
    let started = clouds.map(|(name, answers, header, warning)| {
        let (address, hears) = serve(answers);
        let options = ["--devices", "cpu", "--preempt-notice", &format!("{name}={address}")];
        let mut job = Job::start(launch(&options, &format!("echo ready; {STAY}")));
        job.expect_line("ready");
        (job, hears, header, warning)
    });
    for (job, hears, header, warning) in started {
        job.finish().expect(75, &["preempted: http://127.0.0.1:", "says so", warning]);
        let requests: Vec<String> = hears.iter().collect();
        assert!(requests.last().unwrap().to_lowercase().contains(header), "{requests:?}");
    }
}

#[test]
fn a_server_that_does_not_answer_is_warned_of_and_ends_nothing() {
    let nobody = format!("http://127.0.0.1:{}/", free_port());
    let options = ["--devices", "cpu", "--preempt-notice", &nobody];
    let mut job = Job::start_unread(launch(&options, &format!("echo ready; {STAY}")));
    job.expect_line("ready");
    job.expect_error(&format!("{nobody} gives no answer, and is asked again"));
    job.read_stderr();
    job.signal(Signal::TERM);
    job.finish().expect(143, &["told to stop by SIGTERM"]);
}

#[test]
fn a_source_that_is_none_is_named_with_what_there_is() {
    run(launch(&["--preempt-notice", "nowhere"], "true")).expect(2, &["--preempt-notice", "`nowhere`"]);
    run(launch(&["--preempt-notice", "https://x"], "true")).expect(2, &["only http://"]);
    run(launch(&["--requeue-exit-code", "0"], "true")).expect(2, &["--requeue-exit-code"]);
}
