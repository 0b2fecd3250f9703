"""Runs that look fine and train nothing, or not what was asked for: each is stopped in its first steps."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from graft.adapters.adapted import AdaptedLayer, SavedModule
from graft.adapters.attach import install, replace_module
from graft.adapters.attached import adapter_modules
from graft.config import build, read_assignments
from graft.errors import TrainingError
from graft.models.experts import Experts
from graft.training import inputs, phases
from graft.training.build import run_from_config
from graft.training.config import RunConfig
from graft.training.loop import Training

Q = "model.layers.1.self_attn.q_proj"
PAIR = {f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"}


def layer(training: Training) -> Any:
    return training.job.model.get_submodule(Q).adapters["default"]


def every_layer(training: Training) -> list[Any]:
    modules = adapter_modules(training.job.model).values()
    return [module.adapters["default"] for module in modules if isinstance(module, AdaptedLayer)]


def tensor(training: Training) -> Any:
    return training.job.parameters[f"{Q}.lora_B.weight"]


def around_step(training: Training, then: Callable[[int], None], before: bool = False) -> None:
    """Do something at every optimizer step; it is told the number of the step."""
    real, done = training.optimizer.step, [0]

    def step(*given: Any) -> None:
        done[0] += 1
        if before:
            then(done[0])
        real(*given)
        if not before:
            then(done[0])

    training.optimizer.step = step  # type: ignore[method-assign]


# Each plants one defect in the objects of a run that is about to start.


def unfreeze_base(training: Training) -> None:
    training.job.model.get_submodule("model.norm").weight.requires_grad_(True)


def freeze_trained(training: Training) -> None:
    tensor(training).requires_grad_(False)


def zero_both_factors(training: Training) -> None:
    layer(training).lora_A.data.zero_()


def fill_both_factors(training: Training) -> None:
    layer(training).lora_B.data.normal_()


def scale_by_zero(training: Training) -> None:
    layer(training).scaling = 0.0


def scale_otherwise(training: Training) -> None:
    layer(training).scaling *= 2


def put_one_layer_to_sleep(training: Training) -> None:
    training.job.model.get_submodule(Q).active = ()


def put_all_layers_to_sleep(training: Training) -> None:
    for module in adapter_modules(training.job.model).values():
        module.active = ()


def take_layer_out(training: Training) -> None:
    replace_module(training.job.model, Q, training.job.model.get_submodule(Q).base_layer)


def train_copies(training: Training) -> None:
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in training.job.parameters.items()}
    training.job.parameters.update(copies)  # type: ignore[attr-defined]
    training.optimizer.parameters.update(copies)


def forget_in_optimizer(training: Training) -> None:
    del training.optimizer.parameters[f"{Q}.lora_B.weight"]


def optimize_another_tensor(training: Training) -> None:
    training.optimizer.parameters[f"{Q}.lora_B.weight"] = torch.nn.Parameter(
        tensor(training).detach().clone()
    )


def optimizer_does_nothing(training: Training) -> None:
    training.optimizer.step = lambda *_: training.optimizer.clear()  # type: ignore[method-assign]


def learning_rate_is_lost(training: Training) -> None:
    real = training.optimizer.step
    training.optimizer.step = lambda _, norm: real(0.0, norm)  # type: ignore[method-assign]


def values_are_put_back(training: Training) -> None:
    first = tensor(training).detach().clone()
    around_step(training, lambda _: tensor(training).data.copy_(first))


def cast_what_trains(training: Training) -> None:
    for p in training.job.parameters.values():
        p.data = p.data.bfloat16()


def cut_graph_between_blocks(training: Training) -> None:
    block = training.job.model.get_submodule("model.layers.0")
    block.register_forward_hook(
        lambda _, given, out: out.detach() if torch.is_tensor(out) else (out[0].detach(), *out[1:])
    )


def write_to_base(training: Training) -> None:
    around_step(training, lambda _: training.job.model.get_submodule("model.norm").weight.data.mul_(1.001))


def write_to_codes(training: Training) -> None:
    codes = next(p for n, p in training.job.model.named_parameters() if n.endswith("codes"))
    around_step(training, lambda _: codes.data.add_(1))


def adapter_is_not_called(training: Training) -> None:
    layer(training).begin = lambda x: None
    layer(training).forward = lambda x, output, base: output


def update_is_detached(training: Training) -> None:
    layer(training).begin = lambda x: None
    real = layer(training).forward
    layer(training).forward = lambda x, output, base: (
        output + (real(x, output.clone(), base) - output).detach()
    )


def update_is_multiplied_by_zero(training: Training) -> None:
    layer(training).begin = lambda x: None
    real = layer(training).forward
    layer(training).forward = lambda x, output, base: output + 0 * real(x, output * 0, base)


def layers_stay_in_eval_mode(training: Training) -> None:
    layer(training).eval()
    layer(training).train = lambda mode=True: layer(training)


def gradients_are_zeroed(training: Training) -> None:
    tensor(training).register_hook(torch.zeros_like)


def gradients_are_dropped(training: Training) -> None:
    real = training.optimizer.gradient_norm

    def drop() -> float:
        tensor(training).grad = None
        return real()

    training.optimizer.gradient_norm = drop  # type: ignore[method-assign]


def train_what_nobody_asked_for(training: Training) -> None:
    norm = training.job.model.get_submodule("model.norm").weight
    norm.requires_grad_(True)
    training.job.parameters["model.norm.weight"] = norm  # type: ignore[index]
    training.optimizer.parameters["model.norm.weight"] = norm


def change_the_rank(training: Training) -> None:
    layer(training).lora_A.data = layer(training).lora_A.data[:2].clone()
    layer(training).lora_B.data = layer(training).lora_B.data[:, :2].clone()


def acts_in_training_only(training: Training) -> None:
    for one in every_layer(training):
        one.forward = lambda x, output, base, one=one, real=one.forward: (
            real(x, output, base) if one.training else output
        )


def copy_is_not_used(training: Training) -> None:
    module = training.job.model.get_submodule("lm_head")
    assert isinstance(module, SavedModule)
    module.active = ()


def reentrant_checkpointing(training: Training) -> None:
    for number in (0, 1):
        block: Any = training.job.model.get_submodule(f"model.layers.{number}")
        block.forward = lambda hidden, real=block.forward, **given: checkpoint(
            functools.partial(real, **given), hidden, use_reentrant=True
        )


def experts_get_no_token(training: Training) -> None:
    experts = next(m for m in training.job.model.modules() if isinstance(m, Experts))
    experts.forward = lambda hidden, index, weights: torch.zeros_like(hidden)  # type: ignore[method-assign]


def freeze_in_full(training: Training) -> None:
    training.job.parameters["model.norm.weight"].requires_grad_(False)


def leave_out_in_full(training: Training) -> None:
    del training.job.parameters["model.norm.weight"]  # type: ignore[attr-defined]
    training.optimizer.parameters.pop("model.norm.weight")


FULL, QLORA = ("adapter=",), ("quantization=nf4",)
HEAD = ("adapter.modules_to_save=[lm_head]",)
PLANTED: list[tuple[Callable[[Training], None], tuple[str, ...], str, str]] = [
    (unfreeze_base, (), "base is not frozen", "model.norm.weight"),
    (freeze_trained, (), "requires_grad off", f"{Q}.lora_B.weight"),
    (zero_both_factors, (), "both factors of updates are zero", Q),
    (fill_both_factors, (), "do not start at zero", Q),
    (scale_by_zero, (), "scaled by zero", Q),
    (scale_otherwise, (), "scaling is not what", Q),
    (put_one_layer_to_sleep, (), "does not act", Q),
    (put_all_layers_to_sleep, (), "does not act", Q),
    (take_layer_out, (), "not in the model", f"{Q}.lora_A.weight"),
    (train_copies, (), "not in the model", f"{Q}.lora_A.weight"),
    (forget_in_optimizer, (), "outside the optimizer", f"{Q}.lora_B.weight"),
    (optimize_another_tensor, (), "outside the optimizer", f"{Q}.lora_B.weight"),
    (optimizer_does_nothing, (), "did not move", f"{Q}.lora_B.weight"),
    (learning_rate_is_lost, (), "did not move", f"{Q}.lora_B.weight"),
    (values_are_put_back, (), "did not move", f"{Q}.lora_B.weight"),
    (cast_what_trains, (), "round away", f"{Q}.lora_B.weight"),
    (cut_graph_between_blocks, (), "got no gradient", "model.layers.0.self_attn.q_proj.lora_B.weight"),
    (write_to_base, (), "the base changed", "model.norm.weight"),
    (write_to_codes, QLORA, "the base changed", "codes"),
    (adapter_is_not_called, (), "got no gradient", f"{Q}.lora_B.weight"),
    (update_is_detached, (), "got no gradient", f"{Q}.lora_B.weight"),
    (update_is_multiplied_by_zero, (), "only zero gradients", f"{Q}.lora_B.weight"),
    (layers_stay_in_eval_mode, ("adapter.dropout=0.1",), "dropout is asked for and off", Q),
    (gradients_are_zeroed, (), "only zero gradients", f"{Q}.lora_B.weight"),
    (gradients_are_dropped, (), "got no gradient", f"{Q}.lora_B.weight"),
    (train_what_nobody_asked_for, (), "does not ask for", "model.norm.weight"),
    (change_the_rank, (), "another shape", f"{Q}.lora_A.weight"),
    (acts_in_training_only, (), "does not change the output", "default"),
    (copy_is_not_used, HEAD, "does not act", "lm_head"),
    (reentrant_checkpointing, HEAD, "got no gradient", f"{Q}.lora_B.weight"),
    (freeze_in_full, FULL, "requires_grad off", "model.norm.weight"),
    (leave_out_in_full, FULL, "not train", "model.norm.weight"),
    (optimizer_does_nothing, FULL, "did not move", "model.norm.weight"),
    (cut_graph_between_blocks, FULL, "got no gradient", "model.embed_tokens.weight"),
    (cast_what_trains, FULL, "round away", "model.norm.weight"),
]


def words(base: Path, rows: Path, out: Path, *more: str) -> list[str]:
    given = [f"model.name={base}", f"data.train={rows}", f"output={out}", "data.max_length=64"]
    given += ["training.batch_size=2", "training.learning_rate=1e-2", "training.max_steps=6"]
    return [*given, *([] if "adapter=" in more else ["adapter.rank=4"]), *more]


@pytest.fixture
def refused(
    tiny_dir: Callable[..., Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[TrainingError, dict[str, Any]]]:
    """What a run says and notes in which a defect was planted."""

    def run(plant: Callable[[Training], None], *more: str, base: Path | None = None) -> Any:
        class Planted(Training):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given)
                plant(self)

        monkeypatch.setattr(phases, "Training", Planted)
        given = words(base or tiny_dir("llama"), rows, tmp_path / "run", *more)
        with pytest.raises(TrainingError) as caught:
            run_from_config(build(RunConfig, read_assignments(given)))
        return caught.value, json.loads((tmp_path / "run" / "audit.json").read_text())

    return run


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the planted one
@pytest.mark.parametrize(
    ("plant", "more", "what", "name"), PLANTED, ids=[f"{p[0].__name__}{'-'.join(p[1])[:5]}" for p in PLANTED]
)
def test_is_caught_by_step_two(
    refused: Callable[..., Any],
    tmp_path: Path,
    plant: Callable[[Training], None],
    more: tuple[str, ...],
    what: str,
    name: str,
) -> None:
    error, noted = refused(plant, *more)
    kinds = {defect["what"]: defect for defect in noted["defects"]}
    found = [defect for kind, defect in kinds.items() if what in kind]
    assert found, noted["defects"]
    assert any(name in one for one in found[0]["names"]), found[0]
    assert found[0]["cause"]
    assert any(kind in error.what for kind in kinds)
    assert noted["passed"] is False
    assert max(noted.get("steps", [0]), default=0) <= 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) <= 2


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")  # the planted one
def test_a_shared_layer_is_caught(refused: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def sharing(model: Any, *what: Any, **how: Any) -> Any:
        made = install(model, *what, **how)
        first, second = (model.get_submodule(f"model.layers.{n}.self_attn.q_proj") for n in (0, 1))
        second.adapters["default"] = first.adapters["default"]
        return made

    monkeypatch.setattr(inputs, "install", sharing)
    _, noted = refused(lambda _: None)
    assert noted["defects"][0]["what"] == "tensors that train share memory"
    assert f"{Q}.lora_A.weight" in noted["defects"][0]["names"]


def test_a_layer_left_out_is_caught(refused: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def leaving_out(model: Any, *what: Any, **how: Any) -> Any:
        made = install(model, *what, **how)
        del model.get_submodule(Q).adapters["default"]
        model.get_submodule(Q).active = ()
        return made

    monkeypatch.setattr(inputs, "install", leaving_out)
    _, noted = refused(lambda _: None)
    found = next(d for d in noted["defects"] if "configuration asks for do not train" in d["what"])
    assert set(found["names"]) == PAIR


def test_experts_of_a_layer_that_get_no_token_are_caught(
    refused: Callable[..., Any], tiny_dir: Callable[..., Path]
) -> None:
    base = tiny_dir("mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=16)
    _, noted = refused(experts_get_no_token, base=base)
    assert all(".layers.0." in name for name in noted["defects"][0]["names"])


@pytest.mark.parametrize("how", ["frozen", "cut"])
def test_defects_that_come_later_are_caught_soon(
    refused: Callable[..., Any], tmp_path: Path, how: str
) -> None:
    def plant(training: Training) -> None:
        def later(step: int) -> None:
            if step != 3:
                return
            if how == "frozen":
                freeze_trained(training)
            else:
                adapter_is_not_called(training)

        around_step(training, later)

    _, noted = refused(plant, "training.max_steps=20")
    assert f"{Q}.lora_B.weight" in noted["defects"][0]["names"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) <= 7


def test_a_base_that_changes_late_is_caught_at_the_end(refused: Callable[..., Any]) -> None:
    def plant(training: Training) -> None:
        weight = training.job.model.get_submodule("lm_head").weight

        def later(step: int) -> None:
            if step == 4:
                weight.data[-1, -3] += 1  # outside the samples

        around_step(training, later)

    _, noted = refused(plant, "training.audit=full")
    assert noted["defects"][0]["names"] == ["lm_head.weight"]
