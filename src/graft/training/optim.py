"""The optimizer of a run: clipping, the update rule of each tensor, and state that is stored by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from graft.training import adamw_8bit
from graft.training.clipping import Clipping
from graft.training.config import TrainingConfig
from graft.training.flat_state import FlatState, Pending
from graft.training.groups import Treatment
from graft.training.pages import Kind, Rule
from graft.training.paging import Paging, pages_and_store, placement
from graft.training.rules import SGD, AdamW, Lion


class Optimizer:
    """What `training.optimizer` names, over named tensors.

    Args:
        parameters: Trainable tensors by name; their order is the order of the state.
        config: The optimizer, its constants, weight decay, clipping and memory.
        treatments: Of each tensor; without, decay acts on matrices and all have the same learning rate.
        run_directory: Where state is spilled that has no place in `training.optimizer_memory`.

    Raises:
        ConfigError: The memory holds no page, or acts on nothing.
        StorageError: There is no room to spill to.

    Attributes:
        placement: Where paged state is, in words; "" where nothing is paged.

    Cost: two float32 moments per trained number with adamw, two bytes and a bit with adamw_8bit, one float32
    moment with lion and with sgd's momentum.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        config: TrainingConfig,
        treatments: Mapping[str, Treatment] | None = None,
        run_directory: str | os.PathLike[str] = ".",
    ) -> None:
        self.parameters = dict(parameters)
        if treatments is None:
            treatments = {name: Treatment(decays=p.ndim >= 2) for name, p in self.parameters.items()}
        self._clipping = Clipping(
            self.parameters, treatments, config.max_grad_norm, config.group_max_grad_norm
        )
        kinds = _kinds(self.parameters, treatments, config)
        paging = Paging.of(config, run_directory)
        pages, self._store = pages_and_store(self.parameters, kinds, paging)
        self.placement = placement(pages, paging, next(iter(self.parameters.values())).device)
        self._flat = FlatState(self.parameters, pages, self._store)

    def gradient_norm(self) -> float:
        """Euclidean norm over all gradients; NaN or infinite if any of them is."""
        return self._clipping.norm()

    @property
    def norms(self) -> Mapping[str, Tensor]:
        """Of each tensor's gradient, as `gradient_norm` found them; none once the gradients are dropped."""
        return self._clipping.norms

    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """Clip by the given norm, update every tensor once, and clear the gradients.

        Args:
            learning_rate: For this step.
            gradient_norm: What `gradient_norm` returned; must be finite.

        Raises:
            StorageError: Paged state could not be written or read back; the optimizer is of no use any more.
        """
        self._flat.step(learning_rate, self._clipping.factors(gradient_norm))
        self.clear()

    def clear(self) -> None:
        """Drop the gradients and their memory."""
        self._clipping.norms = {}
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> Mapping[str, Tensor]:
        """The parts of every tensor's state: "<name>|exp_avg" and so on, each made when it is asked for."""
        return _State(self.pending_state())

    def pending_state(self) -> dict[str, Pending]:
        """The same as what can be made of them, in the order in which the pages are read once."""
        return {
            f"{name}|{part}": value
            for name in self._flat.in_order()
            for part, value in self._flat.state(name).items()
        }

    def load_state(self, stored: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, bit for bit.

        Raises:
            CheckpointError: A tensor is missing, too many, or of another shape or dtype.
        """
        parts: dict[str, list[str]] = {}
        for key in stored:
            name, _, part = key.rpartition("|")
            parts.setdefault(name, []).append(part)
        for name in self._flat.in_order():
            if name in parts:
                self._flat.load(name, {part: stored[f"{name}|{part}"] for part in parts[name]})

    def close(self) -> None:
        """Give up what paged state holds outside memory; the optimizer is of no use any more."""
        self._store.close()

    @property
    def state_bytes(self) -> int:
        """Bytes that the moments take now."""
        return sum(value.shape.numel() * value.dtype.itemsize for value in self.pending_state().values())


class _State(Mapping[str, Tensor]):
    def __init__(self, pending: dict[str, Pending]) -> None:
        self._pending = pending

    def __getitem__(self, name: str) -> Tensor:
        return self._pending[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pending)

    def __len__(self) -> int:
        return len(self._pending)


def _kinds(
    parameters: Mapping[str, torch.nn.Parameter],
    treatments: Mapping[str, Treatment],
    config: TrainingConfig,
) -> dict[str, Kind]:
    device = next(iter(parameters.values())).device
    rules: dict[str, Rule] = {}
    found = {}
    for name, parameter in parameters.items():
        each = treatments[name]
        word = config.optimizer
        if word == "adamw_8bit" and (each.float32_state or not adamw_8bit.takes(parameter)):
            word = "adamw"
        if word not in rules:
            rules[word] = _rule(word, config, device)
        own = config.weight_decay if each.weight_decay is None else each.weight_decay
        found[name] = Kind(rules[word], each.rate, own if each.decays else 0.0, parameter.dtype)
    return found


def _rule(word: str, config: TrainingConfig, device: torch.device) -> Rule:
    if word == "adamw_8bit":
        return adamw_8bit.AdamW8bit(config, device)
    rules: dict[str, type[AdamW | SGD | Lion]] = {"adamw": AdamW, "sgd": SGD, "lion": Lion}
    return rules[word](config)
