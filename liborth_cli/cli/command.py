"""What a command is to the command line: its function, examples, and what it keeps after Ctrl-C; and how its help reads.

Nothing heavy is imported here: `--help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand

from liborth_cli.errors import Stopped, closest

ARGUMENTS, WHAT, MUCH, DATA, DOSE = "Arguments", "What", "How much", "Data", "Dose: an amount found by measuring"
OUTPUT, RUN = "Output", "Run"
FIRST, LAST = (ARGUMENTS, WHAT, MUCH, DATA, DOSE), (OUTPUT, RUN)
"""Headings in --help, in this order; a command's own stand between."""
AGAIN = "run the same command with --resume to go on"
UsageProblem: type[Exception] = typer.BadParameter.__mro__[1]
"""What Typer raises of words it cannot read; it exports no name for it, and has had click inside and outside of itself."""
_KINDS = (
    (r"<list\[(\w+)\]>", r"<\1> ..."), (r"<(int|float)( range)?>", "<number>"), ("<str>", "<text>"), ("<(P|p)ath>", "<path>"),
    (r"; 0<=x<=9223372036854775807", ""), (r"default: \((.*?)\)", r"default: \1"),
)  # fmt: skip


class Grouped(TyperCommand):
    """A command whose --help lists its options under their headings, without rich, which takes long to import."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, heading by heading, those of every command last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            usual = ARGUMENTS if parameter.param_type_name == "argument" else RUN if parameter.name == "help" else WHAT
            if record is not None:
                title = getattr(parameter, "rich_help_panel", None) or usual
                groups.setdefault(title, []).append((_readable(record[0]), _readable(_with_default(parameter, record[1]))))
        own = [title for title in groups if title not in FIRST + LAST]
        for title in (*FIRST, *own, *LAST):
            if title in groups:
                with formatter.section(title):
                    formatter.write_dl(groups[title])

    def invoke(self, ctx: Any) -> Any:
        """Carry it out, or print what was given."""
        if ctx.params.get("print_config"):
            from liborth_cli.cli.config import print_config

            return print_config(ctx)
        return super().invoke(ctx)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are typed."""
        if self.epilog:  # not wrapped: these are lines to copy
            formatter.write(f"\nExamples:\n{self.epilog}\n")


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        function: options → one library call → print.
        examples: lines of a shell that people type, most common first; a comment says what the next is for.
        kept: what a run that was stopped may leave to --resume; "" where there is no going on.
        stopped: what is true of one that leaves nothing.
        kind: how its options are found and shown.
        ranks: whether several processes, started by torchrun, can carry it out together.
    """

    function: Callable[..., Any]
    examples: tuple[str, ...]
    kept: str = ""
    stopped: str = "nothing was kept; run it again"
    kind: type[TyperCommand] = Grouped
    ranks: bool = False

    @property
    def name(self) -> str:
        """What is typed after `liborth`."""
        return self.function.__name__

    @property
    def epilog(self) -> str:
        """The examples, a line each."""
        return "\n".join(f"  {line}" for line in self.examples)


def after_stop(error: Stopped, command: Command | None) -> str:
    """Say what is true when a signal has ended a command, and what to do."""
    if command and command.kept and error.kept:
        return f"{command.kept}; {AGAIN}"
    return f"{error.why_not}; run it again" if error.why_not else (command or Command).stopped


def usage_line(error: Any) -> str:
    """Say in one line what is wrong with the words of a command, what was probably meant, and what to type next.

    Args:
        error: a `UsageProblem`.
    """
    context = error.ctx
    text = error.format_message().replace("Value error, ", "").rstrip(".")
    help_of = f"`{context.command_path} -h`" if context else "`liborth -h`"
    chosen = re.fullmatch(r"Invalid value for '(.*?)'.*: '(.*)' is not one of (.*)", text, re.DOTALL)
    command = re.fullmatch(r"No such command '(.*?)'.*", text, re.DOTALL)
    if command:
        return f"there is no command {command[1]!r}; {closest(command[1], context.command.commands)}"
    if chosen:
        known = re.findall("'(.*?)'", chosen[3])
        return f"{chosen[1]} cannot be {chosen[2]!r}; {closest(chosen[2], known)}"
    unknown = str(getattr(error, "option_name", ""))
    if text.startswith("No such option") and context:
        every = [word for parameter in context.command.get_params(context) for word in getattr(parameter, "opts", ())]
        return f"there is no option {unknown}; {closest(unknown, every, f'{help_of} lists them all')}"
    example = (getattr(context.command, "epilog", None) or "").split("\n") if context else []
    typed = next((line.strip() for line in example if line.strip().startswith(context.command_path)), "") if context else ""
    return f"{text[0].lower()}{text[1:]}; {f'for example: {typed}' if typed and 'issing' in text else f'{help_of} shows how'}"


def _with_default(parameter: Any, text: str) -> str:
    """Say of an option that takes a value, and has none by itself, that it has none."""
    if parameter.param_type_name != "option" or parameter.is_flag or parameter.required or "default:" in text:
        return text
    if parameter.is_eager or parameter.name == "help":
        return text
    words, bracket, limits = text.rpartition("  [")
    return f"{words}  [default: none; {limits}" if bracket else f"{text}  [default: none]"


def _readable(text: str) -> str:
    """Replace a type's name by a word."""
    for pattern, word in _KINDS:
        text = re.sub(pattern, word, text)
    return text
