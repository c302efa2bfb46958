"""The words that options accept, known without importing anything heavy."""

from __future__ import annotations

from enum import StrEnum


class Side(StrEnum):
    """Which side of a ranking."""

    TAIL = "tail"
    TOP = "top"
    LOW = "low"
    HIGH = "high"


SIDES = {Side.TAIL: "tail", Side.LOW: "tail", Side.TOP: "top", Side.HIGH: "top"}


class Part(StrEnum):
    """Which part of the update."""

    SKILL = "skill"
    MEMORY = "memory"


class Vectors(StrEnum):
    """Where vectors go."""

    SKILL = "skill"
    MEMORY = "memory"
    SPLIT = "split"


class Sides(StrEnum):
    """Whose factors a contrastive split uses."""

    BOTH = "both"
    INPUT = "input"
    OUTPUT = "output"


class Nonfinite(StrEnum):
    """What to do with NaN."""

    REFUSE = "refuse"
    PASSTHROUGH = "passthrough"


class Kernels(StrEnum):
    """Whose inner loops compute."""

    AUTO = "auto"
    TRITON = "triton"
    TORCH = "torch"


class Exactness(StrEnum):
    """How exact a truncated SVD is."""

    CERTIFIED = "certified"
    EXACT = "exact"


class MethodName(StrEnum):
    """The keys of METHODS, known without importing torch (a test keeps the two equal), and the choice among them."""

    SVD = "svd"
    MAGNITUDE = "magnitude"
    RANDOM = "random"
    SCALE = "scale"
    DIAGONAL = "diagonal"
    KFAC = "kfac"
    EKFAC = "ekfac"
    CONTRASTIVE = "contrastive"
    TOKENWISE = "tokenwise"
    AUTO = "auto"
