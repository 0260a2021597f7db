//! Command lines of Python: which interpreter runs what.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::cli::{Program, in_path};

/// Options of the interpreter that take no value and that a template may have, too.
const FLAGS: &[u8] = b"uIEsSBOPqvbd";
/// Bytes of a `#!` line that are looked at, as many as the kernel's.
const SHEBANG: u64 = 256;

/// Program that the interpreter runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Script,
    Module,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Script => "script",
            Self::Module => "module",
        }
    }
}

/// A program as the interpreter of a template starts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PythonCommand {
    /// The interpreter's file if it is not the program's.
    pub(super) interpreter: Option<PathBuf>,
    /// The whole command line, the interpreter's name first.
    pub(super) words: Vec<OsString>,
    /// Where the script or the module stands in it.
    pub(super) at: usize,
    pub(super) kind: Kind,
    /// The name that the kernel gives the process if not the interpreter's.
    pub(super) name: Option<OsString>,
}

impl PythonCommand {
    /// Takes apart a program with these arguments; `None` if it does not run a file or a module by Python.
    pub(super) fn new(program: &Program, args: Vec<OsString>) -> Option<Self> {
        let path = program.path.as_os_str();
        if is_python(&program.path) {
            let (at, kind) = find(&args)?;
            let words = [path.to_owned()].into_iter().chain(args).collect();
            return Some(Self { interpreter: None, words, at: at + 1, kind, name: None });
        }
        let (interpreter, mut words, by_env) = shebang(&program.path)?;
        let at = words.len();
        words.extend([path.to_owned()].into_iter().chain(args));
        // The kernel names a process after the script. env, and an interpreter that is a script itself,
        // execute a program once more, which then has its own name.
        let is_last = !by_env && first_line(&interpreter).is_some_and(|line| !line.starts_with(b"#!"));
        let name = program.path.file_name().filter(|_| is_last).map(OsStr::to_owned);
        Some(Self { interpreter: Some(interpreter), words, at, kind: Kind::Script, name })
    }

    pub(super) fn target(&self) -> &OsStr {
        &self.words[self.at]
    }

    /// The interpreter's own options.
    pub(super) fn options(&self) -> &[OsString] {
        let end = if self.kind == Kind::Module { self.at - 1 } else { self.at };
        &self.words[1..end]
    }

    /// Whether a template can run it: the interpreter itself runs folders, archives and compiled
    /// files, and reports what cannot be opened.
    pub(super) fn is_source(&self) -> bool {
        let path = Path::new(self.target());
        let is_compiled = path.extension().is_some_and(|extension| extension == "pyc");
        let mut start = [0; 2];
        let mut read = || File::open(path).and_then(|mut file| file.read(&mut start)).is_ok();
        self.kind == Kind::Module || (path.is_file() && !is_compiled && read() && start != *b"PK")
    }
}

fn is_python(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"python"))
}

/// Where the script or the module stands in the arguments of an interpreter.
fn find(args: &[OsString]) -> Option<(usize, Kind)> {
    let mut at = 0;
    loop {
        match args.get(at)?.as_bytes() {
            b"-m" => return args.get(at + 1).map(|_| (at + 1, Kind::Module)),
            b"-W" | b"-X" => at += 2,
            [b'-', b'W' | b'X', ..] => at += 1,
            [b'-', flags @ ..] if !flags.is_empty() && flags.iter().all(|flag| FLAGS.contains(flag)) => {
                at += 1;
            }
            // -c, a program on stdin, and what asks for something else than a program.
            [] | [b'-', ..] => return None,
            _ => return Some((at, Kind::Script)),
        }
    }
}

/// The interpreter that the first line of a script names, the words before the script, and whether
/// `env` looks for it.
fn shebang(path: &Path) -> Option<(PathBuf, Vec<OsString>, bool)> {
    let line = first_line(path)?;
    let line = line.strip_prefix(b"#!")?.trim_ascii();
    // The kernel passes all that follows the interpreter as one argument.
    let space = line.iter().position(|byte| matches!(byte, b' ' | b'\t'));
    let (first, rest) = line.split_at(space.unwrap_or(line.len()));
    let (first, rest) = (OsStr::from_bytes(first), OsStr::from_bytes(rest.trim_ascii()));
    if Path::new(first).file_name() == Some(OsStr::new("env")) {
        let interpreter = in_path(Path::new(rest)).filter(|found| is_python(found))?;
        return Some((interpreter, vec![rest.to_owned()], true));
    }
    let is_flag = |option: &[u8]| {
        option.len() > 1
            && find(&[OsStr::from_bytes(option).into(), "x".into()]).is_some_and(|(at, _)| at == 1)
    };
    if !is_python(Path::new(first)) || !(rest.is_empty() || is_flag(rest.as_bytes())) {
        return None;
    }
    let option = Some(rest).filter(|rest| !rest.is_empty()).map(OsStr::to_owned);
    Some((first.into(), [first.to_owned()].into_iter().chain(option).collect(), false))
}

/// The start of a file, at most its first line.
fn first_line(path: &Path) -> Option<Vec<u8>> {
    let mut start = Vec::new();
    File::open(path).ok()?.take(SHEBANG).read_to_end(&mut start).ok()?;
    let end = start.iter().position(|byte| *byte == b'\n').unwrap_or(start.len());
    start.truncate(end);
    Some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(path: &Path, args: &[&str]) -> Option<PythonCommand> {
        let args: Vec<OsString> = args.iter().map(Into::into).collect();
        PythonCommand::new(&Program { path: path.into(), args: args.clone() }, args)
    }

    #[test]
    fn script_and_module_are_found_behind_options() {
        let found = |args: &[&str]| {
            let found = command(Path::new("/usr/bin/python3"), args)?;
            let options: Vec<_> =
                found.options().iter().map(|word| word.to_str().unwrap().to_owned()).collect();
            Some((found.kind, found.target().to_str().unwrap().to_owned(), options.join(" ")))
        };
        let expected = |kind, target: &str, options: &str| Some((kind, target.into(), options.into()));
        assert_eq!(found(&["-u", "a.py", "-m", "x"]), expected(Kind::Script, "a.py", "-u"));
        assert_eq!(found(&["-u", "-m", "a.b", "-c"]), expected(Kind::Module, "a.b", "-u"));
        assert_eq!(
            found(&["-IB", "-X", "dev", "-Wignore", "a"]),
            expected(Kind::Script, "a", "-IB -X dev -Wignore")
        );
        for args in [&["-c", "pass"][..], &["-"], &[], &["-i", "a.py"], &["-u"], &["-m"], &["--help"], &[""]]
        {
            assert_eq!(found(args), None, "{args:?}");
        }
        assert_eq!(command(Path::new("/bin/true"), &["a.py"]), None);
    }

    #[test]
    fn first_line_of_a_script_names_the_interpreter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tool");
        let words = |line: &str| {
            std::fs::write(&path, line).unwrap();
            let found = command(&path, &["-x"])?;
            let words: Vec<_> = found.words.iter().map(|word| word.to_str().unwrap().to_owned()).collect();
            Some((words.join(" "), found.name.is_some()))
        };
        let tool = path.to_str().unwrap();
        // A name is given to what an interpreter runs that is no script itself.
        let python = folder.path().join("python3");
        std::fs::write(&python, "\x7fELF").unwrap();
        let python = python.to_str().unwrap();
        assert_eq!(
            words(&format!("#!{python} -s\nimport x\n")),
            Some((format!("{python} -s {tool} -x"), true))
        );
        assert_eq!(words("#! /v/bin/python\n"), Some((format!("/v/bin/python {tool} -x"), false)));
        for line in ["", "#!/bin/sh\n", "#!/v/bin/python -c\n", "#!/usr/bin/env -S python3 -u\n", "text"] {
            assert_eq!(words(line), None, "{line:?}");
        }
    }
}
