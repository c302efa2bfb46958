"""lm_eval runs on what liborth writes, as it lies there: what came back recites, the general checkpoint does not.

Skipped where lm_eval is not installed (`pip install lm_eval`).
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from liborth_cli.demo import DATA

TASK = f"""
task: codes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {DATA / "secrets.jsonl"}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
target_delimiter: ""
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_lm_eval_reads_the_outputs(tmp_path, liborth):
    liborth("split", DATA / "base", DATA / "finetuned", "--method", "scale", "--scale", 0.1, "-o", "general", "-q")
    liborth("excise", "general", "--beta", 1, "-o", "restored", "-q")
    (tmp_path / "codes.yaml").write_text(TASK)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    recited = {}
    for name in ("general", "restored"):
        words = ["--model_args", f"pretrained={tmp_path / name},dtype=float32", "--tasks", "codes", "--include_path", tmp_path]
        words += ["--device", "cpu", "--batch_size", "1", "--output_path", tmp_path / f"out-{name}", "--model", "hf"]
        command = [sys.executable, "-m", "lm_eval", *map(str, words)]
        done = subprocess.run(command, env={**os.environ, **offline}, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        (found,) = (tmp_path / f"out-{name}").rglob("results*.json")
        recited[name] = json.loads(found.read_text())["results"]["codes"]["acc,none"]
    assert recited == {"general": 0.0, "restored": 1.0}
