"""How far factors from bfloat16 arithmetic are from float32 ones: relative errors in the Frobenius norm over all matrices.

    python benchmarks/curvature_bfloat16.py MODEL DATA [--tokens N]

The model's weights are rounded to bfloat16 first and both runs read these, as they would a published bfloat16 checkpoint:
what is measured is the arithmetic. Labels are the real ones, so that both runs have the same.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import record
from safetensors.torch import load_file, save_file

from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.curvature.layer import trace


def rounded(model: Path, out: Path) -> Path:
    """Copy a checkpoint of one file with its weights in bfloat16."""
    shutil.copytree(model, out)
    file = out / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return out


def main() -> None:
    """Estimate twice, print and record the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--tokens", type=int, default=10_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model = rounded(asked.model, Path(place) / "model")
        for dtype in ("float32", "bfloat16"):
            command = [sys.executable, "-m", "liborth_cli", "curvature", str(model), "--data", asked.data, "-q"]
            command += ["--tokens", str(asked.tokens), "--fisher", "empirical", "--dtype", dtype, "-o", f"{place}/{dtype}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with FactorSet.open(Path(place) / "float32") as wide, FactorSet.open(Path(place) / "bfloat16") as narrow:
            lines = ["| factor | median | worst | within 1 % | trace, mean of abs |", "|---|---|---|---|---|"]
            for kind, letter in (("input_covariance", "A"), ("gradient_covariance", "G")):
                errors, traces = {}, {}
                for name in wide.names:
                    one, other = (getattr(side.layer(name), kind).double() for side in (wide, narrow))
                    errors[name] = float((other - one).norm() / one.norm())
                    traces[name] = trace(other) / trace(one) - 1
                worst = max(errors, key=errors.__getitem__)
                close = f"{sum(e <= 0.01 for e in errors.values())} of {len(errors)}"
                middle, drift = statistics.median(errors.values()), statistics.mean(map(abs, traces.values()))
                lines.append(f"| {letter} | {middle:.2%} | {errors[worst]:.2%} (`{worst}`) | {close} | {drift:.2%} |")
    text = f"{asked.model.name}, {asked.tokens:,} tokens of {Path(asked.data).name}.\n\n" + "\n".join(lines)
    print(text)
    record("bfloat16", text, "curvature.md")


if __name__ == "__main__":
    main()
