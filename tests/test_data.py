from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from flowkit.data import data_folder, load_data
from flowkit.errors import FlowkitError
from flowkit.pictures import channels_first


def levels(seed, height=6, width=6):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(array))


def as_data(*arrays):
    """What fetch should give: (B, C, H, W) in [-1, 1]."""
    return channels_first(np.stack(arrays)) / 127.5 - 1


@pytest.fixture
def folder(tmp_path):
    """Class folders cat (0) and dog (1) with two pictures each, and files to be overlooked."""
    for seed, name in enumerate(["cat/a.png", "cat/deep/b.PNG", "dog/a.png", "dog/c.png"]):
        write(tmp_path / "set" / name, levels(seed))
    (tmp_path / "set" / "notes.txt").write_text("no picture")
    write(tmp_path / "set" / "dog" / "._c.png", levels(9))
    return tmp_path / "set"


@pytest.fixture
def archive(tmp_path):
    """A zip in EDM's layout: numbered folders, labels in dataset.json."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        names = [f"0000{i % 2}/img{i:08d}.png" for i in range(8)]
        for seed, name in enumerate(names):
            file.writestr(name, png(levels(seed)))
        labels = [[name, seed % 3] for seed, name in enumerate(names)]
        file.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def test_digits_are_split_as_documented():
    train, test = load_data("digits"), load_data("digits", "test")
    assert (len(train), len(test)) == (1297, 500)
    assert train.shape == (1, 8, 8) and train.num_classes == 10
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    bunch = load_digits()
    both = torch.cat([d.fetch(range(len(d)))["data"] for d in (train, test)])
    expected = torch.from_numpy(bunch.images)[order].float() / 8 - 1
    assert both.dtype == torch.float32
    assert torch.equal(both[:, 0], expected)
    labels = torch.cat([d.fetch(range(len(d)))["class_labels"] for d in (train, test)])
    assert torch.equal(labels, torch.from_numpy(bunch.target)[order])
    assert both.min() == -1 and both.max() == 1


def test_indices_may_be_a_list_a_range_or_a_tensor():
    data = load_data("digits")
    for indices in ([5, 2, 5], torch.tensor([5, 2, 5]), np.array([5, 2, 5])):
        rows = data.fetch(indices)
        assert torch.equal(rows["data"], data.fetch(range(6))["data"][[5, 2, 5]])
        assert rows["class_labels"].dtype == torch.int64


def test_fingerprint_follows_content():
    one = load_data("digits").fingerprint()
    assert one == load_data("digits").fingerprint()
    others = {load_data("digits", "test").fingerprint(), load_data("digits", size=4).fingerprint()}
    assert len({one, *others}) == 3


def test_cifar_pack_decodes_to_the_published_hash(data_root):
    data = load_data("cifar10-jpeg", "test", root=data_root)
    assert len(data) == 10000 and data.shape == (3, 32, 32) and data.num_classes == 10
    rows = (data.fetch(range(10000))["data"] + 1) * 127.5
    nhwc = rows.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    digest = hashlib.sha256(nhwc.numpy().tobytes()).hexdigest()
    if Image.__version__ == "13.0.0":  # another libjpeg may differ by a level here and there
        assert digest == "5fce8f6a84d7de12f276662376ce80f5f19c236502ddae2e16c3f187c0386c13"
    means = rows.mean((0, 2, 3)) / 255  # the original pictures': 0.4942, 0.4851, 0.4504
    assert torch.allclose(means, torch.tensor([0.4942, 0.4851, 0.4504]), atol=2e-3)
    assert data.fetch(range(20))["class_labels"].tolist() == [*range(10), *range(10)]


def test_mnist_pack_is_found_through_the_environment(data_root, monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWKIT_DATA", str(data_root))
    data = load_data("mnist", "test")
    with np.load(data_root / "mnist_test.npz") as pack:
        picture, label = pack["images"][7], pack["labels"][7]
    rows = data.fetch([7])
    assert data.shape == (1, 28, 28) and len(data) == 10000
    assert torch.equal(rows["data"], as_data(picture)) and rows["class_labels"].item() == label
    monkeypatch.setenv("FLOWKIT_DATA", str(tmp_path))
    assert data_folder() == tmp_path and data_folder(data_root) == data_root
    with pytest.raises(FlowkitError, match=f"no {tmp_path}/mnist_train.npz; set FLOWKIT_DATA"):
        load_data("mnist")


def test_a_broken_pack_is_named(tmp_path):
    (tmp_path / "mnist_train.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(FlowkitError, match=r"mnist_train.npz is not a whole 'mnist' pack"):
        load_data("mnist", root=tmp_path)


@pytest.mark.parametrize("prefix", ["", "folder:"])
def test_folder_with_class_folders(folder, prefix):
    data = load_data(f"{prefix}{folder}")
    assert len(data) == 4 and data.shape == (3, 6, 6) and data.num_classes == 2
    rows = data.fetch([3, 0, 1])
    assert torch.equal(rows["data"], as_data(levels(3), levels(0), levels(1)))
    assert rows["class_labels"].tolist() == [1, 0, 0]
    assert load_data(f"{prefix}{folder}", size=4).fetch([0, 1])["data"].shape == (2, 3, 4, 4)
    with pytest.raises(FlowkitError, match="split 'test'; known: train$"):
        load_data(f"{prefix}{folder}", "test")


def test_folder_relative_to_root_and_with_splits(tmp_path):
    write(tmp_path / "faces/train/x.png", levels(0))
    write(tmp_path / "faces/test/y.png", levels(1))
    data = load_data("folder:faces", "test", root=tmp_path)
    assert torch.equal(data.fetch([0])["data"], as_data(levels(1)))
    assert data.num_classes is None and "class_labels" not in data.fetch([0])
    with pytest.raises(FlowkitError, match="unknown folder:faces split 'val'; known: test, train"):
        load_data("folder:faces", "val", root=tmp_path)


def test_dataset_json_overrules_class_folders(folder):
    (folder / "dataset.json").write_text('{"labels": null}')
    assert load_data(str(folder)).num_classes is None
    (folder / "dataset.json").write_text('{"labels": [["cat/a.png", 1]]}')
    with pytest.raises(FlowkitError, match="does not give each picture's label"):
        load_data(str(folder))


def test_zip_with_labels(archive):
    data = load_data(str(archive))
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # sorted by name
    assert len(data) == 8 and data.num_classes == 3
    rows = data.fetch(range(8))
    assert torch.equal(rows["data"], as_data(*(levels(i) for i in order)))
    assert rows["class_labels"].tolist() == [i % 3 for i in order]


def fetch_with_workers(data):
    loader = DataLoader(range(len(data)), batch_size=2, collate_fn=data.fetch, num_workers=2)
    return torch.cat([rows["data"] for rows in loader])


def test_workers_read_a_zip_that_is_already_open(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as file:
        for seed in range(200):
            file.writestr(f"{seed:03d}.png", png(levels(seed, 48, 48)))
    data = load_data(str(tmp_path / "many.zip"))
    expected = data.fetch(range(200))["data"]
    for _ in range(3):  # workers that shared one handle would read at each other's position
        assert torch.equal(fetch_with_workers(data), expected)


@pytest.mark.parametrize("source", ["archive", "folder"])
def test_other_processes_read_the_same(source, request):
    data = load_data(str(request.getfixturevalue(source)))
    assert torch.equal(fetch_with_workers(data), data.fetch(range(len(data)))["data"])
    copy = pickle.loads(pickle.dumps(data))  # as a spawned worker gets it
    assert torch.equal(copy.fetch([1])["data"], data.fetch([1])["data"])
    assert copy.fingerprint() == data.fingerprint()


def test_a_zip_written_anew_is_read_anew(archive):
    before = load_data(str(archive))
    first = before.fetch([0])["data"]
    archive.unlink()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x.png", png(levels(50)))
    after = load_data(str(archive))
    assert not torch.equal(after.fetch([0])["data"], first)
    assert before.fingerprint() != after.fingerprint()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_corrupted_zip_is_named(method, tmp_path):
    path = tmp_path / "broken.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("x.png", png(levels(0)))
    raw = path.read_bytes()
    for start in range(36, 120, 8):  # in the picture: what is packed or its checksum do not fit
        path.write_bytes(raw[:start] + b"\xff" * 4 + raw[start + 4 :])
        os.utime(path, ns=(start, start))
        with pytest.raises(FlowkitError, match="broken.zip/x.png is not a readable picture"):
            load_data(str(path)).fetch([0])
    path.write_bytes(raw[:100])
    with pytest.raises(FlowkitError, match="broken.zip is not a readable zip"):
        load_data(str(path))


def test_a_folder_without_pictures_or_with_strays(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FlowkitError, match="holds no pictures"):
        load_data(str(tmp_path / "empty"))
    write(folder / "stray.png", levels(7))
    with pytest.raises(FlowkitError, match="both in class folders and beside them"):
        load_data(str(folder))


def test_torchvision_from_a_local_root(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    pictures = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5], np.uint8)
    for kind in ("train", "t10k"):  # torchvision wants both splits' files
        for name, array in {"images-idx3": pictures, "labels-idx1": labels}.items():
            head = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
            (folder / f"{kind}-{name}-ubyte").write_bytes(head + array.tobytes())
    data = load_data("torchvision:mnist", "test", root=tmp_path)
    rows = data.fetch(range(5))
    assert data.shape == (1, 28, 28) and data.name == "torchvision:MNIST"
    assert torch.equal(rows["data"], as_data(*pictures))
    assert rows["class_labels"].tolist() == labels.tolist()


def test_torchvision_pictures_that_stay_on_disk(tmp_path):
    folder = tmp_path / "food-101"
    for seed, name in enumerate(["pie/1", "pie/2", "soup/1"]):
        write(folder / "images" / f"{name}.jpg", levels(seed))
    (folder / "meta").mkdir()
    names = '{"pie": ["pie/1", "pie/2"], "soup": ["soup/1"]}'
    for split in ("train", "test"):
        (folder / "meta" / f"{split}.json").write_text(names)
    data, other = (load_data("torchvision:Food101", s, root=tmp_path) for s in ("train", "test"))
    assert data.fingerprint() != other.fingerprint()
    rows = data.fetch([2, 0])
    assert torch.equal(rows["data"], as_data(levels(2), levels(0)))
    assert rows["class_labels"].tolist() == [1, 0]
    assert torch.equal(fetch_with_workers(data)[0], as_data(levels(0))[0])


@pytest.mark.parametrize("name", ["cifar10", "torchvision:CIFAR10"])
def test_absent_torchvision_files_are_named(name, tmp_path):
    with pytest.raises(FlowkitError) as caught:
        load_data(name, root=tmp_path)
    for part in ("torchvision:CIFAR10 (train)", str(tmp_path / "cifar-10-batches-py"), "download="):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_data_set_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"id": datasets.Value("int32"), "img": datasets.Image(), "kind": datasets.ClassLabel(3)}
    )
    pictures = [{"bytes": png(levels(i)), "path": None} for i in range(3)]
    records = {"id": [0, 1, 2], "img": pictures, "kind": [2, 0, 1]}
    table = datasets.Dataset.from_dict(records, features=features)
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "d")
    data = load_data(f"hf:{tmp_path / 'd'}")
    assert data.num_classes == 3 and len(data) == 3
    rows = data.fetch([2, 0])
    assert torch.equal(rows["data"], as_data(levels(2), levels(0)))
    assert rows["class_labels"].tolist() == [1, 2]
    assert torch.equal(fetch_with_workers(data)[0], as_data(levels(0))[0])
    assert len(load_data(f"hf:{tmp_path / 'd'}", "test", size=3)) == 1
    with pytest.raises(FlowkitError, match="split 'val'; known: train, test"):
        load_data(f"hf:{tmp_path / 'd'}", "val")


def test_hub_data_set_without_pictures_or_network(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d")
    with pytest.raises(FlowkitError, match="has no column of pictures, only text"):
        load_data(f"hf:{tmp_path / 'd'}")
    with pytest.raises(FlowkitError, match="hf:nobody/nothing cannot be loaded") as caught:
        load_data("hf:nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("digit", {}, r"unknown data set 'digit', did you mean 'digits'\?; known: digits, "),
        ("cifar10-jpg", {}, "did you mean 'cifar10-jpeg'"),
        (
            "torchvision:CIFAR11",
            {},
            "unknown torchvision data set 'cifar11', did you mean 'cifar10",
        ),
        ("folder:nowhere", {}, r"no folder or zip of pictures at /\S+/nowhere"),
        ("some/where", {}, r"no folder or zip of pictures at /\S+/some/where"),
        ("pictures.zip", {}, r"no folder or zip of pictures at /\S+/pictures.zip"),
        ("digits", {"split": "val"}, "unknown digits split 'val'; known: train, test"),
        ("mnist", {"split": "val"}, "unknown mnist split 'val'; known: train, test"),
        ("torchvision:mnist", {"split": "val"}, "unknown torchvision:MNIST split 'val'; known: tr"),
        ("digits", {"size": 0}, "size must be at least 1 pixel, got 0"),
    ],
)
def test_mistakes_are_told(name, options, message):
    with pytest.raises(FlowkitError, match=message):
        load_data(name, **options)
