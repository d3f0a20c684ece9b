"""Make reference statistics: an npz of means and covariances that says what it was made with.

  accelerate launch eval/reference.py data=cifar10-train out=cifar10-train.npz
  python -m flowkit.eval.reference data=photos/ features=dinov2-vitl14 out=photos.npz \\
      rules.crop=center rules.size=256 keep_features=true

The npz holds mu and sigma, which pytorch-fid, clean-fid and EDM read too, and where the extractor
has them mu_s and sigma_s, as in guided-diffusion's files; OUT.json beside it holds the metadata.
"""

from __future__ import annotations

from pathlib import Path

from flowkit.config import parse, run_command
from flowkit.eval.settings import ReferenceConfig
from flowkit.schema import to_dict

__all__ = ["main", "make_reference"]


def main() -> None:
    """The command: parse, then measure the pictures."""

    def command() -> None:
        make_reference(parse(ReferenceConfig, doc=__doc__ or ""))

    run_command(command)


def make_reference(options: ReferenceConfig) -> Path:
    """Write the statistics that the options ask for; returns their path.

    In a launch of several processes all call it.  FlowkitError: what cannot be made.
    """
    from flowkit.errors import FlowkitError
    from flowkit.eval.feature_pass import picture_chunks
    from flowkit.eval.features import load_extractor
    from flowkit.eval.reference_files import write_statistics
    from flowkit.eval.resize import exact_float32
    from flowkit.eval.sources import open_pictures, picked
    from flowkit.eval.streaming import FeatureSet, chunk_ranges
    from flowkit.processes import launched

    out = Path(options.out)
    if out.suffix != ".npz":
        raise FlowkitError(f"out={options.out} must end in .npz")
    accelerator = launched()
    pictures = open_pictures(options.data, options.rules)
    rows = picked(len(pictures), options.num_samples, options.seed, pictures.name)
    if len(rows) < 2:
        raise FlowkitError(f"{pictures.name} has {len(rows)} picture; statistics need two or more")
    ranges = chunk_ranges(0, len(rows), options.chunk_size)
    with exact_float32():
        extractor = load_extractor(options.features, options.weights, accelerator.device)
        given = extractor.parts(pictures.fetch(rows[:1]))
        parts = [part for part in ("features", "spatial") if part in given]
        chunks = picture_chunks(
            pictures, rows, ranges, extractor=extractor, parts=parts,
            folder=options.output_dir, chunk_size=options.chunk_size,
            accelerator=accelerator, progress=options.progress,
        )  # fmt: skip
    if accelerator.is_main_process:
        metadata = {"name": pictures.name, "rules": to_dict(options.rules), "seed": options.seed}
        features = FeatureSet(chunks, ranges)
        keep = options.keep_features
        write_statistics(out, features, extractor, parts, metadata=metadata, keep_features=keep)
        print(f"{pictures.name}: {len(rows)} pictures, {extractor.id}, written to {out}")
    accelerator.wait_for_everyone()
    return out


if __name__ == "__main__":
    from flowkit.eval import reference

    reference.main()
