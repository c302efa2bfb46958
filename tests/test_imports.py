"""No command waits for a library that it does not use."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny import pair

PROBE = """
import runpy, sys
heavy = set(sys.argv.pop(1).split(","))
try:
    runpy.run_module("liborth_cli", run_name="__main__", alter_sys=True)
except SystemExit as end:
    if end.code:
        raise
print("LOADED", *sorted(heavy & set(sys.modules)))
"""
ALL = "torch,transformers,triton,datasets,peft,pydantic"


@pytest.mark.parametrize(
    ("words", "loaded"),
    [
        ("--help", ""),
        ("split {base} {finetuned} --rank 2 -o {out}", "pydantic torch"),
        ("excise {split} --beta 0.5 -o {out}", "pydantic"),
        ("inspect {base}", "pydantic"),
        ("verify {split} --integrity --no-require", "pydantic torch"),
    ],
)
def test_what_a_command_loads(words, loaded, tmp_path, cli):
    base, finetuned = pair(tmp_path)
    split = tmp_path / "split"
    assert cli("split", base, finetuned, "--rank", 2, "-o", split, "-q")[0] == 0
    asked = words.format(base=base, finetuned=finetuned, split=split, out=tmp_path / "out").split()
    done = subprocess.run([sys.executable, "-c", PROBE, ALL, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip().splitlines()[-1] == f"LOADED {loaded}".strip()
