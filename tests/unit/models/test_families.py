"""Families: where the layers are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graft.errors import ModelError
from graft.models.families import FAMILIES, family_of, head, hidden_states, layer_index
from graft.models.load import load


def test_layers_are_where_the_record_says(tiny_dir, tiny_family):
    model = load(tiny_dir(tiny_family)).model
    layers = model.get_submodule(family_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    assert len(layers) == model.config.num_hidden_layers
    for name, module in model.named_modules():
        inside = [index for index, layer in enumerate(layers) if module in set(layer.modules())]
        assert layer_index(name) == (inside[0] if inside else None), name
        assert layer_index(f"base_model.model.{name}") == layer_index(name)


@pytest.mark.parametrize("path", ["lm_head", "model.norm", "model.layersx.3.q", "", "model.layers"])
def test_outside_of_the_layers(path):
    assert layer_index(path) is None


def test_unknown_family_names_the_closest():
    class Model(nn.Module):
        config = type("Config", (), {"model_type": "lama"})

    with pytest.raises(ModelError) as caught:
        family_of(Model())
    assert "llama" in caught.value.fix


class Wrapped(nn.Module):
    """Stands for an adapter around a layer: adds to what the layer gives."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x) + 0.125


def test_wrapped_layers_are_gone_through(tiny_dir, tiny_family):
    model = load(tiny_dir(tiny_family), quantization="nf4").model
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    first = next(name for name, module in model.named_modules() if type(module).__name__ == "QuantizedLinear")
    model.set_submodule(first, Wrapped(model.get_submodule(first)))
    model.set_output_embeddings(Wrapped(model.get_output_embeddings()))
    after = model(ids).logits
    assert not torch.allclose(before, after)
    assert torch.equal(head(model, hidden_states(model, ids)), after)


def test_head_takes_any_positions(tiny_dir):
    model = load(tiny_dir("gemma2")).model
    hidden = hidden_states(model, torch.arange(3, 20)[None])
    chosen = head(model, hidden[0, [2, 5, 11]])
    torch.testing.assert_close(chosen, head(model, hidden)[0, [2, 5, 11]])


def test_table_is_keyed_by_its_own_names():
    assert all(name == family.model_type for name, family in FAMILIES.items())
