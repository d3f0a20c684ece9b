"""DINOv2, CLIP and LPIPS as extractors, of random weights: equal to the packages they are from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.eval import Extractor, load_extractor
from flowkit.eval import dinov2_net as dino
from flowkit.eval.clip_score import ClipScore, clip_scores
from flowkit.eval.dinov2_net import DinoV2Net, convert, load_dinov2
from flowkit.eval.encoders import LPIPS_FILES, load_clip
from flowkit.perceptual import LPIPS

WIDTH, DEPTH, HEADS = 24, 2, 3
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def levels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 40, 40), generator=generator, dtype=torch.uint8)


def _by_pillow(levels: Tensor, size: int, mean: Any, deviation: Any) -> Tensor:
    rows = []
    for picture in levels.permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
        rows.append((np.asarray(image) / 255 - np.array(mean)) / np.array(deviation))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float()


def _dinov2(gated: bool) -> Any:
    """transformers' DINOv2 of this size with weights that are not their first values."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=gated,
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_is_the_network_of_transformers(
    gated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: Tensor
) -> None:
    model = _dinov2(gated)
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(dino.SIZES, "vits14", (WIDTH, DEPTH, HEADS, gated, "tiny"))
    net, digest, width = load_dinov2("vits14", tmp_path)
    assert width == WIDTH and len(digest) == 64
    with torch.no_grad():  # the places as the authors make them, so that it makes none of its own
        model.embeddings.position_embeddings = nn.Parameter(net.pos_embed)
        x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(net(x), model(x).pooler_output, **TOLERANCE)
        mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        expected = model(_by_pillow(levels, 224, mean, deviation)).pooler_output
    features = load_extractor("dinov2-vits14", weights=tmp_path)
    assert features.preprocessing == "pillow" and features.id.startswith("dinov2-vits14:pillow@")
    torch.testing.assert_close(features(levels), expected, rtol=0, atol=2e-3)
    assert not torch.equal(load_extractor("dinov2-vits14:clean", tmp_path)(levels), expected)


def test_dinov2_of_the_authors_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _dinov2(False)
    model.save_pretrained(tmp_path)
    state = dict(load_file(tmp_path / "model.safetensors"))
    published = {"pos_embed": state["embeddings.position_embeddings"]}
    published |= {k: v for k, v in convert(state).items() if k != "pos_embed"}
    published["mask_token"] = torch.zeros(1, WIDTH)
    torch.save(published, tmp_path / "dinov2_vits14_pretrain.pth")
    monkeypatch.setitem(dino.SIZES, "vits14", (WIDTH, DEPTH, HEADS, False, "tiny"))
    monkeypatch.setenv("FLOWKIT_WEIGHTS", str(tmp_path))
    ours, theirs = load_dinov2("vits14")[0], load_dinov2("vits14", tmp_path)[0]
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    with pytest.raises(FlowkitError, match="does not hold a DinoV2Net"):
        load_dinov2("vitb14", tmp_path)


def test_places_keep_a_plane() -> None:
    """Embeddings that grow evenly stay so: the new grid spans the old one."""
    rows = torch.arange(37.0)[:, None].expand(37, 37).reshape(1, -1, 1)
    state = {"pos_embed": torch.cat([torch.full((1, 1, 1), 7.0), rows], 1)}
    found = convert(state)["pos_embed"]
    assert found.shape == (1, 257, 1) and found[0, 0] == 7
    grid = found[0, 1:, 0].reshape(16, 16)
    inner = (torch.arange(2.0, 14.0) + 0.5) * 37 / 16.1 - 0.5
    # PyTorch's cubic bends straight lines by up to 0.05; without the 0.1 this would be 0.2 off.
    torch.testing.assert_close(grid[2:14, 3], inner, rtol=0, atol=0.06)


def test_sizes_are_those_published() -> None:
    millions = {"vits14": 22, "vitb14": 86, "vitl14": 304, "vitg14": 1136}
    for size, (width, depth, heads, gated, _) in dino.SIZES.items():
        with torch.device("meta"):
            net = DinoV2Net(width, depth, heads, gated)
        published = sum(p.numel() for p in net.parameters()) + (37**2 - 16**2) * width
        assert published // 10**6 == millions[size]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of a few thousand random weights, and a tokenizer of letters."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "projection_dim": 8}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = transformers.CLIPConfig(
        text_config=small | {"vocab_size": len(words), **ends, "pad_token_id": len(words) - 1},
        vision_config=small | {"image_size": 56, "patch_size": 14},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


def test_clip_features_are_unit_embeddings(clip_folder: Path, levels: Tensor) -> None:
    clip, _, digest = load_clip("vitb32", clip_folder)
    features = load_extractor("clip-vitb32", weights=clip_folder)
    assert features.id == f"clip-vitb32:pillow@{digest[:12]}" and features.dim == 8
    mean = (0.48145466, 0.4578275, 0.40821073)
    deviation = (0.26862954, 0.26130258, 0.27577711)
    with torch.no_grad():
        x = _by_pillow(levels, 56, mean, deviation)
        ids = torch.tensor([[52, 0, 53]])
        expected = clip(input_ids=ids, pixel_values=x).image_embeds
    found = features(levels)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_clip_scores_of_captions(clip_folder: Path, levels: Tensor) -> None:
    score = ClipScore("vitb32", weights=clip_folder)
    captions = ["a cat", "dogs in a long row " * 30]
    found = score(levels, captions)
    with torch.no_grad():
        tokens = score.tokenizer(captions[:1], return_tensors="pt")
        mean = (0.48145466, 0.4578275, 0.40821073)
        x = _by_pillow(levels[:1], 56, mean, (0.26862954, 0.26130258, 0.27577711))
        out = score.clip(**tokens, pixel_values=x)
        cosine = float(out.image_embeds @ out.text_embeds.T)
    assert found.shape == (2,) and float(found[0]) == pytest.approx(100 * max(cosine, 0), abs=0.2)
    alone = torch.cat([score(levels[i : i + 1], captions[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-3)  # padding does not count
    with pytest.raises(FlowkitError, match="2 pictures and 1 captions"):
        score(levels, captions[:1])


def test_clip_scores_by_hand() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[6.0, 8.0], [0.0, 2.0], [-1.0, -1.0]])
    expected = torch.tensor([100.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(clip_scores(a, b), expected)
    with pytest.raises(FlowkitError, match="embeddings .B, d. twice"):
        clip_scores(a, b[:2])
    with pytest.raises(FlowkitError, match="not finite"):
        clip_scores(a * torch.nan, b)


def test_clip_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    monkeypatch.setenv("FLOWKIT_OFFLINE", "1")
    with pytest.raises(FlowkitError, match="hf download openai/clip-vit-base-patch32") as caught:
        load_extractor("clip-vitb32", weights=tmp_path)
    assert "\n" not in str(caught.value) and "give weights=PATH" in str(caught.value)
    with pytest.raises(FlowkitError, match="no CLIP folder at .*nowhere"):
        load_extractor("clip-vitb32", weights=tmp_path / "nowhere")
    with pytest.raises(FlowkitError, match="did you mean 'clip-vitb32'"):
        load_extractor("clip-vitb3")


def test_distances_of_lpips_features_are_lpips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lpips", reason="needs lpips")
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    file = tmp_path / LPIPS_FILES["squeeze"].name
    torch.save(squeezenet1_1().state_dict(), file)
    features = load_extractor("lpips-squeeze", weights=file)
    assert isinstance(features, Extractor) and features.preprocessing == "clean"
    levels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    a, b = (features(part) for part in levels.chunk(2))
    pictures = levels / 127.5 - 1
    expected = LPIPS("squeeze", weights=file, size=None)(*pictures.chunk(2))
    torch.testing.assert_close((a - b).square().sum(1), expected, rtol=1e-4, atol=1e-6)
    monkeypatch.setenv("FLOWKIT_WEIGHTS", str(tmp_path))
    with pytest.raises(FlowkitError, match="expected b8a52dc0[.]{3}; .*give weights=PATH"):
        load_extractor("lpips-squeeze")
