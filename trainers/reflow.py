"""Reflow: straighten a flow until one step is enough.

Trains a 1-rectified flow on pictures (or takes a teacher you name), makes noise/picture pairs with
its ODE, trains the 2-rectified flow on them, distils that to one step, and compares all of them at
1, 2, 4, 8 and 16 Euler steps with the same noise. Without arguments: scikit-learn's 8x8 digits, in
minutes on a CPU, nothing downloaded.

  accelerate launch trainers/reflow.py
  accelerate launch trainers/reflow.py seed=1 output_dir=runs/x
  accelerate launch trainers/reflow.py --config cifar10/reflow.yaml teacher=path/to/teacher

Writes to output_dir: teacher/ student/ distilled/ (folders that from_pretrained reads), pairs-1/,
samples.png, summary.md and summary.json. Run the same command again to resume.
"""

from __future__ import annotations

from flowkit.config import parse, run_command
from flowkit.trainers.settings import ReflowConfig

__all__ = ["main"]


def main() -> None:
    """The command: parse, then straighten."""

    def command() -> None:
        config = parse(ReflowConfig, doc=__doc__ or "")
        from flowkit.trainers.straighten import straighten

        straighten(config)

    run_command(command)


if __name__ == "__main__":
    from flowkit.trainers import reflow

    reflow.main()
