"""`graft doctor`: what this machine can do, and which backend runs each numeric operation."""

from __future__ import annotations

from typing import Annotated

import typer

from graft.cli import answer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Show what this machine can do: processor, memory, packages, backend of each operation."""
    import os
    import platform
    from importlib.metadata import version

    import torch

    from graft import kernels
    from graft.kernels.wide import is_wide

    machine = {
        "python": platform.python_version(),
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "products": {
            str(dtype).removeprefix("torch."): "in float32" if is_wide(dtype, "cpu") else "its own"
            for dtype in (torch.bfloat16, torch.float16)
        },
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    packages = {
        name: version(name) for name in ("graft", "torch", "transformers", "safetensors", "tokenizers")
    }
    operations = [
        {"device": device, "operation": op, "backend": backend, "reason": why}
        for device in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
        for op, backend, why in kernels.explain(device)
    ]
    text = "\n".join(
        [
            *(f"{name:15} {_spelled(value)}" for name, value in machine.items()),
            "",
            *(f"{name:15} {number}" for name, number in packages.items()),
            "",
            answer.table(
                [
                    ["device", "operation", "backend", "reason"],
                    *(list(operation.values()) for operation in operations),
                ]
            ),
        ]
    )
    answer.success(as_json, {"machine": machine, "packages": packages, "operations": operations}, text)


def _spelled(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {what}" for name, what in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
