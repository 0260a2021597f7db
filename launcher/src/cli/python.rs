//! Finds the Python that runs a script.
//!
//! torchrun is a Python program, so its ranks run with the Python that it is installed for. The
//! launcher is not a Python program, and looks for the same Python in this order:
//!
//! 1. `PYTHON_EXEC`.
//! 2. The `python` in the folder that the launcher was started from, if that folder is the `bin` of
//!    an environment: `../pyvenv.cfg` or `../conda-meta` exists. The environment need not be
//!    activated.
//! 3. The activated environment: `VIRTUAL_ENV`, then `CONDA_PREFIX`.
//! 4. `python`, then `python3`, of the PATH.
//!
//! Rule 2 uses the path by which the launcher was started, without following links. Tools that
//! install each program into an environment of its own (pipx, uv) put links into the PATH, and that
//! environment has no PyTorch.
//!
//! A version manager's shim (pyenv, asdf, mise) finds out at each start which Python it stands for,
//! which takes longer than the start of Python itself. The launcher therefore asks a shim once and
//! starts the Python directly. A wrapper that sets variables for its Python, such as `PYTHONPATH`,
//! runs each time: ranks need these variables.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::UsageError;
use super::program::{executable, in_path, is_executable};

/// Finds the Python for a script or a module.
pub(super) fn find(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<PathBuf, UsageError> {
    let set = |name| variable(name).filter(|value| !value.is_empty());
    if let Some(python) = set("PYTHON_EXEC") {
        return executable(python.into());
    }
    let launcher = std::env::args_os().next().and_then(|name| started_from(&name));
    let own = launcher.filter(|bin| is_environment(bin));
    let activated = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(set);
    let folders = own.into_iter().chain(activated.map(|folder| Path::new(&folder).join("bin")));
    let found = folders.filter_map(|bin| python_in(&bin)).next();
    let found = found.or_else(|| NAMES.iter().find_map(|name| in_path(Path::new(name))));
    found.map(|python| real(&python).unwrap_or(python)).ok_or_else(|| {
        let problem =
            "needs Python, and there is no `python` in the PATH: activate its environment, or set PYTHON_EXEC";
        UsageError::new("program", problem.into())
    })
}

const NAMES: [&str; 2] = ["python", "python3"];

fn python_in(bin: &Path) -> Option<PathBuf> {
    NAMES.iter().map(|name| bin.join(name)).find(|path| is_executable(path))
}

/// Returns the folder of the program that a shell starts by this name.
fn started_from(name: &OsStr) -> Option<PathBuf> {
    let path = Path::new(name);
    let path = if path.components().count() > 1 { path.to_owned() } else { in_path(path)? };
    std::path::absolute(path).ok()?.parent().map(Path::to_owned)
}

fn is_environment(bin: &Path) -> bool {
    bin.parent().is_some_and(|root| root.join("pyvenv.cfg").is_file() || root.join("conda-meta").is_dir())
}

/// Variables (or prefixes of them) that shims, shells and Python itself change, and that a program
/// does not depend on.
const OF_SHIMS: [&str; 10] =
    ["PATH", "PYENV_", "ASDF_", "MISE_", "__MISE_", "SHLVL", "PWD", "OLDPWD", "_=", "LC_CTYPE"];

/// Python code that writes the interpreter's path and its environment, separated by NUL.
const ASK: &str = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(\
    [os.fsencode(sys.executable)] + [k + b'=' + v for k, v in os.environb.items()]))";

/// Whether a wrapper has set or changed a variable that a program may depend on.
fn sets_something<'a>(mut variables: impl Iterator<Item = &'a [u8]>) -> bool {
    let own: BTreeSet<Vec<u8>> = std::env::vars_os()
        .map(|(name, value)| [name.as_encoded_bytes(), b"=", value.as_encoded_bytes()].concat())
        .collect();
    variables.any(|variable| {
        let is_of_shims = OF_SHIMS.iter().any(|prefix| variable.starts_with(prefix.as_bytes()));
        !is_of_shims && !own.contains(variable)
    })
}

/// Returns the Python that a shim stands for. `None` if `python` is itself a Python, a wrapper that
/// sets variables for one, or fails.
fn real(python: &Path) -> Option<PathBuf> {
    let mut start = [0; 2];
    let is_script =
        File::open(python).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == *b"#!";
    let file = fs::canonicalize(python).ok()?;
    let is_named = file.file_name().is_some_and(|name| {
        let name = name.as_encoded_bytes();
        name.starts_with(b"python") || name.starts_with(b"pypy")
    });
    if !is_script && is_named {
        return None;
    }
    let answer =
        Command::new(python).args(["-I", "-c", ASK]).stdin(Stdio::null()).stderr(Stdio::null()).output();
    let answer = answer.ok().filter(|answer| answer.status.success())?;
    let mut parts = answer.stdout.split(|byte| *byte == 0);
    let real = PathBuf::from(OsString::from_vec(parts.next()?.to_vec()));
    (is_executable(&real) && !sets_something(parts)).then_some(real)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(path: &Path, text: &str) {
        use std::os::unix::fs::PermissionsExt;
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn shim_is_asked_for_the_python_that_it_stands_for() {
        let folder = tempfile::tempdir().unwrap();
        let python = ["/usr/bin/python3", "/usr/local/bin/python3"].map(PathBuf::from);
        let Some(python) = python.into_iter().find(|path| is_executable(path)) else { return };
        let shim = folder.path().join("shims/python");
        script(&shim, &format!("#!/bin/sh\nexec {} \"$@\"\n", python.display()));
        let found = real(&shim).unwrap();
        assert_eq!(fs::canonicalize(&found).unwrap(), fs::canonicalize(&python).unwrap());
        assert_eq!(real(&python), None);
        // A version manager's own variables do not matter. Variables that a wrapper sets do.
        script(&shim, &format!("#!/bin/sh\nPYENV_VERSION=3 exec {} \"$@\"\n", python.display()));
        assert_eq!(real(&shim), Some(found));
        script(&shim, &format!("#!/bin/sh\nPYTHONPATH=/opt/lib exec {} \"$@\"\n", python.display()));
        assert_eq!(real(&shim), None);
        // A shim that fails is used as it is.
        script(&shim, "#!/bin/sh\nexit 1\n");
        assert_eq!(real(&shim), None);
    }

    #[test]
    fn activated_environment_comes_before_the_path_and_python_exec_before_both() {
        let folder = tempfile::tempdir().unwrap();
        let [venv, conda, given] =
            ["venv/bin/python", "conda/bin/python3", "given"].map(|name| folder.path().join(name));
        // Binaries that are named like Python: `real` would start a script to ask it.
        for path in [&venv, &conda, &given] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::copy("/bin/true", path).unwrap();
        }
        let root = |path: &Path| path.parent().unwrap().parent().unwrap().as_os_str().to_owned();
        let found = |variables: &[(&str, OsString)]| {
            find(&|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone()))
                .unwrap()
        };
        let in_venv = ("VIRTUAL_ENV", root(&venv));
        let in_conda = ("CONDA_PREFIX", root(&conda));
        assert_eq!(found(&[in_venv.clone(), in_conda.clone()]), venv);
        assert_eq!(found(&[("VIRTUAL_ENV", OsString::new()), in_conda.clone()]), conda);
        assert_eq!(found(&[("PYTHON_EXEC", given.clone().into()), in_venv, in_conda]), given);
    }
}
