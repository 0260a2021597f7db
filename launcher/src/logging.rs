//! Diagnostics on standard error.

use std::env::{self, VarError};
use std::io::{self, IsTerminal};

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Selects the diagnostics: a level such as `debug`, or levels of modules such as
/// `ice_rendezvous=debug,warn`.
const VARIABLE: &str = "ICE_LOG";

/// Writes tracing events to standard error, warnings and errors by default. `ICE_LOG` selects
/// others, in the syntax of [`Targets`]. Does nothing if the program already has a subscriber.
pub fn log_to_stderr() {
    let (filter, mistake) = match env::var(VARIABLE) {
        Ok(text) => selected(&text),
        Err(VarError::NotUnicode(text)) => selected(&text.to_string_lossy()),
        Err(VarError::NotPresent) => (warnings(), None),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        // The layer would print the error of a closed stderr to stderr, which panics.
        .log_internal_errors(false);
    let _ = tracing_subscriber::registry().with(lines).with(filter).try_init();
    if let Some(mistake) = mistake {
        tracing::warn!("{mistake}");
    }
}

fn warnings() -> Targets {
    Targets::new().with_default(LevelFilter::WARN)
}

/// Returns the filter, and a message if the text is not a filter.
fn selected(text: &str) -> (Targets, Option<String>) {
    if text.trim().is_empty() {
        return (warnings(), None);
    }
    // `Targets` accepts any word, such as `verbose`, as the name of a module.
    let parsed = text.parse::<Targets>().map_err(|error| error.to_string());
    let named = parsed.and_then(|targets| {
        let word = text.split(',').map(str::trim).find(|word| !is_known(word));
        word.map_or(Ok(targets), |word| Err(format!("`{word}` is not a level")))
    });
    match named {
        Ok(targets) => (targets, None),
        Err(why) => {
            let hint = "hint: ICE_LOG=debug, or ICE_LOG=ice_rendezvous=debug,warn";
            (
                warnings(),
                Some(format!("{VARIABLE}=`{}`: {why}; warnings are shown; {hint}", text.escape_debug())),
            )
        }
    }
}

/// Whether a part of the filter is a level, or a Rust path or module with one.
fn is_known(word: &str) -> bool {
    word.contains(['=', ':', '_']) || word.parse::<LevelFilter>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_is_level_or_modules() {
        for (text, module, level, is_shown) in [
            ("", "ice_launch", tracing::Level::WARN, true),
            (" ", "ice_launch", tracing::Level::INFO, false),
            ("debug", "anything", tracing::Level::DEBUG, true),
            ("ERROR", "ice_launch", tracing::Level::WARN, false),
            ("ice_rendezvous=debug,warn", "ice_rendezvous::server", tracing::Level::DEBUG, true),
            ("ice_rendezvous=debug,warn", "ice_launch", tracing::Level::INFO, false),
            ("off", "ice_launch", tracing::Level::ERROR, false),
        ] {
            let (filter, mistake) = selected(text);
            assert_eq!(mistake, None, "{text}");
            assert_eq!(filter.would_enable(module, &level), is_shown, "{text}");
        }
    }

    #[test]
    fn filter_that_is_none_is_named_and_warnings_are_shown() {
        for wrong in ["verbose", "warn,loud", "ice_launch=loud", "a=b=c"] {
            let (filter, mistake) = selected(wrong);
            let mistake = mistake.unwrap();
            assert!(mistake.contains(wrong) && mistake.contains("hint: ICE_LOG=debug"), "{mistake}");
            assert_eq!(filter, warnings());
        }
        assert!(selected("loud\u{1b}[2J").1.unwrap().contains("loud\\u{1b}[2J"));
    }
}
