"""What the peers do from pictures to moments, as their own code does it, and the weights for it.

Used by benchmarks/evaluation.py; a peer that is not installed is named, and its loop is None.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BATCH = 16  # pictures to the network at once


def peer(name: str) -> Any:
    """A peer's module, or None when it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        print(f"    left out: {name.partition('.')[0]} is not installed ({error})")
        return None


def cleanfid_loop(
    net: Callable[[Tensor], Tensor], levels: Tensor, mode: str = "clean"
) -> Callable[[], Any] | None:
    """clean-fid's own way from a generator's pictures to mean and covariance."""
    module = peer("cleanfid.fid")
    if module is None:
        return None

    def run() -> tuple[Any, Any]:
        batches = iter(levels.split(BATCH))
        features = module.get_model_features(
            lambda z: next(batches), net, mode=mode, z_dim=1, num_gen=len(levels),
            batch_size=BATCH, device=torch.device("cpu"), verbose=False,
        )  # fmt: skip
        return np.mean(features, axis=0), np.cov(features, rowvar=False)

    return run


def cleanfid_port(weights: Path) -> Callable[[Tensor], Tensor] | None:
    """clean-fid's own copy of the PyTorch port, with these weights in torch hub's folder."""
    module = peer("cleanfid.features")
    if module is None:
        return None
    hub, name = torch.hub.get_dir(), "pt_inception-2015-12-05-6726825d.pth"
    torch.hub.set_dir(str(weights.parent))
    try:
        (weights.parent / "checkpoints").mkdir()
        (weights.parent / "checkpoints" / name).write_bytes(weights.read_bytes())
        return module.build_feature_extractor("legacy_pytorch", torch.device("cpu"), False)
    finally:
        torch.hub.set_dir(hub)


def fidelity_loop(weights: Path, levels: Tensor) -> Callable[[], Any] | None:
    """torch-fidelity's own way from a data set in memory to mean and covariance."""
    utils, metric = peer("torch_fidelity.utils"), peer("torch_fidelity.metric_fid")
    if utils is None:
        return None
    extractor = utils.create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, verbose=False,
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip

    class Levels(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(levels)

        def __getitem__(self, index: int) -> Tensor:
            return levels[index]

    def run() -> tuple[Any, Any]:
        found = utils.get_featuresdict_from_dataset(
            Levels(), extractor, BATCH, cuda=False, save_cpu_ram=True, verbose=False
        )
        statistics_ = metric.fid_features_to_statistics(found["2048"])
        return statistics_["mu"], statistics_["sigma"]

    return run


def random_weights() -> dict[str, Tensor]:
    """The Inception graph's weights at random, under the names of the PyTorch port's file."""
    from flowkit.eval.inception_net import InceptionNet

    torch.manual_seed(0)
    net, state = InceptionNet(), {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
            ones = torch.ones(module.out_channels)
            norms = {"weight": ones, "bias": 0 * ones, "running_mean": 0 * ones}
            norms |= {"running_var": ones, "num_batches_tracked": torch.tensor(0)}
            state[f"{name}.conv.weight"] = module.weight.data
            state |= {f"{name}.bn.{key}": value for key, value in norms.items()}
    return state | {f"fc.{key}": value.data for key, value in net.fc.named_parameters()}
