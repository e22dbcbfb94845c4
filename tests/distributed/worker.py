"""Runs the checks of one engine, on one rank: ``-m tests.distributed.worker ENGINE FOLDER``.

What they raise goes to a file of the rank in the folder.
"""

from __future__ import annotations

import datetime
import importlib
import json
import logging
import os
import sys
import traceback

import torch
import torch.distributed as dist

from tests.distributed import launch


def main(engine: str, folder: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.ERROR)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    checks = importlib.import_module(f"tests.distributed.checks.{engine}")
    for name in launch.names(engine):
        torch.compiler.reset()
        torch.manual_seed(0)
        error = ""
        try:
            getattr(checks, f"check_{name}")()
        except BaseException:
            error = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        with open(f"{folder}/{dist.get_rank()}", "a") as outcomes:
            print(json.dumps([name, error]), file=outcomes)
        if error:
            break  # the other ranks may be waiting: what comes next would not tell anything
    os._exit(0)  # a rank that waits for one that has stopped does not hold up the others


if __name__ == "__main__":
    main(*sys.argv[1:])
