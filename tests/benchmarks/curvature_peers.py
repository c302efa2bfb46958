"""Time and peak memory of curvature against a plain forward+backward and kronfluence, interleaved, in fresh processes.

Run it on one core:

    OMP_NUM_THREADS=1 taskset -c 1 python tests/benchmarks/curvature_peers.py --repeat 5

The model is a random Llama (no trained weights are needed to measure arithmetic). Times are of the work itself, without
imports; ours include reading weights and writing factors. Memory is the peak of the whole process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJ = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


def make(folder: Path, layers: int, width: int, inner: int, vocabulary: int, tokens: int, length: int) -> None:
    """Save the model and the token rows."""
    import numpy as np
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    rows = np.random.default_rng(0).integers(0, vocabulary, (tokens // length, length + 1))
    np.save(folder / "tokens.npy", rows)


def plain(folder: Path) -> float:
    """Forward and backward with weight gradients, row by row."""
    import numpy as np
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = torch.from_numpy(np.load(folder / "tokens.npy"))
    start = time.perf_counter()
    for row in rows:
        model.zero_grad(set_to_none=True)
        logits = model(row[None, :-1]).logits[0]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
    return time.perf_counter() - start


def ours(folder: Path, *options: str) -> float:
    """`liborth curvature` on the linear layers of the blocks."""
    import scipy.linalg  # noqa: F401  (its BLAS must be loaded before the threads are set)
    import torch

    from liborth_cli.checkpoint.hub import Source
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.console import Console
    from liborth_cli.curvature.estimate import Estimator
    from liborth_cli.curvature.options import CurvatureOptions, Resources
    from liborth_cli.run import configure
    from liborth_cli.stream.blocks import BlockModel
    from liborth_cli.stream.texts import DataFile, read_rows
    from liborth_cli.stream.weights import Point

    chosen = dict(option.split("=") for option in options)
    run = configure("cpu", 1)
    with tempfile.TemporaryDirectory(dir=folder) as place, Checkpoint.open(folder) as checkpoint:
        scratch = Path(place) if chosen.get("weights") == "stream" else None
        asked = CurvatureOptions(moments=chosen.get("moments", "none"), tensors=("layers",))
        model = BlockModel(Point(checkpoint), torch.float32, run.device, prefetch=False)
        files = [DataFile(folder / "tokens.npy")]
        rows = read_rows(files, None, model.vocabulary, model.context or 512)
        start = time.perf_counter()
        job = Estimator(Point(checkpoint), model, rows, asked, Resources(8 << 30, scratch, chosen.get("weights", "auto")), run)
        job.write(Path(place) / "factors", files, (Source(folder), None), Console(quiet=True))
        return time.perf_counter() - start


def kronfluence(folder: Path, kind: str) -> float:
    """The same factors by kronfluence: covariances, or covariances, eigenbases and corrected eigenvalues."""
    import numpy as np
    import torch
    import transformers
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = torch.from_numpy(np.load(folder / "tokens.npy"))

    class Language(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch["ids"][:, :-1]).logits.flatten(0, 1)
            labels = batch["ids"][:, 1:].flatten()
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return [f"model.layers.{i}.{p}" for i in range(model.config.num_hidden_layers) for p in PROJ]

    task = Language()
    prepared = prepare_model(model, task)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        analyzer = Analyzer("bench", prepared, task, cpu=True, output_dir=place, disable_tqdm=True)
        data = [{"ids": row} for row in rows]
        arguments = FactorArguments(strategy="ekfac")
        start = time.perf_counter()
        analyzer.fit_covariance_matrices("f", data, per_device_batch_size=1, factor_args=arguments)
        if kind == "ekfac":
            analyzer.perform_eigendecomposition("f", factor_args=arguments)
            analyzer.fit_lambda_matrices("f", data, per_device_batch_size=1, factor_args=arguments)
        return time.perf_counter() - start


def peak_mib() -> float:
    """Return the peak of this process. Not ru_maxrss: a child's begins at its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


JOBS = {
    "plain": plain,
    "resident": lambda folder: ours(folder, "weights=resident"),
    "streamed": lambda folder: ours(folder, "weights=stream"),
    "marginal": lambda folder: ours(folder, "weights=resident", "moments=marginal"),
    "exact": lambda folder: ours(folder, "weights=resident", "moments=exact"),
    "kronfluence": lambda folder: kronfluence(folder, "covariance"),
    "kronfluence-ekfac": lambda folder: kronfluence(folder, "ekfac"),
}


def main() -> None:
    """Run every job `--repeat` times in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        seconds = JOBS[asked.one](asked.folder)
        print(json.dumps({"seconds": seconds, "mib": peak_mib()}))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(folder, asked.layers, asked.width, asked.inner, asked.vocabulary, asked.tokens, asked.length)
        found: dict[str, list[dict[str, float]]] = {job: [] for job in asked.jobs}
        for _ in range(asked.repeat):
            for job in asked.jobs:
                command = [sys.executable, __file__, "--one", job, "--folder", place]
                result = subprocess.run(command, capture_output=True, text=True, check=False)
                if result.returncode:
                    sys.exit(f"{job}: {result.stderr[-2000:]}")
                found[job].append(json.loads(result.stdout.strip().split("\n")[-1]))
        base = statistics.median(r["seconds"] for r in found.get("plain", [])) if found.get("plain") else float("nan")
        print(f"{'job':20} {'median s':>9} {'min–max s':>15} {'÷ plain':>8} {'peak MiB':>9}")
        for job, runs in found.items():
            seconds = [r["seconds"] for r in runs]
            middle = statistics.median(seconds)
            span = f"{min(seconds):.2f}–{max(seconds):.2f}"
            print(f"{job:20} {middle:9.2f} {span:>15} {middle / base:8.2f} {max(r['mib'] for r in runs):9.0f}")


if __name__ == "__main__":
    main()
