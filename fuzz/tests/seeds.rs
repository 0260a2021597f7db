//! Makes the inputs that a corpus starts with: `cargo test --test seeds -- --ignored`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use ice_proto::auth::{Answer, Challenge, Greeting};
use ice_proto::frame;
use ice_proto::rendezvous::{
    Achieved, Hello, KeepAlive, NodeAssignment, NodeProgress, RestartPolicy, Round, ToAgent, ToCoordinator,
};
use ice_proto::replica;
use ice_rendezvous::store::codec::{Request, encode};

fn write(target: &str, number: usize, bytes: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(format!("seed-{number:02}")), bytes).unwrap();
}

fn hello(agent: u64, nnodes: (u32, u32), node_rank: Option<u32>) -> ToCoordinator {
    ToCoordinator::Hello(Hello {
        run_id: "job".into(),
        node_rank,
        nnodes,
        local_world_size: 2,
        role: "default".into(),
        ranks_store: None,
        restarts: RestartPolicy { max_restarts: 2, window: None, backoff: Duration::ZERO, crash_loop: 0 },
        keep_alive: KeepAlive::default(),
        agent_id: agent,
        run_stamp: None,
        last_node_rank: Some(1),
        addresses: vec![[10, 0, 0, 1].into()],
        host: "host".into(),
        pid: 7,
    })
}

fn round() -> Round {
    let assignment = NodeAssignment {
        group_rank: 1,
        first_rank: 2,
        local_world_size: 2,
        ranks_on_host: 4,
        first_role_rank: 0,
        role_world_size: 2,
    };
    Round {
        number: 3,
        restart_count: 1,
        nodes: 2,
        world_size: 4,
        run_stamp: "stamp".into(),
        ranks_store: None,
        assignment,
    }
}

#[test]
#[ignore = "writes files"]
fn make() {
    let requests = [
        Request::Validate,
        Request::Set(b"k", b"v"),
        Request::CompareSet { key: b"k", expected: b"v", desired: b"w" },
        Request::Get(b"k"),
        Request::Add(b"n", -3),
        Request::Check(vec![b"k", b"n"]),
        Request::Wait(vec![b"k", b"later"]),
        Request::NumKeys,
        Request::Delete(b"k"),
        Request::Append(b"k", b"more"),
        Request::MultiGet(vec![b"k", b"n"]),
        Request::MultiSet(vec![(b"a", b"1"), (b"later", b"2")]),
        Request::CancelWait,
        Request::Ping(7),
        Request::QueuePush(b"q", b"v"),
        Request::QueuePop(b"q"),
        Request::QueueLen(b"q"),
        Request::ListKeys,
        Request::Barrier(b"b", 2),
    ];
    let mut all = Vec::new();
    for (number, request) in requests.iter().enumerate() {
        let mut bytes = vec![(number % 3) as u8];
        encode(request, &mut bytes);
        write("store", number, &bytes);
        all.extend(bytes);
    }
    all.push(129);
    write("store", requests.len(), &all);

    // Large values, which answers share with the store, and requests of some bytes for answers of many.
    let (large, small) = (vec![7; 1 << 10], vec![7; 1 << 9]);
    let of_size = [
        Request::Set(b"k", &large),
        Request::MultiGet(vec![b"k"; 300]),
        Request::Append(b"k", &small),
        Request::Set(b"s", &small),
        Request::MultiGet(vec![b"s", b"k", b"", b"s", b"k"]),
        Request::Append(b"s", &small),
        Request::QueuePush(b"q", &large),
        Request::QueuePop(b"q"),
        Request::CompareSet { key: b"s", expected: b"", desired: &large },
        Request::CompareSet { key: b"none", expected: &large, desired: b"" },
        Request::MultiSet(vec![(b"k", &large), (b"k", &small), (b"", &large)]),
        Request::Wait(vec![b"later"; 40]),
        Request::Check(vec![b"k"; 40]),
        Request::Add(b"k", 1),
        Request::Delete(b"k"),
        Request::ListKeys,
    ];
    let mut all = Vec::new();
    for (number, request) in of_size.iter().enumerate() {
        all.push((number % 3) as u8);
        encode(request, &mut all);
    }
    write("store", 30, &all);
    let mut full = Vec::new();
    for number in 0..8_u8 {
        full.push(number);
        let values: Vec<(&[u8], &[u8])> = (0..130).map(|_| (&large[..1], &large[..])).collect();
        encode(&Request::MultiSet(values), &mut full);
        full.push(number);
        encode(&Request::QueuePush(&[number], &large), &mut full);
    }
    write("store", 31, &full[..64 << 10]);

    let reason = || "reason".to_owned();
    let said = [
        hello(0, (2, 2), Some(0)),
        hello(0, (1, 3), None),
        ToCoordinator::Join,
        ToCoordinator::Failed {
            round: 0,
            reason: reason(),
            uptime: Duration::from_secs(9),
            fatal_reason: None,
        },
        ToCoordinator::Failed {
            round: 0,
            reason: reason(),
            uptime: Duration::ZERO,
            fatal_reason: Some(reason()),
        },
        ToCoordinator::Finished { round: 0 },
        ToCoordinator::Leave { reason: reason(), preempted: true },
        ToCoordinator::KeepAlive,
    ];
    let frames: Vec<Vec<u8>> = said.iter().map(|message| frame::encode(message).unwrap()).collect();
    let answers = [
        frame::encode(&ToAgent::Refused { reason: reason() }).unwrap(),
        frame::encode(&ToAgent::RoundBroken { round: 3, reason: reason(), graceful: true }).unwrap(),
        frame::encode(&ToAgent::Closed {
            success: true,
            reason: reason(),
            no_restart: None,
            preempted: false,
        })
        .unwrap(),
        frame::encode(&Greeting { nonce: [1; 32] }).unwrap(),
        frame::encode(&Challenge { nonce: [2; 32], proof: Some([3; 32]) }).unwrap(),
        frame::encode(&Answer { proof: None }).unwrap(),
        frame::encode(&ToAgent::RoundStarted(round())).unwrap(),
        frame::encode(&ToAgent::Waiting { run_stamp: "stamp".into(), reason: reason() }).unwrap(),
    ];
    for (number, frame) in frames.iter().chain(&answers).enumerate() {
        write("frames", number, &[&[number as u8 * 9], &frame[..]].concat());
    }
    let part = replica::ReplicaPart { name: "model".into(), bytes: 9, crc32c: 7 };
    let parcel =
        replica::ReplicaHeader { number: 3, whole: Some(2), owner: 1, of: 4, step: 70, parts: vec![part] };
    let of_copies = [
        frame::encode(&replica::OwnerHello { token: [4; 32], owner: 1 }).unwrap(),
        frame::encode(&parcel).unwrap(),
        frame::encode(&replica::ReplicaStored { number: 3 }).unwrap(),
    ];
    for (number, frame) in of_copies.iter().enumerate() {
        write("frames", 60 + number, &[&[7], &frame[..]].concat());
    }
    write("frames", 50, &[&[5], &frames.concat()[..]].concat());

    let waiting = NodeProgress::Waiting(Achieved { step: 3, activity: 9 });
    let of_progress = [waiting, NodeProgress::Resting, NodeProgress::Working]
        .map(|progress| frame::encode(&ToCoordinator::Progress { round: 0, progress }).unwrap());
    let stands_still = frame::encode(&ToAgent::Standstill { round: 0 }).unwrap();
    for (number, frame) in of_progress.iter().chain([&stands_still]).enumerate() {
        write("frames", 70 + number, &[&[5], &frame[..]].concat());
    }

    let step = |peer: u8, frame: &[u8]| [&[peer, 3], frame].concat();
    let joined = |peers: u8| -> Vec<u8> {
        let hello = |peer: u8| frame::encode(&hello(peer.into(), (1, 3), None)).unwrap();
        (0..peers).flat_map(|peer| [step(peer, &hello(peer)), step(peer, &frames[2])].concat()).collect()
    };
    for (number, frame) in frames.iter().enumerate() {
        write("coordinator", number, &step(1, frame));
        let then = [joined(3), step(1, frame), vec![0, 0xF8, 0, 2], joined(2)].concat();
        write("coordinator", 20 + number, &then);
    }
    let [waits, rests, works] = of_progress.each_ref().map(Vec::as_slice);
    let idle = [step(0, waits), step(1, rests), step(2, waits)].concat();
    let then = [step(0, works), step(1, &frames[5]), step(0, waits), step(0, &frames[3])].concat();
    write("coordinator", 60, &[joined(3), idle, then].concat());
    write("coordinator", 50, &[joined(4), vec![1, 1], step(2, &frames[3]), step(2, &frames[2])].concat());
}
