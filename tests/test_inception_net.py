"""The Inception graph: equal to the packages that FIDs are published with, from either file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.inception import inception_v3

from flowkit.errors import FlowkitError
from flowkit.eval import Extractor, load_extractor
from flowkit.eval.inception_net import InceptionNet, folded, load_inception

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
CONVENTIONS = ["clean", "legacy_pytorch", "legacy_tensorflow"]


def _random_state() -> dict[str, Tensor]:
    """Weights by the published names, which are torchvision's, so that activations stay near 1."""
    with torch.device("meta"):
        net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    generator, state = torch.Generator().manual_seed(0), {}
    for name, value in net.state_dict().items():
        if name.endswith("conv.weight"):
            fan = value[0].numel()
            state[name] = torch.randn(value.shape, generator=generator) * (2 / fan) ** 0.5
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.long)
        elif name == "fc.weight":
            state[name] = torch.randn(value.shape, generator=generator) * 0.02
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(value.shape, generator=generator) + 0.5
        else:
            state[name] = torch.randn(value.shape, generator=generator) * 0.1
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return _random_state()


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def extractors(file: Path) -> dict[str, Extractor]:
    return {c: load_extractor(f"inception:{c}", weights=file) for c in CONVENTIONS}


@pytest.fixture(scope="module")
def levels() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, 9, 9, generator=generator)  # not noise: what pictures are like
    smooth = nn.functional.interpolate(coarse, (64, 64), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def port(state: dict[str, Tensor]) -> Iterator[nn.Module]:
    """pytorch-fid's network with these weights; it takes [-1, 1] at 299x299."""
    package = pytest.importorskip("pytorch_fid.inception", reason="needs pytorch-fid")
    patch = pytest.MonkeyPatch()
    patch.setattr(package, "load_state_dict_from_url", lambda url, progress: state)
    yield package.InceptionV3(resize_input=False, normalize_input=False).eval()
    patch.undo()


def _prepared(convention: str, levels: Tensor) -> Tensor:
    """Each convention by the code that its numbers are published with."""
    if convention == "legacy_tensorflow":
        package = pytest.importorskip("torch_fidelity", reason="needs torch-fidelity")
        resize = package.interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x
        return (resize(levels.float(), size=(299, 299), align_corners=False) - 128) / 128
    package = pytest.importorskip("cleanfid.resize", reason="needs clean-fid")
    resize = package.build_resizer(convention)
    rows = [torch.from_numpy(resize(picture)) for picture in levels.permute(0, 2, 3, 1).numpy()]
    resized = torch.stack(rows).permute(0, 3, 1, 2)
    return (resized - 128) / 128 if convention == "clean" else 2 * (resized / 255) - 1


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_equal_to_pytorch_fid_under_each_convention(
    convention: str, levels: Tensor, port: nn.Module, extractors: dict[str, Extractor]
) -> None:
    with torch.no_grad():
        expected = port(_prepared(convention, levels))[0].flatten(1)
    extractor = extractors[convention]
    assert extractor.preprocessing == convention and extractor.dim == 2048
    found = extractor(levels)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert (expected[0] - expected[1]).abs().max() > 0.1  # pictures are told apart


def test_equal_to_torch_fidelity(
    levels: Tensor, file: Path, extractors: dict[str, Extractor]
) -> None:
    package = pytest.importorskip("torch_fidelity", reason="needs torch-fidelity")
    names = ["2048", "logits_unbiased"]
    network = package.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception-v3-compat", names, feature_extractor_weights_path=str(file)
    )
    found = extractors["legacy_tensorflow"].parts(levels[:1])
    for name, expected in zip(["features", "logits"], network(levels[:1]), strict=True):
        torch.testing.assert_close(found[name], expected, **TOLERANCE)


def test_conventions_never_share_a_name(extractors: dict[str, Extractor], file: Path) -> None:
    ids = {extractor.id for extractor in extractors.values()}
    digest = extractors["clean"].weights_sha256
    assert ids == {f"inception:{convention}@{digest[:12]}" for convention in CONVENTIONS}
    assert len(digest) == 64
    assert load_extractor("inception", weights=file).id == extractors["clean"].id
    with pytest.raises(FlowkitError, match="'inception:cleen', did you mean 'inception:clean'"):
        load_extractor("inception:cleen")


def test_spatial_features_are_of_the_block_that_adm_measures(
    state: dict[str, Tensor], extractors: dict[str, Extractor]
) -> None:
    """mixed_6/conv: the 1x1 branch of the seventh mixed block, seven channels, height first."""
    net, seen = extractors["clean"].net, list[Tensor]()
    assert isinstance(net, InceptionNet)
    block = net.Mixed_6d.get_submodule("branch1x1")
    hook = block.register_forward_hook(lambda module, inputs, out: seen.append(out))
    x = torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = net.parts(x)
    hook.remove()
    assert {name: value.shape[1] for name, value in parts.items()} == {
        "features": 2048,
        "logits": 1008,
        "spatial": 2023,
    }
    assert seen[0].shape == (1, 192, 17, 17) and seen[0].min() == 0
    place = parts["spatial"].reshape(17, 17, 7)
    assert torch.equal(place[3, 5], seen[0][0, :7, 3, 5])
    weights = parts["features"] @ state["fc.weight"].T
    torch.testing.assert_close(parts["logits"], weights)


class _Tree(nn.Module):
    """Tensors under dotted names, as a TorchScript archive keeps them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        below: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            head, _, rest = name.partition(".")
            if rest:
                below.setdefault(head, {})[rest] = value
            else:
                self.register_parameter(name, nn.Parameter(value))
        for head, inside in below.items():
            self.add_module(head, _Tree(inside))

    def forward(self, x: Tensor) -> Tensor:
        return x


def _script_names(state: dict[str, Tensor]) -> dict[str, str]:
    """The published names of convolutions to the archive's, spelled out for one block a kind."""
    tower = {
        "branch1x1": "conv",
        "branch5x5_1": "tower.conv",
        "branch5x5_2": "tower.conv_1",
        "branch3x3dbl_1": "tower_1.conv",
        "branch3x3dbl_2": "tower_1.conv_1",
        "branch3x3dbl_3": "tower_1.conv_2",
        "branch7x7_1": "tower.conv",
        "branch7x7_2": "tower.conv_1",
        "branch7x7_3": "tower.conv_2",
        **{f"branch7x7dbl_{i}": f"tower_1.conv_{i - 1}" for i in range(2, 6)},
        "branch7x7dbl_1": "tower_1.conv",
        "branch_pool": "tower_2.conv",
    }
    halving = {
        "branch3x3": "conv",
        "branch3x3dbl_1": "tower.conv",
        "branch3x3dbl_2": "tower.conv_1",
        "branch3x3dbl_3": "tower.conv_2",
    }
    second = {
        "branch3x3_1": "tower.conv",
        "branch3x3_2": "tower.conv_1",
        "branch7x7x3_1": "tower_1.conv",
        **{f"branch7x7x3_{i}": f"tower_1.conv_{i - 1}" for i in range(2, 5)},
    }
    forked = {
        "branch1x1": "conv",
        "branch3x3_1": "tower_conv",
        "branch3x3_2a": "tower_mixed_conv",
        "branch3x3_2b": "tower_mixed_conv_1",
        "branch3x3dbl_1": "tower_1_conv",
        "branch3x3dbl_2": "tower_1_conv_1",
        "branch3x3dbl_3a": "tower_1_mixed_conv",
        "branch3x3dbl_3b": "tower_1_mixed_conv_1",
        "branch_pool": "tower_2_conv",
    }
    stem = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    names = {name: f"conv_{i}" if i else "conv" for i, name in enumerate(stem)}
    kinds = {"5": tower, "6": tower, "6a": halving, "7a": second, "7": forked}
    for i, block in enumerate(["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]):
        inside = kinds.get(block, kinds[block[0]])
        present = {name.split(".")[1] for name in state if name.startswith(f"Mixed_{block}.")}
        title = f"mixed_{i}" if i else "mixed"
        names |= {f"Mixed_{block}.{name}": f"{title}.{inside[name]}" for name in present}
    return names


def test_the_torchscript_archive_gives_the_same_network(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    """The archive has no learned scale in its batch norms, so here it is 1."""
    plain = {k: torch.ones_like(v) if k.endswith("bn.weight") else v for k, v in state.items()}
    tensors = {"output.weight": plain["fc.weight"], "output.bias": plain["fc.bias"]}
    names = _script_names(plain)
    assert len(set(names.values())) == 94  # convolutions of the graph
    kinds = {"conv.weight": "weight", "bn.bias": "beta"}
    kinds |= {"bn.running_mean": "mean", "bn.running_var": "var"}
    for ours, theirs in names.items():
        for kind, other in kinds.items():
            tensors[f"layers.{theirs}.{other}"] = plain[f"{ours}.{kind}"]
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.save(torch.jit.script(_Tree(tensors)), path)
    net, digest = load_inception(path)
    assert len(digest) == 64
    expected = folded(plain)
    assert net.state_dict().keys() == expected.keys()
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_batch_norms_are_folded(state: dict[str, Tensor]) -> None:
    inside = InceptionNet().Mixed_5b.branch1x1
    converted = folded(state)
    keys = [name for name in converted if name.startswith("Mixed_5b.branch1x1.")]
    inside.load_state_dict({key.rpartition(".")[2]: converted[key] for key in keys})
    x = torch.randn(2, 192, 5, 5, generator=torch.Generator().manual_seed(0))
    norm = nn.BatchNorm2d(64, eps=1e-3).eval()
    prefix = "Mixed_5b.branch1x1."
    norm.load_state_dict(
        {k.removeprefix(f"{prefix}bn."): v for k, v in state.items() if k.startswith(f"{prefix}bn")}
    )
    expected = norm(nn.functional.conv2d(x, state[f"{prefix}conv.weight"])).relu()
    torch.testing.assert_close(inside(x), expected, rtol=1e-5, atol=1e-5)


def test_files_that_hold_something_else(tmp_path: Path, state: dict[str, Tensor]) -> None:
    cut: dict[str, Any] = {k: v for k, v in state.items() if not k.startswith("Mixed_7c")}
    torch.save(cut, tmp_path / "cut.pth")
    torch.save(dict(state, **{"fc.weight": torch.zeros(1000, 2048)}), tmp_path / "thousand.pth")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "other.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk" * 9)
    for name in ("cut.pth", "thousand.pth", "other.pt", "junk.pt"):
        with pytest.raises(FlowkitError, match=f"{name} does not hold an? InceptionNet") as caught:
            load_inception(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_pictures_of_every_kind(extractors: dict[str, Extractor], levels: Tensor) -> None:
    """The network itself is taken away: what reaches it is what counts."""
    recipe = replace(extractors["clean"].recipe, net=nn.Flatten(), channels_last=False)
    extractor = Extractor("inception", recipe, "cpu")
    one = levels[:1]
    found = extractor(one)
    assert torch.equal(extractor(one / 127.5 - 1), found)  # floats become the levels they are
    assert torch.equal(extractor((one + 0.4) / 127.5 - 1), found)  # and those in between round
    grey = extractor(one[:, :1]).reshape(3, 299, 299)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    torch.testing.assert_close(grey[0], found.reshape(3, 299, 299)[0], rtol=0, atol=1e-6)
    with pytest.raises(FlowkitError, match="no RGBA pictures, got .1, 4, 64, 64.; put them on"):
        extractor(torch.zeros(1, 4, 64, 64, dtype=torch.uint8))
    for shape in ((1, 2, 8, 8), (3, 8, 8)):
        with pytest.raises(FlowkitError, match=r"take pictures \(B, 1 or 3, H, W\)"):
            extractor(torch.zeros(shape))
    with pytest.raises(FlowkitError, match="2 of 192 pixel values are not finite"):
        bad = torch.zeros(1, 3, 8, 8)
        bad[0, 0, 0, :2] = torch.nan
        extractor(bad)
