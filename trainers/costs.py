"""What a run costs: the passes through its networks, told by its options, and the memory it takes.

A pass is one sample through a network once: "forward", or "trained", which is forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowkit.samplers import evaluation_times, grids
from flowkit.samplers.solve import find_solver, is_adaptive
from flowkit.trainers.settings import PairOptions, ReflowConfig, TrainOptions
from flowkit.trainers.slimflow_settings import GuidedOptions, SlimFlowConfig

if TYPE_CHECKING:
    from flowkit.trainers.loop import Loop

__all__ = ["memory", "passes"]

Passes = dict[str, dict[str, int]]


def passes(config: ReflowConfig | SlimFlowConfig, num_pictures: int) -> dict[str, Passes | None]:
    """The passes of a run up to its comparison: stage -> network -> kind -> samples.

    A network is "teacher" or "student", by its size.  None: pairs of an adaptive solver, whose
    passes nobody can tell beforehand.  num_pictures: of the data, for pairs.real_share.
    """
    if isinstance(config, SlimFlowConfig):
        smaller, control, own_pairs = True, False, config.own_pairs
    else:
        smaller, control, own_pairs = config.student_net is not None, config.control, config.pairs
    student = "student" if smaller else "teacher"
    found: dict[str, Passes | None] = {}
    if config.teacher == "train":
        found["teacher"] = _training(config.teacher_training, "teacher")
    for k in range(1, config.rounds + 1):
        flow, last = "teacher" if k == 1 else student, k == config.rounds
        branches = 2 if k == 1 and config.pairs.guidance_scale != 1 else 1
        found[f"pairs-{k}"] = _solving(config.pairs, flow, branches * config.pairs.num_pairs)
        if config.pairs.real_share:
            found[f"real-pairs-{k}"] = _solving(config.pairs, flow, num_pictures, invert=True)
        found["student" if last else f"student-{k}"] = _training(config.student_training, student)
    if config.distillation.steps:
        found["pairs-distillation"] = _solving(own_pairs, student, own_pairs.num_pairs)
        found["distilled"] = _training(config.distillation, student)
    if control:
        found["control"] = _training(config.student_training, "teacher")
    return found


def _training(options: TrainOptions, network: str) -> Passes:
    """One pass a sample; guided distillation trains on two, and asks its flow, which is as large,
    for the second of the target's two steps, or for both."""
    samples = options.steps * options.batch_size
    if not isinstance(options, GuidedOptions) or options.two_step == "none":
        return {network: {"trained": samples}}
    asked = 1 if options.two_step == "student" else 2
    return {network: {"trained": 2 * samples, "forward": asked * samples}}


def _solving(
    options: PairOptions, network: str, samples: int, *, invert: bool = False
) -> Passes | None:
    if is_adaptive(find_solver(options.solver, {})):
        return None
    steps = options.real_steps if invert else options.num_steps
    times = grids.edm(steps) if options.grid == "edm" else grids.uniform(steps)
    nfe = len(evaluation_times(options.solver, times[::-1] if invert else times))
    return {network: {"forward": nfe * samples}}


def memory(loop: Loop) -> dict[str, Any]:
    """Bytes on this process's device that a stage took: {"roles": ..., "sum": ..., "peak": ...}.

    roles: each trained network's weights, average, gradients and optimizer, and what else the
    method holds as modules, "frozen".  peak: the most that was allocated since the device's count
    was last reset, so with activations; None where devices do not count.
    """
    roles: dict[str, dict[str, int]] = {}
    for name, learner in loop.learners.items():
        moments = (state.values() for state in learner.optimizer.state_dict()["state"].values())
        roles[name] = {
            "weights": _bytes(learner.network.state_dict().values()),
            "average": _bytes(learner.ema.shadow_params if learner.ema else ()),
            "gradients": _bytes(learner.parameters),
            "optimizer": _bytes(chain.from_iterable(moments)),
        }
    trained = {id(module) for each in loop.learners.values() for module in each.network.modules()}
    others = [held for held in vars(loop.method).values() if isinstance(held, nn.Module)]
    frozen = {id(module): module for other in others for module in other.modules()}
    tensors = {
        id(tensor): tensor
        for key, module in frozen.items()
        if key not in trained
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False))
    }
    roles["frozen"] = {"weights": _bytes(tensors.values())}
    device = loop.accelerator.device
    return {
        "roles": roles,
        "sum": sum(sum(role.values()) for role in roles.values()),
        "peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
