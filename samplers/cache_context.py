"""The name that a diffusers pipeline gives a call of its model: cond, uncond, ..."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch import nn

__all__ = ["CacheContext"]

_CONTEXT = "flowkit_cache_context"


class CacheContext(ModelHook):
    """Listens for the name that a pipeline gives a call by diffusers' cache_context."""

    _is_stateful = True

    def __init__(self, model: Any, on_end: Callable[[], None]) -> None:
        super().__init__()
        self.model, self.manager, self.on_end = model, _Named(), on_end
        self._had_forward = "forward" in vars(model)
        HookRegistry.check_if_exists_or_initialize(model).register_hook(self, _CONTEXT)

    @property
    def name(self) -> str | None:
        """Of the call under way, None outside of any context."""
        context = self.manager.said
        return getattr(context, "name", context)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """What a pipeline calls when it has ended."""
        self.manager.said = None
        self.on_end()
        return module

    def remove(self) -> None:
        registry = self.model._diffusers_hook
        registry.remove_hook(_CONTEXT, recurse=False)
        if not self._had_forward and not registry.hooks:
            vars(self.model).pop("forward", None)


class _Named(StateManager):
    """Holds what a context says, and no state; diffusers finds it by its class."""

    def __init__(self) -> None:
        self.said: Any = None

    def set_context(self, context: Any) -> None:
        self.said = context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.said = None
