"""Which of the matrices that fit are divided, once it is known what there is to divide them by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from liborth_cli.checkpoint.pair import Action, Item, Reason
from liborth_cli.errors import UsageError
from liborth_cli.methods import Amount
from liborth_cli.split.factors import FactorSource
from liborth_cli.split.options import FATES, SKIP, SplitOptions, check_used, last_match

Items = dict[str, Item]


def route(items: Items, options: SplitOptions, factors: FactorSource, alone: bool, left: Iterable[str] = ()) -> None:
    """Change the fates of tensors that `match` would have divided, and of biases.

    Args:
        items: the fate of every tensor by name; changed in place.
        options: the split.
        factors: what the method needs of each matrix.
        alone: whether there is no reference.
        left: names that a --for …=skip has already left out, because they do not fit.

    Raises:
        UsageError: when nothing is left to divide, or an option speaks of nothing.
    """
    if options.policy.vectors == "split":
        _choose_biases(items, factors)
    steps = "edit" in factors.needs  # taken without the tensors that a --for leaves: nothing covers those any more
    if steps:
        _override(items, options, left)
    if factors.needs:
        _leave_what_has_no_factors(items, factors, alone and not options.policy.include)
    if not steps:
        _override(items, options, left)
    _keep_small_matrices_whole(items, options)


def divided(items: Items) -> list[Item]:
    """Return the tensors whose update is decomposed."""
    return [item for item in items.values() if item.action == Action.SPLIT]


def _set(items: Items, item: Item, action: Action, why: str) -> None:
    items[item.tensor.name] = dataclasses.replace(item, action=action, why=why)


def _choose_biases(items: Items, factors: FactorSource) -> None:
    """Turn the biases that have factors into matrices of one column."""
    for item in [item for item in items.values() if item.reason == Reason.VECTOR]:
        if factors.needs and item.reference is not None and factors.covers_bias(item.twin):
            _set(items, item, Action.SPLIT, "bias: its curvature is its matrix's G")
        else:
            _set(items, item, Action.SKILL, f"{item.why}; no factors")


def _leave_what_has_no_factors(items: Items, factors: FactorSource, leave_tables: bool) -> None:
    """Route matrices without the factors the method needs to the skill side, and refuse when that is all of them."""
    for item in [item for item in divided(items) if len(item.tensor.shape) > 1]:
        covered = sum(factors.covers(item.twin, number) for number in range(item.grid[0]))
        if not covered:
            _set(items, item, Action.SKILL, "the factors do not cover it")
        elif leave_tables and factors.is_table(item.twin):
            _set(items, item, Action.SKILL, "a table of tokens: without a reference it takes part when -i names it")
        elif covered < item.grid[0]:
            _set(items, item, item.action, f"{item.why}; {item.grid[0] - covered} of {item.grid[0]} have no factors and stay")
    if not divided(items):
        raise UsageError(
            f"the factor sets have no {' and '.join(factors.needs)} for any matrix that was chosen; see --moments, "
            "--diagonal and --per-token of `liborth curvature`"
        )


def _override(items: Items, options: SplitOptions, left: Iterable[str]) -> None:
    """Carry out the --for that leave tensors, or drop their update."""
    check_used(options.overrides, [*(item.twin for item in divided(items)), *left])
    for item in divided(items):
        found = last_match(options.overrides, item.twin)
        if found and found.amount is None:
            _set(items, item, Action.SKILL if found.what == SKIP else Action.MEMORY, FATES[found.what])


def _keep_small_matrices_whole(items: Items, options: SplitOptions) -> None:
    """Route matrices with no more directions than --rank around the arithmetic, and refuse when that is all of them."""
    every = divided(items)
    ranks = {item.tensor.name: _rank(options.of(item.twin).amount) for item in every}
    small = [item for item in every if min(item.grid[1:]) <= ranks[item.tensor.name]]
    if small and len(small) == len(every):
        raise UsageError(
            f"--rank {max(ranks.values())}: no matrix here has more than {max(min(i.grid[1:]) for i in small)} singular "
            "directions, so everything would be kept; choose a smaller rank"
        )
    whole = Action.SKILL if options.side == "tail" else Action.MEMORY
    for item in small if options.alpha == 1.0 else []:
        _set(items, item, whole, f"{min(item.grid[1:])} singular directions, not more than --rank")


def _rank(amount: Amount) -> int:
    return int(amount.value or 0) if amount.kind == "rank" else 0
