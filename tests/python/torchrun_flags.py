"""Prints what a torchrun takes, one line each, tab-separated; the first word says which kind it is.

option    its spellings, the variable that sets it, whether it takes a value, and its default
variable  an environment variable that its code reads
conf      a key of --rdzv-conf that its backends read
macro     a name that a template of line prefixes may have
"""

import ast
from pathlib import Path

import torch.distributed
from torch.distributed.argparse_util import check_env, env
from torch.distributed.run import get_args_parser

for action in get_args_parser()._actions:
    if action.option_strings and action.dest != "help":
        variable = f"PET_{action.dest.upper()}" if isinstance(action, (env, check_env)) else ""
        takes = "flag" if action.nargs == 0 else "value"
        print("option", " ".join(action.option_strings), variable, takes, action.default, sep="\t")

folder = Path(torch.distributed.__file__).parent
files = [folder / "run.py", *folder.glob("launcher/*.py"), *folder.glob("elastic/**/*.py")]
trees = [ast.parse(file.read_text()) for file in files if "test" not in file.name]

constants = {}
for tree in trees:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            constants.update({target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)})


def text(node):
    """The string that an expression is, where that can be told."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name) and isinstance(constants.get(node.id), str):
        return constants[node.id]
    return None


found = set()
for node in (node for tree in trees for node in ast.walk(tree)):
    if isinstance(node, ast.Call) and node.args:
        name, first = ast.unparse(node.func), text(node.args[0])
        if name in ("os.getenv", "os.environ.get", "getenv", "environ.get") and first:
            found.add(("variable", first))
        elif name in ("params.get", "params.get_as_int", "params.get_as_bool") and first:
            found.add(("conf", first))
        elif name.endswith("_get_timeout") and len(node.args) > 1 and text(node.args[1]):
            found.add(("conf", text(node.args[1]) + "_timeout"))
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("safe_substitute"):
        found.update(("macro", keyword.arg) for keyword in node.keywords if keyword.arg)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ" and text(node.slice):
        if isinstance(node.ctx, ast.Load):
            found.add(("variable", text(node.slice)))
    if isinstance(node, ast.Compare) and text(node.left) and any(
        ast.unparse(other) == "os.environ" for other in node.comparators
    ):
        found.add(("variable", text(node.left)))
for kind, name in sorted(found):
    print(kind, name, sep="\t")
