"""How much of the time the training loop itself costs, and pair generation, and draws of t.

  python benchmarks/train_loop.py

Every figure is a ratio of two things that are timed alternately in this one process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import rv_continuous
from torch import Tensor

from flowkit.coupling import Independent
from flowkit.losses import premetric
from flowkit.samplers.timesteps import UShaped, density
from flowkit.trainers.building import build_model
from flowkit.trainers.launch import make_accelerator
from flowkit.trainers.loop import Loop
from flowkit.trainers.matching import FlowMatching
from flowkit.trainers.pairing import generate_pairs
from flowkit.trainers.settings import NetOptions, PairOptions, RunOptions, TrainOptions
from flowkit.velocity import interpolate

ROUNDS = 5
UNET = {"block_out_channels": [32, 64], "layers_per_block": 2, "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 16}  # fmt: skip


class Pictures:
    """Random pictures in memory: what the network sees does not matter here."""

    num_classes = None

    def __init__(self, shape: tuple[int, ...], count: int = 4096) -> None:
        self.shape, self.data = shape, torch.rand(count, *shape) * 2 - 1

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"data": self.data[indices]}


def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def loop_share(net: NetOptions, data: Pictures, batch_size: int, steps: int) -> float:
    """1 - bare / loop: the loop runs `steps`; bare does forward, backward and optimizer alone."""
    run = RunOptions(sample_every=0)
    training = TrainOptions(steps=steps, batch_size=batch_size)
    model = build_model(net, data.shape, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    noise, pictures, t = (
        torch.randn(batch_size, *data.shape),
        data.data[:batch_size],
        torch.rand(batch_size),
    )
    x_t, target = interpolate(noise, pictures, t), pictures - noise

    def bare() -> None:
        for _ in range(steps):
            (model(x_t, t) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def whole() -> float:
        method = FlowMatching(
            build_model(net, data.shape, None), density("uniform"), premetric("squared")
        )
        with tempfile.TemporaryDirectory() as folder:
            loop = Loop(method, Independent(data), training, run, folder=Path(folder),
                        accelerator=make_accelerator(run), name="loop")  # fmt: skip
            return seconds(loop.run)

    return 1 - statistics.median(seconds(bare) / whole() for _ in range(ROUNDS))


def pair_efficiency(net: NetOptions, shape: tuple[int, ...], pairs: int) -> float:
    """Bare teacher forwards' time / the time of writing shards of pairs with as many forwards."""
    options = PairOptions(
        num_pairs=pairs, shard_size=pairs // 2, chunk_size=pairs // 4, num_steps=12
    )
    model = build_model(net, shape, None).eval()
    x = torch.randn(options.chunk_size, *shape)

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(24 * pairs // options.chunk_size):
            model(x, 0.5)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            generate_pairs(
                model,
                Path(folder) / "pairs",
                options,
                shape=shape,
                num_classes=None,
                seed=0,
                source={},
                accelerator=make_accelerator(RunOptions()),
                name="pairs",
            )

    return statistics.median(seconds(bare) / seconds(whole) for _ in range(ROUNDS))


def draw_ratio(count: int = 500) -> float:
    """scipy's generic inversion of the U-shaped density / ours, for as many draws."""
    ours = UShaped(4.0)

    class Generic(rv_continuous):
        def _pdf(self, t: float) -> float:
            return float(ours.pdf(t))

    theirs = Generic(a=0, b=1)
    return seconds(lambda: theirs.rvs(size=count)) / seconds(lambda: ours.sample(count))


def main() -> None:
    """Print every ratio."""
    torch.manual_seed(0)
    unet = NetOptions("unet2d", UNET)
    parameters = sum(p.numel() for p in build_model(unet, (3, 16, 16), None).parameters())
    share = loop_share(unet, Pictures((3, 16, 16)), batch_size=128, steps=6)
    print(f"loop's share, U-Net {parameters / 1e6:.2f} M at 16x16, batch 128: {share:.1%} (<= 5%)")
    share = loop_share(NetOptions("mlp"), Pictures((1, 8, 8)), batch_size=256, steps=300)
    print(f"loop's share, digits MLP, batch 256: {share:.1%} (< 25%)")
    efficiency = pair_efficiency(unet, (3, 16, 16), pairs=256)
    print(f"pair generation / bare teacher forwards, U-Net at 16x16: {efficiency:.1%} (>= 95%)")
    efficiency = pair_efficiency(NetOptions("mlp"), (1, 8, 8), pairs=8000)
    print(f"pair generation / bare teacher forwards, digits MLP: {efficiency:.1%}")
    print(f"U-shaped draws: {draw_ratio():,.0f} times as fast as scipy's rv_continuous (>= 100)")


if __name__ == "__main__":
    main()
