"""States as JSON and tensors, for the way from one rank to another. Nothing is pickled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

Tree = Any
_PLAIN = frozenset([type(None), bool, int, float, str])


def flatten(state: Any) -> tuple[str, list[torch.Tensor]]:
    """Divides a state into a JSON text and its tensors, which are not copied.

    Args:
        state: dicts, lists, tuples, tensors, numbers, strings, bools and None, nested in any way.

    Raises:
        TypeError: the state has a value of another type; the message says where.
    """
    tensors: list[torch.Tensor] = []
    return json.dumps(_flatten(state, tensors, "state")), tensors


def _flatten(value: Any, tensors: list[torch.Tensor], path: str) -> Tree:
    if type(value) in _PLAIN or isinstance(value, (bool, int, float, str)):
        # NumPy's numbers are subclasses of Python's, and json writes those as they are.
        return value
    if isinstance(value, torch.Tensor):
        tensors.append(value.detach())
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, (list, tuple)):
        items = [_flatten(item, tensors, f"{path}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        pairs = [[_flatten(key, tensors, path), _flatten(value[key], tensors, f"{path}[{key!r}]")] for key in value]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    raise TypeError(f"{path} is a {type(value).__name__}: a state may hold tensors, numbers, strings, lists and dicts")


def shapes(text: str) -> list[tuple[torch.dtype, list[int]]]:
    """Returns dtype and shape of each tensor of a text from `flatten`, in its order."""
    return [(getattr(torch, dtype), shape) for _, (dtype, shape) in _tensors(json.loads(text), "")]


def names(text: str) -> list[str]:
    """Returns a name for each tensor of a text from `flatten`, in its order: its keys, with dots
    between them. A name that is there already gets a number."""
    found: dict[str, None] = {}
    for name, _ in _tensors(json.loads(text), ""):
        number, own = 1, name
        while own in found:
            number, own = number + 1, f"{name}#{number + 1}"
        found[own] = None
    return list(found)


def _tensors(tree: Tree, path: str) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """Yields the path of each tensor, and its dtype and shape."""
    if isinstance(tree, list):
        for at, item in enumerate(tree):
            yield from _tensors(item, f"{path}.{at}" if path else str(at))
    elif isinstance(tree, dict):
        ((kind, content),) = tree.items()
        if kind == "tensor":
            yield path, tuple(content)
        elif kind == "tuple":
            yield from _tensors(content, path)
        else:
            for key, item in content:
                yield from _tensors(item, f"{path}.{key}" if path else str(key))


def unflatten(text: str, tensors: list[torch.Tensor]) -> Any:
    """Reassembles a state from a text and its tensors."""
    remaining = iter(tensors)

    def build(tree: Tree) -> Any:
        if isinstance(tree, list):
            return [build(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        ((kind, content),) = tree.items()
        if kind == "tensor":
            return next(remaining)
        if kind == "tuple":
            return tuple(build(item) for item in content)
        pairs = {build(key): build(value) for key, value in content}
        return Counter(pairs) if kind == "counter" else pairs

    return build(json.loads(text))


def copied(value: Any) -> Any:
    """Returns a copy of containers and tensors of a state."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Counter):
        return Counter(value)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [copied(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value
