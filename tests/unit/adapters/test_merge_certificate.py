"""The certificate of a merge: its figures by their formulas, the choice, what is refused, what is left."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import graft
import graft.adapters.merge as merging
from graft.adapters import merged_files
from graft.adapters.attach import adapter_tensors, attach
from graft.adapters.merge_base import open_base
from graft.adapters.merged_files import write_merged
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.adapters.probe import make_probe, own_prompts
from graft.adapters.side_file import read_side_file
from graft.cli.main import run
from graft.errors import AdapterError, DataError, StorageError
from graft.models.load import load
from graft.models.save import save_model
from graft.quant.config import QuantizationConfig

merge = merging.merge
SCALING = 2.0


def trained(directory: Path, out: Path, scale: float = 0.02, facts: Any = None, **how: Any) -> Path:
    """An adapter of rank 4 over all linears; lora_B of so large numbers."""
    base = load(directory, **how)
    attach(base.model, graft.LoraConfig(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in adapter_tensors(base.model).items():
            if "lora_B" in name:
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return save_adapter(base.model, out, facts=facts or {"format": "text"})


@pytest.fixture
def halves(tiny_dir: Callable[..., Path], tmp_path: Path) -> Path:
    """The llama in bfloat16."""
    base = load(tiny_dir("llama"), dtype="bfloat16")
    save_model(base.model, base.tokenizer, tmp_path / "halves")
    return tmp_path / "halves"


def updates(adapter: Path) -> dict[str, Tensor]:
    """Scaling * B A by the names of the weights."""
    found = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").replace("lora_A.", ""): SCALING
        * (found[name.replace("lora_A", "lora_B")].double() @ tensor.double())
        for name, tensor in found.items()
        if "lora_A" in name
    }


def test_figures_are_those_of_the_formulas(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    adapter = trained(tiny_dir("llama"), tmp_path / "a", quantization="nf4")
    report = merge(adapter, tmp_path / "m", into="dense")
    base = load(tiny_dir("llama"), quantization="nf4")
    probe = make_probe(base.model.config, base.tokenizer, read_side_file(adapter), None)
    ids = probe.batch.input_ids

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            rows = [
                model(row[None, :length]).logits[0, :-1]
                for row, length in zip(ids, probe.positions.sum(1) + 1, strict=True)
            ]
        return torch.cat(rows)

    plain = logits(base.model)
    load_adapter(base.model, adapter)
    live, merged = logits(base.model), logits(load(tmp_path / "m").model)
    lengths = [min(64, len(text.encode())) for text in own_prompts()]
    assert len(live) == report.probe["num_positions"] == sum(length - 1 for length in lengths)
    for other, found in (
        (merged, (report.kl, report.flips, report.logit_gap)),
        (plain, (report.adapter_kl, report.adapter_flips, report.adapter_effect)),
    ):
        # torch's kl_div takes the logarithms of the second distribution first.
        kl = functional.kl_div(
            other.log_softmax(-1), live.log_softmax(-1), reduction="batchmean", log_target=True
        )
        flips = (live.argmax(-1) != other.argmax(-1)).float().mean()
        wanted = (float(kl), float(flips), float((live - other).abs().max()))
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert report.kl > 1e-3


def test_what_survives_in_halves_is_the_projection_on_the_update(halves: Path, tmp_path: Path) -> None:
    adapter = trained(halves, tmp_path / "a")
    report = merge(adapter, tmp_path / "m")
    before, after = (load_file(path / "model.safetensors") for path in (halves, tmp_path / "m"))
    (found,) = report.candidates
    assert (found.name, found.stored_as) == ("dense", "bfloat16")
    kept = squares = errors = 0.0
    assert set(found.layers) == set(updates(adapter))
    for name, update in updates(adapter).items():
        assert after[name].dtype == torch.bfloat16
        written = after[name].double() - before[name].double()
        error = (after[name].double() - before[name].double() - update).square().sum()
        figures = found.layers[name]
        assert figures["survival"] == pytest.approx(
            float((written * update).sum() / update.square().sum()), rel=1e-5
        )
        assert figures["error"] == pytest.approx(float((error / update.square().sum()).sqrt()), rel=1e-3)
        kept, squares = kept + float((written * update).sum()), squares + float(update.square().sum())
        errors += float(error)
    assert found.survival == report.survival == pytest.approx(kept / squares, rel=1e-5)
    assert found.error == pytest.approx((errors / squares) ** 0.5, rel=1e-3)
    assert 0.9 < found.survival < 1.1


def test_requantized_weights_are_those_of_bitsandbytes(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    """The peer rounds the sum of decoded weight and update: the same values, and the same survival."""
    peer = pytest.importorskip("bitsandbytes.functional")
    plain = QuantizationConfig(quant_type="nf4", double_quant=False)
    wide = tiny_dir("llama", hidden_size=64, intermediate_size=128)  # rows of whole blocks: all that it does
    adapter = trained(wide, tmp_path / "a", 0.3, quantization=plain)
    report = merge(adapter, tmp_path / "m", into="requantized")
    assert report.quantization is not None
    assert report.quantization["quant_type"] == "nf4"

    def rounded(weight: Tensor) -> Tensor:
        return peer.dequantize_4bit(*peer.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4"))

    dense = load_file(wide / "model.safetensors")
    merged = load(tmp_path / "m")
    assert merged.quantization == plain
    for name, update in updates(adapter).items():
        decoded = merged.model.get_submodule(name.removesuffix(".weight")).dense_weight(torch.float32)
        start = dense[name] if report.folded_into == "requantized_dense" else rounded(dense[name])
        torch.testing.assert_close(decoded, rounded(start + update.float()), atol=1e-6, rtol=1e-5)
        live = rounded(dense[name])
        distance = float((dense[name] - live).double().norm() / update.norm())
        assert report.candidate("dense").layers[name]["error"] == pytest.approx(distance, rel=1e-3)
        for form, origin in (("requantized", live), ("requantized_dense", dense[name])):
            written = (rounded(origin + update.float()) - rounded(origin)).double()
            survival = float((written * update).sum() / update.square().sum())
            assert report.candidate(form).layers[name]["survival"] == pytest.approx(survival, abs=1e-4)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "int4", "e2m1", "nf3"])
def test_every_format_is_written_and_read_back(
    tiny_dir: Callable[..., Path], quant_type: str, tmp_path: Path
) -> None:
    adapter = trained(tiny_dir("qwen2"), tmp_path / "a", 0.3)
    report = merge(adapter, tmp_path / "m", into="requantized", quantization=quant_type)
    assert [item.name for item in report.candidates] == ["dense", "requantized"]
    merged = load(tmp_path / "m")
    assert merged.quantization is not None
    assert merged.quantization.quant_type == quant_type
    assert merged.fingerprint.weights == report.fingerprint.weights
    assert report.candidate("requantized").num_bytes < report.candidate("dense").num_bytes
    live = load(tiny_dir("qwen2"))
    load_adapter(live.model, adapter)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        gap = float((merged.model(ids).logits - live.model(ids).logits).abs().max())
    assert 0 < gap < 20 * max(report.logit_gap, 1e-3)
    merge(adapter, tmp_path / "d")
    in_two_steps = graft.quantize(tmp_path / "d", quant_type, tmp_path / "q")
    assert in_two_steps.weights == report.fingerprint.weights


def test_the_layout_of_bitsandbytes_loads_in_transformers(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    wide = tiny_dir("llama", hidden_size=64, intermediate_size=128)
    adapter = trained(wide, tmp_path / "a", 0.3, quantization="nf4")
    report = merge(adapter, tmp_path / "m", into="requantized")
    ids = torch.arange(5, 60)[None]
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    peer.train()  # multiplies by the decoded weight; in eval mode it repacks with bfloat16 scales
    with torch.no_grad():
        wanted = peer(ids).logits
        torch.testing.assert_close(load(tmp_path / "m").model(ids).logits, wanted, atol=1e-3, rtol=1e-3)
    assert report.kl == min(item.kl for item in report.candidates if item.name.startswith("requantized"))


def test_an_update_that_halves_cannot_hold_is_refused_with_the_numbers(halves: Path, tmp_path: Path) -> None:
    adapter = trained(halves, tmp_path / "a", 3e-5)
    with pytest.raises(AdapterError, match="survives rounding") as caught:
        merge(adapter, tmp_path / "m")
    assert "dense in bfloat16" in caught.value.what
    assert "float32" in caught.value.fix
    assert "--allow-no-op" in caught.value.fix
    assert not (tmp_path / "m").exists()
    report = merge(adapter, tmp_path / "m", dtype="float32")
    assert report.survival == pytest.approx(1, abs=1e-3)
    forced = merge(adapter, tmp_path / "n", allow_no_op=True)
    assert forced.survival < 0.1
    assert json.loads((tmp_path / "n" / "graft.json").read_text())["merge"]["allowed_no_op"] is True


def test_an_update_lost_in_codes_is_refused_where_codes_were_asked_for(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """Decoded weights lie on the grid: a small update never leaves it."""
    from graft.models.quantize import quantize

    quantize(tiny_dir("llama"), "nf4", tmp_path / "base")
    adapter = trained(tmp_path / "base", tmp_path / "a", 2e-3)
    with pytest.raises(AdapterError, match="requantized in nf4") as caught:
        merge(adapter, tmp_path / "m", into="requantized")
    assert "--into dequantized" in caught.value.fix
    assert merge(adapter, tmp_path / "m").folded_into == "dequantized"


def test_what_a_base_in_codes_keeps_dense_stays_dense(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    from graft.models.quantize import quantize
    from graft.quant.linear import quantized_modules

    settings = QuantizationConfig(quant_type="nf4", skip_modules=("o_proj",))
    quantize(tiny_dir("llama"), settings, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["quantization_config"]["skip_modules"]  # a word of graft's, which other writers do not know
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapter = trained(tmp_path / "base", tmp_path / "a", 0.3)
    merge(adapter, tmp_path / "m", into="requantized")
    found, wanted = (quantized_modules(load(tmp_path / name).model) for name in ("m", "base"))
    assert set(found) == set(wanted)
    assert not any("o_proj" in path for path in found)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.o_proj" in config["llm_int8_skip_modules"]


def test_an_adapter_that_moves_no_logit_is_refused(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    adapter = trained(tiny_dir("llama"), tmp_path / "a", 1e-12)
    with pytest.raises(AdapterError, match="changes nothing") as caught:
        merge(adapter, tmp_path / "m")
    assert "--allow-no-op" in caught.value.fix
    assert merge(adapter, tmp_path / "m", allow_no_op=True).adapter_effect < 1e-6


def test_arguments_that_cannot_act_are_refused(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    adapter = trained(tiny_dir("llama"), tmp_path / "a")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"into": "quantised"}, "no way to write"),
        ({"into": "dense", "from_quantized": True}, "into for 'dense'"),
        ({"into": "dense", "quantization": "nf4"}, "quantization cannot act"),
        ({"into": "dequantized"}, "trained on a dense base"),
        ({"into": "requantized"}, "nothing says how to quantize"),
    ]
    for arguments, what in cases:
        with pytest.raises(AdapterError, match=what):
            merge(adapter, tmp_path / "m", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_base_weight_in_the_file_must_be_this_bases(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT writes the base's own embedding and head beside the adapter of one of them."""
    base = load(tiny_dir("qwen2"))
    attach(base.model, graft.LoraConfig(rank=2, target_modules=("embed_tokens",)))
    with torch.no_grad():
        for tensor in adapter_tensors(base.model).values():
            tensor.add_(0.1)
    save_adapter(base.model, tmp_path / "a")
    (tmp_path / "a" / "graft.json").unlink()  # as another tool writes it
    weights = tmp_path / "a" / "adapter_model.safetensors"
    own = base.model.lm_head.weight.detach().clone()
    for key in ("model.embed_tokens.base_layer.weight", "lm_head.weight"):
        save_file({**load_file(weights), f"base_model.model.{key}": own.clone()}, weights)
    report = merge(tmp_path / "a", tmp_path / "m", base=tiny_dir("qwen2"))
    assert report.untied
    for key in ("model.embed_tokens.base_layer.weight", "lm_head.weight"):
        save_file({**load_file(weights), f"base_model.model.{key}": own + 1}, weights)
        with pytest.raises(AdapterError, match="differs from this base"):
            merge(tmp_path / "a", tmp_path / "n", base=tiny_dir("qwen2"))
        save_file({**load_file(weights), f"base_model.model.{key}": own.clone()}, weights)


def test_a_projection_of_the_file_is_used(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    """What all layers share comes from the file, not from its seed alone."""
    base = load(tiny_dir("llama"))
    attach(base.model, graft.VeraConfig(rank=12, target_modules=("q_proj", "v_proj")))
    with torch.no_grad():
        for tensor in adapter_tensors(base.model).values():
            tensor.add_(0.3)
    save_adapter(base.model, tmp_path / "a")
    (tmp_path / "a" / "graft.json").unlink()  # as another tool writes it
    weights = tmp_path / "a" / "adapter_model.safetensors"
    other = {
        name: tensor.flip(0) if "vera_A" in name else tensor for name, tensor in load_file(weights).items()
    }
    save_file({name: tensor.contiguous() for name, tensor in other.items()}, weights)
    live = load(tiny_dir("llama"))
    load_adapter(live.model, tmp_path / "a")
    ids = torch.arange(5, 60)[None]
    merge(tmp_path / "a", tmp_path / "m", base=tiny_dir("llama"))
    with torch.no_grad():
        merged = load(tmp_path / "m").model(ids).logits
        torch.testing.assert_close(merged, live.model(ids).logits, atol=1e-5, rtol=1e-5)
        assert float((merged - base.model(ids).logits).abs().max()) > 1e-3


def test_probes(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = load(tiny_dir("llama"))
    config, tokenizer = base.model.config, base.tokenizer
    assert len(own_prompts()) == 16
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"add {a}: ", "completion": f"{a}"} for a in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    probe = make_probe(config, tokenizer, None, str(rows))
    assert (probe.kind, probe.source, len(probe.batch.input_ids)) == ("data", str(rows), 12)
    # Of each row the answer and the end-of-text token are compared, nothing of the prompt.
    assert probe.batch.num_labelled_tokens == sum(len(line["completion"]) + 1 for line in lines)
    assert int(probe.positions.sum()) == probe.batch.num_labelled_tokens
    blank = make_probe(config, None, None, None)
    assert (blank.kind, blank.to_dict()["num_positions"]) == ("random", 2 * 31)
    with pytest.raises(AdapterError, match="no tokenizer"):
        make_probe(config, None, None, str(rows))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    for form, begin in (("messages", "<user>Once"), ("text", "Once upon")):
        adapter = trained(tiny_dir("llama"), tmp_path / form, facts={"format": form})
        ids = make_probe(config, tokenizer, read_side_file(adapter), None).batch.input_ids[0]
        assert tokenizer.decode(ids, skip_special_tokens=True).startswith(begin)
    (tmp_path / "empty.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError):
        make_probe(config, tokenizer, None, str(tmp_path / "empty.jsonl"))


def test_rows_of_the_training_data_are_told(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    base = graft.load(str(tiny_dir("llama")))
    graft.attach(base.model, graft.LoraConfig(rank=4))
    made = graft.train(base, data=str(rows), output=str(tmp_path / "run"), max_steps=3, learning_rate=1e-2)
    report = merge(made.adapter, tmp_path / "m", data=str(rows))
    assert report.probe["kind"] == "data"
    assert any("trained on" in note for note in report.notes)
    rows.write_text(rows.read_text().replace("add", "sum"))
    assert not any("trained on" in n for n in merge(made.adapter, tmp_path / "n", data=rows).notes)


def test_a_logits_budget_cuts_the_probe(tiny_dir: Callable[..., Path], monkeypatch: Any) -> None:
    base = load(tiny_dir("llama"))
    monkeypatch.setattr("graft.adapters.probe.MAX_LOGITS_BYTES", 4 * 264 * 100)
    probe = make_probe(base.model.config, base.tokenizer, None, None)
    assert probe.batch.num_labelled_tokens == 100


def test_damaged_files_are_noticed(tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    adapter = trained(tiny_dir("llama"), tmp_path / "a")

    def damaged(weights: Any, form: Any, directory: Path, *args: Any, **more: Any) -> Any:
        made = write_merged(weights, form, directory, *args, **more)
        data = bytearray((directory / "model.safetensors").read_bytes())
        data[-4000:-2000] = bytes(2000)
        (directory / "model.safetensors").write_bytes(data)
        return made

    monkeypatch.setattr(merging, "write_merged", damaged)
    with pytest.raises(StorageError, match="read back as another model"):
        merge(adapter, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


PHASES = ["reading the base", "measuring the live model", "measuring dequantized", "writing", "reading back"]


@pytest.mark.parametrize("phase", PHASES)
def test_stopped_anywhere_nothing_is_left(tiny_dir: Callable[..., Path], tmp_path: Path, phase: str) -> None:
    adapter = trained(tiny_dir("llama"), tmp_path / "a", quantization="nf4")

    def stop(what: str, done: int, total: int) -> None:
        assert 0 < done <= total
        if what == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "m", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_killed_while_writing_leaves_no_directory(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    adapter = trained(tiny_dir("llama"), tmp_path / "a")
    program = (
        "import os, signal, graft\n"
        "def stop(what, done, total):\n"
        "    if what in ('writing', 'reading back') and 2 * done > total:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"graft.merge({str(adapter)!r}, {str(tmp_path / 'm')!r}, progress=stop)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.name != "a"]
    assert all(name.endswith(".partial") for name in left)
    assert merge(adapter, tmp_path / "m").directory == tmp_path / "m"


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_is_named(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    adapter = trained(tiny_dir("llama"), tmp_path / "a")
    with largest_file(80_000), pytest.raises(StorageError, match="cannot be written") as caught:
        merge(adapter, tmp_path / "m")
    assert "bytes were needed" in caught.value.what
    assert "are free" in caught.value.what
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("into", ["dequantized", "requantized"])
def test_shards_and_the_memory_of_a_few_tensors(
    tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: Any, into: Any
) -> None:
    """Of all that is read no more than three tensors are alive at once, and shards change no value."""
    adapter = trained(tiny_dir("llama", num_hidden_layers=6), tmp_path / "a", 0.3, quantization="nf4")
    alive: set[int] = set()
    most = 0
    read = merged_files.TensorStream.read

    def counted(self: Any, source: Any) -> Tensor:
        nonlocal most
        tensor = read(self, source).clone()
        number = len(seen)
        seen.append(source.name)
        alive.add(number)
        weakref.finalize(tensor, alive.discard, number)
        most = max(most, len(alive))
        return tensor

    seen: list[str] = []
    monkeypatch.setattr(merged_files.TensorStream, "read", counted)
    found = open_base(adapter, None, None, force_base=False, scratch=tmp_path / "none")
    forms = {form.name: form for form in found.forms(into, None)}
    for name, size in (("whole", 1 << 30), ("parts", 30_000)):
        seen.clear()
        alive.clear()
        most = 0
        where = tmp_path / name
        write_merged(found.weights, forms[into], where, found.tokenizer, found.dtype, max_shard_bytes=size)
        assert len(seen) > 50
        assert most <= 3, most
    one, many = (
        {name: t for file in (tmp_path / kind).glob("*.safetensors") for name, t in load_file(file).items()}
        for kind in ("whole", "parts")
    )
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 4
    assert one.keys() == many.keys()
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())


def test_the_command_prints_a_table_and_answers_with_json(
    tiny_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained(tiny_dir("llama"), tmp_path / "a", 0.3, quantization="nf4")
    words = ["merge", str(adapter), "--into", "requantized", "--quant-type", "int4"]
    assert run([*words, "--out", str(tmp_path / "m")]) == 0
    told = capsys.readouterr().out
    for word in ("survival", "dense", "* requantized", "int4", "16 prompts that come with graft"):
        assert word in told
    assert run([*words, "--out", str(tmp_path / "n"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    kept = json.loads((tmp_path / "n" / "graft.json").read_text())["merge"]
    assert answer["certificate"]["candidates"] == kept["candidates"]
    assert len(kept["candidates"]) == 4
    assert run(["merge", str(adapter), "--into", "sideways", "--out", str(tmp_path / "o"), "--json"]) == 2
    assert "sideways" in json.loads(capsys.readouterr().out)["error"]["what"]
