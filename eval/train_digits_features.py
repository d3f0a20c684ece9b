"""Train the network behind the `digits` features and write eval/weights/digits.safetensors.

  python eval/train_digits_features.py [SEED]

Prints its accuracy on the held-out digits and the Fréchet distances that calibrate it.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save
from torch.nn import functional as F

from flowkit.data import load_data
from flowkit.eval.features import DIGITS_WEIGHTS, DigitsNet, Extractor
from flowkit.eval.frechet import frechet_distance
from flowkit.files import atomic_file

STEPS, BATCH = 800, 64


def train(seed: int) -> DigitsNet:
    """800 steps of 64 pictures, AdamW with a one-cycle rate up to 4e-3."""
    torch.manual_seed(seed)
    rows = load_data("digits", "train").fetch(range(1297))
    net = DigitsNet()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        picked = torch.randint(1297, (BATCH,))
        logits = net.classifier(net(rows["data"][picked]))
        F.cross_entropy(logits, rows["class_labels"][picked]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


def main() -> None:
    """Train, report, write."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    torch.set_num_threads(1)
    net = train(seed)
    train_rows = load_data("digits", "train").fetch(range(1297))["data"]
    test_rows = load_data("digits", "test").fetch(range(500))
    with torch.no_grad():
        guessed = net.classifier(net(test_rows["data"])).argmax(1)
    print(f"accuracy {(guessed == test_rows['class_labels']).float().mean():.4f}")
    features = Extractor("digits", net, "cpu")
    real = features(test_rows["data"])
    flat = train_rows.flatten(1).double()
    gaussian = torch.distributions.MultivariateNormal(
        flat.mean(0), flat.T.cov() + 1e-9 * torch.eye(64)
    )
    drawn = gaussian.sample((3000,)).float().reshape(-1, 1, 8, 8).clamp(-1, 1)
    sets = {
        "train": train_rows,
        "Gaussian": drawn,
        "noise": torch.randn(3000, 1, 8, 8).clamp(-1, 1),
    }
    for name, pictures in sets.items():
        print(f"FD({name}, test) {frechet_distance(features(pictures), real):.2f}")
    DIGITS_WEIGHTS.parent.mkdir(exist_ok=True)
    with atomic_file(DIGITS_WEIGHTS) as path:
        # One key, since several are written in random order and the hash names the features.
        # Not save_file: it makes a file that only its owner may read.
        note = {"training": f"seed {seed}, {STEPS} steps of {BATCH}"}
        path.write_bytes(save(net.state_dict(), note))


if __name__ == "__main__":
    main()
