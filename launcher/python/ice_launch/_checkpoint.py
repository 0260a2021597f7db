"""Checkpoints: folders that are whole or absent, with safetensors and JSON. Nothing is pickled."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
import torch.distributed as dist

from . import _loop, _tree

if TYPE_CHECKING:
    from ._state import State

_VERSION = 1
# Names of the folders, and of those that are being written or removed.
_PREFIX, _HIDDEN = "step-", ".step-"
_STATE = "state.json"
# Tensors of values that belong to no object. No name in a state begins like this.
_VALUES = "_values"
# Bytes of an error's text that other ranks receive.
_MESSAGE = 1024
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip
_NAMES = {short: name for name, short in _DTYPES.items()}


def save_checkpoint(state: State, folder: str | os.PathLike[str], *, keep: int | None = None) -> Path:
    """Saves a state as ``folder/step-COMMITS``. Collective: every rank calls it at the same point.

    Rank 0 writes to a hidden folder, syncs it to the disk and renames it, so a checkpoint is whole
    or absent. The other ranks wait, and get the error if the write fails. Only the node of rank 0
    needs the folder, which any rank may become after a loss; so all nodes should share it.

    Within an elastic function, call it after a commit. A checkpoint has::

        state.json            values, structure of the objects, checksums
        NAME.safetensors      tensors of the object NAME; those of a module by PyTorch's keys
        _values.safetensors   tensors among the values

    Args:
        state: the state.
        folder: folder of the checkpoints of this training. It is made if it is missing.
        keep: number of checkpoints to keep, the newest ones. Default: all.

    Returns:
        The path of the checkpoint.

    Raises:
        OSError: rank 0 could not write, for example because the disk is full. Older checkpoints are
            untouched.
        TypeError: the state has a tensor that safetensors cannot hold.
        ValueError: ``keep`` is less than 1.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep is {keep}, and must be at least 1")
    path = Path(folder) / f"{_PREFIX}{state.commits:08}"
    with _loop.alone():
        _on_rank_0(lambda: _write(state, path, keep))
    _loop.saved(path, state.commits)
    return path


def load_checkpoint(state: State, path: str | os.PathLike[str]) -> Path | None:
    """Loads the newest checkpoint of a folder into a state, before the elastic function is called.

    All ranks begin with the state of rank 0, so a rank that does not see the folder may call it,
    too. A checkpoint whose checksums are wrong is passed over, with a warning.

    Args:
        state: a state with the same names.
        path: the folder of `save_checkpoint`, or a checkpoint in it.

    Returns:
        The path of the checkpoint; `None` if there is none yet, so that the training begins.

    Raises:
        OSError: a file cannot be read.
        ValueError: there are checkpoints, and all of them are damaged; or the checkpoint has other
            objects or values than the state.
    """
    path = Path(path)
    found = [path] if (path / _STATE).is_file() else [folder for _, folder in _all(path)]
    damage: list[str] = []
    for folder in reversed(found):
        try:
            content = _read(folder)
        except (ValueError, KeyError, TypeError, struct.error, FileNotFoundError) as error:
            damage.append(f"{folder}: {error}")
            continue
        for problem in damage:
            _loop.warn(f"a damaged checkpoint is passed over: {problem}")
        _compare(state, content, folder)
        state.load_state_dict(content)
        return folder
    if damage:
        raise ValueError("all checkpoints are damaged: " + "; ".join(damage))
    return None


def _all(folder: Path) -> list[tuple[int, Path]]:
    """Returns the checkpoints of a folder with their numbers, in the order in which they were saved."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(_PREFIX) and path.is_dir():
            try:
                number = int(json.loads((path / _STATE).read_text())["number"])
            except (OSError, ValueError, KeyError, TypeError):
                number = -1
            found.append((number, path))
    return sorted(found)


def _compare(state: State, content: dict[str, Any], folder: Path) -> None:
    for kind, names in [("objects", state._objects), ("values", state._names)]:
        missing, unknown = set(names) - content[kind].keys(), content[kind].keys() - set(names)
        if missing or unknown:
            raise ValueError(f"{folder} has other {kind} than the state: missing {sorted(missing)}, unknown {sorted(unknown)}")


def _write(state: State, path: Path, keep: int | None) -> None:
    content = state.state_dict()
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_HIDDEN}*"):
        # Of a process that was killed.
        shutil.rmtree(left, ignore_errors=True)
    before = _all(folder)
    partial = folder / f"{_HIDDEN}{state.commits:08}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        trees, files = {}, {}
        for name, value in [*content["objects"].items(), (_VALUES, content["values"])]:
            text, tensors = _tree.flatten(value)
            trees[name] = json.loads(text)
            if tensors:
                files[_file(name)] = _write_tensors(partial / _file(name), text, tensors)
        values = trees.pop(_VALUES)
        about = {
            "version": _VERSION, "number": 1 + max((number for number, _ in before), default=0), "commits": content["commits"],
            "seed": content["seed"], "objects": trees, "values": values, "files": files,
        }  # fmt: skip
        with open(partial / _STATE, "w") as file:
            json.dump(about, file)
            file.flush()
            os.fsync(file.fileno())
        _sync(partial)
        if path.exists():
            # Of the same step, by a training before.
            replaced = folder / f"{_HIDDEN}{state.commits:08}.{os.getpid()}.replaced"
            os.rename(path, replaced)
        os.rename(partial, path)
        _sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    older = [one for _, one in before if one != path]
    surplus = [] if keep is None else older[: max(0, len(older) + 1 - keep)]
    for one in [*folder.glob(f"{_HIDDEN}*"), *surplus]:
        shutil.rmtree(one, ignore_errors=True)


def _file(name: str) -> str:
    return f"{quote(name, safe='')}.safetensors"


def _write_tensors(path: Path, text: str, tensors: list[torch.Tensor]) -> dict[str, Any]:
    """Writes a safetensors file. Returns its size in bytes and its SHA-256."""
    named = list(zip(_tree.names(text), tensors))
    for name, tensor in named:
        if _short(tensor.dtype) is None:
            raise TypeError(f"{path.stem}: {name} is {tensor.dtype}, which safetensors does not have")
    # Each tensor begins at a multiple of the size of its elements.
    named.sort(key=lambda one: -one[1].element_size())
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in named:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _short(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(part: bytes | memoryview) -> None:
            digest.update(part)
            file.write(part)

        write(struct.pack("<Q", len(encoded)) + encoded)
        for _, tensor in named:
            # Lives until its bytes are written.
            held = tensor.cpu().contiguous()
            write(_bytes(held))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(encoded) + end, "sha256": digest.hexdigest()}


def _read(folder: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint, as from `State.state_dict`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not as it was written.
    """
    about = json.loads((folder / _STATE).read_text())
    if not isinstance(about, dict) or about.get("version") != _VERSION:
        raise ValueError(f"{_STATE} is not of version {_VERSION}")
    files = {name: _read_tensors(folder / name, known) for name, known in about["files"].items()}

    def whole(name: str, tree: Any) -> Any:
        text, tensors = json.dumps(tree), files.get(_file(name), {})
        return _tree.unflatten(text, [tensors[key] for key in _tree.names(text)])

    return {
        "objects": {name: whole(name, tree) for name, tree in about["objects"].items()},
        "values": whole(_VALUES, about["values"]),
        "commits": about["commits"],
        "seed": about["seed"],
    }


def _read_tensors(path: Path, known: dict[str, Any]) -> dict[str, torch.Tensor]:
    content = bytearray(path.read_bytes())
    if len(content) != known["bytes"] or hashlib.sha256(content).hexdigest() != known["sha256"]:
        raise ValueError(f"{path.name} has other bytes than were written")
    (length,) = struct.unpack_from("<Q", content)
    tensors = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        dtype, shape = getattr(torch, _NAMES[entry["dtype"]]), entry["shape"]
        begin, end = entry["data_offsets"]
        if begin == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        flat = torch.frombuffer(content, dtype=torch.uint8, count=end - begin, offset=8 + length + begin)
        tensors[name] = flat.view(dtype).reshape(shape)
    return tensors


def _on_rank_0(write: Callable[[], None]) -> None:
    """Calls a function on rank 0. If it fails, all ranks raise an error."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return write()
    failure: Exception | None = None
    message = torch.zeros(_MESSAGE, dtype=torch.uint8, device="cpu")
    if dist.get_rank() == 0:
        try:
            write()
        except Exception as error:
            failure = error
            text = f"{type(error).__name__}: {error}".encode()[:_MESSAGE]
            message[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    dist.broadcast(message, 0)
    if failure is not None:
        raise failure
    if text := bytes(message.tolist()).rstrip(b"\0"):
        raise OSError(f"rank 0 cannot save a checkpoint: {text.decode(errors='replace')}")
    return None


def _short(dtype: torch.dtype) -> str | None:
    return _DTYPES.get(str(dtype).removeprefix("torch."))


def _bytes(tensor: torch.Tensor) -> bytes | memoryview:
    """Returns the bytes of a contiguous tensor on the CPU, which they refer to, without NumPy."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())) if size else b""


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
