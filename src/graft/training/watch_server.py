"""The server behind a live page: the page, and for each viewer an event stream that reads the run's logs."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from graft.evaluate.report import render
from graft.evaluate.run_page import LIVE_POLICY, RunOverview, RunPart, curve_parts
from graft.runs import RunDirectory
from graft.training.audit import FILE as AUDIT
from graft.training.trackers.points import Tail

HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Names that a browser on this machine may have asked for; through a tunnel the port may be another one."""

LOOK_SECONDS, BEAT_SECONDS = 0.25, 10.0
"""Between two looks at the logs; between two signs of life to a viewer."""

PATIENCE_SECONDS = 15.0
"""How long a viewer may leave what it was sent unread before it is dropped; it comes back where it was."""

MOST_VIEWERS = 32
MOST_BYTES = 1 << 18
"""Of each log in one event."""

LOGS = ("metrics", "timings", "spectra")

State = Callable[[int], tuple[int, str] | None]


class Server:
    """Serves one run on 127.0.0.1.

    Args:
        run: The run directory.
        port: Where; 0 takes a free one.
        state: Gives what is known besides the logs to whoever has not seen it.

    Raises:
        OSError: The port cannot be had.
    """

    def __init__(self, run: Path, port: int, state: State) -> None:
        self.run, self.state = RunDirectory(run), state
        self.logs_open = threading.Event()
        self.ended = threading.Event()
        self.viewers = threading.BoundedSemaphore(MOST_VIEWERS)
        self.page = live_page(run.name).encode()
        self._http = _Server(("127.0.0.1", port), _Handler)
        self._http.owner = self
        self.port = int(self._http.server_address[1])
        self._thread = threading.Thread(target=self._http.serve_forever, name="watch", daemon=True)

    def start(self) -> None:
        """Serve, on a thread of its own."""
        self._thread.start()

    def open_logs(self) -> None:
        """From now on the logs hold this run, cut back to where it goes on."""
        self.logs_open.set()

    def stop(self, deadline: float) -> None:
        """Let the viewers have the rest until a time of `time.monotonic`, then stop."""
        self.ended.set()
        while self._http.num_streams() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._http.shutdown()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    owner: Server

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._streams, self._lock = 0, threading.Lock()

    def num_streams(self) -> int:
        with self._lock:
            return self._streams

    def count(self, change: int) -> None:
        with self._lock:
            self._streams += change

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a viewer that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "graft", ""
    timeout = PATIENCE_SECONDS

    def do_GET(self) -> None:  # noqa: N802 - named by the standard library
        if not self._is_for_here():
            self._refuse(403, "this page is served to this machine only, by the name 127.0.0.1 or localhost")
        elif self.path == "/":
            self._send(self.server.owner.page, "text/html; charset=utf-8")
        elif self.path == "/events" and self.headers.get("Sec-Fetch-Site") != "cross-site":
            self._events()
        else:
            self._refuse(404, "there are / and /events")

    def _is_for_here(self) -> bool:
        """Against DNS rebinding: another site's name that leads here is not ours."""
        name = self.headers.get("Host", "")
        host = name[: name.rfind(":")] if ":" in name and not name.endswith("]") else name
        return host.lower() in HOSTS

    def _send(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self._head(kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _head(self, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Content-Security-Policy", LIVE_POLICY)

    def _refuse(self, status: int, why: str) -> None:
        self._send(f"{why}\n".encode(), "text/plain; charset=utf-8", status)

    def _events(self) -> None:
        owner = self.server.owner
        if not owner.viewers.acquire(blocking=False):
            self._refuse(503, f"{MOST_VIEWERS} viewers are connected")
            return
        self.server.count(1)
        try:
            self.send_response(200)
            self._head("text/event-stream; charset=utf-8")
            self.end_headers()
            Stream(owner, self.wfile.write, self.headers.get("Last-Event-ID", "")).run()
        finally:
            self.server.count(-1)
            owner.viewers.release()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by the standard library
        """Nothing: the terminal is the run's."""


class Stream:
    """The events of one viewer.

    `lines` holds new lines of the logs; its id says how far each log was read, so a viewer that comes back
    gets each line once. `state` is what is known besides. `reset` forgets what came before: it was another
    run, or the run went back to a checkpoint. `end` is the last one.

    Args:
        owner: The server.
        write: Sends bytes; may raise OSError.
        last: The id that the viewer has seen last; "" for a new one.
    """

    def __init__(self, owner: Server, write: Callable[[bytes], Any], last: str) -> None:
        self._owner, self._write, self._last = owner, write, last
        run = owner.run
        self._tails = [Tail(path) for path in (run.metrics_path, run.timings_path, run.spectra_path)]
        self._mark = ""
        self._seen = -1
        self._audit: tuple[int, int] | None = None
        self._sent = time.monotonic()

    def run(self) -> None:
        """Send until the run ends.

        Raises:
            OSError: The viewer went away, or does not read.
        """
        while True:
            over = self._owner.ended.is_set()
            self._tell_state()
            if self._owner.logs_open.is_set():
                while self._tell_lines():
                    pass
            if over:
                self._event("end", "{}")
                return
            if time.monotonic() - self._sent > BEAT_SECONDS:
                self._put(b": \n\n")
            self._owner.ended.wait(LOOK_SECONDS)

    def _tell_state(self) -> None:
        found = self._owner.state(self._seen)
        path = self._owner.run.path / AUDIT
        changed = path.stat() if self._owner.logs_open.is_set() and path.is_file() else None
        audit = (changed.st_mtime_ns, changed.st_ino) if changed else None
        if found is None and audit == self._audit:
            return
        self._seen, text = found or self._owner.state(-1) or (self._seen, "{}")
        self._audit = audit
        state = json.loads(text)
        if changed:
            told = json.loads(path.read_bytes())
            told.pop("tensors", None)
            state["audit"] = told
        run = self._owner.run
        if self._owner.logs_open.is_set() and run.record_path.is_file():
            predicted = run.read_record().get("predicted_memory", {})
            state["predicted_memory_bytes"] = predicted.get("peak_bytes")
        self._event("state", json.dumps(state))

    def _tell_lines(self) -> bool:
        if not self._mark and not self._begin():
            return False
        # Metrics first: what stands there has its timing in the log that is read next.
        parts = [tail.read(MOST_BYTES) for tail in self._tails]
        if not any(parts):
            return False
        data = ",".join(
            f'"{log}":[{",".join(line.decode() for line in lines)}]'
            for log, lines in zip(LOGS, parts, strict=True)
        )
        self._event("lines", f"{{{data}}}", self._identity())
        return True

    def _begin(self) -> bool:
        """Go to where the viewer has read to, if that was this run; False while there is no line yet."""
        first = Tail(self._owner.run.metrics_path).read(1)
        if not first:
            return False
        self._mark = hashlib.sha256(str(self._owner.run.path.absolute()).encode() + first[0]).hexdigest()[:16]
        mark, *told = self._last.split("-")
        offsets = [int(offset) for offset in told if offset.isdecimal() and len(offset) < 19]
        known = mark == self._mark and len(told) == len(offsets) == len(LOGS)
        if known and all(offset <= tail.size() for offset, tail in zip(offsets, self._tails, strict=True)):
            for tail, offset in zip(self._tails, offsets, strict=True):
                tail.offset = offset
        elif self._last:
            self._event("reset", "{}")
        return True

    def _identity(self) -> str:
        return "-".join([self._mark, *(str(tail.offset) for tail in self._tails)])

    def _event(self, name: str, data: str, identity: str = "") -> None:
        told = f"id: {identity}\n" if identity else ""
        self._put(f"event: {name}\n{told}data: {data}\n\n".encode())

    def _put(self, data: bytes) -> None:
        self._write(data)
        self._sent = time.monotonic()


def live_page(name: str) -> str:
    """The page, without figures: they come over the event stream."""
    state = {"phase": "waiting", "name": name}
    empty: dict[str, list[Any]] = {log: [] for log in LOGS}
    parts = [
        RunOverview(title="Now", lines=empty, state=state, live="/events"),
        *curve_parts(),
        RunPart(title="Audit", part="audit"),
        RunPart(title="Log", part="log"),
    ]
    return render(parts, title=name, subtitle="live", policy=LIVE_POLICY)
