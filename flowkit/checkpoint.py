"""Checkpoints of a training run, and exported models: folders that are whole or not there.

checkpoint-500/   accelerate's state (weights, optimizer, RNG), ema.safetensors, state.json
model/            a diffusers folder (config.json, safetensors), flowkit.json, README.md
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flowkit.errors import FlowkitError
from flowkit.files import atomic_folder, publish_folder, read_json, write_json
from flowkit.velocity import VelocityModel

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

__all__ = ["export_model", "latest", "load", "model_card", "prune", "push", "save"]

VERSION = 1
_FALL_BACK = "remove the folder to fall back to the checkpoint before it"


def save(
    folder: Path, step: int, accelerator: Accelerator, ema: EMAModel, state: dict[str, Any]
) -> Path:
    """Write folder/checkpoint-STEP from all processes; returns it once it is complete.

    state: JSON-able counters that load() gives back.
    """
    target, staging = folder / f"checkpoint-{step}", folder / f".tmp-checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    accelerator.wait_for_everyone()
    with _disk_errors(target, staging):
        accelerator.save_state(str(staging))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shadow = {f"{i:05d}": p.contiguous() for i, p in enumerate(ema.shadow_params)}
            save_file(shadow, staging / "ema.safetensors")
            record = {"version": VERSION, "step": step, "ema_steps": ema.optimization_step}
            write_json(staging / "state.json", {**record, **state})
            publish_folder(staging, target)
    accelerator.wait_for_everyone()
    return target


@contextmanager
def _disk_errors(target: Path, staging: Path | None = None) -> Iterator[None]:
    """Writers that report a full disk in their own ways do so as an OSError that names the file."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        if "unexpected pos" in reason:  # torch.save's words for a write that was cut short
            reason = "No space left on device"
        elif isinstance(error, RuntimeError):
            raise
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        raise OSError(
            f"could not write {target} ({reason}); earlier checkpoints are intact: "
            "make room and run the same command again"
        ) from error


def load(path: Path, accelerator: Accelerator, ema: EMAModel) -> dict[str, Any]:
    """Restore what save() wrote; returns the counters, "step" among them."""
    try:
        state = read_json(path / "state.json")
    except ValueError as error:
        raise FlowkitError(f"{path}/state.json is damaged ({error}); {_FALL_BACK}") from None
    if state.get("version") != VERSION:
        raise FlowkitError(
            f"{path} has checkpoint version {state.get('version')}, this flowkit reads {VERSION}; "
            "finish the run with the flowkit that began it"
        )
    try:
        accelerator.load_state(str(path))
        shadow = load_file(path / "ema.safetensors")
    except (RuntimeError, OSError, EOFError, ValueError, SafetensorError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FlowkitError(
            f"{path} does not fit this network, or is damaged ({reason}); {_FALL_BACK}, "
            "or use another output_dir"
        ) from None
    for key, parameter in zip(sorted(shadow), ema.shadow_params, strict=True):
        parameter.copy_(shadow[key])
    ema.optimization_step = state["ema_steps"]
    return state


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max(_checkpoints(folder), key=_step, default=None)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed saves left behind."""
    for path in sorted(_checkpoints(folder), key=_step)[: -keep or None]:
        shutil.rmtree(path, ignore_errors=True)
    for leftover in folder.glob(".*-checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if (path / "state.json").is_file()]


def _step(path: Path) -> int:
    return int(re.sub(r"\D", "", path.name))


def export_model(
    model: VelocityModel,
    folder: str | Path,
    *,
    shape: Sequence[int],
    num_classes: int | None = None,
    card: str = "",
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a folder that diffusers' from_pretrained and flowkit's from_diffusers both read.

    shape: (C, H, W) of what the flow generates.  extra: JSON-able, e.g. latent statistics.
    """
    net: Any = model.net
    if not hasattr(net, "save_pretrained"):
        raise FlowkitError(
            f"cannot export {type(net).__name__}: it has no save_pretrained; "
            "derive it from diffusers' ModelMixin and ConfigMixin"
        )
    record = {
        "version": VERSION,
        "net": {"module": type(net).__module__, "class": type(net).__name__},
        "velocity": model.description(),
        "shape": list(shape),
        "num_classes": num_classes,
        **(extra or {}),
    }
    with _disk_errors(Path(folder)), atomic_folder(folder) as temporary:
        net.save_pretrained(temporary)
        write_json(temporary / "flowkit.json", record)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def push(folder: str | Path, repository: str) -> str:
    """Upload an exported folder to the hub (created when it is not there); returns its URL."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    return str(api.upload_folder(repo_id=repository, folder_path=str(folder)))


def model_card(folder: str | Path, method: str, data: str, summary: str) -> str:
    """The README.md of the exported model in `folder`.

    method: what it was trained with.  data: what on.  summary: markdown of the measured numbers.
    """
    from huggingface_hub import ModelCardData

    record = read_json(Path(folder) / "flowkit.json")
    labels, latents = record["num_classes"] is not None, record.get("latents") is not None
    kind = "class-conditional" if labels else "unconditional"
    tags = ["flow-matching", "rectified-flow", "few-step", f"{kind}-image-generation"]
    header = ModelCardData(library_name="flowkit", license="apache-2.0", tags=tags).to_yaml()
    bound = "bind(velocity, class_labels=torch.arange(16) % 10)" if labels else "velocity"
    imports = "import torch\n\n" * labels
    grid, solver, grids = "grids.uniform(1)", "", "grids, "
    if sampler := record.get("sampler"):
        grid, solver, grids = str(sampler["times"]), f', solver="{sampler["solver"]}"', ""
    made = "normalised latents, see flowkit.latents" if latents else "in [-1, 1]"
    return (
        f"---\n{header}\n---\n\n# {method}\n\nTrained on {data} with flowkit.\n\n"
        f"```python\n{imports}"
        "from flowkit.adapters import from_diffusers\n"
        "from flowkit.noise import keyed_noise\n"
        f"from flowkit.samplers import {grids}sample\n"
        f"{'from flowkit.velocity import bind' * labels}\n\n"
        'velocity = from_diffusers("this/repository")\n'
        f"noise = keyed_noise(seed=0, indices=range(16), shape={tuple(record['shape'])})\n"
        f"x = sample({bound}, noise, {grid}{solver}).x  # {made}\n"
        f"```\n\n{summary}"
    )
