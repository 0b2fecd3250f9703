"""From a configuration, or a model in memory, to a run that can be resumed from anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.adapters.attach import attach, set_active
from graft.adapters.attached import adapter_tensors
from graft.adapters.lora import LoraConfig
from graft.adapters.merge import merge
from graft.adapters.peft_format import load_adapter
from graft.config import build, read_assignments
from graft.data.config import DataConfig
from graft.errors import CheckpointError, ConfigError, ModelError, TargetError, TrainingError
from graft.models.load import load
from graft.training.build import resume, run_from_config, train
from graft.training.config import RunConfig
from graft.training.inputs import rooted
from graft.training.loop import Training
from graft.training.monitors import Silent

WORDS = ("training.max_steps=2", "training.batch_size=2", "data.max_length=64", "adapter.rank=4")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}: ", "completion": f"{i}"}) + "\n" for i in range(8)))
    return path


def config(model: object, rows: object, out: object, *more: str) -> RunConfig:
    words = [f"model.name={model}", f"data.train={rows}", f"output={out}", *WORDS, *more]
    return build(RunConfig, read_assignments(words))


class Killed(BaseException):
    """Stands for a kill: nobody handles it."""


def kill_before_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Training._step

    def step(self: Training, batches: Any) -> None:
        if self.position.step == number:
            raise Killed
        real(self, batches)

    monkeypatch.setattr(Training, "_step", step)


def test_relative_paths_resume_from_another_directory(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        kill_before_step(1, patch)
        with pytest.raises(Killed):
            run_from_config(config("model", "rows.jsonl", "run"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = resume(Path("..") / "run")
    assert run.adapter is not None
    told = json.loads((run.adapter / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(tmp_path / "model")
    merge(run.adapter, "merged")
    assert (tmp_path / "elsewhere" / "merged" / "config.json").exists()


def test_evaluation_data_of_a_data_config_counts(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    base = load(tiny_dir("llama"))
    attach(base.model, LoraConfig(rank=4))
    settings: dict[str, Any] = {"data": str(rows), "output": tmp_path / "run", "max_steps": 1}
    for name in ("train", "eval"):
        twice: dict[str, Any] = {name: "other.jsonl"}
        with pytest.raises(ConfigError, match=r"data_config names other.jsonl"):
            train(base, **settings, eval_data=str(rows), data_config=DataConfig(max_length=64, **twice))
    run = train(base, **settings, data_config=DataConfig(max_length=64, eval=str(rows)))
    record = json.loads((run.directory / "run.json").read_text())
    assert record["identity"]["evaluation data"] is not None


def test_full_paths_are_those_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name on the hub is no path, and a file has one name however it is written."""
    monkeypatch.chdir(tmp_path)
    hub = "hub:owner/name:part@main"
    found = rooted(RunConfig(output="run", data=DataConfig(mix={"a.jsonl": 1.0, hub: 2.0}, cache="kept")))
    assert dict(found.data.mix) == {f"{tmp_path}/a.jsonl": 1.0, hub: 2.0}
    assert found.data.cache == f"{tmp_path}/kept"
    with pytest.raises(ConfigError, match=r"names .*/a.jsonl twice"):
        rooted(RunConfig(output="run", data=DataConfig(mix={"a.jsonl": 1.0, "./a.jsonl": 2.0, "b.csv": 1.0})))


def test_finished_run_is_left_as_it_is(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    run = run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run"))
    shutil.rmtree(run.directory / "checkpoints")  # to make room; the result is there
    rows.unlink()
    before = {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}
    again = resume(run.directory)
    assert (again.adapter, again.metrics) == (run.adapter, run.metrics)
    assert {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()} == before


def test_record_without_its_parts_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"run\.json has no status, config"):
        resume(tmp_path)


def test_run_of_a_trained_adapter_goes_on_from_it(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_from_config(
        config(tiny_dir("llama"), rows, tmp_path / "first", "training.learning_rate=1e-1")
    )
    settings: dict[str, Any] = {"data": rows, "max_steps": 2, "batch_size": 2}

    def further(name: str) -> Any:
        base = load(tiny_dir("llama"))
        assert first.adapter is not None
        load_adapter(base.model, first.adapter, trainable=True)
        return train(base, output=tmp_path / name, **settings)

    straight = further("straight")
    with monkeypatch.context() as patch:
        kill_before_step(0, patch)
        with pytest.raises(Killed):
            further("killed")
    resumed = resume(tmp_path / "killed")
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in (straight, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    shutil.rmtree(tmp_path / "killed" / "adapter")
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    with pytest.raises(CheckpointError, match="in memory"):
        resume(tmp_path / "killed")


def test_the_adapter_that_acts_is_trained(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    base = load(tiny_dir("llama"))
    attach(base.model, LoraConfig(rank=2), "one")
    attach(base.model, LoraConfig(rank=3), "two")
    set_active(base.model, ["one", "two"])
    with pytest.raises(TrainingError, match="one must, to be trained"):
        train(base, data=rows, output=tmp_path / "run", max_steps=1)
    set_active(base.model, "one")
    run = train(base, data=rows, output=tmp_path / "run", max_steps=2)
    moved = {
        name: max(
            float(t.detach().abs().max())
            for key, t in adapter_tensors(base.model, name).items()
            if "_B" in key
        )
        for name in ("one", "two")
    }
    assert moved["one"] > 0 == moved["two"]
    assert run.adapter is not None
    assert json.loads((run.adapter / "adapter_config.json").read_text())["r"] == 2
    loaded = load(tiny_dir("llama"))
    load_adapter(loaded.model, run.adapter)
    with pytest.raises(TrainingError, match="for use, not for training"):
        train(loaded, data=rows, output=tmp_path / "second", max_steps=1)


def test_after_full_training_the_base_is_another_one(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    base = load(tiny_dir("llama"))
    run = train(base, data=rows, output=tmp_path / "full", max_steps=1, learning_rate=1e-2)
    assert run.model is not None
    attach(base.model, LoraConfig(rank=2))
    second = train(base, data=rows, output=tmp_path / "adapter", max_steps=1)
    assert second.adapter is not None
    saved = load(run.model)
    assert saved.fingerprint == base.fingerprint
    load_adapter(saved.model, second.adapter)


def test_diverged_weights_are_not_written(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    made = config(tiny_dir("llama"), rows, tmp_path / "run", "adapter=", "training.learning_rate=1e300")
    with pytest.raises(TrainingError, match="diverged|none of 2 steps"):
        run_from_config(made)
    assert not (tmp_path / "run" / "model").exists()


def test_run_that_trained_nothing_is_not_done(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="none of 2 steps"):
        run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", "adapter.alpha=1e38"))
    assert not (tmp_path / "run" / "adapter").exists()


def test_eval_steps_need_evaluation_data(tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_steps needs"):
        run_from_config(config(tiny_dir("llama"), rows, tmp_path / "run", "training.eval_steps=1"))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_that_fits_nothing(tiny_dir: Callable[..., Path], field: str) -> None:
    base = load(tiny_dir("llama"))
    settings: dict[str, Any] = {field: ("q_prok=4",)}
    with pytest.raises(TargetError, match="matches none") as caught:
        attach(base.model, LoraConfig(**settings))
    assert "q_proj" in caught.value.fix


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def test_chat_template_acts_or_is_refused(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    more = f"data.chat_template={template}"
    with pytest.raises(ConfigError, match="does not act on prompt_completion"):
        run_from_config(config(tiny_dir("llama"), rows, tmp_path / "refused", more))
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    with monkeypatch.context() as patch:
        kill_before_step(1, patch)
        with pytest.raises(Killed):
            run_from_config(config(tiny_dir("llama"), chats, tmp_path / "run", more))
    template.write_text(TEMPLATE.replace(": ", " says "))
    with pytest.raises(CheckpointError, match="chat template file was"):
        resume(tmp_path / "run")
    template.write_text(TEMPLATE)
    run = resume(tmp_path / "run")
    assert run.adapter is not None
    merge(run.adapter, tmp_path / "merged")
    assert load(tmp_path / "merged").tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_samples_are_kept_within_the_models_context(
    family: str, tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_dir(family)
    context = load(model).model.config.max_position_embeddings
    rows = tmp_path / "rows.txt"
    rows.write_text("once upon a time " * 40)
    run = run_from_config(config(model, rows, tmp_path / "run", "data.max_length=1024"))
    record = json.loads((run.directory / "run.json").read_text())
    assert record["config"]["data"]["max_length"] == context


@pytest.mark.parametrize("name", ["a directory", "builtin"])
def test_a_revision_that_cannot_act_is_refused(
    name: str, tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    model = tiny_dir("llama") if name == "a directory" else name
    with pytest.raises(ModelError, match="revision 'main' cannot act") as caught:
        run_from_config(config(model, rows, tmp_path / "run", "model.revision=main"))
    assert "model.revision" in caught.value.where
    assert not (tmp_path / "run").exists()


def test_a_revision_goes_to_the_hub_and_into_the_adapter(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(name: str, *, revision: str | None = None, **more: Any) -> str:
        asked.append((name, revision))
        return str(tiny_dir("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with monkeypatch.context() as patch:
        kill_before_step(1, patch)
        with pytest.raises(Killed):
            run_from_config(config("some/model", rows, tmp_path / "run", "model.revision=v1.0"))
    run = resume(tmp_path / "run")
    assert set(asked) == {("some/model", "v1.0")}
    assert run.adapter is not None
    told = json.loads((run.adapter / "adapter_config.json").read_text())
    assert (told["base_model_name_or_path"], told["revision"]) == ("some/model", "v1.0")


def test_full_training_of_a_base_loaded_in_bf16_resumes_to_the_same_bytes(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(out: Path) -> Any:
        base = load(tiny_dir("llama"), dtype="bfloat16")  # the files are float32
        return train(base, data=rows, output=out, max_steps=3, batch_size=2, save_steps=1)

    straight = start(tmp_path / "straight")
    with monkeypatch.context() as patch:
        kill_before_step(2, patch)
        with pytest.raises(Killed):
            start(tmp_path / "cut")
    again = resume(tmp_path / "cut")
    assert straight.model is not None
    assert again.model is not None
    assert {t.dtype for t in load_file(straight.model / "model.safetensors").values()} == {torch.bfloat16}
    for name in ("model.safetensors", "config.json"):
        assert (straight.model / name).read_bytes() == (again.model / name).read_bytes()


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_number_told_is_that_of_the_base(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, quantization: str | None
) -> None:
    class Listener(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    directory = tiny_dir("llama")
    expected = sum(t.numel() for t in load_file(directory / "model.safetensors").values())
    base = load(directory, quantization=quantization)
    attach(base.model, LoraConfig(rank=4, modules_to_save=("lm_head",)))
    train(base, data=rows, output=tmp_path / "run", monitor=Listener(), max_steps=1)
    assert any(line.endswith(f"the base has {expected:,}") for line in said), said


def test_a_setting_that_the_model_cannot_follow_leaves_no_run_behind(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ModelError, match="no MLP of GPT2LMHeadModel"):
        run_from_config(config(tiny_dir("gpt2"), rows, out, "training.mlp_tile=16"))
    assert not out.exists()
    base = load(tiny_dir("gpt2"))
    attach(base.model, LoraConfig(rank=4))
    with pytest.raises(ModelError, match="no MLP of GPT2LMHeadModel"):
        train(base, data=rows, output=out, mlp_tile=16, max_steps=1)
    assert not out.exists()
