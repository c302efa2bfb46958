"""Start the ranks of a command without paying for the import of torch every time: it is imported once here, and then forked.

Reads one job a line (JSON), answers with the process ids, and, when all have ended, with codes and outputs.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def child(job: dict, rank: int, folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}{rank}", os.O_CREAT | os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folders"][rank] if job.get("folders") else job["folder"])
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(job["size"]), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(job["port"])}  # fmt: skip
    if job.get("networks"):
        space = os.open(f"/run/netns/{job['networks'][rank]}", os.O_RDONLY)
        assert ctypes.CDLL(None).setns(space, 0x40000000) == 0  # CLONE_NEWNET
    os.environ.update(ranks if job["size"] > 1 else {})
    os.environ.update({**job.get("env", {}), **job.get("envs", [{}] * job["size"])[rank]})
    if job.get("script"):
        exec(compile(job["script"], "script", "exec"), {"__name__": "script", "rank": rank})
        return
    from liborth_cli.cli import main

    sys.argv = ["liborth", *job["words"], *job.get("more", [[]] * job["size"])[rank]]
    main.run()


def run(job: dict) -> None:
    job.setdefault("port", free_port())
    with tempfile.TemporaryDirectory() as folder:
        pids = {}
        for rank in range(job["size"]):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    child(job, rank, folder)
                    code = 0
                except SystemExit as stop:
                    code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stdout.flush(), sys.stderr.flush()
                    os._exit(code)
            pids[pid] = rank
        print(json.dumps(list(pids)), flush=True)
        codes, seconds, start = [None] * job["size"], [0.0] * job["size"], time.monotonic()
        for _ in range(job["size"]):
            pid, status, used = os.wait3(0)
            codes[pids[pid]] = os.waitstatus_to_exitcode(status)
            seconds[pids[pid]] = used.ru_utime + used.ru_stime
        texts = [[Path(f"{folder}/{name}{rank}").read_text() for rank in pids.values()] for name in ("out", "err")]
    wall = time.monotonic() - start
    print(json.dumps({"codes": codes, "out": texts[0], "err": texts[1], "seconds": seconds, "wall": wall}), flush=True)


if __name__ == "__main__":
    import torch

    for name in ("transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2"):
        importlib.import_module(name)
    for name in ("cli.main", "curvature.estimate", "split", "verify.verify", "excise"):
        importlib.import_module(f"liborth_cli.{name}")
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        run(json.loads(line))
