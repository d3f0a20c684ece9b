"""The run behind trainers/flow.py and trainers/reflow.py: teacher, pairs, student, comparison.

1-RF --ODE--> pairs --train--> 2-RF --ODE--> pairs --train at t = 0--> one step
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from flowkit.coupling import Coupling, Mixed, Paired
from flowkit.errors import FlowkitError
from flowkit.noise import derive_seed
from flowkit.pairs import PairStore
from flowkit.samplers.solve import STOCHASTIC, find_solver
from flowkit.trainers.compare import Comparison
from flowkit.trainers.cost import solver_passes
from flowkit.trainers.loop import set_dropout
from flowkit.trainers.pairing import conditioned, generate_pairs, invert_pictures, null_class
from flowkit.trainers.settings import FlowConfig, PairOptions, ReflowConfig
from flowkit.trainers.slimflow_settings import SlimFlowConfig
from flowkit.trainers.stages import Run
from flowkit.velocity import VelocityModel

__all__ = [
    "check_pairs",
    "make_pairs",
    "straighten",
    "teacher_of",
    "train_flow",
    "with_real_pictures",
]

IN_MEMORY = 4 << 30  # bytes of pairs that a process keeps in memory rather than maps


def train_flow(config: FlowConfig) -> None:
    """Train a 1-rectified flow and measure it."""
    run = Run(config, [config.training])
    comparison = Comparison(run)
    flow = run.train("model", run.build(config.net), run.independent(), config.training)
    comparison.finish({"model": flow}, method="flow matching (1-rectified flow)")


def straighten(config: ReflowConfig) -> None:
    """Reflow `config.rounds` times, distil, and compare everything with the teacher."""
    stages = [config.teacher_training, config.student_training, config.distillation]
    run = Run(config, stages)
    comparison = Comparison(run)
    _check(run, config)
    flow = teacher = teacher_of(run, config)
    models = {"teacher": teacher}
    # guided: the first teacher alone; its students have learnt the guidance with the pairs
    unguided = replace(config.pairs, guidance_scale=1.0)
    for k in range(1, config.rounds + 1):
        pairs = make_pairs(run, config.pairs if k == 1 else unguided, flow, f"pairs-{k}")
        coupling = with_real_pictures(run, config.pairs, flow, pairs, name=f"real-pairs-{k}")
        start = flow
        if config.student_net is not None and k == 1:
            start = run.build(config.student_net)
        name = "student" if k == config.rounds else f"student-{k}"
        flow = models["student"] = run.train(name, start, coupling, config.student_training)
    if config.distillation.steps:
        pairs = make_pairs(run, unguided, flow, "pairs-distillation")
        models["distilled"] = run.train("distilled", flow, Paired(pairs), config.distillation)
    if config.control:
        control = replace(
            config.student_training,
            times=config.teacher_training.times,
            loss=config.teacher_training.loss,
        )
        models["control"] = run.train("control", teacher, run.independent(), control)
    comparison.finish(models, method=f"reflow ({config.rounds + 1}-rectified flow)")


def _check(run: Run, config: ReflowConfig) -> None:
    """Refuse what the later stages would refuse, before the first one costs anything."""
    check_pairs(run, config.pairs)
    nets = [config.net] if config.teacher == "train" else []
    built = [run.build(net) for net in (*nets, config.student_net) if net is not None]
    for stage in (config.student_training, config.distillation):
        if built and stage.dropout and stage.steps:
            set_dropout(built[-1].net, stage.dropout)
    if config.pairs.guidance_scale != 1:
        for model in built:
            null_class(model)


def check_pairs(run: Run, pairs: PairOptions) -> None:
    """Refuse options of pairs that this run cannot make, before anything is trained."""
    if pairs.chunk_size > pairs.shard_size:
        raise FlowkitError(
            f"pairs.chunk_size {pairs.chunk_size} is more than a file holds, "
            f"pairs.shard_size {pairs.shard_size}; lower the one or raise the other"
        )
    if pairs.guidance_scale != 1 and run.num_classes is None:
        raise FlowkitError("pairs.guidance_scale needs class labels; set data.conditional=true")
    find_solver(pairs.solver, {})
    if pairs.solver in STOCHASTIC:
        raise FlowkitError(
            f"pairs.solver={pairs.solver} draws noise of its own, so its ends are no pairs; "
            "use a solver of the flow, such as heun, ab2 or dopri5"
        )
    if pairs.real_share == 1:
        raise FlowkitError("pairs.real_share must be below 1: a student needs made pairs too")


def teacher_of(run: Run, config: ReflowConfig | SlimFlowConfig) -> VelocityModel:
    """The model that config.teacher names, or a 1-rectified flow trained for it."""
    if config.teacher == "train":
        net = run.build(config.net)
        return run.train("teacher", net, run.independent(), config.teacher_training)
    teacher = run.load(config.teacher)
    _check_teacher(run, teacher, config.teacher)
    return teacher


@torch.no_grad()
def _check_teacher(run: Run, teacher: VelocityModel, name: str) -> None:
    """Ask the teacher for one velocity: what it was made for must be this run's pictures."""
    device = run.accelerator.device
    labels = None if run.num_classes is None else torch.tensor([run.num_classes - 1])
    wanted = f"pictures {run.shape} with classes {run.num_classes}"
    remedy = "choose other data, or another teacher"
    try:
        noise = torch.zeros(1, *run.shape, device=device)
        v = conditioned(teacher, labels, 1.0, device)(noise, 0.5)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FlowkitError(f"teacher {name} cannot take {wanted} ({reason}); {remedy}") from None
    if v.shape != noise.shape:
        raise FlowkitError(
            f"teacher {name} answers {wanted} with velocities {tuple(v.shape[1:])}; {remedy}"
        )


def make_pairs(run: Run, options: PairOptions, flow: VelocityModel, name: str) -> PairStore:
    """The pairs of `flow` in run.folder/name, made or completed."""
    with run.timed(name):
        pairs = generate_pairs(
            flow,
            run.folder / name,
            options,
            shape=run.shape,
            num_classes=run.num_classes,
            seed=derive_seed(run.options.seed, name),
            source={**run.identity(flow), **asdict(options)},
            accelerator=run.accelerator,
            name=name,
        )
    run.record_cost(name, {"forward": {"flow": solver_passes(options, options.num_pairs)}})
    if run.options.data_on_device:
        return pairs.preload(run.accelerator.device)
    return pairs.preload() if pairs.nbytes < IN_MEMORY else pairs


def with_real_pictures(
    run: Run, options: PairOptions, flow: VelocityModel, pairs: PairStore, *, name: str
) -> Coupling:
    """The coupling of the pairs, and of options.real_share inverted real pictures."""
    flip = run.options.data.flip
    if not options.real_share:
        return Paired(pairs, flip=flip)
    with run.timed(name):
        real = invert_pictures(
            flow,
            run.data,
            run.folder / name,
            options,
            num_classes=run.num_classes,
            seed=derive_seed(run.options.seed, name),
            source={**run.identity(flow), **asdict(options)},
            accelerator=run.accelerator,
            name=name,
        )
    passes = solver_passes(options, len(run.data), invert=True)
    run.record_cost(name, {"forward": {"flow": passes}})
    return Mixed(Paired(pairs, flip=flip), Paired(real, flip=flip), options.real_share)
