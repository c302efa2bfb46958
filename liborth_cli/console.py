"""What a person sees: progress, tables and notes on stderr, the result on stdout. The only importer of rich."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
JsonObject: TypeAlias = "Mapping[str, Json]"
"""A document that is only written or printed. What is read becomes a record first."""
SCHEMA_VERSION = 1
HALF_A_MINUTE = 30.0
"""Seconds between two lines about long work where nobody sees a bar."""
WIDTH_OF_A_FILE, NARROWEST = 160, 16
"""Columns of a table that goes into a file or a pipe, where COLUMNS is not set; and those that words wrap into at least."""
LONGEST_ERROR = 299
"""Characters of a line that says what went wrong."""


def clean(text: object) -> str:
    """Make any text safe to print: control and format characters are shown as escapes, never obeyed."""
    return "".join(c if unicodedata.category(c)[0] != "C" else c.encode("unicode_escape").decode() for c in str(text))


def size(nbytes: float) -> str:
    """Render a number of bytes in decimal units, as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


class Table(NamedTuple):
    """A table for a person; columns whose name begins with ">" are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


class Progress:
    """Counts bytes of one stage, or whatever else it is told to count.

    Attributes:
        say: a few words beside the count.
        watch: is called whenever the count has moved.
    """

    def __init__(self, unit: str = "", per: int = 1, watch: Callable[[Progress], None] | None = None) -> None:
        """Start the clock.

        Args:
            unit: what is counted; bytes when empty.
            per: how many steps make one of it.
            watch: is called whenever the count has moved.
        """
        self.unit, self.per, self.say, self.watch = unit, per, "", watch
        self.done = self.skipped = 0
        self.start = time.perf_counter()

    def advance(self, nbytes: int) -> None:
        """Note that this many more bytes are done."""
        self.done += nbytes
        if self.watch:
            self.watch(self)

    def skip(self, nbytes: int) -> None:
        """Note bytes that an earlier run had finished."""
        self.skipped += nbytes
        if self.watch:
            self.watch(self)

    def status(self, total: int) -> str:
        """Say how far it is, and how fast."""
        done = self.done + self.skipped
        so_far = f"{done / self.per:,.0f}" if self.unit else size(done)
        speed = f", {self.rate}" if self.done else f" after {duration(self.seconds)}"
        text = f"{so_far} of {self.render(total)}{speed}"
        return f"{text}, {self.say}" if self.say else text

    @property
    def rate(self) -> str:
        """How fast it goes; of what takes longer than a second, how long one takes."""
        seconds = self.seconds
        speed = self.done / self.per / max(seconds, 1e-9)
        if self.unit and 0 < speed < 1:
            return f"{1 / speed:,.1f} s a {_one(self.unit)}"
        return f"{self.render(self.done / max(seconds, 1e-9))}/s"

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.perf_counter() - self.start

    def seconds_left(self, total: int) -> float:
        """Predict how long the rest of `total` steps will take, in seconds."""
        return (total - self.skipped - self.done) * self.seconds / max(self.done, 1)

    def summary(self, stage: str) -> str:
        """Say how it went, in one line."""
        seconds = self.seconds
        before = f", {self.render(self.skipped)} done before" if self.skipped else ""
        return f"{stage}: {self.render(self.done)} in {seconds:.1f} s ({self.rate}){before}"

    def render(self, count: float) -> str:
        """Render a count in its unit."""
        if not self.unit:
            return size(count)
        number = f"{count / self.per:,.0f}"
        return f"{number} {_one(self.unit) if number == '1' else self.unit}"


@dataclass
class Console:
    """Where output goes and how much of it.

    Attributes:
        quiet: only errors.
        verbose: tell more.
        as_json: the result is one JSON document.
    """

    quiet: bool = False
    verbose: bool = False
    as_json: bool = False
    _shown: Progress | None = field(default=None, init=False, repr=False, compare=False)

    def result(self, text: str, document: JsonObject) -> None:
        """Print the result to stdout: `text`, or `document` under --json."""
        if self.as_json:
            text = json.dumps({"schema_version": SCHEMA_VERSION, **document}, indent=1, sort_keys=True)
        print(text, flush=True)

    def note(self, text: str) -> None:
        """Tell something on stderr."""
        if not self.quiet:
            print("\n".join(map(clean, text.split("\n"))), file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """Tell something on stderr that only -v asks for."""
        if self.verbose:
            self.note(text)

    def warn(self, text: str) -> None:
        """Tell something on stderr that must not be missed."""
        self.note(f"warning: {text}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "", out: bool = False) -> None:
        """Print a table as wide as the terminal or COLUMNS; row by row, each cell on a line, where it does not fit.

        Args:
            columns: headings; those that begin with ">" are right-aligned. One with nothing in it is left out.
            rows: cells, as text.
            title: line above.
            out: print to stdout (the table is the result) instead of stderr.
        """
        if self.quiet and not out:
            return
        if title and not rows:
            print(clean(title), file=sys.stdout if out else sys.stderr)
            return
        from rich import box
        from rich.console import Console as Rich
        from rich.table import Table as Rows
        from rich.text import Text

        used = [i for i in range(len(columns)) if any(clean(row[i]) for row in rows)]
        cells = [[Text(clean(row[i])) for i in used] for row in rows]
        names = [Text(columns[i].lstrip(">")) for i in used]
        right = [columns[i].startswith(">") for i in used]

        rich = Rich(file=sys.stdout if out else sys.stderr, highlight=False, color_system=_colours())
        if not (rich.is_terminal or os.environ.get("COLUMNS", "").isdigit()):
            rich.width = WIDTH_OF_A_FILE
        widths = [max(cell.cell_len for cell in column) for column in zip(names, *cells, strict=True)]
        least = [width if whole else min(width, NARROWEST) for width, whole in zip(widths, right, strict=True)]
        fits = sum(least) + 3 * len(least) <= rich.width
        table = Rows(box=box.SIMPLE_HEAD, pad_edge=False, show_header=fits)
        if fits:
            for name, whole in zip(names, right, strict=True):
                table.add_column(name, justify="right" if whole else "left", overflow="fold", no_wrap=whole)
            for row in cells:
                table.add_row(*row)
        else:
            for _ in ("name", "cell"):
                table.add_column(overflow="fold")
            for row in cells:
                for name, cell in zip(names, row, strict=True):
                    if cell:
                        table.add_row(name, cell)
                table.add_section()
        if title:
            rich.print(Text(clean(title)), soft_wrap=True)
        rich.print(table)

    @contextmanager
    def progress(self, stage: str, total: int, unit: str = "", per: int = 1, brief: bool = False) -> Iterator[Progress]:
        """Show a bar with rate and time left on a terminal; elsewhere a line every half minute, and one at the end.

        Work within other work is told of in the line of that.

        Args:
            stage: what is being done.
            total: how many steps there are.
            unit: what is counted; bytes when empty.
            per: how many steps make one of it.
            brief: say nothing at the end of what took less than half a minute.
        """
        if self.quiet:
            yield Progress(unit, per)
        elif self._shown is not None:
            yield from self._within(self._shown, stage, total, Progress(unit, per))
        else:
            self._shown = Progress(unit, per)
            try:
                with self._showing(self._shown, stage, total):
                    yield self._shown
            finally:
                progress, self._shown = self._shown, None
            if not (brief and progress.seconds < HALF_A_MINUTE):
                self.note(progress.summary(stage))

    def _within(self, outer: Progress, stage: str, total: int, inner: Progress) -> Iterator[Progress]:
        before = outer.say

        def tell(progress: Progress) -> None:
            outer.say = f"{stage} {min((progress.done + progress.skipped) / max(total, 1), 1):.0%}"
            if outer.watch:
                outer.watch(outer)

        inner.watch = tell
        try:
            tell(inner)
            yield inner
        finally:
            outer.say = before

    @contextmanager
    def _showing(self, progress: Progress, stage: str, total: int) -> Iterator[None]:
        """Show a count while it moves."""
        if not sys.stderr.isatty():
            with _Lines(self, stage, total, progress):
                yield
        else:
            from rich.console import Console as Rich
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn(stage), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            with Bar(*columns, console=Rich(stderr=True, color_system=_colours()), transient=True) as bar:
                task = bar.add_task("", total=total)

                def show(progress: Progress) -> None:
                    bar.update(task, completed=progress.done + progress.skipped, description=progress.status(total))

                progress.watch = show
                yield


SILENT = Console(quiet=True)


def _colours() -> Literal["auto"] | None:
    """Leave out every escape sequence, bold too, where the user has set NO_COLOR (no-color.org)."""
    return None if os.environ.get("NO_COLOR") else "auto"


class _Lines:
    """Tells of long work in lines, seldom: a thread of its own tells of what does not move, too."""

    def __init__(self, console: Console, stage: str, total: int, progress: Progress) -> None:
        self._console, self._stage, self._total, self._progress = console, stage, total, progress
        self._last, self._lock, self._over = time.perf_counter(), threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        self._progress.watch = lambda _: self._tell()
        threading.Thread(target=self._wait, name="progress", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _wait(self) -> None:
        while not self._over.wait(max(self._last + HALF_A_MINUTE - time.perf_counter(), 1.0)):
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            now = time.perf_counter()
            if now - self._last < HALF_A_MINUTE:
                return
            self._last = now
        progress = self._progress
        left = f", {duration(progress.seconds_left(self._total))} left" if progress.done else ""
        self._console.note(f"{self._stage}: {progress.status(self._total)}{left}")


def _one(unit: str) -> str:
    return {"batches": "batch", "matrices": "matrix"}.get(unit, unit.removesuffix("s"))


def duration(seconds: float) -> str:
    """Render a time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def error_line(text: str) -> None:
    """Print the one line that says what went wrong; the middle of one that is too long is left out."""
    line = f"error: {clean(' '.join(text.split()))}"
    if len(line) > LONGEST_ERROR:
        line = f"{line[: LONGEST_ERROR - 103]} … {line[-100:]}"
    print(line, file=sys.stderr, flush=True)
