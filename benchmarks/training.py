"""Memory and speed of training steps: graft's own loop beside PEFT with the Hugging Face Trainer.

    python benchmarks/training.py                # SmolLM2-135M's shape, 4 x 512 tokens, rank 16, all linears
    python benchmarks/training.py --small        # a tiny model: only that it runs

Every contestant is a process of its own, so that its peak memory is its own; the parent lets them make a
step in turn, so that all of them see the same machine. Ratios of speed are taken within each turn and the
median is printed. Peak memory is the largest resident set from the start of the process to its end, loading
and libraries included. On a processor without bfloat16 PEFT is several times faster in float32
(`--peer-dtype float32`), which takes it more memory: memory is compared with its best, and so is speed.
Writes results/training.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CONTESTANTS = ("graft-lora", "graft-qlora", "peft-lora", "peft-qlora")

# SmolLM2-135M: width, inner width, layers, heads, heads of keys, vocabulary.
REAL = (576, 1536, 30, 9, 3, 49152)
TINY = (64, 192, 2, 4, 2, 256)


def tell(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def wait_for_turn() -> bool:
    tell(ready=True)
    return bool(sys.stdin.readline().strip())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    # Not getrusage's: that begins with the peak of the process that started this one.
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def token_rows(rows: int, length: int, vocabulary: int, steps: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, vocabulary, (rows * steps, length), generator=generator).tolist()


def run_graft(directory: str, values: argparse.Namespace, rows: list[list[int]], quantized: bool) -> None:
    from graft.adapters.attach import attach
    from graft.adapters.lora import LoraConfig
    from graft.data.loader import Loader
    from graft.data.masking import Sample
    from graft.models.load import load
    from graft.runs import RunDirectory
    from graft.training.choices import adapter_to_train, trained_tensors
    from graft.training.config import TrainingConfig
    from graft.training.job import Job
    from graft.training.loop import Training
    from graft.training.memory import prepared
    from graft.training.monitors import Silent

    class Turns(Silent):
        began = 0.0

        def step(self, record: dict[str, Any], num_tokens: int) -> None:
            tell(seconds=time.perf_counter() - self.began, loss=record["loss"])
            if not wait_for_turn():
                raise EOFError
            self.began = time.perf_counter()

    base = load(directory, quantization="nf4" if quantized else None)
    attach(base.model, LoraConfig(rank=16, alpha=32))
    monitor = Turns()
    with TemporaryDirectory() as place:
        config = TrainingConfig(
            batch_size=values.rows,
            max_steps=values.steps + 1,
            lr_scheduler="constant",
            gradient_checkpointing=values.checkpointing,
            activation_offload=values.offload,
            mlp_tile=values.tile,
            audit="none",
        )
        samples = [Sample(row, [-100, *row[1:]]) for row in rows]
        loader = Loader(samples, values.rows, len(rows[0]), packing=False)
        run = RunDirectory.create(Path(place) / "run")
        trained = trained_tensors(base.model, adapter_to_train(base.model))
        job = Job(base.model, trained, loader, None, config, 1e-4, run, monitor)
        if wait_for_turn():
            monitor.began = time.perf_counter()
            with contextlib.suppress(EOFError), prepared(job):
                Training(job).run()


def run_peft(directory: str, values: argparse.Namespace, rows: list[list[int]], quantized: bool) -> None:
    import peft
    import torch
    import transformers

    how, dtype = None, getattr(torch, values.peer_dtype)
    if quantized:
        how = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=how)
    model.config.use_cache = False
    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=values.checkpointing)
    elif values.checkpointing:
        model.enable_input_require_grads()
    settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings)

    class Turns(transformers.TrainerCallback):
        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not wait_for_turn():
                raise EOFError
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tell(seconds=time.perf_counter() - self.began)

    with TemporaryDirectory() as place:
        arguments = transformers.TrainingArguments(
            output_dir=place,
            per_device_train_batch_size=values.rows,
            max_steps=values.steps + 1,
            use_cpu=True,
            bf16=dtype is torch.bfloat16,
            gradient_checkpointing=values.checkpointing,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            disable_tqdm=True,
            seed=0,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[Turns()],
            data_collator=transformers.default_data_collator,
        )
        with contextlib.suppress(EOFError):
            trainer.train()


def contestant(values: argparse.Namespace) -> None:
    import torch

    if values.threads:
        torch.set_num_threads(values.threads)
    shape, length = (TINY, 32) if values.small else (REAL, values.tokens)
    shape = (*shape[:2], values.layers or shape[2], *shape[3:])
    rows = token_rows(values.rows, length, shape[-1], values.steps + 1)
    who, kind = values.contestant.split("-")
    run = run_graft if who == "graft" else run_peft
    run(values.model, values, rows, kind == "qlora")
    tell(peak_bytes=peak_bytes())


class Process:
    """A contestant of a script that waits for its turns."""

    def __init__(self, name: str, model: str, arguments: list[str], script: str = __file__) -> None:
        command = [sys.executable, script, *arguments, "--contestant", name, "--model", model]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        self.name, self.facts = name, {}
        self._until("ready")

    def _until(self, key: str) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):
                said = json.loads(line)
                self.facts |= said
                if key in said:
                    return said[key]
        raise SystemExit(f"{self.name} ended before it said {key!r}")

    def _say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def step(self) -> float:
        self._say("go\n")
        seconds = float(self._until("seconds"))
        return seconds

    def finish(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._until("peak_bytes")
        self.process.wait()
        return self.facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny model, few steps, no file")
    parser.add_argument("--rows", type=int, default=4, help="rows in a step")
    parser.add_argument("--tokens", type=int, default=512, help="tokens in a row")
    parser.add_argument("--peer-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--offload", action="store_true", help="graft's activations wait in a file")
    parser.add_argument("--tile", type=int, help="tokens that graft's MLPs work on at a time")
    parser.add_argument("--layers", type=int, default=0, help="fewer blocks than the real shape has")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one to warm up")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--checkpointing", action="store_true", help="with gradient checkpointing, all of them"
    )
    parser.add_argument("--only", nargs="*", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--out", help="where the figures go instead of results/training.json")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.contestant:
        contestant(values)
        return
    compare(values)


def compare(values: argparse.Namespace) -> None:
    from steps import make_model

    shape = TINY if values.small else REAL
    shape = (*shape[:2], values.layers or shape[2], *shape[3:])
    tokens = values.rows * (32 if values.small else values.tokens)
    given = [word for word in sys.argv[1:]]
    times: dict[str, list[float]] = {}
    with TemporaryDirectory() as directory:
        make_model(directory, shape)
        processes = {name: Process(name, directory, given) for name in values.only}
        for turn in range(values.steps + 1):
            for name, process in processes.items():
                seconds = process.step()
                print(f"{name} {turn if turn else 'warm-up'}: {seconds:.1f} s", file=sys.stderr, flush=True)
                if turn:
                    times.setdefault(name, []).append(seconds)
        facts = {name: process.finish() for name, process in processes.items()}
    figures: dict[str, Any] = {}
    for name in values.only:
        kind = name.split("-")[1]
        peer = f"peft-{kind}"
        figures[name] = {
            "peak_megabytes": round(facts[name]["peak_bytes"] / 1e6, 1),
            "tokens_per_second": round(tokens / statistics.median(times[name]), 1),
            "seconds": [round(seconds, 2) for seconds in times[name]],
        }
        if peer in times:
            ratios = [b / a for a, b in zip(times[name], times[peer], strict=True)]
            figures[name]["speed_over_peft"] = round(statistics.median(ratios), 3)
            figures[name]["memory_over_peft"] = round(
                facts[name]["peak_bytes"] / facts[peer]["peak_bytes"], 3
            )
        print(f"{name:12s} {json.dumps(figures[name])}")
    if not values.small or values.out:
        import torch

        from graft import files

        place = Path(values.out) if values.out else Path(__file__).parent / "results" / "training.json"
        told = {"shape": shape, "tokens": tokens, "threads": values.threads or torch.get_num_threads()}
        told |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "steps": values.steps}
        told |= {name: getattr(values, name) for name in ("checkpointing", "offload", "tile", "peer_dtype")}
        files.write_json(place, {**told, "figures": figures})


if __name__ == "__main__":
    main()
