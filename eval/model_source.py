"""A model as a source of pictures: sample i is the same whoever computes it, whenever.

Its noise, its class and the draws of a stochastic solver depend on (seed, i) alone.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowkit.adapters import from_diffusers
from flowkit.errors import FlowkitError
from flowkit.eval.caches import CachedRun, cached
from flowkit.eval.flow_measures import straightness
from flowkit.eval.model_parts import Parts, model_parts, null_class
from flowkit.eval.own_code import NO_SOURCE, own_sha256
from flowkit.eval.picture_rules import conformed
from flowkit.eval.records import canonical_sha256
from flowkit.eval.sampling_plan import Plan
from flowkit.eval.settings import FidConfig
from flowkit.eval.weights_files import state_sha256
from flowkit.latents import Latents, vae_identity
from flowkit.noise import derive_seed, keyed_noise
from flowkit.pictures import to_uint8
from flowkit.registry import import_named
from flowkit.samplers.evaluations import per_sample
from flowkit.samplers.grids import from_start
from flowkit.samplers.solve import sample
from flowkit.velocity import Velocity, VelocityModel, bind, guided

__all__ = ["ModelSource", "class_labels", "model_identity"]


class ModelSource:
    """The model of a configuration, ready to sample on a device.

    FlowkitError: no such model, or one that does not say what it takes.
    """

    def __init__(self, options: FidConfig, device: torch.device) -> None:
        self.options, self.device, self.name = options, device, str(options.model)
        self.model = _load(self.name, getattr(torch, options.dtype))
        if isinstance(self.model, nn.Module):
            self.model = self.model.to(device).eval().requires_grad_(False)
        self.start = float(getattr(self.model, "t_min", 0.0))
        self.parts: Parts = model_parts(self.name, self.model, options, device)
        guidance = options.guidance
        if guidance.scale != 1 and self.parts.num_classes is None:
            raise FlowkitError(
                f"guidance.scale={guidance.scale} needs a class-conditional model; {self.name} "
                "takes no classes, or say num_classes"
            )
        self._null = null_class(self.model) if guidance.scale != 1 else 0

    @cached_property
    def identity(self) -> dict[str, Any]:
        """As of `model_identity`; of the user's own code, sha256 covers it too."""
        found = model_identity(self.name, self.model)
        if not _is_own(self.name):
            return found
        digest = own_sha256(self.name, self.model)
        if digest is None:
            return found | {"path": self.name + NO_SOURCE}
        return found | {"sha256": canonical_sha256([digest, found["sha256"]])}

    @property
    def reusable(self) -> bool:
        """Whether its identity tells it from another, so that its samples may serve again."""
        return not self.identity["path"].endswith(NO_SOURCE)

    @cached_property
    def decoder_sha256(self) -> str | None:
        """Of the VAE behind the flow and the latents' statistics; None for a flow of pictures."""
        used = inspect.getclosurevars(self.parts.decode).nonlocals.values()
        told = [vae_identity(one) for one in used if isinstance(one, nn.Module)]
        told += [repr(one) for one in used if isinstance(one, Latents)]
        return canonical_sha256(told) if told else None

    def velocity(self, indices: range) -> Velocity:
        """The flow of these samples, their classes fixed, guided as the options say."""
        if self.parts.num_classes is None:
            return self.model
        options, guidance = self.options, self.options.guidance
        labels = class_labels(options.labels, options.seed, indices, self.parts.num_classes)
        labels = labels.to(self.device)
        conditional = bind(self.model, class_labels=labels)
        if guidance.scale == 1:
            return conditional
        nothing = bind(self.model, class_labels=torch.full_like(labels, self._null))
        inside = guidance.interval or (-1.0, 2.0)
        rescale = guidance.rescale
        return guided(conditional, nothing, guidance.scale, interval=inside, rescale=rescale)

    def noise(self, indices: range) -> Tensor:
        """(B, *) on the device."""
        return keyed_noise(self.options.seed, indices, self.parts.shape).to(self.device)

    @torch.no_grad()
    def make(self, plan: Plan, indices: range) -> tuple[Tensor, dict[str, Any]]:
        """uint8 (B, C, H, W) on the CPU, and {"nfe", "network_calls", "seconds", "peak_memory"}.

        seconds: of sampling and decoding.  peak_memory: bytes, on CUDA those allocated meanwhile,
        elsewhere of the whole process so far.  FlowkitError: pixels that are not finite.
        """
        options = dict(plan.options)
        if plan.takes_draws:
            options["draw"] = per_sample(derive_seed(self.options.seed, "draw"), indices)
        noise = (1 - plan.times[0]) * self.noise(indices)
        run = CachedRun(self.velocity(indices), noise, plan.times, plan.solver, options)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = _now(self.device)
        with self._calls() as calls, cached(run, self.options.cache) as made:
            calls.clear()  # a cache may look at the model before it runs
            result = sample(made.velocity, noise, plan.times, plan.solver, **options)
            nfe = made.computed(result.nfe)
            network_calls = made.computed(len(calls)) or nfe
        pictures = self.parts.decode(result.x)
        seconds = _now(self.device) - began
        info: dict[str, Any] = {"nfe": nfe, "network_calls": network_calls}
        info |= {"seconds": seconds, "peak_memory": _peak_memory(self.device)}
        return self._levels(pictures, plan, indices), info

    def straightness(self, indices: range) -> dict[str, Any]:
        """{"total", "moved", "dimensions"} of the paths from these noises: means over them."""
        times = from_start(self.start, self.options.straightness_steps)
        noise = (1 - times[0]) * self.noise(indices)
        found = straightness(self.velocity(indices), noise, times=times)
        moved = found.total / found.relative if found.relative > 0 else 0.0
        return {"total": found.total, "moved": moved, "dimensions": noise[0].numel()}

    def _levels(self, pictures: Tensor, plan: Plan, indices: range) -> Tensor:
        samples = f"samples {indices.start} to {indices.stop - 1} with {plan.name}"
        try:
            levels = to_uint8(pictures).cpu()
        except FlowkitError as error:
            raise FlowkitError(f"{samples}: {error}") from None
        return torch.stack([conformed(row, self.options.rules, samples) for row in levels])

    @contextmanager
    def _calls(self) -> Iterator[list[int]]:
        """A list that grows with every call of the model."""
        calls: list[int] = []
        if not isinstance(self.model, nn.Module):
            yield calls
            return
        hook = self.model.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            yield calls
        finally:
            hook.remove()


def model_identity(path: str, model: Any) -> dict[str, Any]:
    """{"path", "sha256", "parameters"}; a function has neither weights nor their hash."""
    if not isinstance(model, nn.Module):
        return {"path": path, "sha256": None, "parameters": None}
    digest = state_sha256(model)
    if isinstance(model, VelocityModel):  # the same weights under another convention are another
        told = f"{digest} {sorted(model.description().items())}"
        digest = hashlib.sha256(told.encode()).hexdigest()
    count = sum(value.numel() for value in model.state_dict().values())
    return {"path": path, "sha256": digest, "parameters": count}


def class_labels(rule: str, seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """The class of each sample, from its index and the seed alone: (len(indices),) int64.

    rule: "balanced", i mod num_classes, or "random", a uniform draw keyed by (seed, i).
    """
    if rule == "balanced":
        return torch.tensor([i % num_classes for i in indices], dtype=torch.int64)
    key = derive_seed(seed, "labels")
    rows = [np.random.Philox(key=np.array([key, i], dtype=np.uint64)) for i in indices]
    drawn = [np.random.Generator(row).integers(num_classes) for row in rows]
    return torch.from_numpy(np.array(drawn, dtype=np.int64))


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _is_own(name: str) -> bool:
    return ":" in name and not Path(name).exists()


def _load(name: str, dtype: torch.dtype) -> Any:
    """The velocity of module:attribute, or of a folder or hub id."""
    if not _is_own(name):
        return from_diffusers(name, torch_dtype=dtype)
    found = import_named("model", name)
    return found.to(dtype) if isinstance(found, nn.Module) else found
