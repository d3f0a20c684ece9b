"""A path of networks from a teacher to a student: nodes on disk, each a difference to the teacher.

node-000100.safetensors   weights after 100 steps minus the teacher's, in bfloat16: half the bytes,
                          and small changes keep eight bits of their own
path.json                 the teacher's identity, the nodes' steps and hashes
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.files import atomic_file, read_json, write_json

__all__ = ["RecordedPath"]


class RecordedPath:
    """The nodes in `folder`, in the order of recording; node 0 is nearest to the teacher.

    teacher: the network whose differences they are; its weights are copied here, on the CPU.
    identity: JSON-able, tells this teacher and this run's first student from others.
    Raises FlowkitError when the folder holds another teacher's path.
    """

    def __init__(self, folder: Path, teacher: nn.Module, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.teacher = {
            name: value.detach().cpu().clone() for name, value in teacher.state_dict().items()
        }
        self.nodes: dict[str, str] = {}
        record = folder / "path.json"
        if record.is_file():
            stored = read_json(record)
            if stored["identity"] != self.identity:
                raise FlowkitError(
                    f"{folder} holds a path of another teacher or student; remove it, or choose "
                    "another output_dir"
                )
            self.nodes = stored["nodes"]

    def __len__(self) -> int:
        return len(self.nodes)

    def write(self, step: int, network: nn.Module) -> None:
        """Add the network's weights as the node of that step, or replace it by the same."""
        state = network.state_dict()
        self._check(state, "the network to record")
        changes = {
            name: (value.detach().cpu() - self.teacher[name]).to(torch.bfloat16).contiguous()
            for name, value in state.items()
            if value.is_floating_point()
        }
        name = f"node-{step:06d}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / name) as temporary:
            save_file(changes, temporary)
        self.nodes[name] = _sha256(self.folder / name)
        self.nodes = dict(sorted(self.nodes.items()))
        write_json(self.folder / "path.json", {"identity": self.identity, "nodes": self.nodes})

    def load(self, number: int, network: nn.Module) -> None:
        """Give the network the weights of a node, or the teacher's own for number -1, strictly.

        Raises FlowkitError for a damaged node, one of another architecture, and one that changes
        not a single weight: a switch that switches nothing.
        """
        state = dict(self.teacher)
        if number >= 0:
            name, expected = list(self.nodes.items())[number]
            file = self.folder / name
            try:
                found, changes = _sha256(file), load_file(file)
            except (OSError, SafetensorError) as error:
                reason = " ".join(str(error).split())
                raise FlowkitError(f"{file} cannot be read ({reason}); record it anew") from None
            if found != expected:
                raise FlowkitError(f"{file} is not what was recorded; record the path anew")
            self._check(changes, str(file))
            for key, change in changes.items():
                state[key] = self.teacher[key] + change.to(self.teacher[key])
        before = network.state_dict()
        if all(torch.equal(before[key].cpu(), value) for key, value in state.items()):
            raise FlowkitError(
                f"node {number} of {self.folder} changes no weight of the target; record with a "
                "higher path.learning_rate"
            )
        network.load_state_dict(state, strict=True)

    def _check(self, state: Mapping[str, Tensor], what: str) -> None:
        """FlowkitError unless the state has the teacher's names and shapes."""
        ours = {n: tuple(v.shape) for n, v in self.teacher.items() if v.is_floating_point()}
        theirs = {n: tuple(v.shape) for n, v in state.items() if v.is_floating_point()}
        if ours != theirs:
            name = min(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
            raise FlowkitError(
                f"{what} is of another architecture than the teacher: {name} is "
                f"{theirs.get(name, 'absent')}, not {ours.get(name, 'there')}"
            )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
