"""A module in the place of another one, which stays what it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from graft.models.recipes import Recipes


class StandIn(nn.Module):
    """Has the parameters, buffers, children and attributes of another module, under the same names."""

    def __init__(self, original: nn.Module, recipes: Recipes) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.__dict__["recipes"] = recipes
        # The same dictionaries: what is put into one is in the other.
        for name in ("_parameters", "_buffers", "_modules"):
            self.__dict__[name] = original.__dict__[name]
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)
