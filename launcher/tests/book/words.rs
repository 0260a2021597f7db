//! Words that readers stumble over, in documentation and comments. Each has a plain replacement,
//! see CONTRIBUTING.md.

use std::fmt::Write;
use std::path::Path;

use super::{files, pages, read, root};

/// Phrases, in lower case. `a/b` in a phrase stands for either word.
const PHRASES: [&str; 8] = [
    "go/goes/going/went/gone on",
    "is/are/was/were/be told",
    "so many",
    "nobody",
    "beside",
    "anew",
    "whoever",
    "where it/there/they/its/this/that/one/none/no/nobody/nothing",
];
/// Words that make a sentence without a named subject, if it begins with them and is not a
/// question.
const HEADS: [&str; 2] = ["what", "who"];

/// Folders whose comments are checked.
const FOLDERS: [&str; 17] = [
    "launcher",
    "rendezvous",
    "worker",
    "crates/c10d",
    "crates/checkpoint",
    "crates/ckpt",
    "crates/core",
    "crates/ice",
    "crates/agent",
    "crates/coordinator",
    "crates/store",
    "crates/testing",
    "crates/link",
    "crates/nn",
    "crates/proto",
    "crates/python",
    "tests",
];

/// A word of a text, without punctuation, in lower case.
struct Word {
    text: String,
    line: usize,
    begins_sentence: bool,
    ends_question: bool,
}

fn words(text: &str) -> Vec<Word> {
    let mut words = Vec::new();
    let (mut is_code, mut begins_sentence) = (false, true);
    for (line, content) in text.lines().enumerate() {
        if content.trim_start().starts_with("```") {
            is_code = !is_code;
        }
        if is_code || content.trim().is_empty() {
            begins_sentence = true;
            continue;
        }
        // Headings and cells of tables are no sentences.
        let is_sentence = !content.starts_with(['#', '|']);
        for word in content.split_whitespace() {
            let plain = word.trim_matches(|c: char| !c.is_alphanumeric());
            if !plain.is_empty() {
                let text = plain.to_lowercase();
                let ends_question = word.contains('?');
                words.push(Word {
                    text,
                    line: line + 1,
                    begins_sentence: begins_sentence && is_sentence,
                    ends_question,
                });
                begins_sentence = false;
            }
            let end = word.trim_end_matches(['"', '`', ')', '*']);
            begins_sentence |= end.ends_with(['.', '!', '?', ':', '|']);
        }
    }
    words
}

/// The phrases in a text, with their lines.
fn found(text: &str) -> Vec<(usize, String)> {
    let words = words(text);
    let phrases: Vec<Vec<Vec<&str>>> = PHRASES
        .iter()
        .map(|phrase| phrase.split(' ').map(|part| part.split('/').collect()).collect())
        .collect();
    let mut found = Vec::new();
    for (at, word) in words.iter().enumerate() {
        for (parts, phrase) in phrases.iter().zip(PHRASES) {
            let here =
                words[at..].iter().zip(parts).take_while(|(word, part)| part.contains(&word.text.as_str()));
            if here.count() == parts.len() {
                found.push((word.line, phrase.to_owned()));
            }
        }
        if word.begins_sentence && HEADS.contains(&word.text.as_str()) {
            let sentence = words[at + 1..].iter().take_while(|word| !word.begins_sentence);
            if !sentence.clone().any(|word| word.ends_question) {
                found.push((word.line, format!("a sentence that begins with `{}`", word.text)));
            }
        }
    }
    found
}

/// The comments of Rust code; other lines are empty.
fn comments(code: &str) -> String {
    let comment = |line: &str| {
        let line = line.trim_start().strip_prefix("//")?;
        Some(line.trim_start_matches(['/', '!']).to_owned())
    };
    code.lines().map(|line| comment(line).unwrap_or_default() + "\n").collect()
}

fn list(path: &Path, found: &[(usize, String)]) -> String {
    found.iter().fold(String::new(), |mut list, (line, what)| {
        let _ = writeln!(list, "{}:{line}: {what}", path.display());
        list
    })
}

#[test]
fn pages_have_plain_words() {
    let mut all = pages();
    all.extend(files(&root().join("docs/design"), "md", false));
    all.extend(files(&root().join("template"), "md", false));
    let list: String = all.iter().map(|page| list(page, &found(&read(page)))).collect();
    assert!(list.is_empty(), "write these in other words:\n{list}");
}

#[test]
fn comments_have_plain_words() {
    let all = FOLDERS.iter().flat_map(|folder| files(&root().join(folder), "rs", true));
    let list: String = all.map(|path| list(&path, &found(&comments(&read(&path))))).collect();
    assert!(list.is_empty(), "write these in other words:\n{list}");
}

#[test]
fn phrases_are_found_across_lines_and_not_in_code_or_questions() {
    let lines = |text: &str| found(text).into_iter().map(|(line, _)| line).collect::<Vec<_>>();
    assert_eq!(lines("The job goes\non without it."), [1]);
    assert_eq!(lines("Fine.\nWhat it has is kept."), [2]);
    assert_eq!(lines("It is there where nobody is."), [1, 1]);
    assert!(lines("What is a rank? It says what it is.").is_empty());
    assert!(lines("```\nwhat goes on\n```").is_empty());
    assert_eq!(lines(&comments("let nobody = 1;\n/// Agents are\n/// told so.")), [2]);
}
