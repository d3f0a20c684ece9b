"""DMD2 and f-distill: one or few steps whose pictures are distributed as a teacher's.

Trains a 1-rectified flow on pictures (or takes a teacher you name: a flow, a diffusion or an EDM
model), distils it by distribution matching with a fake-score network and a discriminator, and
compares both at 1, 2, 4, 8 and 16 Euler steps with the same noise.

  accelerate launch trainers/dmd.py --config digits/dmd.yaml
  accelerate launch trainers/dmd.py --config digits/f_distill.yaml teacher=runs/flow/model
  accelerate launch trainers/dmd.py --config imagenet64/dmd.yaml teacher=path/to/teacher

Writes to output_dir: teacher/ student/ (folders that from_pretrained reads), samples.png,
summary.md and summary.json. Run the same command again to resume.
"""

from __future__ import annotations

from flowkit.config import parse, run_command
from flowkit.trainers.dmd_settings import DMDConfig

__all__ = ["main"]


def main() -> None:
    """The command: parse, then distil."""

    def command() -> None:
        config = parse(DMDConfig, doc=__doc__ or "")
        from flowkit.trainers.distilling import distil

        distil(config)

    run_command(command)


if __name__ == "__main__":
    from flowkit.trainers import dmd

    dmd.main()
