"""The live page: every line once, in order, also after a reconnect; who may look; slow viewers."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.cli.main import run as graft
from graft.cli.train import with_port
from graft.errors import ConfigError
from graft.runs import read_lines
from graft.training import watch_server
from graft.training.watch import Watch

Event = tuple[str, str, Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_server, "LOOK_SECONDS", 0.01)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    (tmp_path / "run").mkdir()
    made = Watch(tmp_path / "run", 0)
    yield made
    made.close("finished")


def write(watch: Watch, tmp_path: Path, first: int, last: int) -> None:
    """Lines as the loop writes them: the timing of a step before its figures."""
    for step in range(first, last + 1):
        with open(tmp_path / "run" / "timings.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "seconds": 0.5, "num_tokens": 10}) + "\n")
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "loss": 1 / step, "learning_rate": 0.1}) + "\n")


class Viewer:
    """A browser's side of an event stream."""

    def __init__(self, watch: Watch, last: str = "", **headers: str) -> None:
        port = int(watch.address.rstrip("/").rpartition(":")[2])
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        self.connection.request(
            "GET", "/events", headers={**({"Last-Event-ID": last} if last else {}), **headers}
        )
        self.answer = self.connection.getresponse()
        self.last = last

    def events(self) -> Iterator[Event]:
        name = data = ""
        while line := self.answer.readline().decode():
            field, _, value = line.rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "id":
                self.last = value
            elif field == "data":
                data = value
            elif not line.strip() and name:
                yield name, self.last, json.loads(data)
                name = ""

    def steps(self, until: int) -> list[int]:
        found: list[int] = []
        for name, _, data in self.events():
            if name == "lines":
                assert {line["step"] for line in data["metrics"]} <= {*range(1, until + 1)}
                found += [line["step"] for line in data["metrics"]]
                if found and found[-1] >= until:
                    return found
        return found

    def close(self) -> None:
        self.answer.close()
        self.connection.close()


def test_every_step_once_and_in_order_also_after_a_reconnect(watch: Watch, tmp_path: Path) -> None:
    write(watch, tmp_path, 1, 3)
    watch.start(0, 20)
    viewer = Viewer(watch)
    assert viewer.steps(3) == [1, 2, 3]
    writer = threading.Thread(target=write, args=(watch, tmp_path, 4, 9))
    writer.start()
    assert viewer.steps(9) == [4, 5, 6, 7, 8, 9]
    writer.join()
    viewer.close()
    write(watch, tmp_path, 10, 12)
    again = Viewer(watch, viewer.last)
    assert again.steps(12) == [10, 11, 12]
    other = Viewer(watch)
    assert other.steps(12) == list(range(1, 13))
    again.close()
    other.close()


def test_a_line_is_there_with_its_timing(watch: Watch, tmp_path: Path) -> None:
    watch.start(0, 300)
    viewer = Viewer(watch)
    writer = threading.Thread(target=write, args=(watch, tmp_path, 1, 300))
    writer.start()
    timed: set[int] = set()
    steps = 0
    for name, _, data in viewer.events():
        if name == "lines":
            timed |= {line["step"] for line in data["timings"]}
            assert {line["step"] for line in data["metrics"]} <= timed
            steps += len(data["metrics"])
            if steps == 300:
                break
    writer.join()
    viewer.close()


@pytest.mark.parametrize(
    "last", ["0123456789abcdef-10-10-0", "nonsense", "a-b-c-d", "{mark}-999999-0-0", "{mark}-1-2"]
)
def test_another_run_is_told_from_its_beginning(watch: Watch, tmp_path: Path, last: str) -> None:
    write(watch, tmp_path, 1, 2)
    watch.start(0, 2)
    first = Viewer(watch)
    first.steps(2)
    first.close()
    viewer = Viewer(watch, last.format(mark=first.last.partition("-")[0]))
    names = []
    for name, _, data in viewer.events():
        names.append(name)
        if name == "lines":
            assert [line["step"] for line in data["metrics"]] == [1, 2]
            break
    assert "reset" in names
    viewer.close()


def test_the_state_and_the_end_are_told(watch: Watch, tmp_path: Path) -> None:
    viewer = Viewer(watch)
    watch.say("a word")
    watch.loading(5, 10)
    watch.start(0, 1)
    (tmp_path / "run" / "audit.json").write_text(
        json.dumps({"passed": True, "tensors": {"x": 1}, "moved": 3})
    )
    write(watch, tmp_path, 1, 1)
    watch.finish()
    ending = threading.Thread(target=watch.close, args=("stopped",))
    ending.start()
    events = list(viewer.events())
    ending.join()
    states = [data for name, _, data in events if name == "state"]
    assert states[-1]["phase"] == "stopped"
    assert states[-1]["messages"] == ["a word"]
    assert states[-1]["audit"] == {"passed": True, "moved": 3}
    assert [name for name, _, _ in events][-1] == "end"
    assert [len(data["metrics"]) for name, _, data in events if name == "lines"] == [1]
    with pytest.raises(ConnectionRefusedError):
        Viewer(watch)


def test_nothing_of_an_older_run_is_shown_before_training_begins(watch: Watch, tmp_path: Path) -> None:
    write(watch, tmp_path, 1, 3)
    viewer = Viewer(watch)
    watch.say("loading")
    name, _, data = next(event for event in viewer.events() if event[2].get("messages"))
    assert name == "state"
    assert data["phase"] == "waiting"
    viewer.close()


def asked(watch: Watch, path: str = "/", **headers: str) -> tuple[int, bytes, Any]:
    port = int(watch.address.rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, answer.headers


def test_only_this_machine_by_its_own_name_is_answered(watch: Watch) -> None:
    for name in ("127.0.0.1", "localhost", "LOCALHOST:9", "127.0.0.1:5", "[::1]:80", "[::1]"):
        assert asked(watch, Host=name)[0] == 200, name
    for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil.example:1"):
        assert asked(watch, Host=name)[0] == 403, name
        assert asked(watch, "/events", Host=name)[0] == 403, name
    assert asked(watch)[0] == 403
    assert asked(watch, "/events", Host="localhost", Sec_Fetch_Site="cross-site")[0] != 200
    status, body, headers = asked(watch, "/../run.json", Host="localhost")
    assert status == 404
    status, body, headers = asked(watch, Host="localhost")
    assert b'id="run-data"' in body
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers


def test_it_listens_on_this_machine_only(watch: Watch) -> None:
    assert watch._server._http.server_address[0] == "127.0.0.1"


def test_a_viewer_that_does_not_read_hinders_nobody(
    watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_server._Handler, "timeout", 0.3)
    port = int(watch.address.rstrip("/").rpartition(":")[2])
    dead = socket.create_connection(("127.0.0.1", port))
    dead.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    dead.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    watch.start(0, 1)
    filler = "x" * 100_000
    for number in range(100):  # 10 MB that nobody takes
        with open(tmp_path / "run" / "timings.jsonl", "a") as file:
            file.write(json.dumps({"step": number, "filler": filler}) + "\n")
    write(watch, tmp_path, 1, 4)
    viewer = Viewer(watch)
    assert viewer.steps(4) == [1, 2, 3, 4]
    # It goes on reading: what is left of the 10 MB would have it dropped as well.
    reader = threading.Thread(target=lambda: list(viewer.events()), daemon=True)
    reader.start()
    deadline = time.monotonic() + 10
    while watch._server._http.num_streams() > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert watch._server._http.num_streams() == 1
    watch.close("finished")
    reader.join(10)
    assert not reader.is_alive()
    viewer.close()
    dead.close()


def test_too_many_viewers_are_refused(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    watch._server.viewers = threading.BoundedSemaphore(1)
    first = Viewer(watch)
    assert next(first.events())[0] == "state"
    assert Viewer(watch).answer.status == 503
    first.close()


def test_a_port_in_use_is_named(watch: Watch, tmp_path: Path) -> None:
    port = int(watch.address.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigError, match=str(port)) as error:
        Watch(tmp_path, port)
    assert "--watch 0" in error.value.fix
    with pytest.raises(ConfigError, match="70000"):
        Watch(tmp_path, 70000)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("train --watch --data x", "train --watch=8127 --data x"),
        ("train --watch", "train --watch=8127"),
        ("train --watch 0 --json", "train --watch 0 --json"),
        ("train --watch=9", "train --watch=9"),
        ("train --data --watchful", "train --data --watchful"),
    ],
)
def test_the_port_may_be_left_out(words: str, wanted: str) -> None:
    assert with_port(words.split()) == wanted.split()


def test_a_whole_run_is_watched(
    tiny_dir: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command, its page, and a viewer that comes while it trains and stays to the end."""
    seen: list[Event] = []
    made: list[Watch] = []
    real = Watch.start

    def start(self: Watch, step: int, num_steps: int) -> None:
        made.append(self)
        viewer = Viewer(self)
        thread = threading.Thread(target=lambda: seen.extend(viewer.events()))
        thread.start()
        threads.append(thread)
        real(self, step, num_steps)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(Watch, "start", start)
    out = tmp_path / "watched"
    words = [
        "train",
        "--model",
        str(tiny_dir("llama")),
        "--data",
        str(rows),
        "--out",
        str(out),
        "--watch",
        "0",
    ]
    for value in (
        "data.max_length=64",
        "training.max_steps=6",
        "training.batch_size=2",
        "training.spectrum_steps=3",
    ):
        words += ["--set", value]
    assert graft([*words, "--json"]) == 0
    threads[0].join(20)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["ok"]
    assert f"live page: {made[0].address}" in printed.err
    lines = [data for name, _, data in seen if name == "lines"]
    for log in ("metrics", "timings", "spectra"):
        assert [line for data in lines for line in data[log]] == read_lines(out / f"{log}.jsonl")
    assert [name for name, _, _ in seen].count("end") == 1
    assert [data["phase"] for name, _, data in seen if name == "state"][-1] == "finished"
    audit = [data["audit"] for name, _, data in seen if name == "state" and "audit" in data][-1]
    assert audit["passed"]
    told = [data for name, _, data in seen if name == "state"][-1]["predicted_memory_bytes"]
    assert told == json.loads((out / "run.json").read_text())["predicted_memory"]["peak_bytes"]
