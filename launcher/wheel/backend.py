"""Build backend of the wheel (PEP 517): maturin, and before it cargo for the launcher.

maturin builds the native module of the package, or a binary, but not both. So the launcher is built
first and put into the wheel's folder of scripts, from which pip installs it as it is.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
from typing import Any

import maturin
from maturin import get_requires_for_build_wheel, prepare_metadata_for_build_wheel

__all__ = ["build_editable", "build_wheel", "get_requires_for_build_editable", "get_requires_for_build_wheel", "prepare_launcher", "prepare_metadata_for_build_wheel"]

get_requires_for_build_editable = get_requires_for_build_wheel
_HERE = pathlib.Path(__file__).parent


def prepare_launcher() -> None:
    """Builds the launcher, and puts it into the folder that pyproject.toml names as `data`."""
    command = ["cargo", "build", "--release", "--locked", "--package", "ice-launch", "--bin", "ice-launch"]
    messages = subprocess.run([*command, "--message-format=json-render-diagnostics"], cwd=_HERE, check=True, stdout=subprocess.PIPE)
    built = [json.loads(line).get("executable") for line in messages.stdout.splitlines()]
    scripts = _HERE / "data/scripts"
    scripts.mkdir(parents=True, exist_ok=True)
    shutil.copy(next(path for path in built if path), scripts / "ice-launch")


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    prepare_launcher()
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    prepare_launcher()
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)


if __name__ == "__main__":
    prepare_launcher()
