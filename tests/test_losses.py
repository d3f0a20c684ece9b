"""Premetrics: their definitions, their presets, and what their gradients reach."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.coupling import Batch
from flowkit.errors import FlowkitError
from flowkit.losses import (
    LPIPS,
    FeatureDistance,
    Perceptual,
    PerceptualHuber,
    huber_c,
    premetric,
    pseudo_huber,
    squared,
)
from flowkit.velocity import interpolate

SHAPE = (3, 8, 8)
D = 192


class Zero(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.zeros(len(a))


class MeanGap(nn.Module):
    """A distance that can be followed by hand."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().flatten(1).mean(1)


class Features(nn.Module):
    """Two layers of random features, with dropout that must be off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.dropout(F.relu(self.first(x)))
        return [first, self.second(first).mean((2, 3))]


@pytest.fixture
def situation() -> tuple[Tensor, Tensor, Tensor, Batch]:
    """v, x_t, t and the batch; t includes both ends."""
    g = torch.Generator().manual_seed(0)
    noise, data, error = (torch.randn(5, *SHAPE, generator=g) for _ in range(3))
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    return data - noise + error, interpolate(noise, data, t), t, Batch(noise, data)


def error_of(v: Tensor, batch: Batch) -> Tensor:
    return v - (batch.data - batch.noise)


class TestPseudoHuber:
    def test_definitions(self) -> None:
        error = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1)).double()
        norm = error.flatten(1).norm(dim=1)
        for reduction, expected in {
            "rfpp": ((norm**2 + 0.09).sqrt() - 0.3) / D,
            "ict": (norm**2 + 0.09).sqrt() - 0.3,
            "elementwise": ((error**2 + 0.09).sqrt() - 0.3).flatten(1).mean(1),
        }.items():
            found = pseudo_huber(error, c=0.3, reduction=reduction)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)

    def test_presets(self) -> None:
        assert huber_c("rfpp", 3072) == pytest.approx(1.6589, abs=5e-5)
        assert huber_c("rfpp", 12288) == pytest.approx(6.6355, abs=5e-5)
        assert huber_c("ict", 3072) == pytest.approx(0.00054 * math.sqrt(3072))
        assert huber_c("elementwise", 3072) == 1e-3
        error = torch.randn(2, *SHAPE)
        for preset in ("rfpp", "ict", "elementwise"):
            torch.testing.assert_close(
                pseudo_huber(error, reduction=preset),
                pseudo_huber(error, c=huber_c(preset, D), reduction=preset),
            )

    @pytest.mark.parametrize("reduction", ["rfpp", "ict", "elementwise"])
    def test_no_error_is_no_loss_and_no_force(self, reduction: str) -> None:
        error = torch.zeros(2, *SHAPE, requires_grad=True)
        loss = pseudo_huber(error, reduction=reduction)
        assert loss.tolist() == [0, 0]
        (gradient,) = torch.autograd.grad(loss.sum(), error)
        assert not gradient.any()

    @pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7])
    def test_small_errors_are_squared_ones(self, size: float) -> None:
        """H d 2c / |error|^2 -> 1, in float32 too, where sqrt(...) - c would be 0."""
        error = torch.full((1, *SHAPE), size)
        c = huber_c("rfpp", D)
        norm2 = D * size**2
        ratio = pseudo_huber(error).item() * D * 2 * c / norm2
        assert ratio == pytest.approx(1.0, abs=norm2 / c**2 + 1e-6)

    def test_large_errors_count_once(self) -> None:
        error = torch.full((1, *SHAPE), 1e6)
        assert pseudo_huber(error).item() == pytest.approx(1e6 * math.sqrt(D) / D, rel=1e-5)

    def test_a_tiny_c_is_the_norm(self) -> None:
        error = torch.randn(3, *SHAPE)
        found = pseudo_huber(error, c=1e-8, reduction="ict")
        torch.testing.assert_close(found, error.flatten(1).norm(dim=1))

    def test_half_precision_is_reduced_in_single(self) -> None:
        error = torch.full((1, 3, 64, 64), 3.0)
        for dtype in (torch.float16, torch.bfloat16):
            found = pseudo_huber(error.to(dtype), reduction="ict")
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, pseudo_huber(error, reduction="ict"))

    def test_bad_input(self) -> None:
        with pytest.raises(FlowkitError, match="'rffp', did you mean 'rfpp'"):
            pseudo_huber(torch.zeros(1, 2), reduction="rffp")  # type: ignore[arg-type]
        with pytest.raises(FlowkitError, match="c must be positive, got 0"):
            pseudo_huber(torch.zeros(1, 2), c=0)


def test_squared(situation: tuple) -> None:
    v, x_t, t, batch = situation
    expected = F.mse_loss(v, batch.data - batch.noise, reduction="none").flatten(1).mean(1)
    torch.testing.assert_close(premetric("squared")(v, x_t, t, batch), expected)
    torch.testing.assert_close(squared(error_of(v, batch)), expected)


def test_huber(situation: tuple) -> None:
    v, x_t, t, batch = situation
    found = premetric("huber", preset="ict", c=0.1)(v, x_t, t, batch)
    torch.testing.assert_close(found, pseudo_huber(error_of(v, batch), c=0.1, reduction="ict"))
    torch.testing.assert_close(
        premetric("huber")(v, x_t, t, batch), pseudo_huber(error_of(v, batch))
    )


class TestPerceptualHuber:
    @pytest.mark.parametrize("divide", [False, True])
    def test_without_the_perceptual_part(self, situation: tuple, divide: bool) -> None:
        v, x_t, t, batch = situation
        found = PerceptualHuber(Zero(), divide=divide)(v, x_t, t, batch)
        assert torch.equal(found, t * pseudo_huber(error_of(v, batch)))

    def test_the_perceptual_part(self, situation: tuple) -> None:
        """The predicted data is off by (1 - t) error."""
        v, x_t, t, batch = situation
        gap = (1 - t) ** 2 * squared(error_of(v, batch))
        huber = t * pseudo_huber(error_of(v, batch))
        plain = PerceptualHuber(MeanGap())(v, x_t, t, batch)
        torch.testing.assert_close(plain, huber + gap)
        divided = PerceptualHuber(MeanGap(), divide=True)(v, x_t, t, batch)
        torch.testing.assert_close(divided[:-1], (huber + gap / (1 - t))[:-1])
        assert divided.isfinite().all()  # at t = 1 too
        alone = Perceptual(MeanGap(), divide=True)(v, x_t, t, batch)
        torch.testing.assert_close(alone[:-1], (gap / (1 - t))[:-1])

    def test_no_error_is_no_loss(self, situation: tuple) -> None:
        _, x_t, t, batch = situation
        for name in ("squared", "huber"):
            assert not premetric(name)(batch.data - batch.noise, x_t, t, batch).any()
        loss = premetric("lpips_huber_1/t", net=Features())
        assert loss(batch.data - batch.noise, x_t, t, batch).max() < 1e-6


@pytest.mark.parametrize("name", ["lpips", "lpips_huber", "lpips_huber_1/t"])
class TestFeatureNetworks:
    def test_gradients_reach_v_alone(self, situation: tuple, name: str) -> None:
        v, x_t, t, batch = situation
        net = Features()
        loss = premetric(name, net=net)
        v.requires_grad_()
        loss(v, x_t, t, batch).sum().backward()
        reached = v.grad.flatten(1).abs().sum(1) > 0
        assert reached[:-1].all() and v.grad.isfinite().all()
        assert all(p.grad is None and not p.requires_grad for p in loss.parameters())
        # The caller's own network stays as it was.
        assert all(p.requires_grad for p in net.parameters()) and net.training

    def test_stays_in_evaluation_mode(self, situation: tuple, name: str) -> None:
        loss = premetric(name, net=Features()).train()
        assert torch.equal(loss(*situation), loss(*situation))

    def test_moves_with_its_network(self, situation: tuple, name: str) -> None:
        loss = premetric(name, net=Features()).to("meta")
        tensors = [*loss.parameters(), *loss.buffers()]
        assert tensors and all(x.device.type == "meta" for x in tensors)

    def test_half_precision_predictions(self, situation: tuple, name: str) -> None:
        v, x_t, t, batch = situation
        found = premetric(name, net=Features())(v.bfloat16(), x_t, t, batch)
        assert found.dtype == torch.float32 and found.shape == (5,)


def test_feature_distance_is_lpips_with_unit_weights() -> None:
    net, (a, b) = Features().eval(), torch.randn(2, 4, *SHAPE)
    expected = torch.zeros(4)
    for f, g in zip(net(a), net(b), strict=True):
        gap = (f / (f.norm(dim=1, keepdim=True) + 1e-10)) - (
            g / (g.norm(dim=1, keepdim=True) + 1e-10)
        )
        gap = gap.square().sum(1)
        expected += gap.mean((1, 2)) if gap.ndim == 3 else gap
    distance = FeatureDistance(net)
    torch.testing.assert_close(distance(a, b), expected)
    torch.testing.assert_close(distance(a, b), distance(b, a))
    assert not distance(a, a).any()
    resized = [F.interpolate(x, size=(16, 16), mode="bilinear") for x in (a, b)]
    torch.testing.assert_close(FeatureDistance(net, size=16)(a, b), distance(*resized))


NETS = ["squeeze", "alex"]  # vgg differs in its table alone, and takes seconds to build


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files as torchvision would store them, with random numbers."""
    import torchvision

    folder, files = tmp_path_factory.mktemp("weights"), {}
    for net, build in {
        "squeeze": torchvision.models.squeezenet1_1,
        "alex": torchvision.models.alexnet,
    }.items():
        torch.manual_seed(0)
        features = {k: v for k, v in build().state_dict().items() if k.startswith("features")}
        files[net] = folder / f"{net}.pth"
        torch.save(features, files[net])
    return files


class TestLPIPS:
    @pytest.mark.parametrize("net", NETS)
    def test_equals_the_lpips_package(self, net: str, random_weights: dict[str, Path]) -> None:
        import lpips

        ours = LPIPS(net, weights=random_weights[net], size=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        theirs.net.load_state_dict(ours.trunk.state_dict())
        a, b = torch.rand(2, 3, 3, 64, 64) * 2 - 1
        expected = theirs(a, b).flatten()
        assert expected.min() > 1e-4
        torch.testing.assert_close(ours(a, b), expected, rtol=1e-4, atol=1e-7)

        small = torch.rand(2, 2, 3, 32, 32) * 2 - 1
        large = [
            F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False) for x in small
        ]
        resizing = LPIPS(net, weights=random_weights[net])
        torch.testing.assert_close(resizing(*small), ours(*large))

    def test_average_pooling(self, random_weights: dict[str, Path]) -> None:
        file = random_weights["squeeze"]
        a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
        averaged = LPIPS("squeeze", weights=file, pooling="average")
        assert not any(isinstance(m, nn.MaxPool2d) for m in averaged.modules())
        assert any(isinstance(m, nn.AvgPool2d) for m in averaged.modules())
        assert not torch.allclose(averaged(a, b), LPIPS("squeeze", weights=file)(a, b), rtol=1e-2)

    def test_a_flat_picture_has_a_finite_gradient(self, random_weights: dict[str, Path]) -> None:
        distance = LPIPS("squeeze", weights=random_weights["squeeze"])
        flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
        distance(flat, torch.rand(1, 3, 32, 32)).backward()
        assert flat.grad is not None and flat.grad.isfinite().all()

    def test_grey_pictures_and_the_frozen_network(self, random_weights: dict[str, Path]) -> None:
        loss = premetric("lpips_huber", net="squeeze", weights=str(random_weights["squeeze"]))
        noise, data = torch.randn(2, 3, 1, 8, 8)
        t = torch.tensor([0.1, 0.5, 0.9])
        v = torch.zeros(3, 1, 8, 8, requires_grad=True)
        found = loss.train()(v, interpolate(noise, data, t), t, Batch(noise, data))
        found.sum().backward()
        assert found.shape == (3,) and v.grad is not None and (v.grad != 0).any()
        assert not any(p.requires_grad for p in loss.parameters())

    def test_latents_are_refused(self, random_weights: dict[str, Path]) -> None:
        distance = LPIPS("squeeze", weights=random_weights["squeeze"])
        with pytest.raises(FlowkitError, match="feature network of your own"):
            distance(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))

    def test_missing_weights_are_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens: no network
        with pytest.raises(FlowkitError) as caught:
            premetric("lpips_huber")
        message = str(caught.value)
        assert "vgg16-397923af.pth" in message and "sha256 397923af" in message
        assert str(tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth") in message
        assert "\n" not in message
        assert not list(tmp_path.rglob("*.pth"))

    def test_wrong_files_are_named(self, tmp_path: Path, random_weights: dict[str, Path]) -> None:
        with pytest.raises(FlowkitError, match="no LPIPS weights at .*nowhere.pth"):
            LPIPS("alex", weights=tmp_path / "nowhere.pth")
        with pytest.raises(FlowkitError, match="does not hold torchvision's alexnet-owt-7be5be79"):
            LPIPS("alex", weights=random_weights["squeeze"])
        (tmp_path / "text.pth").write_text("no weights")
        with pytest.raises(FlowkitError, match="cannot read weights from .*text.pth"):
            LPIPS("alex", weights=tmp_path / "text.pth")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "hubber"}, "unknown premetric 'hubber', did you mean 'huber'"),
        ({"name": "squared", "c": 1.0}, "'squared' has no option 'c'; it takes none"),
        ({"name": "huber", "presett": "ict"}, "no option 'presett', did you mean 'preset'"),
        ({"name": "huber", "preset": "itc"}, "preset 'itc', did you mean 'ict'"),
        ({"name": "huber", "c": -1.0}, "c must be positive, got -1.0"),
        ({"name": "lpips", "net": "vgg19"}, "unknown LPIPS network 'vgg19', did you mean 'vgg'"),
        ({"name": "lpips", "pooling": "mean"}, "pooling must be 'max' or 'average', got 'mean'"),
        ({"name": "lpips", "net": Features(), "pooling": "average"}, "of LPIPS"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(FlowkitError, match=message):
        premetric(**options)
