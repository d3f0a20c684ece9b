"""Where weights are looked for, in which order, and what is said when they are not there."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flowkit.errors import FlowkitError
from flowkit.eval.weights_files import (
    WeightsFile,
    file_sha256,
    find_weights,
    load_into,
    offline,
    state_sha256,
)

BYTES = b"weights"
DIGEST = hashlib.sha256(BYTES).hexdigest()
FILE = WeightsFile("net.pth", DIGEST[:8], aliases=("other-name.pth",))


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the usual places are empty ones."""
    monkeypatch.delenv("FLOWKIT_WEIGHTS", raising=False)
    monkeypatch.setenv("FLOWKIT_OFFLINE", "1")
    monkeypatch.setenv("FLOWKIT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))


def _put(path: Path, content: bytes = BYTES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_usual_places_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["home/.cache/dnnlib", "temporary", "torch/hub/checkpoints", "data/weights", "mine"]
    monkeypatch.setenv("FLOWKIT_WEIGHTS", str(tmp_path / "mine"))
    for place in places:  # the later, the more they count
        path = _put(tmp_path / place / "net.pth")
        assert find_weights(FILE) == (path, DIGEST)
    assert find_weights(FILE, "auto")[0] == tmp_path / "mine" / "net.pth"


def test_other_names_and_other_files() -> None:
    path = _put(Path(torch.hub.get_dir()) / "checkpoints" / "other-name.pth")
    assert find_weights(FILE)[0] == path
    absent = WeightsFile("absent.pth", "00")
    assert find_weights(absent, None, FILE)[0] == path


def test_a_file_of_ones_own_needs_no_hash(tmp_path: Path) -> None:
    path = _put(tmp_path / "own.pth", b"fine-tuned")
    assert find_weights(FILE, path) == (path, hashlib.sha256(b"fine-tuned").hexdigest())
    folder = _put(tmp_path / "folder" / "model.safetensors").parent
    assert find_weights(FILE, folder)[0] == folder / "model.safetensors"
    with pytest.raises(FlowkitError, match=r"weights at .*gone; expected net.pth \(sha256"):
        find_weights(FILE, tmp_path / "gone")


def test_a_wrong_file_in_a_usual_place_is_named(tmp_path: Path) -> None:
    path = _put(tmp_path / "temporary" / "net.pth", b"half of it")
    found = hashlib.sha256(b"half of it").hexdigest()
    for known in (DIGEST[:8], DIGEST):  # all that is known of it, and no more
        told = f"{path} has sha256 {found}, expected {known}{'...' * (known != DIGEST)}; fetch it"
        with pytest.raises(FlowkitError, match=re.escape(told)) as caught:
            find_weights(WeightsFile("net.pth", known))
        assert "give weights=PATH (evaluate.weights of a trainer)" in str(caught.value)


def test_offline_names_file_hash_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "torch" / "hub" / "checkpoints" / "net.pth"
    served = WeightsFile("net.pth", DIGEST[:8], _put(tmp_path / "served").as_uri())
    with pytest.raises(FlowkitError) as caught:
        find_weights(served)
    for part in (str(place), DIGEST[:8], "net.pth", "served", "give weights=PATH"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and not place.exists()
    monkeypatch.setenv("FLOWKIT_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert offline()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not offline()


def test_fetching_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of this machine stands for the network."""
    monkeypatch.setenv("FLOWKIT_OFFLINE", "0")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("FLOWKIT_WEIGHTS", str(tmp_path / "mine"))
    source = _put(tmp_path / "served").as_uri()
    other = WeightsFile("net.pth", "0" * 8, source)
    with pytest.raises(FlowkitError, match="served has sha256 .*expected 00000000.*not kept"):
        find_weights(other)
    absent = WeightsFile("net.pth", DIGEST, f"{source}-not")
    with pytest.raises(FlowkitError, match=r"put net.pth .* there.*\(fetching it failed: "):
        find_weights(absent)
    assert not list((tmp_path / "mine").iterdir())
    path, digest = find_weights(WeightsFile("net.pth", DIGEST, source))
    assert path == tmp_path / "mine" / "net.pth" and path.read_bytes() == BYTES
    assert digest == DIGEST and list((tmp_path / "mine").iterdir()) == [path]
    with pytest.raises(FlowkitError, match="no feature weights"):
        find_weights(WeightsFile("never.pth", "", None))


def test_hashes_follow_the_file(tmp_path: Path) -> None:
    path = _put(tmp_path / "a")
    assert file_sha256(path) == DIGEST
    _put(path, b"other weights")
    assert file_sha256(path) == hashlib.sha256(b"other weights").hexdigest()
    net = nn.Linear(2, 2)
    before = state_sha256(net)
    assert state_sha256(net) == before != state_sha256(nn.Linear(2, 2))
    nn.init.zeros_(net.bias)
    assert state_sha256(net) != before
    assert len(before) == 64 and state_sha256(nn.ReLU()) == ""


def test_every_kind_of_file_gives_the_same(tmp_path: Path) -> None:
    source = nn.Linear(3, 2)
    state = source.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.th")
    torch.jit.save(torch.jit.script(source), tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pth", "a.th", "a.pt"):
        net = nn.Linear(3, 2)
        load_into(net, tmp_path / name)
        assert torch.equal(net.weight, source.weight), name


class _Harm:
    """What a hostile pickle does when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("harmed"),))  # type: ignore[return-value]


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Harm()}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(_Harm()))
    for name in ("new.pth", "old.pth"):
        with pytest.raises(FlowkitError, match=f"{name} does not hold a Linear"):
            load_into(nn.Linear(2, 2), tmp_path / name)
    assert not (tmp_path / "harmed").exists()
