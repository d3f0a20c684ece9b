"""The feature extractors: their calibration on real pictures, and what they refuse."""

from __future__ import annotations

import hashlib
import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval import Extractor, frechet_distance, load_extractor
from flowkit.eval.features import DIGITS_WEIGHTS, DigitsNet, ResNet20, ResNet56
from flowkit.pictures import to_uint8


def _digits(split: str) -> Tensor:
    data = load_data("digits", split)
    return data.fetch(range(len(data)))["data"]


def test_the_digits_network_classifies_and_orders_sets() -> None:
    features = load_extractor("digits")
    data = load_data("digits", "test")
    rows = data.fetch(range(len(data)))
    assert isinstance(features.net, DigitsNet)
    guessed = features.net.classifier(features(rows["data"])).argmax(1)
    assert (guessed == rows["class_labels"]).float().mean() > 0.99
    real = features(rows["data"])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1297, 1, 8, 8, generator=generator)
    floor = frechet_distance(features(_digits("train")), real)
    assert floor == pytest.approx(5.1, abs=0.1)
    levels = [
        frechet_distance(features(_digits("train") + s * noise), real) for s in (0.2, 0.5, 1.0)
    ]
    assert floor < levels[0] < levels[1] < levels[2]
    assert frechet_distance(features(noise.clamp(-1, 1)), real) > 200


def test_batches_do_not_matter() -> None:
    features, pictures = load_extractor("digits"), _digits("train")[:700]
    apart = torch.cat([features(part) for part in pictures.split(37)])
    torch.testing.assert_close(features(pictures), apart, rtol=1e-5, atol=1e-5)


def test_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_features.py").write_text("def flat(x):\n    return x.flatten(1) * 2\n")
    monkeypatch.chdir(tmp_path)
    features = load_extractor("my_features:flat")
    pictures = _digits("test")[:3]
    assert torch.equal(features(pictures), pictures.flatten(1) * 2)
    assert features.id == f"my_features:flat@{features.weights_sha256[:12]}"


def test_edited_code_is_another_extractor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function or the class of a network, whatever its weights; without source it is said."""
    monkeypatch.chdir(tmp_path)
    ids = []
    for factor in (2, 33):
        (tmp_path / "my_edited.py").write_text(
            f"from torch import nn\ndef flat(x):\n    return x.flatten(1) * {factor}\n"
            f"class Net(nn.Module):\n    def forward(self, x):\n        return flat(x)\n"
        )
        monkeypatch.delitem(sys.modules, "my_edited", raising=False)
        importlib.invalidate_caches()
        found = [load_extractor(f"my_edited:{name}") for name in ("flat", "flat", "Net")]
        assert found[0].id == found[1].id and all(one.reusable for one in found)
        ids += [one.id.partition("@")[2] for one in found[1:]]
    assert ids[0] != ids[2] and ids[1] != ids[3]
    module = types.ModuleType("my_typed")
    module.flat = lambda x: x.flatten(1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_typed", module)
    typed = load_extractor("my_typed:flat")
    assert typed.id == "my_typed:flat (no source)" and not typed.reusable


def test_pictures_may_be_of_any_float_dtype() -> None:
    features, pictures = load_extractor("digits"), _digits("test")[:9]
    for dtype in (torch.float64, torch.bfloat16):
        found = features(pictures.to(dtype))  # x / 8 - 1 has few digits: exact in bfloat16
        assert torch.equal(found, features(pictures)) and found.dtype == torch.float32


def test_levels_are_the_floats_they_stand_for() -> None:
    features, generator = load_extractor("digits"), torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (9, 1, 8, 8), generator=generator, dtype=torch.uint8)
    assert torch.equal(features(levels), features(levels / 127.5 - 1))
    with pytest.raises(FlowkitError, match="floats in .* or uint8 levels, got torch.int64"):
        features(levels.long())


def test_a_whole_network_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    features, pictures = load_extractor("my_net:Net"), _digits("test")[:3]
    assert torch.equal(features(pictures), features(pictures))  # no dropout
    assert not features(pictures).requires_grad


@pytest.mark.parametrize(
    "name, message",
    [
        ("digit", "did you mean 'digits'"),
        ("no_such_module:thing", "no_such_module"),
        ("math:nothing", "nothing"),
        ("math:pi", "a float; expected a function"),
        (":thing", "expected module:attribute"),
    ],
)
def test_unknown_features(name: str, message: str) -> None:
    with pytest.raises(FlowkitError, match=message):
        load_extractor(name)


def test_missing_and_wrong_weights_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWKIT_DATA", str(tmp_path))
    with pytest.raises(FlowkitError, match=r"resnet20-12fca82f\.th"):
        load_extractor("cifar-resnet20")
    (tmp_path / "weights").mkdir()
    torch.save(ResNet20().state_dict(), tmp_path / "weights" / "resnet20-12fca82f.th")
    with pytest.raises(FlowkitError, match=r"has sha256 .*expected 12fca82f"):
        load_extractor("cifar-resnet20")
    with pytest.raises(FlowkitError, match="read no weights"):
        load_extractor("pixels", weights=tmp_path / "any")


@pytest.mark.parametrize("name, net", [("digits", "DigitsNet"), ("cifar-resnet20", "ResNet20")])
def test_files_that_hold_something_else(tmp_path: Path, name: str, net: str) -> None:
    torch.save({"other": torch.zeros(3)}, tmp_path / "other")
    torch.save(torch.zeros(3), tmp_path / "tensor")
    (tmp_path / "empty").touch()
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    whole = DIGITS_WEIGHTS.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    for file in ("other", "tensor", "empty", "junk", "cut"):
        with pytest.raises(FlowkitError, match=f"{file} does not hold a {net}") as caught:
            load_extractor(name, weights=tmp_path / file)
        assert "\n" not in str(caught.value)


def test_pictures_that_do_not_fit() -> None:
    with pytest.raises(FlowkitError, match=r"'digits@.* \(3, 32, 32\)"):
        load_extractor("digits")(torch.zeros(2, 3, 32, 32))


def test_floats_to_levels_round_half_up() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels)
    assert torch.equal(to_uint8((levels.double() / 127.5 - 1).half()), levels)
    halves = torch.tensor([-1.0, 0.0, 0.5 / 127.5 - 1, 1.0, 9.0, -9.0], dtype=torch.float64)
    assert to_uint8(halves).tolist() == [0, 128, 1, 255, 255, 0]
    x = torch.rand(10**5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(to_uint8(x), (127.5 * x + 128).clamp(0, 255).to(torch.uint8))
    with pytest.raises(FlowkitError, match="1 of 6 pixel values are not finite"):
        to_uint8(torch.cat([halves[:5], torch.tensor([torch.inf])]))


def test_one_pass_gives_all_parts() -> None:
    features, pictures = load_extractor("digits"), _digits("test")[:9]
    parts = features.parts(pictures)
    assert isinstance(features.net, DigitsNet)
    assert torch.equal(parts["features"], features(pictures))
    assert torch.equal(parts["logits"], features.net.classifier(parts["features"]))
    assert features.dim == 64 and features.preprocessing == "none"
    digest = hashlib.sha256(DIGITS_WEIGHTS.read_bytes()).hexdigest()
    assert features.weights_sha256 == digest and features.id == f"digits@{digest[:12]}"
    pixels = load_extractor("pixels")
    assert pixels.dim is None and pixels.weights_sha256 == "" and pixels.id == "pixels"
    assert pixels.parts(pictures).keys() == {"features"} and pixels.dim == 64


def test_grey_counts_as_colour_and_transparency_is_refused() -> None:
    features, pictures = Extractor("resnet", ResNet20(), "cpu"), torch.rand(2, 1, 16, 16) * 2 - 1
    assert torch.equal(features(pictures), features(pictures.expand(-1, 3, -1, -1)))
    with pytest.raises(FlowkitError, match=r"take no RGBA pictures, got \(2, 4, 16, 16\); put"):
        features(pictures.expand(-1, 4, -1, -1))
    with pytest.raises(FlowkitError, match=r"do not take pictures of shape \(2, 16, 16\)"):
        features(pictures.expand(-1, 2, -1, -1))


def test_weights_of_ones_own_network_are_in_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_linear.py").write_text(
        "import torch\n"
        "def net(seed):\n"
        "    torch.manual_seed(seed)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))\n"
        "first, again, other = net(0), net(0), net(1)\n"
        "wrong = torch.nn.Identity()\n"
    )
    monkeypatch.chdir(tmp_path)
    first, again, other = (load_extractor(f"my_linear:{n}") for n in ("first", "again", "other"))
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    assert first.id == f"my_linear:first@{first.weights_sha256[:12]}"
    with pytest.raises(FlowkitError, match=r"turned \(3, 1, 8, 8\) into .*expected \(B, d\)"):
        load_extractor("my_linear:wrong")(_digits("test")[:3])


def test_autocast_around_it_changes_nothing() -> None:
    features, pictures = load_extractor("digits"), _digits("test")[:9]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(pictures), features(pictures))
        found = features(pictures)
    assert torch.equal(found, features(pictures))


def test_resnet56_on_real_pictures(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its accuracy on copies that went through JPEG; on the original pixels it is 0.94."""
    monkeypatch.setenv("FLOWKIT_DATA", str(data_root))
    features = load_extractor("cifar-resnet56")
    assert isinstance(features.net, ResNet56)
    assert features.weights_sha256.startswith("4bfd9763")
    rows = load_data("cifar10-jpeg", "test", root=data_root).fetch(range(200))
    parts = features.parts(rows["data"])
    assert parts["features"].shape == (200, 112)
    accuracy = (parts["logits"].argmax(1) == rows["class_labels"]).float().mean()
    assert 0.78 < accuracy < 0.87
    levels = (rows["data"][:50] * 127.5 + 127.5).round().to(torch.uint8)
    torch.testing.assert_close(features(levels), parts["features"][:50], rtol=1e-4, atol=1e-5)


def test_resnet20_on_real_pictures(data_root: Path) -> None:
    features = load_extractor("cifar-resnet20", data_root / "weights" / "resnet20-12fca82f.th")
    rows = load_data("cifar10-jpeg", "test", root=data_root).fetch(range(2000))
    found = features(rows["data"])
    assert found.shape == (2000, 112)
    assert frechet_distance(found[:1000], found[1000:]) == pytest.approx(0.2024, abs=1e-4)
    assert isinstance(features.net, ResNet20)
    guessed = features.net.linear(found[:1000, -64:]).argmax(1)
    assert (guessed == rows["class_labels"][:1000]).float().mean() == pytest.approx(0.804, abs=1e-3)
    blurred = gaussian_blur(rows["data"][:500], kernel_size=[5, 5], sigma=[0.7, 0.7])
    flipped = rows["data"][:500].flip(-1)
    blur, flip = (frechet_distance(features(x), found[:500]) for x in (blurred, flipped))
    assert blur > 20 * flip
