"""What the fault matrix shares: a ledger of what was accepted, a proxy that breaks connections."""

import collections
import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest
import requests
from conftest import run_processes, wait_until

# Not those that a loopback admin gives by itself.
LOG_IDS = itertools.count(2_000_000_000 + int(time.time() * 1000) % 1_000_000_000)


def rounds(ci, name="XXL_FAULT_ROUNDS"):
    """How often a fault is repeated: `ci` times, or as often as the environment variable `name`
    says."""
    return int(os.environ.get(name, ci))


def items_of(body):
    """The results in the body of a callback, in either dialect."""
    found = json.loads(body)
    return found["callbackList"] if isinstance(found, dict) else found


def need_root():
    """For what needs root or namespaces: CI runs as root."""
    if os.getuid() != 0:
        pytest.skip("needs root")


def rss(pid, field="VmRSS"):
    """Resident memory of a process in bytes; VmHWM is the most since `forget_peak`."""
    return (
        int(re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024
    )


def forget_peak(pid):
    """Have VmHWM begin anew; see proc(5), clear_refs."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@contextlib.contextmanager
def traced(daemon, tasks, *options):
    """strace with these options at `tasks`, threads of the daemon; the test is skipped where it is
    missing or may not trace."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    errors, command = daemon.directory / "strace-errors.txt", ["strace", *options]
    for task in tasks:
        command += ["-p", str(task)]
    with open(errors, "wb") as stream:
        tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)

    def attached():
        there = Path(f"/proc/{daemon.process.pid}/task")
        gone = sum(not (there / str(task)).exists() for task in tasks)  # meanwhile
        return errors.read_text().count(" attached") + gone >= len(tasks)

    try:
        wait_until(lambda: attached() or tracer.poll() is not None, 20, "the tracer")
        if tracer.poll() is not None:
            pytest.skip(f"strace may not trace: {errors.read_text().strip()[:200]}")
        yield
    finally:
        tracer.terminate()  # detaches
        tracer.wait(20)


class Ledger:
    """What was accepted, and what every fault promises about it: one result each, at most one
    start, no process left.

    Jobs come from `job` or `python_job`: they note their start in a file. Any thread may trigger.
    """

    def __init__(self, admin, directory):
        self.admin, self.starts = admin, directory / "starts"
        self.accepted, self.refused, self.unanswered = set(), {}, set()

    def job(self, shell="true", **options):
        """A shell job that notes its start first."""
        return {
            "shell": f'echo "$XXL_JOB_LOG_ID" >> "$STARTS"; {shell}',
            "env": {"STARTS": str(self.starts)},
            **options,
        }

    def python_job(self, directory, name, body, **options):
        """A Python job `name` whose function body is the lines of `body`, with `context`, `os`,
        `sys`, `time`."""
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (directory / f"{name}.py").write_text(
            "import os, signal, subprocess, sys, threading, time\n\n\ndef main(context):\n    fd ="
            f" os.open({str(self.starts)!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)\n   "
            f" os.write(fd, b'%d\\n' % context.log_id)\n    os.close(fd)\n{lines}"
        )
        return {"python": f"{name}:main", "pythonpath": [str(directory)], **options}

    def trigger(self, daemon, handler="job", **fields):
        """Trigger and note the answer; returns the logId. A request that got no answer is neither
        accepted nor refused."""
        log_id = fields.setdefault("logId", next(LOG_IDS))
        try:
            _, reply = self.admin.trigger(daemon.url, handler, **fields)
        except (requests.RequestException, ValueError):
            self.unanswered.add(log_id)
        else:
            if reply["code"] == 200:
                self.accepted.add(log_id)
            else:
                self.refused[log_id] = reply["msg"]
        return log_id

    def started(self):
        """The logIds in the order of their starts."""
        return list(map(int, self.starts.read_text().split())) if self.starts.exists() else []

    def result(self, log_id, seconds=30):
        """(code, message) of the one result of `log_id`; waits for it."""
        assert self.admin.wait(lambda: log_id in self.admin.results, seconds), (
            f"no result of {log_id} within {seconds} s"
        )
        item = self.admin.results[log_id][0]
        return item["handleCode"], item["handleMsg"]

    def settle(self, daemon, seconds=30, again=()):
        """Wait until every accepted run has a result; assert that it has one, that no run started
        twice (but those in `again`) and that no process of a run is alive."""

        def missing():
            return [log_id for log_id in list(self.accepted) if log_id not in self.admin.results]

        self.admin.wait(lambda: not missing(), seconds)
        assert not missing(), (
            f"no result of {len(missing())} of {len(self.accepted)} accepted runs:"
            f" {sorted(missing())[:10]}"
        )
        for log_id, items in list(self.admin.results.items()):
            assert all(item == items[0] for item in items), (
                f"different results of {log_id}: {items}"
            )
        twice = {
            log_id for log_id, count in collections.Counter(self.started()).items() if count > 1
        } - set(again)
        assert not twice, f"started more than once: {sorted(twice)}"
        wait_until(lambda: not run_processes(daemon), 10, "the end of every process of a run")


class Proxy:
    """A TCP proxy in front of a loopback admin that breaks connections; `url` takes the place of
    the admin's.

    `plan(number)` is asked for each connection (from 0) and each further request on it; it returns
    one of: "pass"; "reset" (the request is read, the admin never sees it, RST), "reset-in" (the
    admin has it; half of the answer, then RST), "reset-after" (the admin has it; the whole answer,
    then RST), "lost" (the admin has it; no byte of the answer, RST), "hang" (no answer until the
    client goes away), "drip" (a byte of the answer every 0.7 s), or bytes (sent as they are, then
    closed).
    """

    def __init__(self, admin, plan=lambda number: "pass"):
        self.plan, self.requests, self.connections, self.sent = plan, 0, 0, 0
        self._target = int(admin.url.split("/")[2].rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.url = admin.url.replace(f":{self._target}", f":{self.port}")
        self.closing = threading.Event()
        self._lock, self._open = threading.Lock(), set()
        self._threads = [threading.Thread(target=self._accept, name="proxy")]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join()
        self._listener.close()

    def _accept(self):
        while not self.closing.is_set():
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            with self._lock:
                self._open.add(client)
                self.connections += 1
            self._threads.append(
                threading.Thread(target=self._serve, args=(client,), name="proxy-connection")
            )
            self._threads[-1].start()

    def _serve(self, client):
        with contextlib.suppress(OSError), client:
            while self._exchange(client):
                pass
        with self._lock:
            self._open.discard(client)

    def _exchange(self, client):
        """One request and its answer; whether the connection lives on."""
        request = self._message(client)
        if not request:
            return False
        with self._lock:
            number, self.requests = self.requests, self.requests + 1
        act = self.plan(number)
        if isinstance(act, bytes):
            self._send(client, act)
            return False
        if act == "reset":
            return self._reset(client)
        if act == "hang":
            client.recv(1)
            return False
        with socket.create_connection(("127.0.0.1", self._target)) as upstream:
            upstream.sendall(request)
            answer = self._message(upstream)
        if act == "lost":
            return self._reset(client)
        if act == "reset-in":
            client.sendall(answer[: -len(answer) // 2])
            return self._reset(client)
        if act == "drip":
            for i in range(len(answer)):
                if self.closing.wait(0.7):
                    return False
                client.sendall(answer[i : i + 1])
            return True
        client.sendall(answer)
        return self._reset(client) if act == "reset-after" else True

    def _send(self, client, data):
        """Send piece by piece, only as long as the other side keeps the connection; `sent` counts
        the bytes."""
        client.settimeout(0.02)
        for start in range(0, len(data), 8192):
            client.sendall(data[start : start + 8192])
            self.sent += len(data[start : start + 8192])
            with contextlib.suppress(TimeoutError, socket.timeout):
                if not client.recv(1):
                    return

    @staticmethod
    def _reset(client):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    @staticmethod
    def _message(sock):
        """A whole HTTP message with a Content-Length; b"" at the end of the connection."""
        data = b""
        while True:
            head, found, rest = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            if found and len(rest) >= int(length[1] if length else 0):
                return data
            part = sock.recv(1 << 16)
            if not part:
                return b""
            data += part


def stderr_lines(daemon, pattern):
    return [line for line in daemon.log.splitlines() if re.search(pattern, line)]
