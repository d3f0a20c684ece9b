"""The command that makes a flow of a checkpoint: what it writes and refuses, and how it is used.

test_convert.py compares its arithmetic with EDM's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowkit.adapters import from_diffusers
from flowkit.config import parse
from flowkit.convert import main
from flowkit.convert_names import score_sde_sources
from flowkit.nets.ncsnpp import NCSNpp
from flowkit.trainers.settings import ReflowConfig
from flowkit.trainers.straighten import straighten


def small(embedding: str = "positional", channels: int = 3) -> NCSNpp:
    options = {"model_channels": 8, "num_blocks": 1, "channel_mult": [1, 2, 2]}
    return NCSNpp(8, in_channels=channels, embedding=embedding, **options).eval()


def save(net: NCSNpp, path: Path) -> None:
    """The network as score_sde keeps it: renamed, linear maps transposed, which undoes itself."""
    state = net.state_dict()
    sources = score_sde_sources(net)
    model = {source.key: source.convert(state[key]) for key, source in sources.items()}
    torch.save({"model": model, "step": 7}, path)


@pytest.mark.parametrize(
    "embedding, options, expected",
    [
        ("positional", [], {"adapter": "flow", "time_scale": 999.0}),
        ("positional", ["--trained-as", "vp-sde"], {"adapter": "vp_linear", "time_scale": 999.0}),
        ("fourier", [], {"adapter": "preconditioned", "kind": "ve", "sigma_max": 100.0}),
    ],
)
def test_score_sde(tmp_path, capsys, embedding, options, expected):
    net, out = small(embedding), tmp_path / "flow"
    save(net, tmp_path / "net.pth")
    main(["score_sde", str(tmp_path / "net.pth"), str(out), "--sample-size", "8", *options])
    assert f"{net.num_parameters():,} parameters" in capsys.readouterr().out
    velocity = from_diffusers(out)
    assert expected.items() <= velocity.description().items()
    state = velocity.net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert "licence" in (out / "README.md").read_text()
    if expected["adapter"] == "flow":
        x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.0, 0.7])
        with torch.no_grad():
            assert torch.equal(velocity(x, t), net(x, 999 * t).sample)


def test_ve_networks_of_unit_pictures_fit(tmp_path):
    """score_sde's VE nets saw u = (x + 1) / 2 at half the sigma, and F(2 u - 1, log) / sigma is the
    score there: D(u) = u + sigma F, hence D(x) = x + 2 sigma F for pictures in [-1, 1]."""
    net = small("fourier")
    save(net, tmp_path / "net.pth")
    words = ["score_sde", str(tmp_path / "net.pth"), str(tmp_path / "flow"), "--sample-size", "8"]
    main(words)
    velocity = from_diffusers(tmp_path / "flow")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.05, 0.6])
    wide = t[:, None, None, None]
    unit, half = (x / wide + 1) / 2, (1 - wide) / wide / 2
    with torch.no_grad():
        denoised = 2 * (unit + half * net(2 * unit - 1, half.flatten().log()).sample) - 1
        v = velocity(x, t)
    torch.testing.assert_close(v, (denoised - x) / (1 - wide), rtol=1e-4, atol=1e-4)


def test_the_folder_is_a_teacher(tmp_path):
    save(small("fourier", channels=1), tmp_path / "net.pth")
    main(["score_sde", str(tmp_path / "net.pth"), str(tmp_path / "flow"), "--sample-size", "8"])
    words = [
        *(f"teacher={tmp_path / 'flow'}", f"output_dir={tmp_path / 'run'}", "sample_every=0"),
        *("pairs.num_pairs=4", "pairs.num_steps=2", "pairs.grid=edm", "control=false"),
        *("student_training.steps=2", "student_training.batch_size=2", "distillation.steps=0"),
        *("evaluate.nfe=[1]", "evaluate.num_samples=4", "evaluate.straightness_samples=2"),
    ]
    straighten(parse(ReflowConfig, words, doc=""))
    student, teacher = (from_diffusers(tmp_path / name) for name in ("run/student", "flow"))
    assert student.description() == teacher.description()


@pytest.mark.parametrize(
    "words, message",
    [
        ("edm absent.pth new", "no checkpoint at absent.pth"),
        ("edm net.pth", "arguments are required: OUT_DIR; see python -m flowkit.convert edm"),
        ("edm net.pth full", "full is there already"),
        ("edm net.pth new", "not a state dict of an EDM network"),
        ("edm net.pth new --kind iddpm", "invalid choice: 'iddpm'"),
        ("edm net.pth new --sigma-max 0", "sigma must have a range above 0"),
        ("score_sde net.pth new", "arguments are required: --sample-size"),
        ("score_sde net.pth new --sample-size 6", "cannot be halved 2 times"),
        (
            "score_sde net.pth new --sample-size 8 --trained-as vp-sde",
            "Fourier features of log sigma, so it was not trained as vp-sde; choose --trained-as "
            "ve-sde",
        ),
    ],
)
def test_refusals_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    save(small("fourier"), tmp_path / "net.pth")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    error = capsys.readouterr().err
    assert caught.value.code == 1 and error.count("\n") == 1 and message in error
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_help_does_not_import_torch():
    code = (
        "import sys; from flowkit.convert import main\n"
        "try: main(['score_sde', '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--sample-size" in done.stdout
