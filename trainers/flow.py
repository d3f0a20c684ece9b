"""Flow matching: train a 1-rectified flow from noise to pictures.

  accelerate launch trainers/flow.py
  accelerate launch trainers/flow.py data.name=mnist net.name=dit training.steps=20000

Writes to output_dir: model/ (a folder that from_pretrained reads), samples.png, summary.md and
summary.json. Run the same command again to resume.
"""

from __future__ import annotations

from flowkit.config import parse, run_command
from flowkit.trainers.settings import FlowConfig

__all__ = ["main"]


def main() -> None:
    """The command: parse, then train."""

    def command() -> None:
        config = parse(FlowConfig, doc=__doc__ or "")
        from flowkit.trainers.straighten import train_flow

        train_flow(config)

    run_command(command)


if __name__ == "__main__":
    from flowkit.trainers import flow

    flow.main()
