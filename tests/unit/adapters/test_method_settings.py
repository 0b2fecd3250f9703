"""How a method is chosen: by a file, by flags, in Python; its fields, presets, rates; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graft
from graft.adapters.base import METHODS, config_classes
from graft.config import Settings, build, from_dict, read_assignments, read_yaml, to_dict
from graft.errors import ConfigError
from graft.training.config import RunConfig

OTHERS = [name for name in METHODS if name != "lora"]


def assigned(*words: str) -> RunConfig:
    return build(RunConfig, read_assignments(words))


@pytest.mark.parametrize("name", METHODS)
def test_a_file_a_word_and_a_flag_choose_the_method(name: str, tmp_path: Path) -> None:
    kind = config_classes()[name]
    (tmp_path / "run.yaml").write_text(f"adapter: {{method: {name}, layers: [1]}}\n")
    from_file: Any = build(RunConfig, read_yaml(tmp_path / "run.yaml")).adapter
    assert type(from_file) is kind
    assert from_file.layers == (1,)
    (tmp_path / "word.yaml").write_text(f"adapter: {name}\n")
    assert type(build(RunConfig, read_yaml(tmp_path / "word.yaml")).adapter) is kind
    assert type(assigned(f"adapter.method={name}").adapter) is kind
    assert type(assigned("adapter.layers=[1]", f"adapter.method={name}").adapter) is kind


@pytest.mark.parametrize("name", METHODS)
def test_settings_are_written_and_read_again(name: str) -> None:
    config = assigned(f"adapter.method={name}", "adapter.exclude_modules=[q_proj]")
    assert from_dict(RunConfig, to_dict(config), "run.json") == config


@pytest.mark.parametrize("name", METHODS)
def test_classes_are_public(name: str) -> None:
    kind = config_classes()[name]
    assert getattr(graft, kind.__name__) is kind
    assert kind().method == name


def test_without_a_method_it_is_lora() -> None:
    assert type(assigned("adapter.rank=4").adapter) is graft.LoraConfig
    assert assigned("training.seed=1").adapter is None


def test_unknown_methods_name_the_closest() -> None:
    with pytest.raises(ConfigError, match="unknown adapter method 'dorra'") as caught:
        assigned("adapter.method=dorra", "adapter.rank=4")
    assert caught.value.fix == "did you mean 'dora'?"
    assert caught.value.where == "--set adapter.method"
    with pytest.raises(ConfigError, match="unknown adapter 'dorra'"):
        assigned("adapter=dorra")


def test_fields_of_other_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown name 'adapter.rank'"):
        assigned("adapter.method=ia3", "adapter.rank=4")
    with pytest.raises(ConfigError, match="unknown name 'adapter.d_initial'"):
        assigned("adapter.method=dora", "adapter.d_initial=1")


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("adapter.method=dora", "adapter.rank=0"), "adapter.rank"),
        (("adapter.method=lora_fa", "adapter.alpha=-1"), "adapter.alpha"),
        (("adapter.method=vera", "adapter.d_initial=0"), "adapter.d_initial"),
        (("adapter.method=vera", "adapter.projection_seed=-1"), "adapter.projection_seed"),
        (("adapter.method=ia3", "adapter.feedforward_modules=[fc]"), "adapter.feedforward_modules"),
        (("adapter.method=oft", "adapter.series_order=1"), "adapter.series_order"),
        (("adapter.method=dora", "adapter.layers=[-1]"), "adapter.layers"),
        (("adapter.method=dora", "adapter.target_modules=[]", "adapter.layers=[1]"), "adapter."),
    ],
)
def test_values_that_cannot_be_are_refused(words: tuple[str, ...], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        assigned(*words)
    assert where in caught.value.where


@pytest.mark.parametrize("name", OTHERS)
def test_presets_leave_a_method_the_fields_that_it_lacks(name: str) -> None:
    settings = read_assignments([f"adapter.method={name}", "preset=instruction"])
    config: Any = build(RunConfig, settings).adapter
    assert getattr(config, "rank", None) == (
        64 if name in ("dora", "lora_fa", "qa_lora") else getattr(config_classes()[name](), "rank", None)
    )


def test_a_flag_for_each_method() -> None:
    from graft.cli.train import METHODS as FLAGS

    assert set(METHODS) <= set(FLAGS)
    for name in OTHERS:
        settings = Settings()
        for path, value in FLAGS[name].items():
            settings.put(path, value, "--method")
        assert build(RunConfig, settings).adapter == config_classes()[name]()
