"""Sample a model, or take pictures, and measure them against a reference, in one streaming pass.

  accelerate launch eval/fid.py model=runs/flow/model reference=cifar10-train nfe=[1,2,4,8]
  accelerate launch eval/fid.py model=runs/flow/model reference=digits-test features=digits \\
      num_samples=3000 metrics=[fid,kid,precision_recall] repeats=3
  python -m flowkit.eval.fid pictures=samples/ reference=cifar10.npz metrics=[fid,is]

Any number of processes gives the same pictures and the same numbers, and a killed run goes on where
it was when the same command runs again. Writes to output_dir: records/ (a JSON file per result and
its sample grid), table.md, and the finished chunks. A number is comparable only with numbers of the
same features, reference and num_samples: the records say so, and
python -m flowkit.eval.leaderboard ranks by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowkit.config import parse, run_command
from flowkit.eval.settings import FidConfig

if TYPE_CHECKING:
    from flowkit.eval.records import Record

__all__ = ["main", "run"]


def main() -> None:
    """The command: parse, then sample and measure."""

    def command() -> None:
        run(parse(FidConfig, doc=__doc__ or ""))

    run_command(command)


def run(options: FidConfig) -> list[Record]:
    """Sample and measure as the options say; returns the records, one per number of evaluations.

    In a launch of several processes all call it; the main one writes and returns the records, the
    others return none.  FlowkitError: what the options ask for cannot be.
    """
    from flowkit.eval.fid_run import FidRun

    return FidRun(options).records()


if __name__ == "__main__":
    from flowkit.eval import fid

    fid.main()
