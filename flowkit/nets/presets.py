"""Published architectures by name, as plain data: {"class": name, **constructor arguments}.

The comment behind each is the published parameter count; the test compares it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]

_NCSNPP = {"embedding": "fourier", "encoder": "residual", "resample_filter": [1, 3, 3, 1]}


def _dit(hidden_size: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    """Latent 256 x 256 ImageNet: 32 x 32 x 4 latents, patch 2, with the variance head."""
    return {
        "class": "DiT",
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_classes": 1000,
    }


def _ddt(hidden_size: int, encoder: int, decoder: int, num_heads: int) -> dict[str, Any]:
    """The same latents and patches."""
    return {
        "class": "DDT",
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": hidden_size,
        "num_encoder_layers": encoder,
        "num_decoder_layers": decoder,
        "num_heads": num_heads,
        "num_classes": 1000,
    }


def _ddpmpp(
    size: int, mult: list[int], *, model_channels: int = 128, num_blocks: int = 4
) -> dict[str, Any]:
    return {
        "class": "NCSNpp",
        "sample_size": size,
        "model_channels": model_channels,
        "channel_mult": mult,
        "num_blocks": num_blocks,
        "attention_resolutions": [16],
    }


def _adm(width: int, mult: list[int], num_blocks: int, attention: list[int]) -> dict[str, Any]:
    return {
        "class": "ADM",
        "sample_size": 64,
        "model_channels": width,
        "channel_mult": mult,
        "num_blocks": num_blocks,
        "attention_resolutions": attention,
        "num_classes": 1000,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Peebles & Xie, 2022, arXiv:2212.09748; Ma et al., 2024, arXiv:2401.08740
    "dit-s2": _dit(384, 12, 6),  # 33 M
    "dit-b2": _dit(768, 12, 12),  # 130 M
    "dit-l2": _dit(1024, 24, 16),  # 458 M
    "dit-xl2": _dit(1152, 28, 16),  # 675 M
    # Wang et al., 2025, arXiv:2504.05741
    "ddt-b2": _ddt(768, 8, 4, 12),  # 130 M
    "ddt-l2": _ddt(1024, 20, 4, 16),  # 458 M
    "ddt-xl2": _ddt(1152, 22, 6, 16),  # 675 M
    # Karras et al., 2022, arXiv:2206.00364; Lee et al., 2024, arXiv:2405.20320
    "ddpmpp-cifar10": _ddpmpp(32, [2, 2, 2]),  # 55.7 M
    "ncsnpp-cifar10": _ddpmpp(32, [2, 2, 2]) | _NCSNPP,
    "ddpmpp-64": _ddpmpp(64, [1, 2, 2, 2]),  # 61.8 M: FFHQ and AFHQv2
    "ncsnpp-64": _ddpmpp(64, [1, 2, 2, 2]) | _NCSNPP,
    "adm-imagenet64": _adm(192, [1, 2, 3, 4], 3, [32, 16, 8]),  # 296 M
    # Song et al., 2021, arXiv:2011.13456; Liu et al., 2022, arXiv:2209.03003
    "rectified-flow-cifar10": _ddpmpp(32, [1, 2, 2, 2]),  # 61.8 M
    # Zhu et al., 2024, arXiv:2407.12718 (SlimFlow)
    "slimflow-27.9m": _ddpmpp(32, [1, 2, 2], num_blocks=2),
    "slimflow-15.7m": _ddpmpp(32, [1, 2, 2], model_channels=96, num_blocks=2),
    "slimflow-7.0m": _ddpmpp(32, [1, 2, 2], model_channels=64, num_blocks=2),
    "slimflow-3.4m": _ddpmpp(32, [1, 1, 2], model_channels=64, num_blocks=1),
    "slimflow-imagenet64-80.7m": _adm(128, [1, 2, 2, 4], 2, [32, 16]),
    "slimflow-imagenet64-44.7m": _adm(128, [1, 2, 2, 2], 2, [32, 16]),
}
