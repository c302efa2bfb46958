"""`doctor`: what this machine has, and what each command could do here. Reads no checkpoint and writes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from liborth_cli import __version__
from liborth_cli.checkpoint import cache
from liborth_cli.console import size
from liborth_cli.machine import (
    LOW_RANK_BYTES,
    TRAINING_BYTES,
    Run,
    allowed_cores,
    available_cores,
    free_bytes,
    multiplies_bfloat16,
    spare_bytes,
)

LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "scipy")
EXTRAS = {
    "datasets": ("data", "rows from the hub, --data hub:org/name"),
    "pyarrow": ("parquet", "parquet tables"),
    "peft": ("lora", "tune --method lora"),
    "rouge_score": ("rouge", "ROUGE in verify --tofu"),
    "sentencepiece": ("sentencepiece", "models that bring tokenizer.model only"),
}
"""Module → the extra that installs it, and what needs it."""
STORED, COMPUTED = 2, 4
"""Bytes a weight: in a bfloat16 file; in float32 while a model runs."""


@dataclass(frozen=True)
class Fact:
    """One thing that was looked at.

    Attributes:
        name: what.
        value: what was found.
        advice: what to do about it, or "".
    """

    name: str
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Ability:
    """What a command could do here.

    Attributes:
        command: as it is typed.
        weights: how many weights a model may have; None for any number.
        says: the same and its reason, for a person.
    """

    command: str
    weights: int | None
    says: str


@dataclass(frozen=True)
class Findings:
    """Everything that was found.

    Attributes:
        facts: what there is.
        abilities: what can be done with it.
    """

    facts: list[Fact] = field(default_factory=list)
    abilities: list[Ability] = field(default_factory=list)

    @property
    def advice(self) -> list[str]:
        """What could be better, a sentence each."""
        return [f"{fact.name}: {fact.advice}" for fact in self.facts if fact.advice]


def examine(folder: Path, run: Run) -> Findings:
    """Look at versions, device, kernels, memory, disk and threads, and say what they allow.

    Args:
        folder: where outputs would go.
        run: the device and the kernels that a command would take.
    """
    facts = [Fact("liborth", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")]
    facts += [Fact(name, _version(name) or "missing") for name in LIBRARIES]
    facts += [_extra(module) for module in EXTRAS]
    facts += [_device(run), _products(run), _kernels(run), _threads()]
    free, usable = free_bytes(), spare_bytes()
    facts.append(Fact("memory", f"{size(free)} free" if free is not None else "not known here; 4.3 GB is assumed"))
    facts.append(Fact("cache", f"{cache.place()}, {size(cache.nbytes())}; --empty-cache empties it"))
    disk = shutil.disk_usage(folder).free
    facts += [Fact(f"disk {name}", f"{size(shutil.disk_usage(place).free)} free") for name, place in _places(folder).items()]
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    facts.append(Fact("hub", "offline: only what is cached (HF_HUB_OFFLINE)" if offline else "asked when a name is not a path"))
    return Findings(facts, _abilities(usable, disk))


def _abilities(memory: int, disk: int) -> list[Ability]:
    """Say how large a model may be, by the bytes a weight that each kind of work takes."""
    written, run, trained = disk // (2 * STORED), memory // COMPUTED, memory // TRAINING_BYTES
    low = memory // LOW_RANK_BYTES
    fits = f"all weights in memory up to {_weights(run)}; larger ones one block at a time"
    training = f"up to {_weights(trained)}: {TRAINING_BYTES} bytes a weight in half of the free memory, and activations"
    by_disk = f"up to {_weights(written)}: the disk here, for checkpoint and memory in bfloat16; memory does not limit it"
    return [
        Ability("split, excise", written, by_disk),
        Ability("curvature, split with texts", None, fits),
        Ability("verify", None, fits),
        Ability("verify --relearn", low, f"{training}; by LoRA up to {_weights(low)}, {LOW_RANK_BYTES} bytes a weight"),
        Ability("tune", trained, training),
        Ability("inspect", None, "any size: it reads headers"),
    ]


def _version(module: str) -> str | None:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(module: str) -> Fact:
    extra, purpose = EXTRAS[module]
    if importlib.util.find_spec(module):
        return Fact(module, _version(module.replace("_", "-")) or "installed")
    return Fact(module, "not installed", f"pip install 'liborth[{extra}]' for {purpose}")


def _device(run: Run) -> Fact:
    import torch

    if run.device.type != "cuda":
        built = "torch is built for CUDA and sees no GPU" if torch.version.cuda else "torch is built for the CPU"
        return Fact("device", f"cpu; {built}")
    free, total = torch.cuda.mem_get_info(run.device)
    return Fact("device", f"{run.device}, {torch.cuda.get_device_name(run.device)}, {size(free)} of {size(total)} free")


def _products(run: Run) -> Fact:
    fast = "faster than in float32: --dtype bfloat16 speeds up passes and training" if multiplies_bfloat16(run.device) else ""
    return Fact("bfloat16", fast or "slower than float32 here: leave --dtype bfloat16 out")


def _kernels(run: Run) -> Fact:
    ours = sorted(op for op, who in run.kernels.items() if who == "triton")
    return Fact("kernels", f"triton: {', '.join(ours)}" if ours else "torch computes everything", run.note)


def _threads() -> Fact:
    allowed, taken = allowed_cores(), available_cores()
    busy = taken < allowed and not os.environ.get("OMP_NUM_THREADS")
    advice = f"the machine is busy; -j {allowed} takes every core, and is slower while it is" if busy else ""
    return Fact("threads", f"{taken} of {allowed} that this process may use, of {os.cpu_count()} here", advice)


def _places(folder: Path) -> dict[str, Path]:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    while not cache.exists():
        cache = cache.parent
    return {"here": folder, "for temporary files": Path(tempfile.gettempdir()), "of the hub's cache": cache}


def _weights(count: int) -> str:
    return f"{count / 1e9:.1f} billion weights" if count >= 1e8 else f"{count / 1e6:.0f} million weights"
