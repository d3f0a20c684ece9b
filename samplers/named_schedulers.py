"""FlowScheduler with one solver each, for pipelines:

pipe.scheduler = RFSolverScheduler.from_config(pipe.scheduler.config)
"""

from __future__ import annotations

from diffusers import SchedulerMixin  # noqa: F401 - a pipeline's from_pretrained looks here for it

from flowkit.samplers.scheduler import FlowScheduler

__all__ = [
    "AB2Scheduler",
    "BDIADDIMScheduler",
    "BDIAScheduler",
    "DEISFlowScheduler",
    "DPMSolverFlowScheduler",
    "FireFlowScheduler",
    "RFSolverScheduler",
    "UniPCFlowScheduler",
]


class RFSolverScheduler(FlowScheduler):
    """RF-Solver of order 2 (Wang et al., 2024, arXiv:2411.04746): 2 NFE per step."""

    fixed_solver = "rf_solver"


class FireFlowScheduler(FlowScheduler):
    """FireFlow (Deng et al., 2024, arXiv:2412.07517): order 2 for N + 1 NFE."""

    fixed_solver = "fireflow"


class AB2Scheduler(FlowScheduler):
    """Adams-Bashforth of order 2 on any grid: 1 NFE per step."""

    fixed_solver = "ab2"


class BDIAScheduler(FlowScheduler):
    """BDIA on the flow, exactly invertible (Zhang et al., 2023, arXiv:2307.10829)."""

    fixed_solver = "bdia"


class BDIADDIMScheduler(FlowScheduler):
    """BDIA-DDIM on the pipeline's own path (Zhang et al., 2023, arXiv:2307.10829)."""

    fixed_solver = "bdia_ddim"


class DEISFlowScheduler(FlowScheduler):
    """DEIS (Zhang & Chen, 2022, arXiv:2204.13902)."""

    fixed_solver = "deis"


class DPMSolverFlowScheduler(FlowScheduler):
    """DPM-Solver++(2M) (Lu et al., 2022, arXiv:2211.01095)."""

    fixed_solver = "dpmpp_2m"


class UniPCFlowScheduler(FlowScheduler):
    """UniPC (Zhao et al., 2023, arXiv:2302.04867)."""

    fixed_solver = "unipc"
