"""The run behind trainers/slimflow.py: teacher, pairs, a small student, its one step, comparison.

teacher --ODE--> pairs --anneal--> small 2-RF --ODE--> pairs --and its two steps--> one step
"""

from __future__ import annotations

from functools import partial

import torch

from flowkit.coupling import Annealed, Batch, Paired
from flowkit.errors import FlowkitError
from flowkit.losses import premetric
from flowkit.samplers.timesteps import density
from flowkit.trainers.annealing import AnnealedReflow, Annealing, beta_at, steady
from flowkit.trainers.compare import Comparison
from flowkit.trainers.guided_distillation import GuidedDistillation
from flowkit.trainers.loop import set_dropout
from flowkit.trainers.pairing import null_class
from flowkit.trainers.settings import TrainOptions
from flowkit.trainers.slimflow_settings import SlimFlowConfig
from flowkit.trainers.stages import Run
from flowkit.trainers.straighten import check_pairs, make_pairs, teacher_of, with_real_pictures
from flowkit.velocity import VelocityModel

__all__ = ["train_slimflow"]


def train_slimflow(config: SlimFlowConfig) -> None:
    """Anneal a small student to the teacher's pairs, distil it, and compare it with the teacher."""
    run = Run(config, [config.teacher_training, config.student_training, config.distillation])
    comparison = Comparison(run)
    _check(run, config)
    teacher = teacher_of(run, config)
    student = _anneal(run, config, teacher)
    models = {"teacher": teacher, "student": student}
    if config.distillation.steps:
        models["distilled"] = _distil(run, config, student)
    comparison.finish(models, method="SlimFlow (annealing reflow, flow-guided distillation)")


def _anneal(run: Run, config: SlimFlowConfig, teacher: VelocityModel) -> VelocityModel:
    """The small 2-rectified flow: from scratch, on the teacher's pairs."""
    options = config.annealing
    pairs = make_pairs(run, config.pairs, teacher, "pairs-1")
    coupling = Annealed(
        with_real_pictures(run, config.pairs, teacher, pairs, name="real-pairs-1"), beta=1.0
    )
    annealing = Annealing(coupling, options.schedule, options.steps, beta=options.beta)
    return run.train(
        "student",
        run.build(config.student_net),
        coupling,
        config.student_training,
        method=partial(AnnealedReflow, annealing=annealing),
    )


def _distil(run: Run, config: SlimFlowConfig, student: VelocityModel) -> VelocityModel:
    """One step of the student, from the student, on its own pairs and its own two steps."""
    options = config.distillation
    pairs = Paired(make_pairs(run, config.own_pairs, student, "pairs-distillation"))
    if options.two_step == "none":
        return run.train("distilled", student, pairs, options)
    guided = partial(
        GuidedDistillation,
        flow=student,
        first=options.two_step,
        weight=options.two_step_weight,
        between=options.two_step_between,
        precision=run.accelerator.autocast,
    )
    return run.train("distilled", student, pairs, options, method=guided)


def _check(run: Run, config: SlimFlowConfig) -> None:
    """Refuse what the later stages would refuse, before the first one costs anything."""
    check_pairs(run, config.pairs)
    check_pairs(run, config.own_pairs)
    if config.own_pairs.guidance_scale != 1 or config.own_pairs.real_share:
        raise FlowkitError(
            "own_pairs are of the student, which has learnt all that is in `pairs`; "
            "leave own_pairs.guidance_scale at 1 and own_pairs.real_share at 0"
        )
    training, annealing = config.student_training, config.annealing
    if not training.steps:
        raise FlowkitError(
            "student_training.steps must be at least 1: the student starts untrained"
        )
    left = beta_at(annealing.schedule, training.steps, annealing.steps)
    if annealing.schedule in ("linear", "cosine") and left:
        raise FlowkitError(
            f"annealing.steps {annealing.steps} are more than student_training.steps "
            f"{training.steps}, so beta would end at {left:.2g}, on noise that is not the pairs'; "
            "anneal sooner, or train longer"
        )
    student = run.build(config.student_net)
    stages = {"student_training": config.student_training, "distillation": config.distillation}
    for name, stage in stages.items():
        if stage.steps and stage.dropout:
            set_dropout(student.net, stage.dropout)
        _check_loss(run, name, stage)
    low, high = config.distillation.two_step_between
    if low > high:
        raise FlowkitError(f"distillation.two_step_between must be (low, high), got {low}, {high}")
    if config.teacher == "train" and config.pairs.guidance_scale != 1:
        null_class(run.build(config.net))


def _check_loss(run: Run, name: str, stage: TrainOptions) -> None:
    """Refuse times that need phases, and a premetric that cannot take what this run makes."""
    steady(density(**stage.times))
    x, t = torch.zeros(1, *run.shape), torch.zeros(1)
    try:
        premetric(**stage.loss)(x, x, t, Batch(x, x))
    except RuntimeError as error:
        made = "latents" if run.vae is not None else "pictures"
        raise FlowkitError(
            f"{name}.loss cannot take {made} of shape {run.shape} ({str(error).splitlines()[0]}); "
            f"choose another, such as {name}.loss={{name: squared}}"
        ) from None
