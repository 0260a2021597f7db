use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::{env, fmt, fs};

use serde::Serialize;

use super::{UsageError, python};

/// Stands for the local rank in an argument, like in torchrun.
const LOCAL_RANK: &[u8] = b"${local_rank}";

/// The program that every rank runs.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Arguments of the executable.
    pub args: Vec<OsString>,
}

/// The command that the user typed, for reports: the script instead of the interpreter that runs
/// it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Command {
    /// The script, `-m` with a module, or the executable.
    pub(crate) program: String,
    pub(crate) args: Vec<String>,
    /// The file that is executed.
    pub(crate) executable: PathBuf,
}

/// Number of characters of a command line that reports show.
const SHOWN: usize = 200;

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> =
            std::iter::once(self.program.clone()).chain(self.args.iter().map(|word| quoted(word))).collect();
        let line = words.join(" ");
        match line.char_indices().nth(SHOWN) {
            Some((end, _)) => write!(f, "{} …", &line[..end]),
            None => f.write_str(&line),
        }
    }
}

/// Quotes a word for a shell, on one line.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_./=:,@%+$".contains(c);
    let word = word.replace('\n', " ");
    if !word.is_empty() && word.chars().all(is_plain) {
        word
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Way to execute a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// A `.py` file runs with Python, any other file by itself.
    Guess,
    /// The file runs by itself.
    Executable,
    /// A Python script.
    Script,
    /// A Python module.
    Module,
}

impl Program {
    /// Returns this program with the arguments that it was started with.
    ///
    /// # Errors
    /// Returns a [`UsageError`] if the program's own file cannot be found.
    pub fn current() -> Result<Self, UsageError> {
        let path = env::current_exe()
            .map_err(|error| UsageError::new("program", format!("its own executable: {error}")))?;
        Ok(Self { path, args: env::args_os().skip(1).collect() })
    }

    /// Finds the program of a command line like a shell. Whether the program can be executed turns
    /// out when it is started.
    pub(crate) fn find(command: Vec<OsString>, form: Form) -> Result<Self, UsageError> {
        let mut args = command.into_iter();
        let program = args.next().map(PathBuf::from);
        let program = program.ok_or_else(|| UsageError::new("program", "none was given".into()))?;
        let is_script = program.extension().is_some_and(|extension| extension == "py");
        let python_args: Vec<OsString> = match form {
            Form::Module => vec!["-u".into(), "-m".into(), program.into()],
            Form::Script | Form::Guess if is_script || form == Form::Script => {
                exists(&program)?;
                vec!["-u".into(), program.into()]
            }
            _ => return Ok(Self { path: executable(program)?, args: args.collect() }),
        };
        Ok(Self {
            path: python::find(&|name| env::var_os(name))?,
            args: python_args.into_iter().chain(args).collect(),
        })
    }

    /// Returns the command that the user typed.
    pub(crate) fn command(&self) -> Command {
        let text = |word: &OsStr| word.to_string_lossy().into_owned();
        let mut words: Vec<String> = self.args.iter().map(|word| text(word)).collect();
        let program = match (self.interpreter(), words.get(1).map(String::as_str)) {
            (Some(_), Some("-m")) if words.len() > 2 => {
                format!("-m {}", words.drain(..3).next_back().unwrap_or_default())
            }
            (Some(_), Some(_)) => words.drain(..2).next_back().unwrap_or_default(),
            _ => text(self.path.as_os_str()),
        };
        Command { program, args: words, executable: self.path.clone() }
    }

    /// Returns the Python that the launcher chose for a script or a module.
    fn interpreter(&self) -> Option<&Path> {
        let is_python = self.path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"python"));
        (is_python && self.args.first().is_some_and(|first| first == "-u")).then_some(&self.path)
    }

    /// Returns the script that the interpreter runs.
    pub(crate) fn script(&self) -> Option<&Path> {
        self.interpreter()?;
        self.args.get(1).filter(|script| *script != "-m").map(Path::new)
    }

    /// Returns the interpreter if a shell would start another one for `python`.
    pub(crate) fn unusual_interpreter(&self) -> Option<&Path> {
        let interpreter = self.interpreter()?;
        let usual = in_path(Path::new("python"));
        (usual.as_deref() != Some(interpreter)).then_some(interpreter)
    }

    /// Returns the arguments for a rank, with its local rank in place of `${local_rank}`.
    pub(crate) fn args_of(&self, local_rank: u32) -> impl Iterator<Item = Cow<'_, OsStr>> {
        let number = local_rank.to_string();
        self.args.iter().map(move |argument| substitute(argument, number.as_bytes()))
    }
}

fn substitute<'a>(argument: &'a OsStr, number: &[u8]) -> Cow<'a, OsStr> {
    let mut rest = argument.as_bytes();
    let find = |text: &[u8]| text.windows(LOCAL_RANK.len()).position(|part| part == LOCAL_RANK);
    if find(rest).is_none() {
        return Cow::Borrowed(argument);
    }
    let mut whole = Vec::new();
    while let Some(at) = find(rest) {
        whole.extend_from_slice(&rest[..at]);
        whole.extend_from_slice(number);
        rest = &rest[at + LOCAL_RANK.len()..];
    }
    whole.extend_from_slice(rest);
    Cow::Owned(OsString::from_vec(whole))
}

pub(super) fn executable(program: PathBuf) -> Result<PathBuf, UsageError> {
    if program.components().count() > 1 {
        exists(&program)?;
        return Ok(program);
    }
    in_path(&program).ok_or_else(|| {
        let name = program.display();
        UsageError::new("program", format!("`{name}` is not in the PATH; for a file here write ./{name}"))
    })
}

fn exists(file: &Path) -> Result<(), UsageError> {
    match fs::metadata(file) {
        Ok(meta) if meta.is_dir() => {
            Err(UsageError::new("program", format!("`{}` is a folder", file.display())))
        }
        Ok(_) => Ok(()),
        Err(error) => Err(UsageError::new("program", format!("`{}`: {error}", file.display()))),
    }
}

pub(crate) fn in_path(name: &Path) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(name)).find(|path| is_executable(path))
}

pub(super) fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_local_rank_is_put_into_arguments() {
        for (argument, expected) in [
            ("--gpu=${local_rank}", "--gpu=7"),
            ("${local_rank}${local_rank}", "77"),
            ("$local_rank", "$local_rank"),
            ("", ""),
        ] {
            assert_eq!(substitute(OsStr::new(argument), b"7"), OsStr::new(expected));
        }
    }

    #[test]
    fn a_person_has_started_the_script() {
        let command = |path: &str, args: &[&str]| {
            let args = args.iter().map(Into::into).collect();
            Program { path: path.into(), args }.command()
        };
        let script = command("/usr/bin/python3", &["-u", "train.py", "--text", "two words"]);
        assert_eq!(
            (script.program.as_str(), script.executable.to_str()),
            ("train.py", Some("/usr/bin/python3"))
        );
        assert_eq!(script.to_string(), "train.py --text 'two words'");
        assert_eq!(
            command("/usr/bin/python", &["-u", "-m", "pkg.train", "-x"]).to_string(),
            "-m pkg.train -x"
        );
        assert_eq!(command("/usr/bin/python", &["train.py"]).to_string(), "/usr/bin/python train.py");
        assert_eq!(command("sh", &["-c", "it's\n", ""]).to_string(), r"sh -c 'it'\''s ' ''");
        assert!(command("sh", &[&"x".repeat(1000)]).to_string().ends_with("xxx …"));
    }

    #[test]
    fn forms_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("train.py");
        fs::write(&script, "").unwrap();
        let args = |form, program: &Path| {
            let program = Program::find(vec![program.into(), "--lr".into()], form).unwrap();
            (program.path, program.args)
        };
        let (path, found) = args(Form::Guess, &script);
        assert!(path.file_name().unwrap().to_str().unwrap().starts_with("python"), "{path:?}");
        assert_eq!(found, [OsStr::new("-u"), script.as_os_str(), OsStr::new("--lr")]);
        let (_, found) = args(Form::Module, Path::new("a.module"));
        assert_eq!(found, ["-u", "-m", "a.module", "--lr"]);
        let (path, found) = args(Form::Executable, &script);
        assert_eq!((path, found), (script.clone(), vec!["--lr".into()]));
        let (path, _) = args(Form::Guess, Path::new("sh"));
        assert!(path.ends_with("sh"));
    }
}
