"""What a soft split of one layer is made of, against what its multiplications take at the rate of a plain matrix product.

    python benchmarks/layer_terms.py [--tokens 240] [--record]

The seven matrices of a layer of the benchmark pair (`make_pair.py`), one thread, processor time, best of three. The terms are
those that `tokenwise` and `contrastive` share; each kernel is timed by itself, and counted as often as a layer needs it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from record import machine, record

from liborth_cli.curvature.triangles import pack, unpack
from liborth_cli.linalg.eigen import cholesky
from liborth_cli.linalg.rows import ThinProduct
from liborth_cli.methods.whitening import Whitening, distance, mean_scale
from liborth_cli.split.matrix import participation

SIDES = {1024: 8, 2816: 3}
"""Width → factors of it in a layer; q, k and v share one input, gate and up another."""
SHAPES = {(1024, 1024): 4, (2816, 1024): 3}
"""Shape → matrices of it, or of its transpose."""
DAMPING, ROWS = 1e-2, 2048


@dataclass
class Term:
    """Processor seconds in a layer, and multiply-adds.

    Attributes:
        seconds: measured.
        work: multiply-adds; none for what only makes sure.
    """

    seconds: float = 0.0
    work: float = 0.0

    def add(self, count: int, work: float, run: Callable[[], object]) -> None:
        """Time a kernel that is needed so often."""
        self.seconds += count * best(run)
        self.work += count * work


def best(run: Callable[[], object]) -> float:
    """Return the fewest processor seconds of three runs, after one that does not count."""
    found = []
    for _ in range(4):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found[1:])


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=240)
    parser.add_argument("--record", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(1)
    draw, tokens = torch.Generator().manual_seed(0), a.tokens
    square = torch.randn(1024, 1024, generator=draw)
    rate = 1024**3 / best(lambda: square @ square)
    names = (
        "unpack retain factors",
        "factorise retain factors",
        "measure float32 factorisations",
        "whiten tokens",
        "unwhiten",
        "dimension of the update",
    )
    terms = {name: Term() for name in (*names, "what tokens feel of it", "multiply the part out")}
    for width, count in SIDES.items():
        x = torch.randn(ROWS, width, generator=draw) * torch.rand(width, generator=draw)
        covariance = x.T @ x / ROWS
        scale = mean_scale(covariance)
        damped = covariance * scale
        damped.diagonal().add_(DAMPING)
        lower = cholesky(damped.clone())
        assert lower is not None
        metric, some = Whitening(lower), torch.randn(width, tokens, generator=draw, dtype=torch.float64)
        packed = pack(covariance)
        terms["unpack retain factors"].add(count, 0.0, lambda p=packed: unpack(p))
        terms["factorise retain factors"].add(count, width**3 / 6, lambda r=damped: cholesky(r.clone()))
        terms["measure float32 factorisations"].add(
            count, 0.0, lambda low=lower, c=covariance, s=scale: distance(low, c, s, DAMPING)
        )
        terms["whiten tokens"].add(count, width**2 * tokens / 2, lambda m=metric, y=some: m.whiten(y))
        terms["unwhiten"].add(count, width**2 * tokens / 2, lambda m=metric, y=some: m.unwhiten(y))
    for (rows, columns), count in SHAPES.items():
        update = torch.randn(rows, columns, generator=draw)
        left, right = (torch.randn(tokens, width, generator=draw) for width in (rows, columns))
        work, thin = float(rows * columns * tokens), ThinProduct(left.T.double(), right.T.double())
        terms["dimension of the update"].add(count, rows * columns**2 / 2, lambda u=update: participation(u))
        terms["what tokens feel of it"].add(count, work, lambda u=update, g=left, y=right: ((g @ u) * y).sum(1))
        terms["multiply the part out"].add(count, work, lambda p=thin: p.whole(torch.float32))
    lines = ["| term | processor ms | of it its multiplications, ms |", "|---|---:|---:|"]
    lines += [f"| {name} | {1e3 * term.seconds:.0f} | {1e3 * term.work / rate:.0f} |" for name, term in terms.items()]
    whole = sum(term.seconds for term in terms.values()), sum(term.work for term in terms.values()) / rate
    lines.append(f"| together | {1e3 * whole[0]:.0f} | {1e3 * whole[1]:.0f} |")
    print("\n".join(lines))
    if a.record:
        head = f"{machine()}; one thread, {tokens} tokens. A product of 1024 × 1024 matrices: {2 * rate / 1e9:.0f} GFLOP/s."
        record("layer-terms", f"{head}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
