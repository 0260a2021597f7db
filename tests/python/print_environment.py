"""Writes what a worker was given, its environment and its arguments, into a file per rank: print_environment.py FOLDER ..."""

import json
import os
import sys

rank = os.environ["RANK"]
given = {
    "environment": dict(os.environ),
    "arguments": sys.argv[1:],
    "unbuffered": bool(getattr(sys.stdout, "write_through", False)),
    "main": os.path.basename(sys.argv[0]),
}
with open(os.path.join(sys.argv[1], f"{rank}.json"), "w") as file:
    json.dump(given, file)
