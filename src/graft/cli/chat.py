"""`graft chat`: talk to a model in the terminal; with --compare the base answers too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli import answer

if TYPE_CHECKING:
    from graft.cli.opening import Opened
    from graft.evaluate.generate import GenerationConfig


def chat(
    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id; the adapter's own base if left out.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", "-a", help="Adapter or run directory.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Most tokens in one answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the likeliest tokens of this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Decides the draws.")] = 0,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told first.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="The base answers each question too.")] = False,
    force_base: Annotated[
        bool, typer.Option("--force-base", help="Accept another base than the adapter's.")
    ] = False,
) -> None:
    """Talk to a model; /new starts over, /quit or end of input leaves."""
    from graft.cli.opening import open_model
    from graft.errors import ConfigError
    from graft.evaluate.generate import GenerationConfig

    if compare and adapter is None:
        raise ConfigError(
            "--compare needs an adapter to compare with its base", where="--compare", fix="--adapter DIR"
        )
    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    opened = open_model(model, adapter, force_base=force_base)
    if not opened.chat:
        answer.note("this model was not taught to chat: it continues each line as plain text")
    start = [("system", system)] if system else []
    messages = list(start)
    while (words := _ask()) not in (None, "/quit"):
        assert words is not None
        if words == "/new":
            messages = list(start)
            continue
        messages.append(("user", words))
        prompt = opened.messages(messages) if opened.chat else opened.prompt(words)
        if compare:
            from graft.adapters.attach import disabled

            with disabled(opened.base.model):
                _write("base:    ", opened, prompt, config)
        text = _write("adapter: " if compare else "", opened, prompt, config)
        messages.append(("assistant", text))


def _ask() -> str | None:
    try:
        words = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return words or _ask()


def _write(label: str, opened: Opened, prompt: list[int], config: GenerationConfig) -> str:
    from graft.evaluate.generate import stream

    sys.stdout.write(label)
    pieces = []
    for piece in stream(opened.base.model, opened.base.tokenizer, prompt, config, end_ids=opened.end_ids):
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()
    answer.line()
    return "".join(pieces)
