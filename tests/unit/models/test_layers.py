"""The view that adapters have of a layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graft.models.layers import BaseLayer
from graft.models.load import load
from graft.quant.config import QuantizationConfig
from graft.quant.linear import QuantizedLinear


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "embedding":
        return nn.Embedding(11, 6)
    if kind == "conv1d":
        module = Conv1D(6, 11)
        nn.init.normal_(module.bias)
        return module
    return nn.Linear(11, 6)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dense_weight_gives_the_forward(kind):
    module = layer_of(kind)
    layer = BaseLayer.of(module)
    assert (layer.kind, layer.in_features, layer.out_features, layer.quantized) == (kind, 11, 6, False)
    x = torch.randn(3, 11)
    torch.testing.assert_close(x @ layer.dense_weight().T + layer.bias, module(x))
    assert layer.output_scale == 1.0


def test_embedding_is_a_matrix_of_its_rows():
    module = layer_of("embedding")
    layer = BaseLayer.of(module)
    assert (layer.kind, layer.in_features, layer.out_features, layer.bias) == ("embedding", 11, 6, None)
    assert torch.equal(layer.dense_weight().T[3], module(torch.tensor(3)))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_a_matrix_over_what_lies_under_its_kernel(groups):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=groups)
    layer = BaseLayer.of(module)
    width = 4 // groups * 3 * 2
    assert (layer.kind, layer.in_features, layer.out_features, layer.quantized) == ("conv2d", width, 6, False)
    assert (layer.num_inputs, layer.groups, layer.kernel) == (4, groups, (3, 2))
    x = torch.randn(2, 4, 5, 6)
    patches = nn.functional.unfold(x, (3, 2), dilation=(1, 2), padding=1, stride=(2, 1))
    of_groups = patches.unflatten(1, (groups, width))
    rows = layer.dense_weight().unflatten(0, (groups, -1))
    expected = torch.einsum("bgip,goi->bgop", of_groups, rows).flatten(1, 2) + layer.bias[:, None]
    torch.testing.assert_close(module(x).flatten(2), expected)
    other = torch.randn(6, width)
    plain = layer.apply(x, other)
    parameter = module.weight
    layer.replace_weight(other)
    assert module.weight is parameter
    assert torch.equal(layer.dense_weight(), other)
    torch.testing.assert_close(module(x), plain + layer.spread(layer.bias))
    few = torch.randn(3, width)
    torch.testing.assert_close(layer.product(few), few @ other.t())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_replace_weight_keeps_the_parameter(kind):
    module = layer_of(kind).to(torch.bfloat16)
    layer = BaseLayer.of(module)
    parameter, new = module.weight, torch.randn(6, 11)
    layer.replace_weight(new)
    assert module.weight is parameter
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(layer.dense_weight(None), new.to(torch.bfloat16))
    assert torch.equal(layer.dense_weight(), new.to(torch.bfloat16).float())


def test_quantized():
    dense = nn.Linear(64, 6)
    module = QuantizedLinear.from_weight(
        dense.weight.detach(), dense.bias, QuantizationConfig(), torch.float32
    )
    layer = BaseLayer.of(module)
    assert (layer.kind, layer.in_features, layer.out_features, layer.quantized) == ("linear", 64, 6, True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(x @ layer.dense_weight().T + layer.bias, module(x))
    assert layer.device == torch.device("cpu")
    with pytest.raises(AssertionError):
        layer.replace_weight(torch.zeros(6, 64))


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(4), nn.ReLU(), nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.Bilinear(2, 2, 2)],
)
def test_other_modules_are_no_layers(module):
    assert BaseLayer.of(module) is None


def test_linear_packed_by_another_library_is_a_quantized_layer():
    module = nn.Linear(8, 4)
    module.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    layer = BaseLayer.of(module)
    assert layer is not None
    assert (layer.in_features, layer.out_features, layer.quantized) == (8, 4, True)


def test_scaled_embedding_of_gemma(tiny_dir):
    embedding = load(tiny_dir("gemma3_text")).model.get_input_embeddings()
    layer = BaseLayer.of(embedding)
    row = embedding(torch.tensor([5]))[0]
    torch.testing.assert_close(layer.dense_weight().T[5] * layer.output_scale, row)
    assert layer.output_scale != 1.0
