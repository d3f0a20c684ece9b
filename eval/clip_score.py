"""CLIP score: how well pictures fit their captions (Hessel et al., 2021, arXiv:2104.08718).

score(picture, caption) = 100 max(cos(E_picture, E_caption), 0)
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flowkit.errors import FlowkitError
from flowkit.eval.encoders import load_clip
from flowkit.eval.features import Extractor
from flowkit.eval.recipes import clip_recipe

__all__ = ["ClipScore", "clip_scores"]


def clip_scores(pictures: Tensor, captions: Tensor) -> Tensor:
    """The score of each pair of embeddings: (B, d) twice -> (B,) in [0, 100], float64.

    Lengths do not matter.  The paper's own scale is 2.5 times the cosine, 1/40 of this.
    FlowkitError: shapes that differ, or values that are not finite.
    """
    if pictures.shape != captions.shape or pictures.ndim != 2:
        raise FlowkitError(
            f"CLIP scores take embeddings (B, d) twice, got {tuple(pictures.shape)} of pictures "
            f"and {tuple(captions.shape)} of captions"
        )
    cosine = F.cosine_similarity(pictures.double(), captions.double(), dim=1)
    if not cosine.isfinite().all():
        raise FlowkitError("the embeddings are not finite; check the pictures and the weights")
    return 100 * cosine.clamp(min=0)


class ClipScore:
    """Scores of pictures and captions by one CLIP model.

    name, weights: as load_clip has them.  extractor: of the pictures' embeddings.  Captions are
    cut after CLIP's 77 tokens.
    """

    def __init__(
        self,
        name: str = "vitl14",
        *,
        weights: str | os.PathLike[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.clip, self.tokenizer, digest = load_clip(name, weights)
        recipe = clip_recipe(self.clip, digest, "pillow")
        self.extractor = Extractor(f"clip-{name}:pillow@{digest[:12]}", recipe, device)
        self.clip.to(device)

    def __call__(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Pictures (B, 1 or 3, H, W), uint8 or in [-1, 1], and B captions -> (B,), see
        clip_scores."""
        if len(captions) != len(pictures):
            raise FlowkitError(f"got {len(pictures)} pictures and {len(captions)} captions")
        return clip_scores(self.extractor(pictures), self.embed(captions))

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> Tensor:
        """Captions' embeddings, of unit length: (B, d)."""
        if not captions:
            return torch.zeros(0, self.clip.config.projection_dim, device=self.extractor.device)
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(self.extractor.device)
        pooled = self.clip.text_model(**tokens).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)
