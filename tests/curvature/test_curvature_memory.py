"""Peak memory is that of one block: three depths of one width, each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from curvature_cases import make_model, make_tokens

# Not ru_maxrss: a child's begins at its parent's.
SCRIPT = """
import sys
from pathlib import Path
from liborth_cli.cli import main
sys.argv = ["liborth", "curvature", *sys.argv[1:], "-q"]
try:
    main.run()
finally:
    print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")))
"""


@pytest.mark.slow
def test_peak_memory_does_not_depend_on_depth(tmp_path):
    data = make_tokens(tmp_path, rows=16, length=65)
    peaks = []
    for layers in (6, 12, 24):
        shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": layers, "head_dim": 96}
        model = make_model("llama", tmp_path / f"model{layers}", **shape)
        words = [sys.executable, "-c", SCRIPT, model, "--data", data, "-o", tmp_path / f"out{layers}", "--weights", "stream"]
        words += ["--scratch", tmp_path, "-j", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout.strip().split("\n")[-1]))
    assert max(peaks) <= 1.1 * min(peaks), peaks
