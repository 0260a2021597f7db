"""Build hook of the wheel: cargo builds the launcher and the package's native module, with one command.

Two commands, for two packages with different features, would compile most crates twice. maturin builds
either a module or a binary.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_CARGO = [
    *["cargo", "build", "--release", "--locked", "--message-format=json-render-diagnostics"],
    *["--package", "ice-launch", "--bin", "ice-launch", "--package", "ice-python", "--lib"],
]


class Build(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the built files: the module to the package, the launcher to the scripts."""
        messages = subprocess.run(_CARGO, cwd=self.root, check=True, stdout=subprocess.PIPE)
        built = [json.loads(line) for line in messages.stdout.splitlines()]
        launcher = next(message["executable"] for message in built if message.get("executable"))
        module = next(
            file for message in built for file in message.get("filenames", []) if file.endswith("/libice_python.so")
        )
        build_data["shared_scripts"][launcher] = "ice-launch"
        if version == "editable":
            # Such an installation loads the package from the sources.
            shutil.copy(module, f"{self.root}/python/ice_launch/_link.abi3.so")
        else:
            build_data["force_include"][module] = "ice_launch/_link.abi3.so"
        build_data["pure_python"] = False
        build_data["tag"] = "cp310-abi3-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
