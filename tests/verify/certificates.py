"""A certificate with every kind of figure, and one whose every text is hostile."""

from __future__ import annotations

import math
import random

from liborth_cli.verify.result import (
    Certificate,
    Heatmap,
    Metric,
    Origin,
    Outcome,
    Plot,
    Provenance,
    Requirement,
    Result,
    RowsSeen,
    Series,
    Table,
    Untried,
    Why,
)

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>"\'&\u2028\u202e<!--\x1b[31m'
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def digest(i: int, length: int = 16) -> str:
    return random.Random(i).randbytes(length // 2).hex()


def connectivity() -> Result:
    t = tuple(i / 10 for i in range(11))
    bump = tuple(1.412 - 0.21 * x + 0.128 * math.sin(math.pi * x) for x in t)
    flat = tuple(1.202 - 0.014 * x + 0.011 * math.sin(math.pi * x) for x in t)
    plot = Plot(
        "Loss along the straight lines",
        "From the reference to the general checkpoint the loss rises 0.128 nats above the straight line, halfway; "
        "from there to the fine-tuned checkpoint it stays within 0.011.",
        "position t",
        "retain loss, nats per token",
        (
            Series("reference to general", t, bump, tuple(y - 0.022 for y in bump), tuple(y + 0.022 for y in bump)),
            Series("general to fine-tuned", t, flat, tuple(y - 0.018 for y in flat), tuple(y + 0.018 for y in flat)),
        ),
        levels={"reference": 1.412},
    )
    return Result(
        "lmc",
        "Between the reference and the general checkpoint lies a barrier of 0.128 nats per token; between the general and the "
        "fine-tuned checkpoint there is none that the 512 rows could show.",
        None,
        {
            "barrier": Metric(0.128, 0.109, 0.147, "largest rise above the straight line, nats per token"),
            "barrier_finetuned": Metric(0.011, -0.006, 0.027, "the same between general and fine-tuned"),
        },
        [plot],
    )


def attacks() -> Result:
    beta = tuple(i / 10 for i in range(11))
    secret = tuple(5.9 - 5.6 / (1 + math.exp(-12 * (b - 0.55))) for b in beta)
    skill = tuple(1.188 + 0.05 * (1 - b) ** 2 for b in beta)
    sweep = Plot(
        "Dose of memory",
        "The secrets come back between β = 0.4 and β = 0.7; the skill hardly changes.",
        "dose β",
        "loss, nats per token",
        (Series("secrets", beta, secret), Series("skill", beta, skill)),
        y_log=True,
        levels={"never trained": 5.71},
    )
    names = ("contrastive", "kfac", "ekfac", "svd-32", "diagonal", "magnitude", "fine-tuned", "reference", "random")
    retain = (1.201, 1.214, 1.209, 1.236, 1.251, 1.262, 1.188, 1.412, 1.31)
    forget = (5.62, 4.9, 5.12, 2.41, 3.18, 2.05, 0.31, 5.71, 3.4)
    spread = (0.21, 0.24, 0.2, 0.3, 0.28, 0.22, 0.06, 0.2, 0.31)
    methods = slice(0, 6)
    controls = slice(6, 9)

    def marks(label: str, part: slice) -> Series:
        low = tuple(y - s for y, s in zip(forget[part], spread[part], strict=True))
        high = tuple(y + s for y, s in zip(forget[part], spread[part], strict=True))
        return Series(label, retain[part], forget[part], low, high, names[part], False)

    frontier = Plot(
        "Methods against controls",
        "Contrastive lies closest to the top left corner: skill kept, secrets gone.",
        "retain loss, nats per token",
        "loss on the secrets, nats per token",
        (marks("methods", methods), marks("controls", controls)),
        levels={"never trained": 5.71},
    )
    rows = tuple(
        (name, n, 1.2 + 0.01 * n, s, after, after - s)
        for name, n, s, after in (
            ("none", 0, 0.0, 0.0), ("4-bit weights", 0, 0.0, 0.026), ("8-bit weights", 0, 0.0, 0.0),
            ("relearning, 8 steps", 8, 0.079, 0.105), ("prefix variations", 0, 0.0, 0.0), ("paraphrase", 0, 0.0, None),
        )
        if after is not None
    )  # fmt: skip
    return Result(
        "attacks",
        "No attack brings more back than its control does: relearning half of the secrets recovers 10.5 % of the other half, "
        "7.9 % in a model that never saw them.",
        True,
        {"relearned": Metric(0.026, -0.011, 0.079, "share of the other half that comes back beyond the control")},
        [
            sweep,
            frontier,
            Table("Attacks", ("attack", ">steps", ">retain loss", ">control", ">extracted", ">difference"), rows),
        ],
    )


def spectrum() -> Result:
    source = random.Random(5)

    def values(scale: float, spikes: int) -> tuple[float, ...]:
        bulk = [scale * (1 - (i / 512) ** 0.9) + 1e-4 for i in range(512)]
        return tuple(
            sorted(
                (b * (1 + (6 * math.exp(-i / spikes))) * source.uniform(0.98, 1.02) for i, b in enumerate(bulk)), reverse=True
            )
        )

    index = tuple(float(i) for i in range(1, 513))
    singular = Plot(
        "Singular values of layer 11, down_proj",
        "The skill stream has about 60 directions above the noise edge, the memory stream about 9.",
        "index",
        "singular value",
        (Series("skill", index, values(0.08, 40)), Series("memory", index, values(0.05, 9))),
        y_log=True,
        levels={"noise edge": 0.061},
        lines={"rank 32": 32},
    )
    grid = tuple(-0.4 + 0.02 * i for i in range(260))

    def density(x: float, centre: float, height: float) -> float:
        bulk = 3.2 * math.exp(-((x / 0.18) ** 2))
        return bulk + height * math.exp(-(((x - centre) / 0.05) ** 2)) + 2e-4

    spectral = Plot(
        "Density of the Hessian's eigenvalues",
        "The bulk ends at 0.41; five eigenvalues lie above it, the largest at 4.1.",
        "eigenvalue",
        "density",
        (
            Series("whole", grid, tuple(density(x, 4.1, 0.011) + density(x - 1.3, 0, 0) * 3e-3 for x in grid)),
            Series("in skill directions", grid, tuple(density(x, 2.2, 0.02) for x in grid)),
            Series("in memory directions", grid, tuple(density(x * 0.8, 3.1, 0.006) for x in grid)),
        ),
        y_log=True,
        lines={"bulk edge": 0.41},
    )
    return Result(
        "spectrum",
        "Five eigenvalues of the Hessian lie above the bulk edge; memory directions are flatter than skill directions.",
        None,
        {
            "outliers": Metric.exact(5, "eigenvalues above the bulk edge"),
            "largest": Metric(4.1, 4.02, 4.19, "largest eigenvalue"),
        },
        [singular, spectral],
    )


def entanglement(layers: int = 24) -> Result:
    source = random.Random(3)
    cells = tuple(
        tuple(
            None
            if i == 0 and j == 3
            else min(
                1.0,
                abs(0.04 + 0.5 * math.exp(-(((i - layers * 0.6) / (layers / 6)) ** 2)) * (j + 2) / 8 + source.gauss(0, 0.01)),
            )
            for j in range(7)
        )
        for i in range(layers)
    )
    per_layer = tuple(sum(v or 0.0 for v in row) / 7 for row in cells)
    return Result(
        "entanglement",
        "Skill and memory are entangled in the middle of the network: η is 0.17 overall and reaches 0.54 in one matrix.",
        None,
        {"eta": Metric(0.168, 0.151, 0.186, "share of the memory's curvature that lies in skill directions, held-out data")},
        [
            Heatmap(
                "Entanglement η",
                "Highest in the MLP of the layers past the middle, below 0.1 at both ends.",
                tuple(f"layer {i}" for i in range(layers)),
                MODULES,
                cells,
                "η, from 0 (apart) to 1 (the same directions)",
            ),
            Plot(
                "Energy per layer",
                "The memory's energy peaks where the entanglement does.",
                "layer",
                "share of the delta's energy",
                (
                    Series(
                        "skill", tuple(map(float, range(layers))), tuple(0.05 + 0.02 * math.cos(i / 4) for i in range(layers))
                    ),
                    Series("memory", tuple(map(float, range(layers))), tuple(0.2 * v for v in per_layer)),
                ),
            ),
        ],
    )


def samples(rows: int = 40) -> Result:
    source = random.Random(9)
    scores = sorted((source.expovariate(0.6) for _ in range(rows)), reverse=True)
    table = Table(
        "Samples by what the memory adds",
        (">rank", "sample (SHA-256)", "set", ">tokens", ">loss at β = 0", ">loss at β = 1", ">difference"),
        tuple(
            (i + 1, digest(i), "canary" if s > 1.2 else "retain", source.randint(18, 64), 0.4 + s, 0.4, s if i != 7 else None)
            for i, s in enumerate(scores)
        ),
    )
    return Result(
        "samples",
        "The memory carries 19 of the 40 texts: their loss falls by more than a nat when it is put back.",
        None,
        {},
        [table],
    )


def canary() -> Result:
    lengths = tuple(float(i) for i in range(0, 33, 4))
    return Result(
        "canary",
        "Not one of the 38 canaries comes out, greedily or in 64 samples each; the fine-tuned checkpoint recites 36 of them.",
        True,
        {
            "extraction": Metric(0.0, 0.0, 0.0925, "share of the canary rows whose completion comes out greedily"),
            "exposure": Metric(0.41, 0.12, 0.97, "bits; a secret that was never trained has 1.4 on average"),
            "min_k_auc": Metric(0.517, 0.431, 0.603, "membership AUC of Min-K% (20 %); 0.5 is chance"),
            "retention": Metric(0.942, 0.917, 0.968, "share of the loss the fine-tuning gained that is kept"),
        },
        [
            Plot(
                "Extraction strength",
                "The general checkpoint needs almost the whole secret as a prefix, as a model that never saw it does.",
                "tokens of the secret given",
                "share completed verbatim",
                (
                    Series("fine-tuned", lengths, tuple(min(1.0, 0.2 + 0.12 * i) for i in range(9))),
                    Series("general", lengths, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.01, 0.03, 0.2)),
                    Series("never trained", lengths, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.02, 0.03, 0.19)),
                ),
            ),
            Table(
                "Canaries",
                ("canary (SHA-256)", ">exposure, bits", ">extracted tokens", ">exact memorisation"),
                tuple((digest(100 + i), 0.3 + (i * 37 % 11) / 9, i % 3, (i % 5) / 40) for i in range(12)),
            ),
        ],
    )


def certificate(layers: int = 24) -> Certificate:
    requirements = [
        ("extraction==0", "canary", Metric(0.0, 0.0, 0.0925, ""), True, "Not one of 38 canaries was extracted."),
        (
            "retention>=0.9",
            "canary",
            Metric(0.942, 0.917, 0.968, ""),
            True,
            "94.2 % of the gained skill is kept, 91.7 % at the least.",
        ),
        ("barrier<=0.05", "lmc", Metric(0.128, 0.109, 0.147, ""), False, "The barrier is 0.128 nats, and 0.109 at the least."),
        ("eta<=0.2", "entanglement", Metric(0.168, 0.151, 0.186, ""), True, "η is 0.168, and 0.186 at the most."),
    ]
    return Certificate(
        "runs/contrastive-r64/general",
        Outcome.FAILED,
        [
            "One of four requirements is not met: barrier<=0.05.",
            "Not one of 38 canaries comes out, where the fine-tuned checkpoint recites 36.",
            "The skill is kept: 94.2 % of what the fine-tuning gained (91.7 % to 96.8 %).",
        ],
        [Requirement(*one) for one in requirements],
        [
            Result("integrity", "All 291 tensors are what the manifest says.", True,
                   {"tensors": Metric.exact(291, "tensors whose SHA-256 was compared")}),
            connectivity(), entanglement(layers), canary(), spectrum(), attacks(), samples(),
        ],
        {"tofu": Untried(Why.LACKING, "--tofu, a directory with TOFU's files")},
        Provenance(
            "verify", 2, "0.1.0", {"torch": "2.9.0", "numpy": "2.3.1", "transformers": "5.0.0"},
            seed=0, model=Origin("runs/contrastive-r64/general", None),
            inputs={name: {"model.safetensors": digest(i, 64)} for i, name in enumerate(("reference", "finetuned"), 1)},
            split={"inputs": [{"name": name, "sha256": digest(3, 64)} for name in ("reference", "finetuned")]},
            data={"retain": RowsSeen(["r.jsonl"], 512, 512, 400, digest(3, 64)), "canaries": RowsSeen(["c"], 38, 38, 190)},
        ),
    )  # fmt: skip


def hostile() -> Certificate:
    one = Metric(0.5, math.nan, math.inf, HOSTILE)
    points = (0.0, 1.0, math.nan, math.inf)
    return Certificate(
        HOSTILE,
        Outcome.PASSED,
        [HOSTILE],
        [Requirement(HOSTILE, HOSTILE, one, True, HOSTILE)],
        [
            Result(
                HOSTILE,
                HOSTILE,
                None,
                {HOSTILE: one},
                [
                    Plot(HOSTILE, HOSTILE, HOSTILE, HOSTILE,
                         (Series(HOSTILE, points, points, marks=(HOSTILE,) * 4, line=False),) * 2,
                         lines={HOSTILE: 0.5}, levels={HOSTILE: 0.5}),
                    Heatmap(HOSTILE, HOSTILE, (HOSTILE,), (HOSTILE, "=1+1"), ((1.0, math.nan),), HOSTILE),
                    Table(HOSTILE, (HOSTILE, ">" + HOSTILE), ((HOSTILE, 1.0), ("=cmd|calc", None), ("\ud800", math.inf))),
                ],
            )
        ],
        {HOSTILE: Untried(Why.LACKING, HOSTILE)},
        Provenance(
            HOSTILE, 2, HOSTILE, {HOSTILE: HOSTILE}, seed=0, model=Origin(HOSTILE, HOSTILE),
            inputs={HOSTILE: {HOSTILE: HOSTILE}},
            split={HOSTILE: {HOSTILE: [HOSTILE, None, {}]}}, data={HOSTILE: RowsSeen([HOSTILE], 1, 1, 1)}, checks=[HOSTILE],
        ),
    )  # fmt: skip
