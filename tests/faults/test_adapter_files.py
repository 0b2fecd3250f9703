"""Damaged, hostile and foreign adapter directories: refused by file and tensor, the model left as it was."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graft.models.load as models
from graft.adapters.attach import adapter_tensors, adapters_of, attach
from graft.adapters.lora import LoraConfig
from graft.adapters.peft_format import load_adapter, save_adapter
from graft.errors import AdapterError, FingerprintError, StorageError

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
NORM = "base_model.model.model.norm.weight"
IDS = torch.randint(3, 259, (1, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def saved(tiny_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = models.load(tiny_dir("llama"))
    attach(base.model, LoraConfig(rank=4, modules_to_save=("norm",)))
    with torch.no_grad():
        for tensor in adapter_tensors(base.model).values():
            tensor.add_(0.1)
    return save_adapter(base.model, tmp_path_factory.mktemp("saved") / "adapter", facts={"data": "x"})


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def model(tiny_dir: Callable[..., Path]) -> Any:
    return models.load(tiny_dir("llama")).model


def refused(model: Any, directory: Path, told: str, where: str = "", **options: Any) -> AdapterError:
    """Loading raises an AdapterError that tells what and where, and the model stays as it was."""
    before = list(model.state_dict())
    with pytest.raises(AdapterError, match=told) as caught:
        load_adapter(model, directory, **options)
    error = caught.value
    assert where in error.where, error.where
    assert error.fix
    assert len(str(error)) < 2000
    assert list(model.state_dict()) == before
    assert adapters_of(model) == {}
    return error


def as_foreign(directory: Path) -> None:
    """As another tool would have written it: without graft.json."""
    (directory / "graft.json").unlink(missing_ok=True)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    as_foreign(directory)


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    as_foreign(directory)


def test_untouched_copy_loads(model: Any, directory: Path) -> None:
    from graft.adapters.attach import detach

    adapter = load_adapter(model, directory)
    assert adapter.facts == {"data": "x"}
    assert adapter.notes == []
    assert not any(p.requires_grad for p in model.parameters())
    detach(model)
    assert load_adapter(model, directory, trainable=True).num_trainable == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    detach(model)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bias", "some"),
        ("use_bdlora", {"x": 1}),
        ("trainable_token_indices", {"embed_tokens": [1], "lm_head": [2]}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [5]),
        ("arrow_config", {"top_k": 1}),
        ("use_qalora", True),
        ("loftq_config", {"bits": 4}),
        ("corda_config", {"x": 1}),
        ("megatron_config", {"x": 1}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("peft_type", "POLY"),
        ("peft_type", None),
    ],
)
def test_unsupported_options_are_refused_by_name(
    model: Any, directory: Path, option: str, value: Any
) -> None:
    change_config(directory, **{option: value})
    refused(model, directory, option, "adapter_config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 1.5),
        ("r", "8"),
        ("r", True),
        ("r", 1_000_000),
        ("r", 10**30),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", -16),
        ("lora_alpha", "16"),
        ("lora_dropout", 1.5),
        ("lora_dropout", -0.1),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [1, 2]),
        ("modules_to_save", "norm"),
        ("layers_to_transform", ["1"]),
        ("layers_to_transform", [-2]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("use_rslora", "yes"),
    ],
)
def test_values_out_of_range_are_named(model: Any, directory: Path, field: str, value: Any) -> None:
    change_config(directory, **{field: value})
    refused(model, directory, "[a-z]", field)


def test_an_expression_that_backtracks_without_end_is_bounded(model: Any, directory: Path) -> None:
    change_config(directory, target_modules=r"((.|..)+)+\d\d")
    refused(model, directory, "takes more than", "adapter_config.json")


def test_a_million_targets(model: Any, directory: Path) -> None:
    change_config(directory, target_modules=[f"name_{number}" for number in range(1_000_000)])
    refused(model, directory, "matched no layer", "adapter_config.json")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not a JSON file"),
        ("{", "not a JSON file"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not a JSON file"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "not a JSON"),
    ],
)
def test_configuration_that_is_not_json(model: Any, directory: Path, text: str, told: str) -> None:
    (directory / "adapter_config.json").write_text(text, encoding="latin-1")
    refused(model, directory, told, "adapter_config.json")


def test_targets_beyond_what_the_model_has_are_left_aside(model: Any, directory: Path) -> None:
    """PEFT writes target lists with names that only other models have."""
    from graft.adapters.attach import detach

    config = json.loads((directory / "adapter_config.json").read_text())
    change_config(directory, target_modules=[*config["target_modules"], "query"], unheard_of={"x": 1})
    adapter = load_adapter(model, directory)
    assert any("unheard_of" in note for note in adapter.notes)
    detach(model)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file(model: Any, directory: Path, file: str) -> None:
    (directory / file).unlink()
    refused(model, directory, "cannot be read|there is no adapter_model")


def test_missing_directory(model: Any, tmp_path: Path) -> None:
    refused(model, tmp_path / "nothing", "cannot be read", "nothing")


def test_pickles_are_never_opened(model: Any, directory: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(directory / "exploded"),)

    weights = directory / "adapter_model.safetensors"
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    content = weights.read_bytes()
    weights.unlink()
    refused(model, directory, "is a pickle and is not opened")
    weights.write_bytes(pickle.dumps(Bomb()))
    refused(model, directory, "not a whole safetensors file", "adapter_model.safetensors")
    assert not (directory / "exploded").exists()
    weights.write_bytes(content)
    from graft.adapters.attach import detach

    load_adapter(model, directory)
    detach(model)
    assert not (directory / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_file(model: Any, directory: Path, keep: float) -> None:
    path = directory / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 or keep == 0 else keep * len(data))])
    refused(model, directory, "safetensors file", "adapter_model.safetensors")


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9])
def test_header_length_beyond_the_file(model: Any, directory: Path, length: int) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(model, directory, "safetensors file", "adapter_model.safetensors")


def test_every_flipped_bit_of_the_data_is_found(model: Any, directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    step = (len(data) - start) // 23
    for position in range(start, len(data), step):
        flipped = data.copy()
        flipped[position] ^= 1
        path.write_bytes(flipped)
        refused(model, directory, "changed after the adapter was saved|NaN", "adapter_model.safetensors")


@pytest.mark.parametrize("file", ["adapter_config.json", "graft.json", "adapter_model.safetensors"])
def test_no_flipped_byte_anywhere_loads_another_adapter(model: Any, directory: Path, file: str) -> None:
    """Either an error that can be read, or exactly the adapter that was saved."""
    from graft.adapters.attach import detach

    good = load_file(directory / "adapter_model.safetensors")
    path = directory / file
    data = bytearray(path.read_bytes())
    end = len(data) if file.endswith("json") else 8 + struct.unpack("<Q", data[:8])[0]
    for position in range(0, end, max(1, end // 40)):
        flipped = data.copy()
        flipped[position] ^= 4
        path.write_bytes(flipped)
        try:
            adapter = load_adapter(model, directory)
        except AdapterError:
            assert adapters_of(model) == {}
            continue
        assert adapter.config.scaling == 4
        for key, tensor in adapter_tensors(model).items():
            assert torch.equal(tensor, good[f"base_model.model.{key}"])
        detach(model)


def test_settings_changed_after_saving(model: Any, directory: Path) -> None:
    path = directory / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 16', '"lora_alpha": 17'))
    refused(model, directory, "changed after the adapter was saved", "adapter_config.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [A, NORM])
def test_values_that_are_not_finite(model: Any, directory: Path, key: str, value: float) -> None:
    change_tensors(directory, lambda tensors: tensors[key].view(-1)[3:4].fill_(value))
    refused(model, directory, "1 of .* NaN or infinite", key)


def test_missing_extra_misnamed_and_misshaped_tensors(model: Any, directory: Path, saved: Path) -> None:
    def fresh() -> Path:
        shutil.rmtree(directory)
        return Path(shutil.copytree(saved, directory))

    change_tensors(fresh(), lambda t: t.pop(B))
    refused(model, directory, "1 of .* tensors are missing", B)
    change_tensors(fresh(), lambda t: t.pop(NORM))
    refused(model, directory, "missing", NORM)
    change_tensors(fresh(), lambda t: t.update({A.replace("q_proj", "x_proj"): t[A].clone()}))
    refused(model, directory, "no place in the model", "x_proj")
    change_tensors(fresh(), lambda t: t.update({"lora_A": t[A].clone()}))
    refused(model, directory, "not a tensor of a PEFT adapter", "lora_A")
    change_tensors(fresh(), lambda t: t.update({A: t[A].int()}))
    refused(model, directory, "not a tensor of a PEFT adapter", A)
    change_tensors(fresh(), lambda t: t.update({A: t[A].t().contiguous()}))
    refused(model, directory, r"the shape is \[32, 4\]", A)
    change_config(fresh(), r=8)
    refused(model, directory, r"the shape is \[4, 32\], model and settings make it \[8, 32\]", "lora_A")
    change_config(fresh(), target_modules=["q_proj"])
    refused(model, directory, "no place in the model", "lora_")


def test_base_weights_in_the_file_must_be_those_of_the_base(model: Any, directory: Path) -> None:
    from graft.adapters.attach import detach

    key = "base_model.model.lm_head.weight"
    same = model.lm_head.weight.detach().clone()
    change_tensors(directory, lambda t: t.update({key: same.bfloat16()}))
    load_adapter(model, directory)
    detach(model)
    change_tensors(directory, lambda t: t.update({key: same + 0.5}))
    refused(model, directory, "differs from this base", key)
    change_tensors(directory, lambda t: t.update({key: torch.cat([same, same[:8]])}))
    refused(model, directory, "grown vocabulary", key)


def test_half_precision_files_are_read(model: Any, directory: Path) -> None:
    from graft.adapters.attach import detach

    change_tensors(directory, lambda t: t.update({key: value.bfloat16() for key, value in t.items()}))
    load_adapter(model, directory)
    assert all(tensor.dtype == torch.float32 for tensor in adapter_tensors(model).values())
    detach(model)


def test_another_base_of_the_same_shape(
    tiny_dir: Callable[..., Path], directory: Path, tmp_path: Path
) -> None:
    path = tiny_dir("llama")
    other = models.load(path)
    from graft.models.save import save_model

    with torch.no_grad():
        other.model.lm_head.weight[5, 5] += 1
    save_model(other.model, other.tokenizer, tmp_path / "other")
    other = models.load(tmp_path / "other")
    expected = json.loads((directory / "graft.json").read_text())["base"]["weights"][:12]
    with pytest.raises(FingerprintError, match="--force-base") as caught:
        load_adapter(other.model, directory)
    assert expected in str(caught.value)
    assert other.fingerprint.weights[:12] in str(caught.value)
    adapter = load_adapter(other.model, directory, force_base=True)
    assert adapter.forced_base
    assert any("by force" in note for note in adapter.notes)
    save_adapter(other.model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "graft.json").read_text())["forced_base"] is True
    again = load_adapter(other.model, tmp_path / "again", "second")
    assert again.forced_base


def test_another_tokenizer_is_refused_and_another_quantization_noted(
    tiny_dir: Callable[..., Path], directory: Path
) -> None:
    quantized = models.load(tiny_dir("llama"), quantization="nf4", dtype="float32")
    adapter = load_adapter(quantized.model, directory)
    assert any("quantization: dense in training" in note for note in adapter.notes)
    import dataclasses

    base = models.load(tiny_dir("llama"))
    base.model.graft_fingerprint = dataclasses.replace(base.fingerprint, tokenizer="0" * 64)
    with pytest.raises(FingerprintError, match="tokenizer"):
        load_adapter(base.model, directory)


def test_modules_trained_in_full_are_not_put_on_codes(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = models.load(tiny_dir("llama"))
    attach(base.model, LoraConfig(target_modules=("v_proj",), modules_to_save=("q_proj",)))
    save_adapter(base.model, tmp_path / "a")
    quantized = models.load(tiny_dir("llama"), quantization="nf4")
    with pytest.raises(AdapterError, match="q_proj is quantized and cannot be trained in full"):
        load_adapter(quantized.model, tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "format 2"),
        ({"base": None}, "incomplete"),
        ({"tensors": 5}, "incomplete"),
        ({"tensors": "0" * 64}, "changed after"),
        ({"settings": "0" * 64}, "changed after"),
    ],
)
def test_damaged_side_file(model: Any, directory: Path, change: dict[str, Any], told: str) -> None:
    path = directory / "graft.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(model, directory, told)


def test_a_tensor_that_is_not_finite_is_never_saved(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = models.load(tiny_dir("llama"))
    attach(base.model, LoraConfig(rank=2))
    save_adapter(base.model, tmp_path / "a")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        adapter_tensors(base.model)["model.layers.0.self_attn.q_proj.lora_A.weight"][0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN"):
        save_adapter(base.model, tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before


def test_failed_save_leaves_the_old_adapter(
    tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = models.load(tiny_dir("llama"))
    attach(base.model, LoraConfig(rank=2))
    save_adapter(base.model, tmp_path / "a")
    old = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graft.files.sync_tree", full)
    with pytest.raises(StorageError, match="No space left"):
        save_adapter(base.model, tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == old
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_same_adapter_same_bytes(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        base = models.load(tiny_dir("llama"))
        attach(base.model, LoraConfig(rank=2, target_modules=("v_proj", "q_proj"), modules_to_save=("norm",)))
        save_adapter(base.model, tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert sorted(written[0]) == ["adapter_config.json", "adapter_model.safetensors", "graft.json"]


def test_second_adapter_takes_the_name_of_its_directory(
    tiny_dir: Callable[..., Path], directory: Path, tmp_path: Path
) -> None:
    base = models.load(tiny_dir("llama"))
    shutil.copytree(directory, tmp_path / "v1.2")
    assert load_adapter(base.model, directory).name == "default"
    assert load_adapter(base.model, tmp_path / "v1.2").name == "v1-2"
    with pytest.raises(AdapterError, match="already has an adapter"):
        load_adapter(base.model, directory, "default")


def test_a_file_without_targets_may_say_where_they_would_be(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    one, other = (models.load(tiny_dir("llama")).model for _ in range(2))
    attach(one, LoraConfig(target_modules=(), modules_to_save=("norm",)))
    save_adapter(one, tmp_path / "a")
    change_config(
        tmp_path / "a",
        layers_to_transform=[0],
        exclude_modules=["q_proj"],
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 2},
    )
    loaded = load_adapter(other, tmp_path / "a", trainable=True)
    assert loaded.targets == ()
    assert loaded.saved_modules == ("model.norm",)
