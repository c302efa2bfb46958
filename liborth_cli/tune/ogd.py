"""`--method ogd`: after every step the realised W − W_base is put back into the complement of the general subspace.

Projecting the gradient alone would not do: Adam rescales every element, and weight decay and rounding add parts of their
own. The gradient is projected too, so that the optimiser's moments do not fill with what is taken away again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from liborth_cli.curvature.factors import FactorSet
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.stream.texts import Row
from liborth_cli.tune.data import IGNORED, Batch
from liborth_cli.tune.hold import PUBLIC, Hold
from liborth_cli.tune.method import Lesson, Method
from liborth_cli.tune.network import Network
from liborth_cli.tune.projector import Projector, Subspace, leading
from liborth_cli.tune.route import Example


@dataclass(frozen=True)
class Protected:
    """One matrix and its projector.

    Attributes:
        name: of the layer in the factor set.
        tensor: the stored tensor.
        matrix: which matrix of a stored stack, or None.
        transposed: whether the file holds it as (d_in, d_out).
        projector: what is protected.
    """

    name: str
    tensor: str
    matrix: int | None
    transposed: bool
    projector: Projector

    def view(self, stored: torch.Tensor) -> torch.Tensor:
        """Return this matrix of a stored tensor, as (d_out, d_in); writing to it writes to the tensor."""
        one = stored if self.matrix is None else stored[self.matrix]
        return one.T if self.transposed else one


def protect(factors: FactorSet, network: Network, mass: float, form: str) -> tuple[list[Protected], list[str]]:
    """Choose what is protected in every matrix that has factors.

    Args:
        factors: from public text, at the base.
        network: the base.
        mass: share of the trace of A (and of G) to protect.
        form: "kronecker" or "input".

    Returns:
        The matrices, and the stored tensors that have no factors and stay as they are.

    Raises:
        PairMismatch: when the factors are of another model.
        UsageError: when a matrix has no free direction left, or nothing has factors; names it.
    """
    factors.check_belongs(network.checkpoint)
    found = []
    uses: dict[str, int] = {}
    for record in factors.manifest["layers"].values():
        key = f"{record['tensor']}/{record['matrix']}"
        uses[key] = uses.get(key, 0) + 1
    for name in factors.names:
        record = factors.manifest["layers"][name]
        # A tied matrix serves two uses, and what is orthogonal for one is not for the other: it is frozen.
        if record["tensor"] not in network.stored or uses[f"{record['tensor']}/{record['matrix']}"] > 1:
            continue
        layer = factors.layer(name)
        if not (bool(layer.input_covariance.isfinite().all()) and bool(layer.gradient_covariance.isfinite().all())):
            raise BadInput(f"{factors.path}: the factors of {name!r} are not finite")
        basis = layer.basis
        inputs = leading(basis.input_values, basis.input_vectors, mass)
        outputs = leading(basis.gradient_values, basis.gradient_vectors, mass) if form == "kronecker" else None
        projector = Projector(_float(inputs), _float(outputs) if outputs else None)
        if projector.free == 0:
            raise UsageError(f"--protect {mass:g} leaves no free direction in {name!r}; protect less")
        found.append(Protected(name, record["tensor"], record["matrix"], record["transposed"], projector))
    if not found:
        raise UsageError(f"{factors.path}: has no factors of any matrix that can be trained")
    covered = {p.tensor for p in found}
    return found, [name for name in network.checkpoint.tensors if name not in covered]


class Ogd(Method):
    """Trains the matrices that have factors; everything else is frozen.

    Attributes:
        layers: what is protected.
        frozen: stored tensors that are not trained.
        held: what is held beside the projection, or None.
    """

    name = "ogd"

    def __init__(self, network: Network, layers: Sequence[Protected], frozen: Sequence[str]) -> None:
        """Remember the base.

        Raises:
            UsageError: when a parameter would be trained in part only.
        """
        self.layers, self.frozen = list(layers), list(frozen)
        inside = {network.stored[layer.tensor].parameter for layer in layers}
        mixed = [name for name in self.frozen if name in network.stored and network.stored[name].parameter in inside]
        if mixed:
            raise UsageError(f"{mixed[0]!r} has no factors, and other parts of the same parameter have; measure all of them")
        self._names = [name for name in network.trainable() if name in inside]
        self._base = {name: network.parameters[name].detach().clone() for name in self._names}
        self.held: Hold | None = None
        super().__init__(network)

    def hold(self, rows: Sequence[Example], weight: float, seed: int) -> None:
        """Hold what the base says about public text, too."""
        self.held = Hold(self.network, self._base, rows, weight, seed)

    def lessons(self, rows: Sequence[Example], number: int) -> list[Lesson]:
        """Read public rows beside the batch where they are held."""
        found = super().lessons(rows, number)
        return found if self.held is None else [*found, self.held.lesson(len(rows), number, self.parameters())]

    def loss(self, batch: Batch, lesson: Lesson | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run the model; on public rows, beside the base."""
        if self.held is not None and lesson is not None and lesson.name == PUBLIC:
            return self.held.loss(batch), {}
        return super().loss(batch, lesson)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters whose matrices have factors."""
        return {name: self.network.parameters[name] for name in self._names}

    @torch.no_grad()
    def before_step(self) -> None:
        """Project the gradients."""
        gradients = {name: p.grad for name, p in self.parameters().items()}
        for layer, view in self._views({name: grad for name, grad in gradients.items() if grad is not None}):
            view.sub_(layer.projector.inside(view))

    @torch.no_grad()
    def after_step(self) -> None:
        """Project what the weights have moved by."""
        updates = {name: p.data - self._base[name] for name, p in self.parameters().items()}
        for layer, view in self._views(updates):
            view.sub_(layer.projector.inside(view))
        for name, update in updates.items():
            torch.add(self._base[name], update, out=self.network.parameters[name].data)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the largest ‖P_G U P_A‖ / ‖U‖ of any matrix."""
        updates = {name: p.data.double() - self._base[name].double() for name, p in self.parameters().items()}
        return {"orthogonality": max(layer.projector.leak(view) for layer, view in self._views(updates))}

    def leaks(self, updates: dict[str, torch.Tensor]) -> dict[str, float]:
        """Measure updates that were read back from a file.

        Args:
            updates: stored name → W − W_base in the stored shape, float64.

        Returns:
            Layer → ‖P_G U P_A‖ / ‖U‖.
        """
        return {p.name: p.projector.leak(p.view(updates[p.tensor])) for p in self.layers if p.tensor in updates}

    def facts(self) -> dict[str, Any]:
        """Say what is protected in every matrix."""
        protected = {
            p.name: {
                "inputs": p.projector.inputs.rank,
                "outputs": p.projector.outputs.rank if p.projector.outputs else None,
                "share": p.projector.protected,
            }
            for p in self.layers
        }
        held = {"weight": self.held.weight, "rows": len(self.held.rows)} if self.held else None
        return {"protected": protected, "frozen": self.frozen, "held": held}

    def _views(self, whole: dict[str, torch.Tensor]) -> Iterator[tuple[Protected, torch.Tensor]]:
        for layer in self.layers:
            place = self.network.stored[layer.tensor]
            if place.parameter in whole:
                yield layer, layer.view(place.of(whole[place.parameter]))


class ExactOgd(Method):
    """The original: K gradients of what the model says about public text are stored and kept orthogonal to the update.

    Farajtabar et al. 2019, arXiv 1910.07104, with the gradient of the true token's logit (OGD-GTL), summed over a row.

    Attributes:
        directions: orthonormal, name → (K, *shape).
    """

    name = "ogd"

    def __init__(self, network: Network, rows: Sequence[Row], count: int) -> None:
        """Take the gradients at the base, and orthonormalise them.

        Args:
            network: the base.
            rows: public text; the first `count` are used.
            count: K.

        Raises:
            UsageError: when there are fewer rows, or no free direction would be left.
        """
        super().__init__(network)
        parameters = self.parameters()
        if len(rows) < count:
            raise UsageError(f"--exact {count}: --retain-data has {len(rows)} rows, one for each direction is needed")
        if count >= sum(p.numel() for p in parameters.values()):
            raise UsageError(f"--exact {count} leaves no free direction")
        device = next(iter(parameters.values())).device
        found = []
        for row in rows[:count]:
            batch = Batch.of([row], device)
            logits = network.model(input_ids=batch.ids, use_cache=False).logits.float()
            true = logits.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
            said = (true * (batch.labels != IGNORED)).sum()
            found.append([g.flatten().double() for g in torch.autograd.grad(said, list(parameters.values()))])
        flat = torch.stack([torch.cat(gradient) for gradient in found])
        basis, triangle = torch.linalg.qr(flat.T)
        good = triangle.diagonal().abs() > 1e-10 * triangle.diagonal().abs().max()
        parts = basis[:, good].T.split([p.numel() for p in parameters.values()], dim=1)
        self._base = {name: p.detach().clone() for name, p in parameters.items()}
        self.directions = {
            name: part.reshape(-1, *p.shape).to(torch.float32)
            for (name, p), part in zip(parameters.items(), parts, strict=True)
        }

    @torch.no_grad()
    def before_step(self) -> None:
        """Project the gradient."""
        gradients = {name: p.grad for name, p in self.parameters().items() if p.grad is not None}
        self._project(gradients)

    @torch.no_grad()
    def after_step(self) -> None:
        """Project what the weights have moved by."""
        updates = {name: p.data - self._base[name] for name, p in self.parameters().items()}
        self._project(updates)
        for name, update in updates.items():
            torch.add(self._base[name], update, out=self.network.parameters[name].data)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return ‖Vᵀu‖ / ‖u‖ of the whole update u."""
        return {"orthogonality": self.leak({n: p.data.double() - self._base[n].double() for n, p in self.parameters().items()})}

    def leak(self, updates: dict[str, torch.Tensor]) -> float:
        """Return ‖Vᵀu‖ / ‖u‖ of an update by parameter name, float64."""
        norm = sum(float(u.square().sum()) for u in updates.values()) ** 0.5
        return float(self._coefficients(updates).norm()) / norm if norm else 0.0

    def facts(self) -> dict[str, Any]:
        """Say how many directions are kept."""
        return {"directions": len(next(iter(self.directions.values())))}

    def _coefficients(self, updates: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [self.directions[n].flatten(1).double() @ u.flatten().double() for n, u in updates.items()]
        return torch.stack(parts).sum(0)

    def _project(self, updates: dict[str, torch.Tensor]) -> None:
        coefficients = self._coefficients(updates)
        for name, update in updates.items():
            update.sub_(torch.tensordot(coefficients.to(update), self.directions[name], 1))


def _float(space: Subspace) -> Subspace:
    return space if space.vectors is None else Subspace(space.size, space.vectors.float())
