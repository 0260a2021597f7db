#!/usr/bin/env bash
# A transposed NumPy array is saved with safetensors, loaded again, and has other values. Nothing reports an error.
#
# Expected: safetensors.numpy.save_file either writes the values of the array, as 0.7.0 does, or refuses an array that
# is not contiguous, as safetensors.torch does.
# True: 0.8.0 writes the memory from the array's first element on, in a row. Transposed, strided and Fortran-ordered
# arrays get their values in another order. The file is valid and has the right shape, so that no reader can see it.
# `numpy.ascontiguousarray(array)` before saving is right in both versions.

set -euo pipefail

readonly VERSIONS="0.7.0 0.8.0" NUMPY=2.4.6
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat >"$work/strides.py" <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

version, path = safetensors.__version__, sys.argv[1]
array = np.arange(12, dtype=np.float32).reshape(3, 4)
arrays = {
    "contiguous": array,
    "transposed": array.T,
    "strided": array[:, ::2],
    "fortran": np.asfortranarray(array),
    "copied": np.ascontiguousarray(array.T),
}
wrong = []
for name, saved in arrays.items():
    save_file({"x": saved}, path)
    loaded = load_file(path)["x"]
    assert loaded.shape == saved.shape
    if not np.array_equal(loaded, saved):
        wrong.append(name)
        print(f"{version} {name}: saved {saved.ravel()[:6]}, loaded {loaded.ravel()[:6]}")
print(f"safetensors {version}, numpy {np.__version__}: wrong values for {wrong or 'none'}")
expected = {"0.7.0": [], "0.8.0": ["transposed", "strided", "fortran"]}
if wrong != expected[version]:
    sys.exit("CHANGED: other arrays are saved with wrong values")
PYTHON

for version in $VERSIONS; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" "numpy==$NUMPY"
    "$work/$version/bin/python" "$work/strides.py" "$work/x.safetensors"
done
