//! The command line of `ice-launch`.

use std::io::{self, Write};
use std::process;

use ice_launch::cli::{self, Cli};
use ice_proto::exit::ExitCode;

fn main() -> process::ExitCode {
    let cli = Cli::from_env();
    if let Some(what) = cli.generate.or(cli.print_completion.map(Into::into)) {
        // The reader may have closed the pipe, for example `head`.
        let _ = cli::generate(what, &mut io::stdout().lock());
        return ExitCode::Success.into();
    }
    ice_launch::log_to_stderr();
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
    // If stderr is closed, the exit code still reports the error.
    let _ = writeln!(io::stderr(), "ice-launch: error: {error}");
    code.into()
}
