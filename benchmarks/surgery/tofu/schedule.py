"""Run the parts, as many at a time as is said, each a process; one at a time in this one. A part that fails stops no other."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence

from benchmarks.surgery.tofu.plan import Plan
from benchmarks.surgery.tofu.stages import Stage

THREADS = {"cpu": "1"}
"""Threads of a process by device."""
GRACE = 15.0
"""Seconds after the deadline that a part has to end."""
BEGIN = time.time()


def say(line: str) -> None:
    """Print a line with the seconds since the beginning."""
    print(f"[{time.time() - BEGIN:6.1f}] {line}", flush=True)


def run_all(plan: Plan, every: Sequence[Stage], words: Sequence[str], together: int) -> None:
    """Run what is not done yet, as far as the deadline lets it.

    Args:
        plan: of the run.
        every: its parts.
        words: of the command line that runs one part, without its name.
        together: parts that run at a time.
    """
    if together == 1:
        run_here(plan, every)
    else:
        run_apart(plan, every, words, together)


def run_here(plan: Plan, every: Sequence[Stage]) -> None:
    """Run the parts in this process, in their order."""
    for stage in every:
        if is_done(plan, stage.name):
            continue
        missing = [name for name in stage.after if not is_done(plan, name)]
        if missing or time.time() > plan.deadline:
            say(f"{stage.name}: left out, {'needs ' + ', '.join(missing) if missing else 'no time is left'}")
            continue
        say(f"{stage.name} …")
        try:
            run_one(plan, stage)
        except Exception:
            say(f"{stage.name}: failed\n{traceback.format_exc()}")


def run_apart(plan: Plan, every: Sequence[Stage], words: Sequence[str], together: int) -> None:
    """Run the parts as processes, as soon as what they need is done."""
    waiting, running = [stage for stage in every if not is_done(plan, stage.name)], dict[str, subprocess.Popen[str]]()
    environment = {**os.environ, "OMP_NUM_THREADS": THREADS.get(plan.device, "2"), "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    while waiting or running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                say(f"{name}: {'done' if process.returncode == 0 else f'failed with {process.returncode}'}")
                del running[name]
            elif time.time() > plan.deadline + GRACE:
                process.terminate()
                process.wait()
                say(f"{name}: stopped, no time is left; what it found so far stays")
                del running[name]
        late = time.time() > plan.deadline
        for stage in list(waiting):
            ready = all(is_done(plan, name) for name in stage.after)
            hopeless = late or (
                not ready and not any(name in running or _is_waiting(waiting, name) for name in _open(plan, stage))
            )
            if hopeless:
                say(f"{stage.name}: left out, {'no time is left' if late else 'what it needs failed'}")
                waiting.remove(stage)
            elif ready and len(running) < together:
                command = [sys.executable, "-m", "benchmarks.surgery.tofu", *words, "--part", stage.name]
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace"
                )
                threading.Thread(target=_tell, args=(stage.name, process), daemon=True).start()
                running[stage.name] = process
                waiting.remove(stage)
        time.sleep(0.2)


def run_one(plan: Plan, stage: Stage) -> None:
    """Run one part in this process, and note that it is done."""
    stage.run(plan)
    plan.results.mkdir(parents=True, exist_ok=True)
    (plan.results / f"{stage.name}.done").write_text(f"{time.time() - BEGIN:.1f} s\n", encoding="utf-8")


def is_done(plan: Plan, name: str) -> bool:
    """Tell whether a part has ended well, now or in an earlier run."""
    return (plan.results / f"{name}.done").exists()


def _open(plan: Plan, stage: Stage) -> list[str]:
    return [name for name in stage.after if not is_done(plan, name)]


def _is_waiting(waiting: Sequence[Stage], name: str) -> bool:
    return any(stage.name == name for stage in waiting)


def _tell(name: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            say(f"{name}: {line.rstrip()[:400]}")
