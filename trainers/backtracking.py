"""DisBack: on the way to the teacher, a student follows the path on which it would be forgotten.

    recording       s' starts as the teacher and learns the score of the untrained student's
                    pictures: s'_0 = teacher, s'_1, ..., s'_N, one node each so many steps
    backtracking    distribution matching with s'_{N-1}, ..., s'_1 and at last the teacher as the
                    real score, the fake score starting at s'_N

Zhang et al., 2024, arXiv:2408.15991.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowkit.coupling import Batch
from flowkit.errors import FlowkitError
from flowkit.samplers.timesteps import TimeDensity
from flowkit.trainers.distribution_matching import score_loss
from flowkit.trainers.dmd_settings import CriticOptions
from flowkit.trainers.method import Loss, Phase
from flowkit.trainers.recorded_path import RecordedPath
from flowkit.velocity import VelocityModel, interpolate, to_data

__all__ = ["Recording", "WayBack"]


class _Nodes:
    """The phase of a recording: a node every so many updates, written on the main process."""

    def __init__(self, write: Callable[[int], None], every: int) -> None:
        self.write, self.every = write, every
        self.stage = self.updates = 0

    def update(self, loss: float, /) -> bool:
        self.updates += 1
        self.stage, rest = divmod(self.updates, self.every)
        if rest == 0:
            self.write(self.updates)
        return rest == 0

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.updates = int(state["updates"])
        self.stage = self.updates // self.every


class Recording:
    """Stage 1, degradation recording: the model learns the score of a frozen student's pictures.

    model: a trainable copy of the teacher.  student: makes pictures by one step from t = start, as
    student(x_t, t, **cond); the network behind it is in `frozen`, for the cost.
    path: gets a node every `every` steps; None on processes that do not write.
    """

    def __init__(
        self,
        model: VelocityModel,
        student: Callable[..., Tensor],
        path: RecordedPath | None,
        *,
        every: int,
        start: float,
        times: TimeDensity,
        options: CriticOptions,
        frozen: dict[str, VelocityModel] | None = None,
    ) -> None:
        self.model: Any = model
        self.student, self.start, self.times, self.options = student, start, times, options
        self.frozen = frozen or {}

        def write(step: int) -> None:
            if path is not None:
                path.write(step, model.net)

        self.phase: Phase | None = _Nodes(write, every)

    def loss(self, batch: Batch) -> Loss:
        """Denoising score matching on the student's pictures."""
        with torch.no_grad():
            x = (1 - self.start) * batch.noise
            data = to_data(x, self.student(x, self.start, **batch.cond), self.start)
        t, noise = self.times.sample(len(data), device=data.device), torch.randn_like(data)
        v = self.model(interpolate(noise, data, t), t, **batch.cond)
        return Loss(score_loss(v, data, noise, t, self.options))


class WayBack:
    """Stage 2's phase: which node is the real score, switched every so many student's updates.

    target: a frozen network as the teacher's, which gets the weights.  At stage k it holds node
    N - 2 - k of N (counted from the teacher; node N - 1 is where the fake score starts), at the
    last stage, N - 1, the teacher's own weights to the last bit.
    """

    def __init__(self, target: VelocityModel, path: RecordedPath, every: int) -> None:
        self.target, self.path, self.every = target, path, every
        self.last = max(len(path) - 1, 0)
        self.stage = self.updates = 0
        if self.last:
            path.load(self._node(), target.net)

    def _node(self) -> int:
        """Number of the path's node at this stage; -1 is the teacher."""
        return self.last - 1 - self.stage

    def update(self, loss: float, /) -> bool:
        """Count an update of the student; switch when it was the stage's last."""
        self.updates += 1
        stage = min(self.updates // self.every, self.last)
        switched = stage != self.stage
        if switched:
            self.stage = stage
            self.path.load(self._node(), self.target.net)
        return switched

    def state_dict(self) -> dict[str, Any]:
        """The schedule, where it stands, and the path by its nodes' hashes."""
        return {"updates": self.updates, "every": self.every, "path": self.path.nodes}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on where it stood; raises FlowkitError for another schedule or another path."""
        if (state.get("every"), state.get("path")) != (self.every, self.path.nodes):
            raise FlowkitError(
                f"the checkpoint was on the way back along another path than {self.path.folder}, "
                "or with another path.switch_every; use another output_dir"
            )
        self.updates = int(state["updates"])
        stage = min(self.updates // self.every, self.last)
        if stage != self.stage:
            self.stage = stage
            self.path.load(self._node(), self.target.net)
