"""`--spectrum`: how curved the loss on the retain data is, and how curved along what the split calls skill and memory.

At the general weights W_g, for the mean loss a token of the retain rows, n weights:

- **Spectral density** of the Gauss–Newton matrix (or the Hessian), (n, n), by stochastic Lanczos quadrature (Ghorbani et al.
  2019, arXiv 1901.10159; Yao et al. 2020, arXiv 1912.07145): for all weights, and restricted to the leading singular subspaces
  of the skill, of the memory, and of a random update, k² directions a matrix (measure/directions.py).
- **Outliers**: eigenvalues above the edge λ̄·(1 + √(n/T))² where the bulk would end if the T tokens pulled in independent
  directions (Marchenko & Pastur 1967; λ̄ is the mean eigenvalue). Counted are those that Lanczos has found and confirmed,
  each once; "at least" where some have not settled.
- **Mean eigenvalue**: vᵀHv / vᵀv, known after one product, over two starts at least.
- **Curvature along the streams**: ⟨U, GGN U⟩ / ⟨U, U⟩ for the whole skill update U_s = W_g − W_r, the whole memory update
  U_m = W_f − W_g, and noise of the memory's norm in every matrix. Below 1, memory lies flatter than noise.
- **Singular spectra** of both streams, matrix by matrix, with the edge where noise of the same shape ends (verify/singular.py).

Weights stream block by block. The density over all weights holds Lanczos vectors of n float32 numbers (all of them where
they fit, else three); it is left out, and said so, where three do not fit. The restricted densities always run.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from liborth_cli.verify import statistics
from liborth_cli.verify.check import Check, Need, Options, Part, option
from liborth_cli.verify.result import Facts, Line, Metric, Plot, Result, Series, Table
from liborth_cli.verify.rows import copies
from liborth_cli.verify.singular import singular_figures
from liborth_cli.verify.subject import Subject

if TYPE_CHECKING:
    import torch

    from liborth_cli.linalg.lanczos import Quadrature
    from liborth_cli.measure.directions import Between, Decomposed, NoiseLike, Subspace, Whole
    from liborth_cli.measure.products import Products
    from liborth_cli.stream.model import BlockModel
    from liborth_cli.stream.texts import Row

FLOOR = 1e-6
"""Eigenvalues below this share of the largest are noise of float32 arithmetic, and are drawn as 0."""
RESTRICTED = 20
"""Steps in a subspace, at most."""
STARTS = 2
"""That the mean eigenvalue is taken over, at least: one product each (Hutchinson 1990), beyond the probes."""


class Matrix(enum.StrEnum):
    """Which curvature."""

    GGN = "ggn"
    HESSIAN = "hessian"

    @property
    def label(self) -> str:
        """Its name for people."""
        return "Hessian" if self == Matrix.HESSIAN else "Gauss–Newton matrix"


@dataclass(frozen=True)
class SpectrumOptions(Options):
    """What is measured, and how well."""

    spectrum_matrix: Matrix = option(Matrix.GGN, "Gauss-Newton matrix or Hessian, for --spectrum.")
    spectrum_tokens: int = option(1024, "Tokens of the retain data that --spectrum reads.", least=1)
    spectrum_steps: int = option(40, "Lanczos steps a probe; 20 at most in a subspace.", least=1)
    spectrum_probes: int = option(1, "Random starts of a density.", least=1)
    spectrum_rank: int = option(8, "Leading singular directions of a matrix, on each side.", least=1)


@dataclass
class Spectra:
    """What was found, by the name of the space.

    Attributes:
        runs: one quadrature a probe.
        means: what every start says of the mean eigenvalue.
        sizes: dimensions.
        left_out: why there is no spectrum of all weights, or nothing.
        tokens: how many carried loss.
    """

    runs: dict[str, list[Quadrature]] = field(default_factory=dict)
    means: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    left_out: str = ""
    tokens: int = 0

    @property
    def edge(self) -> float:
        """Where the bulk over all weights would end if it were noise; infinite where that was not measured."""
        if "all weights" not in self.runs:
            return float("inf")
        from liborth_cli.linalg.noise import covariance_edge

        return covariance_edge(float(np.mean(self.means["all weights"])), self.sizes["all weights"], self.tokens)


@dataclass(frozen=True)
class Nodes:
    """A quadrature of the density: eigenvalues, and the share of the directions at each."""

    nodes: list[float]
    weights: list[float]

    @classmethod
    def of(cls, run: Quadrature) -> Nodes:
        """Take it from a Lanczos run."""
        return cls(run.nodes.tolist(), run.weights.tolist())


@dataclass
class SpectrumFacts(Facts):
    """What the densities are made of, by space.

    Attributes:
        settings: what was asked for, and how much was read.
        lanczos: one quadrature a probe.
        mean_eigenvalue: of the space.
        bulk_edge: where the bulk over all weights would end if it were noise; None where that was not measured.
        outliers: eigenvalues above it.
        smallest: eigenvalue of all weights.
    """

    settings: Line
    lanczos: dict[str, list[Nodes]]
    mean_eigenvalue: dict[str, float] = field(default_factory=dict)
    bulk_edge: float | None = None
    outliers: list[float] | None = None
    smallest: float | None = None


def run(subject: Subject, options: SpectrumOptions) -> Result:
    """Measure curvature and singular spectra at the general weights.

    Returns:
        `sharpness`, `outliers`, and with both streams `memory_curvature` and `skill_curvature`, relative to noise.
    """
    from liborth_cli.measure.products import Products

    model = subject.states.model("general")
    rows = _some(subject.rows("retain"), options.spectrum_tokens)
    streams: dict[str, dict[str, Decomposed]] = {}
    if subject.has(Need.REFERENCE) and subject.has(Need.FINETUNED):
        streams = _decompose(model, subject, options.spectrum_rank)
    products = Products(model, rows, options.spectrum_matrix == Matrix.HESSIAN)
    spectra = _densities(subject, products, rows, streams, options)
    facts = SpectrumFacts(
        {**asdict(options), "rows": len(rows), "tokens": sum(row.tokens for row in rows)},
        lanczos={name: [Nodes.of(run) for run in runs] for name, runs in spectra.runs.items()},
    )
    result = Result("spectrum", "", figures=[_density_plot(spectra, options.spectrum_matrix)], facts=facts)
    sentences = _judge(spectra, options.spectrum_matrix, result, facts)
    if streams:
        sentences.append(_along(subject, products, rows, streams, result))
        sentences.append(singular_figures(streams, result))
    else:
        sentences.append("Skill and memory were not told apart: that needs --reference and --finetuned (or a memory file).")
    result.verdict = " ".join(sentences)
    return result


# Densities --------------------------------------------------------------------------------------------------------------


def _densities(
    subject: Subject, products: Products, rows: list[Row], streams: dict[str, dict[str, Decomposed]], options: SpectrumOptions
) -> Spectra:
    import torch

    from liborth_cli.linalg.lanczos import lanczos
    from liborth_cli.machine import spare_bytes
    from liborth_cli.measure.directions import Subspace, Whole, matrices, random_bases
    from liborth_cli.measure.products import Products
    from liborth_cli.stream.labels import row_seed

    model, found = products.model, Spectra()
    names = matrices(model)
    found.tokens = int(sum(row.keep.sum() for row in rows))
    spaces: dict[str, Whole | Subspace] = {}
    whole = Whole(model)
    vectors = spare_bytes() // (whole.size * torch.finfo(model.dtype).bits // 8)
    if vectors < 5:
        found.left_out = (
            f"The spectrum over all weights was left out: its vectors take {3 * whole.size * 4 / 1e9:.1f} GB, which is more "
            "than may be used here."
        )
    else:
        spaces["all weights"] = whole
    for name, parts in streams.items():
        spaces[f"{name} directions"] = Subspace({n: (p.left, p.right) for n, p in parts.items()}, names)
    if streams:
        spaces["random directions"] = Subspace(random_bases(streams["memory"], subject.seed), names)
    spaces = {name: space for name, space in spaces.items() if space.size}
    model.use(subject.states.weights["general"])
    with subject.console.progress(
        "curvature", sum(_products(space, options) for space in spaces.values()), "products"
    ) as progress:
        for name, space in spaces.items():
            within = Products(model, rows, products.hessian, space.bases) if isinstance(space, Subspace) else products

            def multiply(v: torch.Tensor, space: Whole | Subspace = space, within: Products = within) -> torch.Tensor:
                progress.advance(1)
                return space.multiply(within.product, v)

            steps = _steps(space, options)
            keep = space is not whole or vectors > steps + 6
            found.runs[name], found.means[name], found.sizes[name] = [], [], space.size
            for probe in range(max(options.spectrum_probes, STARTS)):
                start = _start(space.size, row_seed(subject.seed + probe, name.encode()), model)
                run = lanczos(multiply, start, steps if probe < options.spectrum_probes else 1, keep)
                found.means[name].append(float(run.weights @ run.nodes))
                if probe < options.spectrum_probes:
                    found.runs[name].append(run)
            within.forget()  # one set of graphs at a time
    return found


def _steps(space: Whole | Subspace, options: SpectrumOptions) -> int:
    """Return the most steps of a probe."""
    from liborth_cli.measure.directions import Subspace

    return min(options.spectrum_steps, space.size, RESTRICTED if isinstance(space, Subspace) else space.size)


def _products(space: Whole | Subspace, options: SpectrumOptions) -> int:
    """Return the most products that a space takes."""
    return _steps(space, options) * options.spectrum_probes + max(STARTS - options.spectrum_probes, 0)


def _start(size: int, seed: int, model: BlockModel) -> torch.Tensor:
    """Draw a Rademacher vector: its quadratic form has the least variance (Hutchinson 1990)."""
    import torch

    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return signs.to(model.device, model.dtype).mul_(2).sub_(1)


def _judge(spectra: Spectra, matrix: Matrix, result: Result, facts: SpectrumFacts) -> list[str]:
    from liborth_cli.linalg.lanczos import eigenvalues_above

    runs = spectra.runs.get("all weights")
    sentences = [spectra.left_out] if spectra.left_out else []
    if runs:
        edge = spectra.edge
        above, complete = max((eigenvalues_above(run, edge) for run in runs), key=lambda found: len(found[0]))
        tops = [float(run.nodes[-1]) for run in runs]
        low = min(float(run.nodes[0]) for run in runs)
        result.metrics["sharpness"] = Metric(
            max(tops), max(tops), max(tops) + float(runs[int(np.argmax(tops))].residuals[-1]), "largest eigenvalue"
        )
        result.metrics["outliers"] = Metric(
            len(above), len(above), len(above) if complete else float("inf"), "eigenvalues above the edge of the bulk"
        )
        facts.bulk_edge, facts.outliers, facts.smallest = edge, above, low
        sentences.append(
            f"{matrix.label} over {spectra.sizes['all weights']:,} weights: largest eigenvalue {max(tops):.3g}, "
            f"{'' if complete else 'at least '}{len(above)} above the bulk's edge at {edge:.3g}"
            + (f", smallest {low:.3g}" if matrix == Matrix.HESSIAN else "")
            + "."
        )
    facts.mean_eigenvalue = {name: float(np.mean(some)) for name, some in spectra.means.items()}
    rows = tuple(
        (name, float(spectra.sizes[name]), facts.mean_eigenvalue[name], float(max(r.nodes[-1] for r in some)))
        for name, some in spectra.runs.items()
    )
    columns = ("space", ">dimensions", ">mean eigenvalue", ">largest eigenvalue")
    result.figures.append(Table(f"Curvature of the retain loss ({matrix.label})", columns, rows))
    return sentences


def _density_plot(spectra: Spectra, matrix: Matrix) -> Plot:
    """Draw each density over the logarithm of the eigenvalue, smoothed by a Gaussian of 0.15 decades."""
    from liborth_cli.linalg.lanczos import merged

    top = max(float(run.nodes[-1]) for runs in spectra.runs.values() for run in runs)
    floor = max(top, 1e-30) * FLOOR
    grid = np.logspace(np.log10(floor), np.log10(max(top, floor)) + 0.5, 160)
    series, words = [], []
    for name, runs in spectra.runs.items():
        nodes, weights = merged(runs)
        curve = _smooth(nodes, weights, grid, floor)
        series.append(Series(name, tuple(grid.tolist()), tuple(curve.tolist())))
        words.append(f"{name}: {weights[nodes > floor].sum():.0%} of directions above {floor:.1g}, largest {nodes[-1]:.3g}")
        if nodes[0] < -floor:
            negative = _smooth(-nodes, weights, grid, floor)
            series.append(Series(f"{name}, negative", tuple(grid.tolist()), tuple(negative.tolist())))
    lines = {name: at for name, at in {"edge of the bulk": spectra.edge}.items() if floor < at < float("inf")}
    return Plot(
        f"Spectral density of the {matrix.label}", alt="; ".join(words) + ".", x_label="eigenvalue (absolute)",
        y_label="share of directions a decade", series=tuple(series), x_log=True, y_log=False, lines=lines,
    )  # fmt: skip


def _smooth(nodes: np.ndarray, weights: np.ndarray, grid: np.ndarray, floor: float, width: float = 0.15) -> np.ndarray:
    high = nodes > floor
    apart = np.log10(grid)[:, None] - np.log10(nodes[high])[None]
    return np.exp(-0.5 * (apart / width) ** 2) @ weights[high] / (width * np.sqrt(2 * np.pi))


# Along the streams ------------------------------------------------------------------------------------------------------


def _decompose(model: BlockModel, subject: Subject, rank: int) -> dict[str, dict[str, Decomposed]]:
    """Take both streams of every matrix apart; what a stream leaves unchanged is left out."""
    from liborth_cli.measure.directions import decompose, matrices

    found: dict[str, dict[str, Decomposed]] = {"skill": {}, "memory": {}}
    paths = _paths(model, subject)
    with subject.console.progress("singular spectra", 2 * len(matrices(model)), "matrices") as progress:
        for name in matrices(model):
            for stream, path in paths.items():
                update = path.update(name)
                if bool(update.any()):
                    found[stream][name] = decompose(update, rank)
                progress.advance(1)
    return found


def _paths(model: BlockModel, subject: Subject) -> dict[str, Between]:
    from liborth_cli.measure.directions import Between

    states = subject.states.weights
    return {
        "skill": Between(model, states["reference"], states["general"]),
        "memory": Between(model, states["general"], states["finetuned"]),
    }


def _along(
    subject: Subject, products: Products, rows: list[Row], streams: dict[str, dict[str, Decomposed]], result: Result
) -> str:
    """Measure the curvature along each whole stream and along noise of its size, on retain rows and on canaries."""
    import torch

    from liborth_cli.measure.directions import NoiseLike
    from liborth_cli.measure.products import Products

    model, lists = products.model, {"retain": rows, "canaries": list(subject.rows("canaries"))}
    each = {name: Products(model, some) if name != "retain" else products for name, some in lists.items() if some}
    paths: dict[str, Between | NoiseLike] = dict(_paths(model, subject))
    table, sentences = [], []
    for stream, parts in streams.items():
        norms = {name: part.norms for name, part in parts.items()}
        square = float(sum(norm.square().sum() for norm in norms.values()))
        if not square:
            sentences.append(f"The {stream} update is empty.")
            continue
        cells: list[str | float | None] = [stream, square**0.5]
        for group, some in lists.items():
            if not some:
                cells += [None, None]
                continue
            ordered = sorted(some, key=lambda row: (row.tokens, row.weight), reverse=True)
            forms = [each[group].forms(along) for along in (paths[stream], NoiseLike(model, norms, subject.seed))]
            both = torch.cat(forms, 1).numpy()
            cells += [float(both[:, way].sum() / both[:, 1].sum() / square) for way in (0, 2)]
            if group == "retain":
                meaning = f"curvature of the retain loss along the {stream}, as a multiple of that along noise of its size"
                metric = statistics.bootstrap(
                    lambda w, b=both: (w @ b[:, 0]) / (w @ b[:, 2]), [copies(ordered)], subject.seed, meaning
                )
                result.metrics[f"{stream}_curvature"] = metric
                span = f" ({metric.low:.2g} to {metric.high:.2g})" if math.isfinite(metric.high) else ""
                sentences.append(
                    f"Along the {stream} the retain loss is {metric.value:.2g} times as curved as along noise of its "
                    f"size{span}."
                )
        table.append(tuple(cells))
    columns = ("stream", ">norm", *(f">{group}, along {what}" for group in lists for what in ("it", "noise")))
    figure = Table("Curvature along the whole streams (Gauss–Newton, a unit of length)", columns, tuple(table))
    result.figures.append(figure)
    return " ".join(sentences)


def _some(rows: Sequence[Row], tokens: int) -> list[Row]:
    """Take rows from all over the list until there are enough tokens; at least one."""
    total = sum(row.tokens for row in rows)
    step = max(total // tokens, 1)
    found, held = [], 0
    for row in [row for start in range(step) for row in rows[start::step]]:
        if found and held + row.tokens > tokens:
            break
        found.append(row)
        held += row.tokens
    return found


CHECK = Check(
    name="spectrum",
    title="Spectra",
    words="Spectral density of the loss and of both streams.",
    part=Part.MECHANISM,
    run=run,
    metrics=("sharpness", "outliers", "memory_curvature", "skill_curvature"),
    needs=(Need.RETAIN,),
    options=SpectrumOptions,
)
