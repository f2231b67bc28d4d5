"""Clients of the tests with many requests, and what they have in common."""

import contextlib
import inspect
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

from conftest import ROOT


class Client:
    """Requests and answers on one connection, as bytes."""

    def __init__(self, port, seconds=30):
        self.sock = socket.create_connection(("127.0.0.1", port), seconds)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()

    def answer(self, bodiless=False):
        """(status, head, body) of the next answer, None at the end; ValueError when it cannot be
        parsed. `bodiless`: it answers a HEAD."""
        while True:
            head, found, rest = self.buffer.partition(b"\r\n\r\n")
            if found:
                status = re.match(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n", head)
                if not status:
                    if head != b"HTTP/1.1 100 Continue":
                        raise ValueError(f"no status line: {head[:200]!r}")
                    self.buffer = rest
                    continue
                length = re.findall(rb"\r\nContent-Length: (\d+)(?=\r\n|$)", head)
                if len(length) != 1:
                    raise ValueError(f"no Content-Length: {head[:200]!r}")
                size = 0 if bodiless else int(length[0])
                if len(rest) >= size:
                    self.buffer = rest[size:]
                    return int(status[1]), head, rest[:size]
            part = self.sock.recv(1 << 16)
            if not part:
                if self.buffer:
                    raise ValueError(f"half an answer: {self.buffer[:200]!r}")
                return None
            self.buffer += part

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def post(path, body=b"", headers=()):
    """A request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def quantiles(times):
    """(p50, p99, max) of seconds, in ms."""
    times = sorted(times)
    return tuple(round(times[int(part * (len(times) - 1))] * 1000, 2) for part in (0.5, 0.99, 1))


class Pulse:
    """Beats every few ms on a connection of its own, in a thread, and keeps how long each answer
    took."""

    def __init__(self, port):
        self.times, self.error = [], None
        self._port, self._stop = port, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _beat(self):
        try:
            with Client(self._port) as client:
                while not self._stop.wait(0.004):
                    began = time.perf_counter()
                    client.sock.sendall(post("/beat"))
                    status, _, body = client.answer()
                    self.times.append(time.perf_counter() - began)
                    assert status == 200 and json.loads(body)["code"] == 200, body
        except Exception as error:  # asserted on in the test's own thread
            self.error = error


@contextlib.contextmanager
def clients(directory, *calls):
    """Run the file of each function as a program, for each (function, arguments); the list that is
    yielded holds at the end what they returned."""
    found, running = [], []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    with contextlib.ExitStack() as stack:
        for number, (function, arguments) in enumerate(calls):
            out = stack.enter_context(open(directory / f"client{number}.out", "w+b"))
            command = [sys.executable, inspect.getfile(function), json.dumps(arguments)]
            process = stack.enter_context(
                subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
            )
            stack.callback(process.kill)  # nothing when it has ended
            running.append((process, out))
        yield found
        for process, out in running:
            status = process.wait()  # it has an alarm of its own
            out.seek(0)
            text = out.read().decode("utf-8", "replace")
            assert status == 0, text
            found.append(json.loads(text))


def run_as_program(function):
    """What a file with a client does as a program: call `function` with its arguments as JSON, its
    result on stdout. It ends by itself."""
    arguments = json.loads(sys.argv[1])
    signal.alarm(600 + arguments["count"] // 100)
    json.dump(function(**arguments), sys.stdout)
