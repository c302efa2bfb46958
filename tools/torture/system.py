"""The same from outside: processes of their own under strace, which sees every system call and can kill at any.

Faults in a fork come at calls that Python counts. `census` holds those against what the kernel was asked: a change of the disk
that nobody counted would be one that no other trial disturbs. `kill` ends whole processes, started as a user starts them.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.torture.field import Field, Missed
from tools.torture.inject import GLANCE, Ended, Fault, run
from tools.torture.jobs import fresh

ROOT = Path(__file__).resolve().parents[2]
CHANGES = (
    "mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "write", "pwrite64", "ftruncate",
    "fallocate", "copy_file_range", "chmod", "fchmod",
)  # fmt: skip
OTHERS = (
    "creat", "writev", "pwritev", "pwritev2", "truncate", "sendfile", "splice", "link", "linkat", "symlink", "symlinkat",
    "fchmodat", "mknod", "mknodat", "fchown", "chown", "lchown", "fchownat", "setxattr", "fsetxattr",
)  # fmt: skip
"""Ways to change a disk that liborth does not use: none may be seen."""
COUNTED = {
    "mkdirat": "mkdir", "renameat": "rename", "renameat2": "exchange", "unlinkat": "unlink", "pwrite64": "pwrite",
    "fallocate": "posix_fallocate",
}  # fmt: skip
"""System call → the name under which Python's call is counted, where they differ."""
LINE = re.compile(r"(\d+) +(\w+)\((.*)")


def trace(words: Sequence[object], file: Path, calls: Sequence[str], *more: str) -> Ended:
    """Run `liborth WORDS` as a process of its own under strace.

    Args:
        words: its arguments.
        file: where strace writes what it saw.
        calls: system calls that are looked at.
        more: further options of strace. (Its --seccomp-bpf is quicker, and leaves injected signals out.)
    """
    traced = ["-e", f"trace={','.join(calls)}", "-e", "signal=none"]
    line = ["strace", "-f", "-y", "-qqq", "-s", "0", *traced, "-o", file, *more]
    return process(words, file.parent, before=line)


def process(
    words: Sequence[object], cwd: Path, look: Callable[[int], None] | None = None, before: Sequence[object] = ()
) -> Ended:
    """Run `liborth WORDS` as a process of its own.

    Args:
        words: its arguments.
        cwd: where it runs.
        look: called with its process id every few milliseconds.
        before: a command that starts it.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    line = [*map(str, before), sys.executable, "-m", "liborth_cli", *map(str, words)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, cwd=cwd)
        while look and child.poll() is None:
            look(child.pid)
            time.sleep(GLANCE)
        code = child.wait()
        out.seek(0), err.seek(0)
        return Ended(code, err.read(), out.read())


def census(field: Field, place: Path, number: int) -> str | None:
    """Hold the system calls of a job that change the disk against the calls that were counted."""
    if number >= len(field.jobs) or not shutil.which("strace"):
        raise StopIteration
    job = field.jobs[number]
    counted = Counter(run(job.command(fresh(place / "counted", job, field.old)), Fault()).calls)
    out = fresh(place / "traced", job, field.old)
    done = trace(job.command(out), place / "trace", (*CHANGES, *OTHERS, "openat", "open"))
    if done.code:
        return f"{job.name} under strace: exit {done.code} {done.err[-200:]}"
    seen = Counter[str]()
    for line in (place / "trace").read_text(errors="replace").splitlines():
        if (found := LINE.match(line)) and str(out.parent) in found[3]:
            seen[_name(found[2], found[3])] += 1
    del seen[""]
    uncounted = {name: (count, counted[name]) for name, count in seen.items() if count > counted[name]}
    return f"{job.name}: system calls that nobody counted (seen, counted): {uncounted}" if uncounted else None


def _name(call: str, arguments: str) -> str:
    if call in ("open", "openat"):
        return "open" if "O_CREAT" in arguments else ""
    return "rmdir" if "AT_REMOVEDIR" in arguments else COUNTED.get(call, call)


def kill(field: Field, place: Path, number: int) -> str | None:
    """Kill a process of its own at a system call that changes the disk, drawn from those that it makes undisturbed."""
    if not shutil.which("strace"):
        raise StopIteration
    job, draw = field.jobs[number % len(field.jobs)], random.Random(number)
    file = place / f"trace of {job.name}"
    out = fresh(place / "now", job, field.old)
    if not file.exists():
        trace(job.command(out), file, CHANGES)
        out = fresh(place / "now", job, field.old)
    turns, chances = Counter[tuple[str, str]](), list[tuple[str, int]]()
    for line in file.read_text(errors="replace").splitlines():
        if found := LINE.match(line):
            turns[found[1], found[2]] += 1  # strace counts each thread's calls of each kind
            if str(place) in found[3]:
                chances.append((found[2], turns[found[1], found[2]]))
    call, turn = draw.choice(chances)
    done = trace(job.command(out), place / "trace", CHANGES, "-e", f"inject={call}:signal=SIGKILL:when={turn}")
    wrong = field.judge(job, out, done)
    if wrong is None and not done.hit:
        raise Missed
    return wrong and f"{job.name}, killed at {call} number {turn}: {wrong}"
