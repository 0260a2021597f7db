//! The module graph of every crate, and its circles.
//!
//! An edge leads from a module that names an item to the module that *defines* the item: imports
//! and re-exports (`pub use`) are followed to their end, since a re-export in a parent hides which
//! of its children another child depends on. Test code is left out, and code for all features is
//! included. A circle is a strongly connected group of modules with one parent, each with the
//! modules below it. Uses between a module and its own children make no circle.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

use crate::support::root;

/// The circles that are left, each as crate, parent and members. The list may only shrink: open a
/// circle by moving the item that closes it to the module which both sides may use.
const KNOWN: &[(&str, &str, &[&str])] = &[
    ("c10d", "", &["error", "ffi"]),
    ("checkpoint", "", &["find", "keep", "parameters", "read", "remote", "staging"]),
    ("checkpoint", "", &["manifest", "stream"]),
    ("core", "", &["checkpoint", "data", "graph", "meter", "node", "precision", "run", "task"]),
    ("core", "data", &["items", "readers", "stream"]),
    ("core", "data::readers", &["token_files", "tokens"]),
    ("core", "graph", &["executable", "hyper", "outputs"]),
    ("ice", "", &["error", "run"]),
    ("launcher", "", &["cli", "dispatcher", "error", "logs", "preempt", "report", "supervise", "warm"]),
    ("launcher", "cli", &["program", "python"]),
    ("launcher", "cli::args", &["launch", "rendezvous"]),
];

/// A circle of a crate: the path of the parent, and the names of the members.
#[derive(Debug)]
struct Circle {
    name: String,
    parent: String,
    members: BTreeSet<String>,
}

impl Circle {
    /// Whether it is a part of another circle.
    fn is_in(&self, other: &Self) -> bool {
        (&self.name, &self.parent) == (&other.name, &other.parent) && self.members.is_subset(&other.members)
    }
}

/// A path of names: of a module below the crate's root, or as code has it.
type Names = Vec<String>;

#[derive(Default)]
struct Module {
    children: BTreeSet<String>,
    /// Items that the module defines.
    items: BTreeSet<String>,
    /// Imported and re-exported names, with the paths that they stand for.
    imports: BTreeMap<String, Vec<Names>>,
    /// Modules and enums of which all names are imported.
    globs: Vec<Names>,
    /// Paths that the module's code names.
    uses: BTreeSet<Names>,
}

/// The modules of one crate, by path.
#[derive(Default)]
struct Crate(BTreeMap<Names, Module>);

impl Crate {
    fn read(library: &Path) -> Self {
        let mut all = Self::default();
        let folder = library.parent().unwrap_or(library);
        all.file(library, folder, &Vec::new());
        all
    }

    /// Reads a module's file, and the files of its children in `folder`.
    fn file(&mut self, file: &Path, folder: &Path, module: &Names) {
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{file:?}: {error}"));
        let tokens = TokenStream::from_str(&text).unwrap_or_else(|error| panic!("{file:?}: {error}"));
        self.code(tokens.into_iter().collect(), folder, module);
    }

    fn module(&mut self, module: &Names) -> &mut Module {
        self.0.entry(module.clone()).or_default()
    }

    /// Reads code at any depth: items of functions count as items of their module.
    fn code(&mut self, tokens: Vec<TokenTree>, folder: &Path, module: &Names) {
        let mut at = 0;
        while at < tokens.len() {
            if is_test_attribute(&tokens[at..]) {
                at = after_item(&tokens, at);
                continue;
            }
            match &tokens[at] {
                TokenTree::Ident(word) if word == "use" => {
                    let end =
                        (at..tokens.len()).find(|end| is_punct(&tokens[*end], ';')).unwrap_or(tokens.len());
                    self.import(&tokens[at + 1..end], &Vec::new(), module);
                    at = end + 1;
                }
                TokenTree::Ident(word) if word == "mod" => at = self.child(&tokens, at, folder, module),
                TokenTree::Ident(word) => {
                    let defines = ["struct", "enum", "union", "trait", "fn", "const", "static", "type"];
                    let name = tokens.get(at + 1).and_then(ident);
                    if let Some(name) = name.filter(|_| defines.iter().any(|keyword| word == keyword)) {
                        self.module(module).items.insert(name);
                        at += 2;
                        continue;
                    }
                    let (path, end) = path_from(&tokens, at);
                    self.module(module).uses.insert(path);
                    at = end;
                }
                TokenTree::Group(group) => {
                    self.code(group.stream().into_iter().collect(), folder, module);
                    at += 1;
                }
                _ => at += 1,
            }
        }
    }

    /// Reads `mod name;` or `mod name { … }`, and returns the index after it.
    fn child(&mut self, tokens: &[TokenTree], at: usize, folder: &Path, module: &Names) -> usize {
        let Some(name) = tokens.get(at + 1).and_then(ident) else { return at + 1 };
        let mut child = module.clone();
        child.push(name.clone());
        self.module(module).children.insert(name.clone());
        self.module(&child);
        match tokens.get(at + 2) {
            Some(TokenTree::Group(body)) => {
                self.code(body.stream().into_iter().collect(), &folder.join(&name), &child);
            }
            _ => {
                let alone = folder.join(format!("{name}.rs"));
                let file = if alone.exists() { alone } else { folder.join(&name).join("mod.rs") };
                self.file(&file, &folder.join(&name), &child);
            }
        }
        at + 3
    }

    /// Reads the tree of a `use`, which begins with `prefix`.
    fn import(&mut self, tree: &[TokenTree], prefix: &Names, module: &Names) {
        let mut path = prefix.clone();
        let mut at = 0;
        while let Some(token) = tree.get(at) {
            match token {
                TokenTree::Ident(word) if word == "as" => {
                    if let Some(name) = tree.get(at + 1).and_then(ident) {
                        self.module(module).imports.entry(name).or_default().push(path);
                    }
                    return;
                }
                TokenTree::Ident(word) => path.push(word.to_string()),
                TokenTree::Punct(punct) if punct.as_char() == '*' => {
                    self.module(module).globs.push(path);
                    return;
                }
                TokenTree::Group(group) => {
                    let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                    for branch in
                        inner.split(|token| is_punct(token, ',')).filter(|branch| !branch.is_empty())
                    {
                        self.import(branch, &path, module);
                    }
                    return;
                }
                _ => {}
            }
            at += 1;
        }
        // `use a::{self}` imports the name `a`.
        if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
            path.pop();
        }
        if let Some(name) = path.last().cloned() {
            self.module(module).imports.entry(name).or_default().push(path);
        }
    }

    /// The modules that define what a path in `from` names. Empty for other crates' items.
    fn resolve(&self, from: &Names, path: &[String], seen: &mut BTreeSet<(Names, Names)>) -> BTreeSet<Names> {
        if !seen.insert((from.clone(), path.to_vec())) {
            return BTreeSet::new();
        }
        let Some((first, rest)) = path.split_first() else { return BTreeSet::new() };
        match first.as_str() {
            "crate" => self.descend(&Vec::new(), rest, seen),
            "self" => self.descend(from, rest, seen),
            "super" => {
                let mut parent = from.clone();
                parent.pop();
                match rest.first() {
                    Some(next) if next == "super" => self.resolve(&parent, rest, seen),
                    _ => self.descend(&parent, rest, seen),
                }
            }
            _ => self.descend(from, path, seen),
        }
    }

    fn descend(&self, from: &Names, path: &[String], seen: &mut BTreeSet<(Names, Names)>) -> BTreeSet<Names> {
        let (Some(module), Some((first, rest))) = (self.0.get(from), path.split_first()) else {
            return BTreeSet::new();
        };
        if module.items.contains(first) {
            return BTreeSet::from([from.clone()]);
        }
        if module.children.contains(first) {
            let mut child = from.clone();
            child.push(first.clone());
            return self.descend(&child, rest, seen);
        }
        let follow = |target: &Names, rest: &[String], seen: &mut BTreeSet<(Names, Names)>| {
            // A path that starts with its own name is one of another crate.
            let starts_here = ["crate", "self", "super"].contains(&target[0].as_str())
                || module.children.contains(&target[0])
                || (target[0] != *first && module.imports.contains_key(&target[0]));
            let whole = [target.as_slice(), rest].concat();
            if starts_here { self.resolve(from, &whole, seen) } else { BTreeSet::new() }
        };
        let mut found = BTreeSet::new();
        for target in module.imports.get(first).into_iter().flatten() {
            found.extend(follow(target, rest, seen));
        }
        if found.is_empty() {
            for target in &module.globs {
                found.extend(follow(target, path, seen));
            }
        }
        found
    }

    /// For each module those that define what it names.
    fn edges(&self) -> BTreeMap<&Names, BTreeSet<Names>> {
        let targets = |name: &Names, module: &Module| {
            let is_known = |path: &&Names| {
                let first = &path[0];
                ["crate", "self", "super"].contains(&first.as_str())
                    || module.children.contains(first)
                    || module.imports.contains_key(first)
                    || !module.globs.is_empty()
            };
            let named = module.imports.values().flatten().chain(module.uses.iter().filter(is_known));
            named.flat_map(|path| self.resolve(name, path, &mut BTreeSet::new())).collect()
        };
        self.0.iter().map(|(name, module)| (name, targets(name, module))).collect()
    }

    /// The circles, each as the path of the parent and the names of its members.
    fn circles(&self) -> Vec<(String, BTreeSet<String>)> {
        let edges = self.edges();
        let mut circles = Vec::new();
        for (parent, module) in &self.0 {
            let depth = parent.len();
            let below = |path: &Names| path.starts_with(parent).then(|| path.get(depth).cloned()).flatten();
            let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
            for (from, targets) in &edges {
                let Some(from) = below(from) else { continue };
                let targets = targets.iter().filter_map(below).filter(|to| *to != from);
                graph.entry(from.clone()).or_default().extend(targets);
            }
            let reach = |start: &String| {
                let (mut seen, mut open) = (BTreeSet::new(), vec![start]);
                while let Some(next) = open.pop() {
                    for to in graph.get(next).into_iter().flatten() {
                        if seen.insert(to) {
                            open.push(to);
                        }
                    }
                }
                seen
            };
            let reached: BTreeMap<&String, BTreeSet<&String>> =
                module.children.iter().map(|child| (child, reach(child))).collect();
            let mut done = BTreeSet::new();
            for (child, from_child) in &reached {
                let circle: BTreeSet<String> = (from_child.iter())
                    .filter(|other| reached.get(*other).is_some_and(|back| back.contains(child)))
                    .map(|other| (*other).clone())
                    .collect();
                if circle.len() > 1 && done.insert(circle.clone()) {
                    circles.push((parent.join("::"), circle));
                }
            }
        }
        circles
    }
}

fn ident(token: &TokenTree) -> Option<String> {
    match token {
        TokenTree::Ident(word) => Some(word.to_string()),
        _ => None,
    }
}

fn is_punct(token: &TokenTree, char: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == char)
}

/// Reads `a::b::c`, and returns the index after it.
fn path_from(tokens: &[TokenTree], mut at: usize) -> (Names, usize) {
    let mut path = Vec::new();
    while let Some(word) = tokens.get(at).and_then(ident) {
        path.push(word);
        at += 1;
        let colons = tokens.get(at..at + 2).is_some_and(|two| two.iter().all(|token| is_punct(token, ':')));
        if !colons {
            break;
        }
        at += 2;
    }
    (path, at)
}

/// Whether the tokens begin with `#[cfg(test)]`, alone or within `all(…)`.
fn is_test_attribute(tokens: &[TokenTree]) -> bool {
    let [TokenTree::Punct(hash), TokenTree::Group(group), ..] = tokens else { return false };
    let text = group.stream().to_string().replace(' ', "");
    hash.as_char() == '#' && (text.starts_with("cfg(test") || text.starts_with("cfg(all(test"))
}

/// The index after the item that begins with an attribute: after its `;`, or after its body.
fn after_item(tokens: &[TokenTree], mut at: usize) -> usize {
    while let Some(token) = tokens.get(at) {
        at += 1;
        let is_body = matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace);
        if is_punct(token, ';') || (is_body && !tokens.get(at).is_some_and(|next| is_punct(next, ';'))) {
            return at;
        }
    }
    at
}

/// The crates of the workspace that have modules, by name and root file.
fn crates() -> BTreeMap<String, PathBuf> {
    let members = fs::read_dir(root().join("crates")).unwrap().map(|entry| entry.unwrap().path());
    let folders = members.chain(["launcher", "rendezvous", "worker"].map(|name| root().join(name)));
    let root_file = |folder: PathBuf| {
        let name = folder.file_name()?.to_str()?.to_owned();
        let file = ["lib.rs", "main.rs"].map(|file| folder.join("src").join(file));
        file.into_iter().find(|file| file.exists()).map(|file| (name, file))
    };
    folders.filter_map(root_file).collect()
}

#[test]
fn modules_form_no_circles_but_the_known_ones() {
    let crates = crates();
    assert!(crates.len() > 8, "{crates:?}");
    let mut found = Vec::new();
    for (name, file) in &crates {
        for (parent, members) in Crate::read(file).circles() {
            found.push(Circle { name: name.clone(), parent, members });
        }
    }
    let known: Vec<Circle> = KNOWN
        .iter()
        .map(|(name, parent, members)| Circle {
            name: (*name).to_owned(),
            parent: (*parent).to_owned(),
            members: circle(members),
        })
        .collect();
    let new: Vec<_> = found.iter().filter(|circle| !known.iter().any(|known| circle.is_in(known))).collect();
    assert!(new.is_empty(), "new circles of modules: {new:#?}");
    let open: Vec<_> = known.iter().filter(|known| !found.iter().any(|circle| circle.is_in(known))).collect();
    assert!(open.is_empty(), "these circles are open now, remove them from the list: {open:#?}");
}

/// Writes the files of a crate, and returns its circles.
fn circles_of(files: &[(&str, &str)]) -> Vec<(String, BTreeSet<String>)> {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let file = folder.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
    Crate::read(&folder.path().join("lib.rs")).circles()
}

fn circle(members: &[&str]) -> BTreeSet<String> {
    members.iter().map(|member| (*member).to_owned()).collect()
}

#[test]
fn circle_hidden_by_a_re_export_is_found() {
    let library = "mod a; mod b; pub use a::A; pub use b::B;";
    let a = "use crate::B; pub struct A(B);";
    let found =
        circles_of(&[("lib.rs", library), ("a.rs", a), ("b.rs", "pub struct B; fn f(_: &crate::A) {}")]);
    assert_eq!(found, [(String::new(), circle(&["a", "b"]))]);
    // In test code alone it is not one.
    let tests = "pub struct B; #[cfg(test)] mod tests { use crate::A; }";
    assert_eq!(circles_of(&[("lib.rs", library), ("a.rs", a), ("b.rs", tests)]), []);
}

#[test]
fn circle_through_a_renamed_module_a_glob_and_three_files_is_found() {
    let found = circles_of(&[
        ("lib.rs", "mod m;"),
        ("m/mod.rs", "mod a; mod b; mod c; pub use self::c::*; use std::fmt;"),
        ("m/a.rs", "use super::b as other; fn f() { other::g() }"),
        ("m/b.rs", "use super::C; pub fn g() -> C { C }"),
        ("m/c.rs", "pub struct C; impl C { fn h() { super::a::f() } }"),
    ]);
    assert_eq!(found, [("m".to_owned(), circle(&["a", "b", "c"]))]);
}

#[test]
fn uses_between_a_module_and_its_children_are_no_circle() {
    let found = circles_of(&[
        ("lib.rs", "mod a; mod b; pub use b::B;"),
        ("a.rs", "mod part; use crate::B; pub struct A; fn f() { part::g() }"),
        ("a/part.rs", "use super::A; pub fn g() -> A { A }"),
        ("b.rs", "pub struct B;"),
    ]);
    assert_eq!(found, []);
}
