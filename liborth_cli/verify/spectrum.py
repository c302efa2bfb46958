"""`--spectrum`: how curved the loss on the retain data is, and how curved along what the split calls skill and memory.

At the general weights W_g, for the mean loss a token of the retain rows, n weights:

- **Spectral density** of the Gauss–Newton matrix (or the Hessian), (n, n), by stochastic Lanczos quadrature (Ghorbani et al.
  2019, arXiv 1901.10159; Yao et al. 2020, arXiv 1912.07145): for all weights, and restricted to the leading singular subspaces
  of the skill, of the memory, and of a random update, k² directions a matrix (directions.py).
- **Outliers**: eigenvalues above the edge λ̄·(1 + √(n/T))² where the bulk would end if the T tokens pulled in independent
  directions (Marchenko & Pastur 1967; λ̄ is the mean eigenvalue). Counted are those that Lanczos has found and confirmed,
  each once; "at least" where some have not settled.
- **Curvature along the streams**: ⟨U, GGN U⟩ / ⟨U, U⟩ for the whole skill update U_s = W_g − W_r, the whole memory update
  U_m = W_f − W_g, and noise of the memory's norm in every matrix. Below 1, memory lies flatter than noise.
- **Singular spectra** of both streams, matrix by matrix, with the edge where noise of the same shape ends (linalg/noise.py).

Weights stream block by block. The density over all weights holds Lanczos vectors of n float32 numbers (all of them where
they fit, else three); it is left out, and said so, where three do not fit. The restricted densities always run.

Options: `spectrum_matrix` ("ggn" or "hessian"), `spectrum_tokens` (1024), `spectrum_steps` (40), `spectrum_probes` (2),
`spectrum_rank` (8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from liborth_cli.errors import UsageError
from liborth_cli.linalg.lanczos import eigenvalues_above, lanczos
from liborth_cli.machine import available_bytes, process_bytes
from liborth_cli.measure.products import Products
from liborth_cli.stream.labels import row_seed
from liborth_cli.stream.model import BlockModel
from liborth_cli.stream.texts import Row
from liborth_cli.verify import resampling
from liborth_cli.verify.density import Spectra, density_plot
from liborth_cli.verify.directions import Between, Decomposed, NoiseLike, Subspace, Whole, decompose, matrices, random_bases
from liborth_cli.verify.result import Figure, Metric, Result, Table
from liborth_cli.verify.shared_model import shared_model
from liborth_cli.verify.singular import singular_figures
from liborth_cli.verify.subject import Subject

CHECK = "spectrum"
METRICS = ("sharpness", "outliers", "memory_curvature", "skill_curvature")


@dataclass(frozen=True)
class Settings:
    """What is measured; the fields are the options without their `spectrum_`."""

    matrix: str = "ggn"
    tokens: int = 1024
    steps: int = 40
    probes: int = 2
    rank: int = 8

    @classmethod
    def of(cls, subject: Subject) -> Settings:
        """Read the options.

        Raises:
            UsageError: when one makes no sense.
        """
        given = {name: subject.options.get(f"spectrum_{name}") for name in cls.__dataclass_fields__}
        settings = cls(**{name: value for name, value in given.items() if value is not None})
        if settings.matrix not in ("ggn", "hessian"):
            raise UsageError(f"--spectrum-matrix {settings.matrix}: write ggn or hessian")
        if min(settings.tokens, settings.steps, settings.probes, settings.rank) < 1:
            raise UsageError("--spectrum: tokens, steps, probes and rank must be 1 or more")
        return settings


def run(subject: Subject) -> Result:
    """Measure curvature and singular spectra at the general weights.

    Args:
        subject: with retain rows; the streams need a reference and the fine-tuned weights, too.

    Returns:
        `sharpness`, `outliers`, and with both streams `memory_curvature` and `skill_curvature`, relative to noise.

    Raises:
        UsageError: without retain rows, or when an option makes no sense.
    """
    settings = Settings.of(subject)
    subject.need("retain", CHECK, "--retain-data FILE, text of the skill that is kept")
    model = _model(subject)
    rows = _some(subject.retain, settings.tokens)
    streams: dict[str, dict[str, Decomposed]] = {}
    if {"reference", "finetuned"} <= set(subject.states):
        streams = _decompose(model, subject, settings.rank)
    spectra = _densities(subject, model, rows, streams, settings)
    result = Result(CHECK, "", figures=[density_plot(spectra, settings.matrix)])
    result.facts["settings"] = {**vars(settings), "rows": len(rows), "tokens": sum(row.tokens for row in rows)}
    result.facts["lanczos"] = {
        name: [{"nodes": run.nodes.tolist(), "weights": run.weights.tolist()} for run in runs]
        for name, runs in spectra.runs.items()
    }
    sentences = _judge(spectra, settings, result)
    if streams:
        sentences.append(_along(subject, model, rows, streams, result))
        sentences.append(singular_figures(streams, result))
    else:
        sentences.append("Skill and memory were not told apart: that needs --reference and --finetuned (or a memory file).")
    result.verdict = " ".join(sentences)
    return result


# Densities --------------------------------------------------------------------------------------------------------------


def _densities(
    subject: Subject, model: BlockModel, rows: list[Row], streams: dict[str, dict[str, Decomposed]], settings: Settings
) -> Spectra:
    products, names, found = Products(model, rows, settings.matrix == "hessian"), matrices(model), Spectra()
    found.tokens = int(sum(row.keep.sum() for row in rows))
    spaces: dict[str, Whole | Subspace] = {}
    whole = Whole(model)
    vectors = (available_bytes() - process_bytes()) // (whole.size * torch.finfo(model.dtype).bits // 8)
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
    model.use(subject.states["general"])
    counts = {
        name: (settings.steps, settings.probes) if name == "all weights" else (min(settings.steps, 20), min(settings.probes, 2))
        for name in spaces
    }
    total = sum(min(steps, spaces[name].size) * probes for name, (steps, probes) in counts.items())
    with subject.console.progress("curvature", total, "products") as progress:
        for name, space in spaces.items():
            steps, probes = counts[name]

            def multiply(v: torch.Tensor, space: Whole | Subspace = space) -> torch.Tensor:
                progress.advance(1)
                return space.multiply(products.product, v)

            keep = not isinstance(space, Whole) or vectors > steps + 6
            starts = [_start(space.size, row_seed(subject.seed + probe, name.encode()), model) for probe in range(probes)]
            found.runs[name] = [lanczos(multiply, start, steps, keep) for start in starts]
            found.sizes[name] = space.size
    return found


def _start(size: int, seed: int, model: BlockModel) -> torch.Tensor:
    """Draw a Rademacher vector: its quadratic form has the least variance (Hutchinson 1990)."""
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return signs.to(model.device, model.dtype).mul_(2).sub_(1)


def _judge(spectra: Spectra, settings: Settings, result: Result) -> list[str]:
    title = "Hessian" if settings.matrix == "hessian" else "Gauss–Newton matrix"
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
        result.facts["bulk_edge"], result.facts["outliers"], result.facts["smallest"] = edge, above, low
        sentences.append(
            f"{title} over {spectra.sizes['all weights']:,} weights: largest eigenvalue {max(tops):.3g}, "
            f"{'' if complete else 'at least '}{len(above)} above the bulk's edge at {edge:.3g}"
            + (f", smallest {low:.3g}" if settings.matrix == "hessian" else "")
            + "."
        )
    means = {name: [float(r.weights @ r.nodes) for r in some] for name, some in spectra.runs.items()}
    result.facts["mean_eigenvalue"] = {name: float(np.mean(some)) for name, some in means.items()}
    rows = tuple(
        (name, float(spectra.sizes[name]), float(np.mean(means[name])), float(max(r.nodes[-1] for r in some)))
        for name, some in spectra.runs.items()
    )
    columns = ("space", ">dimensions", ">mean eigenvalue", ">largest eigenvalue")
    result.figures.append(Table(f"Curvature of the retain loss ({title})", columns, rows))
    return sentences


# Along the streams ------------------------------------------------------------------------------------------------------


def _decompose(model: BlockModel, subject: Subject, rank: int) -> dict[str, dict[str, Decomposed]]:
    """Take both streams of every matrix apart; what a stream leaves unchanged is left out."""
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
    states = subject.states
    return {
        "skill": Between(model, states["reference"], states["general"]),
        "memory": Between(model, states["general"], states["finetuned"]),
    }


def _along(
    subject: Subject, model: BlockModel, rows: list[Row], streams: dict[str, dict[str, Decomposed]], result: Result
) -> str:
    """Measure the curvature along each whole stream and along noise of its size, on retain rows and on canaries."""
    groups = {"retain": rows, "canaries": subject.canaries}
    paths: dict[str, Between | NoiseLike] = dict(_paths(model, subject))
    table, sentences = [], []
    for stream, parts in streams.items():
        norms = {name: part.norms for name, part in parts.items()}
        square = float(sum(norm.square().sum() for norm in norms.values()))
        if not square:
            sentences.append(f"The {stream} update is empty.")
            continue
        cells: list[str | float | None] = [stream, square**0.5]
        for group, some in groups.items():
            if not some:
                cells += [None, None]
                continue
            products = Products(model, some)
            both = torch.cat([products.forms(paths[stream]), products.forms(NoiseLike(model, norms, subject.seed))], 1).numpy()
            cells += [float(both[:, way].sum() / both[:, 1].sum() / square) for way in (0, 2)]
            if group == "retain":
                meaning = f"curvature of the retain loss along the {stream}, as a multiple of that along noise of its size"
                metric = resampling.bootstrap([both], lambda b: b[..., 0].sum(1) / b[..., 2].sum(1), subject.seed, meaning)
                result.metrics[f"{stream}_curvature"] = metric
                sentences.append(
                    f"Along the {stream} the retain loss is {metric.value:.2g} times as curved as along noise of its size "
                    f"({metric.low:.2g} to {metric.high:.2g})."
                )
        table.append(tuple(cells))
    columns = ("stream", ">norm", *(f">{group}, along {what}" for group in groups for what in ("it", "noise")))
    figure: Figure = Table("Curvature along the whole streams (Gauss–Newton, a unit of length)", columns, tuple(table))
    result.figures.append(figure)
    return " ".join(sentences)


def _model(subject: Subject) -> BlockModel:
    """Return a model in float32 or wider: products in bfloat16 would be noise."""
    model = shared_model(subject)
    if model.dtype in (torch.float32, torch.float64):
        return model
    return BlockModel(subject.states["general"], torch.float32, subject.run.device)


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
