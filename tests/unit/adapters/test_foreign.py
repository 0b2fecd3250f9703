"""Adapters of mlx-lm, torchtune and loralib: each does what its tool's equation says and comes back whole."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import graft
from graft.adapters.attached import adapter_modules, adapter_tensors, adapters_of, trained_tensors
from graft.adapters.foreign import load_foreign_adapter, save_foreign_adapter
from graft.errors import AdapterError
from graft.models.load import load

HIDDEN, INNER, KV, HEADS = 32, 64, 16, 4
Q, K, DOWN = (
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.mlp.down_proj",
)
SIDES = {Q: (HIDDEN, HIDDEN), K: (HIDDEN, KV), DOWN: (INNER, HIDDEN)}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def change(model: Any, path: str) -> tuple[Tensor, Tensor]:
    """W and what the adapter makes of it, (out, in) in float64."""
    module: Any = adapter_modules(model)[path]
    weight = module.base.dense_weight().double()
    layer = next(iter(module.adapters.values()))
    return weight, layer.double().merged_weight(module.base, weight).detach()


def mlx(place: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place / "adapters.safetensors", metadata={"format": "mlx"})
    parameters = {"rank": 3, "scale": 20.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, **settings}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def mlx_tensors(*, dora: bool = False) -> dict[str, Tensor]:
    tensors = {}
    for path, (inner, outer) in SIDES.items():
        tensors[f"{path}.lora_a"] = drawn(inner, 3)
        tensors[f"{path}.lora_b"] = drawn(3, outer, seed=1)
        if dora:
            tensors[f"{path}.m"] = drawn(outer, seed=2).abs()
    return tensors


class TestMlx:
    """LoRALinear.fuse: W + (scale * b') a'; DoRALinear.fuse: m / ||row|| of that."""

    @pytest.mark.parametrize("dora", [False, True])
    @pytest.mark.parametrize("door", [load_foreign_adapter, graft.load_adapter])
    def test_it_does_what_fuse_does(
        self, tiny_dir: Callable[..., Path], tmp_path: Path, dora: bool, door: Any
    ) -> None:
        tensors = mlx_tensors(dora=dora)
        place = mlx(tmp_path / "a", tensors, fine_tune_type="dora" if dora else "lora")
        base = load(tiny_dir("llama"))
        made = door(base.model, place)
        assert made.config.method == ("dora" if dora else "lora")
        for path in SIDES:
            weight, merged = change(base.model, path)
            a, b = tensors[f"{path}.lora_a"].double(), tensors[f"{path}.lora_b"].double()
            wanted = weight + (20.0 * b.T) @ a.T
            if dora:
                wanted = (tensors[f"{path}.m"].double() / wanted.norm(dim=1))[:, None] * wanted
            torch.testing.assert_close(merged, wanted, rtol=1e-9, atol=1e-9)
        x = drawn(5, HIDDEN)
        module = adapter_modules(base.model)[Q].float()
        if not dora:
            wanted = module.base_layer(x) + 20.0 * ((x @ tensors[f"{Q}.lora_a"]) @ tensors[f"{Q}.lora_b"])
            torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-4)

    def test_embeddings(self, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
        """LoRAEmbedding.fuse: weight + (scale * a) b, of (vocabulary, rank) and (rank, dim)."""
        a, b = drawn(264, 3), drawn(3, HIDDEN)
        names = {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}
        base = load(tiny_dir("llama"))
        load_foreign_adapter(base.model, mlx(tmp_path / "a", names))
        weight, merged = change(base.model, "model.embed_tokens")
        torch.testing.assert_close(merged, weight + (20.0 * a.double() @ b.double()).T, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("dora", [False, True])
    def test_round_trip(self, tiny_dir: Callable[..., Path], tmp_path: Path, dora: bool) -> None:
        tensors = mlx_tensors(dora=dora)
        place = mlx(tmp_path / "a", tensors, fine_tune_type="dora" if dora else "lora")
        base = load(tiny_dir("llama"))
        load_foreign_adapter(base.model, place)
        save_foreign_adapter(base.model, tmp_path / "b", dialect="mlx")
        again = load_file(tmp_path / "b" / "adapters.safetensors")
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], value) for name, value in tensors.items())
        written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        assert written["lora_parameters"] == {
            "rank": 3,
            "scale": 20.0,
            "dropout": 0.0,
            "keys": ["mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj"],
        }
        assert written["num_layers"] == 1
        assert written["fine_tune_type"] == ("dora" if dora else "lora")

    def test_blocks_are_counted_from_the_end(self, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
        base, middle = load(tiny_dir("llama", num_hidden_layers=3)), mlx_tensors()
        with pytest.raises(AdapterError, match="lies before the last 1 of 3 blocks"):
            load_foreign_adapter(base.model, mlx(tmp_path / "a", middle, num_layers=1))
        for count in (2, 3, 0, -1, 16):
            load_foreign_adapter(base.model, mlx(tmp_path / "a", middle, num_layers=count), "x")
            save_foreign_adapter(base.model, tmp_path / "b", "x", dialect="mlx")
            assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["num_layers"] == 2
            graft.detach(base.model, "x")

    def test_pefts_files_come_first(self, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
        """A run of torchtune leaves both beside each other."""
        base = load(tiny_dir("llama"))
        graft.attach(base.model, graft.LoraConfig(rank=2))
        for tensor in adapter_tensors(base.model).values():
            tensor.data += 0.1
        graft.save_adapter(base.model, tmp_path / "a")
        torch.save({"layers.0.mlp.w1.lora_a.weight": drawn(3, HIDDEN)}, tmp_path / "a" / "adapter_model.pt")
        assert graft.load_adapter(base.model, tmp_path / "a", "again").config.rank == 2

    def test_what_is_refused(self, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
        base = load(tiny_dir("llama"))
        place = tmp_path / "a"

        def refused(match: str, tensors: dict[str, Tensor], **settings: Any) -> None:
            with pytest.raises(AdapterError, match=match):
                load_foreign_adapter(base.model, mlx(place, tensors, **settings))
            assert not adapters_of(base.model)

        good = mlx_tensors()
        refused('fine_tune_type = "full" is no adapter', good, fine_tune_type="full")
        refused("no rank or no scale", good, lora_parameters={"rank": 3})
        refused("is not an object", good, lora_parameters=None)
        refused(r"lora_a \[\d+, 3\].*rank 4", good, lora_parameters={"rank": 4, "scale": 1.0})
        refused("no magnitude m, and fine_tune_type is dora", good, fine_tune_type="dora")
        refused("lacks lora_b", {k: v for k, v in good.items() if not k.startswith(f"{Q}.lora_b")})
        refused(
            "no layer 'model.layers.1.side'",
            {f"model.layers.1.side.{x}": good[f"{Q}.{x}"] for x in ("lora_a", "lora_b")},
        )
        refused(
            "2 dimensions|3 and 3 dimensions",
            {f"{Q}.lora_a": drawn(2, 32, 3), f"{Q}.lora_b": drawn(2, 3, 32)},
        )
        refused("NaN or infinite", {**good, f"{Q}.lora_a": torch.full((32, 3), math.nan)})
        refused(
            "none of its 3 layers changes any output",
            {k: v * (0 if "lora_b" in k else 1) for k, v in good.items()},
        )
        refused(r"make an update \(32, 16\)", {**good, f"{Q}.lora_a": drawn(16, 3)})
        mlx(place, good)
        with pytest.raises(AdapterError, match="alpha 8.0 cannot act"):
            load_foreign_adapter(base.model, place, alpha=8.0)
        with pytest.raises(AdapterError, match="cannot act: the file is mlx's"):
            load_foreign_adapter(base.model, place, enabled={"q_proj": (True,)})
        with pytest.raises(AdapterError, match="neither adapters.safetensors nor"):
            load_foreign_adapter(base.model, tmp_path)


def test_ranks_and_scalings_of_their_own_are_made_one(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    """mlx-lm and torchtune have one of each: zeros and B take the difference, the update stays."""
    base = load(tiny_dir("llama"))
    config = graft.LoraConfig(
        rank=2,
        alpha=8,
        target_modules=("q_proj", "down_proj"),
        rank_pattern=("down_proj=5",),
        alpha_pattern=("layers.0.self_attn.q_proj=3",),
    )
    graft.attach(base.model, config)
    for name, tensor in trained_tensors(base.model).items():
        tensor.data.copy_(drawn(*tensor.shape, seed=len(name)))
    for dialect in ("mlx", "torchtune"):
        save_foreign_adapter(base.model, tmp_path / dialect, dialect=dialect)  # type: ignore[arg-type]
        other = load(tiny_dir("llama"))
        made = load_foreign_adapter(other.model, tmp_path / dialect)
        assert (made.config.rank, made.config.rank_pattern, made.config.alpha_pattern) == (5, (), ())
        for path in made.targets:
            torch.testing.assert_close(
                change(other.model, path)[1], change(base.model, path)[1], rtol=1e-6, atol=1e-6
            )


def torchtune(place: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, place / "adapter_model.pt")
    if settings:
        (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    return place


def tune_order(rows: Tensor, heads: int) -> Tensor:
    """How torchtune's hf_to_tune orders the rows of q and k."""
    size = len(rows) // heads
    return rows.view(heads, 2, size // 2, -1).transpose(1, 2).reshape(rows.shape)


def turned(x: Tensor, heads: int, theta: float, *, neighbours: bool) -> Tensor:
    """Rotary embedding of x (tokens, heads * size): of neighbouring numbers, or of the two halves."""
    x = x.view(len(x), heads, -1)
    size = x.shape[-1]
    angles = torch.arange(len(x))[:, None, None] * theta ** (-torch.arange(0, size, 2) / size)
    first, second = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    made = (
        first * angles.cos() - second * angles.sin(),
        second * angles.cos() + first * angles.sin(),
    )
    return torch.stack(made, -1).flatten(-2) if neighbours else torch.cat(made, -1)


class TestTorchtune:
    """LoRALinear: W + (alpha / rank) B A in torchtune's names and in its order of rows."""

    NAMES = {"layers.1.attn.q_proj": Q, "layers.1.attn.k_proj": K, "layers.1.mlp.w2": DOWN}  # noqa: RUF012

    def tensors(self, *, dora: bool = False) -> dict[str, Tensor]:
        tensors = {}
        for theirs, ours in self.NAMES.items():
            inner, outer = SIDES[ours]
            tensors[f"{theirs}.lora_a.weight"] = drawn(3, inner)
            tensors[f"{theirs}.lora_b.weight"] = drawn(outer, 3, seed=1)
            if dora:
                tensors[f"{theirs}.magnitude"] = drawn(outer, seed=2).abs()
        return tensors

    @pytest.mark.parametrize("dora", [False, True])
    def test_attention_is_torchtunes(self, tiny_dir: Callable[..., Path], tmp_path: Path, dora: bool) -> None:
        """Scores of q and k in torchtune's order with its rotation are ours in Hugging Face's with theirs."""
        tensors = self.tensors(dora=dora)
        base = load(tiny_dir("llama"))
        load_foreign_adapter(base.model, torchtune(tmp_path / "a", tensors, r=3, lora_alpha=6))
        x, theta = drawn(7, HIDDEN).double(), 10000.0
        both = []
        for theirs, path in self.NAMES.items():
            weight, merged = change(base.model, path)
            heads = 0 if path == DOWN else len(weight) // 8
            stored = tune_order(weight, heads) if heads else weight
            wanted = (
                stored
                + 2.0
                * tensors[f"{theirs}.lora_b.weight"].double()
                @ tensors[f"{theirs}.lora_a.weight"].double()
            )
            if dora:
                wanted = (tensors[f"{theirs}.magnitude"].double() / wanted.norm(dim=1))[:, None] * wanted
            if not heads:
                torch.testing.assert_close(merged, wanted, rtol=1e-9, atol=1e-9)
                continue
            both.append(
                (
                    turned(x @ wanted.T, heads, theta, neighbours=True),
                    turned(x @ merged.T, heads, theta, neighbours=False),
                )
            )
        (q_theirs, q_ours), (k_theirs, k_ours) = both
        for q, k in ((q_theirs, k_theirs), (q_ours, k_ours)):
            assert q.shape[1] == 2 * k.shape[1]
        scores = [
            torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1))
            for q, k in ((q_theirs, k_theirs), (q_ours, k_ours))
        ]
        torch.testing.assert_close(scores[0], scores[1], rtol=1e-9, atol=1e-9)

    def test_qwen_keeps_its_order(self, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
        tensors = self.tensors()
        base = load(tiny_dir("qwen2"))
        load_foreign_adapter(base.model, torchtune(tmp_path / "a", tensors, r=3, lora_alpha=6))
        weight, merged = change(base.model, Q)
        b, a = (tensors[f"layers.1.attn.q_proj.lora_{x}.weight"].double() for x in "ba")
        torch.testing.assert_close(merged, weight + 2.0 * b @ a, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    @pytest.mark.parametrize("dora", [False, True])
    def test_round_trip(self, tiny_dir: Callable[..., Path], tmp_path: Path, family: str, dora: bool) -> None:
        tensors = self.tensors(dora=dora)
        base = load(tiny_dir(family))
        graft.load_adapter(base.model, torchtune(tmp_path / "a", tensors, r=3, lora_alpha=6))
        save_foreign_adapter(base.model, tmp_path / "b", dialect="torchtune")
        again = torch.load(tmp_path / "b" / "adapter_model.pt", weights_only=True)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], value) for name, value in tensors.items())
        written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        assert (written["r"], written["lora_alpha"], written["use_dora"]) == (3, 6, dora)
        assert written["target_modules"] == ["down_proj", "k_proj", "q_proj"]

    def test_what_is_refused(self, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
        base, good = load(tiny_dir("llama")), self.tensors()
        with pytest.raises(AdapterError, match="does not say by what the update is scaled"):
            load_foreign_adapter(base.model, torchtune(tmp_path / "a", good))
        made = load_foreign_adapter(base.model, tmp_path / "a", alpha=6)
        assert made.config.scaling == 2.0
        graft.detach(base.model)
        with pytest.raises(AdapterError, match="alpha 0 is not a positive number"):
            load_foreign_adapter(base.model, tmp_path / "a", alpha=0)
        with pytest.raises(AdapterError, match="r = 4, and the tensors have rank 3"):
            load_foreign_adapter(base.model, torchtune(tmp_path / "b", good, r=4, lora_alpha=6))
        odd = {name.replace("mlp.w2", "mlp.experts"): value for name, value in good.items()}
        with pytest.raises(AdapterError, match=r"'layers.1.mlp.experts' is no layer of a torchtune decoder"):
            load_foreign_adapter(base.model, torchtune(tmp_path / "c", odd, r=3, lora_alpha=6))
        with pytest.raises(AdapterError, match="q and k of 'gpt2' models is not known"):
            load_foreign_adapter(load(tiny_dir("gpt2")).model, tmp_path / "a", alpha=6)
        assert not adapters_of(base.model)


class Harm:
    """What a pickle may hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of a pickle ran')",)


class TestLoralib:
    """Linear: W + (alpha / r) B A; MergedLinear: the grouped convolution of A with B, padded with zeros."""

    C = "transformer.h.1.attn.c_attn"
    ENABLED = {"c_attn": (True, False, True)}  # noqa: RUF012

    def file(self, place: Path) -> tuple[Path, dict[str, Tensor]]:
        tensors = {
            f"{self.C}.lora_A": drawn(4, HIDDEN),
            f"{self.C}.lora_B": drawn(2 * HIDDEN, 2),
            "transformer.h.0.mlp.c_fc.lora_A": drawn(2, HIDDEN, seed=5),
            "transformer.h.0.mlp.c_fc.lora_B": drawn(4 * HIDDEN, 2, seed=6),
            "transformer.wte.lora_A": drawn(2, 264, seed=7),
            "transformer.wte.lora_B": drawn(HIDDEN, 2, seed=8),
        }
        torch.save(tensors, place / "lora.pt")
        return place / "lora.pt", tensors

    def merged_ab(self, tensors: dict[str, Tensor]) -> Tensor:
        """MergedLinear.merge_AB, (out, in): groups of a convolution, then rows of zeros between them."""
        a, b = tensors[f"{self.C}.lora_A"].double(), tensors[f"{self.C}.lora_B"].double()
        made = functional.conv1d(a[None], b[:, :, None], groups=2)[0]
        padded = torch.zeros(3 * HIDDEN, HIDDEN, dtype=torch.float64)
        padded[torch.tensor([True, False, True]).repeat_interleave(HIDDEN)] = made
        return padded

    def test_it_does_what_loralib_does(self, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
        file, tensors = self.file(tmp_path)
        base = load(tiny_dir("gpt2"))
        load_foreign_adapter(base.model, file, alpha=32, enabled=self.ENABLED)
        weight, merged = change(base.model, self.C)
        torch.testing.assert_close(merged, weight + 16.0 * self.merged_ab(tensors), rtol=1e-9, atol=1e-9)
        for path in ("transformer.h.0.mlp.c_fc", "transformer.wte"):
            a, b = tensors[f"{path}.lora_A"].double(), tensors[f"{path}.lora_B"].double()
            weight, merged = change(base.model, path)
            torch.testing.assert_close(merged, weight + 16.0 * b @ a, rtol=1e-9, atol=1e-9)

    def test_round_trip(self, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
        file, tensors = self.file(tmp_path)
        base = load(tiny_dir("gpt2"))
        load_foreign_adapter(base.model, file, alpha=32, enabled=self.ENABLED)
        save_foreign_adapter(base.model, tmp_path / "b", dialect="loralib", enabled=self.ENABLED)
        again = torch.load(tmp_path / "b" / "lora.pt", weights_only=True)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], value) for name, value in tensors.items())
        assert json.loads((tmp_path / "b" / "lora.json").read_text()) == {"lora_alpha_by_r": {"2": 32}}
        # As a plain Linear of twice the rank it is the same update.
        save_foreign_adapter(base.model, tmp_path / "c", dialect="loralib")
        alphas = json.loads((tmp_path / "c" / "lora.json").read_text())["lora_alpha_by_r"]
        assert alphas == {"2": 32, "4": 64}
        plain = torch.load(tmp_path / "c" / "lora.pt", weights_only=True)
        a, b = plain[f"{self.C}.lora_A"].double(), plain[f"{self.C}.lora_B"].double()
        torch.testing.assert_close(64 / 4 * b @ a, 16.0 * self.merged_ab(tensors))

    def test_what_is_refused(self, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
        file, tensors = self.file(tmp_path)
        base = load(tiny_dir("gpt2"))
        with pytest.raises(AdapterError, match="does not say by what the update is scaled"):
            load_foreign_adapter(base.model, file, enabled=self.ENABLED)
        with pytest.raises(AdapterError, match="a MergedLinear") as caught:
            load_foreign_adapter(base.model, file, alpha=32)
        assert '"c_attn": (True, False, True)' in caught.value.fix
        with pytest.raises(AdapterError, match=r"which \(True, True, True\) does not make"):
            load_foreign_adapter(base.model, file, alpha=32, enabled={"c_attn": (True, True, True)})
        with pytest.raises(AdapterError, match="enabled names 'c_atn'"):
            load_foreign_adapter(base.model, file, alpha=32, enabled={**self.ENABLED, "c_atn": (True,)})
        torch.save({**tensors, "transformer.h.0.mlp.c_fc.bias": drawn(3)}, tmp_path / "bias.pt")
        with pytest.raises(AdapterError, match="'transformer.h.0.mlp.c_fc.bias' is not a tensor"):
            load_foreign_adapter(base.model, tmp_path / "bias.pt", alpha=32, enabled=self.ENABLED)
        torch.save({"a.lora_A": Harm()}, tmp_path / "harm.pt")
        with pytest.raises(AdapterError, match="wants more than tensors"):
            load_foreign_adapter(base.model, tmp_path / "harm.pt", alpha=32)
        (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:300])
        with pytest.raises(AdapterError, match="not a whole PyTorch file"):
            load_foreign_adapter(base.model, tmp_path / "cut.pt", alpha=32)
        torch.save({"a.weight": drawn(3)}, tmp_path / "other.pt")
        with pytest.raises(AdapterError, match="none of mlx, torchtune, loralib: it holds 'a.weight'"):
            load_foreign_adapter(base.model, tmp_path / "other.pt", alpha=32)
        with pytest.raises(AdapterError, match="no such file"):
            load_foreign_adapter(base.model, tmp_path / "none.pt")
        assert not adapters_of(base.model)


def test_what_a_format_has_no_place_for_is_not_written(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = load(tiny_dir("llama"))

    def refused(match: str, config: Any, dialect: Any, **more: Any) -> None:
        graft.attach(base.model, config)
        for tensor in adapter_tensors(base.model).values():
            tensor.data += 0.1
        with pytest.raises(AdapterError, match=match):
            save_foreign_adapter(base.model, tmp_path / "out", dialect=dialect, **more)
        graft.detach(base.model)
        assert not (tmp_path / "out").exists()

    refused("mlx has no loha", graft.LohaConfig(rank=2), "mlx")
    refused("no place for lm_head", graft.LoraConfig(rank=2, modules_to_save=("lm_head",)), "mlx")
    refused("loralib has no DoRA", graft.DoraConfig(rank=2), "loralib")
    refused(
        "'model.embed_tokens' has no place", graft.LoraConfig(target_modules=("embed_tokens",)), "torchtune"
    )
    refused("the format 'mxl' is not known", graft.LoraConfig(rank=2), "mxl")
    refused("cannot act on mlx", graft.LoraConfig(rank=2), "mlx", enabled={"q_proj": (True, False)})
    whole = graft.LoraConfig(rank=2, target_modules=("up_proj",))
    refused("is not made of single parts", whole, "loralib", enabled={"up_proj": (True, False)})
    refused("enabled names 'q_proj'", whole, "loralib", enabled={"q_proj": (True, False)})
    other = load(tiny_dir("gpt2"))
    graft.attach(other.model, graft.LoraConfig(rank=2))
    with pytest.raises(AdapterError, match="has another name in mlx-lm"):
        save_foreign_adapter(other.model, tmp_path / "out", dialect="mlx")


def test_a_foreign_adapter_trains_on_and_is_saved_as_ours(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = load(tiny_dir("llama"))
    made = load_foreign_adapter(base.model, mlx(tmp_path / "a", mlx_tensors()), trainable=True)
    assert all(tensor.requires_grad for tensor in trained_tensors(base.model).values())
    assert made.num_trainable == sum(3 * (inner + outer) for inner, outer in SIDES.values())
    assert any("read from mlx" in note for note in made.notes)
    graft.save_adapter(base.model, tmp_path / "ours")
    other = load(tiny_dir("llama"))
    again = graft.load_adapter(other.model, tmp_path / "ours")
    assert again.facts == {"read_from": "mlx"}
    for path in SIDES:
        assert torch.equal(change(base.model, path)[1], change(other.model, path)[1])


@pytest.mark.parametrize("dialect", ["mlx", "torchtune"])
def test_an_update_from_a_start_is_written_without_the_start(
    tiny_dir: Callable[..., Path], tmp_path: Path, dialect: Any
) -> None:
    model = graft.load(tiny_dir("llama")).model
    graft.attach(model, graft.LoraConfig(rank=4, init="pissa"))
    for name, tensor in model.named_parameters():
        if "lora_" in name and tensor.requires_grad:
            tensor.data.add_(
                0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
            )
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        live = model(ids).logits
    graft.save_foreign_adapter(model, tmp_path / "a", dialect=dialect)
    other = graft.load(tiny_dir("llama")).model
    graft.load_foreign_adapter(other, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, live, rtol=1e-4, atol=1e-4)
