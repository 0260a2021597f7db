"""Prints torchrun's options, one line each: its spellings, the variable that sets it, and its default, tab-separated."""

from torch.distributed.argparse_util import check_env, env
from torch.distributed.run import get_args_parser

for action in get_args_parser()._actions:
    if action.option_strings and action.dest != "help":
        variable = f"PET_{action.dest.upper()}" if isinstance(action, (env, check_env)) else ""
        takes = "flag" if action.nargs == 0 else "value"
        print(" ".join(action.option_strings), variable, takes, action.default, sep="\t")
