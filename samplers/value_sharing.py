"""Attention values of one forward pass, kept and put into the attention of another.

Per block, the outputs V of the value projections are taken and replaced before attention; queries
and keys stay as they are (RF-Edit: Wang et al., 2024, arXiv:2411.04746).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.velocity import VelocityModel

__all__ = ["Key", "SharedValues", "ValueProcessor", "share_values"]

Key = tuple[int, int]
"""(interval of the grid counted from the noise, evaluations made in it before)."""

Tap = Callable[[str, Tensor], Tensor | None]
"""Sees the values of an attention, by its name, and may give others in their place."""


@contextmanager
def share_values(
    model: nn.Module,
    *,
    blocks: Iterable[int] | None = None,
    image_tokens_only: bool = False,
    device: torch.device | str | None = None,
) -> Iterator[SharedValues]:
    """Let the values of a model's attention be recorded and replayed, until the context ends.

    model: a diffusers FluxTransformer2DModel or SD3Transformer2DModel, or a DiT of flowkit.nets;
    bare, compiled or inside an adapter.
    blocks: which of its blocks, for Flux of its single-stream blocks.  None: the authors' 20 to 37
    of Flux's 38, as many in proportion of another Flux; the later half of SD3 and DiT.
    image_tokens_only: leave the values of text tokens alone.  The authors' code replaces these too,
    so that in these blocks the source's prompt speaks in the target's stead.
    device: where values are kept; None for where they are computed.  Flux in bf16 at 1024x1024
    keeps about 1 GB for each step of two evaluations.

    A ValueProcessor wraps every attention processor in these blocks; the processors are put back at
    the end, whatever happens.  Attention backends, LoRA and fused projections stay in force, and a
    forward pass that neither records nor replays computes what it computed before.
    Raises FlowkitError for another model, and for blocks that it does not have.
    """
    net = model.net if isinstance(model, VelocityModel) else model
    bare = getattr(net, "_orig_mod", net)  # torch.compile's wrapper
    kind = _kind(bare)
    mixed = kind.text_first and image_tokens_only
    values = SharedValues(device)
    with ExitStack() as restore:
        if mixed:
            hook = net.register_forward_pre_hook(values.count_image_tokens, with_kwargs=True)
            restore.callback(hook.remove)
        for name, attention in _attentions(bare, kind, blocks):
            plain = attention.processor
            restore.callback(attention.set_processor, plain)
            attention.set_processor(ValueProcessor(plain, name, values, image_tokens_only, mixed))
        restore.callback(values.clear)
        yield values


class SharedValues:
    """The values that `share_values` keeps, and whether they are recorded or replayed just now.

    Outside of `record` and `replay` the model runs as it is.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = device
        self.kept: dict[Key, dict[str, Tensor]] = {}
        self.tap: Tap | None = None
        self.image_tokens: int | None = None  # of the forward pass under way, where it matters

    @property
    def nbytes(self) -> int:
        """Bytes of all values kept."""
        return sum(value.nbytes for found in self.kept.values() for value in found.values())

    def clear(self) -> None:
        """Forget everything recorded."""
        self.kept.clear()

    @contextmanager
    def record(self, key: Key) -> Iterator[None]:
        """Keep the values of the one forward pass that is made inside, under `key`."""
        found: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor) -> None:
            if name in found:
                raise FlowkitError(
                    f"{name} ran twice in one evaluation, and one key cannot keep both values; "
                    "record a velocity that runs its model once, unguided"
                )
            found[name] = value.detach().to(self.device or value.device, copy=True)

        with self._tapped(keep):
            yield
        _check_seen(found)
        self.kept[key] = found

    @contextmanager
    def replay(self, key: Key) -> Iterator[None]:
        """Put the values kept under `key` into every forward pass that is made inside."""
        if key not in self.kept:
            raise FlowkitError(
                f"no values are kept for (interval, stage) {key}; there are some for "
                f"{sorted(self.kept) or 'none'}"
            )
        kept, seen = self.kept[key], set()

        def give(name: str, value: Tensor) -> Tensor:
            seen.add(name)
            if kept[name].shape != value.shape:
                raise FlowkitError(
                    f"{name} has values {tuple(value.shape)}, recorded were "
                    f"{tuple(kept[name].shape)}; replay the same batch, guidance in calls of its "
                    "own, and prompts of the same length or image_tokens_only=True"
                )
            return kept[name].to(value)

        with self._tapped(give):
            yield
        _check_seen(seen)

    @contextmanager
    def _tapped(self, tap: Tap) -> Iterator[None]:
        before, self.tap = self.tap, tap
        try:
            yield
        finally:
            self.tap = before

    def count_image_tokens(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook of a transformer that joins image tokens (B, N, *) to text."""
        self.image_tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]


def _check_seen(names: Collection[str]) -> None:
    if not names:
        raise FlowkitError(
            "the velocity ran none of the blocks whose values are shared; "
            "give share_values the model that the velocity runs"
        )


class ValueProcessor:
    """The processor that was installed, with what its value projections give open to values.tap.

    During the call forward hooks on the projections see and replace V; attention itself remains the
    installed processor's.  Hooks alone would do but for models compiled before: these do not notice
    a new hook, while they do notice another processor.
    """

    def __init__(
        self, plain: Any, name: str, values: SharedValues, image_tokens_only: bool, mixed: bool
    ) -> None:
        self.plain, self.name, self.values = plain, name, values
        self.image_tokens_only, self.mixed = image_tokens_only, mixed
        # diffusers reads off this signature which keyword arguments it may pass.
        call = functools.partial(ValueProcessor.__call__, self)
        self.__dict__["__call__"] = functools.update_wrapper(call, plain.__call__)

    @torch.compiler.disable
    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        tap = self.values.tap
        if tap is None:
            return self.plain(attn, *args, **kwargs)
        fused = getattr(attn, "fused_projections", False)
        image, text = ("to_qkv", "to_added_qkv") if fused else ("to_v", "add_v_proj")
        projections = {"image": getattr(attn, image, None)}
        if not self.image_tokens_only:
            projections["text"] = getattr(attn, text, None)
        with ExitStack() as hooks:
            for part, projection in projections.items():
                if projection is not None:
                    hook = functools.partial(self._share, tap, part, 3 if fused else 1)
                    hooks.callback(projection.register_forward_hook(hook).remove)
            return self.plain(attn, *args, **kwargs)

    def _share(
        self, tap: Tap, part: str, rows: int, module: nn.Module, args: Any, out: Tensor
    ) -> Tensor | None:
        """out: (B, N, rows * D), V the last D.  What `tap` gives takes V's place."""
        first, width = self._text_tokens(out), out.shape[-1] // rows
        shared = tap(f"{self.name}.{part}", out[:, first:, -width:])
        if shared is None:
            return None
        out = out.clone()
        out[:, first:, -width:] = shared
        return out

    def _text_tokens(self, out: Tensor) -> int:
        """How many of the N tokens are text that stays as it is; it comes first."""
        if not self.mixed:
            return 0
        if self.values.image_tokens is None:
            raise FlowkitError(
                f"{self.name} alone cannot tell image tokens from text; run the whole model, or "
                "use image_tokens_only=False"
            )
        return out.shape[1] - self.values.image_tokens


@dataclass(frozen=True)
class _Kind:
    """Where a model's blocks are, the first of n that is shared, and if text and image are one."""

    blocks: str
    first: Callable[[int], int]
    text_first: bool = False


# By name, so that nothing is imported for a model that is not there.
_KINDS = {
    "diffusers.FluxTransformer2DModel": _Kind(
        "single_transformer_blocks", lambda n: 20 * n // 38, text_first=True
    ),
    "diffusers.SD3Transformer2DModel": _Kind("transformer_blocks", lambda n: n // 2),
    "flowkit.DiT": _Kind("blocks", lambda n: n // 2),
}


def _kind(model: nn.Module) -> _Kind:
    for cls in type(model).__mro__:
        kind = _KINDS.get(f"{cls.__module__.partition('.')[0]}.{cls.__name__}")
        if kind is not None:
            return kind
    raise FlowkitError(
        f"values can be shared in {', '.join(_KINDS)}; got a {type(model).__name__}, whose "
        "attention is not known"
    )


def _attentions(
    model: nn.Module, kind: _Kind, blocks: Iterable[int] | None
) -> Iterator[tuple[str, Any]]:
    """Name and module of every attention in the chosen blocks."""
    stack: Any = getattr(model, kind.blocks)
    chosen = sorted(set(range(kind.first(len(stack)), len(stack)) if blocks is None else blocks))
    if not chosen or not all(0 <= i < len(stack) for i in chosen):
        raise FlowkitError(
            f"blocks must be some of 0 to {len(stack) - 1}, the {kind.blocks} of this "
            f"{type(model).__name__}; got {chosen}"
        )
    for i in chosen:
        for name, module in stack[i].named_modules():
            if hasattr(module, "set_processor") and hasattr(module, "processor"):
                yield f"{kind.blocks}.{i}.{name}", module
