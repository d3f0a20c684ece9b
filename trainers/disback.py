"""DisBack: distribution matching that backtracks the path on which a teacher is forgotten.

Trains a 1-rectified flow on pictures (or takes a teacher you name), records how it degrades while
it learns the untrained student's pictures, then teaches the student along the path back; the
original teacher is the last to teach. Compares both at 1, 2, 4, 8 and 16 Euler steps.

  accelerate launch trainers/disback.py --config digits/disback.yaml
  accelerate launch trainers/disback.py --config digits/disback.yaml teacher=runs/flow/model

Writes to output_dir: teacher/ student/ (folders that from_pretrained reads), path/ (the recorded
nodes), samples.png, summary.md and summary.json. Run the same command again to resume.
"""

from __future__ import annotations

from flowkit.config import parse, run_command
from flowkit.trainers.dmd_settings import DisBackConfig

__all__ = ["main"]


def main() -> None:
    """The command: parse, then record and backtrack."""

    def command() -> None:
        config = parse(DisBackConfig, doc=__doc__ or "")
        from flowkit.trainers.retracing import backtrack

        backtrack(config)

    run_command(command)


if __name__ == "__main__":
    from flowkit.trainers import disback

    disback.main()
