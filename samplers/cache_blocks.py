"""Which parts of a network a feature cache hooks, how, and how their outputs are taken apart.

A network is any module with its blocks in ModuleLists: diffusers transformers and U-Nets, those of
flowkit.nets, and others.  At module level the parts are what blocks add to their residual stream,
before it is gated: attention, MLP, and of residual convolutions the second one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowkit.errors import FlowkitError
from flowkit.velocity import VelocityModel, guided

__all__ = [
    "Act",
    "ForwardHook",
    "Part",
    "bare_model",
    "find_blocks",
    "find_modules",
    "is_hooked",
    "leaves",
    "rebuild",
]

Part = tuple[str, nn.Module]
Act = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""What a hook does: act(forward, args, kwargs) gives the output."""

_BLOCKS = re.compile(r"block|layer")
_BRANCH = re.compile(
    r"(^|_)(self_?|cross_?|audio_?)?(attn|attention|ff|ffn|mlp|feed_?forward)\d*(_|$)"
)
_NOT_BRANCH = re.compile(r"norm|act|gate|mod|embed|drop")


def bare_model(source: Any) -> nn.Module:
    """The network that is cached: a pipeline's, a velocity's, a compiled one's, or the module."""
    if isinstance(source, guided):
        found = bare_model(source.conditional)
        if bare_model(source.unconditional) is not found:
            raise FlowkitError("this guidance has two networks; enable a cache on each of them")
        return found
    if not isinstance(source, nn.Module):
        for name in ("transformer", "unet", "net", "velocity"):
            inner = getattr(source, name, None)
            if isinstance(inner, nn.Module):
                return bare_model(inner)
        raise FlowkitError(
            f"a cache needs a network or a pipeline with a transformer or unet, got a "
            f"{type(source).__name__}"
        )
    if isinstance(source, VelocityModel):
        return bare_model(source.net)
    return getattr(source, "_orig_mod", source)  # torch.compile's wrapper


def find_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[Part]:
    """Name and module of every block, in the order in which they are registered.

    names: ModuleLists or modules of the model, by name.  None: the outermost ModuleLists and middle
    blocks named after blocks or layers; if none, the ModuleList with the most parameters.
    Raises FlowkitError when there are none.
    """
    if names is not None:
        modules = dict(model.named_modules())
        missing = [name for name in names if name not in modules]
        if missing or not names:
            raise FlowkitError(
                f"{type(model).__name__} has no module {', '.join(map(repr, missing))}; its lists "
                f"of blocks are {', '.join(name for name, _ in _lists(model)) or 'none'}"
            )
        return [part for name in names for part in _members(name, modules[name])]
    lists = list(_lists(model))
    chosen = [(name, part) for name, part in lists if _BLOCKS.search(name.rpartition(".")[2])]
    if not any(isinstance(part, nn.ModuleList) for _, part in chosen):
        chosen = sorted(lists, key=lambda part: -_size(part[1]))[:1]
    blocks = [member for name, part in chosen for member in _members(name, part)]
    if not blocks:
        raise FlowkitError(
            f"nothing to cache in a {type(model).__name__}: it has no ModuleList of blocks; "
            "name its blocks with blocks=[...]"
        )
    return blocks


def find_modules(
    blocks: Sequence[Part], patterns: Sequence[str] | None = None
) -> tuple[list[Part], list[Part]]:
    """(forecast, skipped): parts of blocks whose output is forecast, and others that feed them,
    among these the layer norms, which mostly do so and nothing else.

    patterns: regular expressions, searched for in the names of what is to be forecast; None for
    attention, MLPs and residual convolutions.
    Raises FlowkitError when there are none.
    """
    forecast: list[Part] = []
    skipped: list[Part] = []
    for name, block in blocks:
        for keep, parts in ((forecast, 0), (skipped, 1)):
            keep += _branches(name, block, patterns)[parts]
    if not forecast:
        kinds = ", ".join(sorted({type(block).__name__ for _, block in blocks}))
        raise FlowkitError(
            f"nothing to cache at module level: no attention or MLP found in {kinds}; name them "
            'with modules=["regex", ...], or use level="block"'
        )
    return forecast, skipped


def _lists(module: nn.Module, prefix: str = "") -> Iterator[Part]:
    """The outermost ModuleLists, and modules that stand between them as blocks do."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield path, child
        elif "block" in name and _size(child):
            yield path, child
        else:
            yield from _lists(child, f"{path}.")


def _members(name: str, part: nn.Module) -> list[Part]:
    if not isinstance(part, nn.ModuleList):
        return [(name, part)]
    return [(f"{name}.{i}", block) for i, block in enumerate(part)]


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _branches(
    path: str, module: nn.Module, patterns: Sequence[str] | None
) -> tuple[list[Part], list[Part]]:
    """Of a module: the parts that are forecast, and those that only feed them."""
    if patterns is not None:
        named = [(f"{path}.{name}", child) for name, child in module.named_modules() if name]
        hits = [part for part in named if any(re.search(p, part[0]) for p in patterns)]
        outer = [(n, m) for n, m in hits if not any(n.startswith(f"{o}.") for o, _ in hits)]
        return outer, []
    children = dict(module.named_children())
    for inputs, output in (
        (("attn", "proj_mlp"), "proj_out"),  # parallel attention and MLP, as in Flux
        (("conv1",), "conv2"),  # residual convolutions
        (("conv_1",), "conv_2"),
    ):
        if output in children and all(name in children for name in inputs):
            own = [(f"{path}.{output}", children.pop(output))]
            feeding = [(f"{path}.{name}", children.pop(name)) for name in inputs]
            rest = _of_children(path, children, patterns)
            return own + rest[0], feeding + rest[1]
    return _of_children(path, children, patterns)


def _of_children(
    path: str, children: dict[str, nn.Module], patterns: Sequence[str] | None
) -> tuple[list[Part], list[Part]]:
    forecast: list[Part] = []
    skipped: list[Part] = []
    for name, child in children.items():
        if isinstance(child, nn.LayerNorm | nn.RMSNorm):
            skipped.append((f"{path}.{name}", child))
        elif _is_branch(name, child):
            forecast.append((f"{path}.{name}", child))
        else:
            found = _branches(f"{path}.{name}", child, patterns)
            forecast, skipped = forecast + found[0], skipped + found[1]
    return forecast, skipped


def _is_branch(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList) or not _size(module) or _NOT_BRANCH.search(name):
        return False
    return bool(_BRANCH.search(name)) or type(module).__name__.endswith("Attention")


def leaves(tree: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and mappings, in order."""
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() else []
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple | list):
        return [leaf for item in tree for leaf in leaves(item)]
    return []


def rebuild(tree: Any, replace: Callable[[Any], Any]) -> Any:
    """The same nesting with replace(leaf) in the place of each floating-point tensor."""
    if isinstance(tree, Tensor):
        return replace(tree) if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        items = {name: rebuild(item, replace) for name, item in tree.items()}
        return type(tree)(**items) if type(tree) is not dict else items
    if isinstance(tree, tuple | list):
        parts = [rebuild(item, replace) for item in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


class ForwardHook:
    """A module's forward with `act(inner, args, kwargs)` around it, until remove().

    torch.compile leaves `act` alone and compiles what it calls, whether the model was compiled
    before or after.
    """

    def __init__(self, module: Any, act: Act) -> None:
        self.module, self.active = module, True
        self.before = vars(module).get("forward")
        inner = module.forward

        @torch.compiler.disable(recursive=False)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return act(inner, args, kwargs) if self.active else inner(*args, **kwargs)

        self.forward: Any = forward
        functools.update_wrapper(self.forward, inner, updated=())
        self.forward.hook = self
        module.forward = self.forward

    def remove(self) -> None:
        """Put the module's own forward back; one that others wrapped since then stays, idle."""
        self.active = False
        if vars(self.module).get("forward") is not self.forward:
            return
        if self.before is None:
            del self.module.forward
        else:
            self.module.forward = self.before


def is_hooked(module: nn.Module) -> bool:
    """Whether a ForwardHook is the outermost wrapper of the module's forward."""
    return isinstance(getattr(vars(module).get("forward"), "hook", None), ForwardHook)
