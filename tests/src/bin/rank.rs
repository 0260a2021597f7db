//! A rank that joins the group and then does one thing, for tests and for the start-up benchmark.
//!
//! ```text
//! rank all-reduce           sums ones over the ranks; rank 0 prints `sum <n> at <unix ns>`
//! rank panic <rank>         that rank panics, the others wait for it in a barrier
//! rank wait                 rank 0 prints `waiting`, and the others wait in a barrier that it does
//!                           not enter
//! rank step                 steps until a request to stop; prints `step 3` after that step
//! rank stall <rank> <step>  steps, and that rank stays in that step of the first attempt; the
//!                           second attempt ends after it
//! rank part <rank>          that rank leaves its steps before the first one and waits for the
//!                           others, which wait for it in a step
//! rank meet <rank>          before the first step that rank waits for a tensor that no rank sends,
//!                           and the others wait for it in a barrier
//! rank alone <seconds>      rank 0 does work of its own for that long, the others wait for it in a
//!                           barrier
//! rank threads              prints `<n> threads`, the number that libtorch computes with
//! ```

use std::env;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ice_worker::{Boundary, Worker};
use tch::{Kind, Tensor};

fn main() -> ExitCode {
    ice::main(run)
}

fn run() -> Result<(), ice::Error> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let worker = Worker::join()?;
    match arguments[..] {
        ["all-reduce"] => {
            let ones = Tensor::ones([1], (Kind::Float, worker.device()));
            worker.all_reduce_sum(&ones)?;
            let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_nanos());
            if worker.is_main() {
                println!("sum {} at {at}", ones.double_value(&[0]));
            }
        }
        ["threads"] => println!("{} threads", tch::get_num_threads()),
        ["panic", rank] => {
            assert!(worker.rank().to_string() != rank, "rank {rank} was told to panic");
            worker.barrier()?;
        }
        ["wait"] => {
            if worker.is_main() {
                println!("waiting");
                stay();
            }
            worker.barrier()?;
        }
        ["step"] => step(&worker, None)?,
        ["stall", rank, step_number] => {
            let stalls = worker.rank().to_string() == rank && worker.restart_count() == 0;
            step(&worker, step_number.parse().ok().map(|number| (number, stalls)))?;
        }
        ["part", rank] => {
            worker.link().begin();
            let leaves = worker.rank().to_string() == rank;
            match leaves {
                true => worker.link().end(),
                false => {
                    worker.link().advance(0);
                    receive(&worker, rank.parse().unwrap_or_default())?;
                }
            }
            worker.barrier()?;
        }
        ["meet", rank] => {
            if worker.rank().to_string() == rank {
                receive(&worker, (worker.rank() + 1) % worker.world_size())?;
            }
            worker.barrier()?;
        }
        ["alone", seconds] => {
            worker.link().begin();
            let alone = worker.link().alone();
            if worker.is_main() {
                thread::sleep(Duration::from_secs(seconds.parse().unwrap_or_default()));
            }
            drop(alone);
            worker.barrier()?;
        }
        _ => panic!("unknown arguments {arguments:?}"),
    }
    if worker.link().stop().is_none() {
        worker.barrier()?;
    }
    worker.leave();
    Ok(())
}

/// Steps until a request to stop, or until the step `last`, in which the rank may stay.
fn step(worker: &Worker, last: Option<(u64, bool)>) -> Result<(), ice::Error> {
    for number in 1.. {
        match worker.link().boundary(false) {
            Boundary::Continue | Boundary::Save | Boundary::Stop { here: false, .. } => {}
            Boundary::Stop { here: true, .. }
            | Boundary::Leave { .. }
            | Boundary::Regroup
            | Boundary::Broken => break,
        }
        match last {
            Some((last, true)) if number == last => stay(),
            Some((last, false)) if number == last && worker.restart_count() > 0 => break,
            Some((last, true)) if number > last => break,
            _ => {}
        }
        let outcome = worker.all_reduce_sum(&Tensor::ones([1], (Kind::Float, worker.device())));
        if outcome.is_err() && worker.link().stop().is_some() {
            break;
        }
        outcome?;
        worker.link().advance(number);
        if number == 3 {
            println!("step {number}");
        }
    }
    Ok(())
}

/// Waits for a tensor of another rank.
fn receive(worker: &Worker, rank: usize) -> Result<(), ice::Error> {
    let tensor = Tensor::zeros([1], (Kind::Float, worker.device()));
    Ok(worker.begin_receive(rank, &tensor)?.wait()?)
}

fn stay() -> ! {
    loop {
        thread::park();
    }
}
