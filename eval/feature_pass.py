"""One pass of an extractor over pictures, in kept chunks: what every measure is made of."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from flowkit.errors import FlowkitError
from flowkit.eval.features import Extractor
from flowkit.eval.picture_rules import digests_of
from flowkit.eval.records import canonical_sha256
from flowkit.eval.settings import PictureRules
from flowkit.eval.sources import PictureSet
from flowkit.eval.streaming import Chunks, share
from flowkit.files import read_json, write_json
from flowkit.schema import to_dict

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "chunk_tensors",
    "device_name",
    "main_only",
    "pass_identity",
    "picture_chunks",
    "refuse_grey",
    "same_identity",
]

T = TypeVar("T")
SHOWN = 64  # pictures of a set that are kept for its grid


def main_only(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """What `work` gives in the main process, None in the others, which wait for it.

    FlowkitError: of the work, in every process, so that none waits for one that has given up.
    """
    from accelerate.utils import broadcast_object_list

    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except FlowkitError as caught:
            error = caught
    [told] = broadcast_object_list([None if error is None else str(error)])
    if told is not None:
        raise error or FlowkitError(told)
    return result


def chunk_tensors(
    levels: Tensor, indices: range, extractor: Extractor, parts: Collection[str]
) -> dict[str, Tensor]:
    """What a chunk's file holds of its pictures (B, C, H, W), uint8.

    FlowkitError: the extractor does not give a part, or gives numbers that are not finite.
    """
    found = extractor.parts(levels)
    if missing := sorted(set(parts) - found.keys()):
        raise FlowkitError(
            f"features {extractor.id!r} give {', '.join(found)}, but no {missing[0]}, which a "
            "metric needs; leave that metric out, or choose other features"
        )
    for part in parts:
        if not found[part].isfinite().all():
            raise FlowkitError(
                f"features {extractor.id!r} are not finite for pictures {indices.start} to "
                f"{indices.stop - 1}; check the extractor's weights"
            )
    tensors = {part: found[part].float() for part in parts} | {"hashes": digests_of(levels)}
    if indices.start < SHOWN:
        tensors["pictures"] = levels[: SHOWN - indices.start]
    return tensors


def picture_chunks(
    pictures: PictureSet,
    rows: Sequence[int],
    ranges: Sequence[range],
    *,
    extractor: Extractor,
    parts: Collection[str],
    folder: str | Path,
    chunk_size: int,
    accelerator: Accelerator,
    progress: bool = True,
) -> Chunks:
    """The chunks `ranges` of these rows of a set, as found below `folder` or computed there.

    Every process of the launch calls it; they share the work.
    """
    refuse_grey(pictures.shape, extractor, pictures.rules)
    identity: dict[str, Any] = {
        "pictures": canonical_sha256(pictures.identity),
        "rules": to_dict(pictures.rules),
        "rows": canonical_sha256(list(rows)),
        **pass_identity(extractor, accelerator.device, chunk_size),
    }
    name = re.sub(r"[^\w.+-]+", "-", pictures.name).strip("-.")[-60:]
    home = Path(folder) / f"{name}-{canonical_sha256(identity)[:12]}"
    chunks = Chunks(home / "chunks", frozenset(parts))

    def own_folder() -> None:
        if not extractor.reusable:
            shutil.rmtree(home, ignore_errors=True)
        same_identity(home / "identity.json", identity)

    main_only(accelerator, own_folder)

    def compute(indices: range) -> None:
        levels = pictures.fetch([rows[i] for i in indices])
        chunks.write(indices, chunk_tensors(levels, indices, extractor, parts), {})

    share(
        ranges, chunks.done, compute,
        folder=home, accelerator=accelerator, title=f"features of {name}", progress=progress,
    )  # fmt: skip
    return chunks


def refuse_grey(shape: Sequence[int], extractor: Extractor, rules: PictureRules) -> None:
    """FlowkitError for grey pictures and a network of colours, until a rule repeats the channel."""
    if shape[0] == 1 and extractor.preprocessing != "none" and rules.channels == "as_is":
        raise FlowkitError(
            f"the pictures are grey and features {extractor.id!r} take colours; say "
            "rules.channels=rgb to repeat the channel"
        )


def pass_identity(extractor: Extractor, device: torch.device, chunk_size: int) -> dict[str, Any]:
    """What the last bits of a feature pass depend on."""
    return {
        "extractor": extractor.id,
        "convention": extractor.preprocessing,
        "chunk_size": chunk_size,
        "torch": torch.__version__,
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """The accelerator's product name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def same_identity(file: Path, identity: dict[str, Any], new: Collection[str] = ()) -> None:
    """Write what the chunks beside `file` are of; FlowkitError when they are of something else.

    new: names of which there are no chunks yet; their values are added to the file.
    """
    plain: Callable[[Any], str] = canonical_sha256
    try:
        stored = read_json(file) if file.is_file() else identity
    except ValueError:
        raise FlowkitError(f"{file} is damaged; delete {file.parent} and run again") from None
    stored |= {name: identity[name] for name in new}
    for name, value in identity.items():
        if plain(stored.get(name)) != plain(value):
            raise FlowkitError(
                f"{file.parent} holds chunks of another run: {name} was "
                f"{shorten(str(stored.get(name)), 80)}, now {shorten(str(value), 80)}; "
                "give another output_dir, or delete that one"
            )
    if new or not file.is_file():
        write_json(file, stored)
