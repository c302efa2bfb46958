"""`--method ogd`: after every step the realised W − W_base is put back into the complement of the general subspace.

Projecting the gradient alone would not do: Adam rescales every element, and weight decay and rounding add parts of their
own. The gradient is projected too, so that the optimiser's moments do not fill with what is taken away again.

Input form (gradient projection memory, Saha et al. 2021, arXiv 2103.09762): U ← U − U P_A. The layer then answers as before
to every input inside the protected input space. Kronecker form: U ← U − P_G U P_A. It gives up only what is protected on
both sides, and leaves more room. P_A and P_G project on the leading eigenvectors of A = E[a aᵀ] and G = E[g gᵀ].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from liborth_cli.curvature.factor_set import FactorSet
from liborth_cli.errors import BadInput, UsageError
from liborth_cli.manifest import Held, Protection, TuneFacts
from liborth_cli.stream.texts import Row
from liborth_cli.tune.data import IGNORED, Example, PaddedBatch, batch_rows
from liborth_cli.tune.full import Full, Lesson, divergence
from liborth_cli.tune.network import Network
from liborth_cli.tune.options import Form

PUBLIC = "public"
"""Name of the divergence from the base, in the curve."""


@dataclass(frozen=True)
class Subspace:
    """A protected subspace of one side of a matrix.

    Attributes:
        size: dimensions of the side, d.
        vectors: orthonormal columns, (d, k); None when the subspace is spanned by coordinates.
        axes: the coordinates, (k,), int64; None when it is spanned by vectors.
    """

    size: int
    vectors: torch.Tensor | None = None
    axes: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Dimensions of the subspace, k."""
        if self.vectors is not None:
            return self.vectors.shape[1]
        return len(self.axes) if self.axes is not None else self.size

    def right(self, u: torch.Tensor) -> torch.Tensor:
        """Return U P, (m, d)."""
        if self.vectors is not None:
            vectors = self.vectors.to(u)
            return (u @ vectors) @ vectors.T
        if self.axes is None:
            return u
        kept = torch.zeros_like(u)
        kept[:, self.axes] = u[:, self.axes]
        return kept

    def left(self, u: torch.Tensor) -> torch.Tensor:
        """Return P U, (d, n)."""
        return self.right(u.T).T


def leading(values: torch.Tensor, vectors: torch.Tensor, mass: float) -> Subspace:
    """Span the fewest eigenvectors that hold a share of the trace.

    Args:
        values: eigenvalues, (d,), any order; or (blocks, d) for a matrix that is block-diagonal.
        vectors: their eigenvectors as columns, (d, d) or (blocks, d, d); empty when they are the coordinates.
        mass: share of the trace, in [0, 1].

    Returns:
        The subspace; 1 gives every direction with an eigenvalue above rounding.
    """
    flat = values.flatten().double().clamp(min=0.0)
    order = torch.argsort(flat, descending=True, stable=True)
    running = flat[order].cumsum(0)
    total = float(running[-1])
    rank = int((running < mass * total * (1 - 1e-12)).sum()) + 1 if mass > 0 and total > 0 else 0
    chosen = order[: min(rank, len(flat))]
    if not vectors.numel():
        return Subspace(len(flat), axes=chosen.sort().values)
    whole = torch.block_diag(*vectors) if vectors.dim() == 3 else vectors
    return Subspace(len(flat), vectors=whole[:, chosen].contiguous())


@dataclass(frozen=True)
class Projector:
    """Protects one matrix, U of shape (d_out, d_in).

    Attributes:
        inputs: P_A.
        outputs: P_G, or None for the input form, where every output is protected.
    """

    inputs: Subspace
    outputs: Subspace | None = None

    @property
    def free(self) -> int:
        """How many of the d_out·d_in directions an update may take."""
        rows = self.outputs.size if self.outputs is not None else 1
        protected = self.outputs.rank if self.outputs is not None else 1
        return rows * self.inputs.size - protected * self.inputs.rank

    @property
    def protected(self) -> float:
        """Share of the directions that is protected."""
        rows, kept = (self.outputs.size, self.outputs.rank) if self.outputs is not None else (1, 1)
        return kept * self.inputs.rank / (rows * self.inputs.size)

    def inside(self, u: torch.Tensor) -> torch.Tensor:
        """Return the protected part P_G U P_A, in the dtype of `u`."""
        part = self.inputs.right(u)
        return part if self.outputs is None else self.outputs.left(part)

    def leak(self, u: torch.Tensor) -> float:
        """Return ‖P_G U P_A‖ / ‖U‖ in float64; 0 for no update."""
        u = u.double()
        norm = float(u.norm())
        return float(self.inside(u).norm()) / norm if norm else 0.0


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


def protect(factors: FactorSet, network: Network, mass: float, form: Form) -> tuple[list[Protected], list[str]]:
    """Choose what is protected in every matrix that has factors.

    Args:
        factors: from public text, at the base.
        network: the base.
        mass: share of the trace of A (and of G) to protect.
        form: which projection.

    Returns:
        The matrices, and the stored tensors that have no factors and stay as they are.

    Raises:
        PairMismatch: when the factors are of another model.
        UsageError: when a matrix has no free direction left, or nothing has factors; names it.
    """
    factors.check_belongs(network.checkpoint)
    found = []
    uses = Counter((record.tensor, record.matrix) for record in factors.layers.values())
    for name in factors.names:
        record = factors.layers[name]
        # A tied matrix serves two uses, and what is orthogonal for one is not for the other: it is frozen.
        if record.tensor not in network.stored or uses[record.tensor, record.matrix] > 1:
            continue
        layer = factors.layer(name)
        if not (bool(layer.input_covariance.isfinite().all()) and bool(layer.gradient_covariance.isfinite().all())):
            raise BadInput(f"{factors.path}: the factors of {name!r} are not finite")
        basis = layer.basis
        inputs = leading(basis.input_values, basis.input_vectors, mass)
        outputs = leading(basis.gradient_values, basis.gradient_vectors, mass) if form is Form.KRONECKER else None
        projector = Projector(_float(inputs), _float(outputs) if outputs else None)
        if projector.free == 0:
            raise UsageError(f"--protect {mass:g} leaves no free direction in {name!r}; protect less")
        found.append(Protected(name, record.tensor, record.matrix, record.transposed, projector))
    if not found:
        raise UsageError(f"{factors.path}: has no factors of any matrix that can be trained")
    covered = {p.tensor for p in found}
    return found, [name for name in network.checkpoint.tensors if name not in covered]


class Orthogonal(Full):
    """Training whose update from the base stays out of a protected subspace."""

    def __init__(self, network: Network, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Remember the base."""
        self.network = network
        self._base = {name: p.detach().clone() for name, p in parameters.items()}
        super().__init__(network.model, parameters)

    def remove(self, updates: Mapping[str, torch.Tensor]) -> None:
        """Take the protected part out of updates (or gradients), by parameter name, in place."""
        raise NotImplementedError

    def leaks(self, updates: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the share of an update, ‖protected part‖ / ‖U‖, of everything that is protected by itself.

        Args:
            updates: parameter name → W − W_base, float64.
        """
        raise NotImplementedError

    @torch.no_grad()
    def before_step(self) -> None:
        """Project the gradients."""
        self.remove({name: p.grad for name, p in self.parameters.items() if p.grad is not None})

    @torch.no_grad()
    def after_step(self) -> None:
        """Project what the weights have moved by."""
        updates = {name: p.data - self._base[name] for name, p in self.parameters.items()}
        self.remove(updates)
        for name, update in updates.items():
            torch.add(self._base[name], update, out=self.parameters[name].data)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the largest leak."""
        updates = {name: p.data.double() - self._base[name].double() for name, p in self.parameters.items()}
        return {"orthogonality": max(self.leaks(updates).values())}


class Ogd(Orthogonal):
    """Trains the matrices that have factors; everything else is frozen.

    Attributes:
        layers: what is protected.
        frozen: stored tensors that are not trained.
    """

    def __init__(self, network: Network, layers: Sequence[Protected], frozen: Sequence[str]) -> None:
        """Choose the parameters.

        Raises:
            UsageError: when a parameter would be trained in part only.
        """
        self.layers, self.frozen = list(layers), list(frozen)
        inside = {network.stored[layer.tensor].parameter for layer in layers}
        mixed = [name for name in self.frozen if name in network.stored and network.stored[name].parameter in inside]
        if mixed:
            raise UsageError(f"{mixed[0]!r} has no factors, and other parts of the same parameter have; measure all of them")
        self._held: Sequence[Example] = ()
        self._weight, self._seed = 0.0, 0
        super().__init__(network, {name: p for name, p in network.trainable().items() if name in inside})

    def hold(self, rows: Sequence[Example], weight: float, seed: int) -> None:
        """Hold what the base says about public text, too (Li and Hoiem 2016, arXiv 1606.09282).

        A projector made at the base protects to first and second order around it. A run goes further than that, and all of
        the small directions it leaves free add up. The divergence of base and model is measured where the model is now.

        Args:
            rows: public text; as many as a batch has are read beside it.
            weight: of KL(base ‖ model), mean over their tokens.
            seed: of the order in which they are read.
        """
        self._held, self._weight, self._seed = rows, weight, seed

    def lessons(self, rows: Sequence[Example], number: int) -> list[Lesson]:
        """Read public rows beside the batch where they are held."""
        found = super().lessons(rows, number)
        if self._held:
            public = batch_rows(self._held, number, len(rows), self._seed + 1)
            found.append(Lesson(PUBLIC, public, self.parameters, own=False, weight=self._weight))
        return found

    def loss(self, batch: PaddedBatch, lesson: Lesson | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Run the model; on public rows, beside the base."""
        if lesson is not None and lesson.name == PUBLIC:
            return self._divergence(batch), {}
        return super().loss(batch, lesson)

    def remove(self, updates: Mapping[str, torch.Tensor]) -> None:
        """Take P_G U P_A out of every matrix."""
        for layer, view in self._views(updates):
            view.sub_(layer.projector.inside(view))

    def leaks(self, updates: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return layer → ‖P_G U P_A‖ / ‖U‖."""
        return {layer.name: layer.projector.leak(view) for layer, view in self._views(updates)}

    def facts(self) -> TuneFacts:
        """Say what is protected in every matrix."""
        protected = {
            p.name: Protection(
                inputs=p.projector.inputs.rank,
                outputs=p.projector.outputs.rank if p.projector.outputs else None,
                share=p.projector.protected,
            )
            for p in self.layers
        }
        held = Held(weight=self._weight, rows=len(self._held)) if self._held else None
        return TuneFacts(protected=protected, frozen=self.frozen, held=held)

    def _divergence(self, batch: PaddedBatch) -> torch.Tensor:
        """Return Σ KL(base ‖ model) over the batch's tokens, in nats."""
        words = {"input_ids": batch.ids, "use_cache": False}
        training = self.model.training
        with torch.no_grad():
            self.model.eval()  # what the base says, without dropout
            base = torch.func.functional_call(self.model, self._base, kwargs=words).logits
            self.model.train(training)
        return divergence(base, self.model(**words).logits, batch)

    def _views(self, whole: Mapping[str, torch.Tensor]) -> Iterator[tuple[Protected, torch.Tensor]]:
        for layer in self.layers:
            place = self.network.stored[layer.tensor]
            if place.parameter in whole:
                yield layer, layer.view(place.of(whole[place.parameter]))


class ExactOgd(Orthogonal):
    """The original: K gradients of what the model says about public text are stored and kept orthogonal to the update.

    Farajtabar et al. 2019, arXiv 1910.07104, with the gradient of the true token's logit (OGD-GTL), summed over a row.

    Attributes:
        directions: orthonormal, name → (K, *shape).
    """

    def __init__(self, network: Network, rows: Sequence[Row], count: int) -> None:
        """Take the gradients of the first `count` rows at the base, and orthonormalise them.

        Raises:
            UsageError: when there are fewer rows, or no free direction would be left.
        """
        super().__init__(network, network.trainable())
        sizes = [p.numel() for p in self.parameters.values()]
        if len(rows) < count:
            raise UsageError(f"--exact {count}: --retain-data has {len(rows)} rows, one for each direction is needed")
        if count >= sum(sizes):
            raise UsageError(f"--exact {count} leaves no free direction")
        found = []
        for row in rows[:count]:
            batch = PaddedBatch.of([row], self.device)
            logits = self.model(input_ids=batch.ids, use_cache=False).logits.float()
            true = logits.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
            said = (true * (batch.labels != IGNORED)).sum()
            gradients = torch.autograd.grad(said, list(self.parameters.values()))
            found.append(torch.cat([g.flatten().double() for g in gradients]))
        basis, triangle = torch.linalg.qr(torch.stack(found).T)
        good = triangle.diagonal().abs() > 1e-10 * triangle.diagonal().abs().max()
        parts = basis[:, good].T.split(sizes, dim=1)
        self.directions = {
            name: part.reshape(-1, *p.shape).to(torch.float32)
            for (name, p), part in zip(self.parameters.items(), parts, strict=True)
        }

    def remove(self, updates: Mapping[str, torch.Tensor]) -> None:
        """Take V Vᵀu out of the whole update u."""
        coefficients = self._coefficients(updates)
        for name, update in updates.items():
            update.sub_(torch.tensordot(coefficients.to(update), self.directions[name], 1))

    def leaks(self, updates: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return ‖Vᵀu‖ / ‖u‖ of the whole update u."""
        norm = sum(float(u.square().sum()) for u in updates.values()) ** 0.5
        return {"all parameters together": float(self._coefficients(updates).norm()) / norm if norm else 0.0}

    def facts(self) -> TuneFacts:
        """Say how many directions are kept."""
        return TuneFacts(directions=len(next(iter(self.directions.values()))))

    def _coefficients(self, updates: Mapping[str, torch.Tensor]) -> torch.Tensor:
        parts = [self.directions[n].flatten(1).double() @ u.flatten().double() for n, u in updates.items()]
        return torch.stack(parts).sum(0)


def _float(space: Subspace) -> Subspace:
    return space if space.vectors is None else Subspace(space.size, space.vectors.float())
