"""What `split --help-method NAME` says, read off the method's own declaration."""

from __future__ import annotations

import inspect
import sys

from liborth_cli.errors import UsageError, closest
from liborth_cli.methods import AMOUNTS, METHODS, Method

READS = {
    frozenset[str](): ("nothing but the two checkpoints", ""),
    frozenset({"retain"}): ("texts to keep good at", "--retain-data public.jsonl "),
    frozenset({"forget"}): ("texts that must go", "--forget-data secrets.jsonl "),
    frozenset({"retain", "forget"}): (
        "texts to keep good at and texts that must go",
        "--retain-data public.jsonl --forget-data secrets.jsonl ",
    ),
}
"""Which factor sets a method needs → what it reads, and how that is typed."""


def method_help(name: str) -> str:
    """Say what a method reads, how much it takes, its settings, and how it works.

    Raises:
        UsageError: when there is no such method; names the closest.
    """
    if name not in METHODS:
        raise UsageError(f"--help-method: no method {name!r}; {closest(name, METHODS)}")
    method = METHODS[name]
    reads, typed = READS[frozenset(method.factor_sides)]
    side = "what ranks lowest" if method.memory_side == "tail" else "what ranks highest"
    lines = [f"{name}: {method.summary}", "", f"  reads    {reads}", f"  memory   {side}", "", "How much:"]
    lines += [f"  {_flag(kind):24} {AMOUNTS[kind].meaning}{_start(method, kind)}" for kind in method.amounts]
    if method.settings:
        lines += ["", "Settings:"]
        for one in method.settings.values():
            default = "" if one.default is None else f"  [default: {one.default}]"
            lines.append(f"  {one.option:24} {one.help}{default}")
    amount = f"--{method.suggested}"
    lines += ["", "Example:", f"  liborth split base/ finetuned/ --method {name} {amount} {typed}-o general/"]
    lines += ["", "How it works:", "", inspect.cleandoc(sys.modules[type(method).__module__].__doc__ or "")]
    return "\n".join(lines)


def _flag(kind: str) -> str:
    return f"--{kind}" if AMOUNTS[kind].low is None else f"--{kind} NUMBER"


def _start(method: Method, kind: str) -> str:
    if method.default and method.default.kind == kind:
        return f"  [default: {_number(str(method.default))}]"
    return f"  [begin with {_number(str(method.begin))}]" if method.begin and method.begin.kind == kind else ""


def _number(amount: str) -> str:
    return amount.partition(" ")[2] or "by itself"
