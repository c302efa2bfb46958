"""Run one of the jobs that curvature_peers.py times.

    python benchmarks/curvature_jobs.py JOB FOLDER

Prints a JSON object: wall and processor seconds of the work itself, without imports (ours include reading weights and writing
factors), by parts where it has any, and the peak memory of the process.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJ = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


Parts = dict[str, tuple[float, float]]
"""What a job spent: part → wall and processor seconds."""


class Watch:
    """Begins when it is made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Return wall and processor seconds since then."""
        return time.perf_counter() - self._wall, time.process_time() - self._processor


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


def plain(folder: Path) -> Parts:
    """Forward and backward with weight gradients, row by row."""
    import numpy as np
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = torch.from_numpy(np.load(folder / "tokens.npy"))
    watch = Watch()
    for row in rows:
        model.zero_grad(set_to_none=True)
        logits = model(row[None, :-1]).logits[0]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
    return {"all": watch.read()}


def ours(folder: Path, *options: str) -> Parts:
    """`liborth curvature` on the linear layers of the blocks."""
    import scipy.linalg  # noqa: F401  (its BLAS must be loaded before the threads are set)

    from liborth_cli.checkpoint.hub import Source
    from liborth_cli.checkpoint.reader import Checkpoint
    from liborth_cli.console import Console
    from liborth_cli.curvature.estimate import DTYPES, Estimator
    from liborth_cli.curvature.plan import CurvatureOptions, Resources
    from liborth_cli.machine import configure
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.texts import DataFile, read_rows
    from liborth_cli.stream.weights import Point

    chosen = dict(option.split("=") for option in options)
    run = configure("cpu", 1)
    with tempfile.TemporaryDirectory(dir=folder) as place, Checkpoint.open(folder) as checkpoint:
        scratch = Path(place) if chosen.get("weights") == "stream" else None
        asked = CurvatureOptions(
            moments=chosen.get("moments", "none"),
            tensors=("layers",),
            eigen="eigen" in chosen,
            dtype=chosen.get("dtype", "float32"),
        )
        model = BlockModel(Point(checkpoint), DTYPES[asked.dtype], run.device, prefetch=False)
        files = [DataFile(folder / "tokens.npy")]
        rows = read_rows(files, None, model.vocabulary, model.context or 512)
        watch = Watch()
        job = Estimator(Point(checkpoint), model, rows, asked, Resources(8 << 30, scratch, chosen.get("weights", "auto")), run)
        job.write(Path(place) / "factors", files, (Source(folder), None), Console(quiet=True))
        return {"all": watch.read()}


def kronfluence(folder: Path, kind: str) -> Parts:
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
        data: Any = [{"ids": row} for row in rows]
        arguments = FactorArguments(strategy="ekfac")
        parts = {}

        def timed(part: str, work: Callable[[], object]) -> None:
            watch = Watch()
            work()
            parts[part] = watch.read()

        options = {"per_device_batch_size": 1, "factor_args": arguments}
        timed("covariances", lambda: analyzer.fit_covariance_matrices("f", data, **options))
        if kind == "ekfac":
            timed("eigenbases", lambda: analyzer.perform_eigendecomposition("f", factor_args=arguments))
            timed("lambdas", lambda: analyzer.fit_lambda_matrices("f", data, **options))
        return parts


def curvlinops(folder: Path) -> Parts:
    """The same factors by curvlinops: its K-FAC operator makes them before it multiplies or inverts anything."""
    import numpy as np
    import torch
    import transformers
    from curvlinops import KFACLinearOperator

    class Logits(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(ids).logits.flatten(0, 1)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    rows = torch.from_numpy(np.load(folder / "tokens.npy"))
    layers = [layer.get_submodule(name) for layer in model.model.layers for name in PROJ]
    watch = Watch()
    KFACLinearOperator(
        Logits(model),
        torch.nn.CrossEntropyLoss(reduction="sum"),
        [layer.weight.requires_grad_() for layer in layers],
        [(row[None, :-1], row[1:]) for row in rows],
        fisher_type="mc",
        mc_samples=1,
        kfac_approx="expand",
        check_deterministic=False,
        num_data=len(rows),
        num_per_example_loss_terms=rows.shape[1] - 1,
    ).compute_kronecker_factors()
    return {"all": watch.read()}


def bergson(folder: Path) -> Parts:
    """The same factors by bergson, sums over positions, of a model that its own loader has set up; it writes them to files.

    It feeds the last token of a row too, and leaves that position out of the sums.
    """
    import numpy as np
    from bergson.config.config import HessianConfig, IndexConfig
    from bergson.hessians.hessian_approximations import collect_hessians
    from bergson.utils.worker_utils import setup_model_and_peft
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": np.load(folder / "tokens.npy").tolist()})
    with tempfile.TemporaryDirectory(dir=folder) as place:
        asked = IndexConfig(run_path=f"{place}/factors", model=str(folder))
        asked.partial_run_path.mkdir()
        model: Any = setup_model_and_peft(asked)[0]
        names = {f"layers.{i}.{p}" for i in range(model.config.num_hidden_layers) for p in PROJ}
        watch = Watch()
        collect_hessians(model, rows, asked, target_modules=names, hessian_cfg=HessianConfig(method="kfac"))
        return {"all": watch.read()}


def peak_mib() -> float:
    """Return the peak of this process. Not ru_maxrss: a child's begins at its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


JOBS: dict[str, Callable[[Path], Parts]] = {
    "plain": plain,
    "resident": lambda folder: ours(folder, "weights=resident"),
    "streamed": lambda folder: ours(folder, "weights=stream"),
    "bfloat16": lambda folder: ours(folder, "weights=resident", "dtype=bfloat16"),
    "marginal": lambda folder: ours(folder, "weights=resident", "moments=marginal"),
    "marginal-eigen": lambda folder: ours(folder, "weights=resident", "moments=marginal", "eigen=yes"),
    "kronfluence": lambda folder: kronfluence(folder, "covariance"),
    "kronfluence-ekfac": lambda folder: kronfluence(folder, "ekfac"),
    "curvlinops": curvlinops,
    "bergson": bergson,
}


if __name__ == "__main__":
    found = JOBS[sys.argv[1]](Path(sys.argv[2]))
    wall, processor = (sum(column) for column in zip(*found.values(), strict=True))
    print(json.dumps({"wall": wall, "processor": processor, "parts": found, "mib": peak_mib()}))
