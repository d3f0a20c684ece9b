"""SlimFlow: a one-step flow that is smaller than its teacher (Zhu et al., 2024, arXiv:2407.12718).

Trains a 1-rectified flow on pictures (or takes a teacher you name), makes noise/picture pairs with
its ODE, trains a small student from scratch on noise that is annealed from independent to those
pairs', distils the student to one step under its own guidance, and compares all of them at 1, 2, 4,
8 and 16 Euler steps with the same noise. Without arguments: scikit-learn's 8x8 digits and a student
of a quarter of the parameters, in minutes on a CPU, nothing downloaded.

  accelerate launch trainers/slimflow.py
  accelerate launch trainers/slimflow.py annealing.schedule=cosine teacher=runs/reflow/teacher
  accelerate launch trainers/slimflow.py --config cifar10/slimflow.yaml

Writes to output_dir: teacher/ student/ distilled/ (folders that from_pretrained reads), pairs-1/,
pairs-distillation/, samples.png, summary.md and summary.json. Run the same command again to resume.
"""

from __future__ import annotations

from flowkit.config import parse, run_command
from flowkit.trainers.slimflow_settings import SlimFlowConfig

__all__ = ["main"]


def main() -> None:
    """The command: parse, then train."""

    def command() -> None:
        config = parse(SlimFlowConfig, doc=__doc__ or "")
        from flowkit.trainers.slimming import train_slimflow

        train_slimflow(config)

    run_command(command)


if __name__ == "__main__":
    from flowkit.trainers import slimflow

    slimflow.main()
