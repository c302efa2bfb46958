"""What vouches for the files of an excision: the manifest of the split or training run that wrote them.

Nothing is taken on trust: weights, memory, reference and the files beside them are held against it, and where nothing vouches
for one it is refused, or, where the user goes on all the same, the output says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from liborth_cli import manifest
from liborth_cli.checkpoint import delta, layout, private
from liborth_cli.checkpoint.files import Written
from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput, PairMismatch, UsageError

if TYPE_CHECKING:
    from liborth_cli.ends import Ends

ANYWAY = "--unverified goes on all the same"


class Evidence:
    """The history of a general checkpoint, and what is doubtful about its files.

    Attributes:
        history: the manifest of the split or training run; None when there is no sound one and the user goes on.
        doubts: what nothing vouched for.
        unknown: whether nothing says that the weights are a general checkpoint's; they are then treated as private.
    """

    def __init__(self, general: Checkpoint, unverified: bool) -> None:
        """Read the manifest beside the weights.

        Args:
            general: the weights.
            unverified: go on where nothing vouches for a file.

        Raises:
            BadInput: when there is no sound manifest, or it is of a training run that kept nothing apart.
        """
        self._general, self._unverified = general, unverified
        self.doubts: list[str] = []
        self.unknown = False
        self.history = self._read_history()

    @property
    def _origin(self) -> manifest.Input | None:
        """The fine-tuned checkpoint that was split; None where that is not known."""
        return self.history.inputs.get("finetuned") if isinstance(self.history, manifest.Split) else None

    def check_measured(self, ends: Ends) -> None:
        """Hold factors against the models they must have been measured at.

        Raises:
            PairMismatch: when they were measured elsewhere.
        """
        if self.history is None:
            return
        weights = {file.sha256 for file in self.history.weights.values()}
        for found, known, which in (
            (ends.start, weights, "the general checkpoint"),
            (ends.end, self._origin.hashes if self._origin else None, "the fine-tuned one"),
        ):
            model = found.manifest.inputs.get("model", manifest.Input()).hashes
            if found.point != 1.0 or known is None or not model or not model <= known:
                raise PairMismatch(f"{found.path}: was not measured at {which}; `liborth curvature` of it is, without --at")

    def hold(self, path: Path, why: str) -> None:
        """Refuse for want of evidence, or note it where the user goes on all the same."""
        if not self._unverified:
            raise BadInput(f"{path}: {why}; {ANYWAY}")
        self.doubts.append(f"{path.name}: {why}")

    def check_hashes(self, memory: delta.Memory | None, reference: Checkpoint | None, hashes: Mapping[Path, Written]) -> None:
        """Hold what was read against what the split wrote.

        Args:
            memory: the delta, where it was read.
            reference: W_r, where it was read.
            hashes: of every file of these and of the general checkpoint.

        Raises:
            BadInput: when nothing vouches for a file, or it is damaged.
            PairMismatch: when the memory or the reference is another split's.
        """
        if memory:
            for name, shard in zip(layout.keep(self._general), self._general.shards.values(), strict=True):
                memory.check_belongs(Written(name, hashes[shard.path].size, hashes[shard.path].sha256))
        if self.history is None:
            return
        self._compare(self._general, self.history.weights, hashes)
        if memory:
            self._compare(memory.checkpoint, private.vouched(memory.checkpoint.path, self.history), hashes)
        if reference:
            known = self.history.inputs.get("reference", manifest.Input()).hashes
            for shard in reference.shards.values():
                if hashes[shard.path].sha256 not in known:
                    raise PairMismatch(f"{shard.path}: is not the reference this split was made from")

    def check_restored(self, written: Sequence[Written]) -> None:
        """Hold files at β = 1 whose headers were kept against those that the split read: they are the same, hash for hash.

        Raises:
            BadInput: when one is not.
        """
        known = self._origin.hashes if self._origin else None
        for file in written:
            if known is not None and file.sha256 not in known:
                self.hold(self._general.path, f"{file.name} does not come back as the fine-tuned file that was split")

    def relative(self, alpha: float | None, reference: Checkpoint | None) -> float:
        """Return α divided by the α of the split.

        Raises:
            UsageError: when the split had another α, and what it takes to change that is not there.
        """
        if alpha is None:
            return 1.0
        if not isinstance(self.history, manifest.Split):
            raise UsageError(f"--alpha needs the manifest of the split, and {self._general.path} has none")
        made_with = self.history.parameters.alpha
        if alpha != made_with and (self.history.parameters.model_extra or {}).get("requantise"):
            raise UsageError("--alpha: this split rounded fp8 codes under their scales; split again with another --alpha")
        if made_with == 0.0:
            raise UsageError("--alpha: this split was made with --alpha 0, so its skill part is gone")
        if reference is None and alpha != made_with:
            none = self.history.parameters.one_checkpoint
            raise UsageError("--alpha: this split had no reference" if none else "--alpha needs --reference, the one before")
        return alpha / made_with

    def _read_history(self) -> manifest.Split | manifest.Tune | None:
        folder = self._general.path if self._general.path.is_dir() else self._general.path.parent
        try:
            found = manifest.read(folder, manifest.Split, manifest.Tune)
        except BadInput as error:
            if not self._unverified:
                raise BadInput(f"{error}; {ANYWAY}") from None
            self.doubts.append("no sound manifest of a split or training run says what these files should be")
            self.unknown = True
            return None
        if isinstance(found, manifest.Tune) and not found.memory:
            method = found.parameters.method
            self.hold(folder, f"`liborth tune --method {method}` kept nothing apart: this is the fine-tuned checkpoint")
            self.unknown = True
        return found

    def _compare(self, side: Checkpoint, known: Mapping[str, manifest.File], hashes: Mapping[Path, Written]) -> None:
        if not known:
            self.hold(side.path, f"nothing vouches for it: {private.FILE} is not beside it")
            return
        for name in sorted(name for name in known if name.endswith(".safetensors") and name not in side.shards):
            self.hold(side.path / name, "is missing; the manifest lists it")
        for name, shard in side.shards.items():
            if name not in known or known[name].sha256 != hashes[shard.path].sha256:
                self.hold(shard.path, "damaged, or of another split: its hash is not in the manifest")
