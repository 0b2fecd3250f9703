"""Everything that must hold and be fast on a GPU, checked against the CPU and timed, in one command.

    python benchmarks/gpu.py                       # a CUDA device; a few minutes
    python benchmarks/gpu.py --device cpu --small  # the same checks without a GPU, and without its figures

Checks: codes and scales made on the device are the CPU's bytes; decoded weights are equal; the quantized
linear's output and input gradient agree with the dense linear over the decoded weight; LoRA and QLoRA steps
lower the loss. Times: encode, decode, the linear at several row counts beside a dense bfloat16 linear, and
training steps. Prints a table and writes results/gpu.json with the device's name.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graft import files
from graft.adapters.attach import attach
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.data.loader import Loader
from graft.data.masking import Sample
from graft.evaluate.loss import token_losses
from graft.quant.config import QuantizationConfig
from graft.quant.linear import QuantizedLinear
from graft.quant.tensor import quantize
from graft.training.config import TrainingConfig
from graft.training.optim import Optimizer

FORMATS = ("nf4", "fp4", "int8")


def seconds(work: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median seconds of one call, after three to warm up."""
    times = []
    for turn in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 3:
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def check_formats(device: torch.device, shape: tuple[int, int]) -> dict[str, float]:
    """Bytes and decoded values against the CPU; gigabytes of bfloat16 a second."""
    figures = {}
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    for name in FORMATS:
        for double in (False, True):
            config = QuantizationConfig(quant_type=name, double_quant=double)  # type: ignore[arg-type]
            here, there = quantize(weight, config), quantize(weight.to(device), config)
            assert torch.equal(here.codes, there.codes.cpu()), f"{name}: codes differ from the CPU's"
            if not double:  # the mean of the scales is summed in another order on another device
                assert torch.equal(here.dequantize(), there.dequantize().cpu()), (
                    f"{name}: decoded values differ"
                )
            label = f"{name}{'+dq' if double else ''}"
            size = weight.numel() * 2 / 1e9
            placed = weight.to(device)
            figures[f"{label} encode GB/s"] = size / seconds(
                lambda c=config, w=placed: quantize(w, c), device
            )
            figures[f"{label} decode GB/s"] = size / seconds(
                lambda q=there: q.dequantize(torch.bfloat16), device
            )
    return figures


def check_linear(device: torch.device, shape: tuple[int, int]) -> dict[str, float]:
    """The quantized linear against the dense one over the decoded weight; time as a ratio to it."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    layer = QuantizedLinear.from_weight(weight, None, QuantizationConfig(), torch.bfloat16)
    dense = layer.dense_weight(torch.bfloat16)
    figures = {}
    for rows in (1, 16, 256, 2048):
        x = torch.randn(rows, shape[1], device=device, dtype=torch.bfloat16, requires_grad=True)
        y, expected = layer(x), torch.nn.functional.linear(x, dense)
        assert torch.equal(y, expected) or float((y - expected).abs().max()) < 1e-2 * float(
            expected.abs().max()
        )
        grad = torch.randn_like(y)
        (ours,) = torch.autograd.grad(y, x, grad)
        (theirs,) = torch.autograd.grad(expected, x, grad)
        assert float((ours - theirs).abs().max()) <= 1e-2 * float(theirs.abs().max())
        with torch.no_grad():
            quantized = seconds(lambda x=x: layer(x), device)
            plain = seconds(lambda x=x: torch.nn.functional.linear(x, dense), device)
        figures[f"nf4 linear / bf16 linear, {rows} rows"] = quantized / plain
    return figures


def check_training(device: torch.device, small: bool) -> dict[str, float]:
    """LoRA and QLoRA steps on a random Llama: the loss must fall; real tokens a second."""
    import tempfile

    from transformers import LlamaConfig, LlamaForCausalLM

    from graft.models.load import load

    width, layers, length = (64, 2, 64) if small else (2048, 16, 1024)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=length,
    )
    figures = {}
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
        _any_tokenizer().save_pretrained(directory)
        generator = torch.Generator().manual_seed(2)
        ids = [torch.randint(3, 4096, (length,), generator=generator).tolist() for _ in range(8)]
        batch = next(Loader([Sample(row, [-100, *row[1:]]) for row in ids], 8, length, packing=True).epoch(0))
        for quantization in (None, "nf4"):
            base = load(directory, quantization=quantization, device=device)
            attach(base.model, LoraConfig(rank=16, alpha=32))
            base.model.to(device).train()
            optimizer = Optimizer(adapter_tensors(base.model), TrainingConfig())
            losses = []

            def step(
                model: Any = base.model, optimizer: Any = optimizer, losses: list[float] = losses
            ) -> None:
                moved = {n: getattr(batch, n).to(device) for n in ("input_ids", "position_ids", "labels")}
                loss, count = token_losses(model, type(batch)(**{**vars(batch), **moved}))
                (loss / count).backward()
                losses.append(float(loss.detach()) / count)
                optimizer.step(1e-2, optimizer.gradient_norm())

            spent = seconds(step, device, repeats=10)
            assert losses[-1] < losses[0], f"the loss rose from {losses[0]} to {losses[-1]}"
            name = "QLoRA" if quantization else "LoRA"
            figures[f"{name} tokens/s"] = batch.num_tokens / spent
            if device.type == "cuda":
                figures[f"{name} peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
                torch.cuda.reset_peak_memory_stats()
    return figures


def _any_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<pad>": 0, "<s>": 1, "</s>": 2}, merges=[]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a quick check; nothing is written")
    values = parser.parse_args()
    if values.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device here; `--device cpu --small` runs the same checks without the figures"
        )
    device = torch.device(values.device)
    shape = (128, 256) if values.small else (5632, 2048)
    figures = (
        check_formats(device, shape) | check_linear(device, shape) | check_training(device, values.small)
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    for label, figure in figures.items():
        print(f"{label:40} {figure:12.3f}")
    print(f"all checks hold on {name}")
    if not values.small:
        path = Path(__file__).parent / "results" / "gpu.json"
        path.parent.mkdir(exist_ok=True)
        files.write_json(path, {"device": name, "torch": torch.__version__, "figures": figures})


if __name__ == "__main__":
    main()
