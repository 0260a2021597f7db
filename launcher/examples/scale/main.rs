//! Scales the launcher beyond one machine: the real coordinator and the real agents in virtual
//! time, and the cost of failures for a training. Prints the tables of docs/scale.md. The command
//! `measure` is the source of the defaults of `--cpu-us` and `--cpu-tls-us`.
//!
//! ```text
//! cargo run --release -p ice-launch --example scale [-- --write docs/scale.md]
//! cargo run --release -p ice-launch --example scale -- measure
//! ```

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "an example that measures")]

mod goodput;
mod measure;
mod network;
mod play;
mod report;
mod training;
mod world;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};

use network::{Costs, Network};
use world::{Config, RANKS_PER_NODE};

/// Simulates the launcher on clusters of many sizes.
#[derive(Parser, Debug, Clone)]
pub(crate) struct Options {
    /// Whatever is random follows from it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Numbers of ranks.
    #[arg(long, value_delimiter = ',', default_value = "16,128,1024,4096,16384,100000")]
    ranks: Vec<u32>,
    /// Median latency of one way.
    #[arg(long, default_value_t = 100.0)]
    latency_us: f64,
    /// Standard deviation of the latency's logarithm.
    #[arg(long, default_value_t = 0.5)]
    jitter: f64,
    /// Speed of the coordinator's link.
    #[arg(long, default_value_t = 10.0)]
    gbit_per_s: f64,
    /// CPU time of the coordinator's thread: to let an agent in, to take a message, to send one. As
    /// `measure` found it.
    #[arg(long, value_delimiter = ',', num_args = 3, default_value = "42,8,12")]
    cpu_us: Vec<f64>,
    /// The same over TLS.
    #[arg(long, value_delimiter = ',', num_args = 3, default_value = "338,11,15")]
    cpu_tls_us: Vec<f64>,
    /// Puts the tables between the marks of this file.
    #[arg(long)]
    write: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand, Debug, Clone)]
enum Command {
    /// Measures what a real host takes per message, over loopback.
    Measure {
        /// Agents, and clients of the store; each is a connection.
        #[arg(default_value_t = 4000)]
        many: u32,
    },
    #[command(hide = true)]
    Serve {
        #[arg(long)]
        tls: bool,
    },
}

impl Default for Options {
    fn default() -> Self {
        Self::parse_from(["scale"])
    }
}

impl Options {
    fn config(&self, seed: u64, ranks: u32, elastic: bool, tls: bool) -> Config {
        let microseconds = |time: &f64| Duration::from_secs_f64(time / 1e6);
        let costs = if tls { &self.cpu_tls_us } else { &self.cpu_us };
        let [connect, receive, send] = costs.iter().map(microseconds).collect::<Vec<_>>()[..] else {
            panic!("three times are wanted");
        };
        Config {
            seed,
            nodes: ranks.div_ceil(RANKS_PER_NODE),
            elastic,
            network: Network {
                latency: microseconds(&self.latency_us),
                jitter: self.jitter,
                bandwidth: self.gbit_per_s * 1e9 / 8.0,
            },
            costs: Costs { connect, receive, send },
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let options = Options::parse();
    match options.command {
        Some(Command::Measure { many }) => measure::measure(many).await,
        Some(Command::Serve { tls }) => measure::serve(tls).await,
        None => {
            let tables = report::tables(&options);
            match &options.write {
                Some(path) => {
                    let text = fs::read_to_string(path).unwrap();
                    fs::write(path, report::put(&text, &tables).expect("the marks are there")).unwrap();
                }
                None => tables.iter().for_each(|(name, table)| println!("{name}\n\n{table}")),
            }
        }
    }
}
