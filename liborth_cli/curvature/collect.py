"""Turn what goes through the matrices into running sums: A, G, and what goes with them.

Every token is a sample (the "expand" form of arXiv 2311.00636): Σ a aᵀ and Σ g gᵀ over all positions of all rows, with g
the gradient of the summed loss.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from liborth_kernels.covariance import add_covariance
from liborth_kernels.moments import add_second_moments

from liborth_cli.curvature.factors import (
    DIAGONAL,
    GRADIENT_COVARIANCE,
    GRADIENT_MOMENT,
    INPUT_COVARIANCE,
    INPUT_MOMENT,
    SECOND_MOMENTS,
    TOKEN_GRADIENTS,
    TOKEN_INPUTS,
    TOKEN_WEIGHTS,
    Sums,
)
from liborth_cli.curvature.plan import CurvatureOptions
from liborth_cli.curvature.selection import Factored
from liborth_cli.errors import LiborthError
from liborth_cli.stream.batches import Batch
from liborth_cli.stream.tap import Site

ROWS = "rows/"
"""Before the names of tokens that are kept one by one, in the state of a collector."""
Chosen = dict[str, list[tuple[Site, list[Factored]]]]


class _Collector:
    """What both kinds share: which targets a site has, and how often each was used.

    Attributes:
        tokens: layer → how many tokens it saw, weighted; an expert sees those routed to it.
        shared: layer → the layer under whose name their common A is kept.
    """

    def __init__(self, chosen: Chosen, device: torch.device, dtype: torch.dtype) -> None:
        self._targets = {(s.parameter, s.matrix, s.kind): targets for sites in chosen.values() for s, targets in sites}
        self._stages = {t.name: stage for stage, sites in chosen.items() for _, targets in sites for t in targets}
        self._device, self._dtype = device, dtype
        self._sums: Sums = {}
        self._rows: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._owners: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        self.tokens: defaultdict[str, float] = defaultdict(float)
        self.shared: dict[str, str] = {}
        self.weight = 1.0

    def begin(self, batch: Batch) -> None:
        """Note the weight of the tokens that follow."""
        self.weight = batch.weight
        self._owners.clear()

    def state(self) -> Sums:
        """Return all sums so far, and under `ROWS` the tokens; nobody may change them."""
        return {**self._sums, **{ROWS + key: torch.cat(rows) for key, rows in self._rows.items()}}

    def resume(self, state: Sums) -> None:
        """Take up the sums that another collector had."""
        for key, value in state.items():
            if key.startswith(ROWS):
                self._rows[key.removeprefix(ROWS)] = [value.to(self._device)]
            else:
                self._sums[key] = value.to(self._device)

    def _of(self, site: Site) -> list[Factored]:
        return self._targets.get((site.parameter, site.matrix, site.kind), [])

    def _sum(self, key: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        if key not in self._sums:
            self._sums[key] = torch.zeros(tuple(shape), dtype=dtype or self._dtype, device=self._device)
        return self._sums[key]

    def _take(self, stage: str) -> Sums:
        keys, rows = (
            [key for key in some if self._stages[key.partition("/")[2]] == stage] for some in (self._sums, self._rows)
        )
        return {**{key: self._sums.pop(key) for key in keys}, **{key: torch.cat(self._rows.pop(key)) for key in rows}}


class FactorCollector(_Collector):
    """Sums A and G; with `marginal` also Σ‖g‖²·aaᵀ and Σ‖a‖²·ggᵀ; with `diagonal` also Σ g²a²; `per_token` keeps a and g."""

    def __init__(
        self,
        chosen: Chosen,
        device: torch.device,
        options: CurvatureOptions = CurvatureOptions(),  # noqa: B008  frozen
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Watch the chosen matrices.

        Args:
            chosen: stage → sites and targets.
            device: where sums live.
            options: which sums. With `per_token`, of linear layers a and √weight·g of every token are kept in place of A
                and G, which they are a longer way of saying; a goes under the name A goes under. Blocks of heads are
                summed all the same.
            dtype: of the sums.
        """
        super().__init__(chosen, device, dtype)
        self._marginal, self._diagonal = options.moments == "marginal", options.diagonal
        self._per_token = options.per_token
        # Products with bfloat16 weights see inputs and gradients in bfloat16: a weight's own gradient is made of these.
        self._half = options.dtype == "bfloat16" and device.type != "cpu"

    def linear(self, site: Site, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Add this use of a matrix to A, and have its gradient added to G when that is known."""
        targets = self._of(site)
        if not targets or not outputs.requires_grad:
            return
        rows = inputs.detach().reshape(-1, site.d_in)
        weight = self.weight
        owner = self._owner(inputs, targets[0].name)
        if owner == targets[0].name and not (self._per_token and targets[0].kind == "linear"):
            add_covariance(self._sum(INPUT_COVARIANCE + owner, (site.d_in, site.d_in)), self._multiplied(rows), weight)
        for target in targets:
            if self.shared.setdefault(target.name, owner) != owner:
                raise LiborthError(
                    f"{target.name!r} shares its input with different layers in different batches; please report it"
                )
            self.tokens[target.name] += weight * len(rows)
        kept = rows if self._marginal or self._diagonal or self._per_token else None
        outputs.register_hook(lambda g: self._gradient(targets, g.detach(), kept, weight))

    def embedding(self, site: Site, ids: torch.Tensor, outputs: torch.Tensor) -> None:
        """Count the tokens looked up: a is one-hot, so A is the diagonal of their frequencies."""
        for target in self._of(site):
            if not outputs.requires_grad:
                return
            counts = torch.bincount(ids.reshape(-1), minlength=target.d_in).to(torch.float64)
            self._sum(INPUT_COVARIANCE + target.name, (target.d_in,), torch.float64).add_(counts, alpha=self.weight)
            self.shared.setdefault(target.name, target.name)
            self.tokens[target.name] += self.weight * ids.numel()
            outputs.register_hook(
                lambda g, t=target, w=self.weight: self._covariance(GRADIENT_COVARIANCE, t, g.detach().reshape(-1, t.d_out), w)
            )

    def take(self, stage: str) -> Sums:
        """Hand over the sums of one stage and forget them; of square sums only the upper triangle is meant."""
        return self._take(stage)

    def _owner(self, inputs: torch.Tensor, name: str) -> str:
        """Return the first layer of this batch that was given the very same tensor."""
        known = self._owners.get(id(inputs))
        if known is not None and known[0]() is inputs:
            return known[1]
        self._owners[id(inputs)] = (weakref.ref(inputs), name)
        return name

    def _gradient(self, targets: list[Factored], gradient: torch.Tensor, inputs: torch.Tensor | None, weight: float) -> None:
        gradient = gradient.reshape(-1, gradient.shape[-1])
        for target in targets:
            mine = gradient[:, target.outputs] if len(targets) > 1 or target.d_out < gradient.shape[-1] else gradient
            single = self._per_token and target.kind == "linear"
            if not single or target.heads:
                self._covariance(GRADIENT_COVARIANCE, target, self._multiplied(mine), weight)
            if inputs is None or target.kind != "linear":
                continue
            if single:
                # Inputs wait for their gradients: uses of one matrix come back in the opposite order.
                if self.shared[target.name] == target.name:
                    self._keep(TOKEN_INPUTS + target.name, inputs)
                    self._keep(TOKEN_WEIGHTS + target.name, inputs.new_full((len(inputs),), weight))
                exact = mine.float() if mine.dtype == torch.bfloat16 else mine
                self._keep(TOKEN_GRADIENTS + target.name, exact * weight**0.5)
            if self._diagonal:
                total = self._sum(DIAGONAL + target.name, (target.d_out, target.d_in))
                add_second_moments(total, mine, inputs, weight)
            if self._marginal:
                wide = inputs.to(self._dtype)
                self._covariance(GRADIENT_MOMENT, target, mine.to(self._dtype) * wide.norm(dim=-1, keepdim=True), weight)
                total = self._sum(INPUT_MOMENT + target.name, (target.d_in, target.d_in))
                add_covariance(total, wide * mine.to(self._dtype).norm(dim=-1, keepdim=True), weight)

    def _multiplied(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows as a GPU's product with the weight takes them."""
        return (
            rows.bfloat16() if self._half else rows
        )  # which they are already where a module did the product (stream/direct.py)

    def _keep(self, key: str, rows: torch.Tensor) -> None:
        self._rows[key].append(rows.to(torch.float32, copy=True))

    def _covariance(self, kind: str, target: Factored, rows: torch.Tensor, weight: float) -> None:
        shape = target.gradient_shape
        total = self._sum(kind + target.name, shape)
        if len(shape) == 1:
            total.add_(rows.to(self._dtype).square().sum(0), alpha=weight)
        elif len(shape) == 2:
            add_covariance(total, rows, weight)
        else:
            for head, block in enumerate(rows.unflatten(-1, shape[:2]).unbind(-2)):
                add_covariance(total[head], block, weight)


class MomentCollector(_Collector):
    """Sums the exact corrected eigenvalues of EK-FAC: M_ij = Σ (q_G,iᵀ g)²·(q_A,jᵀ a)², in a second pass."""

    def __init__(
        self,
        chosen: Chosen,
        device: torch.device,
        basis: Callable[[str], tuple[torch.Tensor, torch.Tensor]],
        dtype: torch.dtype,
    ) -> None:
        """Watch the chosen matrices.

        Args:
            chosen: stage → sites and targets.
            device: where sums live.
            basis: layer → Q_A (d_in, d_in) and Q_G (d_out, d_out) or one for each head, columns are eigenvectors.
            dtype: of the sums.
        """
        super().__init__(chosen, device, dtype)
        self._basis = basis
        self._held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def linear(self, site: Site, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Rotate inputs and gradients, and add their squares' products."""
        targets = [t for t in self._of(site) if t.kind == "linear"]
        if not targets or not outputs.requires_grad:
            return
        rows, weight = inputs.detach().reshape(-1, site.d_in), self.weight
        outputs.register_hook(lambda g: self._gradient(targets, g.detach(), rows, weight))

    def embedding(self, site: Site, ids: torch.Tensor, outputs: torch.Tensor) -> None:
        """Ignore tables: their eigenbasis is that of G alone."""

    def take(self, stage: str) -> Sums:
        """Hand over the sums of one stage and forget them and their bases."""
        self._held.clear()
        return self._take(stage)

    def _gradient(self, targets: list[Factored], gradient: torch.Tensor, inputs: torch.Tensor, weight: float) -> None:
        gradient = gradient.reshape(-1, gradient.shape[-1]).to(self._dtype)
        for target in targets:
            if target.name not in self._held:
                self._held[target.name] = self._basis(target.name)
            q_a, q_g = self._held[target.name]
            mine = gradient[:, target.outputs]
            if target.heads:
                parts = mine.unflatten(-1, (target.heads, -1))
                mine = torch.einsum("nhi,hij->nhj", parts, q_g).flatten(-2)
            else:
                mine = mine @ q_g
            total = self._sum(SECOND_MOMENTS + target.name, (target.d_out, target.d_in))
            add_second_moments(total, mine, inputs.to(self._dtype) @ q_a, weight)
