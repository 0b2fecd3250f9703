"""(IA)^3 (arXiv:2205.05638) as a method: its settings, its tensors, how a layer is built. Imports no torch.

A vector l multiplies what a layer puts out (keys, values), y = l (W x + bias), or, in feed-forward modules,
what goes into the last linear, y = W (l x) + bias. It starts at one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from graft.adapters.settings import check_placement
from graft.dialects import explained
from graft.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from graft.adapters.ia3_layer import Ia3Layer
    from graft.models.layers import BaseLayer


@dataclass(frozen=True)
class Ia3Place:
    """The settings of one layer."""

    feedforward: bool
    """Whether the input is multiplied, not the output."""


@explained
@dataclass(frozen=True, kw_only=True)
class Ia3Config:
    """Which layers get a vector that multiplies what they put out, or what goes in."""

    SHORTHAND = "method"

    method: Literal["ia3"] = "ia3"
    """The adapter method."""
    target_modules: str | tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    """Layers that get an adapter: "all-linear" (every linear but the output head), a list of names or path
    endings, or a regular expression for the whole path; embeddings are refused."""
    feedforward_modules: str | tuple[str, ...] = ("down_proj",)
    """Those of them whose input is multiplied, by the same rules; the others' output is."""
    exclude_modules: str | tuple[str, ...] = ()
    """Layers taken out of target_modules, by the same rules."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks that get adapters; null takes all."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter: heads, embeddings, norms."""

    def __post_init__(self) -> None:
        check_placement(self)
        if isinstance(self.target_modules, str) or isinstance(self.feedforward_modules, str):
            return
        targets = [f".{name}" for name in self.target_modules]
        for name in self.feedforward_modules:
            if targets and not any(t.endswith(f".{name}") or f".{name}".endswith(t) for t in targets):
                raise ConfigError(
                    f"feedforward_modules {name!r} is not in target_modules {list(self.target_modules)[:9]}",
                    where="adapter.feedforward_modules",
                    fix="name it there too, or leave it out here",
                )

    def at(self, path: str) -> Ia3Place:
        """The settings of one layer.

        Args:
            path: Dotted path of the layer in the model.
        """
        from graft.adapters.patterns import Selector

        return Ia3Place(Selector(self.feedforward_modules, "adapter.feedforward_modules").selects(path))


class Ia3Method:
    """(IA)^3 behind the contract of `graft.adapters.base.AdapterMethod`."""

    name = "ia3"
    config_class = Ia3Config
    kinds = ("linear", "conv1d", "conv2d")

    def tensor_shapes(self, base: BaseLayer, config: Any) -> dict[str, tuple[int, ...]]:
        """Names (as in PEFT files) and shapes of the tensors that one layer adds."""
        width = base.num_inputs if config.feedforward else base.out_features
        if base.kind == "conv2d":
            return {"ia3_l": (1, width, 1, 1)}
        return {"ia3_l": (1, width) if config.feedforward else (width, 1)}

    def build_layer(self, base: BaseLayer, config: Any, generator: torch.Generator | None) -> Ia3Layer:
        """Make the layer module; it draws nothing."""
        from graft.adapters.ia3_layer import Ia3Layer

        return Ia3Layer(self.tensor_shapes(base, config)["ia3_l"], feedforward=config.feedforward)
