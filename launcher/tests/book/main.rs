//! Tests of the documentation. Every page is in the book. Every link and every included part of an
//! example leads to its target. The messages that the page of troubleshooting explains are those of
//! the program. No path is one of a single machine.

mod options;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::iter::Peekable;
use std::path::{Path, PathBuf};
use std::str::Chars;

use pulldown_cmark::{Event, Parser, Tag, TagEnd};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .unwrap_or_else(|error| panic!("the root: {error}"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Returns the files of a folder with this extension. `below` includes those of folders below.
fn files(folder: &Path, extension: &str, below: bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.unwrap_or_else(|error| panic!("{}: {error}", folder.display())).path();
        if path.is_dir() && below {
            found.extend(files(&path, extension, below));
        } else if path.extension().is_some_and(|this| this == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Returns all Markdown for readers: the pages of the book, and the pages in the root.
fn pages() -> Vec<PathBuf> {
    let mut pages = files(&root().join("docs"), "md", false);
    pages.extend(files(&root(), "md", false));
    pages
}

/// The links of a page, and the anchors of its headings.
#[derive(Default)]
struct Page {
    links: Vec<String>,
    anchors: BTreeSet<String>,
}

/// Returns the anchor of a heading, like mdBook and code hosts.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
}

fn parse(path: &Path) -> Page {
    let mut page = Page::default();
    let mut heading: Option<String> = None;
    for event in Parser::new_ext(&read(path), pulldown_cmark::Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                page.links.push(dest_url.into_string())
            }
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::End(TagEnd::Heading(_)) => {
                page.anchors.insert(anchor(&heading.take().unwrap_or_default()));
            }
            Event::Text(text) | Event::Code(text) => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&text);
                }
            }
            _ => {}
        }
    }
    page
}

#[test]
fn every_page_is_in_the_book_once() {
    let docs = root().join("docs");
    let listed: Vec<String> = parse(&docs.join("SUMMARY.md")).links;
    for page in files(&docs, "md", false) {
        let name = page.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let times = listed.iter().filter(|link| **link == name).count();
        assert_eq!(times, usize::from(name != "SUMMARY.md"), "{name} is in docs/SUMMARY.md {times} times");
    }
}

#[test]
fn every_link_leads_somewhere() {
    let parsed: BTreeMap<PathBuf, Page> =
        pages().into_iter().map(|path| (path.clone(), parse(&path))).collect();
    let mut dead = Vec::new();
    for (path, page) in &parsed {
        let from = path.parent().unwrap_or(path);
        for link in page.links.iter().filter(|link| !link.contains("://")) {
            let (file, fragment) =
                link.split_once('#').map_or((link.as_str(), None), |(file, at)| (file, Some(at)));
            let target = if file.is_empty() { path.clone() } else { from.join(file) };
            let target = target.canonicalize().unwrap_or(target);
            let has_heading = |at: &str| parsed.get(&target).is_some_and(|page| page.anchors.contains(at));
            if !target.exists() || fragment.is_some_and(|at| !has_heading(at)) {
                dead.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(dead.is_empty(), "dead links:\n{}", dead.join("\n"));
}

/// Returns the lines between two marks of an example, without their common indentation.
fn part(source: &str, name: &str) -> Option<String> {
    let (begin, end) = (format!("// ANCHOR: {name}"), format!("// ANCHOR_END: {name}"));
    let lines = source.lines().skip_while(|line| line.trim() != begin).skip(1);
    let lines: Vec<&str> = lines.take_while(|line| line.trim() != end).collect();
    let indents = lines.iter().filter(|line| !line.trim().is_empty());
    let indent = indents.map(|line| line.len() - line.trim_start().len()).min()?;
    Some(lines.iter().map(|line| format!("{}\n", line.get(indent..).unwrap_or_default())).collect())
}

#[test]
fn shown_parts_of_examples_are_those_of_the_examples() {
    let mut shown = 0;
    for path in files(&root().join("docs"), "md", false) {
        let text = read(&path);
        assert!(!text.contains("{{#"), "{}: nobody sees what mdBook would include", path.display());
        for marked in text.split("<!-- ../").skip(1) {
            let of = path.display();
            let (place, block) =
                marked.split_once(" -->\n```rust\n").unwrap_or_else(|| panic!("{of}: {marked}"));
            let (file, name) = place.split_once(':').unwrap_or_else(|| panic!("{of}: {place} names no part"));
            let code = block.split("```").next().unwrap_or_default();
            let part = part(&read(&root().join(file)), name);
            assert_eq!(Some(code), part.as_deref(), "{of} shows another `{name}` than {file} has");
            shown += 1;
        }
    }
    assert!(shown > 5, "{shown} parts of examples are shown");
}

/// Reads a string literal after its opening quote, with … for each placeholder of a format.
fn literal(code: &mut Peekable<Chars<'_>>) -> String {
    let mut text = String::new();
    while let Some(c) = code.next() {
        match c {
            '"' => break,
            '\\' => match code.next() {
                Some('\n') => while code.next_if(|c| c.is_whitespace()).is_some() {},
                Some('n') => text.push('\n'),
                Some(escaped) => text.push(escaped),
                None => {}
            },
            '{' if code.next_if_eq(&'{').is_none() => {
                while code.next_if(|c| *c != '}').is_some() {}
                code.next();
                text.push('…');
            }
            '}' if code.next_if_eq(&'}').is_some() => text.push('}'),
            c => text.push(c),
        }
    }
    text
}

/// Returns the string literals of code that is not a test.
fn messages() -> Vec<String> {
    let folders =
        ["launcher/src", "rendezvous/src", "worker/src", "crates"].map(|folder| root().join(folder));
    let sources = folders.iter().flat_map(|folder| files(folder, "rs", true));
    let is_test = |path: &PathBuf| {
        path.iter().any(|part| ["tests", "tests.rs", "simulation"].map(OsStr::new).contains(&part))
    };
    let mut messages = Vec::new();
    for source in sources.filter(|path| !is_test(path)).map(|path| read(&path)) {
        let code = source.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let code: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        let code = code.join("\n").replace("'\"'", "");
        let mut rest = code.chars().peekable();
        while let Some(c) = rest.next() {
            if c == '"' {
                messages.push(literal(&mut rest));
            }
        }
    }
    messages
}

#[test]
fn explained_messages_are_those_of_the_program() {
    let messages = messages();
    let page = read(&root().join("docs/troubleshooting.md"));
    let explained: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    assert!(explained.len() > 30, "{} messages are explained", explained.len());
    let unknown: Vec<_> =
        explained.iter().filter(|text| !messages.iter().any(|message| message.contains(**text))).collect();
    assert!(
        unknown.is_empty(),
        "docs/troubleshooting.md explains what the program does not say: {unknown:#?}"
    );
}

#[test]
fn no_page_has_a_path_of_somebodys_machine() {
    for path in pages() {
        let text = read(&path);
        let words = text.split(|c: char| c.is_whitespace() || "`\"'()=,:".contains(c));
        let ours = root().display().to_string();
        let is_ours = |word: &&str| {
            word.starts_with(&ours)
                || ["/home/", "/root/", "/Users/", "/work/", "/tmp/", "/mnt/"]
                    .iter()
                    .any(|at| word.starts_with(at))
        };
        let found: Vec<&str> = words.filter(is_ours).collect();
        assert!(found.is_empty(), "{}: {found:?}", path.display());
    }
}

#[test]
fn the_help_points_into_the_book() {
    use clap::CommandFactory;
    let help = ice_launch::cli::Cli::command().render_long_help().to_string();
    assert!(named_pages(&help, "the help") >= 3, "{help}");
}

/// Returns the number of pages that a text names. All of them must exist, with the headings that
/// are named.
fn named_pages(text: &str, of: &str) -> usize {
    let names = text.split(|c: char| c.is_whitespace() || "`(),;".contains(c));
    let names: Vec<&str> = names.filter(|name| name.starts_with("docs/") && name.contains(".md")).collect();
    for name in &names {
        let name = name.trim_end_matches('.');
        let (page, heading) = name.split_once('#').map_or((name, None), |(page, at)| (page, Some(at)));
        let path = root().join(page);
        assert!(path.exists(), "{of} names {page}, which is not there");
        let is_there = heading.is_none_or(|at| parse(&path).anchors.contains(at));
        assert!(is_there, "{of} names {name}, and there is no such heading");
    }
    names.len()
}

/// Returns the files of a public module and of the modules below it.
fn public_modules(file: &Path, below: &Path) -> Vec<PathBuf> {
    let mut found = vec![file.to_path_buf()];
    let text = read(file);
    for (before, line) in text.lines().zip(text.lines().skip(1)) {
        let name = line.strip_prefix("pub mod ").and_then(|rest| rest.strip_suffix(';'));
        if let Some(name) = name.filter(|_| before != "#[doc(hidden)]") {
            let (alone, folder) = (below.join(format!("{name}.rs")), below.join(name));
            let file = if alone.exists() { alone } else { folder.join("mod.rs") };
            found.extend(public_modules(&file, &folder));
        }
    }
    found
}

#[test]
fn every_public_module_points_into_the_book() {
    let crates = fs::read_dir(root().join("crates")).unwrap_or_else(|error| panic!("crates: {error}"));
    let folders = crates.map(|entry| entry.unwrap_or_else(|error| panic!("crates: {error}")).path());
    let mut modules = 0;
    for folder in folders.chain(["launcher", "rendezvous", "worker"].map(|name| root().join(name))) {
        let sources = folder.join("src");
        for file in files(&sources, "rs", true) {
            let text = read(&file);
            let docs = text.lines().filter(|line| line.trim_start().starts_with("//"));
            named_pages(&docs.collect::<Vec<_>>().join("\n"), &file.display().to_string());
        }
        let library = Some(sources.join("lib.rs")).filter(|library| library.exists());
        for file in library.iter().flat_map(|library| public_modules(library, &sources)) {
            let text = read(&file);
            let docs: Vec<&str> = text.lines().take_while(|line| line.starts_with("//!")).collect();
            let of = file.display().to_string();
            assert!(named_pages(&docs.join("\n"), &of) > 0, "{of} points to no page of the book");
            modules += 1;
        }
    }
    assert!(modules > 20, "{modules} public modules");
}
