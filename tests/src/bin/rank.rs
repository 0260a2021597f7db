//! A rank that forms the group and then does one thing, for tests and for the start-up benchmark.
//!
//! ```text
//! rank all-reduce      sums ones over the ranks; rank 0 prints `sum <n> at <unix nanoseconds>`
//! rank panic <rank>    that rank panics, the others wait for it in a barrier
//! rank wait            rank 0 prints `waiting`, and all stay in a barrier that it never enters
//! ```

use std::env;
use std::process::ExitCode;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use ice_worker::Worker;
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
        ["panic", rank] => {
            assert!(worker.rank().to_string() != rank, "rank {rank} was told to panic");
            worker.barrier()?;
        }
        ["wait"] => {
            if worker.is_main() {
                println!("waiting");
                loop {
                    thread::park();
                }
            }
            worker.barrier()?;
        }
        _ => panic!("unknown arguments {arguments:?}"),
    }
    Ok(worker.leave()?)
}
