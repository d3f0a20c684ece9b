"""A model's samples to features, in chunks: the noise of a chunk serves every plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from flowkit.eval.feature_pass import chunk_tensors, refuse_grey
from flowkit.eval.features import Extractor
from flowkit.eval.model_source import ModelSource
from flowkit.eval.sampling_plan import Plan
from flowkit.eval.streaming import Chunks, chunk_ranges, share
from flowkit.files import atomic_file

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["ModelPass"]


@dataclass(frozen=True)
class ModelPass:
    """A model with the ways to sample it and what its pictures are seen by.

    folder: of the run.  Every process of the launch calls the methods; they share the work.
    """

    model: ModelSource
    plans: Sequence[Plan]
    extractor: Extractor
    parts: Collection[str]
    folder: Path
    accelerator: Accelerator

    def check(self) -> dict[str, int]:
        """Make two pictures of each plan, so that what cannot work fails before hours of work.

        Returns the length of each part of a picture's features.
        """
        lengths: dict[str, int] = {}
        for plan in self.plans:
            levels, _ = self.model.make(plan, range(2))
            refuse_grey(tuple(levels.shape[1:]), self.extractor, self.model.options.rules)
            tensors = chunk_tensors(levels, range(2), self.extractor, self.parts)
            lengths = {part: tensors[part].shape[1] for part in self.parts}
        return lengths

    def chunks(self, plan: Plan) -> Chunks:
        """The finished chunks of a plan."""
        return Chunks(self.folder / "chunks" / plan.name, frozenset(self.parts))

    def sample(self, ranges: Sequence[range]) -> None:
        """Compute every chunk that is missing, of every plan."""

        def done(indices: range) -> bool:
            return all(self.chunks(plan).done(indices) for plan in self.plans)

        share(
            ranges, done, self._compute,
            folder=self.folder, accelerator=self.accelerator, title="sampling",
            progress=self.model.options.progress,
        )  # fmt: skip

    def _compute(self, indices: range) -> None:
        for plan in self.plans:
            chunks = self.chunks(plan)
            if chunks.done(indices):
                continue
            levels, info = self.model.make(plan, indices)
            tensors = chunk_tensors(levels, indices, self.extractor, self.parts)
            if self.model.options.save_pictures:
                _save(self.folder / "pictures" / plan.name, levels, indices)
            chunks.write(indices, tensors, info)

    def straightness(self) -> dict[str, float] | None:
        """{"total", "per_dim", "relative"} of the model's paths; None when no samples are asked.

        relative is left out when nothing moves.
        """
        options = self.model.options
        if not options.straightness_samples:
            return None
        name = f"straightness-{options.straightness_steps}"
        chunks = Chunks(self.folder / "chunks" / name, frozenset())
        ranges = chunk_ranges(0, options.straightness_samples, options.chunk_size)

        def compute(indices: range) -> None:
            found = self.model.straightness(indices)
            chunks.write(indices, {"count": torch.tensor([len(indices)])}, found)

        share(
            ranges, chunks.done, compute,
            folder=self.folder, accelerator=self.accelerator, title="straightness",
            progress=options.progress,
        )  # fmt: skip
        infos = [(len(indices), chunks.info(indices)) for indices in ranges]
        return _straightness(infos)


def _straightness(infos: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, float]:
    count = sum(n for n, _ in infos)
    total, moved = (sum(n * info[key] for n, info in infos) / count for key in ("total", "moved"))
    found = {"total": total, "per_dim": total / infos[0][1]["dimensions"]}
    return found | ({"relative": total / moved} if moved else {})


def _save(folder: Path, levels: Tensor, indices: range) -> None:
    """Each picture as a PNG that is named by its index."""
    for index, picture in zip(indices, levels, strict=True):
        with atomic_file(folder / f"{index:08d}.png") as temporary:
            to_pil_image(picture).save(temporary, format="PNG")
