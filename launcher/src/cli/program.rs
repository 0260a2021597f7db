use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::{env, fs};

use super::UsageError;

/// What is started as every rank.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

impl Program {
    /// This very program with the arguments that it was started with.
    ///
    /// # Errors
    /// [`UsageError`] where its own file cannot be found.
    pub fn current() -> Result<Self, UsageError> {
        let path = env::current_exe()
            .map_err(|error| UsageError::new("program", format!("its own executable: {error}")))?;
        Ok(Self { path, args: env::args_os().skip(1).collect() })
    }

    /// Finds the program of a command line as a shell would; a `.py` file runs with the `python` of the PATH. Whether it can be executed is found
    /// out when it is started.
    ///
    /// # Errors
    /// [`UsageError`] where there is no such file.
    pub fn find(command: Vec<OsString>) -> Result<Self, UsageError> {
        let mut args = command.into_iter();
        let program = args.next().map(PathBuf::from);
        let program = program.ok_or_else(|| UsageError::new("program", "none was given".into()))?;
        if program.extension().is_some_and(|extension| extension == "py") {
            exists(&program)?;
            let python = ["python", "python3"].iter().find_map(|name| in_path(Path::new(name)));
            let path = python.ok_or_else(|| {
                UsageError::new("program", "a Python script, and no `python` in the PATH".into())
            })?;
            return Ok(Self { path, args: [program.into()].into_iter().chain(args).collect() });
        }
        let path = if program.components().count() > 1 {
            exists(&program)?;
            program
        } else {
            in_path(&program).ok_or_else(|| {
                let name = program.display();
                UsageError::new(
                    "program",
                    format!("`{name}` is not in the PATH; for a file here write ./{name}"),
                )
            })?
        };
        Ok(Self { path, args: args.collect() })
    }
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

fn in_path(name: &Path) -> Option<PathBuf> {
    let executable = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(name)).find(executable)
}
