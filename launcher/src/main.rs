//! The command line of `ice-launch`.

use std::io::{self, IsTerminal, Write};
use std::process;

use ice_launch::cli::{self, Cli};
use ice_proto::exit::ExitCode;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

fn main() -> process::ExitCode {
    let cli = Cli::from_env();
    if let Some(what) = cli.generate.or(cli.print_completion.map(Into::into)) {
        // Who reads it may have seen enough.
        let _ = cli::generate(what, &mut io::stdout().lock());
        return ExitCode::Success.into();
    }
    let filter = std::env::var("ICE_LOG").ok().filter(|filter| !filter.is_empty());
    let filter = filter.and_then(|filter| filter.parse().ok());
    let filter = filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::WARN));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        // It would panic where stderr is closed.
        .log_internal_errors(false);
    tracing_subscriber::registry().with(lines).with(filter).init();
    let plan = match cli.plan() {
        Ok(plan) => plan,
        Err(error) => {
            ice_launch::record_failure(&error);
            return fail(&error, ExitCode::Usage);
        }
    };
    match ice_launch::run(plan) {
        Ok(code) => code.into(),
        Err(error) => fail(&error, error.exit_code()),
    }
}

fn fail(error: &dyn std::error::Error, code: ExitCode) -> process::ExitCode {
    // The exit code tells it too where stderr is closed.
    let _ = writeln!(io::stderr(), "ice-launch: error: {error}");
    code.into()
}
