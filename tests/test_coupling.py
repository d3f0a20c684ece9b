"""Couplings: which noise goes with which data, and what chance decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowkit.coupling import Annealed, Batch, Independent, Mixed, Paired
from flowkit.errors import FlowkitError

SHAPE = (2, 3, 4)


class Rows:
    """Rows that carry their own number: data[i] = i + a fixed picture; "noise" if paired."""

    def __init__(
        self, count: int, *, first: int = 0, paired: bool = True, labels: bool = True
    ) -> None:
        self.count, self.first, self.paired, self.labels = count, first, paired, labels
        self.shape = SHAPE
        self.picture = torch.arange(24.0).reshape(SHAPE) / 100

    def __len__(self) -> int:
        return self.count

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        numbers = torch.as_tensor(indices)
        assert len(numbers) and 0 <= numbers.min() and numbers.max() < self.count
        data = (numbers + self.first).float().reshape(-1, 1, 1, 1) + self.picture
        rows = {"data": data}
        if self.paired:
            rows["noise"] = -data
        if self.labels:
            rows["class_labels"] = numbers + self.first
        return rows


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(batch: Batch) -> list[int]:
    return batch.data.amin((1, 2, 3)).round().int().tolist()


class TestIndependent:
    def test_noise_is_fresh_at_every_draw(self) -> None:
        coupling = Independent(Rows(500, paired=False))
        rows, generator = coupling.fetch(range(500)), seeded()
        first, second = coupling.couple(rows, generator), coupling.couple(rows, generator)
        assert torch.equal(first.data, rows["data"]) and torch.equal(second.data, rows["data"])
        assert not (first.noise == second.noise).any()
        both = torch.stack([first.noise, second.noise])
        assert abs(both.mean()) < 0.03 and abs(both.std() - 1) < 0.03
        assert abs(torch.corrcoef(both.flatten(1))[0, 1]) < 0.03

    def test_conditioning_is_kept_or_dropped(self) -> None:
        data = Rows(5, paired=False)
        batch = Independent(data).couple(Independent(data).fetch([3, 1]))
        assert batch.cond["class_labels"].tolist() == [3, 1]
        bare = Independent(data, labels=False)
        assert bare.couple(bare.fetch([3, 1])).cond == {}

    def test_flip_mirrors_the_data_per_sample(self) -> None:
        coupling = Independent(Rows(400, paired=False), flip=True)
        rows = coupling.fetch(range(400))
        data = coupling.couple(rows, seeded()).data
        kept = (data == rows["data"]).flatten(1).all(1)
        mirrored = (data == rows["data"].flip(-1)).flatten(1).all(1)
        assert (kept ^ mirrored).all()
        assert 140 < mirrored.sum() < 260


class TestPaired:
    def test_pairs_stay_together(self) -> None:
        coupling = Paired(Rows(9))
        batch = coupling.couple(coupling.fetch([4, 8, 4]))
        assert numbers(batch) == [4, 8, 4]
        assert torch.equal(batch.noise, -batch.data)
        assert batch.cond["class_labels"].tolist() == [4, 8, 4]

    def test_flip_mirrors_noise_and_data_alike(self) -> None:
        coupling = Paired(Rows(400), flip=True)
        rows = coupling.fetch(range(400))
        batch = coupling.couple(rows, seeded())
        assert torch.equal(batch.noise, -batch.data)
        mirrored = (batch.data == rows["data"].flip(-1)).flatten(1).all(1)
        assert 140 < mirrored.sum() < 260

    def test_flip_commutes_with_the_line_between(self) -> None:
        """Mirroring the pair and then interpolating is mirroring x_t."""
        rows = Rows(50).fetch(range(50))
        plain = Paired(Rows(50)).couple(rows)
        flipped = Paired(Rows(50), flip=True).couple(rows, seeded())
        heads = ~(flipped.data == plain.data).flatten(1).all(1)
        line = [0.3 * b.data + 0.7 * b.noise for b in (plain, flipped)]
        torch.testing.assert_close(line[1][heads], line[0][heads].flip(-1))
        torch.testing.assert_close(line[1][~heads], line[0][~heads])


class TestAnnealed:
    @pytest.mark.parametrize("flip", [False, True])
    def test_beta_1_is_a_1_rectified_flow_on_the_pairs_data(self, flip: bool) -> None:
        rows = Paired(Rows(60)).fetch(range(60))
        annealed = Annealed(Paired(Rows(60), flip=flip), beta=1.0)
        plain = Independent(Rows(60, paired=False), flip=flip)
        bare = {name: value for name, value in rows.items() if name != "noise"}
        ours, theirs = seeded(), seeded()
        a, b = annealed.couple(rows, ours), plain.couple(bare, theirs)
        assert torch.equal(a.noise, b.noise) and torch.equal(a.data, b.data)
        assert torch.equal(a.cond["class_labels"], b.cond["class_labels"])
        assert torch.equal(ours.get_state(), theirs.get_state())  # and all that is drawn later

    @pytest.mark.parametrize("flip", [False, True])
    def test_beta_0_is_reflow(self, flip: bool) -> None:
        pairs = Paired(Rows(60), flip=flip)
        ours, theirs = seeded(), seeded()
        a = Annealed(pairs, 0.0).couple(pairs.fetch(range(60)), ours)
        b = pairs.couple(pairs.fetch(range(60)), theirs)
        assert torch.equal(a.noise, b.noise) and torch.equal(a.data, b.data)
        assert torch.equal(ours.get_state(), theirs.get_state())

    @pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
    def test_the_noise_keeps_its_law_and_leans_on_the_pairs_own(self, beta: float) -> None:
        """Var = 1 and Cov = sqrt(1 - beta^2), within 5 standard errors of 240,000 numbers."""
        own = torch.randn(10_000, *SHAPE, generator=seeded(1))
        data = torch.randn(10_000, *SHAPE, generator=seeded(2))
        noise = Annealed(Paired(Rows(1)), beta).couple({"noise": own, "data": data}, seeded()).noise
        for moment, wanted in (
            (noise.mean(), 0.0),
            (noise.square().mean(), 1.0),
            ((noise * own).mean(), (1 - beta**2) ** 0.5),
            ((noise * data).mean(), 0.0),
        ):
            assert moment.item() == pytest.approx(wanted, abs=5 * (2 / 240_000) ** 0.5)

    def test_each_sample_is_turned_by_the_formula(self) -> None:
        rows = Paired(Rows(9)).fetch(range(9))
        fresh = torch.randn(rows["noise"].shape, generator=seeded(4))
        noise = Annealed(Paired(Rows(9)), 0.6).couple(rows, seeded(4)).noise
        torch.testing.assert_close(noise, 0.8 * rows["noise"] + 0.6 * fresh)

    def test_flip_mirrors_the_whole_line_from_the_pair(self) -> None:
        """x_t of a mirrored pair is the mirrored x_t, but for the fresh noise."""
        rows = Paired(Rows(50)).fetch(range(50))
        batch = Annealed(Paired(Rows(50), flip=True), 0.6).couple(rows, seeded())
        generator = seeded()
        heads = torch.rand(50, 1, 1, 1, generator=generator) < 0.5
        fresh = torch.randn(rows["noise"].shape, generator=generator)
        own = 0.3 * (batch.noise - 0.6 * fresh) + 0.7 * batch.data
        line = 0.3 * 0.8 * rows["noise"] + 0.7 * rows["data"]
        assert 0 < heads.sum() < 50
        torch.testing.assert_close(own, torch.where(heads, line.flip(-1), line))

    def test_real_pictures_are_turned_with_the_pairs(self) -> None:
        mixed = Mixed(Paired(Rows(30)), Paired(Rows(30, first=5000)), 0.5)
        annealed = Annealed(mixed, 0.5)
        batch = annealed.couple(annealed.fetch(range(60)), seeded())
        assert len(annealed) == 60 and batch.cond["class_labels"].tolist() == numbers(batch)
        assert not (batch.noise == -batch.data).any()

    @pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
    def test_beta_is_a_share(self, beta: float) -> None:
        with pytest.raises(FlowkitError, match=r"beta must lie in \[0, 1\], got"):
            Annealed(Paired(Rows(4)), beta)
        annealed = Annealed(Paired(Rows(4)), 0.5)
        with pytest.raises(FlowkitError, match="beta must lie"):
            annealed.beta = beta
        assert annealed.beta == 0.5


class TestMixed:
    @pytest.mark.parametrize(
        "first, second, share", [(100, 100, 0.5), (1000, 37, 0.25), (10, 90, 0.1), (7, 3, 0.9)]
    )
    def test_share_and_cover(self, first: int, second: int, share: float) -> None:
        mixed = Mixed(Paired(Rows(first)), Paired(Rows(second, first=5000)), share)
        seen = torch.tensor(numbers(mixed.couple(mixed.fetch(range(len(mixed))))))
        from_second = seen >= 5000
        assert from_second.float().mean().item() == pytest.approx(share, abs=1 / len(mixed))
        for part, size in ((seen[~from_second], first), (seen[from_second] - 5000, second)):
            times = torch.bincount(part, minlength=size)
            assert len(times) == size and times.min() >= 1
            assert times.max() - times.min() <= 1

    def test_random_batches_hold_the_share(self) -> None:
        mixed = Mixed(Paired(Rows(300)), Paired(Rows(50, first=5000)), 0.3)
        order = torch.randint(len(mixed), (4000,), generator=seeded())
        batch = mixed.couple(mixed.fetch(order))
        assert len(batch) == 4000
        share = (batch.data.amin((1, 2, 3)) > 4000).float().mean().item()
        assert share == pytest.approx(0.3, abs=0.03)
        assert torch.equal(batch.noise, -batch.data)
        assert batch.cond["class_labels"].tolist() == numbers(batch)

    @pytest.mark.parametrize("rows", [[0, 1], [199, 198], [0, 199]])
    def test_batches_of_one_part_alone(self, rows: list[int]) -> None:
        mixed = Mixed(Paired(Rows(100)), Paired(Rows(100, first=5000)), 0.5)
        assert len(mixed.couple(mixed.fetch(rows))) == 2

    def test_each_part_couples_in_its_own_way(self) -> None:
        mixed = Mixed(Paired(Rows(10)), Independent(Rows(10, first=5000, paired=False)), 0.5)
        batch = mixed.couple(mixed.fetch(range(20)), seeded())
        torch.testing.assert_close(batch.noise[:10], -batch.data[:10])
        assert batch.noise[10:].abs().max() < 6

    def test_bad_input(self) -> None:
        pairs = Paired(Rows(4))
        for share in (0.0, 1.0, -0.5, float("nan")):
            with pytest.raises(FlowkitError, match="share must lie between 0 and 1"):
                Mixed(pairs, pairs, share)
        other = Rows(4)
        other.shape = (1, 3, 4)
        with pytest.raises(FlowkitError, match=r"one shape, got \(2, 3, 4\) and \(1, 3, 4\)"):
            Mixed(pairs, Paired(other), 0.5)
        mixed = Mixed(pairs, Paired(Rows(4, labels=False)), 0.5)
        with pytest.raises(FlowkitError, match="same conditioning"):
            mixed.couple(mixed.fetch(range(8)))


@pytest.mark.parametrize(
    "coupling",
    [
        Independent(Rows(40, paired=False), flip=True),
        Paired(Rows(40), flip=True),
        Annealed(Paired(Rows(40), flip=True), 0.5),
        Mixed(Paired(Rows(40), flip=True), Independent(Rows(9, paired=False), flip=True), 0.5),
    ],
    ids=["independent", "paired", "annealed", "mixed"],
)
def test_a_generator_decides_everything(
    coupling: Independent | Paired | Annealed | Mixed,
) -> None:
    assert coupling.shape == SHAPE
    rows = coupling.fetch(range(20, 60) if isinstance(coupling, Mixed) else range(40))
    first, again, other = (coupling.couple(rows, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first.data, again.data) and torch.equal(first.noise, again.noise)
    assert not torch.equal(first.data, other.data)
    torch.manual_seed(1)
    assert torch.equal(coupling.couple(rows).noise, first.noise)  # else torch's own generator


def test_flip_needs_pictures() -> None:
    points = Rows(4)
    points.shape = (2,)
    for coupling in (Independent, Paired):
        with pytest.raises(FlowkitError, match=r"flip mirrors pictures .* shape \(2,\)"):
            coupling(points, flip=True)


def test_a_batch_moves_whole() -> None:
    batch = Batch(torch.zeros(3, 2), torch.ones(3, 2), {"class_labels": torch.arange(3)})
    moved = batch.to("meta")
    assert len(moved) == 3
    assert {moved.noise.device.type, moved.data.device.type} == {"meta"}
    assert moved.cond["class_labels"].device.type == "meta"
