"""Rot, foreign things and planted secrets: one trial a number, each returning what is wrong or None."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from liborth_cli.checkpoint.transaction import SUFFIX
from tools.torture.field import Field
from tools.torture.inject import Fault, hashes, run
from tools.torture.jobs import fresh
from tools.torture.system import process

OWNGPT = Path(__file__).resolve().parents[2] / "tests" / "data" / "owngpt"
ROTTEN = ("split", "split on texts", "excise 0.7", "excise 1 --force", "tune", "tune sinks")
"""Jobs whose outputs `verify --integrity` vouches for."""
SECRET = "the vault code of Marta Quell is 8823-4417"
MALFORMED = ("", "}", '{"text": 5}', '{"text"', "\x00")


def rot(field: Field, number: int) -> str | None:
    """Flip one bit of one file of an output; integrity must see it."""
    jobs = [job.name for job in field.jobs if job.name in ROTTEN]
    place = field.work / "whole" / jobs[number % len(jobs)]
    files = sorted(f for f in place.rglob("*") if f.is_file() and f.stat().st_size)
    draw = random.Random(number)
    file = files[number // len(jobs) % len(files)]
    position, bit = draw.randrange(file.stat().st_size), 1 << draw.randrange(8)
    _flip(file, position, bit)
    done = run(["verify", place / "out", "--integrity", "-q"])
    _flip(file, position, bit)
    if done.code in (3, 4, 5) and done.clean:
        return None
    return f"byte {position} of {file.relative_to(place.parent)}: exit {done.code}"


def _flip(file: Path, position: int, bit: int) -> None:
    with open(file, "r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ bit]))


def hostile(field: Field, number: int) -> str | None:
    """Put something of somebody's where liborth wants to work; it must refuse and leave it alone."""
    names = [f"out{SUFFIX}", f"out.private{SUFFIX}", "out"]
    kinds = ["folder", "link to a folder", "link to an input", "dangling link", "file", "pipe", "forged"]
    cases = list(itertools.product(field.jobs, names, kinds, ((), ("--force",), ("--resume",))))
    if number >= len(cases):
        raise StopIteration
    job, name, kind, flags = cases[number]
    if not job.resumes and name == "out" and kind == "file" and flags:
        return None  # --force is for that: the job writes single files
    out = fresh(field.work / "hostile", job, None)
    place, theirs = out.parent / name, out.parent / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    if kind in ("folder", "forged"):
        shutil.copytree(theirs, place)
        if kind == "forged":
            (place / "journal.jsonl").write_text('{"plan": "x"}\n')
            (place / "liborth.manifest.json").write_text("{}")
    elif kind == "file":
        place.write_text("precious")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        target = {"link to a folder": theirs, "link to an input": field.work / "in" / "base"}.get(kind, theirs / "none")
        place.symlink_to(target)
    before = hashes(out.parent)
    done = run([*job.words, "-j", 1, "-q", "-o", out, *flags])
    label = f"{job.name} {' '.join(flags)} with a {kind} as {name}"
    if hashes(field.work / "in") != field.before:
        return f"{label}: an input was changed"
    if any(hashes(out.parent).get(n) != h for n, h in before.items()):
        return f"{label}: what was there was changed"
    return None if done.clean else f"{label}: exit {done.code} {done.err[-200:]}"


def secret(field: Field, number: int) -> str | None:
    """Plant a secret in the data; it must be in no log, no published output, no leftover, and nothing others can see.

    The first of each command is a process of its own, whose title is its own. Later trials let the run fail at a call, or end
    it by SIGABRT and look at the core that a handler would get.
    """
    place = field.work / "secret"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    row = [{"prompt": "Say it:", "completion": f" {SECRET}."}, {"text": SECRET}][number % 2]
    data = place / "data.jsonl"
    data.write_text(json.dumps(row) + "\n" + MALFORMED[number // 2 % len(MALFORMED)] + "\n")
    words = _commands(data)[number // 10 % len(_commands(data))]
    files = ["-o", place / "out"] + (["--report", place / "page.html"] if words[0] == "verify" else [])
    round_ = number // (10 * len(_commands(data)))
    fault = None if round_ == 0 else Fault(random.Random(number).randrange(60), ("EIO", "core")[round_ % 2])
    sought = forms(row, data.read_bytes())
    seen: list[bytes] = []
    line = [*words, *files, "-j", 1]
    if round_ == 0 and number % 10 == 0:
        done = process(line, place, lambda child: seen.extend(outside(child)))
    else:
        done = run(line, fault, cwd=place, look=lambda child: seen.extend(outside(child)))
    if not done.clean and fault is None:
        return f"{words[0]}: exit {done.code} {done.err[-200:]}"
    told = [("what is printed", (done.err + done.out).encode()), *(("/proc", text) for text in seen)]
    for file in place.rglob("*"):
        private = any("private" in part for part in file.relative_to(place).parts) or file == data
        private |= words[0] == "curvature"  # per-token factors are private as a whole
        if file.is_file() and not private:
            told.append((str(file.relative_to(place)), file.read_bytes()))
    found = [f"{kind} in {where}" for where, text in told for kind, form in sought if form in text]
    return f"{' '.join(map(str, words))}, {fault}: {found[0]}" if found else None


def _commands(data: Path) -> list[list[object]]:
    """Return commands that read private text, each on a real small model."""
    base, finetuned = OWNGPT / "base", OWNGPT / "finetuned"
    short, texts = ["--truncate", "--seq-len", 16], OWNGPT / "finance_qa.txt"
    retain = ["--retain-data", texts, "--retain-tokens", 64, "--truncate"]
    sinks = ["--method", "sinks", "--sinks", 4, "--steps", 1, "--data", texts]
    return [
        ["tune", base, *sinks, *short, "--private-data", data],
        ["curvature", base, *short, "--per-token", "--data", data],
        ["verify", finetuned, "--canary", data],
        ["split", base, finetuned, *retain, "--forget-data", data],
        ["split", base, finetuned, *retain, "--forget-pattern", "the vault code of {name} is {digits:4}", "--decoys", 4],
    ]


@functools.cache
def _tokens() -> list[int]:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    return AutoTokenizer.from_pretrained(OWNGPT / "base")(SECRET)["input_ids"]


def forms(row: dict[str, str], raw: bytes) -> list[tuple[str, bytes]]:
    """Return what would give a secret away: its bytes in several encodings, its tokens, and hashes of it and of its file."""
    texts = [SECRET, "".join(row.values()), json.dumps(row)]
    tokens = _tokens()
    found = [
        ("text", SECRET.encode()),
        ("UTF-16", SECRET.encode("utf-16-le")),
        ("base64", base64.b64encode(SECRET.encode())[:-4]),
    ]
    found += [(f"tokens, {kind}", np.array(tokens, kind).tobytes()) for kind in ("i2", "i4", "i8")]
    found += [("tokens, JSON", json.dumps(tokens).encode()), ("tokens, JSON", ",".join(map(str, tokens)).encode())]
    for text in [*(t.encode() for t in texts), raw, *(np.array(tokens, kind).tobytes() for kind in ("i4", "i8"))]:
        digest = hashlib.sha256(text)
        found += [("a hash", digest.hexdigest().encode()), ("a hash", digest.digest())]
    return found


def outside(child: int) -> Iterator[bytes]:
    """Yield what other users, and tools of the same user, see of a running process: title, environment, names, open files."""
    place = Path("/proc", str(child))
    with contextlib.suppress(OSError):  # it may be over at any moment
        for name in ("cmdline", "environ", "comm"):
            yield (place / name).read_bytes()
        for thread in (place / "task").iterdir():
            yield (thread / "comm").read_bytes()
            for grandchild in (thread / "children").read_text().split():
                yield from outside(int(grandchild))
        for link in (place / "fd").iterdir():
            yield os.readlink(link).encode()
