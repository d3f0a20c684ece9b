"""The feature extractors: their calibration on real pictures, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from flowkit.data import load_data
from flowkit.errors import FlowkitError
from flowkit.eval import frechet_distance, load_extractor
from flowkit.eval.features import DigitsNet


def _digits(split: str) -> Tensor:
    data = load_data("digits", split)
    return data.fetch(range(len(data)))["data"]


def test_the_digits_network_classifies_and_orders_sets() -> None:
    features = load_extractor("digits")
    data = load_data("digits", "test")
    rows = data.fetch(range(len(data)))
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
    monkeypatch.syspath_prepend(tmp_path)
    features = load_extractor("my_features:flat")
    pictures = _digits("test")[:3]
    assert torch.equal(features(pictures), pictures.flatten(1) * 2)
    assert features.id == "my_features:flat"


@pytest.mark.parametrize(
    "name, message",
    [
        ("digit", "did you mean 'digits'"),
        ("no_such_module:thing", "no_such_module"),
        ("math:nothing", "nothing"),
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
    torch.save(DigitsNet().state_dict(), tmp_path / "other.pt")
    with pytest.raises(FlowkitError, match="does not hold a ResNet20"):
        load_extractor("cifar-resnet20", weights=tmp_path / "other.pt")


def test_pictures_that_do_not_fit() -> None:
    with pytest.raises(FlowkitError, match=r"'digits@.* \(3, 32, 32\)"):
        load_extractor("digits")(torch.zeros(2, 3, 32, 32))


def test_resnet20_on_real_pictures(data_root: Path) -> None:
    features = load_extractor("cifar-resnet20", data_root / "weights" / "resnet20-12fca82f.th")
    rows = load_data("cifar10-jpeg", "test", root=data_root).fetch(range(2000))
    found = features(rows["data"])
    assert found.shape == (2000, 112)
    assert frechet_distance(found[:1000], found[1000:]) == pytest.approx(0.2024, abs=1e-4)
    guessed = features.net.linear(found[:1000, -64:]).argmax(1)
    assert (guessed == rows["class_labels"][:1000]).float().mean() == pytest.approx(0.804, abs=1e-3)
    blurred = gaussian_blur(rows["data"][:500], kernel_size=[5, 5], sigma=[0.7, 0.7])
    flipped = rows["data"][:500].flip(-1)
    blur, flip = (frechet_distance(features(x), found[:500]) for x in (blurred, flipped))
    assert blur > 20 * flip
