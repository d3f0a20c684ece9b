"""The run behind trainers/flow.py and trainers/reflow.py: teacher, pairs, student, comparison.

1-RF --ODE--> pairs --train--> 2-RF --ODE--> pairs --train at t = 0--> one step
"""

from __future__ import annotations

from dataclasses import asdict, replace

from flowkit.coupling import Coupling, Mixed, Paired
from flowkit.errors import FlowkitError
from flowkit.noise import derive_seed
from flowkit.pairs import PairStore
from flowkit.samplers.solve import STOCHASTIC, find_solver
from flowkit.trainers.compare import Comparison
from flowkit.trainers.loop import set_dropout
from flowkit.trainers.pairing import generate_pairs, invert_pictures, null_class
from flowkit.trainers.settings import FlowConfig, ReflowConfig
from flowkit.trainers.stages import Run
from flowkit.velocity import VelocityModel

__all__ = ["straighten", "train_flow"]

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
    flow = teacher = _teacher(run, config)
    models = {"teacher": teacher}
    for k in range(1, config.rounds + 1):
        pairs = _pairs(run, config, flow, f"pairs-{k}", guided=k == 1)
        coupling = _with_real_pictures(run, config, flow, pairs, f"real-pairs-{k}")
        start = flow
        if config.student_net is not None and k == 1:
            start = run.build(config.student_net)
        name = "student" if k == config.rounds else f"student-{k}"
        flow = models["student"] = run.train(name, start, coupling, config.student_training)
    if config.distillation.steps:
        pairs = _pairs(run, config, flow, "pairs-distillation", guided=False)
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
    pairs = config.pairs
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
    nets = [config.net] if config.teacher == "train" else []
    built = [run.build(net) for net in (*nets, config.student_net) if net is not None]
    if pairs.real_share == 1:
        raise FlowkitError("pairs.real_share must be below 1: a student needs made pairs too")
    for stage in (config.student_training, config.distillation):
        if built and stage.dropout and stage.steps:
            set_dropout(built[-1].net, stage.dropout)
    if pairs.guidance_scale != 1:
        for model in built:
            null_class(model)


def _teacher(run: Run, config: ReflowConfig) -> VelocityModel:
    if config.teacher != "train":
        return run.load(config.teacher)
    return run.train("teacher", run.build(config.net), run.independent(), config.teacher_training)


def _pairs(
    run: Run, config: ReflowConfig, flow: VelocityModel, name: str, *, guided: bool
) -> PairStore:
    """The pairs of `flow`, made or completed.

    guided: only the first teacher's are; its students have learnt the guidance with the pairs.
    """
    options = config.pairs if guided else replace(config.pairs, guidance_scale=1.0)
    with run.timed(name):
        pairs = generate_pairs(
            flow,
            run.folder / name,
            options,
            shape=run.shape,
            num_classes=run.num_classes,
            seed=derive_seed(config.seed, name),
            source={**run.identity(flow), **asdict(options)},
            accelerator=run.accelerator,
            name=name,
        )
    return pairs.preload() if pairs.nbytes < IN_MEMORY else pairs


def _with_real_pictures(
    run: Run, config: ReflowConfig, flow: VelocityModel, pairs: PairStore, name: str
) -> Coupling:
    """The coupling of the pairs, and of config.pairs.real_share inverted real pictures."""
    flip = config.data.flip
    if not config.pairs.real_share:
        return Paired(pairs, flip=flip)
    with run.timed(name):
        real = invert_pictures(
            flow,
            run.data,
            run.folder / name,
            config.pairs,
            num_classes=run.num_classes,
            seed=derive_seed(config.seed, name),
            source={**run.identity(flow), **asdict(config.pairs)},
            accelerator=run.accelerator,
            name=name,
        )
    return Mixed(Paired(pairs, flip=flip), Paired(real, flip=flip), config.pairs.real_share)
