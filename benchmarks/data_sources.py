"""Reading rows: rows and bytes a second, and by how much memory grows, for each kind of file.

python benchmarks/data_sources.py                        a JSON lines file of 1 GB, tables of it, packed
python benchmarks/data_sources.py --bytes 10e9 --kinds jsonl
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from graft.data.sources import read_rows

ROW_WORDS = 150
"""Words in a row of about 1 KB: a third of them in the prompt, the others in the completion."""


def some_rows(count: int = 1000) -> list[dict[str, str]]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    return [
        {"prompt": text(ROW_WORDS // 3), "completion": text(ROW_WORDS * 2 // 3) + '\n"Done."'}
        for _ in range(count)
    ]


def repeated(pieces: list[bytes], num_bytes: int) -> Iterator[bytes]:
    block = b"".join(pieces)
    for _ in range(max(1, num_bytes // len(block))):
        yield block


def lines(rows: list[dict[str, str]], num_bytes: int) -> Iterator[bytes]:
    return repeated([json.dumps(row).encode() + b"\n" for row in rows], num_bytes)


def write_lines(path: Path, rows: list[dict[str, str]], num_bytes: int) -> None:
    with open(path, "wb") as file:
        file.writelines(lines(rows, num_bytes))


def write_packed(path: Path, rows: list[dict[str, str]], num_bytes: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.writelines(lines(rows, num_bytes))


def write_list(path: Path, rows: list[dict[str, str]], num_bytes: int) -> None:
    with open(path, "wb") as file:
        file.write(b"[\n")
        file.writelines(repeated([json.dumps(row).encode() + b",\n" for row in rows], num_bytes))
        file.write(json.dumps(rows[0]).encode() + b"]\n")


def write_table(path: Path, rows: list[dict[str, str]], num_bytes: int) -> None:
    def line(row: dict[str, str]) -> bytes:
        return (",".join('"' + cell.replace('"', '""') + '"' for cell in row.values()) + "\n").encode()

    with open(path, "wb") as file:
        file.write(b"prompt,completion\n")
        file.writelines(repeated([line(row) for row in rows], num_bytes))


def write_parquet(path: Path, rows: list[dict[str, str]], num_bytes: int) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    table = pyarrow.Table.from_pylist(rows)
    with parquet.ParquetWriter(path, table.schema) as file:
        for _ in repeated([json.dumps(row).encode() for row in rows], num_bytes):
            file.write_table(table)


WRITERS: dict[str, Callable[[Path, list[dict[str, str]], int], None]] = {
    "jsonl": write_lines,
    "json": write_list,
    "csv": write_table,
    "jsonl.gz": write_packed,
    "parquet": write_parquet,
}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(path: Path) -> str:
    rows = read_rows(path)
    first = next(rows)
    assert isinstance(first.value, dict)
    sizes = sum(map(len, first.value.values()))
    before, most, count = resident_bytes(), 0, 1
    wall, begun = time.perf_counter(), time.process_time()
    for _ in rows:
        count += 1
        if count % 100_000 == 0:
            most = max(most, resident_bytes())
    seconds = time.process_time() - begun
    wall = time.perf_counter() - wall
    most = max(most, resident_bytes())
    megabytes = path.stat().st_size / 1e6
    return (
        f"{path.name:14} {megabytes:9,.0f} MB {count:11,} rows (the first of {sizes} characters): "
        f"{count / seconds:9,.0f} rows/s, {megabytes / seconds:6,.0f} MB/s of the file "
        f"({seconds:.1f} s of processor, {wall:.1f} s of wall), "
        f"resident memory {before / 2**20:.0f} MiB, at most {(most - before) / 2**20:+.1f} MiB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=float, default=1e9, help="bytes of JSON lines")
    parser.add_argument("--kinds", default=",".join(WRITERS))
    parser.add_argument("--directory", type=Path, default=None, help="where the files are made")
    options = parser.parse_args()
    rows = some_rows()
    for kind in options.kinds.split(","):
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            path = Path(directory) / f"rows.{kind}"
            WRITERS[kind](path, rows, int(options.bytes))
            print(measure(path), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
