"""Whole commands on generated pairs of real shapes, beside baselines that do what cannot be avoided; parts of `make bench-gpu`.

Baselines: a plain forward and backward of Transformers on the same tokens; a copy of the same bytes with both sides hashed.
Seconds are without the import of torch; bytes are those of the inputs and the outputs, each once.
"""

from __future__ import annotations

import filecmp
import hashlib
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from make_pair import SHAPES as ALL
from make_pair import make_pair
from sampling import Sampler

if TYPE_CHECKING:
    from gpu_parts import Asked

LENGTH = 256
"""Tokens of a row."""
SHAPES = {**ALL, "7b, four layers": {**ALL["7b"], "layers": 4, "shards": 4}}
TOKENS = {"tiny": 1024}
FORGET = {"tiny": 256}
RANK = {"tiny": "8"}
"""Of the tiny shape; others have 65,536 tokens to retain, 2,048 to forget, and rank 64."""
PIECE = 1 << 23


@dataclass(frozen=True)
class Took:
    """What one command took: seconds, and the peak of GPU memory in bytes."""

    seconds: float
    peak: int


def command(*words: object) -> Took:
    """Run `liborth WORDS` in this process.

    Raises:
        RuntimeError: when it refuses.
    """
    from liborth_cli.cli.main import run

    for place in (Path(str(words[-1])), Path(f"{words[-1]}.private")) if words[-2:-1] == ("-o",) else ():
        shutil.rmtree(place, ignore_errors=True)  # --force would remove what an earlier run made, and be timed for it
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sys.argv = ["liborth", *map(str, words)]
    start = time.perf_counter()
    try:
        with redirect_stdout(io.StringIO()):
            run()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"liborth {' '.join(map(str, words))}: exit {end.code}") from None
    seconds = time.perf_counter() - start
    return Took(seconds, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


@dataclass(frozen=True)
class Pair:
    """A generated pair and its texts, under one directory."""

    folder: Path
    shape: str

    @property
    def sides(self) -> list[Path]:
        """Both checkpoints."""
        return [self.folder / "base", self.folder / "finetuned"]

    @classmethod
    def ready(cls, asked: Asked, shape: str) -> Pair:
        """Make it, when it is not there."""
        shape = "tiny" if asked.dry_run else shape
        pair = cls(asked.work / shape.replace(", ", "-").replace(" ", "-"), shape)
        if not (pair.folder / "forget.npy").exists():
            make_pair(pair.folder, torch.bfloat16, asked.device, **SHAPES[shape])
            draw = np.random.default_rng(0)
            for name, tokens in (("retain", TOKENS.get(shape, 65_536)), ("forget", FORGET.get(shape, 2048))):
                rows = draw.integers(2, SHAPES[shape]["vocabulary"], (tokens // LENGTH, LENGTH + 1))
                np.save(pair.folder / f"{name}.npy", rows)
        return pair

    def texts(self, name: str) -> Path:
        """Token rows to "retain" or to "forget"."""
        return self.folder / f"{name}.npy"


def curvature(asked: Asked) -> Iterator[str]:
    """Factors of every matrix of the 1B shape beside a plain forward and backward on the same tokens."""
    started = time.perf_counter()
    pair = Pair.ready(asked, "1b")
    print(f"(the pair is there after {time.perf_counter() - started:.1f} s)", flush=True)
    base, finetuned = pair.sides
    tokens = TOKENS.get(pair.shape, 65_536)
    yield "| job | s | × plain | tokens/s | GB/s read and written | peak GPU memory, GB |"
    yield "|---|---|---|---|---|---|"
    plain = _plain(finetuned, pair.texts("retain"), asked.device)
    yield f"| plain forward and backward, Transformers, bf16, {tokens:,} tokens | {_cells(plain, plain, tokens, 0)} |"
    out = asked.work / "factors"
    words = ["curvature", finetuned, "--data", pair.texts("retain"), "--dtype", "bfloat16", *_quietly(asked)]
    half = ["--at", "0.5", "--reference", base]
    jobs = [("curvature, the first time", words), ("curvature", words), ("curvature, half way", [*words, *half])]
    shutil.rmtree(out, ignore_errors=True)
    moved = 0
    for title, some in jobs[: 2 if asked.brief else 3]:
        with Sampler() if asked.profile and title == "curvature" else nullcontext() as sampler:
            took = command(*some, "-o", out)
        moved = nbytes(finetuned) * (1 + ("half" in title)) + nbytes(out)
        yield f"| {title}, all {SHAPES[pair.shape]['layers']} layers, bf16 | {_cells(took, plain, tokens, moved)} |"
        if sampler is not None:
            print(sampler.table(), flush=True)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > 2 * nbytes(out):
        took = command(*words, "-o", shared / "liborth-bench-factors")
        yield f"| curvature, factors into a file system in memory | {_cells(took, plain, tokens, moved)} |"
        shutil.rmtree(shared / "liborth-bench-factors")
    if not asked.brief:
        yield f"| copy of {nbytes(out) / 1e9:.1f} GB with both sides hashed | {_copied([out], asked.work)} |"
    shutil.rmtree(out)
    if asked.profile and asked.device == "cuda":
        print(_kernels_of([*words, "--tokens", str(tokens // 4), "-o", out]), flush=True)
        shutil.rmtree(out)


def _cells(took: Took, plain: Took, tokens: int, moved: float) -> str:
    rate = f"{moved / took.seconds / 1e9:.2f}" if moved else ""
    ratio, speed = took.seconds / plain.seconds, tokens / took.seconds
    return f"{took.seconds:.2f} | {ratio:.2f} | {speed:,.0f} | {rate} | {took.peak / 1e9:.1f}"


def _plain(checkpoint: Path, texts: Path, device: str) -> Took:
    """Time forward and backward with the gradients of all weights, 32 rows at a time; the first batch is run twice."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.to(device).train()
    rows = torch.from_numpy(np.load(texts)).to(device)
    batches = [rows[:32], *rows.split(32)]
    start = 0.0
    for number, batch in enumerate(batches):
        if number == 1:
            _wait()
            start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        logits = model(batch[:, :-1], use_cache=False).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").backward()
    _wait()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Took(time.perf_counter() - start, peak)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _kernels_of(words: Sequence[object]) -> str:
    """Run a command under torch's profiler, and name what takes the GPU's time and the processor's."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        took = command(*words)
    found = seen.key_averages()
    tables = [
        found.table(sort_by=key, row_limit=14, max_name_column_width=60)
        for key in ("self_cuda_time_total", "self_cpu_time_total")
    ]
    keep = (line for table in tables for line in table.splitlines() if "---" not in line)
    return f"(under torch's profiler: {took.seconds:.2f} s)\n" + "\n".join(line[:62] + line[-150:] for line in keep)


def split(asked: Asked) -> Iterator[str]:
    """Split by svd and put together again, beside a copy of the same bytes with both sides hashed."""
    pair = Pair.ready(asked, "1b")
    base, finetuned = pair.sides
    svd, out = asked.work / "svd", asked.work / "out"
    yield "| job | s | GB/s read and written | of the copy's | peak GPU memory, GB |"
    yield "|---|---|---|---|---|"
    copied = _copy_rate([base, finetuned], asked.work)
    yield f"| copy of both checkpoints with both sides hashed | {copied[0]:.2f} | {copied[1]:.2f} | | |"
    cut = ["split", base, finetuned, *_quietly(asked)]
    jobs = [
        ("split svd, noise edge", [*cut, "--noise-edge", "-o", out], [base, finetuned], out),
        ("split svd, noise edge, again", [*cut, "--noise-edge", "-o", out], [base, finetuned], out),
        (
            f"split svd, rank {RANK.get(pair.shape, '64')}",
            [*cut, "--rank", RANK.get(pair.shape, "64"), "-o", svd],
            [base, finetuned],
            svd,
        ),
        ("excise, β = 0.7", ["excise", svd, "--beta", "0.7", "-q", "--force", "-o", out], [svd], out),
        ("excise, β = 1", ["excise", svd, "--beta", "1", "-q", "--force", "-o", out], [svd], out),
    ]
    for title, words, reads, wrote in jobs if not asked.brief else [*jobs[:3], jobs[-1]]:
        with Sampler() if asked.profile and "again" in title else nullcontext() as sampler:
            took = command(*words)
        rate = sum(map(nbytes, [*reads, wrote])) / took.seconds / 1e9
        yield f"| {title} | {took.seconds:.2f} | {rate:.2f} | {rate / copied[1]:.0%} | {took.peak / 1e9:.1f} |"
        if sampler is not None:
            print(sampler.table(), flush=True)
    for file in finetuned.glob("*.safetensors"):
        if not filecmp.cmp(file, out / file.name, shallow=False):
            raise SystemExit(f"{file.name}: β = 1 does not give it back")
    yield ""
    yield "β = 1 gave the fine-tuned files back, byte for byte."


def texts(asked: Asked) -> Iterator[str]:
    """From texts to a general checkpoint in one command, by the methods that measure curvature."""
    yield from _from_texts(asked, "1b", ("contrastive", "tokenwise"))


def large(asked: Asked) -> Iterator[str]:
    """Do the same for the 7B shape; in brief for four of its 32 layers."""
    if not asked.dry_run:
        shutil.rmtree(asked.work / "1b", ignore_errors=True)  # a 7B pair and its split are 54 GB
    yield from _from_texts(asked, "7b, four layers" if asked.brief else "7b", ("contrastive",))


def _from_texts(asked: Asked, shape: str, methods: Sequence[str]) -> Iterator[str]:
    started = time.perf_counter()
    pair = Pair.ready(asked, shape)
    print(f"(the pair is there after {time.perf_counter() - started:.1f} s)", flush=True)
    base, finetuned = pair.sides
    out = asked.work / "out"
    kept, gone = TOKENS.get(pair.shape, 65_536), FORGET.get(pair.shape, 2048)
    yield f"{pair.shape}: {kept:,} tokens to retain and {gone:,} to forget, arithmetic in float32."
    yield ""
    yield "| job | s | peak GPU memory, GB | written, GB |"
    yield "|---|---|---|---|"
    for method in methods:
        words = ["split", base, finetuned, "--method", method, "--strength", "0.1", *_quietly(asked)]
        words += ["--retain-data", pair.texts("retain"), "--forget-data", pair.texts("forget"), "-o", out]
        with Sampler() if asked.profile else nullcontext() as sampler:
            took = command(*words)
        cells = f"{took.seconds:.1f} | {took.peak / 1e9:.1f} | {nbytes(out) / 1e9:.1f}"
        yield f"| split {method}, from texts to checkpoint | {cells} |"
        if sampler is not None:
            print(sampler.table(8), flush=True)


def verify(asked: Asked) -> Iterator[str]:
    """Measure a split of the 1B shape."""
    pair = Pair.ready(asked, "1b")
    base, finetuned = pair.sides
    svd = asked.work / "svd"
    if not svd.exists():
        command("split", base, finetuned, "--rank", RANK.get(pair.shape, "64"), *_quietly(asked), "-o", svd)
    few = asked.work / "held_out.npy"
    np.save(few, np.load(pair.texts("retain"))[:64])
    yield "| job | s | peak GPU memory, GB |"
    yield "|---|---|---|"
    for check in ("--integrity", "--controls", "--lmc", "--sweep"):
        words = ["verify", svd, "--finetuned", finetuned, "--reference", base, "--retain-data", few, check, "--no-require"]
        with Sampler() if asked.profile and check == "--sweep" else nullcontext() as sampler:
            took = command(*words, "-q", "--device", asked.device)
        yield f"| verify {check}, {64 * LENGTH:,} tokens | {took.seconds:.1f} | {took.peak / 1e9:.1f} |"
        if sampler is not None:
            print(sampler.table(8), flush=True)


def _quietly(asked: Asked) -> list[str]:
    return ["--device", asked.device, "-q", "--force"]


def nbytes(place: Path) -> int:
    """Size of the files in a directory and in the private one that belongs to it; 0 where there is none."""
    folders = [folder for folder in (place, place.with_name(f"{place.name}.private")) if folder.is_dir()]
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir() if file.is_file())


def _copied(folders: Sequence[Path], work: Path) -> str:
    seconds, rate = _copy_rate(folders, work)
    return f"{seconds:.2f} | | | {rate:.2f} | "


def _copy_rate(folders: Sequence[Path], work: Path) -> tuple[float, float]:
    """Copy all files, eight at a time, hash what is read and what was written, and wait for the disk; return s and GB/s."""
    target = work / "copied"
    target.mkdir()
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        for same in pool.map(lambda item: _copy(item[1], target / str(item[0])), enumerate(files)):
            assert same
    seconds = time.perf_counter() - start
    moved = 2 * sum(file.stat().st_size for file in files)
    shutil.rmtree(target)
    return seconds, moved / seconds / 1e9


def _copy(source: Path, target: Path) -> bool:
    """Copy a file through memory, hashing it as it is read, and what is on the disk afterwards; return whether they agree."""
    buffer, digest = bytearray(PIECE), hashlib.sha256()
    view = memoryview(buffer)
    with open(source, "rb", buffering=0) as old, open(target, "w+b", buffering=0) as new:
        while count := old.readinto(buffer):
            digest.update(view[:count])
            new.write(view[:count])
        with ThreadPoolExecutor(1) as pool:
            flushed = pool.submit(os.fsync, new.fileno())
            new.seek(0)
            again = hashlib.file_digest(new, "sha256")
            flushed.result()
    return again.digest() == digest.digest()
