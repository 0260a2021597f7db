//! The reference of options, docs/options.md, is generated from the definition of the command line.

use std::fmt::Write;
use std::{env, fs};

use clap::{Arg, ArgAction, CommandFactory};

use super::{read, root};

/// If this variable is set, the page is written instead of compared.
const WRITE: &str = "ICE_WRITE_OPTIONS";

const HEAD: &str = "\
# Options

This page lists every option of `ice-launch`. Each takes an underscore for a hyphen as well, like
torchrun's. An option on the command line wins over its variable, and a variable over the cluster.
[Coming from torchrun](torchrun.md) compares the options with torchrun's.
";

/// Returns the text as a cell of a table.
fn cell(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.replace('|', "\\|").replace('<', "&lt;")
}

fn row(arg: &Arg) -> String {
    let short = arg.get_short().map(|short| format!("`-{short}`, ")).unwrap_or_default();
    let takes = match (arg.get_action(), arg.get_value_names()) {
        (ArgAction::Set | ArgAction::Append, Some(names)) => format!(" {}", names.join(" ")),
        _ => String::new(),
    };
    let option = match arg.get_long() {
        Some(long) => format!("{short}`--{long}{takes}`"),
        None => format!("`{}`", arg.get_value_names().unwrap_or_default().join(" ")),
    };
    let variable = arg.get_env().map(|name| format!("`{}`", name.to_string_lossy())).unwrap_or_default();
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    // The first paragraph is a line of the help, without a full stop.
    let help = help.replacen("\n\n", ". ", 1);
    let default = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect::<String>();
    let is_stated = default.is_empty() || help.contains("[default: ") || !arg.get_action().takes_values();
    let default = if is_stated { String::new() } else { format!(" [default: {default}]") };
    format!("| {} | {} | {} |\n", option.replace('|', "\\|"), variable, cell(&format!("{help}{default}")))
}

fn page() -> String {
    let mut command = ice_launch::cli::Cli::command();
    command.build();
    let mut headings: Vec<String> = Vec::new();
    for arg in command.get_arguments() {
        let heading = arg.get_help_heading().unwrap_or("Help").to_owned();
        if !headings.contains(&heading) {
            headings.push(heading);
        }
    }
    let mut page = HEAD.to_owned();
    for heading in headings {
        let _ = write!(page, "\n## {heading}\n\n| option | variable | meaning |\n|---|---|---|\n");
        let args = command.get_arguments().filter(|arg| !arg.is_hide_set());
        args.filter(|arg| arg.get_help_heading().unwrap_or("Help") == heading)
            .for_each(|arg| page += &row(arg));
    }
    page
}

#[test]
fn reference_of_options_is_their_definition() {
    let (path, page) = (root().join("docs/options.md"), page());
    if env::var_os(WRITE).is_some() {
        fs::write(&path, &page).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    assert!(
        read(&path) == page,
        "docs/options.md is old: {WRITE}=1 cargo test -p ice-launch --test book writes it"
    );
}
