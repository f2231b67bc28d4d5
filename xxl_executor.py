#!/usr/bin/env python3
"""XXL-JOB executor in one file: copy it, list scripts in a YAML file, start it from systemd or
beside a container.

A trigger travels down this file: connection (4) -> Api (5) -> core (6), which decides, commits to
the journal (9) and then answers -> supervisor (7), job process -> job log (8) -> core, journal ->
callback thread (10) -> admin (11). "Accepted" is said only after the journal has committed the run;
a result is sent until the admin has acknowledged it, for at most 7 days. Every run carries a marker
in its environment, by which its whole process tree is found again, after a crash of this daemon
too. Objects arrive through constructors, only Wiring (14) knows them all; no section from 4 to 12
names a class of another one of these.

 sockets          lanes, journal writer           job processes
 selector --run/kill--> core --start/cancel--> supervisor
    ^                    | ^ |                     |
    +------answers-------+ | +--start--> slots (isolation: thread only)
                           +-----ended-------------+        stored results --> callback --> admin
 pool: what may read a file or the journal (/log, /status, /metrics), or store a script

thread         started by           owns, waits on                        stops when
main           the interpreter      the signal pipe, the next deadline    a signal asks for it
http-selector  HttpServer.start     every connection: epoll, wake-up      close(), after all answers
http-N         HttpServer.start     a queue of requests of the pool       close(), when idle
core           Core.start           lanes, limits, the journal's writer:  close(), all is stored
                                    a queue of messages
supervisor     Daemon               job processes: epoll over output,     close(), nothing runs
                                    ends and a wake-up; timers
aside-N        Crew, on need        a start that may hang, a tree's end   10 s idle, all but one
slot-N         Crew, on need        a job with isolation: thread          the process ends
callback       Callbacks.start      a result, the next attempt            close(), after at most 5 s
registration   Registration.start   30 s, or a retry                      close(), registryRemove
(pruning)      Daemon, each hour    the disk                              all is removed, or a stop
(host-check)   Daemon, and a reload programs that tell what is missing    all is looked at
(output)       Output, on need      who reads stdout or stderr            nothing waits any more
(Timer)        11 and 14            a deadline of an exchange, of a stop  that ends first
(resolver)     11                   the name of an admin                  the resolver gives up

sections: 1 vocabulary, 2 config, 3 metrics, 4 HTTP server, 5 executor API, 6 core,
7 job processes, 8 job logs, 9 journal, 10 callbacks, 11 admin client, 12 registration, 13 systemd,
14 daemon, 15 CLI.  `grep -n '^# [0-9]'` lists them, and the parts of the longer ones.
"""

from __future__ import annotations

import marshal
import os
import signal
import sys


def open_closed_streams() -> None:
    """Have /dev/null stand where stdin, stdout or stderr is closed: else the next files that are
    opened, such as a job's output, are taken for one of these."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free
            if number == 1 and sys.stdout is None:
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    open_closed_streams()

# A reload that is asked for before the daemon can take it must not end it: ignored until then, also
# by the process that it becomes.
HANGUP = signal.signal(signal.SIGHUP, signal.SIG_IGN) if __name__ == "__main__" else None


def run_compiled(flags: list[str]) -> None:
    """Run the code of this file anew, in this process: of a script CPython keeps the syntax tree
    while it runs, 9 MiB of this one. It is handed over compiled, which saves 0.1 s. Modules are
    looked for beside this file, as of any script, and not in the current directory, as by -c: that
    may be anybody's."""
    boot = (
        "import marshal, os, sys; fd = int(sys.argv[1]); sys.path[0] = sys.path[0] or sys.argv[2];"
        " code = marshal.loads(os.pread(fd, os.fstat(fd).st_size, 0)); os.close(fd);"
        " module = sys.modules['xxl_executor'] = type(sys)('xxl_executor');"
        " module.__file__ = code.co_filename; exec(code, vars(module));"
        " del code; module.show_command(sys.argv[4:]); sys.exit(module.main(sys.argv[4:]))"
    )
    fd, data = os.memfd_create("xxl_executor.py", 0), marshal.dumps(sys._getframe(1).f_code)
    try:
        written = os.write(fd, data)
    except OSError:
        written = 0
    if written < len(data):  # `ulimit -f`: then it runs as it is
        os.close(fd)
        return
    words = [sys.executable, *flags, "-c", boot, str(fd), sys.path[0], __file__, *sys.argv[1:]]
    os.execv(sys.executable, words)


_ONCE = {  # commands that end soon: not worth `run_compiled`
    "check",
    "demo",
    "exec",
    "status",
    "runs",
    "logs",
    "-h",
    "--help",
    "--version",
    "--serve-python",
}
if __name__ == "__main__" and __spec__ is None and not _ONCE & set(sys.argv):
    with open("/proc/self/cmdline", encoding="utf-8", errors="surrogateescape") as words:
        run_compiled(words.read().split("\0")[1 : -1 - len(sys.argv)])

import argparse
import ast
import bisect
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import email.utils
import enum
import errno
import faulthandler
import fcntl
import functools
import gc
import glob
import hashlib
import heapq
import hmac
import http
import http.client
import http.server
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import pwd
import queue
import random
import re
import resource
import secrets
import select
import shlex
import shutil
import socket
import sqlite3
import stat
import subprocess
import tempfile
import threading
import time
import traceback
import types
import typing
import unicodedata
import urllib.parse

# `requests` and `yaml` are imported where they are used: the Python server of section 7 also runs
# under interpreters that have neither (`interpreter:`), and `--version` need not wait for them.

__version__ = "0.1.0"

# --------------------------------------------------------------------------------------------------
# 1 vocabulary
# --------------------------------------------------------------------------------------------------
SUCCESS, FAILURE, TIMEOUT = 200, 500, 502  # handleCode, XXL-JOB's XxlJobContext
MESSAGE_LIMIT = 15_000  # characters; the admin cuts handleMsg there. SECURITY.md names it.
DEAD_AFTER = 7 * 86_400.0  # seconds; then an undelivered result is kept but no longer sent
GLUE = {  # glueType: (interpreter, suffix of the file); GlueTypeEnum of XXL-JOB
    "GLUE_SHELL": ("bash", ".sh"),
    "GLUE_PYTHON": ("python3", ".py"),
    "GLUE_PYTHON2": ("python", ".py"),
    "GLUE_NODEJS": ("node", ".js"),
    "GLUE_PHP": ("php", ".php"),
    "GLUE_POWERSHELL": ("pwsh", ".ps1"),
}
LIBC = ctypes.CDLL(None, use_errno=True)
INT64 = range(-(1 << 63), 1 << 63)
MARKER = (  # environment variable that names the data_dir and the run of every process of a job
    "XXL_EXECUTOR_RUN"
)
FAILPOINT = "XXL_EXECUTOR_FAILPOINT"  # environment variable of the tests, see `failpoint`
OLD_PYTHON = "{} is too old a Python, a python job needs 3.9: use command: [python, script] for it"
# names of environment variables that jobs do not get
SECRETS = re.compile(
    "XXL_JOB_ACCESS_TOKEN|NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*|CREDENTIALS_DIRECTORY"
    f"|{MARKER}|{FAILPOINT}"
)


class _OwnLogger(logging.Logger):
    """One that a job in a thread does not switch off by dictConfig, as django.setup() would, nor by
    logging.disable()."""

    disabled = property(lambda self: False, lambda self, value: None)  # type: ignore[assignment]

    def isEnabledFor(self, level: int) -> bool:
        return level >= self.getEffectiveLevel()


_logger_class = logging.getLoggerClass()
logging.setLoggerClass(_OwnLogger)
log = logging.getLogger("xxl-executor")
logging.setLoggerClass(_logger_class)


class ExecutorError(Exception):
    """An error whose text tells the operator what to do; the CLI prints it without a traceback."""


class ConfigError(ExecutorError):
    """All problems of the configuration, one `file:line: key: problem` a line; `files` as in
    Config; `config`: what could be read nevertheless."""

    files: tuple = ()
    config: typing.Any = None


class Refused(ExecutorError):
    """A request that is answered with code 500; the text goes to the admin, `reason` is a word for
    the metrics."""

    def __init__(self, text: str, reason: str = "malformed"):
        super().__init__(text)
        self.reason = reason


class JournalError(ExecutorError):
    """The journal cannot store anything now (full disk, broken file)."""


class AdminUnreachable(ExecutorError):
    """No address gave a usable answer in time; whether the admin acted is unknown."""


class AdminRefused(ExecutorError):
    """The admin answered, but not with an envelope of code 200; `away`: what was sent is not the
    reason."""

    def __init__(self, text: str, away: bool):
        super().__init__(text)
        self.away = away


class RunState(enum.Enum):
    """accepted -> running -> finished -> acknowledged -> resent -> delivered; a dropped run goes
    from accepted to finished, a result that the admin never took from finished to dead."""

    ACCEPTED = "accepted"
    RUNNING = "running"
    FINISHED = "finished"
    ACKNOWLEDGED = "acknowledged"  # by the admin, which may have lost it nevertheless
    RESENT = "resent"  # and acknowledged once more
    DELIVERED = "delivered"  # acknowledged three times, or there is no admin
    DEAD = "dead"


OWED = RunState.ACCEPTED, RunState.RUNNING, RunState.FINISHED  # the admin has no result yet


@dataclasses.dataclass(frozen=True)
class Trigger:
    """One trigger as the admin sent it; `timeout` in seconds (0: none), `log_date_time` and
    `glue_updated` in ms since the epoch. The handler of a script from the admin is glue-<jobId>.
    What `block_strategy` does is in Lane.check and Decisions._accept; an unknown one is serial. All
    fields are stored in the journal, and handed to Python jobs."""

    job_id: int
    log_id: int
    handler: str
    param: str = ""
    block_strategy: str = "SERIAL_EXECUTION"
    timeout: int = 0
    log_date_time: int = 0
    glue_type: str = "BEAN"
    glue_updated: int = 0
    shard_index: int = 0
    shard_total: int = 1

    def __str__(self) -> str:
        return f"{self.handler} logId={self.log_id} jobId={self.job_id}"

    def started(self, timeout: float, where: str) -> Event:
        """The line that tells of the start of its run."""
        return Event.of(self, f"started {self} {where} timeout={timeout_text(timeout)}")

    @property
    def label(self) -> str:
        """For metrics and `status`: the handler, one for all scripts from the admin."""
        return self.handler if self.glue_type == "BEAN" else "glue"


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended, or why it is being ended: then `result_of` and `_thread_stuck` make the
    final one of it, and a new field that should last is copied there. `code` is SUCCESS, FAILURE or
    TIMEOUT; `exit_status` as a shell would show it, None in a thread."""

    code: int
    message: str
    exit_status: int | None = None


class Span(typing.NamedTuple):
    """When a run took place: `began` in seconds since the epoch, the acceptance of one that never
    started; `took` in seconds, None for that one and when nobody knows."""

    trigger: Trigger
    began: float
    took: float | None


class StoredResult(typing.NamedTuple):
    """A result on its way to the admin; `log_date_time` in ms since the epoch, `since` when it came
    into its state, by the journal's clock."""

    log_id: int
    log_date_time: int
    code: int
    message: str
    since: float


class PastRun(typing.NamedTuple):
    """What is remembered of a run: `began` and `took` as in Span, `ended` in seconds since the
    epoch; it and `code` are None while it has not ended."""

    log_id: int
    state: str
    handler: str
    label: str
    shard_index: int
    shard_total: int
    began: float
    took: float | None
    ended: float | None
    code: int | None
    message: str

    @classmethod
    def just_ended(cls, span: Span, result: Result) -> PastRun:
        trigger = span.trigger
        return cls(
            trigger.log_id,
            RunState.FINISHED.value,
            trigger.handler,
            trigger.label,
            trigger.shard_index,
            trigger.shard_total,
            span.began,
            span.took,
            round(time.time(), 3),
            result.code,
            result.message[:200],
        )

    def shown(self) -> dict:
        """For JSON."""
        return {
            "job": self.handler,
            "logId": self.log_id,
            "state": self.state,
            "shard": f"{self.shard_index}/{self.shard_total}",
            "began": self.began,
            "seconds": self.took,
            "ended": self.ended,
            "code": self.code,
            "message": self.message,
        }


# -- messages to the core: decisions may be refused, and count once they are committed; facts have
# -- happened already


class Submit(typing.NamedTuple):
    """Decision: accept a trigger; `job` is what runs it, or why it cannot run here. `ticket`
    takes the answer."""

    trigger: Trigger
    job: typing.Any
    ticket: typing.Any


class Kill(typing.NamedTuple):
    """Decision: end what runs and drop what waits for a job."""

    job_id: int
    ticket: typing.Any


class Resume(typing.NamedTuple):
    """Decision: queue a run that the journal holds since an earlier life, `again`: one that ran."""

    trigger: Trigger
    job: typing.Any
    again: bool


class Expired(typing.NamedTuple):
    """Decision, carried out even if it cannot be stored: a run is out of time."""

    log_id: int
    result: Result


class CancelAll(typing.NamedTuple):
    """Decision, carried out even if it cannot be stored: end everything that runs."""

    result: Result


class Drain(typing.NamedTuple):
    """Decision: start nothing any more; `idle()` is called once nothing runs."""

    idle: typing.Callable[[], None]


class Ended(typing.NamedTuple):
    """Fact: a run has ended so."""

    log_id: int
    result: Result


class Lost(typing.NamedTuple):
    """Fact: a run of an earlier life cannot go on."""

    span: Span
    result: Result


class Stuck(typing.NamedTuple):
    """Fact: a cancelled run does not return from its thread."""

    log_id: int


class Settled(typing.NamedTuple):
    """Fact: results are in another state now; `on_stored(this)` is called after the commit."""

    log_ids: list[int]
    before: RunState
    state: RunState
    on_stored: typing.Callable[[typing.Any], None]


class Note(typing.NamedTuple):
    """Fact: something to be remembered under a name; None: not any more."""

    name: str
    value: str | None


class Work(typing.NamedTuple):
    """Decision: `work()` in the next transaction; `done(its value or the error)` after it."""

    work: typing.Callable[[], typing.Any]
    done: typing.Callable[[typing.Any], None]


class Watched:
    """A thread that works in turns, for the watchdog; `_busy_since` is when its turn began
    (monotonic), 0 while it waits for something to do."""

    _thread: threading.Thread
    _busy_since = 0.0

    def alive(self, patience: float) -> bool:
        """Whether it runs, and is not busy with one turn for more than `patience` seconds."""
        since = self._busy_since  # once: the thread may set it to 0 between two looks
        return self._thread.is_alive() and not (since and time.monotonic() > since + patience)


class Backoff:
    """How long to wait after failures in a row: 1 s to 60 s, with jitter so that many executors do
    not come at once; of deliveries (Callbacks, RefusedResults, Repeats), heartbeats and addresses
    of the admin. One thread at a time."""

    def __init__(self, failures: int = 0):
        self.failures = failures

    def fail(self) -> float:
        """Seconds before the next attempt."""
        self.failures += 1
        return max(1.0, min(60.0, 2.0 ** min(self.failures - 1, 6)) * random.uniform(0.5, 1.0))

    def succeed(self) -> None:
        self.failures = 0


class Event(str):
    """A line for the log that tells of a run; `fields`: what programs want to filter by."""

    fields: dict[str, typing.Any]

    @classmethod
    def of(cls, trigger: Trigger, text: str, **more: typing.Any) -> Event:
        event = cls(text)
        shown = {"job": trigger.handler, "jobId": trigger.job_id, "logId": trigger.log_id}
        event.fields = {**shown, **more}
        return event


class Lines(list):
    """Lines for the log, as one record: to format and to write each by itself takes 15 us."""

    def __str__(self) -> str:
        return "\n".join(self)


class Route(enum.Enum):
    """Who answers a request."""

    DIRECT = "the selector: it needs no decision and no file"
    CORE = "the core, which gets a message from the selector"
    LONG = "the core, once a thread has decoded a long body or stored a script"
    POOL = "a thread for what may read a file or the journal"
    PAGE = "the same, once a log page has its part of the budget"


class Request:
    """One request, whole; `trusted`: it has shown the token, or none is needed."""

    __slots__ = ("method", "path", "fields", "body", "peer", "trusted")

    def __init__(self, method: str, target: str, fields: dict[bytes, list[bytes]], peer: str):
        """`fields`: of the head, by their names in lower case."""
        self.method, self.fields, self.peer = method, fields, peer
        self.path = re.sub("/+", "/", target.partition("?")[0])
        self.body, self.trusted = b"", False


class Reply(typing.NamedTuple):
    """An answer to be rendered: HTTP status, content type, body."""

    status: int
    content_type: str
    body: bytes


# --------------------------------------------------------------------------------------------------
# 1b what all sections use
# --------------------------------------------------------------------------------------------------
def unusable(error: OSError) -> ExecutorError:
    """What to tell about a file of the data directory that cannot be used."""
    return ExecutorError(
        f"executor.data_dir: {error.filename}: {error.strerror}: choose a directory with space that"
        " this user may write"
    )


def make_directory(path: str) -> None:
    """Make it unless it is there. Raises ExecutorError."""
    try:
        os.makedirs(path, 0o750, exist_ok=True)
    except OSError as error:
        raise unusable(error) from None


def encodable(text: str) -> str:
    """`text` with ? for each lone surrogate: such as of a file name that is not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def clip(text: str) -> str:
    """Keep the tail of `text` within MESSAGE_LIMIT (the end of an error says more than its
    beginning), as valid UTF-8."""
    text = encodable(text)
    return text if len(text) <= MESSAGE_LIMIT else "..." + text[3 - MESSAGE_LIMIT :]


def seconds_text(seconds: float) -> str:
    """`seconds` for people: 0.25 s, 60 s, 12m 5s, 2h."""
    if seconds < 120:
        return f"{round(seconds, 3):.3g} s" if seconds < 100 else f"{seconds:.0f} s"
    (large, small), units = (
        (divmod(int(seconds), 60), "ms")
        if seconds < 3600
        else (divmod(int(seconds) // 60, 60), "hm")
    )
    return f"{large}{units[0]} {small}{units[1]}" if small else f"{large}{units[0]}"


def timeout_text(seconds: float) -> str:
    return seconds_text(seconds) if seconds else "none"


def shortest(*limits: float) -> float:
    """The smallest of timeouts, of which 0 is none."""
    return min([limit for limit in limits if limit], default=0)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def authority(host: str, port: int) -> str:
    """host:port as a URL has it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# seconds that the end waits for who reads stdout and stderr, the pruning, the supervisor
FLUSH_LIMIT = 1.0
OUTPUT_LIMIT = 1 << 20  # bytes that wait for who reads stdout or stderr; more are dropped


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """A hint to be added to an error, "" when nothing known is like `word`."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f', did you mean "{near[0]}"?' if near and near[0] != word else ""


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def printable(text: str) -> str:
    """`text` with its control characters shown escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def printable_lines(text: str) -> str:
    """The same of each line: it stays several lines."""
    return "\n".join(map(printable, text.split("\n")))


def json_text(value: typing.Any, indent: int | None = None) -> str:
    """JSON without characters on which a terminal would act; on one line without `indent`."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char == "\n"
        else json.dumps(char)[1:-1].replace("\x7f", "\\u007f")
        for char in text
    )


def without_secrets() -> dict[str, str]:
    """The environment for what is not this program."""
    return {name: value for name, value in os.environ.items() if not SECRETS.fullmatch(name)}


class Output:
    """Whole lines for stdout or stderr, which may be a pipe that nobody reads: no caller ever waits
    for its reader. Any thread.

    What it does not take at once is written by a thread that lives as long as something waits, and
    what is beyond OUTPUT_LIMIT is dropped: a line then says how much.
    """

    all: typing.ClassVar[list[Output]] = []  # one or two live as long as the process

    def __init__(self, fd: int):
        try:
            status = os.fstat(fd)
        except OSError:  # it is closed: its number may soon be that of a file
            fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            status = os.fstat(fd)
        # A finalizer that logs may run in the middle of `write`, in the same thread.
        self._fd, self._lock = fd, threading.RLock()
        self._waiting, self._dropped = bytearray(), 0  # bytes
        self.lost = 0  # bytes that were dropped, in all
        Output.all.append(self)
        self._idle = threading.Event()
        self._idle.set()
        # poll(2) promises so much of a pipe or a socket; a file never has anybody wait for a reader
        self._part = 1 << 30 if stat.S_ISREG(status.st_mode) else select.PIPE_BUF
        if os.isatty(fd) or stat.S_ISFIFO(status.st_mode):
            # A terminal promises nothing, a pipe has other writers: opened anew it does not wait.
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._fd = os.open(f"/proc/self/fd/{fd}", flags)
        self._poller = select.poll()
        self._poller.register(self._fd, select.POLLOUT)

    def write(self, data: bytes) -> None:
        """`data`: whole lines. Never waits."""
        with self._lock:
            rest = data if self._waiting else self._write_some(data)
            if len(rest) == len(data) and len(self._waiting) + len(data) > OUTPUT_LIMIT:
                self._dropped += len(data)
                self.lost += len(data)
            else:  # never only the beginning of a line
                self._waiting += rest
            more = (self._waiting or self._dropped) and self._idle.is_set()
            if more and not sys.is_finalizing():  # then no thread starts any more
                self._idle.clear()
                try:
                    threading.Thread(target=self._drain, name="output", daemon=True).start()
                except RuntimeError:  # no more threads: the next line tries again
                    self._idle.set()

    def _write_some(self, data: bytes, seconds: float = 0) -> bytes:
        """Write what the reader has room for; returns the rest."""
        while data and self._poller.poll(seconds * 1000):
            try:
                data = data[os.write(self._fd, data[: self._part]) :]
            except BlockingIOError:
                break
            except OSError:  # the reader is gone: there is nowhere to tell it
                return b""
        return data

    def _drain(self) -> None:
        while True:
            with self._lock:
                if not self._waiting and self._dropped:
                    told = (
                        f"----- {self._dropped} bytes of output were dropped: nobody read -----\n"
                    )
                    self._waiting += told.encode()
                    self._dropped = 0
                if not self._waiting:
                    self._idle.set()
                    return
                data = bytes(self._waiting[: self._part])
            written = len(data) - len(self._write_some(data, 3600.0))
            with self._lock:
                del self._waiting[:written]

    def flush(self, seconds: float) -> None:
        """Wait until nothing waits any more, at most `seconds`."""
        self._idle.wait(seconds)


class WakeUp:
    """A pipe that wakes the thread which waits until `fd` is readable; see signal(7) on the
    self-pipe trick. `wake`: any thread; the rest: that thread."""

    def __init__(self) -> None:
        self.fd, self.write_end = os.pipe()
        for end in (self.fd, self.write_end):
            os.set_blocking(end, False)

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # it is full: it will wake; or it is closed
            os.write(self.write_end, b"\0")

    def clear(self) -> bytes:
        """What it was woken by: a zero byte for `wake`, else the number of a signal."""
        with contextlib.suppress(BlockingIOError):
            return os.read(self.fd, 1 << 16)
        return b""

    def close(self) -> None:
        ends = self.fd, self.write_end
        self.fd = self.write_end = -1  # somebody may still wake
        for end in ends:
            os.close(end)


class Pace:
    """Has a thread pause for `seconds` after each turn in which there was much to do: what a turn
    costs whatever it does, such as a commit, is then shared by more (tests/bench.py, shell: 1.1
    times the runs with 0.9 of the CPU). A lone message never waits."""

    MUCH = 3  # things to do in a turn

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._next_at = 0.0  # monotonic

    def turned(self, count: int) -> None:
        """A turn in which `count` things were done has ended."""
        self._next_at = time.monotonic() + self._seconds if count >= self.MUCH else 0.0

    def keep(self) -> bool:
        """Wait until it is time for the next turn; whether it was early."""
        early = self._next_at - time.monotonic()
        if early > 0:
            breathe(early)
        return early > 0


def await_any(fds: typing.Iterable[int], deadline: float | None) -> list[int]:
    """Those of `fds` that can be read or have ended; waits for the first until `deadline`
    (monotonic)."""
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    left = None if deadline is None else min(max(0.0, deadline - time.monotonic()), 3600.0)
    # 1 ms more, for an early end would spin; an hour, for poll(2) takes an int
    return [fd for fd, _ in poller.poll(None if left is None else left * 1000 + 1)]


def wait_for(
    thread: threading.Thread, seconds: float, hurried: typing.Callable[[], bool] = lambda: False
) -> None:
    """Wait until `thread` has ended, at most `seconds`, and until `hurried()`."""
    deadline = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < deadline and not hurried():
        thread.join(0.1)


def breathe(seconds: float) -> None:
    """Let time pass, where no event tells when it is enough."""
    select.poll().poll(seconds * 1000)


_CRASH_AT, _, _PASSAGE = os.environ.get(FAILPOINT, "").partition(":")
_passages = itertools.count(1)


def failpoint(name: str) -> None:
    """Where the tests have the daemon crash: at the n-th passage when $XXL_EXECUTOR_FAILPOINT is
    `name:n`; any thread."""
    if name == _CRASH_AT and next(_passages) == int(_PASSAGE):
        os.kill(os.getpid(), signal.SIGKILL)


_SHARED = {random.choice(sorted(os.sched_getaffinity(0)))}


def share_cpu() -> None:
    """Keep the calling thread on the one CPU that the threads of this daemon share.

    They exclude each other by the GIL anyway, and handing it from core to core costs more
    (tests/bench.py, thread: 1.5 times the runs with 0.6 of the CPU, beside other load too; shell:
    the same). What such a thread starts is started in `all_cpus`.
    """
    with contextlib.suppress(OSError):  # a sandbox that forbids it
        os.sched_setaffinity(0, _SHARED)


@contextlib.contextmanager
def all_cpus() -> typing.Iterator[None]:
    """Inside, the calling thread, which shares a CPU, may run where the main thread may, which
    shares none: so may the processes and threads that begin there."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
    try:
        yield
    finally:
        share_cpu()


# --------------------------------------------------------------------------------------------------
# 2 config
# --------------------------------------------------------------------------------------------------
CONFIG_PLACES = ("./config.yaml", "/etc/xxl-executor/config.yaml")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_SIZES = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_TAGS = {
    "int": "the number {}",
    "float": "the number {}",
    "bool": "the truth value {}",
    "str": 'the text "{}"',
    "timestamp": "the date {}",
}
_STR, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
_OF_RUN = {  # what only a job has, see Launch._environment
    f"XXL_JOB_{name}"
    for name in ("ID", "LOG_ID", "HANDLER", "PARAM", "SHARD_INDEX", "SHARD_TOTAL")
    + ("TRIGGER_TIME", "TIMEOUT", "RESULT_FILE")
}
_EXPANDED = "${}"  # the style of a value that held a ${NAME}: text will do where text is expected
_OTHER_WORDS = {  # what other programs call a key
    "cmd": "command",
    "exec": "command",
    "program": "command",
    "script": "shell",
    "bash": "shell",
    "run": "shell",
    "module": "python",
    "function": "python",
    "workdir": "cwd",
    "working_directory": "cwd",
    "environment": "env",
    "token": "access_token",
    "listen": "bind",
}


Node = typing.Any  # of PyYAML, composed; imported late, and without types
Parse = typing.Callable[["_YamlReader", Node], typing.Any]  # raises _Bad


class _Bad(Exception):
    """A value that does not fit: the text says what was expected, `node` where it stands."""

    def __init__(self, text: str, node: Node):
        super().__init__(text)
        self.node = node


def _expected(what: str, node: Node) -> _Bad:
    node_type = node.id if node.id != "scalar" else node.tag.rpartition(":")[2]
    got = {"mapping": "a mapping", "sequence": "a list", "null": "nothing"}.get(
        node_type
    ) or _TAGS.get(node_type, "{}").format(node.value)
    return _Bad(f"expected {what}, got {got}", node)


def _absent(node: Node) -> bool:
    """Whether there is no value; a variable that holds the text "null" is one."""
    return node is None or (node.tag == _NULL and (not node.value or node.style != _EXPANDED))


def _scalar(node: Node, *tags: str, expected: str) -> str:
    if node.id != "scalar" or (
        node.tag.rpartition(":")[2] not in tags and not ("str" in tags and node.style == _EXPANDED)
    ):
        error = _expected(expected, node)
        raise (
            _Bad(f"{error}: put it in quotes", node)
            if tags == ("str",) and node.id == "scalar" and node.tag != _NULL
            else error
        )
    if "\0" in node.value:
        raise _Bad("a NUL character: no argument, path or variable can hold one", node)
    if node.style != _EXPANDED and encodable(node.value) != node.value:
        raise _Bad("half of a character (a lone surrogate): write all of it", node)
    return node.value


def _text(reader: _YamlReader, node: Node) -> str:
    return _scalar(node, "str", expected="text")


def _header(reader: _YamlReader, node: Node) -> str:
    value = _text(reader, node)
    if not re.fullmatch(r"[!-~]+", value):
        raise _Bad("expected printable ASCII without spaces, as an HTTP header carries it", node)
    return value


def _token(reader: _YamlReader, node: Node) -> str:
    """That of the admin: `_ConfigReader.config` takes it from `reader.token`, so this parses no
    other key."""
    if (
        node.id == "scalar"
        and node.tag.rpartition(":")[2] in ("int", "float", "bool", "timestamp")
        and node.style != _EXPANDED
    ):
        raise _Bad("expected text: put it in quotes", node)  # the usual words would show it
    name = re.fullmatch(r"\$([A-Za-z_]\w*)", node.value, re.ASCII) if node.id == "scalar" else None
    if name and name[1] in os.environ:
        raise _Bad(f"{name[0]} stays as it is: write ${{{name[1]}}}", node)
    reader.token = _text(reader, node) and _header(reader, node)
    return reader.token


def _token_file(reader: _YamlReader, node: Node) -> str:
    file = _path(reader, node)
    reader.files.append(glob.escape(file))
    if reader.token:
        raise _Bad("access_token is set too: keep one of them", node)
    try:
        with open(file, encoding="utf-8") as stream:
            _token(reader, reader.scalar(stream.read().strip(), node))
    except (OSError, UnicodeDecodeError) as error:
        raise _Bad(f"cannot be read: {error}", node) from None
    if not reader.token:
        raise _Bad(f"{file} is empty: write the token into it", node)
    return file


def _flag(reader: _YamlReader, node: Node) -> bool:
    return _scalar(node, "bool", expected="true or false").lower() in ("true", "yes", "on")


def _choice(*values: str) -> Parse:
    def parse(reader: _YamlReader, node: Node) -> str:
        if node.id != "scalar" or node.value not in values:
            raise _expected(" or ".join(values), node)
        return node.value

    return parse


def amount(text: str, pattern: str, units: dict) -> float | None:
    """The number in `text` times its unit, an int unless it has a point; None when it is none."""
    match = re.fullmatch(pattern, text, re.ASCII)
    if not match or match[2] not in units:
        return None
    return (float(match[1]) if "." in match[1] else int(match[1])) * units[match[2]]


LEAST_RETENTION = 3600.0  # seconds; less is refused: `log_retention: 30` is 30 s, not 30 days


def _retention(reader: _YamlReader, node: Node) -> float:
    value = _positive_duration(reader, node)
    if value < LEAST_RETENTION:
        hint = f", did you mean {node.value}d?" if node.value.isdecimal() else ""
        raise _Bad(f"expected 1h or more, got {seconds_text(value)}{hint}", node)
    return value


LONGEST = 36_500 * 86_400  # seconds; longer is taken for this: Python cannot wait so long


def _measure(pattern: str, units: dict, expected: str, positive: bool = False) -> Parse:
    def parse(reader: _YamlReader, node: Node) -> float:
        value = amount(_scalar(node, "int", "float", "str", expected=expected), pattern, units)
        if value is None:
            raise _expected(expected, node)
        if positive and value <= 0:
            raise _Bad(f"expected more than 0, got {node.value}", node)
        return min(value, LONGEST) if units is _UNITS else value

    return parse


_DURATION = (
    r"(\d{1,9}(?:\.\d{1,3})?)([a-z]*)",
    _UNITS,
    "a duration such as 90, 90s, 10m, 2h or 30d",
)
_duration, _positive_duration = _measure(*_DURATION), _measure(*_DURATION, positive=True)
_size = _measure(
    r"(\d{1,15})([A-Za-z]*)", _SIZES, "a size such as 4096, 512KiB or 64MiB", positive=True
)


def _whole(low: int, high: int) -> Parse:
    def parse(reader: _YamlReader, node: Node) -> int:
        expected = f"a whole number from {low} to {high}"
        value = _scalar(node, "int", expected=expected)
        if not re.fullmatch(r"\d{1,12}", value, re.ASCII) or not low <= int(value) <= high:
            raise _expected(expected, node)
        return int(value)

    return parse


def _list(parse: Parse) -> Parse:
    def each(reader: _YamlReader, node: Node) -> tuple:
        if node.id != "sequence":
            raise _expected("a list", node)
        return tuple(parse(reader, reader.expand(item)) for item in node.value)

    return each


def _argument(reader: _YamlReader, node: Node) -> str:
    if node.id == "mapping" and len(node.value) == 1 and node.value[0][0].id == "scalar":
        name = node.value[0][0].value  # [echo, {param}] is a list with a mapping in it
        raise _Bad(f'expected text or a number: put it in quotes, "{{{name}}}"', node)
    return _scalar(node, "str", "int", "float", expected="text or a number")


def _command(reader: _YamlReader, node: Node) -> tuple:
    if node.id == "scalar" and node.tag != _NULL:
        told = _expected("a list such as [python3, report.py]", node)
        raise _Bad(f"{told}: for a line of the shell write shell:", node)
    value = _list(_argument)(reader, node)
    if not value or not value[0]:
        raise _Bad("expected a list with a program and its arguments, got an empty one", node)
    return value


def _variables(reader: _YamlReader, node: Node) -> dict[str, str]:
    if node.id != "mapping":
        raise _expected("NAME: value pairs", node)
    values = {}
    for key, item in reader.pairs(node, reader.path):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key.value, re.ASCII):
            told = f'{reader.path}: "{key.value}" is no name of an environment variable'
            reader.problem(key, told)
            continue
        try:
            values[key.value] = _scalar(
                reader.expand(item), "str", "int", "float", "bool", expected="text or a number"
            )
        except _Bad as error:
            reader.problem(error.node, f"{reader.path}.{key.value}: {error}")
    return values


def _path(reader: _YamlReader, node: Node) -> str:
    base = os.path.dirname(os.path.abspath(node.start_mark.name))
    return os.path.normpath(os.path.join(base, os.path.expanduser(_text(reader, node))))


def _data_dir(reader: _YamlReader, node: Node) -> str:
    if node.value == os.environ.get("STATE_DIRECTORY"):  # of several the first
        node = reader.scalar(node.value.partition(":")[0], node)
    return _path(reader, node)


def _program(reader: _YamlReader, node: Node) -> str:
    return _path(reader, node) if "/" in _text(reader, node) else node.value


def _entry_point(reader: _YamlReader, node: Node) -> str:
    value = _text(reader, node)
    if "/" in value or value.endswith(".py"):
        raise _Bad(
            'expected module:function such as "reports.daily:main"; for a script write'
            f" command: [python3, {value}]",
            node,
        )
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
        raise _expected('module:function such as "reports.daily:main"', node)
    return value


def _module(reader: _YamlReader, node: Node) -> str:
    value = _text(reader, node)
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", value):
        raise _expected('a module such as "pandas" or "reports.common"', node)
    return value


# Signs that a Chinese keyboard, or a page that something was copied from, has in place of others.
_WIDE_SIGNS = {"\uff1a": ": ", "\uff0c": ", ", "\u201c": '"', "\u201d": '"', "\uff03": " #"}
_WIDE_SIGNS |= {"\u3000": " ", "\u00a0": " ", "\u3010": "[", "\u3011": "]"}
_WIDE = f"[{''.join(_WIDE_SIGNS)}]"


def _url(reader: _YamlReader, node: Node) -> str:
    value = _text(reader, node)
    odd = re.search(_WIDE, value)
    if odd:
        sign = _WIDE_SIGNS[odd[0]].strip()
        raise _Bad(f'"{odd[0]}" in an address: {f"write {sign}" if sign else "remove it"}', node)
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(value)
        if (
            parts.scheme in ("http", "https")
            and parts.hostname
            and (parts.port is None or parts.port > 0)
            and parts.hostname.encode("idna")  # raises for a label that none can have
        ):
            return value
    raise _expected("an address such as http://10.0.0.5:8080/xxl-job-admin", node)


def _urls(reader: _YamlReader, node: Node) -> tuple:
    # One text with commas is how the Java executor's xxl.job.admin.addresses is written, and what
    # ${NAME} can hold.
    if node.id == "scalar" and node.tag.endswith(":str"):
        parts = [
            reader.scalar(part.strip(), node) for part in node.value.split(",") if part.strip()
        ]
        return tuple(_url(reader, part).rstrip("/") for part in parts)
    return tuple(value.rstrip("/") for value in _list(_url)(reader, node))


def _bind(reader: _YamlReader, node: Node) -> tuple[str, int]:
    # a number too: it is meant as a port
    value = str(_scalar(node, "str", "int", expected="text"))
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*):(\d{1,5})", value, re.ASCII)
    if not match or int(match[2]) > 65_535:
        raise _expected('host:port such as "0.0.0.0:9999" or "[::]:9999"', node)
    host = match[1].strip("[]") or "0.0.0.0"
    with contextlib.suppress(ValueError, OSError):  # a name
        # "0" and "::0" are all addresses too
        numeric = re.fullmatch(r"0|[\d.]*\.[\d.]*", host)
        host = (
            socket.inet_ntoa(socket.inet_aton(host)) if numeric else str(ipaddress.ip_address(host))
        )
    try:
        host.encode("idna")
    except UnicodeError:
        raise _Bad(f"{host} is no name of a host", node) from None
    return host, int(match[2])


def _option(parse: Parse, default: str = "", *, raw: bool = False) -> typing.Any:
    """A key: its parser and its default as it would be written in YAML ("" means None). `raw`: no
    ${NAME} in it."""
    return dataclasses.field(
        default=None, metadata={"parse": parse, "default": default, "raw": raw}
    )


@dataclasses.dataclass(frozen=True)
class AdminConfig:
    addresses: tuple = _option(_urls, "[]")
    access_token: str = _option(_token)
    access_token_file: str = _option(_token_file)
    connect_timeout: float = _option(_positive_duration, "3s")
    timeout: float = _option(_positive_duration, "10s")


@dataclasses.dataclass(frozen=True)
class ExecutorConfig:
    app_name: str = _option(_header, "xxl-job-executor-sample")
    bind: tuple = _option(_bind, "0.0.0.0:9999")
    address: str = _option(_url)
    data_dir: str = _option(_data_dir, "${STATE_DIRECTORY:-./data}")
    max_running: int = _option(_whole(1, 1024), "32")
    max_queued: int = _option(_whole(1, 1_000_000), "10000")
    drain_timeout: float = _option(_duration, "30s")
    max_connections: int = _option(_whole(8, 100_000), "1024")
    log_limit: int = _option(_size, "64MiB")
    log_retention: float = _option(_retention, "30d")
    allow_no_token: bool = _option(_flag, "false")
    log_to_stdout: bool = _option(_flag, "false")
    log_format: str = _option(_choice("text", "json"), "text")
    watch_config: bool = _option(_flag, "false")


PLACEHOLDERS = ("param", "shard_index", "shard_total")  # of `command`


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """One entry of `jobs`; its keys are shown in both example files. Exactly one of `shell`,
    `command` and `python` is set; durations in seconds, 0: none."""

    name: str
    description: str = _option(_text)
    enabled: bool = _option(_flag, "true")
    shell: str = _option(_text, raw=True)  # the shell expands ${NAME} itself, when the job runs
    command: tuple = _option(_command)
    python: str = _option(_entry_point)
    isolation: str = _option(_choice("process", "thread"), "process")
    timeout: float = _option(_duration, "0")
    kill_grace: float = _option(_duration, "5s")
    cwd: str = _option(_path, ".")
    env: dict = _option(_variables, "{}")
    user: str = _option(_text)
    interpreter: str = _option(_program)
    pythonpath: tuple = _option(_list(_path), "[]")
    preload: tuple = _option(_list(_module), "[]")
    max_delay: float = _option(_duration, "0")
    queue_limit: int = _option(_whole(1, 1_000_000), "1000")
    on_crash: str = _option(_choice("fail", "rerun"), "fail")
    background: str = _option(_choice("kill", "keep"), "kill")

    def limit(self, trigger: Trigger) -> float:
        """Seconds that a run may take: the smaller of its own and the admin's, 0 for none."""
        return shortest(self.timeout, trigger.timeout)

    @property
    def what(self) -> str:
        """What the job runs, on one line."""
        return self.python or " ".join((self.shell or shlex.join(self.command)).split())


@dataclasses.dataclass(frozen=True)
class GlueConfig:
    template: JobConfig  # the keys of the jobs that scripts from the admin become
    enabled: bool = _option(_flag, "false")
    languages: tuple = _option(_list(_choice(*GLUE)), f"[{', '.join(GLUE)}]")
    timeout: float = _option(_duration, "0")


def head_of(file: str) -> bytes:
    """What a regular file begins with, a NUL for anything else, which does not hold this up. Raises
    OSError."""
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096) if stat.S_ISREG(os.fstat(fd).st_mode) else b"\0"
    finally:
        os.close(fd)


def unstartable(file: str) -> str:
    """Why the kernel would not start `file`, which may be executed; "" when it would, or when that
    cannot be told. What is no regular file, or becomes another one meanwhile, does not hold it up.
    """
    try:
        head = head_of(file)
    except OSError:
        return ""
    first = head.split(b"\n")[0]
    if b"\0" in head:  # a program, of this machine or of what binfmt_misc knows
        return ""
    if first.startswith(b"\xef\xbb\xbf#!"):
        remove = r"sed -i '1s/^\xef\xbb\xbf//'"
        return f"{file} has a byte order mark before its #! line: {remove} {shlex.quote(file)}"
    if not first.startswith(b"#!"):
        return f'{file} has no "#!" line: let it begin with #!/bin/sh or the like'
    words = first[2:].strip(b" \t").split(b" ")[0].split(b"\t")
    program = os.fsdecode(words[0])
    if program.endswith("\r"):
        return f"{file} has the line ends of Windows: dos2unix {shlex.quote(file)}"
    if not os.path.isabs(program) or os.path.exists(program):
        return ""
    return f"{file} begins with #!{printable(program)}: there is none"


def place_of(job: JobConfig, program: str) -> str:
    """The file that `program`, which has a slash, is for `job`."""
    return os.path.join(job.cwd, program.removeprefix("./"))


# interpreters, and their options that take no value: behind any other one it may be no script
_INTERPRETERS = (
    (r"(ba|da|z|k|a)?sh", r"-[euxvlfn]+"),
    (r"python[\d.]*", r"-[uBEsSIOqx]+"),
    (r"perl|ruby", r"-w"),
    (r"php|node", r"--"),
)


def script_problem(job: JobConfig) -> str:
    """Why the script that an interpreter is to run in `job.command` cannot run, "" when it can, or
    when that cannot be told."""
    program, *words = job.command
    name = os.path.basename(program)
    flags = next((flags for names, flags in _INTERPRETERS if re.fullmatch(names, name)), None)
    while flags and words and re.fullmatch(flags, words[0]):
        words.pop(0)
    if not flags or not words or words[0].startswith("-") or "{" in words[0]:
        return ""
    file = place_of(job, words[0])
    if not os.path.exists(file):
        path = job.env.get("PATH", os.environ.get("PATH", os.defpath))
        known = name == "node" or "/" not in words[0] and shutil.which(words[0], path=path)
        return "" if known else f"the script {file} does not exist"
    try:
        head = head_of(file)
    except OSError as error:
        return f"the script {file} cannot be read: {error.strerror}"
    if name.endswith("sh") and b"\r\n" in head:
        return f"{file} has the line ends of Windows: dos2unix {shlex.quote(file)}"
    return ""


@dataclasses.dataclass(frozen=True)
class ScriptsConfig:
    """Directories in which each executable file is a job by its name; looked up at the trigger, so
    that a new script needs no reload. What may read a directory may wait for its disk."""

    directories: tuple
    template: JobConfig  # the keys of all these jobs

    def job(self, name: str) -> JobConfig | None:
        """The job of this name, None when there is no such file. Raises Refused for a file that
        must not run."""
        if not name or name[0] == "." or set(name) & set("/{}\0"):
            return None
        for directory in self.directories:
            file = os.path.join(directory, name)
            if os.path.lexists(file):
                problem = self._unfit(directory, file)
                if problem:
                    raise Refused(f'script "{name}" is not run: {problem}', "script")
                command = (file, *(f"{{{word}}}" for word in PLACEHOLDERS))
                return dataclasses.replace(self.template, name=name, command=command)
        return None

    def look(self) -> tuple[dict[str, JobConfig], list[str]]:
        """({name: job} of all files, why others are no jobs)."""
        jobs: dict[str, JobConfig] = {}
        problems = []
        for directory in self.directories:
            try:
                with os.scandir(directory) as entries:  # what is below is nobody's job
                    places = [entry for entry in entries if not entry.is_dir(follow_symlinks=False)]
            except OSError as error:
                problems.append(f"{directory}: {error.strerror}")
                continue
            for name in sorted(entry.name for entry in places):
                try:
                    job = None if name in jobs else self.job(name)
                except Refused as error:
                    problems.append(str(error))
                    continue
                if job is not None:
                    jobs[name] = job
        return jobs, problems

    def _unfit(self, directory: str, file: str) -> str:
        """Why `file` must not run, "" when it may: whoever can write it, or put another one there,
        could do what these jobs can."""
        try:
            os.path.basename(file).encode()
        except UnicodeEncodeError:
            return "its name is not UTF-8, and that of a JobHandler is"
        trusted = {0, os.geteuid()}
        with contextlib.suppress(KeyError):
            trusted.add(pwd.getpwnam(self.template.user or "").pw_uid)
        try:
            for place in (directory, file):
                status = os.stat(place) if place is directory else os.lstat(place)
                if place is file and not stat.S_ISREG(status.st_mode):
                    return f"{file} is no regular file"
                if status.st_mode & 0o022:
                    return f"others may write {place}: chmod go-w {place}"
                if not os.geteuid() and status.st_uid not in trusted:
                    return f"{place} belongs to another user, who could change it: chown root"
            above = os.path.realpath(directory)
            while above != os.path.dirname(above):
                above = os.path.dirname(above)
                status = os.stat(above)
                moved = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
                if moved or not os.geteuid() and status.st_uid not in trusted:
                    return f"others may write {above} and so put another {directory} there"
        except OSError as error:
            return f"{file}: {error.strerror}"
        if not os.access(file, os.X_OK):
            return f"{file} is not executable: chmod +x {file}"
        return unstartable(file)


@dataclasses.dataclass(frozen=True)
class Config:
    file: str
    admin: AdminConfig
    executor: ExecutorConfig
    glue: GlueConfig
    scripts: ScriptsConfig
    jobs: dict[str, JobConfig]
    files: tuple = ()  # patterns of all that were read, or would be if they existed
    # where each key stands, such as {"jobs.hello.cwd": "config.yaml:14"}
    places: dict[str, str] = dataclasses.field(default_factory=dict)

    def job(self, name: str) -> JobConfig | None:
        """A job by its name, of `jobs` or a script; may wait for the disk of scripts. Raises
        Refused."""
        return self.jobs.get(name) or self.scripts.job(name)

    def told(self, key: str, text: str, *others: str) -> str:
        """`place: key: text`; the place is that of `key`, else of its parent, else of the first of
        `others` that is written somewhere, else the file."""
        keys = (key, key.rpartition(".")[0], *others)
        place = next((self.places[name] for name in keys if name in self.places), self.file)
        return f"{place}: {key}: {text}"


# --------------------------------------------------------------------------------------------------
# 2b reading the configuration
# --------------------------------------------------------------------------------------------------
_YAML_REMEDIES = (  # for what PyYAML says: the first that fits
    (r"'\\t'", "write spaces instead of tabs"),
    (r"end of stream|stream end", "close the quotes or brackets that are open here"),
    (
        r"mapping values|expected ':'",
        (
            'put a value with ": " in it into quotes or below a "|", or look for a missing colon or'
            " a wrong indent here or in the line above"
        ),
    ),
    (r"escape character", "take single quotes, in which a backslash is only a backslash"),
    (r"another document", 'remove the line "---"'),
    (
        r"<block end>",
        (
            "indent the lines of one level alike, and put a value with special characters into"
            ' quotes or below a "|"'
        ),
    ),
    (
        r"',' or '",
        "close the brackets that are open here, or put a value with special characters into quotes",
    ),
    (r"", 'put a value with special characters into quotes or below a "|"'),
)


def _not_yaml(problem: str) -> str:
    return (
        f"not YAML: {problem}:"
        f" {next(remedy for pattern, remedy in _YAML_REMEDIES if re.search(pattern, problem))}"
    )


_LARGEST = 16 << 20  # bytes


def read_config(file: str, errors: str = "strict") -> str:
    """Its text; of one that is larger than _LARGEST only the beginning, with "replace". Raises
    OSError, and UnicodeDecodeError, which has all of the file."""
    parts, size = [], 0
    with open(file, "rb") as stream:
        while size <= _LARGEST and (part := stream.read(1 << 16)):
            parts.append(part)
            size += len(part)
    if size > _LARGEST and errors == "strict":
        raise OSError(errno.EFBIG, "it is larger than 16 MiB")
    text = b"".join(parts).decode("utf-8", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _YamlReader:
    """Turns composed YAML nodes, which still know their file and line, into dataclasses, and
    collects every problem."""

    def __init__(self, file: str):
        import yaml

        self.file, self.yaml, self.resolver = file, yaml, yaml.resolver.Resolver()
        self.files = [glob.escape(file)]
        self.path = self.token = ""  # of the key that is being parsed; of the admin
        self._pairs: dict[
            int, tuple
        ] = {}  # id of a node: (the node, so that no other gets its id, its pairs)
        self._open: list = []  # nodes whose pairs are being looked up
        # of a default: it is asked for again by each job
        self._default = functools.lru_cache(None)(self.compose)
        self.problems: list[tuple[str, int, str]] = []
        self.places: dict[str, str] = {}  # of each key: file:line

    def place(self, path: str, node: Node) -> None:
        self.places[path] = f"{node.start_mark.name}:{node.start_mark.line + 1}"

    def problem(self, node: Node, text: str) -> None:
        self.problems.append((node.start_mark.name, node.start_mark.line + 1, text))

    def unknown(self, key: Node, path: str, known: typing.Iterable[str]) -> None:
        name = _OTHER_WORDS.get(key.value.lower(), "")
        hint = f', did you mean "{name}"?' if name in known else did_you_mean(key.value, known)
        self.problem(key, f"{path}: unknown key{hint or ', known keys: ' + ', '.join(known)}")

    def scalar(self, value: str, node: Node, tag: str = _STR, style: str | None = None) -> Node:
        """A value in the place of `node`."""
        return self.yaml.ScalarNode(tag, value, node.start_mark, node.end_mark, style=style)

    def compose(self, text: str, name: str) -> Node:
        """The root of a YAML text from the file `name`."""
        loader = self.yaml.SafeLoader(text)
        loader.name = name
        return loader.get_single_node()

    def document(self, file: str) -> Node:
        """The root mapping of `file`, or None after a problem."""
        try:
            text = read_config(file)
            root = self.compose(text, file)
        except OSError as error:
            self.problems.append(
                (file, 0, f"cannot be read: {error.strerror}: give a readable file with -c FILE")
            )
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            self.problems.append((file, line, "this is not UTF-8: save the file as UTF-8"))
        except self.yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            problem = (error.problem or "a mistake").removeprefix("but ")
            self.problems.append((file, mark.line + 1 if mark else 0, _not_yaml(problem)))
        except self.yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self.problems.append(
                (
                    file,
                    line,
                    f"not YAML: it holds the control character #x{error.character:04x}: remove it",
                )
            )
        except RecursionError:
            self.problems.append(
                (
                    file,
                    0,
                    "not YAML: it is nested too deeply: look for brackets that are never closed",
                )
            )
        else:
            if root is not None and root.id == "mapping":
                return root
            got = "an empty file" if root is None else str(_expected("", root)).partition("got ")[2]
            self.problems.append(
                (file, 1, f"expected a mapping with the keys admin, executor and jobs, got {got}")
            )
        return None

    def expand(self, node: Node) -> Node:
        """`node` with ${NAME} and ${NAME:-default} replaced; raises _Bad for one that is not set.
        $${ stands for ${."""
        if node.id != "scalar" or "${" not in node.value:
            return node

        def value(match: re.Match) -> str:
            if match[0].startswith("$$"):
                return "${"
            text = os.environ.get(match[1], "") or match[2]
            of_run = match[1] in _OF_RUN and self.path.endswith(".command")
            if of_run and match[1] not in os.environ:
                raise _Bad(
                    f"${{{match[1]}}} is known in the job only: write $${match[0][1:]}", node
                )
            if match[2] and "${" in match[2]:
                raise _Bad(f"{match[0]}...: a default cannot hold another ${{}}", node)
            if text is None:
                raise _Bad(
                    f"the environment variable {match[1]} is empty or not set: set it, or write"
                    f" ${{{match[1]}:-default}}",
                    node,
                )
            return text

        text = re.sub(r"\$\$\{|\$\{([^\W\d]\w*)(?::-([^}]*))?\}", value, node.value)
        # A plain ${NAME} takes the type of what it holds: a number where a number is expected.
        tag = (
            node.tag
            if node.style
            else self.resolver.resolve(self.yaml.ScalarNode, text, (True, False))
        )
        return self.scalar(text, node, tag, _EXPANDED)

    def pairs(self, node: Node, path: str = "") -> list:
        """The (key, value) nodes of a mapping, merge keys (<<) resolved as YAML says: own keys win,
        then the mapping that is named first. A duplicate key is a problem."""
        if id(node) in self._pairs:  # used again by an alias
            return self._pairs[id(node)][1]
        prefix = path + "." if path else ""
        first: dict[str, typing.Any] = {}  # the key as it stands first
        own: dict[str, tuple] = {}
        merged: dict[str, tuple] = {}
        self._open.append(node)
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for source in self._sources(key, value, prefix):
                    for name, pair in self.pairs(source, path):
                        merged.setdefault(name.value, (name, pair))
            elif key.id == "scalar" and encodable(key.value) != key.value:
                self.problem(
                    key,
                    f"{prefix}{encodable(key.value)}: holds half of a character: write all of it",
                )
            elif key.id != "scalar":
                self.problem(key, (path and path + ": ") + str(_expected("a name as key", key)))
            else:
                line = first.setdefault(key.value, key).start_mark.line + 1
                if key.value in own:
                    text = f"{prefix}{key.value}: duplicate key, first on line {line}: remove one"
                    self.problem(key, text)
                own[key.value] = key, value
        self._open.pop()
        self._pairs[id(node)] = node, list({**merged, **own}.values())
        return self._pairs[id(node)][1]

    def _sources(self, key: Node, value: Node, prefix: str) -> list:
        """The mappings that a merge key names; anything else there is a problem."""
        sources = []
        for source in value.value if value.id == "sequence" else [value]:
            if source.id != "mapping":
                expected = _expected("a mapping, or a list of mappings, to merge", source)
                self.problem(key, f"{prefix}<<: {expected}")
            elif source in self._open:
                self.problem(key, f"{prefix}<<: merges what it is a part of: remove it")
            else:
                sources.append(source)
        return sources

    def section(self, wanted: type, node: Node, path: str, **fixed: typing.Any) -> typing.Any:
        """An instance of the dataclass `wanted` from a mapping; a key that is absent or null has
        its default."""
        fields = {field.name: field for field in dataclasses.fields(wanted) if field.metadata}
        given = {}
        if not _absent(node) and node.id != "mapping":
            hint = ": write {shell: ...}" if wanted is JobConfig and node.id == "scalar" else ""
            self.problem(node, f"{path}: {_expected('a mapping', node)}{hint}")
        elif not _absent(node):
            for key, value in self.pairs(node, path):
                if key.value in fields:
                    given[key.value] = value
                    self.place(f"{path}.{key.value}", key)
                    continue
                self.unknown(key, f"{path}.{key.value}", fields)
        for name, field in fields.items():
            parse, default = field.metadata["parse"], field.metadata["default"]
            self.path = f"{path}.{name}"
            try:
                value = given.get(name)
                if value is not None and not field.metadata["raw"]:
                    value = self.expand(value)
                if _absent(value):
                    place = self.file if node is None else node.start_mark.name
                    value = self.expand(self._default(default, place)) if default else None
                fixed[name] = None if value is None else parse(self, value)
            except _Bad as error:
                self.problem(error.node, f"{path}.{name}: {error}")
        return wanted(**fixed)


_NOT_OF_SCRIPTS = (  # keys of a job that `scripts` does not take
    *("shell", "command", "python", "isolation", "interpreter", "pythonpath", "preload"),
    *("description", "enabled"),
)


def changeable(file: str) -> str:
    """What somebody beside root owns or can write of all that leads to `file`, links too, or what
    cannot be looked at; "" for nothing."""
    todo, place, links = os.path.abspath(file).split("/"), "/", 0
    while True:
        try:
            status = os.lstat(place)
            target = os.readlink(place) if stat.S_ISLNK(status.st_mode) else None
        except FileNotFoundError:  # who may write above could make it
            above = os.path.dirname(place)
            return above if os.lstat(above).st_mode & 0o022 else ""
        except (OSError, ValueError):
            return place
        # Of a file with an access list the bits of the group are what the list allows at most.
        writable = target is None and status.st_mode & 0o022
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        if status.st_uid or writable and not sticky or links > 40:
            return place
        if target is not None:
            links += 1
            todo = [*target.split("/"), *todo]
            place = "/" if target.startswith("/") else os.path.dirname(place)
        todo = list(itertools.dropwhile(lambda name: name in ("", "."), todo))
        if not todo:
            return ""
        name = todo.pop(0)
        place = os.path.dirname(place) if name == ".." else os.path.join(place, name)


def _foreign_interpreter(program: str) -> str:
    """What another user than root can change of an interpreter and what it starts with."""
    around = os.path.dirname(os.path.dirname(program))
    settings, bases = os.path.join(around, "pyvenv.cfg"), [around]
    with contextlib.suppress(OSError, ValueError), open(settings, encoding="utf-8") as stream:
        for line in stream:
            key, _, value = line.partition("=")
            if key.strip() == "home":
                bases.append(os.path.dirname(value.strip()))
    places = [program, settings]
    for base in bases:
        for name in ("python3*", "libpython3*"):
            places += glob.glob(os.path.join(glob.escape(base), "lib*", name))
    return next(filter(None, map(changeable, places)), "")


class _ConfigReader(_YamlReader):
    """Knows what a configuration holds."""

    def job(self, key: Node, node: Node) -> JobConfig | None:
        """One entry of `jobs`, None after a problem: which keys go together, and which have no
        effect with its kind, is checked here."""
        path, before = f"jobs.{key.value}", len(self.problems)
        job = self.section(JobConfig, node, path, name=key.value)
        if len(self.problems) > before:
            return None
        kinds = [kind for kind in ("shell", "command", "python") if getattr(job, kind)]
        if len(kinds) != 1:
            got = " and ".join(kinds) if kinds else "none"
            self.problem(
                key, f"{path}: expected exactly one of shell, command and python, got {got}"
            )
            return None
        given = {name.value: name for name, value in self.pairs(node) if not _absent(value)}
        for wrong, names, told in (
            (
                not job.python,
                ("interpreter", "pythonpath", "isolation", "preload"),
                "only a python job has it: remove it",
            ),
            (
                job.user,
                ("preload",),
                "with a user its modules would be imported as the executor's own user: remove one"
                " of them",
            ),
            (
                job.isolation == "thread",
                ("interpreter", "user", "cwd", "env", "background", "preload"),
                "has no effect with isolation: thread: remove it, or use process",
            ),
        ):
            for name in names:
                if wrong and name in given:
                    self.problem(given[name], f"{path}.{name}: {told}")
        if job.user not in (None, "", "root") and job.interpreter and not os.geteuid():
            program = os.path.abspath(shutil.which(job.interpreter) or job.interpreter)
            job = dataclasses.replace(job, interpreter=program)  # PATH is not searched again
            place = _foreign_interpreter(program)
            if place:
                self.problem(
                    given["interpreter"],
                    f"{path}.interpreter: root starts it before it becomes the user {job.user}, and"
                    f" others than root can change {place}: chown root, chmod go-w, or use command:"
                    " [interpreter, script]",
                )
                return None  # `check` would go on to start it
        return job

    def jobs(self, node: Node, defined: dict, where: dict) -> None:
        if _absent(node):
            return
        if node.id != "mapping":
            told = _expected("a mapping of job names", node)
            self.problem(node, f"jobs: {told}: write NAME: {{shell: ...}} for each job")
            return
        for key, value in self.pairs(node, "jobs"):
            if key.value in where:
                self.problem(
                    key,
                    f"jobs.{key.value}: defined twice, first at {where[key.value]}: rename or"
                    " remove one",
                )
                continue
            where[key.value] = f"{key.start_mark.name}:{key.start_mark.line + 1}"
            self.places[f"jobs.{key.value}"] = where[key.value]
            job = self.job(key, value)
            if job is not None:
                defined[job.name] = job

    def config(self) -> Config | None:
        root = self.document(self.file)
        if root is None:
            return None
        names = ("admin", "executor", "glue", "scripts", "include", "jobs")
        parts: dict[str, typing.Any] = dict.fromkeys(names)
        for key, value in self.pairs(root):
            if key.value in parts:
                parts[key.value] = value
                self.place(key.value, key)
            elif not key.value.startswith(
                "x-"
            ):  # x-...: a place for YAML anchors, as in Compose files
                self.unknown(key, key.value, parts)
        admin = self.section(AdminConfig, parts["admin"], "admin")
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        if credentials and not self.token and "admin.access_token_file" not in self.places:
            self._credential(self.scalar(os.path.join(credentials, "token"), root))
        admin = dataclasses.replace(admin, access_token=self.token)
        executor = self.section(ExecutorConfig, parts["executor"], "executor")
        template = self.section(JobConfig, None, "glue", name="")
        glue = self.section(GlueConfig, parts["glue"], "glue", template=template)
        scripts = self.scripts(parts["scripts"])
        jobs: dict[str, JobConfig] = {}
        where: dict[str, str] = {}
        self.jobs(parts["jobs"], jobs, where)
        self._include(parts["include"], jobs, where)
        files = tuple(self.files)
        return Config(self.file, admin, executor, glue, scripts, jobs, files, self.places)

    def scripts(self, node: Node) -> ScriptsConfig:
        """`directories`, and the keys of a job but its kind."""
        directories: tuple = ()
        rest = node
        if not _absent(node) and node.id == "mapping":
            others = []
            for key, value in self.pairs(node, "scripts"):
                if key.value in _NOT_OF_SCRIPTS:
                    self.problem(key, f"scripts.{key.value}: not for scripts: remove it")
                elif key.value != "directories":
                    others.append((key, value))
                else:
                    self.place("scripts.directories", key)
                    try:
                        directories = _list(_path)(self, value)
                    except _Bad as error:
                        self.problem(error.node, f"scripts.directories: {error}")
            rest = self.yaml.MappingNode(node.tag, others, node.start_mark, node.end_mark)
            if not directories:
                self.problem(node, "scripts.directories: expected a list such as [/opt/scripts]")
        return ScriptsConfig(directories, self.section(JobConfig, rest, "scripts", name=""))

    def _credential(self, node: Node) -> None:
        """The token that systemd passes (LoadCredential=token:...), when none is configured."""
        self.files.append(glob.escape(node.value))
        try:
            _token_file(self, node)
        except _Bad as error:
            if not isinstance(error.__context__, FileNotFoundError):
                self.problem(node, f"admin.access_token: {node.value}: {error}")

    def _refuse_hidden(self, pattern: str, item: Node) -> None:
        """A directory that cannot be listed looks to glob as if it were empty."""
        if glob.has_magic(os.path.basename(pattern)):
            directory = os.path.dirname(pattern)
            try:
                os.scandir(directory).close()
            except FileNotFoundError:  # it may come
                pass
            except OSError as error:
                self.problem(item, f"include: {directory} cannot be read: {error.strerror}")

    def _include(self, node: Node, jobs: dict, where: dict) -> None:
        if _absent(node):
            return
        try:
            patterns = _list(_path)(self, node)
        except _Bad as error:
            self.problem(error.node, f"include: {error}")
            return
        for pattern, item in zip(patterns, node.value):
            files = sorted(glob.glob(pattern))
            self._refuse_hidden(pattern, item)
            if not files and not glob.has_magic(pattern):
                self.problem(item, f"include: {item.value} does not exist: remove it, or write it")
            self.files.append(pattern)
            for file in files:
                if os.path.isdir(file):
                    self.problem(item, f"include: {file} is a directory: write {file}/*.yaml")
                    continue
                root = self.document(file)
                for key, value in self.pairs(root) if root is not None else ():
                    if key.value == "jobs":
                        self.jobs(value, jobs, where)
                    elif not key.value.startswith("x-"):
                        self.problem(
                            key,
                            f"{key.value}: an included file may hold only jobs: move it to"
                            f" {self.file}",
                        )


def find_config(file: str | None) -> str:
    """The configuration file: `file`, else $XXL_EXECUTOR_CONFIG, else the first of CONFIG_PLACES
    that exists."""
    file = file or os.environ.get("XXL_EXECUTOR_CONFIG")
    if file:
        return file
    for place in CONFIG_PLACES:
        if os.path.exists(place):
            other = changeable(place) if place.startswith("./") and not os.geteuid() else ""
            if other:
                raise ConfigError(
                    f"{place}: others than root can change {other}, and so what root runs: if that"
                    f" is meant, name it with -c {place}"
                )
            return place
    raise ConfigError(
        f"no configuration: none of {', '.join(CONFIG_PLACES)} exists: give one with -c FILE"
    )


def _wide_sign(lines: list[str], line: int, problem: str) -> str:
    """What to add to a problem that may come from one of _WIDE_SIGNS; `lines`: of its file."""
    if (
        not re.search("not YAML|unknown key|expected a mapping", problem)
        or "did you mean" in problem
    ):
        return ""
    for number in (line, line - 1):
        text = lines[number - 1] if 1 <= number <= len(lines) else ""
        # not in comments and quoted text
        odd = re.search(_WIDE, re.sub(r"(^|\s)#.*|\"[^\"]*\"|'[^']*'", "", text))
        if odd:
            what = "the full-width colon " if odd[0] == "\uff1a" else ""
            return f'; line {number} has {what}"{odd[0]}": write "{_WIDE_SIGNS[odd[0]]}"'
    return ""


def load_config(file: str) -> Config:
    """Read `file` and its includes. Raises ConfigError with every problem, sorted by file and
    line."""
    reader = _ConfigReader(file)
    config = reader.config()
    if reader.problems or config is None:

        @functools.lru_cache
        def lines_of(name: str) -> list[str]:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                return read_config(name).split("\n")
            return []

        lines = [
            f"{name}:{line}: {text}{_wide_sign(lines_of(name), line, text)}"
            if line
            else f"{name}: {text}"
            for name, line, text in sorted(set(reader.problems))
        ]
        error = ConfigError("\n".join(lines))
        error.files, error.config = tuple(reader.files), config
        raise error
    return config


def legible_data_dir(file: str) -> str:
    """executor.data_dir as a line of `file` says, be the rest no YAML; "" when nobody can tell."""
    reader = _ConfigReader(file)
    try:
        text = read_config(file, "replace")
        section = re.search(r"(?m)^executor:[ \t]*(?:#.*)?\n((?:(?:[ \t#].*)?\n)*)", text + "\n")
        lines = re.findall(r"(?m)^[ \t]+data_dir:(.*)$", section[1]) if section else []
        if "data_dir" in text and (not lines or lines[0].strip()[:1] in ("|", ">")):
            return ""
        given = lines[0] if lines else ""
        section = reader.compose(f"data_dir:{given}", file)
        config = reader.section(ExecutorConfig, section, "executor")
    except (OSError, RecursionError, reader.yaml.YAMLError):
        return ""
    return config.data_dir or ""


# --------------------------------------------------------------------------------------------------
# 2c warnings: what this host lacks, what does not fit together
# --------------------------------------------------------------------------------------------------
SOURCE_LIMIT = 1 << 20  # bytes; a longer module is not looked into
# Asks also the finders of what is installed as editable, which import nothing to tell where it is.
_ASK_INTERPRETER = """
import json, sys
print(list(sys.version_info[:2]))
others = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "PathFinder"]
found = []
for name in sys.argv[1:]:
    for finder in others:
        try:
            found += [name] if finder.find_spec(name, None) else []
        except Exception:
            pass
print(json.dumps(found))
print("\\n".join(filter(None, sys.path)))  # "" is of -c, where no job looks
"""


# What people copy behind the admin's address: its pages, and what an executor adds by itself.
_BEHIND_ADMIN = re.compile("/(api|toLogin|login|auth/login|jobinfo|joblog|jobgroup)$")


def _open_to_others(directory: str) -> str:
    """What everybody can change of a directory, or for root anybody else; "" for nothing, or when
    it is not there: the start makes it, or says why not."""
    try:
        status = os.stat(directory)
    except (OSError, ValueError):
        return ""
    if status.st_mode & 0o002:
        return directory
    return changeable(directory) if not os.geteuid() else ""


def _doubtful(config: Config) -> typing.Iterator[tuple[str, str]]:
    """(key, what is wrong with it), of keys that no job has"""
    for url in config.admin.addresses:
        page = _BEHIND_ADMIN.search(url)
        if page:
            told = f"{url} is asked at {url}/api/registry: should it end before {page[0]}?"
            yield "admin.addresses", told
    for pattern in config.files:
        if glob.has_magic(pattern) and not glob.glob(pattern):
            read = set(itertools.chain.from_iterable(map(glob.glob, config.files)))
            others = glob.glob(os.path.join(os.path.dirname(pattern), "*.y*ml"))
            for other in sorted({*others} - {*map(os.path.abspath, read)})[:1]:
                yield "include", f"{pattern} matches no file, and not {other}"
    encoding = sys.getfilesystemencoding()
    if encoding != "utf-8":
        told = f"arguments and names are {encoding} in this locale: start it with LANG=C.UTF-8"
        yield "executor", told
    place = config.executor.data_dir or ""
    if os.path.exists(place) and not os.path.isdir(place):
        yield "executor.data_dir", f"{place} is no directory: name another one"
    other = _open_to_others(place)
    if other:
        told = f"others can change {other}, and so results, logs and scripts of the admin"
        yield "executor.data_dir", f"{told}: chown, chmod go-w"


def _unlike_meant(job: JobConfig) -> typing.Iterator[tuple[str, str]]:
    """(key, what stands in `job` and means something else than it looks like), where there is no
    doubt"""
    for name, value in job.env.items():
        for word in re.findall(r"(?:^|:)\$([A-Za-z_]\w*)(?=[:/]|$)", value, re.ASCII):
            if word in os.environ:  # such as in PATH
                yield f"env.{name}", f"${word} stays as it is, did you mean ${{{word}}}?"
    shell = job.shell or ""
    quote = re.match("\\s*[\u201c\u2018]", shell)
    if quote:
        yield "shell", f"{quote[0].strip()} is no quote for the shell: write ' or \""
    found = re.search(r"(?m)(?:^|;|&&|\|\||\bif|\bwhile)[ \t]*(source|\[\[)[ \t]+[^\s,=(]", shell)
    # not in a text for another program
    doubtful = found and re.search(r"[\"'#`\\]|<<|\(\)|bash", shell[: found.end()])
    if found and not doubtful and os.path.basename(os.path.realpath("/bin/sh")) == "dash":
        told = f'/bin/sh has no "{found[1]}" here'
        remedy = 'write ". FILE"' if found[1] == "source" else "write [ ]"
        yield "shell", f"{told}: {remedy}, or command: [bash, -c, ...]"


class HostCheck:
    """Finds what a configuration names and this host lacks, before a run fails for it. Nothing of a
    job is run, and nothing of it is imported, but a job's interpreter tells where it looks for
    modules; any thread, it takes some ms for each job."""

    def __init__(self, config: Config, deep: bool = False):
        """`deep`: parse the modules of Python jobs too, which would hold up a daemon."""
        self._config, self._deep = config, deep
        self._environment = without_secrets()
        jobs = [job for job in config.jobs.values() if job.python]
        wanted = [module for job in jobs for module in (job.python.partition(":")[0], *job.preload)]
        self._tops = sorted({module.partition(".")[0] for module in wanted})
        # by (interpreter, user who starts it, "" for the executor's own): its path, what its
        # finders find beside it, why it runs no Python job
        self._asked: dict[tuple[str, str], tuple[list, list, str]] = {}
        self._asked[sys.executable, ""] = (sys.path, [], "")

    def warnings(self) -> list[str]:
        """One `file:line: key: problem` for each."""
        config, warnings = self._config, []
        scripts, problems = config.scripts.look()
        warnings += [config.told("scripts.directories", problem) for problem in problems]
        for name in sorted(scripts.keys() & config.jobs.keys()):
            told = f"the script {scripts[name].command[0]} has the same name and does not run"
            warnings.append(config.told(f"jobs.{name}", told))
        if not config.jobs and not scripts and not config.glue.enabled:
            warnings.append(config.told("jobs", "there are none: every trigger will be refused"))
        warnings += [config.told(key, text) for key, text in _doubtful(config)]
        for job in config.jobs.values():
            for key, text in self._job(job):
                if text:
                    warnings.append(config.told(f"jobs.{job.name}{key and '.'}{key}", text))
        return warnings

    def _job(self, job: JobConfig) -> typing.Iterator[tuple[str, str]]:
        """(key, what is wrong, "" for nothing)"""
        if not job.name.strip():
            yield "", "a job without a name: no trigger can call it"
        if not os.path.isdir(job.cwd):
            yield "cwd", f"the directory {job.cwd} does not exist"
        if job.user:
            try:
                other = pwd.getpwnam(job.user).pw_uid != os.geteuid()
            except KeyError:
                yield "user", f"there is no user {job.user} on this host"
            else:
                if other and os.geteuid():
                    yield "user", "only an executor that is root may become another user"
        yield from _unlike_meant(job)
        if job.command:
            yield from self._arguments(job)
        elif job.shell:
            # much too long, not for this locale, or a process too many: a run tells
            with contextlib.suppress(OSError, ValueError):
                checked = subprocess.run(
                    ["/bin/sh", "-n", "-c", job.shell],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    env=self._environment,
                )
                if checked.returncode > 0:  # else a signal ended it
                    told = checked.stderr.decode("utf-8", "replace").strip().partition("\n")[0]
                    yield "shell", printable(f"the shell cannot read it: {told}")
        else:
            yield from self._entry_point(job)

    def _arguments(self, job: JobConfig) -> typing.Iterator[tuple[str, str]]:
        if "{" not in job.command[0]:
            yield "command", self._no_program(job, job.command[0]) or script_problem(job)
        for name in re.findall(r"\{(\w+)\}", " ".join(job.command[1:])):
            near = difflib.get_close_matches(name, PLACEHOLDERS, 1, 0.7)
            if near and name not in PLACEHOLDERS:
                yield "command", f"{{{name}}} stays as it is, did you mean {{{near[0]}}}?"

    @staticmethod
    def _no_program(job: JobConfig, program: str) -> str:
        """Why `program` cannot be started, "" when it can."""
        if "/" not in program:
            path = job.env.get("PATH", os.environ.get("PATH", os.defpath))
            return "" if shutil.which(program, path=path) else f"{program} is not found in {path}"
        file = place_of(job, program)
        if not os.path.exists(file):
            return f"the program {file} does not exist"
        executable = os.path.isfile(file) and os.access(file, os.X_OK)
        if not executable:
            return f"{file} is not executable: chmod +x"
        return unstartable(file)

    def _entry_point(self, job: JobConfig) -> typing.Iterator[tuple[str, str]]:
        for place in job.pythonpath:
            if not os.path.exists(place):
                yield "pythonpath", f"{place} does not exist"
        interpreter = job.interpreter or sys.executable
        problem = self._no_program(job, job.interpreter) if job.interpreter else ""
        # What an interpreter of its own has installed is another user's to run.
        user = job.user if job.interpreter and not os.geteuid() else ""
        asked = interpreter, user or ""
        if not problem and asked not in self._asked:
            self._asked[asked] = self._ask(*asked)
        path, _, other = self._asked.get(asked, ([], [], ""))
        if problem or other:
            yield "interpreter", problem or other
            return
        path = [*job.pythonpath, job.cwd, *path]
        for module in job.preload:
            yield "preload", self._find(module, path, asked)[1]
        yield "python", self._no_function(job.python, path, asked)

    def _ask(self, interpreter: str, user: str) -> tuple[list[str], list[str], str]:
        """Its path, what its finders find beside it, why it runs no Python job."""
        as_user: dict[str, typing.Any] = {}
        try:
            if user:
                entry = pwd.getpwnam(user)
                groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
                as_user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}
            ran = subprocess.run(
                [interpreter, "-c", _ASK_INTERPRETER, *self._tops],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=10,
                cwd="/",
                env=self._environment,
                **as_user,
            )
            version, found, *path = os.fsdecode(ran.stdout).splitlines()
            old = tuple(json.loads(version)) < (3, 9)
            return path, json.loads(found), OLD_PYTHON.format(interpreter) if old else ""
        except KeyError:
            return [], [], f"there is no user {user} to start it as"
        except (OSError, ValueError, subprocess.TimeoutExpired):
            return [], [], f"{interpreter} is no Python that runs{user and ' as '}{user}"

    def _find(self, module: str, path: list[str], asked: tuple) -> tuple[typing.Any, str]:
        """(its spec, None when nobody knows; why it cannot be imported); `asked`: a key of
        `_asked`."""
        places: typing.Any = path
        finders: list = [importlib.machinery.PathFinder]
        if asked == (sys.executable, ""):  # what is installed as editable has a finder
            finders += sys.meta_path
        spec = None
        for name in itertools.accumulate(module.split("."), "{}.{}".format):
            if name in (*sys.builtin_module_names, "os.path"):
                return None, ""
            try:
                found = (finder.find_spec(name, places) for finder in finders)
                spec = next(filter(None, found), None)
            except Exception:  # a broken archive in the path
                return None, ""
            if spec is None and name.partition(".")[0] in self._asked[asked][1]:
                return None, ""
            if spec is None:
                where = "in pythonpath, cwd or the interpreter's own path"
                return None, f"there is no module {name} {where}"
            places = spec.submodule_search_locations or []
        return spec, ""

    def _no_function(self, entry_point: str, path: list[str], asked: tuple) -> str:
        """Why `module:function` cannot be called, "" when it can or nobody knows, as with the
        syntax of another interpreter; `asked`: a key of `_asked`."""
        module, _, function = entry_point.partition(":")
        spec, problem = self._find(module, path, asked)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            return problem
        try:
            with open(spec.origin, "rb") as stream:
                source = stream.read(SOURCE_LIMIT)
        except OSError:
            return ""
        if len(source) == SOURCE_LIMIT:
            return ""
        if not self._deep:
            defined = re.search(rb"\b%s\b|import \*|__getattr__" % function.encode(), source)
            return "" if defined else f"{spec.origin} has no function {function}"
        try:
            names = self._names(source)
        except SyntaxError as error:
            told = f"{spec.origin}:{error.lineno}: {error.msg}"
            return told if asked[0] == sys.executable else ""
        except (ValueError, RecursionError, MemoryError):  # nested too deeply to tell
            return ""
        if function in names or {"*", "__getattr__"} & names:
            return ""
        hint = did_you_mean(function, sorted(names))
        return f"{spec.origin} has no function {function}{hint}"

    @staticmethod
    def _names(source: bytes) -> set[str]:
        """What a module defines or imports, wherever it does."""
        names: set[str] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
        return names


# --------------------------------------------------------------------------------------------------
# 3 metrics
# --------------------------------------------------------------------------------------------------
_BUCKETS = (
    0.005,
    0.02,
    0.1,
    0.5,
    1,
    5,
    15,
    60,
    300,
    900,
    3600,
    14_400,
)  # seconds, of every histogram: a warm start to a nightly job
_METRICS = {  # name: (type, help, names of labels)
    "runs_total": ("counter", "Finished runs by JobHandler and result code.", "handler", "code"),
    "run_duration_seconds": ("histogram", "Duration of finished runs by JobHandler.", "handler"),
    "last_run_timestamp_seconds": (
        "gauge",
        "When a run of a JobHandler last ended, as far as this executor has seen one.",
        "handler",
    ),
    "last_success_timestamp_seconds": (
        "gauge",
        "When a run of a JobHandler last succeeded, as far as this executor has seen one.",
        "handler",
    ),
    "run_wait_seconds": (
        "histogram",
        "Time between the acceptance of a trigger and the start of its run.",
    ),
    "refused_triggers_total": ("counter", "Triggers answered with code 500, by reason.", "reason"),
    "callback_failures_total": ("counter", "Failed attempts to deliver results."),
    "results_resent_total": ("counter", "Acknowledged results that were sent once more."),
    "registration_failures_total": ("counter", "Failed heartbeats to the admin."),
    "log_dropped_bytes_total": (
        "counter",
        "Bytes of output beyond executor.log_limit or a full disk.",
    ),
    "running": ("gauge", "Runs in progress."),
    "queued": ("gauge", "Accepted runs that have not started."),
    "stuck_threads": ("gauge", "Runs in a thread that did not return after their cancellation."),
    "undelivered_results": ("gauge", "Results that the admin has not acknowledged."),
    "oldest_undelivered_seconds": ("gauge", "Age of the oldest of them, 0 when there is none."),
    "dead_results": ("gauge", f"Results that were given up after {DEAD_AFTER / 86_400:g} days."),
    "max_running": ("gauge", "Runs that may be in progress at once."),
    "config_last_reload_successful": (
        "gauge",
        "Whether the last reload worked, or none was asked.",
    ),
    "output_dropped_bytes_total": ("counter", "Bytes for stdout and stderr that nobody read."),
    "disk_full": ("gauge", "Whether triggers are refused and output dropped: the disk is full."),
    "connections": ("gauge", "Open HTTP connections."),
    "last_heartbeat_timestamp_seconds": ("gauge", "When the admin last acknowledged a heartbeat."),
}


class Metrics:
    """Counters, histograms and gauges in the Prometheus text format; any thread may call any
    method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # From the start, where no label is awaited: a rate counts from the 0 before the first
        # failure.
        self._values: dict[tuple, typing.Any] = {
            (name, ()): 0 if type_ == "counter" else [0] * (len(_BUCKETS) + 1) + [0.0]
            for name, (type_, _, *labels) in _METRICS.items()
            if type_ != "gauge" and not labels
        }
        # without labels; asked at each scrape
        self.gauges: dict[str, typing.Callable[[], float]] = {}

    def count(self, name: str, amount: float = 1, **labels: typing.Any) -> None:
        key = (name, tuple(labels.items()))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def set(self, name: str, value: float, **labels: typing.Any) -> None:
        """A gauge that keeps `value`."""
        with self._lock:
            self._values[name, tuple(labels.items())] = value

    def observe(self, name: str, value: float, **labels: typing.Any) -> None:
        with self._lock:
            key = (name, tuple(labels.items()))
            sums = self._values.get(key)
            if sums is None:
                sums = self._values[key] = [0] * (len(_BUCKETS) + 1) + [0.0]
            sums[bisect.bisect_left(_BUCKETS, value)] += 1
            sums[-1] += value

    def render(self) -> str:
        with self._lock:
            values = {
                key: list(value) if isinstance(value, list) else value
                for key, value in self._values.items()
            }
        values.update({(name, ()): value() for name, value in self.gauges.items()})
        lines = []
        for name, (type_, text, *_) in _METRICS.items():
            lines += [f"# HELP xxl_executor_{name} {text}", f"# TYPE xxl_executor_{name} {type_}"]
            for (owner, labels), value in values.items():
                if owner == name and type_ == "histogram":
                    lines += _histogram(f"xxl_executor_{name}", labels, value)
                elif owner == name:
                    lines.append(f"xxl_executor_{name}{_labels(labels)} {value}")
        lines += [
            "# HELP xxl_executor_build_info Version of the executor and its Python.",
            "# TYPE xxl_executor_build_info gauge",
            f'xxl_executor_build_info{{version="{__version__}",'
            f'python="{sys.version.split()[0]}"}} 1',
            *_process_metrics(),
            "",
        ]
        return "\n".join(lines)


def _labels(labels: typing.Iterable[tuple[str, typing.Any]]) -> str:
    shown = ",".join(
        '{}="{}"'.format(
            key, str(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        )
        for key, text in labels
    )
    return f"{{{shown}}}" if shown else ""


def _histogram(name: str, labels: tuple, value: list) -> list[str]:
    bounds = [*map(str, _BUCKETS), "+Inf"]
    counts = list(itertools.accumulate(value[: len(bounds)]))
    return [
        *(
            f"{name}_bucket{_labels([*labels, ('le', bound)])} {count}"
            for bound, count in zip(bounds, counts)
        ),
        f"{name}_sum{_labels(labels)} {value[-1]:.6f}",
        f"{name}_count{_labels(labels)} {counts[-1]}",
    ]


@functools.lru_cache(1)  # else it would change a little with each look, as if it had restarted
def _process_began() -> float:
    """When this process began, in seconds since the epoch. Raises OSError."""
    ticks = int(_read_proc("/proc/self/stat").rpartition(b") ")[2].split()[19])
    uptime = float(_read_proc("/proc/uptime").split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def _process_metrics() -> list[str]:
    """What every Prometheus client tells of its process, under the same names; see
    https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics"""
    used = resource.getrusage(resource.RUSAGE_SELF)
    metrics: list[tuple[str, str, str, float]] = [
        (
            "cpu_seconds_total",
            "counter",
            "User and system CPU time.",
            round(used.ru_utime + used.ru_stime, 3),
        )
    ]
    with contextlib.suppress(OSError, ValueError, IndexError):  # no descriptor free, no /proc
        fields = _read_proc("/proc/self/stat").rpartition(b") ")[2].split()
        resident = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        metrics += [
            (
                "start_time_seconds",
                "gauge",
                "Start of the process since the epoch.",
                round(_process_began(), 2),
            ),
            ("virtual_memory_bytes", "gauge", "Virtual memory size.", int(fields[20])),
            ("resident_memory_bytes", "gauge", "Resident memory size.", resident),
            ("open_fds", "gauge", "Open file descriptors.", len(os.listdir("/proc/self/fd"))),
        ]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    metrics.append(("max_fds", "gauge", "Maximum of open file descriptors.", most))
    return [
        line
        for name, type_, text, value in metrics
        for line in (
            f"# HELP process_{name} {text}",
            f"# TYPE process_{name} {type_}",
            f"process_{name} {value}",
        )
    ]


# --------------------------------------------------------------------------------------------------
# 4 HTTP server
# --------------------------------------------------------------------------------------------------
HEAD_LIMIT, BODY_LIMIT = 16 << 10, 5 << 20  # bytes
REQUEST_TIMEOUT = 10.0  # seconds for a request to arrive, or for an answer to move on
# seconds of idleness for who has shown the token: longer than any proxy keeps a connection (Envoy:
# 1 h)
IDLE_TIMEOUT = 3900.0
STRANGER_TIMEOUT = 15.0  # seconds of idleness for who has not shown the token
LINGER = 2.0  # seconds for the client to read why a connection ends
BACKLOG = 1024  # connections that wait to be accepted
ALIVE = 15.0  # seconds without a turn after which the selector counts as stuck
PATIENCE = 2.5  # seconds for the core to decide; the admin waits at least 3
POOL_THREADS = 4
SMALL_BODY = HEAD_LIMIT  # bytes; up to here a body needs no budget and the selector decodes it
BODY_BUDGET = PAGE_BUDGET = 64 << 20  # bytes of all bodies, and of all log pages, at a time
PAGE_COST = 9 << 20  # bytes; more than any answer to /log, see PAGE_LIMIT
_TURN = 1 << 16  # bytes that one connection may send or be sent before others get their turn
_JSON = "application/json;charset=UTF-8"
_CACHED_HEAD = 1024  # bytes; a client repeats its heads: what the last 256 short ones say is kept
_ALPHANUMERIC = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FIELD_NAME = b"!#$%&'*+-.^_`|~" + _ALPHANUMERIC
_FIELD_TEXT = b"\t" + bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100))
# RFC 3986, 2: what may stand in a path and a query; and a percent sign that encodes nothing
_TARGET = b"-._~!$&'()*+,;=/?:@%[]" + _ALPHANUMERIC
_BAD_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
# RFC 9110, 7.2, without a user; no two parts take the same character
_AUTHORITY = re.compile(
    rb"(\[[0-9A-Fa-f:.]+(%[0-9A-Za-z._~-]+)?\]|[A-Za-z0-9._~!$&'()*+;=%-]*)(:[0-9]{0,5})?"
)


def envelope(code: int, message: str | None = None, data: typing.Any = None) -> bytes:
    """The reply that every admin reads: the payload is `content` up to 3.2 and `data` from 3.3."""
    payload, text = (
        json.dumps(part, ensure_ascii=False).encode("utf-8", "replace")
        for part in (data, {"code": code, "msg": message})
    )
    return b"".join((text[:-1], b', "content": ', payload, b', "data": ', payload, b"}"))


def refusal(status: int, text: str) -> Reply:
    return Reply(status, _JSON, envelope(FAILURE, text))


_YES = Reply(200, _JSON, envelope(SUCCESS))


class HttpError(Exception):
    """A request that cannot be framed: `status` and a text for the client; the connection ends."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Head(typing.NamedTuple):
    """What the head of a request says."""

    method: str
    target: str  # in origin-form
    fields: dict[bytes, list[bytes]]  # by their names in lower case
    length: int  # of the body, in bytes
    expects: bool  # the client waits for "100 Continue"
    close: bool  # the client wants the connection to end with the answer
    old: bool  # HTTP/1.0


class _Parser(http.server.BaseHTTPRequestHandler):
    """http.server's reading of a head that is whole and well-formed; never touches a socket."""

    protocol_version = "HTTP/1.1"

    def __init__(self, head: bytes):
        self.rfile = io.BytesIO(head)
        self.raw_requestline = self.rfile.readline()
        self.parse_request()

    def handle_expect_100(self) -> bool:
        return True  # answered when the body is wanted

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        raise HttpError(int(code), message or self.responses[code][0])


def parse_head(head: bytes) -> Head:
    """Raises HttpError for all that RFC 9110 and 9112 forbid and that two servers could read
    differently. Takes time linear in the bytes: they come from anybody."""
    line, *lines = head[:-4].split(b"\r\n")
    if any(part.translate(None, _FIELD_TEXT) for part in (line, *lines)):
        raise HttpError(400, "the head holds a control character, or a line without CR LF")
    target = _request_target(line)
    fields: dict[bytes, list[bytes]] = {}
    for field in lines:
        name, colon, value = field.partition(b":")
        if not colon or not name or name.translate(None, _FIELD_NAME):
            raise HttpError(400, "a header line is not a name, a colon and a value")
        fields.setdefault(name.lower(), []).append(value.strip(b" \t"))
    parsed = _Parser(head)
    old = parsed.request_version == "HTTP/1.0"
    hosts = fields.get(b"host", [])
    if len(hosts) > 1 or not (hosts or old) or not all(map(_names_host, hosts)):
        raise HttpError(400, "expected one Host header that names a host")
    length = _body_length(fields, old)
    expectations = fields.get(b"expect", [])
    if any(expectation.lower() != b"100-continue" for expectation in expectations):
        raise HttpError(417, "the only expectation that can be met is 100-continue")
    expects = bool(expectations) and not old
    return Head(parsed.command, target, fields, length, expects, parsed.close_connection, old)


def _names_host(authority: bytes) -> bool:
    name = authority.rpartition(b"]")[2]  # without an IPv6 address, which may have a zone
    return bool(_AUTHORITY.fullmatch(authority)) and not _BAD_PERCENT.search(name)


def _request_target(line: bytes) -> str:
    """The target of a request line in origin-form. Raises HttpError."""
    words = line.split(b" ")
    if len(words) != 3 or not all(words) or words[0].translate(None, _FIELD_NAME):
        raise HttpError(400, 'the request line is not "METHOD target HTTP/1.1"')
    target, version = words[1:]
    if not re.fullmatch(rb"HTTP/[0-9]\.[0-9]", version):
        raise HttpError(400, "expected HTTP/1.1 at the end of the request line")
    if not version.startswith(b"HTTP/1."):
        raise HttpError(505, "expected HTTP/1.1")
    absolute = re.match(rb"(?i)https?://([^/?]*)", target)
    if absolute:
        if absolute[1][:1] in (b"", b":") or not _names_host(absolute[1]):
            raise HttpError(400, "the target names no host")
        target = target[absolute.end() :]
        target = target if target.startswith(b"/") else b"/" + target
    if not target.startswith(b"/"):
        raise HttpError(400, "the target is neither a path nor a URL")
    if target.translate(None, _TARGET) or _BAD_PERCENT.search(target):
        raise HttpError(400, "the target holds a character that no URL has")
    return target.decode()


def _body_length(fields: dict[bytes, list[bytes]], old: bool) -> int:
    lengths = fields.get(b"content-length", [])
    if b"transfer-encoding" in fields:
        if lengths:
            raise HttpError(400, "Content-Length and Transfer-Encoding exclude each other")
        if old:
            raise HttpError(400, "HTTP/1.0 has no Transfer-Encoding")
        raise HttpError(411, "send the body with a Content-Length, without Transfer-Encoding")
    if len(lengths) > 1 or any(not re.fullmatch(rb"[0-9]+", value) for value in lengths):
        raise HttpError(400, "Content-Length is not one whole number")
    digits = lengths[0].lstrip(b"0") if lengths else b""
    if len(digits) > 18 or int(digits or b"0") > BODY_LIMIT:
        raise HttpError(413, f"the body is longer than {BODY_LIMIT} bytes")
    return int(digits or b"0")


# tests/bench.py, beat: 0.3 times the requests without this cache, 0.85 without that of _http_date.
_known_head = functools.lru_cache(256)(parse_head)


@functools.lru_cache(2)
def _http_date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)


def render(reply: Reply, close: bool, head: Head | None = None) -> bytes:
    """The bytes of an answer, whose headers are the same for all; `head` is None for a request that
    could not be read."""
    reason = http.server.BaseHTTPRequestHandler.responses[http.HTTPStatus(reply.status)][0]
    connection = "close" if close else "keep-alive" if head is not None and head.old else ""
    text = (
        f"HTTP/1.1 {reply.status} {reason}\r\nDate: {_http_date(int(time.time()))}\r\n"
        f"Content-Type: {reply.content_type}\r\nContent-Length: {len(reply.body)}\r\n"
        + (f"Connection: {connection}\r\n" if connection else "")
        + "\r\n"
    )
    return text.encode() + (reply.body if head is None or head.method != "HEAD" else b"")


class Phase(enum.Enum):
    """What a connection waits for."""

    IDLE = "the first byte of a request"
    HEAD = "the rest of its head"
    BODY = "the rest of its body"
    WAITING = "its part of a budget"
    ANSWERING = "the core or a thread that makes the answer"
    SENDING = "the client to take the answer"
    LINGERING = "the client to close"
    CLOSED = "nothing"


class Connection:
    """A client socket and the bytes of its current exchange; owned by the selector
    thread; who answers reads `request`, and whether it is CLOSED."""

    __slots__ = (
        *("sock", "fd", "peer", "phase", "since", "deadline", "events", "trusted", "used"),
        *("buffer", "skipped", "head", "request", "ticket", "out", "sent", "close_after", "lent"),
    )

    def __init__(self, sock: socket.socket, peer: str):
        self.sock, self.fd, self.peer = sock, sock.fileno(), peer
        self.phase, self.since = Phase.IDLE, time.monotonic()
        self.deadline = self.since + STRANGER_TIMEOUT
        self.events = select.EPOLLIN
        self.trusted = self.used = False  # some request was, see Api.trusts; has had an answer
        self.buffer, self.skipped = bytearray(), 0  # blank lines before the request, in bytes
        self.head: Head | None = None
        self.request: Request | None = None
        self.ticket: Ticket | None = None
        self.out, self.sent, self.close_after = b"", 0, False
        self.lent: list[tuple[Budget, int]] = []

    def enter(self, phase: Phase, seconds: float) -> None:
        self.phase, self.since = phase, time.monotonic()
        self.deadline = self.since + seconds

    def unread(self) -> bool:
        """Whether something came that was not looked at yet, be it the end."""
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def take_head(self) -> bytes | None:
        """The next head in the buffer, None while it is not whole. Raises HttpError."""
        blank = len(self.buffer) - len(self.buffer.lstrip(b"\r\n"))
        blank -= blank % 2  # RFC 9112, 2.2: empty lines before a request are skipped
        if blank and self.buffer[:blank] != b"\r\n" * (blank // 2):
            raise HttpError(400, "a line ends without CR LF")
        del self.buffer[:blank]
        self.skipped += blank
        end = self.buffer.find(b"\r\n\r\n", 0, HEAD_LIMIT) + 4
        if end < 4:
            if len(self.buffer) + self.skipped >= HEAD_LIMIT:
                raise HttpError(431, f"the request head is longer than {HEAD_LIMIT} bytes")
            if self.buffer.count(b"\n") != self.buffer.count(b"\r\n"):
                raise HttpError(400, "a line ends without CR LF")
            return None
        head = bytes(self.buffer[:end])
        del self.buffer[:end]
        self.skipped = 0
        return head


class Budget:
    """Bytes that all connections share: who does not fit waits for its turn; selector thread."""

    def __init__(self, total: int):
        self._left = total
        self.waiting: collections.deque[tuple[Connection, int]] = collections.deque()

    def lend(self, connection: Connection, amount: int) -> bool:
        """Whether `connection` has got its part; else `served` names it later."""
        if self.waiting or amount > self._left:
            self.waiting.append((connection, amount))
            return False
        self.occupy(connection, amount)
        return True

    def occupy(self, connection: Connection, amount: int) -> None:
        """Count bytes that exist already, whether there is room or not."""
        self._left -= amount
        connection.lent.append((self, amount))

    def give_back(self, amount: int) -> None:
        self._left += amount

    def served(self) -> typing.Iterator[Connection]:
        """Those whose turn has come."""
        while self.waiting and self.waiting[0][1] <= self._left:
            connection, amount = self.waiting.popleft()
            if connection.phase is Phase.WAITING:
                self.occupy(connection, amount)
                yield connection


class Ticket:
    """The answer to one request, by whoever claims it first: who decides, once that is committed,
    or the selector when the client's patience ends. Any thread."""

    def __init__(self, connection: Connection, deliver: typing.Callable):
        self._connection, self._deliver = connection, deliver
        self._claims, self._claimed = itertools.count(), False

    def claim(self) -> bool:
        """Whether nobody else has claimed it."""
        self._claimed = True  # and next() gives 0 to one thread only
        return next(self._claims) == 0

    def claimed(self) -> bool:
        return self._claimed

    def give(self, reply: Reply) -> None:
        """After a claim."""
        self._deliver(self._connection, reply)


class Listener:
    """The listening socket in the selector; used by the selector thread.

    It pauses where accepting makes no sense: new connections then wait in the backlog, and no loop
    turns for nothing.
    """

    def __init__(self, sock: socket.socket, epoll: select.epoll):
        self._sock, self._epoll, self.fd = sock, epoll, sock.fileno()
        self.paused_until = 0.0  # monotonic
        self.closed = False
        sock.setblocking(False)

    def register(self) -> None:
        self._epoll.register(self.fd, select.EPOLLIN)

    def accept(self, room: int) -> typing.Iterator[tuple[socket.socket, str]]:
        """(socket, peer) of connections that wait, at most `room`; pauses when there are no
        descriptors for them."""
        for _ in range(min(room, 64)):  # then the open connections get their turn
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except ConnectionError:  # it left while it was waiting
                continue
            except OSError as error:  # out of descriptors or memory
                log.warning("cannot accept connections for a moment: %s", error)
                self.pause(0.5)
                return
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield sock, str(address[0]) if address else ""

    def pause(self, seconds: float) -> None:
        self.paused_until = time.monotonic() + seconds
        self._epoll.modify(self.fd, 0)

    def resume(self) -> None:
        if self.paused_until and not self.closed:
            self.paused_until = 0.0
            self._epoll.modify(self.fd, select.EPOLLIN)

    def close(self) -> None:
        self.paused_until, self.closed = 0.0, True
        self._epoll.unregister(self.fd)
        self._sock.close()


# --------------------------------------------------------------------------------------------------
# 4b connections
# --------------------------------------------------------------------------------------------------
class Connections:
    """Who is connected; the selector thread, which alone owns every connection (`connections`: any
    thread). At `max_connections` those who have not shown the token make room first, then the one
    that is idle the longest."""

    def __init__(self, listener: socket.socket, max_connections: int):
        self._limit = max_connections
        self._epoll = select.epoll()
        self._listener = Listener(listener, self._epoll)
        self._connections: dict[int, Connection] = {}
        self._abandoned = 0  # requests that wait for an answer although their client has gone
        self._closing, self._holding = threading.Event(), threading.Event()

    @property
    def connections(self) -> int:
        """How many are open; any thread."""
        return len(self._connections)

    def _leaving(self) -> bool:
        """Whether each connection is to end with its next answer."""
        return self._closing.is_set() or self._holding.is_set()

    def _guarded(
        self, step: typing.Callable, connection: Connection, *arguments: typing.Any
    ) -> None:
        """No failure of one connection may end the thread that serves them all."""
        try:
            step(connection, *arguments)
        except OSError:
            self._drop(connection)
        except Exception:
            log.exception(
                "HTTP connection from %s dropped: unexpected error, please report it",
                connection.peer,
            )
            self._drop(connection)

    def _accept(self) -> bool:
        """Accept those who wait, once there is room for them; whether somebody came."""
        room = self._limit - len(self._connections) - self._abandoned
        if room <= 0 and not self._make_room():
            self._listener.pause(0.2)  # or until one closes or gets idle
            return False
        before = len(self._connections)
        for sock, peer in self._listener.accept(max(1, room)):
            connection = Connection(sock, peer)
            self._connections[connection.fd] = connection
            self._guarded(self._register, connection)
        return len(self._connections) > before

    def _register(self, connection: Connection) -> None:
        self._epoll.register(connection.fd, connection.events)

    def _make_room(self) -> bool:
        """Close who is missed least: strangers, in whatever phase, then the longest idle; nobody
        with unread input, but for strangers who get their answer."""
        candidates = [
            connection
            for connection in self._connections.values()
            if connection.phase is Phase.IDLE or not connection.trusted
        ]
        candidates.sort(key=lambda connection: (connection.trusted, connection.since))
        made = 0
        for connection in candidates:
            if made and (connection.trusted or made >= max(4, self._limit // 64)):
                break  # several at once: in a crowd each new one would cost a search
            # Of strangers who ask on and on or take no answer something is always unread.
            if connection.phase in (Phase.ANSWERING, Phase.SENDING) or not connection.unread():
                self._drop(connection)
                made += 1
        return made > 0

    def _drop(self, connection: Connection) -> None:
        if connection.phase is Phase.CLOSED:
            return
        if connection.phase is Phase.ANSWERING:
            self._abandoned += 1
        connection.phase = Phase.CLOSED
        del self._connections[connection.fd]
        self._give_back(connection)
        with contextlib.suppress(OSError, ValueError):  # before closing: a child that is being
            self._epoll.unregister(connection.fd)  # started may hold the descriptor a moment longer
        connection.sock.close()
        connection.buffer, connection.out = bytearray(), b""
        if not self._leaving():
            self._listener.resume()

    @staticmethod
    def _give_back(connection: Connection) -> None:
        for budget, amount in connection.lent:
            budget.give_back(amount)
        connection.lent = []

    def _watch(self, connection: Connection, events: int) -> None:
        if connection.events != events:
            connection.events = events
            self._epoll.modify(connection.fd, events)


class Exchanges(Connections):
    """What goes over a connection: requests in, to whoever answers, answers out; the selector
    thread. The body of a stranger, who has not shown the token, is never kept.

    `api` has trusts(request), route(request) -> Route, answer(request, ticket) -> Reply, or None
    when the ticket will give it, and late(request) -> Reply, for a decision that has not come
    within PATIENCE. None of them may raise; only answer() for LONG, POOL and PAGE may wait.
    """

    def __init__(self, listener: socket.socket, api: typing.Any, max_connections: int):
        super().__init__(listener, max_connections)
        self._api = api
        self._pool: queue.SimpleQueue = queue.SimpleQueue()
        self._answered: collections.deque[tuple[Connection, Reply | None]] = collections.deque()
        self._bodies, self._pages = Budget(BODY_BUDGET), Budget(PAGE_BUDGET)
        self._unfinished: list[Connection] = []  # with requests that wait for their turn
        self._wake_up = WakeUp()

    def _on_event(self, connection: Connection, event: int) -> None:
        if connection.phase is Phase.SENDING and event & select.EPOLLOUT:
            self._send(connection)
            self._advance(connection)
        elif event & (select.EPOLLHUP | select.EPOLLERR):
            self._drop(connection)
        elif connection.phase in (Phase.ANSWERING, Phase.WAITING, Phase.SENDING):
            # The next request, or the end: after this one.
            self._watch(connection, select.EPOLLOUT if connection.phase is Phase.SENDING else 0)
        else:
            self._receive(connection)

    def _receive(self, connection: Connection) -> None:
        data = connection.sock.recv(_TURN if connection.phase is Phase.BODY else HEAD_LIMIT)
        if not data:
            self._drop(connection)
        elif connection.phase is not Phase.LINGERING:  # else: read and forget
            connection.buffer += data
            if connection.phase is Phase.IDLE:
                connection.enter(Phase.HEAD, REQUEST_TIMEOUT)
            self._advance(connection)

    def _advance(self, connection: Connection) -> None:
        """Take requests out of the buffer until one is not whole, or cannot be answered at once."""
        try:
            for _ in range(32):  # pipelined: then others get their turn
                if connection.phase is Phase.HEAD and not self._take_head(connection):
                    return
                if connection.phase is Phase.BODY and not self._take_body(connection):
                    return
                if connection.phase is not Phase.HEAD:
                    return
        except HttpError as error:
            self._fail(connection, error)
        else:
            self._watch(connection, 0)  # it has enough to say for now
            self._unfinished.append(connection)

    def _take_head(self, connection: Connection) -> bool:
        """Whether a head was whole; notes whether it is trusted. The body, its part of the budget
        or the answer is next."""
        data = connection.take_head()
        if data is None:
            self._watch(connection, select.EPOLLIN)
            if connection.trusted and not connection.buffer and connection.skipped <= 2:
                # One newline behind the last request, which some clients send, begins none.
                connection.enter(Phase.IDLE, IDLE_TIMEOUT)
            return False
        parse = _known_head if len(data) <= _CACHED_HEAD else parse_head
        head = connection.head = parse(data)
        request = connection.request = Request(
            head.method, head.target, head.fields, connection.peer
        )
        request.trusted = self._api.trusts(request)
        connection.trusted = connection.trusted or request.trusted
        if not request.trusted:
            missing = head.length - len(connection.buffer)
            del connection.buffer[: head.length]
            connection.close_after = missing > 0
            self._dispatch(connection)
        elif head.length <= SMALL_BODY or self._bodies.lend(connection, head.length):
            self._expect_body(connection)
        else:
            connection.phase = Phase.WAITING
        return True

    def _expect_body(self, connection: Connection) -> None:
        head = connection.head
        assert head is not None
        if connection.phase is Phase.WAITING:
            connection.enter(Phase.BODY, REQUEST_TIMEOUT)
        connection.phase = Phase.BODY  # the deadline stays that of its first byte
        if head.expects and head.length > len(connection.buffer):
            with contextlib.suppress(BlockingIOError):
                connection.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _take_body(self, connection: Connection) -> bool:
        head, request = connection.head, connection.request
        assert head is not None and request is not None
        if len(connection.buffer) < head.length:
            self._watch(connection, select.EPOLLIN)
            return False
        request.body = bytes(connection.buffer[: head.length])
        del connection.buffer[: head.length]
        self._dispatch(connection)
        return True

    def _go_on(self, connection: Connection) -> None:
        """It waited for its part of a budget and has it now."""
        if connection.lent[-1][0] is self._pages:
            self._hand_over(connection, Route.PAGE)
        else:
            self._expect_body(connection)
            self._advance(connection)

    def _dispatch(self, connection: Connection) -> None:
        """Answer a whole request here, or hand it over; 503 for a stranger while an eighth of
        max_connections waits for the pool."""
        assert connection.request is not None
        route = self._api.route(connection.request)
        if route is Route.DIRECT or route is Route.CORE:
            ticket = Ticket(connection, self._deliver)
            reply = self._api.answer(connection.request, ticket)
            if reply is not None:
                self._reply(connection, reply)
                return
            connection.ticket = ticket
            connection.enter(Phase.ANSWERING, PATIENCE)
        elif not connection.request.trusted and self._pool.qsize() >= self._limit // 8:
            self._reply(connection, refusal(503, "too many ask at once"))
        elif route is Route.PAGE and not self._pages.lend(connection, PAGE_COST):
            connection.phase = Phase.WAITING
        else:
            self._hand_over(connection, route)

    def _hand_over(self, connection: Connection, route: Route) -> None:
        long = route is Route.LONG
        connection.ticket = Ticket(connection, self._deliver) if long else None
        connection.enter(Phase.ANSWERING, PATIENCE if long else float("inf"))
        self._pool.put((connection, connection.request, connection.ticket))

    def _fail(self, connection: Connection, error: HttpError) -> None:
        connection.head, connection.close_after = None, True
        self._reply(connection, refusal(error.status, str(error)))

    def _reply(self, connection: Connection, reply: Reply) -> None:
        connection.enter(Phase.SENDING, REQUEST_TIMEOUT)
        head = connection.head
        if head is not None and head.close or self._leaving():
            connection.close_after = True
        connection.out, connection.sent = render(reply, connection.close_after, head), 0
        connection.head = connection.request = connection.ticket = None
        self._give_back(connection)
        if len(connection.out) > SMALL_BODY:  # what exists is counted without waiting
            self._pages.occupy(connection, len(connection.out))
        self._send(connection)

    def _reply_and_go_on(self, connection: Connection, reply: Reply) -> None:
        self._reply(connection, reply)
        self._advance(connection)

    def _send(self, connection: Connection) -> None:
        with contextlib.suppress(BlockingIOError):
            view = memoryview(connection.out)[connection.sent : connection.sent + 4 * _TURN]
            connection.sent += connection.sock.send(view)
            connection.deadline = time.monotonic() + REQUEST_TIMEOUT
        if connection.sent < len(connection.out):
            self._watch(connection, select.EPOLLOUT)
            return
        connection.out, connection.used = b"", True
        self._give_back(connection)
        if connection.close_after or (self._leaving() and not connection.buffer):
            # Closing with unread input would reset the connection and take the answer with it.
            connection.sock.shutdown(socket.SHUT_WR)
            connection.buffer.clear()
            connection.enter(Phase.LINGERING, LINGER)
        elif connection.buffer:  # pipelined
            connection.enter(Phase.HEAD, REQUEST_TIMEOUT)
            return
        else:
            seconds = IDLE_TIMEOUT if connection.trusted else STRANGER_TIMEOUT
            connection.enter(Phase.IDLE, seconds)
            if len(self._connections) >= self._limit and not self._leaving():
                self._listener.resume()
        self._watch(connection, select.EPOLLIN)

    def _deliver(self, connection: Connection, reply: Reply | None) -> None:
        """Any thread."""
        self._answered.append((connection, reply))
        self._wake_up.wake()


class HttpServer(Exchanges):
    """Receives whole requests in one selector thread.

    No connection holds a thread unless its request is complete, and no slow reader holds one
    either. What needs no decision and no file is answered by the selector itself; a decision
    becomes a message to the core; what may read a file goes to a small pool, see Route.
    """

    def __init__(self, listener: socket.socket, api: typing.Any, max_connections: int):
        super().__init__(listener, api, max_connections)
        self._quiet = threading.Event()  # while held: all that had begun is answered
        self._held, self._stop_at = False, float("inf")
        self._ticked = time.monotonic()
        self._selector = threading.Thread(target=self._loop, name="http-selector", daemon=True)
        self._workers = [
            threading.Thread(target=self._serve, name=f"http-{i}", daemon=True)
            for i in range(POOL_THREADS)
        ]

    def start(self) -> None:
        self._epoll.register(self._wake_up.fd, select.EPOLLIN)
        self._listener.register()
        for thread in (self._selector, *self._workers):
            thread.start()

    def alive(self) -> bool:
        """Whether the selector turns."""
        return time.monotonic() < self._ticked + ALIVE

    def hold(self, seconds: float) -> None:
        """Take no new connection and no further request of an old one until `release`; returns when
        what had begun to come is answered, after `seconds` at the latest; main thread."""
        self._holding.set()
        self._wake_up.wake()
        self._quiet.wait(seconds)

    def release(self) -> None:
        self._holding.clear()
        self._wake_up.wake()

    def close(self, timeout: float = 3.0) -> None:
        """Accept nobody more, answer who has connected, close all, within `timeout` seconds; main
        thread."""
        self._closing.set()
        self._wake_up.wake()
        deadline = time.monotonic() + timeout
        self._selector.join(timeout)
        for _ in self._workers:
            self._pool.put(None)
        for thread in self._workers:
            thread.join(max(0.0, deadline - time.monotonic()))
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._epoll.close()
        # One that still works would wake whoever has the descriptor by then.
        if not any(thread.is_alive() for thread in self._workers):
            self._wake_up.close()

    def _serve(self) -> None:
        share_cpu()
        for connection, request, ticket in iter(self._pool.get, None):
            reply: Reply | None = None
            try:
                # The client has gone: only a trigger or a kill, with a ticket, is still done.
                if connection.phase is not Phase.CLOSED or ticket is not None:
                    reply = self._api.answer(request, ticket)
                    if reply is None:
                        continue
            except Exception as error:
                log.exception("a request failed unexpectedly, please report it")
                reply = refusal(500, f"the executor failed: {type(error).__name__}: {error}")
            if ticket is None or ticket.claim():
                self._deliver(connection, reply)

    # -- the selector thread

    def _loop(self) -> None:
        share_cpu()
        sweep = 0.0
        while time.monotonic() < self._stop_at and (self._connections or not self._listener.closed):
            now = self._ticked = time.monotonic()
            if self._held and all(c.phase is Phase.LINGERING for c in self._connections.values()):
                self._quiet.set()
            if now >= sweep:
                sweep = self._sweep(now)
            limits = [sweep, self._stop_at, self._listener.paused_until or sweep]
            wait = 0.0 if self._unfinished else max(0.0, min(limits) - now + 0.001)
            # Looked up before any is closed: a new connection may get its descriptor.
            events = [
                (fd, event, self._connections.get(fd)) for fd, event in self._epoll.poll(wait)
            ]
            if time.monotonic() >= self._listener.paused_until:
                self._listener.resume()
            unfinished, self._unfinished = self._unfinished, []
            for waiting in unfinished:
                self._guarded(self._advance, waiting)
            for fd, event, connection in events:
                self._take_event(fd, event, connection)
            for budget in (self._bodies, self._pages):
                for waiting in budget.served():
                    self._guarded(self._go_on, waiting)
            sweep = min(sweep, time.monotonic() + LINGER)  # the shortest deadline of this turn

    def _take_event(self, fd: int, event: int, connection: Connection | None) -> None:
        if connection is not None:
            if connection.phase is not Phase.CLOSED:
                self._guarded(self._on_event, connection, event)
        elif fd == self._wake_up.fd:
            self._woken()
        elif fd == self._listener.fd and not (self._held or self._listener.closed):
            self._accept()

    def _woken(self) -> None:
        self._wake_up.clear()
        self._take_answers()
        if self._closing.is_set() and not self._listener.closed:
            for _ in range(BACKLOG // 64):  # who waits there has connected
                if self._held or not self._accept():
                    break
            self._listener.close()
            self._stop_at = time.monotonic() + LINGER
        if self._held != self._holding.is_set() and not self._listener.closed:
            self._held = not self._held
            if self._held:
                self._listener.pause(float("inf"))
            else:
                self._listener.resume()
        if self._leaving():
            for connection in list(self._connections.values()):
                # While held a client that has not sent anything yet may still do so.
                may_begin = self._held and not self._closing.is_set() and not connection.used
                waits = connection.phase is Phase.IDLE and not may_begin
                if waits and not connection.unread():
                    self._drop(connection)

    def _take_answers(self) -> None:
        while self._answered:
            connection, reply = self._answered.popleft()
            if connection.phase is Phase.ANSWERING:
                self._guarded(self._reply_and_go_on, connection, reply)
            else:  # it was dropped meanwhile
                self._abandoned -= 1

    def _sweep(self, now: float) -> float:
        """Close what is past its deadline; returns when to look again."""
        soonest = now + REQUEST_TIMEOUT
        hurry = REQUEST_TIMEOUT - LINGER if self._pages.waiting else 0.0  # else others would wait
        for connection in list(self._connections.values()):
            if connection.phase is Phase.WAITING:
                continue
            deadline = connection.deadline
            if connection.phase is Phase.SENDING:
                deadline -= hurry
            if deadline > now:
                soonest = min(soonest, deadline)
            elif connection.phase is Phase.ANSWERING:
                self._guarded(self._end_patience, connection)
            elif connection.phase in (Phase.HEAD, Phase.BODY):
                late = HttpError(408, "the request did not arrive in time")
                self._guarded(self._fail, connection, late)
            else:
                self._drop(connection)
        return max(soonest, now + 0.05)

    def _end_patience(self, connection: Connection) -> None:
        """The core is late: answer for it. It finds the ticket claimed, and accepts nothing."""
        self._take_answers()
        if connection.phase is not Phase.ANSWERING:
            return
        connection.deadline = float("inf")
        if connection.ticket is not None and connection.ticket.claim():
            self._reply_and_go_on(connection, self._api.late(connection.request))


# --------------------------------------------------------------------------------------------------
# 5 executor API
# --------------------------------------------------------------------------------------------------
def whole(value: typing.Any, name: str) -> int:
    """`value` as an int64. Gson writes whole numbers, or text for a long; int() would also take
    "1_0", " 7 " and "٣"."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= 1 << 53:
        value = int(value)
    if type(value) is not int or value not in INT64:  # bool is another type
        raise Refused(f"{name}: expected a whole number of 64 bits, got {json.dumps(value)[:100]}")
    return value


def decode(body: bytes) -> dict:
    """The JSON object of a request; raises Refused."""
    try:
        fields = json.loads(body.decode("utf-8"))
    except RecursionError:
        raise Refused("the body is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"the body is not JSON: {error}") from None
    except ValueError:  # CPython converts at most 4,300 digits
        raise Refused("the body holds a number of too many digits") from None
    if not isinstance(fields, dict):
        raise Refused(f"expected a JSON object, got {json.dumps(fields)[:100]}")
    return fields


def number_of(fields: dict, name: str, default: int | None = None) -> int:
    """A whole number; one that is missing or null is `default`, and without a default refused.
    Raises Refused."""
    value = fields.get(name)
    if value is None:
        if default is None:
            raise Refused(f"{name}: missing, expected a whole number")
        return default
    return whole(value, name)


def text_of(fields: dict, name: str) -> str:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise Refused(f"{name}: expected text, got {json.dumps(value)[:100]}")
    return value or ""


def log_date(fields: dict) -> int:
    """The trigger's own time in ms, under both spellings (logDateTime in 3.5's log request,
    logDateTim before)."""
    return number_of(
        fields, "logDateTim" if fields.get("logDateTim") is not None else "logDateTime", 0
    )


def decode_trigger(fields: dict) -> Trigger:
    return Trigger(
        job_id=number_of(fields, "jobId"),
        log_id=number_of(fields, "logId"),
        handler=text_of(fields, "executorHandler"),
        param=text_of(fields, "executorParams"),
        block_strategy=text_of(fields, "executorBlockStrategy"),
        timeout=max(0, number_of(fields, "executorTimeout", 0)),
        log_date_time=log_date(fields),
        glue_type=text_of(fields, "glueType") or "BEAN",
        glue_updated=number_of(fields, "glueUpdatetime", 0),
        shard_index=number_of(fields, "broadcastIndex", 0),
        shard_total=number_of(fields, "broadcastTotal", 1),
    )


def find_job(config: Config, handler: str) -> JobConfig:
    """What runs a trigger of `handler`. Raises Refused."""
    job = config.job(handler)
    if job is None:
        name = handler[:100]  # whatever a request holds, the answer and the log stay short
        here = f": add it under jobs in {config.file}"
        hint = did_you_mean(name, config.jobs) or here
        raise Refused(f'job handler "{name}" not found{hint}', "unknown_handler")
    if not job.enabled:
        raise Refused(
            f'job handler "{job.name}" is disabled: jobs.{job.name}.enabled is false in'
            f" {config.file}",
            "disabled",
        )
    return job


class Complaints:
    """Warnings about what anybody may send: one line a second for each reason, and how many were
    not shown; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[str, tuple[float, int]] = {}  # reason: (when, monotonic; not shown since)

    def tell(self, reason: str, text: str) -> None:
        now = time.monotonic()
        with self._lock:
            when, hidden = self._told.get(reason, (float("-inf"), 0))
            shown = now >= when + 1.0
            self._told[reason] = (now, 0) if shown else (when, hidden + 1)
        if shown:
            more = f" (and {hidden} more that were not shown)" if hidden else ""
            log.warning("%.500s%s", text, more)


class Answer:
    """How the core answers a trigger or a kill; `refused(error)` is told when it says no."""

    def __init__(
        self,
        ticket: typing.Any,
        refused: typing.Callable[[Refused], None] = lambda error: None,
    ):
        self._ticket, self._refused = ticket, refused
        self.claim, self.claimed = ticket.claim, ticket.claimed

    def give(self, outcome: Refused | str | None) -> None:
        """After a claim: yes, yes with a text, or no."""
        if isinstance(outcome, Refused):
            self._refused(outcome)
            self._ticket.give(refusal(200, str(outcome)))
        else:
            self._ticket.give(Reply(200, _JSON, envelope(SUCCESS, outcome)) if outcome else _YES)


def authorize(request: Request, app_name: str) -> None:
    """Raises Refused for who has not shown the token or means another executor."""
    if not request.trusted:
        raise Refused(
            "The access token is wrong: give admin and executor the same xxl.job.accessToken /"
            " admin.access_token.",
            "token",
        )
    for name in request.fields.get(b"xxl-job-appname", []):
        if name != app_name.encode():
            meant = name[:100].decode("latin-1")
            raise Refused(
                f"this executor is {app_name}, not {meant}: check its address in the admin",
                "app_name",
            )


class Api:
    """Answers every request, by the tables `_post` and `_get` of its paths; `route` says in which
    thread."""

    def __init__(
        self,
        config: Config,
        core: typing.Any,
        logs: typing.Any,
        scripts: typing.Any,
        metrics: Metrics,
        status: typing.Callable[[], dict],
        learned_path: typing.Callable[[str], None],
        status_key: str = "",
    ):
        """`status_key`: who shows it may ask for /status without the token."""
        self.config = config  # replaced as a whole by a reload
        self._status_key = status_key
        self._core, self._logs, self._scripts = core, logs, scripts
        self._metrics, self._status, self._learned = metrics, status, learned_path
        self.draining = False
        self._complaints = Complaints()
        self._prefix = urllib.parse.urlsplit(config.executor.address or "").path.rstrip("/")
        self._post: dict[str, typing.Any] = {
            "/beat": self._beat,
            "/idleBeat": self._idle_beat,
            "/run": self._run,
            "/trigger": self._run,
            "/kill": self._kill,
            "/log": self._log,
        }
        self._get = {
            "/health": self._health,
            "/metrics": self._show_metrics,
            "/status": self._show_status,
        }

    def trusts(self, request: Request) -> bool:
        """Whether it has shown the token, for /status its key, or none is needed; a web page in
        somebody's browser, which says so by Origin, is never trusted."""
        token = self.config.admin.access_token
        given = request.fields.get(b"xxl-job-access-token", [])
        if b"origin" in request.fields:
            return False
        if not token:
            return True
        if self._status_key and self._path(request) == "/status" and not given:
            given = request.fields.get(b"authorization", [])
            token = f"Bearer {self._status_key}"
        return len(given) == 1 and hmac.compare_digest(given[0], token.encode())

    def route(self, request: Request) -> Route:
        path = self._path(request)
        if path == "/metrics" or path == "/status" and request.trusted:
            return Route.POOL
        if path not in self._post or path == "/beat" or not request.trusted:
            return Route.DIRECT
        if path == "/log":
            return Route.PAGE
        # A long body takes a while to decode, and a script is written to the disk first.
        if (
            len(request.body) > SMALL_BODY
            or b"GLUE" in request.body
            or self._may_wait_for_disk(path, request)
        ):
            return Route.POOL if path == "/idleBeat" else Route.LONG
        return Route.DIRECT if path == "/idleBeat" else Route.CORE

    def _may_wait_for_disk(self, path: str, request: Request) -> bool:
        """Whether a script may have to be looked up, on a disk that may not answer."""
        if not self.config.scripts.directories or path not in ("/run", "/trigger"):
            return False
        try:
            return text_of(decode(request.body), "executorHandler") not in self.config.jobs
        except Refused:  # whoever decodes it again will tell
            return False

    def _path(self, request: Request) -> str:
        """Without the prefix of the advertised address."""
        if self._prefix and request.path.startswith(self._prefix + "/"):
            return request.path[len(self._prefix) :]
        return request.path

    def answer(self, request: Request, ticket: typing.Any) -> Reply | None:
        """None: `ticket` gives the answer when it is decided."""
        path, method = self._path(request), request.method
        if b"origin" in request.fields:
            self._complaints.tell("origin", f"refused a web page's request from {request.peer}")
            return refusal(403, "requests of web pages (with an Origin) are not answered")
        if path in self._post:
            if method != "POST":
                return refusal(405, f"{path} takes POST, not {method}")
            return self._answer_post(path, request, ticket)
        if path in self._get:
            if method not in ("GET", "HEAD"):
                return refusal(405, f"{path} takes GET, not {method}")
            try:
                return self._get[path](request)
            except Refused as error:
                return refusal(403, str(error))
            except JournalError as error:
                return refusal(503, str(error))
        known = ", ".join([*self._post, *self._get])
        return refusal(404, f"no such path; this is an XXL-JOB executor: {known}")

    def _answer_post(self, path: str, request: Request, ticket: typing.Any) -> Reply | None:
        """Always HTTP 200: the admin shows nothing of another status."""
        try:
            authorize(request, self.config.executor.app_name)
            return self._post[path](request, ticket)
        except Refused as error:
            if path in ("/run", "/trigger"):
                self._tell_refused(error, f"from {request.peer}")
            return refusal(200, str(error))
        except Exception as error:
            log.exception("%s failed unexpectedly, please report it", path)
            return refusal(200, f"the executor failed: {type(error).__name__}: {error}")

    def _tell_refused(self, error: Refused, which: typing.Any) -> None:
        self._metrics.count("refused_triggers_total", reason=error.reason)
        self._complaints.tell(error.reason, f"refused a trigger: {str(error)[:350]} ({which})")

    def late(self, request: Request) -> Reply:
        """The answer to a decision that has not been stored in time."""
        error = Refused(
            f"the executor could not store this within {seconds_text(PATIENCE)}: its disk is too"
            " slow",
            "slow",
        )
        if self._path(request) != "/kill":
            self._tell_refused(error, f"from {request.peer}")
        return refusal(200, str(error))

    def _beat(self, request: Request, ticket: typing.Any) -> Reply:
        if self.draining:
            raise Refused("the executor is stopping")
        return _YES

    def _idle_beat(self, request: Request, ticket: typing.Any) -> Reply:
        if self._core.busy(number_of(decode(request.body), "jobId")):
            # the Java executor's words
            raise Refused("job thread is running or has trigger queue.")
        return self._beat(request, ticket)

    def _run(self, request: Request, ticket: typing.Any) -> None:
        if self._core.overloaded():
            raise Refused("more triggers wait to be stored than executor.max_queued", "max_queued")
        fields = decode(request.body)
        trigger = decode_trigger(fields)
        self._learned(self._path(request))
        job: JobConfig | Refused
        try:
            if trigger.glue_type == "BEAN":
                job = find_job(self.config, trigger.handler)
            else:
                trigger = dataclasses.replace(trigger, handler=f"glue-{trigger.job_id}")
                job = self._script(trigger, fields, request)
        except Refused as error:  # unless the core knows the trigger already
            job = error
        refused = functools.partial(self._tell_refused, which=trigger)
        self._core.put(Submit(trigger, job, Answer(ticket, refused)))

    def _script(self, trigger: Trigger, fields: dict, request: Request) -> JobConfig:
        """What runs the script of `trigger`, once that is stored. Raises Refused."""
        job = self._scripts.job(trigger)
        if b"GLUE" not in request.body:  # it would be stored by the selector, see route()
            raise Refused("glueType: expected plain text, without escapes", "glue")
        if not self._core.accepted(trigger.log_id):  # else its script is there already
            self._scripts.store(trigger, text_of(fields, "glueSource"), request.peer)
        return job

    def _kill(self, request: Request, ticket: typing.Any) -> None:
        self._core.put(Kill(number_of(decode(request.body), "jobId"), Answer(ticket)))

    def _log(self, request: Request, ticket: typing.Any) -> Reply:
        fields = decode(request.body)
        log_id = number_of(fields, "logId")
        page = self._logs.page(
            log_id,
            log_date(fields),
            number_of(fields, "fromLineNum", 1),
            ended=not self._core.knows(log_id),
        )
        return Reply(200, _JSON, envelope(SUCCESS, None, page))

    def _health(self, request: Request) -> Reply:
        return refusal(503, "stopping") if self.draining else _YES

    def _show_metrics(self, request: Request) -> Reply:
        content_type = "text/plain; version=0.0.4; charset=utf-8"
        return Reply(200, content_type, self._metrics.render().encode("utf-8", "replace"))

    def _show_status(self, request: Request) -> Reply:
        authorize(request, self.config.executor.app_name)
        shown = json.dumps(self._status(), ensure_ascii=False)
        return Reply(200, _JSON, shown.encode("utf-8", "replace"))


# --------------------------------------------------------------------------------------------------
# 6 core
# --------------------------------------------------------------------------------------------------
RECENT = 10  # results of each handler that `status` shows
SHOWN_HANDLERS = 1000  # handlers of which `status` shows results, at most
LEAST_INBOX = 1000  # messages that may wait for a slow disk however small executor.max_queued is
RETRY_STORING = 1.0  # seconds until what could not be stored is tried again
# Up to so many dropped runs are finished in the decision itself; if there are more, so many in
# each later turn. All of 10,000 at once took 0.2 to 0.5 s, in which nothing else was decided.
DROPPED_AT_ONCE = 200
_ONE_TURN = Work(lambda: None, lambda value: None)  # wakes the core, which then stores what is held


class Run:
    """An accepted trigger on its way; only the core's thread changes it."""

    __slots__ = ("trigger", "job", "cancelled", "accepted", "started", "stuck")

    def __init__(self, trigger: Trigger, job: JobConfig):
        self.trigger, self.job = trigger, job
        self.cancelled: Result | None = None
        # monotonic; of a run of an earlier life, when it was resumed in this one
        self.accepted, self.started = time.monotonic(), 0.0
        self.stuck = False  # cancelled, but its thread does not return

    def span(self) -> Span:
        """When it took place, if it ends now."""
        passed = time.monotonic() - (self.started or self.accepted)
        began = round(time.time() - passed, 3)
        return Span(self.trigger, began, round(passed, 3) if self.started else None)

    def stuck_text(self) -> str:
        return f"run {self.trigger.log_id} of this job does not return from its thread"


class Lane:
    """What runs and waits for one jobId: one run at a time, the rest in order; the core's
    thread."""

    __slots__ = ("job_id", "running", "waiting")

    def __init__(self, job_id: int):
        self.job_id = job_id
        self.running: Run | None = None
        self.waiting: collections.deque[Run] = collections.deque()

    def check(self, trigger: Trigger, job: JobConfig, room: bool) -> None:
        """Raises Refused for what depends on what runs and waits here: a stuck thread,
        DISCARD_LATER, queue_limit (not for COVER_EARLY, which drops what waits)."""
        if self.running is not None and self.running.stuck:
            raise Refused(
                f"{self.running.stuck_text()}: restart the executor, and let the job watch"
                " Context.cancelled or use isolation: process",
                "stuck",
            )
        if trigger.block_strategy == "DISCARD_LATER" and (self.running or self.waiting):
            raise Refused(
                "block strategy effect: DISCARD_LATER, the job is running or waiting",
                "discard_later",
            )
        # with `room`, one of those that came at once starts in the next turn
        waiting = len(self.waiting) - (room and self.running is None)
        if waiting >= job.queue_limit and trigger.block_strategy != "COVER_EARLY":
            raise Refused(
                f"{waiting} triggers of this job wait already: queue_limit is {job.queue_limit}",
                "queue_limit",
            )


def covered_by(trigger: Trigger) -> Result:
    """What COVER_EARLY makes of those before it."""
    return Result(FAILURE, f"covered by run {trigger.log_id}")


class Dropped(typing.NamedTuple):
    """Too many dropped runs to finish at once: the journal has them in one row, `name`, until each
    has its result."""

    name: str
    runs: collections.deque[Run]
    result: Result


class Batch:
    """What one turn of the core decides: how to take it back, and what follows once it is
    committed."""

    def __init__(self) -> None:
        self.undo: list[typing.Callable[[], typing.Any]] = []
        # (ticket; None for yes, a text, or Refused; the run that was accepted, if any)
        self.answers: list[tuple[typing.Any, typing.Any, Run | None]] = []
        self.started: list[Run] = []
        self.cancelled: dict[Run, list[Result]] = {}  # and all reasons that came
        self.dropped: list[tuple[Span, Result]] = []
        self.many_dropped: list[Dropped] = []
        self.works: list[tuple[Work, typing.Any]] = []
        self.lines = Lines()


class RecentRuns:
    """How runs ended lately, for `status` and the metrics; the core's thread, but for `snapshot`:
    any thread."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        # by handler, the latest last: the last result codes, and the latest run if it has failed
        self._codes: dict[str, collections.deque[int]] = {}
        self._failures: dict[str, PastRun] = {}
        self._counted: set[str] = set()  # labels, in this life

    def show(self, span: Span, result: Result) -> None:
        """Have `status` show it."""
        handler = span.trigger.handler
        codes = self._codes.pop(handler, None) or collections.deque(maxlen=RECENT)
        self._codes[handler] = codes
        codes.append(result.code)
        if result.code == SUCCESS:
            self._failures.pop(handler, None)
        else:
            self._failures[handler] = PastRun.just_ended(span, result)
        if len(self._codes) > SHOWN_HANDLERS:  # every script from the admin is a handler
            oldest = next(iter(self._codes))
            del self._codes[oldest]
            self._failures.pop(oldest, None)

    def count(self, span: Span, result: Result) -> None:
        """`show` it, and count it in the metrics."""
        self.show(span, result)
        label = span.trigger.label
        self._counted.add(label)
        self._metrics.count("runs_total", handler=label, code=result.code)
        if span.took is not None:
            self._metrics.observe("run_duration_seconds", span.took, handler=label)
        now = round(time.time(), 3)
        self._metrics.set("last_run_timestamp_seconds", now, handler=label)
        if result.code == SUCCESS:
            self._metrics.set("last_success_timestamp_seconds", now, handler=label)

    def remember(self, past: list[PastRun]) -> None:
        """What ended in earlier lives, the latest first."""
        for run in reversed(past):
            names = ["last_run", *(["last_success"] if run.code == SUCCESS else [])]
            if run.ended is None or run.label in self._counted:  # a later one of this life stays
                continue
            for name in names:
                self._metrics.set(f"{name}_timestamp_seconds", run.ended, handler=run.label)
        live = self._codes
        earlier: dict[str, collections.deque[int]] = {}
        for run in past:
            if run.handler not in live and len(live) + len(earlier) < SHOWN_HANDLERS:
                earlier.setdefault(run.handler, collections.deque(maxlen=RECENT))
            codes = live.get(run.handler, earlier.get(run.handler))
            if codes is None:
                continue
            if not codes and run.code != SUCCESS:
                self._failures[run.handler] = run
            if len(codes) < RECENT:
                codes.appendleft(run.code or 0)
        # the latest handler last, as `show` keeps them
        self._codes = {**dict(reversed(list(earlier.items()))), **live}

    def snapshot(self) -> dict:
        return {
            "recent": {name: list(codes) for name, codes in list(self._codes.items())},
            "failures": [run.shown() for run in list(self._failures.values())],
        }


class Lanes:
    """What runs and what waits. Only the core's thread changes it; queued, busy, knows, active and
    grace: any thread."""

    def __init__(self) -> None:
        self._lanes: dict[int, Lane] = {}  # by jobId
        self._runs: dict[int, Run] = {}  # by logId: everything without a result
        self._stuck: dict[int, Run] = {}  # by logId: those with a result, whose thread still runs
        self._ready: collections.OrderedDict[Lane, None] = collections.OrderedDict()
        self._queued = self._occupied = 0  # runs that wait; runs that take one of max_running

    def busy(self, job_id: int) -> bool:
        """Whether something runs or waits for this job."""
        return job_id in self._lanes

    def knows(self, log_id: int) -> bool:
        """Whether this run waits or runs: as long as it does, /log says that more may come."""
        return log_id in self._runs

    def waiting(self) -> int:
        """How many runs wait."""
        return self._queued

    def active(self) -> bool:
        """Whether anything runs or is about to start; stuck threads do not count."""
        return self._occupied > len(self._stuck)

    def grace(self) -> float:
        """How many seconds it may take until all that runs has ended, if it is cancelled now: the
        longest kill_grace and KILL_LIMIT."""
        running = [run for run in list(self._runs.values()) if run.started]
        return max([run.job.kill_grace for run in running], default=0.0) + KILL_LIMIT

    def _lane_changed(self, lane: Lane) -> None:
        """A run came into `lane` or left it. When none runs there and some wait, it goes to the end
        of those that may start, or keeps its place among them; when none waits, it is forgotten."""
        if lane.running is None and lane.waiting:
            self._ready[lane] = None
        elif lane.running is None and self._lanes.get(lane.job_id) is lane:  # not a new one
            del self._lanes[lane.job_id]
            self._ready.pop(lane, None)


class Decisions(Lanes):
    """What each message decides: each method writes into the journal's transaction, and notes in
    the batch how to take back what it changed here. The core's thread."""

    def __init__(self, journal: typing.Any, max_running: int, max_queued: int):
        super().__init__()
        self._journal = journal
        self._max_running, self._max_queued = max_running, max_queued
        self._batch = Batch()
        self._idle_hook: typing.Callable[[], None] | None = None  # set while draining
        self._decide: dict[type, typing.Callable[[typing.Any], None]] = {
            Submit: self._submit,
            Kill: self._kill,
            Resume: self._resume,
            Expired: self._expire,
            CancelAll: self._cancel_all,
            Drain: self._drain,
            Work: self._work,
        }

    def _start_ready(self) -> None:
        """While there is room, start what earlier turns accepted, lane after lane. What this turn
        accepts `_let_out` may still withdraw."""
        while self._may_start():
            lane, _ = self._ready.popitem(last=False)
            self._batch.undo.append(functools.partial(self._lane_changed, lane))
            if lane.running is None and lane.waiting:
                self._start_next(lane)

    def _may_start(self) -> bool:
        """Whether `_start_ready` would start a run now; the core does not sleep while it is
        true."""
        return bool(self._ready) and self._occupied < self._max_running and self._idle_hook is None

    def _start_next(self, lane: Lane) -> None:
        run = lane.waiting[0]
        waited = time.monotonic() - run.accepted
        if run.job.max_delay and waited > run.job.max_delay:
            told = f"waited {seconds_text(waited)}, more than max_delay"
            why = Result(FAILURE, f"{told} {seconds_text(run.job.max_delay)}")
            self._drop_waiting(lane, 1, why)
            return
        failpoint("starting")
        self._batch.started.append(run)  # before the write, which may fail: `_refuse` looks here
        if not self._journal.start(run.trigger.log_id):
            self._batch.started.pop()
            told = f"not started: run {run.trigger.log_id} is not waiting in the journal"
            self._drop_waiting(lane, 1, Result(FAILURE, told))
            return
        if run.job.isolation == "thread":  # told here: one record for all of a turn
            limit = run.job.limit(run.trigger)
            self._batch.lines.append(run.trigger.started(limit, "in a thread"))
        lane.running = lane.waiting.popleft()
        self._queued -= 1
        self._occupied += 1

        def undo() -> None:
            lane.running = None
            lane.waiting.appendleft(run)
            self._queued += 1
            self._occupied -= 1

        self._batch.undo.append(undo)

    def _submit(self, message: Submit) -> None:
        """Accept a trigger, or refuse it. A logId that is known already is accepted again and
        starts nothing, whatever has changed since."""
        if message.ticket.claimed():  # it was refused while it waited
            return
        run = outcome = None
        try:
            run = self._accept(message.trigger, message.job)
        except Refused as error:
            outcome = None if self._journal.has(message.trigger.log_id) else error
        self._batch.answers.append((message.ticket, outcome, run))

    def _accept(self, trigger: Trigger, job: typing.Any) -> Run | None:
        """None for a known logId that nothing refuses (what is refused here `_submit` takes
        nevertheless when the journal knows it). Raises Refused: because of the job, a stop, the
        lane, max_queued, in this order."""
        if trigger.log_id in self._runs:
            return None
        if isinstance(job, Refused):
            raise job
        delay = time.time() - trigger.log_date_time / 1000
        if job.max_delay and trigger.log_date_time and delay > job.max_delay:
            raise Refused(
                f"the trigger is {seconds_text(delay)} old, more than max_delay"
                f" {seconds_text(job.max_delay)}",
                "max_delay",
            )
        if self._idle_hook is not None:
            raise Refused("the executor is stopping", "stopping")
        lane = self._lanes.get(trigger.job_id) or Lane(trigger.job_id)
        room = self._max_running - self._occupied
        lane.check(trigger, job, room >= len(self._ready))
        queued = self._queued - min(len(self._ready), room)
        if queued >= self._max_queued:
            raise Refused(
                f"{queued} triggers wait already: executor.max_queued is {self._max_queued}",
                "max_queued",
            )
        if not self._journal.accept(trigger):
            return None
        if trigger.block_strategy == "COVER_EARLY":
            reason = covered_by(trigger)
            self._drop_waiting(lane, len(lane.waiting), reason)
            if lane.running is not None:
                self._cancel(lane.running, reason)
        self._batch.lines.append(Event.of(trigger, f"accepted {trigger}"))
        return self._queue(trigger, job, lane)

    def _queue(self, trigger: Trigger, job: JobConfig, lane: Lane) -> Run:
        run = self._runs[trigger.log_id] = Run(trigger, job)
        self._lanes[lane.job_id] = lane
        lane.waiting.append(run)
        self._queued += 1
        self._lane_changed(lane)

        def undo() -> None:
            del self._runs[trigger.log_id]
            lane.waiting.pop()
            self._queued -= 1
            self._lane_changed(lane)

        self._batch.undo.append(undo)
        return run

    def _resume(self, message: Resume) -> None:
        trigger = message.trigger
        if message.again:
            self._journal.restart(trigger)
        self._queue(trigger, message.job, self._lanes.get(trigger.job_id) or Lane(trigger.job_id))

    def _kill(self, message: Kill) -> None:
        if message.ticket.claimed():  # it was refused while it waited
            return
        lane = self._lanes.get(message.job_id)
        told = "nothing was running"
        if lane is not None:
            running, waiting = lane.running, len(lane.waiting)
            why = Result(FAILURE, "killed by the admin before it started")
            self._drop_waiting(lane, waiting, why)
            if running is not None:
                self._cancel(running, Result(FAILURE, "killed by the admin"))
            told = f"killed {int(running is not None)} running, dropped {waiting} waiting"
            if running is not None and running.stuck:  # it has its result, and nothing waits
                told = f"nothing to kill: {running.stuck_text()}"
        self._batch.answers.append((message.ticket, told, None))

    def _expire(self, message: Expired) -> None:
        run = self._runs.get(message.log_id)
        if run is not None:
            self._cancel(run, message.result)

    def _cancel_all(self, message: CancelAll) -> None:
        for lane in self._lanes.values():
            if lane.running is not None:
                self._cancel(lane.running, message.result)

    def _drain(self, message: Drain) -> None:
        self._idle_hook = message.idle

    def _work(self, message: Work) -> None:
        self._batch.works.append((message, message.work()))

    def _cancel(self, run: Run, result: Result) -> None:
        """Only the first reason counts. It is stored, if that is possible, before anything is
        ended: so it is the result after a crash too."""
        if run in self._batch.cancelled:
            self._batch.cancelled[run].append(result)
        elif run.cancelled is None and not run.stuck:
            run.cancelled, self._batch.cancelled[run] = result, [result]
            self._journal.cancel(run.trigger.log_id, result)
            self._batch.undo.append(functools.partial(setattr, run, "cancelled", None))

    def _drop_waiting(self, lane: Lane, count: int, result: Result) -> None:
        """The first `count` that wait have ended with `result`; see DROPPED_AT_ONCE."""
        dropped = list(itertools.islice(lane.waiting, count))
        if count > DROPPED_AT_ONCE:  # first what may fail, for that cannot be undone
            name = self._journal.drop([run.trigger.log_id for run in dropped], result)
            self._batch.many_dropped.append(Dropped(name, collections.deque(dropped), result))
        else:
            spans = [run.span() for run in dropped]
            self._journal.finish(spans, result)
            self._batch.dropped += [(span, result) for span in spans]
        for run in dropped:
            lane.waiting.popleft()
            del self._runs[run.trigger.log_id]
        self._queued -= count
        self._lane_changed(lane)

        def undo() -> None:
            self._lanes[lane.job_id] = lane
            lane.waiting.extendleft(reversed(dropped))
            self._queued += count
            self._runs.update((run.trigger.log_id, run) for run in dropped)
            self._lane_changed(lane)

        self._batch.undo.append(undo)


# --------------------------------------------------------------------------------------------------
# 6b the core's thread
# --------------------------------------------------------------------------------------------------
class Endings(Decisions):
    """Carries out facts: what has happened to runs is neither refused nor undone. What its methods
    tell the journal is held until a commit works; what must be in the transaction itself is a
    decision. The core's thread."""

    def __init__(self, journal: typing.Any, metrics: Metrics, max_running: int, max_queued: int):
        super().__init__(journal, max_running, max_queued)
        self._dropped: collections.deque[Dropped] = collections.deque()
        self._recent = RecentRuns(metrics)
        metrics.gauges.update(
            running=lambda: self._occupied,
            queued=lambda: self._queued,
            stuck_threads=lambda: len(self._stuck),
            disk_full=lambda: int(journal.reserve.lost),
        )
        self._happened: dict[type, typing.Callable[[typing.Any], None]] = {
            Ended: self._ended,
            Lost: self._lost,
            Stuck: self._thread_stuck,
            Settled: journal.hold,
            Note: journal.hold,
        }

    def snapshot(self) -> dict:
        """What runs and waits and how runs ended, for `status`; any thread."""
        runs, now = list(self._runs.values()), time.monotonic()
        queued = collections.Counter(run.trigger.handler for run in runs if not run.started)
        running = [
            {
                "job": run.trigger.handler,
                "jobId": run.trigger.job_id,
                "logId": run.trigger.log_id,
                "stuck": run.stuck,
                "seconds": round(now - run.started, 3),
            }
            for run in [*runs, *list(self._stuck.values())]
            if run.started
        ]
        return {
            "running": running,
            "queued": dict(queued),
            "diskFull": self._journal.reserve.lost,
            **self._recent.snapshot(),
        }

    def _ended(self, message: Ended) -> None:
        failpoint("exited")
        run = self._stuck.pop(message.log_id, None)
        if run is None:
            run = self._runs[message.log_id]
            self._finish(run, message.result)
        lane = self._lanes[run.trigger.job_id]
        lane.running = None
        self._occupied -= 1
        self._lane_changed(lane)

    def _finish_dropped(self, dropped: Dropped) -> None:
        """Finish DROPPED_AT_ONCE of them a turn; all of them while draining, when nobody waits for
        a decision."""
        failpoint("dropped")
        name, runs, result = dropped
        most = DROPPED_AT_ONCE if self._idle_hook is None else len(runs)
        spans = [run.span() for run in itertools.islice(runs, most)]
        self._journal.finish(spans, result)
        for span in spans:
            runs.popleft()
            self._account(span, result)
        if not runs:
            self._dropped.remove(dropped)
            self._journal.hold(Note(name, None))

    def _lost(self, message: Lost) -> None:
        self._journal.finish([message.span], message.result)
        self._recent.show(message.span, message.result)

    def _thread_stuck(self, message: Stuck) -> None:
        """A thread did not return from a cancelled run: report the run; its lane stays closed, so
        that nothing overlaps, and what waits behind it fails."""
        run = self._runs.get(message.log_id)
        if run is None or run.cancelled is None:
            return
        log.error(
            "thread of %s does not return; it is lost until it does or the executor restarts",
            run.trigger,
        )
        why = run.cancelled
        run.stuck, self._stuck[message.log_id] = True, run
        self._finish(run, Result(why.code, f"{why.message}; its thread did not return"))
        if self._idle_hook is None:  # else the next start, which is the remedy, runs them
            for other in list(self._lanes[run.trigger.job_id].waiting):
                self._withdraw(other, run.stuck_text())

    def _withdraw(self, run: Run, why: str) -> None:
        """Fail a run that waits, for good, even if that is stored only later. Decisions take
        `_drop_waiting`, which can be undone."""
        lane = self._lanes[run.trigger.job_id]
        lane.waiting.remove(run)
        self._queued -= 1
        self._finish(run, Result(FAILURE, why))
        self._lane_changed(lane)

    def _withdraw_late(self, run: Run) -> None:
        """It was refused before it was stored. What it covers runs on, unless there is another
        reason to end it; what it made drop is gone, for that is stored."""
        if run.trigger.log_id in self._runs:  # else another one has covered it
            self._withdraw(run, "refused: it could not be stored in time")
        for covered, reasons in list(self._batch.cancelled.items()):
            if covered_by(run.trigger) in reasons:
                reasons.remove(covered_by(run.trigger))
                covered.cancelled = reasons[0] if reasons else None
                self._journal.cancel(covered.trigger.log_id, covered.cancelled)
                if not reasons:
                    del self._batch.cancelled[covered]

    def _finish(self, run: Run, result: Result) -> None:
        """Note its result in the journal, and tell of it."""
        del self._runs[run.trigger.log_id]
        span = run.span()
        self._journal.finish([span], result)
        self._account(span, result)

    def _account(self, span: Span, result: Result) -> None:
        """Have `status`, the metrics and the log tell of its end."""
        trigger, took = span.trigger, span.took
        self._recent.count(span, result)
        told = (
            f"finished {trigger} code={result.code} in {seconds_text(took or 0.0)}:"
            f" {result.message[:200]}"
        )
        self._batch.lines.append(Event.of(trigger, told, code=result.code, seconds=took))


def guarded(call: typing.Callable[..., typing.Any], *arguments: typing.Any) -> None:
    """No failure over one thing may cost another, or end the thread that serves all."""
    try:
        call(*arguments)
    except Exception:
        log.exception("unexpected error in %s, please report it", threading.current_thread().name)


class Core(Endings, Watched):
    """One thread that decides everything: it takes all messages that wait as one batch, decides
    each in memory, commits all decisions as one transaction, and only then lets the effects out.

    put, overloaded, accepted, flush, remember and snapshot: any thread. A run is in the journal as
    accepted before its trigger is answered, and by a later commit as running before anything of it
    starts, so no crash can make it start twice, unless its job asks for that (on_crash: rerun). A
    kill or a cover ends nothing before it is committed; a timeout and a stop of the executor end
    runs even when that cannot be stored.
    """

    def __init__(
        self,
        journal: typing.Any,
        processes: typing.Any,
        slots: typing.Any,
        metrics: Metrics,
        max_running: int,
        max_queued: int,
    ):
        """`processes` and `slots` have start(trigger, job) and cancel(logId, result); slots run the
        jobs with isolation: thread."""
        super().__init__(journal, metrics, max_running, max_queued)
        self._processes, self._slots, self._metrics = processes, slots, metrics
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._pace = Pace(0.001)
        self._closing = False
        self._failed = False  # the last turn could not be stored
        self._thread = threading.Thread(target=self._loop, name="core", daemon=True)

    # -- any thread

    def put(self, message: typing.Any) -> None:
        self._inbox.put(message)

    def overloaded(self) -> bool:
        """Whether so much waits to be decided that nobody may add to it."""
        return self._inbox.qsize() > max(self._max_queued, LEAST_INBOX)

    def accepted(self, log_id: int) -> bool:
        """Whether this run was accepted, however long ago."""
        try:
            return log_id in self._runs or self._journal.state(log_id) is not None
        except JournalError:
            return False

    def flush(self, seconds: float) -> bool:
        """Whether all that was put before is decided and let out, within `seconds`."""
        done = threading.Event()
        # it asks again as long as dropped runs are without a result
        look = Work(lambda: None, lambda value: self.put(look) if self._dropped else done.set())
        self.put(look)
        return done.wait(seconds)

    def remember(self, past: list[PastRun]) -> None:
        """What ended in earlier lives, the latest first."""
        # `done` is called in the core's thread, exactly once, unlike `work`
        self.put(Work(lambda: None, lambda value: self._recent.remember(past)))

    def start(self) -> None:
        self._thread.start()

    def close(self, seconds: float) -> bool:
        """Store what was put before, for at most `seconds`; whether that is done, else the thread
        still uses the journal."""
        self._closing = True
        self.put(_ONE_TURN)
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    # -- the core's thread

    def _loop(self) -> None:
        share_cpu()
        while True:
            closing = self._closing
            messages = self._take(0.0 if closing else self._patience())
            self._busy_since = time.monotonic()
            guarded(self._turn, messages)
            self._pace.turned(len(messages))
            self._busy_since = 0.0
            if closing and self._inbox.empty() and not self._dropped:
                return

    def _patience(self) -> float | None:
        """Seconds to wait for a message; None: there is nothing to do before one comes."""
        if self._dropped and not self._failed:
            return 0.0
        if self._failed or self._journal.has_unstored():
            return RETRY_STORING
        return 0.0 if self._may_start() else None

    def _take(self, seconds: float | None) -> list:
        """All that waits; waits for the first, at most `seconds`."""
        messages = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._inbox.get(block=seconds != 0.0, timeout=seconds))
            self._pace.keep()
            while True:
                messages.append(self._inbox.get_nowait())
        return messages

    def _turn(self, messages: list) -> None:
        """First facts: they are applied, and never undone. Then decisions: applied and committed
        together; when that fails they are undone, tried once more if the journal can be mended,
        and else refused."""
        decisions = []
        self._batch = facts = Batch()  # they only add lines to it
        for message in messages:
            happened = self._happened.get(type(message))
            if happened is None:
                decisions.append(message)
            else:
                guarded(happened, message)
        draining = self._idle_hook is not None
        for dropped in list(self._dropped)[: len(self._dropped) if draining else 1]:
            guarded(self._finish_dropped, dropped)
        error = self._try(decisions)
        if error is not None and self._journal.mend(error):
            error = self._try(decisions)
        self._failed = error is not None
        if error is not None:
            self._refuse(decisions, self._journal.cannot_store(error))
        self._batch.lines[:0] = facts.lines
        self._let_out(self._batch)

    def _try(self, decisions: list) -> Exception | None:
        """Decide and commit; the error, with everything as it was before, when that fails."""
        self._batch = batch = Batch()
        try:
            self._journal.begin()
            self._start_ready()  # what came in earlier batches
            for message in decisions:
                self._decide[type(message)](message)
            self._journal.commit()
        except Exception as error:
            if not isinstance(error, (sqlite3.Error, OSError)):
                log.exception("unexpected error, please report it")
            self._journal.take_back()
            for undo in reversed(batch.undo):
                undo()
            return error
        return None

    def _refuse(self, decisions: list, reason: str) -> None:
        """Nothing of this turn could be stored: refuse what may be refused, carry out the rest;
        what that notes is held for the next commit."""
        starting = self._batch.started
        self._batch = batch = Batch()
        for message in decisions:
            if isinstance(message, (Submit, Kill)):
                what = "trigger" if isinstance(message, Submit) else "kill"
                refused = Refused(f"the executor cannot store the {what}: {reason}", "journal")
                known = isinstance(message, Submit) and self.accepted(message.trigger.log_id)
                batch.answers.append((message.ticket, None if known else refused, None))
            elif isinstance(message, Work):
                batch.works.append((message, JournalError(reason)))
            elif isinstance(message, Resume) and message.again:
                told = f"executor restarted while the job ran, it cannot be run again: {reason}"
                began = round(time.time(), 3)  # or earlier, which is not known here
                self._lost(Lost(Span(message.trigger, began, None), Result(FAILURE, told)))
            else:
                guarded(self._decide[type(message)], message)
        for run in starting:
            self._withdraw(run, f"not started, the executor cannot store the start: {reason}")

    def _let_out(self, batch: Batch) -> None:
        """The effects of what is committed: answers first, for the admin may give up after 3 s."""
        self._dropped += batch.many_dropped
        for _, _, run in batch.answers:  # for tests: a crash between commit and answers
            if run is not None:
                failpoint("accepted")
        for ticket, outcome, run in batch.answers:
            if ticket.claim():
                ticket.give(outcome)
            # The selector may have refused it meanwhile, see _end_patience: then it must not run.
            elif run is not None:
                self._withdraw_late(run)
                self.put(_ONE_TURN)  # which stores that at once
        for span, result in batch.dropped:
            self._account(span, result)
        if batch.lines:
            log.info(batch.lines)
        for run in batch.started:
            run.started = time.monotonic()
            self._metrics.observe("run_wait_seconds", run.started - run.accepted)
            self._runner_of(run).start(run.trigger, run.job)
        for run in batch.cancelled:
            assert run.cancelled is not None
            self._runner_of(run).cancel(run.trigger.log_id, run.cancelled)
        for work, value in batch.works:
            work.done(value)
        self._journal.publish()
        if self._idle_hook is not None and not self.active():
            self._idle_hook()

    def _runner_of(self, run: Run) -> typing.Any:
        return self._slots if run.job.isolation == "thread" else self._processes


# --------------------------------------------------------------------------------------------------
# 7 job processes
# --------------------------------------------------------------------------------------------------
_CHUNK = 1 << 16  # bytes; what one read of a pipe or file asks for
KILL_LIMIT = 10.0  # seconds that SIGKILL is repeated for a tree that keeps forking
ASIDE_LIMIT = 1000  # threads beside the supervisor; each run needs one at a time at most
# Seconds; tests/bench.py, shell: two threads that start processes give 1.1 times the runs of 32.
CREW_PATIENCE = 0.05
SERVER_LIMIT = 10.0  # seconds that a Python server may take to fork; it takes milliseconds
PRELOAD_LIMIT = 60.0  # seconds; the same while it imports what a job wants preloaded
# seconds to wait for the journal: a timeout before it ends its run, the daemon when it stops
STORE_LIMIT = 5.0
PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 4, 15, 36  # <linux/prctl.h>
M_MMAP_THRESHOLD = -3  # <malloc.h>
_KEPT: dict[int, int] = {}  # {pid: start time} of what jobs with background: keep left
_OWN: set[int] = (
    set()
)  # direct children that somebody here waits for; all others are orphans that jobs left


def exception_line(error: BaseException) -> str:
    """Its type and its text, of a syntax error the place too."""
    if type(error) in (SyntaxError, IndentationError, TabError):
        return f"{type(error).__name__}: {error}"
    told = traceback.TracebackException(type(error), error, None)
    told.__notes__ = None  # of add_note(), which would come behind it
    return list(told.format_exception_only())[-1].strip()


class Context:
    """What a Python job gets as its argument.

    job_id, log_id, handler (the name of the job), param, shard_index, shard_total, trigger_time (ms
    since the epoch), timeout (seconds, 0: none). `cancelled` is a threading.Event, set when a job
    with `isolation: thread` is killed or timed out: return soon then. A job in a process gets
    SIGTERM instead, by `Tree.ask_to_end`.
    """

    def __init__(self, fields: dict, write: typing.Callable[[str], typing.Any]):
        self.job_id: int = fields["job_id"]
        self.log_id: int = fields["log_id"]
        self.handler: str = fields["handler"]
        self.param: str = fields["param"]
        self.shard_index: int = fields["shard_index"]
        self.shard_total: int = fields["shard_total"]
        self.trigger_time: int = fields["log_date_time"]
        self.timeout: float = fields["timeout"]
        self.cancelled = threading.Event()
        self._write = write

    def log(self, text: typing.Any) -> None:
        """Write one line with the time into the run's log; any thread."""
        self._write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def params(self) -> dict[str, typing.Any]:
        """The parameter as a dict: a JSON object, `id=1&active=true`, or `key=value` words. Raises
        ValueError."""
        if not self.param.strip():
            return {}
        with contextlib.suppress(ValueError):
            fields = json.loads(self.param)
            if isinstance(fields, dict):
                return fields
        with contextlib.suppress(ValueError):
            if not re.search(r"\s", self.param.strip()):
                return dict(
                    urllib.parse.parse_qsl(
                        self.param.strip(), keep_blank_values=True, strict_parsing=True
                    )
                )
            words = [word.partition("=") for word in shlex.split(self.param)]
            if all(key and equals for key, equals, _ in words):
                return {key: value for key, _, value in words}
        raise ValueError(
            'expected a JSON object, "id=1&active=true" or key=value words as parameter, got'
            f" {self.param!r}"
        )


@functools.lru_cache(256)  # tests/bench.py, thread: 1.1 times the runs
def _takes_argument(function: typing.Callable) -> bool:
    return bool(inspect.signature(function).parameters)


def call_entry_point(entry_point: str, context: Context) -> str:
    """Import `module:function` and call it, with `context` if it takes an argument; returns its
    result as text. In a job's process, or in a slot's thread."""
    module, _, name = entry_point.partition(":")
    function = getattr(importlib.import_module(module), name)
    try:
        value = function(context) if _takes_argument(function) else function()
        if inspect.iscoroutine(value):
            import asyncio

            value = asyncio.run(value)
        if inspect.isgenerator(value) or inspect.isasyncgen(value):
            what = "a generator" if inspect.isgenerator(value) else "an asynchronous generator"
            raise TypeError(
                f"{entry_point} is {what}, of which nothing has run: take out the yield, or"
                " iterate over it in the function"
            )
        return "" if value is None else str(value)
    except MemoryError as error:
        traceback.clear_frames(
            error.__traceback__
        )  # what filled the memory is in their variables, and to report it needs some
        raise


class GlueScripts:
    """Scripts that the admin sends with its triggers (GLUE), in one directory; any thread."""

    def __init__(self, directory: str, config: GlueConfig, now: typing.Callable[[], float]):
        """`now()`: seconds of a clock that does not jump; a file's time says when it was used."""
        self._directory, self._config, self._now = directory, config, now
        self._lock = threading.Lock()
        if config.enabled:
            make_directory(directory)
            os.chmod(directory, 0o700)

    def _path(self, trigger: Trigger) -> str:
        return os.path.join(
            self._directory, f"{trigger.job_id}_{trigger.glue_updated}{GLUE[trigger.glue_type][1]}"
        )

    def job(self, trigger: Trigger) -> JobConfig:
        """What runs the script of `trigger`. Raises Refused."""
        glue_type = trigger.glue_type[:100]
        if glue_type == "GLUE_GROOVY":
            raise Refused(
                "GLUE_GROOVY: Groovy runs inside the Java executor only: choose another language,"
                " or a script of this host",
                "glue",
            )
        if glue_type not in GLUE:
            raise Refused(
                f"{glue_type}: no such kind of script: known are {', '.join(GLUE)}", "glue"
            )
        if not self._config.enabled:
            raise Refused(
                f"{glue_type}: scripts from the admin are not enabled here: write the script to"
                " this host, list it under jobs in the configuration and choose BEAN with its name"
                " as JobHandler, or set glue.enabled: true",
                "glue",
            )
        if glue_type not in self._config.languages:
            raise Refused(
                f"{glue_type}: is not among glue.languages:"
                f" {', '.join(self._config.languages) or 'none'}",
                "glue",
            )
        command = (
            GLUE[glue_type][0],
            self._path(trigger),
            *(f"{{{word}}}" for word in PLACEHOLDERS),
        )
        return dataclasses.replace(
            self._config.template,
            name=trigger.handler,
            command=command,
            timeout=self._config.timeout,
        )

    def store(self, trigger: Trigger, source: str, caller: str) -> None:
        """Write the script of `trigger` unless it is there already, and say so. Raises Refused."""
        path, data = self._path(trigger), source.encode("utf-8", "replace")
        try:
            with self._lock:
                with contextlib.suppress(FileNotFoundError), open(path, "rb") as stream:
                    if stream.read() == data:
                        self._mark_used(path)
                        return
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                with open(os.open(f"{path}.new", flags, 0o700), "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())  # its run is about to be accepted for good
                self._mark_used(f"{path}.new")
                os.replace(f"{path}.new", path)
                directory = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
        except OSError as error:
            raise Refused(
                f"the executor cannot store the script: {path}: {error.strerror}", "glue"
            ) from None
        log.warning(
            "new script %s of jobId=%d from %s: %d bytes, sha256 %s",
            path,
            trigger.job_id,
            caller,
            len(data),
            hashlib.sha256(data).hexdigest(),
        )

    def _mark_used(self, path: str) -> None:
        os.utime(path, (self._now(), self._now()))

    def prune(self, age: float) -> None:
        """Remove scripts that were not used for `age` seconds."""
        for file in glob.glob(os.path.join(glob.escape(self._directory), "*_*.*")):
            with self._lock, contextlib.suppress(OSError):  # it may be used just now
                if os.stat(file).st_mtime < self._now() - age:
                    os.unlink(file)


# --------------------------------------------------------------------------------------------------
# 7b inside the Python server and its children
# --------------------------------------------------------------------------------------------------
# A process that imports nothing of the jobs, unless they preload it, and forks one child per run.


def import_first(server: socket.socket, wanted: str) -> None:
    """Import what jobs want preloaded, in the server, and tell the daemon what failed."""
    modules, path = json.loads(wanted)
    sys.path[:0] = path
    problems = []
    for module in modules:
        try:
            importlib.import_module(module)
        except BaseException as error:  # whatever it does, the server goes on without it
            told = exception_line(error)
            problems.append(f"cannot import {module}: {told}")
    del sys.path[: len(path)]
    with contextlib.suppress(OSError):  # the daemon is gone
        server.sendall(json.dumps(problems).encode() + b"\n")


# Seconds that a child which was forked beforehand waits for a run; by so much ps may show a job as
# older than its run.
SPARE_TIME = 10.0


class Forker:
    """The main loop of a Python server.

    A child is asked for by one byte with three descriptors: `output`, `report` and `channel`.
    `report`: a pipe of this process and the daemon alone, whose end tells the daemon that this
    process is gone; a line of JSON tells the PID or an error, a second one the exit status. A child
    that has ended is reaped when the daemon has closed `report`: until then its PID is nobody
    else's. What to run goes over `channel` to the child itself, once the daemon knows its PID: this
    process never has a run's environment, which later children would inherit.

    When a run has ended, a spare child is forked for the next one, and ended unused after
    SPARE_TIME: runs that follow each other start sooner (tests/bench.py, python-start:
    3.9 ms instead of 6.3).
    """

    def __init__(self, server: socket.socket):
        self._server = server
        self._wake_up = WakeUp()
        signal.signal(signal.SIGCHLD, lambda *_: None)  # an ignored signal would wake nobody
        signal.set_wakeup_fd(self._wake_up.write_end, warn_on_full_buffer=False)
        self._poller = select.poll()
        for fd in (server.fileno(), self._wake_up.fd):
            self._poller.register(fd, select.POLLIN)
        self._running: dict[int, int] = {}  # descriptor of the report: PID
        self._ended: dict[int, int] = {}  # the same, not reaped yet
        # PIDs of those that may run on although the daemon has closed their report, and of spares
        self._given_up: set[int] = set()
        self._spare: tuple[int, socket.socket] | None = None  # its PID, what it is told by
        self._spare_until = 0.0  # monotonic

    def serve(self) -> typing.Callable[[], int] | None:
        """Fork as the daemon asks, until it closes the socket: then returns None. In each child it
        returns too: the work, which the caller does outside of this loop."""
        while True:
            left = None
            if self._spare is not None:
                left = 1000 * max(0.0, self._spare_until - time.monotonic())
            ready = {number for number, _ in self._poller.poll(left)}
            work, ended = None, False
            if self._wake_up.fd in ready:
                self._wake_up.clear()
                ended = self._look_at_children()
            for report in ready & {*self._running, *self._ended}:
                self._release(report)
            if self._server.fileno() in ready:
                request, fds, _, _ = socket.recv_fds(self._server, 1, 3)
                if not request:
                    signal.set_wakeup_fd(-1)
                    self._end_spare()
                    return None
                work = self._begin(*fds)
            elif ended and self._spare is None and threading.active_count() == 1:
                # what a thread of a preloaded module keeps up to date would be old in a spare
                with contextlib.suppress(OSError):  # the next run will tell
                    work = self._fork_spare()
            elif self._spare is not None and time.monotonic() >= self._spare_until:
                self._end_spare()
            if work is not None:
                return work

    def _look_at_children(self) -> bool:
        """After SIGCHLD: report those that have ended, reap those given up; whether a run has
        ended."""
        before = len(self._ended)
        for report, pid in list(self._running.items()):
            outcome = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if outcome is not None:
                self._ended[report] = self._running.pop(report)
                _report(report, status=exit_status(outcome))
        for pid in list(self._given_up):
            self._reap_if_ended(pid)
        return len(self._ended) > before

    def _release(self, report: int) -> None:
        """The daemon has closed `report`: reap the child, now or at its end."""
        self._poller.unregister(report)
        os.close(report)
        if report in self._ended:
            os.waitpid(self._ended.pop(report), 0)
        else:
            self._given_up.add(self._running.pop(report))

    def _begin(self, output: int, report: int, channel: int) -> typing.Callable[[], int] | None:
        """Have the spare, or a new child, take `output` and `channel`. In a child: its work; here:
        None."""
        try:
            pid = self._give_spare(output, channel) if self._spare else 0
            if not pid:
                work = self._fork_spare(output, report, channel)
                if work is not None:
                    return work
                pid = self._give_spare(output, channel)
            if not pid:
                raise ChildProcessError(errno.ECHILD, "the child ended at once")
        except OSError as error:
            _report(report, error=f"cannot fork: {error.strerror}")
            os.close(report)
        else:
            _report(report, pid=pid)
            self._running[report] = pid
            self._poller.register(report, 0)  # POLLERR, unasked: the daemon has closed its end
        os.close(output)
        os.close(channel)
        return None

    def _fork_spare(self, *fds: int) -> typing.Callable[[], int] | None:
        """Fork a child, which is born as a spare also when a run waits for it; it has no use for
        `fds` of that run. In the child: its work; here: None. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                self._wake_up.close()
                ours.close()
                for other in (*fds, *self._running, *self._ended, self._server.detach()):
                    os.close(other)
                return functools.partial(_await_run, theirs.detach())
        self._spare, self._spare_until = (pid, ours), time.monotonic() + SPARE_TIME
        return None

    def _give_spare(self, output: int, channel: int) -> int:
        """Have the spare be a run's process; its PID, 0 when it has ended meanwhile."""
        assert self._spare is not None
        pid, sock = self._spare
        try:
            socket.send_fds(sock, [b"x"], [output, channel])
        except OSError:
            self._end_spare()
            return 0
        self._spare = None
        sock.close()
        return pid

    def _end_spare(self) -> None:
        """Close what it waits for: then it ends. It is neither waited for nor signalled: a debugger
        may hold it, and what was preloaded may have reaped it."""
        if self._spare is not None:
            pid, sock = self._spare
            self._spare = None
            sock.close()
            self._given_up.add(pid)
            self._reap_if_ended(pid)

    def _reap_if_ended(self, pid: int) -> None:
        """Forget a PID that was given up, if that has ended."""
        try:
            ended = os.waitpid(pid, os.WNOHANG)[0] != 0
        except ChildProcessError:  # what was preloaded has reaped it
            ended = True
        if ended:
            self._given_up.discard(pid)


def _report(fd: int, **fields: typing.Any) -> None:
    with contextlib.suppress(OSError):  # the daemon is gone
        os.write(fd, json.dumps(fields).encode() + b"\n")


def _await_run(sock: int) -> int:
    """In the forked child: wait for a run; returns the exit status."""
    with socket.socket(fileno=sock) as told:
        _, fds, _, _ = socket.recv_fds(told, 1, 2)
    if len(fds) != 2:  # not needed any more; what was preloaded must not be told of an end
        os._exit(1)
    return _python_child(*fds)


def _python_child(output: int, channel: int) -> int:
    """In the forked child: become the job, call it, send its return value or its exception; returns
    the exit status."""
    own, inode = os.getpid(), os.fstat(channel).st_ino

    def tell(message: str) -> None:
        """Send `message` to the daemon. A child that the job forked, and that came back here, sends
        nothing; nor does anything go to what the job opened under the number of the channel."""
        with contextlib.suppress(OSError):  # the job closed it
            if os.getpid() == own and os.fstat(channel).st_ino == inode:
                os.write(channel, clip(message).encode())

    try:
        request = _take_request(channel)
        if request is None:  # the daemon has given up, or is gone
            return 1
        _become(request, output)
        _JobLogging()
        context = Context(request["context"], sys.stdout.write)
        show_command([request["entry_point"], f"logId={context.log_id}"])
        message = call_entry_point(request["entry_point"], context)
        tell(message)
        return 0
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            status = error.code or 0
            if status and status % 256 == 0:  # eight bits of it arrive: that would be a success
                tell(f"SystemExit: {status}")
                return 1
            return status
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        # Before the traceback is printed: after a MemoryError this needs the least.
        tell(exception_line(error))
        traceback.print_exception(type(error), error, _job_frames(error.__traceback__))
        return 1


def _become(request: dict, output: int) -> None:
    """Have this process look like the job: session, output, user, environment, directory; `request`
    is made by `Launch.request`."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(null)
    os.close(output)
    text: dict[str, typing.Any] = {
        "buffering": 1,
        "encoding": "utf-8",
        "errors": "backslashreplace",
        "closefd": False,
    }
    sys.stdout, sys.stderr = open(1, "w", **text), open(2, "w", **text)  # noqa: SIM115
    # Imported as root, who can read it; called as the user, for it looks into his directories.
    site = importlib.import_module("site") if sys.flags.no_site else None
    if request["user"]:
        user = pwd.getpwnam(request["user"])
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
        LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # else its own /proc/self is root's
        if site is not None:
            site.main()
    # Only what differs from the server's (tests/bench.py, python-start: 0.3 ms of 9).
    environment, zone = request["env"], os.environ.get("TZ")
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if environment.get("TZ") != zone:
        time.tzset()
    os.chdir(request["cwd"])
    sys.path[:0] = [*request["pythonpath"], request["cwd"]]
    sys.argv = [request["entry_point"]]


class _JobLogging(logging.StreamHandler):
    """What a job in a process logs is in its run's log, from INFO on and with the time, unless the
    job has set up logging itself."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        time_and_level = "%(asctime)s.%(msecs)03d %(levelname)-7s "
        self.setFormatter(logging.Formatter(f"{time_and_level}%(message)s", "%Y-%m-%d %H:%M:%S"))
        root, set_up = logging.getLogger(), logging.basicConfig
        root.addHandler(self)
        root.setLevel(logging.INFO)

        def make_room(**options: typing.Any) -> None:
            root.removeHandler(self)
            set_up(**options)

        # as it is, basicConfig does nothing where there is a handler
        logging.basicConfig = make_room

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether nobody else handles it."""
        logger = logging.getLogger(record.name)
        while logger.parent is not None and not logger.handlers:
            logger = logger.parent
        return logger.handlers == [self]


def _take_request(channel: int) -> dict | None:
    """What to run, from the daemon; it is sent when this process is known to the daemon."""
    os.set_inheritable(channel, False)  # no program that the job starts may hold it
    with socket.socket(fileno=os.dup(channel)) as sock:
        _, fds, _, _ = socket.recv_fds(sock, 1, 1)
    if not fds:
        return None
    with open(fds[0], "rb") as stream:
        stream.seek(0)
        request = json.load(stream)
    # /proc/PID/environ, where `family` looks, shows the memory that a process without an exec has
    # inherited: write the marker there, over that of the server, which is as long.
    LIBC.getenv.restype = ctypes.c_void_p
    marker = request["env"][MARKER].encode()
    ctypes.memmove(LIBC.getenv(MARKER.encode()), marker, len(marker))
    return request


def _job_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    """The traceback from the first frame that is not of this file: the author of a job looks for
    his own lines."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


# --------------------------------------------------------------------------------------------------
# 7c children as the daemon sees them, and trees of processes
# --------------------------------------------------------------------------------------------------


OLD_STATUS = 39  # exit status of a Python server whose interpreter is too old


def run_as_module(interpreter: str, *arguments: str, flags: typing.Sequence[str] = ()) -> list[str]:
    """The command that runs this file as a module, see `run_compiled`, also by another version of
    CPython, which may get `flags`."""
    code = (
        f"import sys; sys.version_info < (3, 9) and sys.exit({OLD_STATUS});"
        " import importlib.machinery, importlib.util; spec ="
        " importlib.util.spec_from_loader('xxl_executor',"
        " importlib.machinery.SourceFileLoader('xxl_executor', sys.argv[1])); module ="
        " sys.modules['xxl_executor'] = importlib.util.module_from_spec(spec);"
        " spec.loader.exec_module(module); module.show_command(sys.argv[2:]);"
        " sys.exit(module.main(sys.argv[2:]))"
    )
    return [interpreter, *flags, "-c", code, os.path.abspath(__file__), *arguments]


def trim_memory() -> None:
    """Give back to the system what starting up needed for a moment; glibc keeps it otherwise
    (tests/bench.py, memory growth: 4.5 MiB instead of 5.0)."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another libc
        # A fixed threshold: else glibc raises it to the largest block that was freed, and what log
        # pages took stays, per thread.
        LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 20)
        LIBC.malloc_trim(0)


def exit_status(outcome: os.waitid_result) -> int:
    """What waitid() found as an exit status, negative for a signal."""
    return outcome.si_status if outcome.si_code == os.CLD_EXITED else -outcome.si_status


@functools.lru_cache
def _kept_open(path: str) -> int:
    """A descriptor of a small file of the kernel that is read for each run. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@functools.lru_cache(1)
def _memory_events() -> str:
    """The file that counts what the kernel has killed in this control group, "" for none."""
    with contextlib.suppress(OSError, ValueError):
        for line in _read_proc("/proc/self/cgroup").decode().splitlines():
            number, controllers, group = line.split(":", 2)
            if controllers == "memory":  # version 1, whose line comes before that of version 2
                return f"/sys/fs/cgroup/memory{group}/memory.oom_control"
            if number == "0":
                return f"/sys/fs/cgroup{group}/memory.events"
    return ""


def memory_kills() -> bytes:
    """How many processes of this control group the kernel has killed for want of memory, in its
    digits; b"" where that is not told."""
    with contextlib.suppress(OSError, ValueError):
        _, _, count = os.pread(_kept_open(_memory_events()), 4096, 0).partition(b"oom_kill ")
        return count.split(b"\n")[0]
    return b""


def require_kernel() -> None:
    """Raises ExecutorError where no process can be watched by a descriptor: Linux before 5.3."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        raise ExecutorError(
            f"this needs Linux 5.3 or newer (pidfd_open), here is {os.uname().release}: {error}"
        ) from None


class Unwatched(OSError):
    """A job process began that nobody could watch; it was killed, but not what it had started."""


class Child:
    """A job process that subprocess started: `fd` is readable when it has ended. It is reaped by
    `close`: until then its PID, which is its session too, is nobody else's."""

    def __init__(self, popen: subprocess.Popen):
        self._popen, self.pid, self.message, self.lost = popen, popen.pid, "", False
        self._status: int | None = None
        self.session = popen.pid
        self.seen: dict[int, int] = {}
        _OWN.add(popen.pid)
        try:
            self.fd = os.pidfd_open(popen.pid)
        except OSError as error:
            os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
            _OWN.discard(popen.pid)
            raise Unwatched(error.errno, error.strerror) from None

    def poll(self) -> int | None:
        """The exit status, negative for a signal, or None while it runs."""
        if self._status is None:
            outcome = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            self._status = None if outcome is None else exit_status(outcome)
        return self._status

    def close(self) -> None:
        os.close(self.fd)
        if self._status is not None:
            self._popen.wait()
        _OWN.discard(self.pid)


class ForkedChild:
    """A job process that a Python server forked. `fd`, the reading end of `report`, is readable
    when the server tells something, or is gone: nobody else has the other end. The job holds that
    of `channel`."""

    def __init__(self, server: PythonServer, report: int, channel: socket.socket):
        self.server, self.fd, self._channel = server, report, channel
        os.set_blocking(report, False)
        self.pid, self.error = 0, ""
        self.lost = False  # the server has gone, the status is unknown
        self.seen: dict[int, int] = {}  # {pid: start time} of its process
        self._status: int | None = None
        self._data = b""

    def send_request(self, request: dict) -> None:
        """Its PID is known: have it run `request`."""
        process = process_stat(self.pid)
        if process is not None:
            self.seen = {self.pid: process.started}  # before it has its session and its marker
        with open(os.memfd_create("request"), "wb") as stream:
            stream.write(json.dumps(request).encode())
            stream.flush()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `poll` tells
                socket.send_fds(self._channel, [b"x"], [stream.fileno()])

    def poll(self) -> int | None:
        """Take what the server has told (`pid`, `error`); returns the exit status, negative for a
        signal, or None while it runs."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.fd, _CHUNK)
            if not data and self._status is None:  # the server is gone, the process may live
                self._status, self.lost = 1, True
            self._data += data
        *lines, self._data = self._data.split(b"\n")
        for fields in map(json.loads, lines):
            self.pid = fields.get("pid", self.pid)
            self.error = fields.get("error", self.error)
            self._status = fields.get("status", self._status)
        return self._status

    @property
    def session(self) -> int:
        """The number of its session, 0 once it may belong to somebody else."""
        known = not self.lost or start_time(self.pid) == self.seen.get(self.pid, 0)
        return self.pid if known else 0  # then its tree is found by the marker alone

    @property
    def message(self) -> str:
        """What the job sent, capped; to be read when it has ended."""
        if self.lost:
            return "the Python server of this job ended unexpectedly"
        data = b""
        with contextlib.suppress(OSError):
            data = self._channel.recv(4 * MESSAGE_LIMIT, socket.MSG_DONTWAIT)
        return readable(data)

    def close(self) -> None:
        """Have the server reap it."""
        os.close(self.fd)
        self._channel.close()
        self.server.release()


class PythonServer:
    """The daemon's end of a Python server, whose process runs `Forker`; the supervisor's thread.

    `fd` is readable when it tells of what it has imported beforehand, see `import_problems`; -1
    once PythonServers does not watch it."""

    def __init__(
        self,
        interpreter: str,
        environment: dict[str, str],
        preload: typing.Sequence[str] = (),
        path: typing.Sequence[str] = (),
        flags: typing.Sequence[str] = (),
    ):
        """`preload`: modules to import first, found in `path` too; `flags`: of the interpreter.
        Raises OSError when it cannot be started."""
        self._children, self._retired, self._told = 0, False, b""
        self.answered_at = 0.0  # monotonic; when it last told of a child that it had forked
        self.ready = not preload  # whether it has imported them, or could not
        self._socket, theirs = socket.socketpair()
        self.fd = self._socket.fileno()
        wanted = [json.dumps([preload, path])] if preload else []
        with theirs, all_cpus():
            try:
                self._popen = subprocess.Popen(
                    run_as_module(
                        interpreter, "--serve-python", str(theirs.fileno()), *wanted, flags=flags
                    ),
                    cwd="/",
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError:
                self._socket.close()
                raise
        _OWN.add(self._popen.pid)
        self._socket.setblocking(False)

    def import_problems(self) -> list[str] | None:
        """What it could not import, [] for nothing yet; None at its end."""
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError:
            return None
        *lines, self._told = (self._told + data).split(b"\n")
        if lines:
            self.ready = True
        return [problem for line in lines for problem in json.loads(line)] if data else None

    def alive(self) -> bool:
        """Whether it may be asked."""
        return not self._retired and self._popen.poll() is None

    def fork(self, output: int) -> ForkedChild:
        """Ask for a child whose output goes to the descriptor `output`; it waits for its request.
        Raises OSError, BlockingIOError when it may be asked later."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                read, write = os.pipe()
            except OSError:
                ours.close()
                raise
            try:
                socket.send_fds(self._socket, [b"x"], [output, write, theirs.fileno()])
            except BlockingIOError:  # so many have asked it
                os.close(read)
                ours.close()
                raise
            except OSError:  # it is gone, which the child's `poll` tells
                pass
            finally:
                os.close(write)
        self._children += 1
        return ForkedChild(self, read, ours)

    def release(self) -> None:
        """A child is not needed any more."""
        self._children -= 1
        if self._retired and not self._children:
            self.close(0)

    def retire(self) -> None:
        """Ask it nothing any more: it ends with its last child."""
        if not self._retired:
            self._retired = True
            if not self._children:
                self.close(0)

    def too_old(self) -> bool:
        """Whether it ended because its interpreter is older than jobs need; asked when it is
        retired and has no children."""
        return self._popen.poll() == OLD_STATUS

    def kill(self) -> None:
        self._popen.kill()

    def close(self, seconds: float = 2.0) -> None:
        """It ends by itself within `seconds`, or is killed."""
        self._socket.close()
        try:
            self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # its disk does not answer
                self._popen.wait(0.2)
        _OWN.discard(self._popen.pid)


def _patiently(call: typing.Callable[[], typing.Any]) -> typing.Any:
    """What `call` returns; waits for a free descriptor, at most KILL_LIMIT: what a run started is
    ended whatever is short."""
    deadline = time.monotonic() + KILL_LIMIT
    while True:
        try:
            return call()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or time.monotonic() >= deadline:
                raise
            breathe(0.1)


def _read_proc(path: str) -> bytes:
    """A small file of the kernel."""
    with open(path, "rb", buffering=0) as stream:
        return stream.read()


class ProcessStat(typing.NamedTuple):
    """What the kernel tells of a process; `started` in ticks since the boot: with it a PID names
    one process only."""

    state: str
    parent: int
    session: int
    started: int
    threads: int

    @property
    def alive(self) -> bool:
        """A process whose first thread has ended is Z too, while others run."""
        return self.state not in "ZX" or self.threads > 1


def process_stat(pid: int) -> ProcessStat | None:
    """None when it is gone. Raises OSError, as when no descriptor is free."""
    try:
        fields = _read_proc(f"/proc/{pid}/stat").rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if not fields:
        return None
    return ProcessStat(fields[0].decode(), *(int(fields[number]) for number in (1, 3, 19, 17)))


def start_time(pid: int) -> int | None:
    """Of a process; None when it is gone, or when no descriptor is free to see that."""
    with contextlib.suppress(OSError):
        process = process_stat(pid)
        return process.started if process is not None else None
    return None


def has_ended(pid: int) -> bool:
    """Whether a process that nobody has reaped has ended."""
    try:
        process = process_stat(pid)
    except OSError:  # no descriptor free: nobody can tell
        return False
    return process is None or not process.alive


def _marked(pid: int, needle: bytes) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        environment = _patiently(lambda: _read_proc(f"/proc/{pid}/environ"))
        return needle in b"\0" + environment
    return False


def family(
    marker: str,
    session: int = 0,
    seen: typing.Mapping[int, int] = {},
    act: typing.Callable[[int, int], typing.Any] = lambda pid, started: None,
) -> dict[int, int]:
    """{pid: start time} of living processes whose environment holds `marker` or whose session is
    `session`, of those `seen` before, and of all their descendants. `marker` may be the beginning
    of one: then every run that it begins. `act(pid, start time)` is called for each as soon as it
    is found: one that forks and exits is gone when all are.
    """
    needle = f"\0{MARKER}={marker}".encode()
    stats, members = {}, []
    children = collections.defaultdict(list)
    for pid in [int(name) for name in _patiently(lambda: os.listdir("/proc")) if name.isdigit()]:
        process = _patiently(functools.partial(process_stat, pid))
        if process is None or pid == os.getpid():
            continue
        stats[pid] = process
        children[process.parent].append(pid)
        # 0 is the session of all that came from outside a PID namespace
        if (
            seen.get(pid) == process.started
            or session
            and process.session == session
            or process.alive
            and _marked(pid, needle)
        ):
            members.append(pid)
            act(pid, process.started)
    for pid in members:  # grows while it is walked
        for child in children[pid]:
            if child not in members:
                members.append(child)
                act(child, stats[child].started)
    return {pid: stats[pid].started for pid in members if stats[pid].alive}


def send_signal(members: dict[int, int], number: int) -> list[int]:
    """Signal processes found by `family`, with SIGTERM also wake those that are stopped; returns a
    pidfd of each, to wait for and to close. A PID that changed hands since is left alone: the
    descriptor is opened first, then the start time is compared."""
    fds: list[int] = []
    try:
        for pid, started in members.items():
            # PermissionError: it became root, such as by sudo
            with contextlib.suppress(ProcessLookupError, PermissionError):
                fd = _patiently(functools.partial(os.pidfd_open, pid))
                fds.append(fd)
                process = _patiently(functools.partial(process_stat, pid))
                if process is None or process.started != started:
                    os.close(fds.pop())
                    continue
                signal.pidfd_send_signal(fd, number)
                if number == signal.SIGTERM:  # a stopped process could not act on it
                    signal.pidfd_send_signal(fd, signal.SIGCONT)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def await_exit(fds: list[int], seconds: float) -> None:
    """Wait until every process behind these pidfds has ended, at most `seconds`; closes them."""
    deadline, waiting = time.monotonic() + seconds, set(fds)
    while waiting and time.monotonic() < deadline:
        waiting.difference_update(await_any(waiting, deadline))
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def urgent() -> typing.Iterator[None]:
    """Inside, the calling thread goes before others, where that is permitted: it must outrun what
    it kills."""
    before = os.getpriority(os.PRIO_PROCESS, 0)  # of the thread, on Linux
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


def kill_family(marker: str, session: int = 0, seen: typing.Mapping[int, int] = {}) -> list[int]:
    """SIGKILL until two passes find nobody, at most KILL_LIMIT; returns the pids that were still
    there, [] as it should be.

    Whoever is found is stopped at once, and killed when a pass finds nobody new: what is stopped
    neither forks nor exits, so that no chain of forks outruns the search and no child without a
    marker loses the parent by which it is known. A pass after which an orphan was reaped does not
    count as empty: it may have been a link of such a chain.
    """
    began, empty = time.monotonic(), 0
    members: dict[int, int] = {}
    stopped: dict[int, int] = {}

    def stop(pid: int, started: int) -> None:
        if stopped.get(pid) != started:
            await_exit(send_signal({pid: started}, signal.SIGSTOP), 0)

    with urgent():
        while empty < 2 and time.monotonic() < began + KILL_LIMIT:
            members = family(marker, session, {**seen, **stopped}, stop)
            fresh = members.items() - stopped.items()
            stopped.update(members)
            if not fresh or time.monotonic() > began + KILL_LIMIT / 2:
                await_exit(send_signal(members, signal.SIGKILL), 0.5)
            ended, _ = _reap()
            empty = 0 if members or ended else empty + 1
    return sorted(members)


def _reap() -> tuple[bool, bool]:
    """Reap what jobs left and has ended: (whether something had, whether an orphan is alive that
    nobody wants to keep)."""
    path = f"/proc/self/task/{os.getpid()}/children"
    try:
        if not os.pread(_kept_open(path), 1, 0):  # as after most runs
            return False, False
        orphans = set(map(int, _read_proc(path).split())) - _OWN
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN: have the caller look everywhere
        return False, True
    ended = alive = False
    for pid in orphans:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                _KEPT.pop(pid, None)
                ended = True
            elif not alive:  # unless a job with background: keep left it
                alive = start_time(pid) != _KEPT.get(pid, 0)
        except ChildProcessError:  # another thread was faster, and the list may lack one
            ended = True
    return ended, alive


def reap_orphans() -> bool:
    """Reap what jobs left and has ended; True when an orphan is alive that nobody wants to keep.
    Any thread.

    The daemon is a subreaper: orphans become children of its main thread, so that one small file
    tells about all of them.
    """
    ended, alive = _reap()
    while ended and not alive:  # one that has just ended may have left a child
        ended, alive = _reap()
    return alive


class Tree:
    """All processes of a run, and how they are ended; a thread aside, one at a time for a run."""

    def __init__(self, trigger: Trigger, marker: str):
        self._trigger, self._marker = trigger, marker
        # {pid: start time} as found so far: one of them may clear its environment and lose its
        # parent
        self.seen: dict[int, int] = {}

    def ask_to_end(self, session: int) -> None:
        """Send SIGTERM to all of it."""
        try:
            with urgent():
                reap_orphans()  # thousands of them would make the search long
                self.seen.update(family(self._marker, session, self.seen))
                await_exit(send_signal(self.seen, signal.SIGTERM), 0)
        except OSError as error:  # SIGKILL will be tried until it works
            log.error("cannot search for the processes of %s: %s", self._trigger, error)

    def end_by_force(self, session: int) -> list[int]:
        """Kill all of it, again while the search fails. Returns the PIDs that could not be killed
        within KILL_LIMIT."""
        while True:
            try:
                return kill_family(self._marker, session, self.seen)
            except OSError as error:
                log.error("cannot search for the processes of %s: %s", self._trigger, error)
                with contextlib.suppress(OSError):
                    if session:
                        os.killpg(session, signal.SIGKILL)
                breathe(1.0)

    def end(self, session: int, kill_at: float) -> None:
        """What is left of it gets SIGTERM, time until `kill_at` (monotonic), and SIGKILL."""
        with contextlib.suppress(OSError):
            self.seen.update(family(self._marker, session, self.seen))
            left = max(0.0, kill_at - time.monotonic())
            await_exit(send_signal(self.seen, signal.SIGTERM), left)
        survivors = self.end_by_force(session)
        if survivors:
            log.error("processes %s of %s cannot be killed", survivors, self._trigger)

    def keep(self, session: int) -> None:
        """Let what is left of it be."""
        try:
            _KEPT.update(family(self._marker, session))
        except OSError as error:  # each later end of a run looks for its own in vain
            log.error("cannot search for the processes of %s: %s", self._trigger, error)


# --------------------------------------------------------------------------------------------------
# 7d the supervisor
# --------------------------------------------------------------------------------------------------
class ResultFiles:
    """Places for XXL_JOB_RESULT_FILE; any thread.

    A job of another user cannot reach the data directory, and is not trusted: its file lies in a
    directory of the temporary one in which only this daemon can create, rename and remove, under a
    name that nobody can guess.
    """

    def __init__(self, directory: str, identity: str):
        """Removes what an executor of this `identity` that crashed has left."""
        self._directory, self._prefix = directory, f"xxl-executor-{identity}-"
        self._life = secrets.token_hex(8)  # what an earlier one left is not believed
        self._lock, self._shared = threading.Lock(), ""
        # what `_identify` said of it: another one in its place is not believed
        self._shared_is: tuple[int, int] | None = None
        make_directory(directory)
        self._clear(directory)
        with contextlib.suppress(OSError):  # none is needed without jobs.*.user
            shared = glob.escape(os.path.join(tempfile.gettempdir(), self._prefix))
            for path in glob.glob(f"{shared}*"):
                status = os.lstat(path)
                if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                    self._clear(path)
                    self.remove(path)

    def _clear(self, directory: str) -> None:
        for name in os.listdir(directory):
            if name.endswith(".result"):
                self.remove(os.path.join(directory, name))

    def path(self, log_id: int) -> str:
        """For a job of the executor's own user, who creates the file if he wants to."""
        return os.path.join(self._directory, f"{self._life}-{log_id}.result")

    def create(self, user: pwd.struct_passwd) -> str:
        """A file that `user` may write. Raises OSError."""
        with self._lock:
            if self._identify() != self._shared_is:  # the first, or somebody has tidied up
                self._shared = tempfile.mkdtemp(prefix=self._prefix)
                os.chmod(self._shared, 0o711)
                self._shared_is = self._identify()
            fd, path = tempfile.mkstemp(".result", secrets.token_hex(16), self._shared)
        try:
            os.fchown(fd, user.pw_uid, user.pw_gid)
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        return path

    def _identify(self) -> tuple[int, int]:
        """Device and inode of the shared directory; (0, 0) when it is not there, or not ours: the
        inode of one that was removed is given out again."""
        with contextlib.suppress(OSError):
            status = os.lstat(self._shared)
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                return status.st_dev, status.st_ino
        return 0, 0

    def take(self, path: str, owner: int) -> str:
        """Remove what was written there, and return the end of it; "" when it is no file of
        `owner`."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:  # as of most runs
            return ""
        except OSError:
            self.remove(path)
            return ""
        try:
            status = os.fstat(fd)
            own = stat.S_ISREG(status.st_mode) and status.st_uid == owner
            if not own or status.st_nlink > 1 and owner != os.geteuid():  # a file of another run
                return ""
            data = os.pread(fd, 4 * MESSAGE_LIMIT, max(0, status.st_size - 4 * MESSAGE_LIMIT))
        finally:
            os.close(fd)
            self.remove(path)
        return readable(data).strip()

    def remove(self, path: str) -> None:
        """A file, or an empty directory. Never fails and never goes into a directory: what lies
        there belongs to a job."""
        for remove in (os.unlink, os.rmdir):
            with contextlib.suppress(OSError):
                remove(path)

    def close(self) -> None:
        self.remove(self._shared)


class Timers:
    """What is to be called later; any thread asks, the supervisor calls."""

    def __init__(self, wake: typing.Callable[[], None]):
        self._wake, self._lock = wake, threading.Lock()
        self._heap: list[list] = []  # [when (monotonic), a number, what or None]
        self._numbers, self._most = itertools.count(), 1000  # entries until the cancelled ones go

    def after(self, seconds: float, call: typing.Callable[[], typing.Any]) -> list:
        """Call `call` in the supervisor's thread; returns what `cancel` takes."""
        entry = [time.monotonic() + seconds, next(self._numbers), call]
        with self._lock:
            if len(self._heap) >= self._most:
                self._heap = [live for live in self._heap if live[2] is not None]
                heapq.heapify(self._heap)
                self._most = max(1000, 2 * len(self._heap))
            heapq.heappush(self._heap, entry)
            first = self._heap[0] is entry
        if first:
            self._wake()
        return entry

    def cancel(self, entry: list | None) -> None:
        if entry is not None:
            entry[2] = None

    def soonest(self) -> float:
        """Monotonic; infinity when nothing waits."""
        with self._lock:
            # Else each would wake the supervisor: tests/bench.py, thread: 1.04 times the runs, and
            # 1.3 times beside other load.
            while self._heap and self._heap[0][2] is None:
                heapq.heappop(self._heap)
            return self._heap[0][0] if self._heap else float("inf")

    def due(self) -> list[typing.Callable[[], typing.Any]]:
        """What is to be called now."""
        now, calls = time.monotonic(), []
        with self._lock:
            while self._heap and self._heap[0][0] <= now:
                call = heapq.heappop(self._heap)[2]
                if call is not None:
                    calls.append(call)
        return calls


class Crew:
    """At most `limit` threads that call what they are given, in order. One is started when none is
    idle; all but the last end after `idle` idle seconds, none without `idle`. With `timers` those
    beyond two are started only when a call has waited for CREW_PATIENCE and none has ended in that
    time, or when one has waited four times as long. `do`: any thread. They are daemons: one that
    never returns cannot hold the exit back."""

    def __init__(
        self, name: str, limit: int, idle: float | None = None, timers: Timers | None = None
    ):
        self._name, self._limit, self._idle, self._timers = name, limit, idle, timers
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the others
        self._threads = 0
        self._spare = 0  # idle threads; below 0: so many calls wait for one
        self._since: collections.deque[float] = collections.deque()  # of the calls that wait
        self._looking = False  # whether `_grow_if_stuck` will come
        self._done_at = 0.0  # monotonic; when a call last came to its end

    def do(self, call: typing.Callable[[], typing.Any]) -> None:
        """`call` must not raise."""
        with self._lock:
            if self._spare <= 0 and self._threads < self._limit:
                if self._timers is None or self._threads < 2:
                    self._grow()
                elif not self._looking:
                    self._look_later()
            self._spare -= 1
            self._since.append(time.monotonic())
            self._queue.put(call)

    def _look_later(self) -> None:
        assert self._timers is not None
        self._looking = True
        self._timers.after(CREW_PATIENCE, self._grow_if_stuck)

    def _grow_if_stuck(self) -> None:
        """Start threads for the calls that wait, if none has ended for CREW_PATIENCE: many that all
        get on would only be in each other's way."""
        with self._lock:
            self._looking = False
            now, first = time.monotonic(), self._since[0] if self._since else float("inf")
            stuck = now - max(first, self._done_at) >= CREW_PATIENCE
            if stuck or now - first >= 4 * CREW_PATIENCE:
                for _ in range(min(len(self._since), self._limit - self._threads)):
                    self._grow()
            if self._since:
                self._look_later()

    def begin(self) -> None:
        """Start a thread even for nothing, so that a shortage later cannot leave none."""
        with self._lock:
            self._grow()

    def _grow(self) -> None:
        name = f"{self._name}-{self._threads + 1}"
        try:
            threading.Thread(target=self._loop, name=name, daemon=True).start()
        except RuntimeError as error:  # it waits for a thread that gets free
            log.error(
                "cannot start another thread, %d %ss instead of %d: %s",
                self._threads,
                self._name,
                self._limit,
                error,
            )
            return
        self._threads += 1
        self._spare += 1

    def _loop(self) -> None:
        share_cpu()
        while True:
            try:
                call = self._queue.get(timeout=self._idle)
            except queue.Empty:
                with self._lock:
                    if self._spare > 0 and self._threads > 1:
                        self._threads -= 1
                        self._spare -= 1
                        return
                continue
            with self._lock:
                self._since.popleft()
            call()
            with self._lock:
                self._done_at = time.monotonic()
                self._spare += 1


class PythonServers:
    """One Python server for each interpreter and list to preload, until it fails or is retired:
    then `of` starts another. The supervisor's thread; `close`: once that has ended."""

    def __init__(
        self,
        environment: dict[str, str],
        identity: str,
        watch: typing.Callable[[int, typing.Callable[[], None]], None],
        unwatch: typing.Callable[[int], None],
    ):
        self._environment, self._identity = environment, identity
        self._watch, self._unwatch = watch, unwatch
        # by (interpreter, preload, where that is found, flags)
        self._servers: dict[tuple, PythonServer] = {}

    def of(self, job: JobConfig) -> PythonServer:
        """The living server for `job`, started if need be. Raises OSError."""
        # What is imported beforehand is shared by those that would find the same.
        path = job.pythonpath + (job.cwd,) if job.preload else ()
        # What such an interpreter has installed is looked at as the user, see _become.
        flags = ("-S",) if job.user and job.interpreter else ()
        key = (job.interpreter or sys.executable, job.preload, path, flags)
        server = self._servers.get(key)
        if server is None or not server.alive():
            if server is not None:
                self.retire(server)
            # as long as the marker of a run, see _take_request
            marked = {**self._environment, MARKER: f"{self._identity}-{'server':0>20}"}
            server = self._servers[key] = PythonServer(key[0], marked, job.preload, path, flags)
            self._watch(server.fd, functools.partial(self._told_by, server, job.name))
        return server

    def prepare(self, jobs: list[JobConfig]) -> None:
        """Start those that `jobs` want, anew but for that of the executor's own interpreter: what
        is preloaded may have been edited, an interpreter replaced, and some nobody may want."""
        for key in [key for key in self._servers if key[1] or key[0] != sys.executable]:
            self.retire(self._servers.pop(key))
        for job in jobs:
            try:
                self.of(job)
            except OSError as error:
                log.warning(
                    "jobs.%s.interpreter: %s cannot be started: %s",
                    job.name,
                    job.interpreter,
                    error.strerror,
                )

    def retire(self, server: PythonServer) -> None:
        """It gets no further request."""
        self._leave(server)
        server.retire()

    def _leave(self, server: PythonServer) -> None:
        """Stop watching it; again does nothing, for the number may be something else's by then."""
        if server.fd >= 0:
            self._unwatch(server.fd)
            server.fd = -1

    def _told_by(self, server: PythonServer, name: str) -> None:
        """Log which imports failed; that it has ended is noticed at its next use."""
        problems = server.import_problems()
        if problems is None:
            self._leave(server)
        for problem in problems or ():
            log.warning("jobs.%s.preload: %s", name, printable(problem))

    def close(self) -> None:
        for server in self._servers.values():
            server.close()


class Supervisor(Watched):
    """One thread over output pipes, ends and deadlines of all runs in processes.

    start, cancel, prepare and `timers`: any thread. It waits neither for a sync of the disk nor for
    the admin, nor for a lock whose holder may wait for these; what may take long has a thread of
    the crew, see `aside`.
    Each run ends with Ended(logId, result) to `report`, which also gets Expired(logId, result) of
    what is out of time and answers that with `cancel`.
    """

    def __init__(
        self,
        logs: typing.Any,
        identity: str,
        scratch: str,
        report: typing.Callable[[typing.Any], None],
    ):
        self.logs, self.identity, self._report = logs, identity, report
        self.environment = without_secrets()
        require_kernel()
        self.results = ResultFiles(scratch, identity)
        if LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise ExecutorError(
                f"cannot become the reaper of orphans: {os.strerror(ctypes.get_errno())}"
            )
        memory_kills()  # each keeps a file open: now, while there are descriptors
        reap_orphans()
        self.servers = PythonServers(self.environment, identity, self.watch, self.unwatch)
        self._runs: dict[int, ProcessRun] = {}  # by logId
        self._inbox: collections.deque[typing.Callable[[], None]] = collections.deque()
        self._handlers: dict[int, typing.Callable[[], typing.Any]] = {}  # by descriptor
        self.lines = Lines()  # for the log, at the end of a turn
        self.reports: list = []  # for the core, after that
        self._epoll = select.epoll()
        self.null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # stdin of the jobs
        self._wake_up = WakeUp()
        self._pace = Pace(0.004)
        self._asleep = self._closing = self._hurried = False
        self._memory_kills: bytes | None = None
        self.timers = Timers(self._nudge)
        self._crew = Crew("aside", ASIDE_LIMIT, 10.0, self.timers)
        self._thread = threading.Thread(target=self._loop, name="supervisor", daemon=True)

    # -- any thread

    def start_thread(self) -> None:
        self.watch(self._wake_up.fd, self._wake_up.clear)
        self._crew.begin()
        self._thread.start()

    def start(self, trigger: Trigger, job: JobConfig) -> None:
        self._post(functools.partial(self._begin, trigger, job))

    def cancel(self, log_id: int, result: Result) -> None:
        """End the run, with this result unless it has ended by itself."""
        self._post(functools.partial(self._cancel, log_id, result))

    def prepare(self, jobs: typing.Iterable[JobConfig]) -> None:
        """Warm up what `jobs` need, so that their first start is as fast as the others."""
        wanted = [job for job in jobs if job.python and job.isolation == "process"]
        self._post(functools.partial(self.servers.prepare, wanted))

    def close(self, seconds: float) -> None:
        """After `seconds` at the latest; what still runs is left to the caller."""
        self._post(functools.partial(setattr, self, "_closing", True))  # after what was posted
        if self._thread.is_alive():
            self._thread.join(seconds)
        if not self._thread.is_alive():
            self._epoll.close()
            self._wake_up.close()
            os.close(self.null)
        self.servers.close()
        self.results.close()

    def _post(self, call: typing.Callable[[], None]) -> None:
        self._inbox.append(call)
        self._nudge()

    def _nudge(self) -> None:
        if self._asleep:
            self._wake_up.wake()

    # -- the supervisor's thread

    def _loop(self) -> None:
        share_cpu()
        while not self._closing:
            self._asleep = True
            left = min(self.timers.soonest() - time.monotonic(), 3600.0)
            events = self._epoll.poll(0.0 if self._inbox else max(0.0, left) + 0.001)
            self._asleep = False
            if self._pace.keep():
                events = self._epoll.poll(0.0)
            self._busy_since = time.monotonic()
            count = len(events) + len(self._inbox)
            self._memory_kills = None
            # Looked up before any is called: a descriptor that one closes may soon be another's.
            for fd, handler in [(fd, self._handlers.get(fd)) for fd, _ in events]:
                if handler and self._handlers.get(fd) == handler:  # else closed in this turn
                    guarded(handler)
            for _ in range(len(self._inbox)):
                guarded(self._inbox.popleft())
            for call in self.timers.due():
                guarded(call)
            self._tell()
            self._pace.turned(0 if self._hurried else count)
            self._hurried, self._busy_since = False, 0.0

    def _tell(self) -> None:
        if self.lines:
            log.info(self.lines)
            self.lines = Lines()
        reports, self.reports = self.reports, []
        for message in reports:
            self._report(message)

    def watch(self, fd: int, handler: typing.Callable[[], typing.Any]) -> None:
        """Have `handler` called while there is something to read, or the end."""
        self._epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """To be called before `fd` is closed: a child that is being started may hold it open, and
        epoll would go on telling of it."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def aside(
        self, work: typing.Callable[[], typing.Any], done: typing.Callable[[typing.Any], None]
    ) -> None:
        """Have a thread of the crew do `work`, then call `done` with its value or its exception."""

        def act() -> None:
            try:
                value = work()
            except Exception as error:
                value = error
            self._post(functools.partial(done, value))

        self._crew.do(act)

    def end_silent_server(self, server: PythonServer, ended: frozenset[int] = frozenset()) -> None:
        """A server retired for its silence is left alone while its children run; once one of them
        had ended at the last look too, by `ended`, and has not been reported, it is killed."""
        children = [run.child_of(server) for run in self._runs.values()]
        now = frozenset(child.pid for child in children if child and has_ended(child.pid))
        if now & ended:
            server.kill()
        elif any(children):
            self.timers.after(SERVER_LIMIT, lambda: self.end_silent_server(server, now))

    def hurry(self) -> None:
        """Go on at once after this turn: a pipe was full, and holds its job up."""
        self._hurried = True

    def memory_kills(self) -> bytes:
        """memory_kills() as of this turn, in which many runs may begin."""
        if self._memory_kills is None:
            self._memory_kills = memory_kills()
        return self._memory_kills

    def _begin(self, trigger: Trigger, job: JobConfig) -> None:
        try:
            run = self._runs[trigger.log_id] = ProcessRun(self, trigger, job)
        except Exception as error:  # such as no free descriptor
            told = f"cannot start: {getattr(error, 'strerror', None) or error}"
            log.error("%s: %s", trigger, told)
            self.reports.append(Ended(trigger.log_id, Result(FAILURE, told)))
        else:
            run.guarded(run.begin)

    def _cancel(self, log_id: int, result: Result) -> None:
        run = self._runs.get(log_id)
        if run is not None:
            run.guarded(functools.partial(run.cancel, result))

    def ended(self, run: EndingRun, result: Result) -> None:
        self._runs.pop(run.trigger.log_id, None)
        self.reports.append(Ended(run.trigger.log_id, result))


def start_note(trigger: Trigger, timeout: float, where: str) -> str:
    """What a run's log says when it starts in `where`."""
    return (
        f"{trigger} shard={trigger.shard_index}/{trigger.shard_total}"
        f" timeout={timeout_text(timeout)} {where}"
        f" param={json.dumps(trigger.param, ensure_ascii=False)}"
    )


def end_note(result: Result, seconds: float) -> str:
    """What a run's log says at its end, and `exec` on stderr."""
    shown = " ".join(result.message.split())[:500]
    how = "succeeded" if result.code == SUCCESS else "failed"
    return f"{how} after {seconds_text(seconds)}: code {result.code}{', ' + shown if shown else ''}"


# --------------------------------------------------------------------------------------------------
# 7e one run in a process
# --------------------------------------------------------------------------------------------------
class RunPhase(enum.Enum):
    """What a run in a process waits for."""

    STARTING = "its PID"
    RUNNING = "its end, its deadline, a cancellation"
    TERMINATING = "its end after SIGTERM, for kill_grace"
    KILLING = "a thread that kills its whole tree"
    LEFTOVERS = "a thread that ends what it has left, or lets it be"
    ENDED = "nothing"


class Launch:
    """What the process of a run needs: user, pipe for its output, result file, environment and
    command. `make`: a thread aside, for a disk or a directory service may not answer;
    the rest: the supervisor's."""

    def __init__(self, supervisor: Supervisor, trigger: Trigger, job: JobConfig, timeout: float):
        self._supervisor, self._trigger, self._job = supervisor, trigger, job
        self._timeout = timeout
        # Always of one length (see _take_request); `+` for a job whose background processes may
        # stay when it has finished.
        sign = "+" if job.background == "keep" else "-"
        self.marker = f"{supervisor.identity}{sign}{trigger.log_id:020d}"
        self._result_file = "" if job.user else supervisor.results.path(trigger.log_id)
        self._owner = os.geteuid()  # of the result file
        self._user: pwd.struct_passwd | None = None
        self._as_user: dict[str, typing.Any] = {}  # of subprocess.Popen
        self.read = self.write = -1  # where its output comes from, and goes to
        self.memory_kills = supervisor.memory_kills()  # of the control group, when it began

    def make(self) -> Child | None:
        """The process; None when a Python server is to fork it. Raises OSError, ValueError and
        KeyError, see `why_not`."""
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)  # a job may read its own pipe empty
        if self._job.user:
            user = self._user = pwd.getpwnam(self._job.user)
            groups = os.getgrouplist(user.pw_name, user.pw_gid)
            self._as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}
            if not self._result_file:
                self._result_file = self._supervisor.results.create(user)
                self._owner = user.pw_uid
            os.fchown(self.write, user.pw_uid, user.pw_gid)  # for who opens /dev/stderr anew
        if self._job.python:
            os.stat(self._job.cwd)  # the child would report it with less to go by
            return None
        # A disk that hangs must hang this thread, not a child on its way there: that has copies of
        # the pipes of other starts, which would hang too, and before CPython 3.11.4 all threads
        # wait for it.
        for place in (self._job.cwd, *(self._job.command or ())[:1]):
            with contextlib.suppress(OSError):
                os.stat(place)
        return self._execute()

    def _execute(self) -> Child:
        """Start the program of a job that is not in Python. Without user= and preexec_fn subprocess
        uses vfork, which costs the same however large the daemon is."""
        trigger, job = self._trigger, self._job
        shards = {"shard_index": str(trigger.shard_index), "shard_total": str(trigger.shard_total)}
        if job.shell:
            command = ["/bin/sh", "-c", job.shell, job.name, trigger.param, *shards.values()]
        else:
            values = {"param": trigger.param, **shards}
            command = [
                re.sub(r"\{(param|shard_index|shard_total)\}", lambda match: values[match[1]], word)
                for word in job.command
            ]
        with all_cpus():
            popen = subprocess.Popen(
                command,
                cwd=job.cwd,
                env=self._environment(),
                stdin=self._supervisor.null,
                stdout=self.write,
                stderr=self.write,
                start_new_session=True,
                **self._as_user,
            )
        return Child(popen)

    def _environment(self) -> dict[str, str]:
        """Of its process; the parameter too, which the kernel limits to 128 KiB."""
        trigger, job = self._trigger, self._job
        environment = {
            **self._supervisor.environment,
            **job.env,
            MARKER: self.marker,
            "XXL_JOB_ID": str(trigger.job_id),
            "XXL_JOB_LOG_ID": str(trigger.log_id),
            "XXL_JOB_HANDLER": trigger.handler,
            "XXL_JOB_PARAM": trigger.param,
            "XXL_JOB_SHARD_INDEX": str(trigger.shard_index),
            "XXL_JOB_SHARD_TOTAL": str(trigger.shard_total),
            "XXL_JOB_TRIGGER_TIME": str(trigger.log_date_time),
            "XXL_JOB_TIMEOUT": str(self._timeout),
            "XXL_JOB_RESULT_FILE": self._result_file,
        }
        user = self._user
        if user is not None:
            environment.update(HOME=user.pw_dir, USER=user.pw_name, LOGNAME=user.pw_name)
        return environment

    def request(self) -> dict:
        """What a Python server's child is to run, as `_execute` for others; a key that concerns the
        process itself needs a line here and in `_become`."""
        job = self._job
        return {
            "entry_point": job.python,
            "pythonpath": job.pythonpath,
            "cwd": job.cwd,
            "user": job.user,
            "env": self._environment(),
            "context": {**vars(self._trigger), "timeout": self._timeout},
        }

    def why_not(self, error: Exception) -> str:
        """What to tell of an error of `make`, or of a Python server that cannot fork: it names the
        program or the key."""
        job = self._job
        if isinstance(error, KeyError):
            return f"cannot start: there is no user {job.user} on this host (jobs.{job.name}.user)"
        if isinstance(error, ValueError):
            return (
                "cannot start: the parameter holds a NUL or a character that no command line can"
                " carry"
            )
        if not os.path.isdir(job.cwd):
            return f"cannot start: the directory {job.cwd} does not exist (jobs.{job.name}.cwd)"
        if isinstance(error, OSError) and error.errno == errno.E2BIG:
            size = len(self._trigger.param.encode("utf-8", "replace"))
            return (
                f"cannot start: the parameter of {size} bytes is longer than the kernel passes to a"
                " program"
            )
        if job.user and isinstance(error, PermissionError):
            return (
                f"cannot start: this executor may not become the user {job.user}: run it as root,"
                f" or remove jobs.{job.name}.user"
            )
        program = (
            job.interpreter or sys.executable
            if job.python
            else job.command[0]
            if job.command
            else "/bin/sh"
        )
        why = getattr(error, "strerror", None) or error
        not_found = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOEXEC)
        if job.command and "/" in program and not_found:
            why = unstartable(place_of(job, program)) or why
        return f"cannot start {program}: {why}"

    def close_write(self) -> None:
        """Our copy of the end that the process writes to."""
        if self.write >= 0:
            os.close(self.write)
            self.write = -1

    def close_output(self) -> None:
        self.close_write()
        if self.read >= 0:
            self._supervisor.unwatch(self.read)
            os.close(self.read)
            self.read = -1

    def pump(self, out: typing.Any) -> bool:
        """Have `out` write what is in the pipe, at most _CHUNK bytes; whether something was."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.read, _CHUNK) if self.read >= 0 else b""
            if data:
                out.write(data)
                if len(data) > _CHUNK // 2:
                    self._supervisor.hurry()
                return True
            self.close_output()
        return False

    def message(self) -> str:
        """What the job wrote into its result file, which is gone then."""
        path, self._result_file = self._result_file, ""
        return self._supervisor.results.take(path, self._owner)

    def close(self) -> None:
        self.close_output()
        if self._result_file:
            self._supervisor.results.remove(self._result_file)


def result_of(
    status: int | None, cancelled: Result | None, message: str, last: str, starved: bool
) -> Result:
    """How a run in a process ended. `status`: of its process, None for one that cannot be killed;
    `cancelled`: why it was being ended; `message`: what the job told; `last`: its last line;
    `starved`: it was killed while the kernel killed something for want of memory."""
    if cancelled is not None:
        told = cancelled.message + ("; its process cannot be killed" if status is None else "")
        exit_status = 124 if cancelled.code == TIMEOUT else _shell_status(status)
        return Result(cancelled.code, told, exit_status)
    assert status is not None
    if status == 0:
        return Result(SUCCESS, message or last, 0)
    if status < 0:
        why = ""
        if starved:
            why = (
                ": the kernel ended it for want of memory, of the host or of this service or"
                " container"
            )
        return Result(FAILURE, f"killed by signal {-status}{why}", _shell_status(status))
    shown = f"exit status {status}: {last}" if last else f"exit status {status}"
    return Result(FAILURE, message or shown, status)


class EndingRun:
    """The fields of a ProcessRun, and how it ends: by a cancellation, or with its process. What
    comes before is in ProcessRun. The supervisor's thread.

    A thread aside does what may take long, one thing at a time: until it has done so,
    the main process is not reaped, and its PID and session are nobody else's.
    """

    def __init__(self, supervisor: Supervisor, trigger: Trigger, job: JobConfig):
        self._supervisor, self.trigger, self._job = supervisor, trigger, job
        self.phase, self._began = RunPhase.STARTING, time.monotonic()
        self._timeout = job.limit(trigger)
        self._launch = Launch(supervisor, trigger, job, self._timeout)
        self._child: Child | ForkedChild | None = None
        self._forks_tried = 0  # to have it forked by a Python server
        self._status: int | None = None
        self._cancelled: Result | None = None
        self._kill_at: float | None = None  # monotonic; set when the run is being ended
        self._awaited = False  # the main process is dead, its status has not come
        self._tree = Tree(trigger, self._launch.marker)
        self._aside = False  # a thread aside works for this run
        self._timer: list | None = None
        self._blank: list | None = None  # the timer of the start note
        self._postponed: typing.Callable[[], None] | None = None  # the timer that ran out meanwhile
        self._broken = ""  # what went wrong while a thread aside worked for this run
        self.out = supervisor.logs.open(trigger)  # last: nobody closes it if anything else fails

    # -- what moves it on

    def guarded(self, step: typing.Callable[[], typing.Any]) -> None:
        """Whatever fails, the run ends, and its tree before it."""
        try:
            step()
        except Exception as error:
            log.exception("unexpected error, please report it: %s", self.trigger)
            self._fail(f"the executor failed: {type(error).__name__}: {error}")

    def _call_later(self, seconds: float, call: typing.Callable[[], None]) -> None:
        """Set the one timer of the run: it replaces the last."""
        timers = self._supervisor.timers
        timers.cancel(self._timer)

        def due() -> None:
            if self._aside:
                self._postponed = call
            else:
                self.guarded(call)

        self._timer = timers.after(seconds, due)

    def _apart(
        self,
        work: typing.Callable[[], typing.Any],
        then: typing.Callable[[typing.Any], None] | None = None,
    ) -> None:
        """Have a thread aside do `work`. Then comes a failure that happened meanwhile, else `then`
        with its value or exception. Without `then` its exception is raised, else comes the end or
        the timer that came meanwhile. Never two at a time."""
        self._aside = True

        def done(value: typing.Any) -> None:
            self._aside, postponed = False, self._postponed
            self._postponed = None
            if self._broken:
                self._fail(self._broken)
                return
            if isinstance(value, Exception) and then is None:
                raise value
            if then is not None:
                then(value)
            elif self._status is not None:
                self._end_leftovers()
            elif postponed is not None:
                postponed()

        self._supervisor.aside(work, lambda value: self.guarded(lambda: done(value)))

    # -- RUNNING

    def _poll_end(self) -> bool:
        """Whether the main process has ended: then its leftovers are next."""
        assert self._child is not None
        if self._status is None:
            self._status = self._child.poll()
            if self._status is None:
                return False
            self._supervisor.unwatch(self._child.fd)
            self._supervisor.timers.cancel(self._timer)
            if not self._aside:
                self._end_leftovers()
        return True

    def _has_ended(self, again: typing.Callable[[], None]) -> bool:
        """Whether the main process has ended; when it is dead and its status has not come, `again`
        is called after SERVER_LIMIT."""
        assert self._child is not None
        if self._poll_end():
            return True
        if not self._awaited and has_ended(self._child.pid):
            self._awaited = True
            self._call_later(SERVER_LIMIT, again)
            return True
        return False

    def cancel(self, result: Result) -> None:
        """The first reason counts, a later one shortens nothing, and none counts once the main
        process has ended."""
        if self._cancelled is None and self._status is None:
            self._cancelled = result
            if self.phase is RunPhase.RUNNING:
                self._terminate()

    # -- TERMINATING, KILLING

    def _terminate(self) -> None:
        """SIGTERM by Tree.ask_to_end now, `_kill` after kill_grace."""
        if self._has_ended(self._terminate):
            return
        self.phase = RunPhase.TERMINATING
        self._kill_at = time.monotonic() + self._job.kill_grace
        self._call_later(self._job.kill_grace, self._kill)
        assert self._child is not None
        child = self._child
        self._apart(lambda: self._tree.ask_to_end(child.session))

    def _kill(self) -> None:
        assert self._child is not None
        child, self.phase = self._child, RunPhase.KILLING
        self._call_later(
            KILL_LIMIT, self._end_leftovers
        )  # a process that even SIGKILL does not end
        self._apart(lambda: self._tree.end_by_force(child.session))

    def _fail(self, message: str) -> None:
        """Something unexpected happened: end the tree by force, then the run."""
        self._supervisor.unwatch(self._launch.read)  # it may be what fails
        if self._aside or self.phase is RunPhase.ENDED:
            self._broken = message  # until the thread aside is back, if there is one
            return
        session = self._child.session if self._child is not None else 0
        result = Result(FAILURE, message)
        self.phase, self._broken = RunPhase.LEFTOVERS, ""
        self._supervisor.timers.cancel(self._timer)
        self._apart(lambda: self._tree.end_by_force(session), lambda value: self._finish(result))

    # -- LEFTOVERS

    def _end_leftovers(self) -> None:
        assert self._child is not None
        child, self.phase = self._child, RunPhase.LEFTOVERS
        self._supervisor.timers.cancel(self._timer)
        # The children of a Python server that has just died may not be ours yet.
        if not reap_orphans() and not child.lost:
            self._drain()
        elif self._job.background == "kill" or self._kill_at is not None or child.lost:
            kill_at = self._kill_at or time.monotonic() + self._job.kill_grace
            self._apart(lambda: self._tree.end(child.session, kill_at), self._drain)
        else:
            self._apart(lambda: self._tree.keep(child.session), self._drain)

    def _drain(self, value: typing.Any = None) -> None:
        """Take what is in the pipe now, not until its end: a process that was kept may write for
        ever."""
        for _ in range(64):
            if not self._launch.pump(self.out):
                break
        self._finish(self._result())

    def _result(self) -> Result:
        assert self._child is not None
        message = self._child.message or self._launch.message()
        # `_kill_at` is set only by a cancellation that came before its end.
        cancelled = self._cancelled if self._kill_at is not None else None
        killed = self._status == -signal.SIGKILL
        before = self._launch.memory_kills
        starved = killed and before != b"" and memory_kills() not in (before, b"")
        return result_of(self._status, cancelled, message, self.out.last_line(), starved)

    # -- ENDED

    def _finish(self, result: Result) -> None:
        self.phase = RunPhase.ENDED
        for timer in (self._timer, self._blank):
            self._supervisor.timers.cancel(timer)
        try:
            self._give_back_child()
            self._launch.close()
            self.out.end(end_note(result, time.monotonic() - self._began))
        finally:
            result = dataclasses.replace(result, message=clip(result.message))
            self._supervisor.ended(self, result)

    def _give_back_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            self._supervisor.unwatch(child.fd)
            child.close()


class ProcessRun(EndingRun):
    """One run in a process of its own, from its start to the end of its whole tree; the
    supervisor's thread."""

    def child_of(self, server: PythonServer) -> ForkedChild | None:
        """Its process, if `server` has forked it and not told of its end; what it tells is left to
        `_on_child`."""
        child = self._child if isinstance(self._child, ForkedChild) else None
        return child if child and child.pid and child.server is server else None

    # -- STARTING

    def begin(self) -> None:
        self._apart(self._make, self._made)

    def _make(self) -> str:
        """In a thread aside. Returns why it cannot start."""
        try:
            self._child = self._launch.make()
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, Unwatched):
                self._tree.end_by_force(0)
            return self._launch.why_not(error)
        return ""

    def _made(self, failure: typing.Any) -> None:
        """`failure`: what `_make` returned, or an exception."""
        if isinstance(failure, Exception):
            raise failure
        if not failure and self._child is None:
            try:
                server = self._supervisor.servers.of(self._job)
                self._child = server.fork(self._launch.write)
                self._forks_tried += 1
            except OSError as error:
                busy = isinstance(error, BlockingIOError) and self._cancelled is None
                if busy and time.monotonic() < self._began + PRELOAD_LIMIT:
                    self._call_later(0.1, lambda: self._made(""))
                    return
                failure = self._launch.why_not(error)
        self._launch.close_write()
        if failure:
            self._cannot_start(failure)
            return
        assert self._child is not None
        pump = functools.partial(self._launch.pump, self.out)
        for fd, step in ((self._launch.read, pump), (self._child.fd, self._on_child)):
            self._supervisor.watch(fd, functools.partial(self.guarded, step))
        if self._child.pid:
            self._run()
        else:
            assert isinstance(self._child, ForkedChild)
            limit = SERVER_LIMIT if self._child.server.ready else PRELOAD_LIMIT
            self._call_later(limit, self._server_silent)

    def _on_started(self) -> None:
        """The Python server has answered, or is gone."""
        child = self._child
        assert isinstance(child, ForkedChild)
        child.poll()
        if child.pid:
            child.server.answered_at = time.monotonic()
            child.send_request(self._launch.request())
            self._run()
            if self.phase is RunPhase.RUNNING:  # its end may have been told with its PID
                self._poll_end()
        elif child.error:
            self._give_back_child()
            self._cannot_start(self._launch.why_not(OSError(errno.EAGAIN, child.error)))
        elif child.lost:
            # its end is seen before it can be waited for
            self._supervisor.servers.retire(child.server)
            self._give_back_child()
            if child.server.too_old():
                self._cannot_start(f"cannot start: {OLD_PYTHON.format(self._job.interpreter)}")
            elif self._forks_tried > 1:
                lost = ConnectionError(errno.ECONNRESET, "the Python server ended unexpectedly")
                self._cannot_start(self._launch.why_not(lost))
            else:  # it died, or was dying, before it answered: once more, with a new one
                self._launch.close_output()
                self.begin()

    def _server_silent(self) -> None:
        """The Python server does not answer: the next run gets a new one. One that answers others
        has much to do."""
        assert isinstance(self._child, ForkedChild)
        server, now = self._child.server, time.monotonic()
        left = min(server.answered_at + SERVER_LIMIT, self._began + PRELOAD_LIMIT) - now
        if left > 0:
            self._call_later(left, self._server_silent)
            return
        self._supervisor.servers.retire(server)
        self._supervisor.timers.after(
            SERVER_LIMIT, lambda: self._supervisor.end_silent_server(server)
        )
        self._give_back_child()  # without a request its process ends
        silent = TimeoutError(errno.ETIMEDOUT, "the Python server does not answer")
        self._cannot_start(self._launch.why_not(silent))

    def _cannot_start(self, why: str) -> None:
        self._tell_start("pid=none")
        self._finish(Result(FAILURE, why, 127))

    def _tell_start(self, where: str) -> None:
        self._supervisor.lines.append(self.trigger.started(self._timeout, where))
        self.out.begin(start_note(self.trigger, self._timeout, where))

    # -- RUNNING

    def _run(self) -> None:
        """Its process is known, whoever started it: tell the start, and set its timeout."""
        assert self._child is not None
        self.phase = RunPhase.RUNNING
        self._tree.seen.update(self._child.seen)
        failpoint("forked")
        self._tell_start(f"pid={self._child.pid}")
        # The admin's page of a job that says nothing must not stay blank.
        self._blank = self._supervisor.timers.after(0.5, self.out.flush)
        if self._cancelled is not None:
            self._terminate()
        elif self._timeout:
            self._call_later(self._timeout - (time.monotonic() - self._began), self._expire)
        else:
            self._supervisor.timers.cancel(self._timer)

    def _on_child(self) -> None:
        if self.phase is RunPhase.STARTING:
            self._on_started()
        else:
            self._poll_end()

    def _expire(self) -> None:
        """Its time is over: the core stores that and answers by `cancel`; else it is cancelled
        after STORE_LIMIT."""
        if self._has_ended(self._expire):
            return
        result = Result(TIMEOUT, f"timed out after {seconds_text(self._timeout)}")
        self._supervisor.reports.append(Expired(self.trigger.log_id, result))
        self._call_later(STORE_LIMIT, functools.partial(self.cancel, result))


def _shell_status(status: int | None) -> int:
    """An exit status as a shell shows it: 128 and the number of the signal that ended the
    process."""
    if status is None:
        status = -signal.SIGKILL
    return 128 - status if status < 0 else status


# --------------------------------------------------------------------------------------------------
# 7f jobs with isolation: thread
# --------------------------------------------------------------------------------------------------


class ThreadOutput:
    """sys.stdout or sys.stderr while jobs may run in threads: what such a thread writes goes into
    its run's log."""

    def __init__(self, original: typing.Any, local: threading.local):
        self.original, self.local = original, local

    def write(self, text: str) -> int:
        sink = getattr(self.local, "sink", None)
        return sink(text) if sink is not None else self.original.write(text)

    def writelines(self, lines: typing.Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def captures(self) -> bool:
        """Whether what this thread writes goes into a run's log."""
        return getattr(self.local, "sink", None) is not None

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self.original, name)


class ThreadRun:
    """One run in a thread of the daemon, cooperative: `Context.cancelled` asks it to return."""

    def __init__(self, trigger: Trigger, job: JobConfig):
        self.trigger, self.job = trigger, job
        self.timeout = job.limit(trigger)
        self.context = Context({**vars(trigger), "timeout": self.timeout}, self.write)
        self.cancelled: Result | None = None
        self.stuck_timer: list | None = None  # the timer that tells that it does not return
        self.out: typing.Any = None

    def write(self, text: str) -> int:
        self.out.write(text.encode("utf-8", "backslashreplace"))
        return len(text)

    def call(self) -> Result:
        """Call the job, in a slot's thread."""
        for entry in (self.job.cwd, *reversed(self.job.pythonpath)):
            if entry not in sys.path:
                sys.path.insert(0, entry)
        try:
            return Result(
                SUCCESS, call_entry_point(self.job.python, self.context) or self.out.last_line()
            )
        except BaseException as error:  # sys.exit() in a job must not end a slot's thread
            if isinstance(error, SystemExit) and error.code in (None, 0):
                return Result(SUCCESS, self.out.last_line())
            trace = _job_frames(error.__traceback__)
            self.write("".join(traceback.format_exception(type(error), error, trace)))
            return Result(FAILURE, exception_line(error))


class Slots:
    """At most `limit` threads for jobs with isolation: thread; start and cancel: the core's thread.

    `report` gets Ended, Expired and Stuck, see Supervisor."""

    def __init__(
        self,
        limit: int,
        logs: typing.Any,
        timers: Timers,
        report: typing.Callable[[typing.Any], None],
    ):
        self._logs, self._timers, self._report = logs, timers, report
        self._crew = Crew("slot", limit)
        self._runs: dict[int, ThreadRun] = {}  # by logId
        self._local = threading.local()  # `sink` is where the output of a job in this thread goes
        self._streams: tuple | None = None

    def prepare(self, jobs: typing.Iterable[JobConfig]) -> None:
        """Have what threads of jobs print go to their run's log, if one of `jobs` needs it; before
        the first of them runs; main thread."""
        if self._streams is None and any(job.isolation == "thread" for job in jobs):
            self._streams = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = (ThreadOutput(stream, self._local) for stream in self._streams)
            self._crew.begin()

    def start(self, trigger: Trigger, job: JobConfig) -> None:
        run = self._runs[trigger.log_id] = ThreadRun(trigger, job)
        self._crew.do(functools.partial(self._work, run))

    def cancel(self, log_id: int, result: Result) -> None:
        run = self._runs.get(log_id)
        if run is not None and run.cancelled is None:
            run.cancelled = result
            run.context.cancelled.set()
            tell = functools.partial(self._report, Stuck(log_id))
            run.stuck_timer = self._timers.after(run.job.kill_grace, tell)

    def close(self) -> None:
        if self._streams is not None:
            sys.stdout, sys.stderr = self._streams

    def _work(self, run: ThreadRun) -> None:
        try:
            result = self._serve(run)
        except Exception as error:  # a slot's thread must survive whatever a run does
            log.exception("unexpected error, please report it: %s", run.trigger)
            result = Result(FAILURE, f"the executor failed: {type(error).__name__}: {error}")
        self._runs.pop(run.trigger.log_id, None)
        self._timers.cancel(run.stuck_timer)
        self._report(Ended(run.trigger.log_id, result))

    def _serve(self, run: ThreadRun) -> Result:
        trigger, began = run.trigger, time.monotonic()
        run.out = self._logs.open(trigger)
        where = f"pid={os.getpid()} thread={threading.current_thread().name}"
        run.out.begin(start_note(trigger, run.timeout, where))
        expired = Result(TIMEOUT, f"timed out after {seconds_text(run.timeout)}")
        tell = functools.partial(self._report, Expired(trigger.log_id, expired))
        timer = self._timers.after(run.timeout, tell) if run.timeout else None
        blank = self._timers.after(0.5, run.out.flush)
        self._local.sink = run.write
        with all_cpus():
            result = run.cancelled or run.call()
        self._local.sink = None
        for entry in (timer, blank):
            self._timers.cancel(entry)
        result = run.cancelled or result
        run.out.end(end_note(result, time.monotonic() - began))
        return dataclasses.replace(result, message=clip(result.message))


# --------------------------------------------------------------------------------------------------
# 8 job logs
# --------------------------------------------------------------------------------------------------
PAGE_LIMIT = 4 << 20  # bytes of the log in one reply to /log, where they stand twice, as JSON
_CONTROLS = bytes(set(range(1, 0x20)) - set(b"\b\t\n\f\r"))  # each is six bytes in JSON
_INDEXED_FILES = 256  # how many files the positions of lines are remembered for


def encoded_size(data: bytes) -> int:
    """How many bytes `data` takes as JSON text, a NUL as U+FFFD."""
    controls = len(data) - len(data.translate(None, _CONTROLS))
    escaped = len(data) - len(data.translate(None, b'\b\t\n\f\r"\\'))
    text_size = len(data.decode("utf-8", "replace").encode())
    return text_size + 5 * controls + escaped + 2 * data.count(b"\0")


def fitting(data: bytes, limit: int, step: int = 1) -> int:
    """How many bytes of `data`, at most `limit`, take at most a tenth more than `limit` as JSON
    text; from its end with `step` -1. The ends of lines, two bytes there, are given a tenth."""
    most, count = limit + limit // 10, min(len(data), limit)
    while 6 * count > most:
        size = encoded_size(data[:count] if step == 1 else data[len(data) - count :])
        if size <= most:
            break
        count = count * most // size
    return count


def cut_short(data: bytes, end: int) -> int:
    """How many bytes before `end` belong to a UTF-8 character that goes on there."""
    for back in range(min(end, 3) + 1):
        if data[end - back] & 0xC0 != 0x80:  # where a character begins
            return back
    return 0  # it is something else than UTF-8


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 with milliseconds and the offset from UTC."""
    at = datetime.datetime.fromtimestamp(seconds).astimezone()
    return at.isoformat(timespec="milliseconds")


@functools.lru_cache(2)
def local_time(second: int) -> str:
    """Seconds since the epoch in local time, as job logs and tables show it; remembered, for most
    notes of a second are written in a row."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
    except (OverflowError, ValueError, OSError):  # of a page that was damaged unnoticed
        return "?"


class RunLog:
    """The log of one run; written by the supervisor, or by the threads of a job in a thread, whose
    first note the supervisor may flush."""

    def __init__(
        self,
        fd: int,
        limit: int,
        echo: typing.Callable[[list[bytes]], None] | None = None,
        full: typing.Callable[[], bool] = lambda: False,
        lost: typing.Callable[[int], None] = lambda size: None,
    ):
        """`echo(lines)`: where the output goes too (executor.log_to_stdout). While `full()` nothing
        is written: what is left of the disk is for results. `lost(bytes)` is told at the end how
        much was dropped."""
        # A finalizer of a job in a thread may write in the middle of `write`, in the same thread.
        self._fd, self._limit, self._lock, self._full = fd, limit, threading.RLock(), full
        self._left, self._lost = limit, lost
        self._pending = b""  # a note that goes out with the first output
        self._echo, self._line = echo, b""
        self._tail = b""  # the last output, for `last_line`
        self.dropped = self._gap = 0  # bytes, in all and since the last that could be written

    def write(self, data: bytes) -> None:
        """Append output, which may begin and end within a line; what is beyond the limit or cannot
        be written is counted and dropped, the run goes on."""
        with self._lock:
            self._tail = data[-4096:] if len(data) >= 4096 else (self._tail + data)[-4096:]
            self._echo_lines(data)
            part = data[: self._left]
            if len(part) < len(data):  # not in the middle of a character
                part = part[: len(part) - cut_short(data, len(part))]
            if part:
                self._left -= len(part)
                self._append(part)
            if len(part) < len(data):
                self._left = 0
                if not self.dropped:
                    self._append(
                        f"\n----- output beyond executor.log_limit ({self._limit} bytes) is dropped"
                        " -----\n".encode()
                    )
                self.dropped += len(data) - len(part)

    def _echo_lines(self, data: bytes, end: bool = False) -> None:
        if self._echo is None:
            return
        *lines, self._line = (self._line + data).split(b"\n")
        if self._line and (end or len(self._line) > _CHUNK):
            lines, self._line = [*lines, self._line], b""
        if lines:
            self._echo(lines)

    def _append(self, data: bytes) -> None:
        """Into the file: output and notes."""
        data, self._pending = self._pending + data, b""
        notice = (
            f"\n----- {self._gap} bytes could not be written here -----\n".encode()
            if self._gap
            else b""
        )
        size, data = len(data), notice + data
        try:
            while data and self._fd >= 0 and not self._full():
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            if not self.dropped:
                self._cannot_write(error)
        if len(data) <= size:
            self._gap = 0
        lost = min(len(data), size)
        self._gap, self.dropped = self._gap + lost, self.dropped + lost

    def _cannot_write(self, error: OSError) -> None:
        log.error("cannot write a job log, output is dropped: %s", error.strerror)

    def _note(self, text: str) -> bytes:
        return f"----- {local_time(int(time.time()))} {text} -----\n".encode("utf-8", "replace")

    def begin(self, text: str) -> None:
        """The first note; it is written with the first output, or by `flush`."""
        with self._lock:
            self._pending = self._note(text)

    def flush(self) -> None:
        """Never waits: whoever writes just now writes that note too."""
        if self._lock.acquire(blocking=False):
            try:
                if self._pending and self._fd >= 0:
                    self._append(b"")
            finally:
                self._lock.release()

    def end(self, text: str) -> None:
        """Write the last note, on a line of its own, and close the file."""
        with self._lock:
            self._echo_lines(b"", end=True)
            unfinished = self._tail and not self._tail.endswith(b"\n") and not self.dropped
            self._append((b"\n" if unfinished else b"") + self._note(text))
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1
        self._lost(self.dropped)

    def last_line(self) -> str:
        """The last line of output that is not empty."""
        lines = readable(self._tail).split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def readable(data: bytes) -> str:
    return data.decode("utf-8", "replace").replace("\0", "\ufffd")


def page(first: int, last: int, content: str, end: bool) -> dict:
    """Lines `first` to `last` of a log, as the admin reads them; `end`: it need not ask again."""
    return {"fromLineNum": first, "toLineNum": last, "logContent": content, "isEnd": end}


class LogPages:
    """Reads logs by page, and remembers where lines begin; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # (logId, inode): [(line, offset), ...], about one for each _CHUNK, the last one where the
        # last page ended
        self._index: collections.OrderedDict[tuple, list] = collections.OrderedDict()

    def read(self, fd: int, log_id: int, first: int, ended: bool, limit: int, where: str) -> dict:
        """Lines from `first` of the open file `where`, at most `limit` bytes; see JobLogs.page."""
        status = os.fstat(fd)
        size, key = status.st_size, (log_id, status.st_ino)
        line, start = self._seek(fd, key, first, size)
        if line < first:
            return page(first, first - 1, "", ended)
        # at once: pieces would stay with the allocator, for each thread that reads
        data = os.pread(fd, min(limit, size - start), start)
        fits = fitting(data, limit)
        cut, data = fits < len(data) or start + limit < size, data[:fits]
        if ended and first == 1 and cut:
            return self._long(fd, key, size, limit, where)
        at_end = start + len(data) >= size
        whole_lines = data if ended and at_end else data[: data.rfind(b"\n") + 1]
        if not whole_lines and cut:
            line, after = self._seek(fd, key, first + 1, size)
            if line == first and not ended:  # the line goes on
                return page(first, first - 1, "", ended)
            shown = data + f" ... [line of {after - start} bytes, cut]\n".encode()
            return page(first, first, readable(shown), ended and after >= size)
        lines = whole_lines.count(b"\n")
        lines += bool(whole_lines) and not whole_lines.endswith(b"\n")
        end = start + len(whole_lines)
        self._remember(key, first + lines, end)
        text = readable(whole_lines)
        return page(first, first + lines - 1, text, ended and end >= size)

    def _long(self, fd: int, key: tuple, size: int, limit: int, where: str) -> dict:
        """A finished log beyond the limit: the admin asks for it once, so it gets the head, a
        notice and the tail."""
        half = min(limit, size) // 2
        head, tail = os.pread(fd, half, 0), os.pread(fd, half, size - half)
        head = head[: fitting(head, limit // 2)]
        tail = tail[len(tail) - fitting(tail, limit // 2, -1) :]
        head = head[: head.rfind(b"\n") + 1] or head
        tail = tail[tail.find(b"\n") + 1 :] or tail
        lines = self._seek(fd, key, sys.maxsize, size)[0] - tail.endswith(b"\n")
        left_out = size - len(head) - len(tail)
        notice = (
            f"\n----- {left_out} bytes are left out here; the whole log is {where} on"
            f" {socket.gethostname()} -----\n\n"
        )
        return page(1, lines, readable(head) + notice + readable(tail), True)

    def _seek(self, fd: int, key: tuple, line: int, size: int) -> tuple[int, int]:
        """(line, offset) where `line` begins, or of the last line that begins before `size`; reads
        only from the next known position on."""
        with self._lock:
            known = [
                mark for mark in self._index.get(key, ()) if mark[0] <= line and mark[1] <= size
            ]
        at, offset = max(known, default=(1, 0))
        while at < line and offset < size:
            data = os.pread(fd, min(_CHUNK, size - offset), offset)
            if not data:
                break
            count = data.count(b"\n")
            if at + count < line:
                at, offset = at + count, offset + len(data)
                if count:
                    self._remember(key, at, offset - len(data) + data.rfind(b"\n") + 1)
                continue
            parts = data.split(b"\n", line - at)
            return line, offset + len(data) - len(parts[-1])
        return at, offset

    def _remember(self, key: tuple, line: int, offset: int) -> None:
        """Note that `line` begins at `offset`."""
        with self._lock:
            marks = self._index.setdefault(key, [])
            self._index.move_to_end(key)
            if len(self._index) > _INDEXED_FILES:
                self._index.popitem(last=False)
            if len(marks) > 1 and marks[-1][1] - marks[-2][1] < _CHUNK:
                marks.pop()
            if not marks or offset > marks[-1][1]:
                marks.append((line, offset))


class JobLogs:
    """Files `yyyy-MM-dd/<logId>.log` below one directory: written with a cap, read by page, pruned
    by age; any thread."""

    def __init__(
        self,
        directory: str,
        limit: int,
        retention: float,
        echo: typing.Callable[[bytes], None] | None = None,
        full: typing.Callable[[], bool] = lambda: False,
        lost: typing.Callable[[int], None] = lambda size: None,
        as_json: bool = False,
    ):
        """`echo(data)`: where the output of all runs goes too; `full`, `lost`: see RunLog."""
        self.directory, self._limit, self._retention = directory, limit, retention
        self._echo, self._full, self._lost, self._as_json = echo, full, lost, as_json
        make_directory(directory)
        self._lock = threading.Lock()
        # the directory of a day that was used last: (path, device, inode), and a descriptor of it
        self._day: tuple = ("", 0, 0)
        self._day_fd = -1
        self._pages = LogPages()

    def _place(self, log_id: int, log_date_time: int) -> tuple[str, str]:
        """(directory, name): both made of numbers only, so that no request can point elsewhere."""
        try:
            day = datetime.date.fromtimestamp(log_date_time / 1000)
        except (ValueError, OverflowError, OSError):
            raise Refused(f"logDateTime: {log_date_time} is no time in ms since 1970") from None
        return os.path.join(self.directory, day.isoformat()), f"{log_id}.log"

    def _open(self, log_id: int, log_date_time: int, flags: int) -> int:
        directory, name = self._place(log_id, log_date_time)
        with self._lock:
            day = self._open_day(directory, bool(flags & os.O_CREAT))
            # O_NONBLOCK: a FIFO in its place must not hold the thread
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(name, flags, 0o640, dir_fd=day)
        if not flags & os.O_EXCL and not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "it is no regular file", name)
        return fd

    def _open_day(self, directory: str, make: bool) -> int:
        """A descriptor of the directory of a day, kept for the next log. With the lock held."""
        try:
            status = os.lstat(directory)
        except FileNotFoundError:
            if not make:
                raise
            with contextlib.suppress(FileExistsError):  # somebody may have removed all
                os.mkdir(self.directory, 0o750)
            os.mkdir(directory, 0o750)
            status = os.lstat(directory)
        day = (directory, status.st_dev, status.st_ino)
        if day != self._day:
            fd = os.open(directory, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            if self._day_fd >= 0:
                os.close(self._day_fd)
            self._day, self._day_fd = day, fd
        return self._day_fd

    def close(self) -> None:
        with self._lock:
            if self._day_fd >= 0:
                os.close(self._day_fd)
            self._day, self._day_fd = ("", 0, 0), -1

    def open(self, trigger: Trigger) -> RunLog:
        """The log to append to; one that drops everything when the file cannot be opened (full
        disk)."""
        place = trigger.log_id, trigger.log_date_time or int(time.time() * 1000)
        flags, size = os.O_CREAT | os.O_RDWR | os.O_APPEND, 0
        try:
            try:
                fd = self._open(*place, flags | os.O_EXCL)
            except FileExistsError:  # a run that is run again
                fd = self._open(*place, flags)
                size = os.fstat(fd).st_size
        except (OSError, Refused) as error:
            log.error("cannot open the log of %s, its output is dropped: %s", trigger, error)
            fd = -1

        def echo(lines: list[bytes]) -> None:
            if self._echo is not None:
                self._echo(b"".join(self._dressed(trigger, line) for line in lines))

        out = RunLog(fd, self._limit, None if self._echo is None else echo, self._full, self._lost)
        with contextlib.suppress(OSError):
            if size and os.pread(fd, 1, size - 1) != b"\n":  # where a crash cut it
                out.write(b"\n")
        return out

    def _dressed(self, trigger: Trigger, line: bytes) -> bytes:
        """A line of output as it goes to stdout."""
        if not self._as_json:
            head = f"{trigger.handler} logId={trigger.log_id} "
            return head.encode("utf-8", "replace") + line + b"\n"
        fields = {
            "time": timestamp(time.time()),
            "job": trigger.handler,
            "logId": trigger.log_id,
            "message": line.decode("utf-8", "replace"),
        }
        return json_text(fields).encode("utf-8", "replace") + b"\n"

    def page(
        self,
        log_id: int,
        log_date_time: int,
        first: int,
        *,
        ended: bool,
        limit: int = PAGE_LIMIT,
    ) -> dict:
        """Lines from `first` (1 is the first) of a run, at most `limit` bytes, as the admin reads
        them.

        `ended` must have been looked up before the call: what is read then is the end. Raises
        Refused.
        """
        first = max(1, first)
        where = os.path.join(*self._place(log_id, log_date_time))
        try:
            fd = self._open(log_id, log_date_time, os.O_RDONLY)
        except OSError as error:
            if not ended or first > 1:
                return page(first, first - 1, "", ended)
            text = (
                f"no log: {where} on {socket.gethostname()}: {error.strerror}; it may have been"
                " pruned after log_retention"
            )
            return page(first, first, text, ended)
        try:
            return self._pages.read(fd, log_id, first, ended, limit, where)
        finally:
            os.close(fd)

    def prune(
        self,
        known_for: typing.Callable[[str], float] = lambda day: float("inf"),
        forget: typing.Callable[[str], None] = lambda day: None,
        stop: typing.Callable[[], bool] = lambda: False,
    ) -> int:
        """Remove logs older than the retention, until `stop()`; returns how many.

        `known_for(day)`: how long the directory of that day has been known, in seconds during which
        an executor ran. A log goes only when its own time and this are both too old: after a jump
        of the wall clock every log would be.
        """
        oldest, removed = time.time() - self._retention, 0
        last_day = datetime.date.fromtimestamp(oldest).isoformat()
        for day in sorted(os.listdir(self.directory)):
            path = os.path.join(self.directory, day)
            if not re.fullmatch(r"\d{4}-\d\d-\d\d", day) or os.path.islink(path):
                continue
            if not os.path.isdir(path) or known_for(day) < self._retention or day > last_day:
                continue
            with os.scandir(path) as files:
                for file in files:
                    if stop():
                        return removed
                    with contextlib.suppress(OSError):
                        old = file.stat(follow_symlinks=False).st_mtime < oldest
                        if old and re.fullmatch(r"-?\d+\.log", file.name):
                            os.unlink(file.path)
                            removed += 1
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(path)
                forget(day)
        return removed


# --------------------------------------------------------------------------------------------------
# 9 journal
# --------------------------------------------------------------------------------------------------
_SUFFIXES = ("", "-wal", "-shm")  # of the files of an SQLite database in WAL mode
# seconds a delivered run is remembered, so that its repeated trigger starts nothing
REPEAT_WINDOW = 86_400.0
LOOK_BACK = 50_000  # rows that are searched for the latest runs of each job, in 0.3 s
# delivered runs kept for `runs`, as far as they are younger than executor.log_retention
KEPT_RUNS = 200_000
PRUNE_PATIENCE = 60.0  # seconds for a part of what is old to be removed
_DROPPED = "dropped "  # the beginning of the names of facts that tell which runs were dropped
# bytes: what SQLite's write-ahead log takes until it starts over (1,000 pages of 4 KiB)
RESERVE = 4 << 20
_WAL_MAGIC = (
    b"\x37\x7f\x06\x82",
    b"\x37\x7f\x06\x83",
)  # https://sqlite.org/fileformat2.html#walformat
_NO_SPACE = re.compile("is full|I/O error")  # what SQLite says of ENOSPC
# Errors of SQLite that blame the disk, a lock or permissions: the journal is not taken for broken.
_OUTSIDE = re.compile("is full|is locked|unable to open|I/O error|permission|protocol")
# The column `finished` is when a run came into its state, by the journal's clock: not only its end;
# NULL while it waits.
# SQLite uses a partial index only for a query that repeats its condition: hence the `state <>
# 'delivered'` below.
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
PRAGMA journal_size_limit = 16777216;
BEGIN;
CREATE TABLE IF NOT EXISTS runs (
  log_id INTEGER PRIMARY KEY, log_date_time INTEGER NOT NULL, state TEXT NOT NULL,
  accepted REAL NOT NULL, trigger TEXT, starts INTEGER NOT NULL DEFAULT 0, code INTEGER,
  message TEXT, finished REAL);
CREATE INDEX IF NOT EXISTS runs_by_state ON runs (state, finished) WHERE state <> 'delivered';
CREATE INDEX IF NOT EXISTS runs_by_acceptance ON runs (accepted);
CREATE INDEX IF NOT EXISTS runs_delivered ON runs (finished) WHERE state = 'delivered';
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
COMMIT;
"""


class Reserve:
    """Space on the disk of the journal that is given up when the disk is full, so that results can
    be stored nevertheless.

    While it is `lost`, triggers are refused and job logs are not written, so that nothing else
    takes what it freed. Any thread may call any method, one at a time.
    """

    def __init__(self, file: str):
        self._file, self.lost = file, False
        if not self._allocate():
            self._lose("cannot be made")

    def _lose(self, what: str) -> None:
        self.lost = True
        log.error(
            "the disk is full: the reserve %s %s; triggers are refused and output of jobs is"
            " dropped until there is space",
            self._file,
            what,
        )

    def give_up(self) -> bool:
        """Free the space; False when that was done before or cannot be done."""
        try:
            os.unlink(self._file)
        except OSError:  # a disk that has become read-only
            return False
        self._lose(f"of {RESERVE >> 20} MiB is given up for results")
        return True

    def restore(self) -> None:
        """Take the space again once twice as much is free."""
        with contextlib.suppress(OSError):  # the directory is away
            disk = os.statvfs(os.path.dirname(self._file))
            if self.lost and disk.f_bavail * disk.f_frsize >= 2 * RESERVE and self._allocate():
                self.lost = False
                log.info("there is space on the disk again, triggers are accepted")

    def _allocate(self) -> bool:
        try:
            with open(
                os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640), "rb"
            ) as stream:
                os.posix_fallocate(stream.fileno(), 0, RESERVE)
            return True
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(self._file)
            return False


def keep_room(file: str) -> None:
    """Have the disk keep room for all of `file`, if it is there. SQLite maps its `-shm`: a page of
    it for which a broken or full disk has no block would end this process by SIGBUS."""
    with contextlib.suppress(OSError), open(file, "r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)


class FilesMoved(sqlite3.OperationalError):
    """The files of the journal are not those that are open."""


class Clock:
    """A clock for ages that decide: it runs only while an executor serves this journal, and goes on
    from where the last one stopped, or from what was saved last. It is set by the wall clock at the
    first start, and follows none of its jumps. Any thread."""

    def __init__(self, began: float):
        self._offset = began - time.monotonic()

    def now(self) -> float:
        return self._offset + time.monotonic()


def moment() -> list:
    """Now, for `seconds_since`: which boot of the host, seconds since then, since the epoch."""
    return [_boot_id(), time.clock_gettime(time.CLOCK_BOOTTIME), time.time()]


def seconds_since(then: list) -> float:
    """How much time has passed, a suspended or restarted host included; only a wall clock knows how
    long a host was down. Raises ValueError and TypeError for what is no moment."""
    boot, ticks, wall = then
    now_boot, now_ticks, now_wall = moment()
    return max(0.0, now_ticks - ticks if boot and boot == now_boot else now_wall - wall)


@functools.lru_cache(1)
def _boot_id() -> str:
    try:
        return _read_proc("/proc/sys/kernel/random/boot_id").decode().strip()
    except OSError:  # a sandbox without it
        return ""


class Unfinished(typing.NamedTuple):
    """A run without a result, as an earlier life left it."""

    trigger: Trigger
    state: RunState
    age: float  # seconds since it was accepted, the last time: see Journal.restart
    began: float  # see Span
    starts: int
    cancelled: Result | None  # why it was being ended


class JournalFiles:
    """The files of the journal: opened, set aside when they are broken, made anew when they were
    removed. `db` is the connection of the core, the only one that writes; `read` has one of its
    own and never waits for a writer: any thread."""

    def __init__(self, file: str):
        """Raises ExecutorError."""
        self._file = file
        self.closed, self._trouble = False, ""  # whether no file is open; last error of `renew`
        self.db = self._open_first()
        self.reading = threading.Lock()  # guards `_reader`
        self._reader = self._connect()
        self._places = self._stamps()

    def check(self) -> None:
        """Raises FilesMoved when the open files are no longer those in the directory: what goes
        into them would be lost. Before each transaction."""
        if self.closed or self._stamps() != self._places:
            raise FilesMoved("its files were removed or replaced while it was open: try again")

    def close(self) -> None:
        with self.reading:
            self._reader.close()
        self.db.close()

    def read(self, query: str, *values: typing.Any) -> list:
        """The rows. Raises JournalError."""
        with self.reading:
            try:
                return self._reader.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise JournalError(f"{self._file}: {error}") from None

    def _open_first(self) -> sqlite3.Connection:
        """Its files, made anew when they are broken. Raises ExecutorError."""
        try:
            copy = self._file + ".new"
            if not os.path.exists(self._file) and os.path.exists(copy):  # it was made, see _copy
                os.replace(copy, self._file)
            self.reserve = Reserve(os.path.join(os.path.dirname(self._file), "reserve"))
            self._check_wal()
            keep_room(self._file + "-shm")
            try:
                return self._open()
            except sqlite3.OperationalError:
                if not self.reserve.give_up():
                    raise
                return self._open()
        except (
            sqlite3.OperationalError,
            OSError,
        ) as error:  # permissions, a full disk: the file may be fine
            raise ExecutorError(
                f"{self._file}: cannot be opened: {getattr(error, 'strerror', None) or error}"
            ) from None
        except sqlite3.DatabaseError as error:
            aside = self._set_aside(*_SUFFIXES)
            log.error(
                "the journal %s is broken (%s): moved to %s, starting with an empty one; the admin"
                " will show runs that were in it as running",
                self._file,
                " ".join(str(error).split()),
                aside,
            )
            return self._open()

    def _check_wal(self) -> None:
        """SQLite takes a write-ahead log that is none for an empty one, and says nothing of what is
        lost."""
        with contextlib.suppress(FileNotFoundError), open(self._file + "-wal", "rb") as stream:
            magic = stream.read(4)
            if magic and magic not in _WAL_MAGIC:
                log.error(
                    "the write-ahead log %s-wal is broken: moved to %s; the admin will show the"
                    " latest runs as running",
                    self._file,
                    self._set_aside("-wal"),
                )

    def _set_aside(self, *suffixes: str) -> str:
        """Rename the files of the journal with these suffixes; returns the new name of the
        first."""
        aside = f"broken-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
        for suffix in suffixes:
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._file + suffix, f"{self._file}.{aside}{suffix}")
        return f"{self._file}.{aside}{suffixes[0]}"

    def _stamps(self) -> tuple:
        """Which files lie where those of the journal should."""

        def place(suffix: str) -> tuple[int, int] | None:
            try:
                status = os.stat(self._file + suffix)
            except FileNotFoundError:
                return None
            return status.st_dev, status.st_ino

        return tuple(map(place, _SUFFIXES))

    def renew(self) -> bool:
        """Make the files anew from those that are still open; whether they are there. The core's
        thread."""
        try:
            if not self.closed:
                self._copy()
            self._take_copy()
            log.error(
                "the files of the journal %s were removed: made anew, all is there", self._file
            )
            self._trouble = ""
        except (sqlite3.Error, OSError) as error:
            if str(error) != self._trouble:
                log.error("the files of the journal %s were removed: %s", self._file, error)
            self._trouble = str(error)
        return not self.closed

    def _copy(self) -> None:
        """What is open as FILE.new, whole or not at all; then nothing is open any more."""
        part = self._file + ".part"
        for last in (False, True):
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part)
                with contextlib.closing(sqlite3.connect(part, isolation_level=None)) as target:
                    self.db.backup(target)
                break
            except sqlite3.Error as error:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                if last or not _NO_SPACE.search(str(error)) or not self.reserve.give_up():
                    raise
        os.chmod(part, 0o640)
        os.replace(part, self._file + ".new")
        with self.reading:
            self.closed = True
            self._reader.close()
            self.db.close()

    def _take_copy(self) -> None:
        """Put FILE.new into its place, aside whatever lies there, and open it."""
        if os.path.exists(self._file + ".new"):
            foreign = []
            for suffix, own, present in zip(_SUFFIXES, self._places, self._stamps()):
                if own is not None and present == own:
                    os.unlink(self._file + suffix)  # what it held is in the copy
                elif present is not None:
                    foreign.append(suffix)
            if foreign:
                self._set_aside(*foreign)
            os.replace(self._file + ".new", self._file)
        db = self._open()
        with self.reading:
            self.db = db
            self._reader = self._connect()
            self._places, self.closed = self._stamps(), False

    def _open(self) -> sqlite3.Connection:
        os.close(
            os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        )  # it holds parameters and results
        with contextlib.suppress(FileNotFoundError):
            if not os.path.getsize(self._file) and os.path.getsize(
                self._file + "-wal"
            ):  # SQLite would delete that one
                raise sqlite3.DatabaseError("it is empty, its write-ahead log is not")
        db = self._connect()
        try:
            db.executescript(_SCHEMA)
            verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            # What the check does not see: other tables than these (a version that changes them must
            # convert them before), and a header that forbids to write.
            with contextlib.closing(sqlite3.connect(":memory:")) as wanted:
                wanted.executescript(_SCHEMA)
                if verdict == "ok" and not self._tables(wanted) <= self._tables(db):
                    verdict = "its tables are not those of this program"
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            db.executescript("BEGIN; INSERT OR REPLACE INTO facts VALUES ('', ''); ROLLBACK")
        except (
            sqlite3.Error,
            UnicodeDecodeError,
        ) as error:  # SQLite's message may quote what is damaged
            db.close()
            if isinstance(error, sqlite3.OperationalError) and _OUTSIDE.search(str(error)):
                raise
            raise sqlite3.DatabaseError(error) from None
        return db

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._file, isolation_level=None, check_same_thread=False, timeout=0.5)
        # a damaged text must not hide the rows behind it
        db.text_factory = lambda data: data.decode("utf-8", "replace")
        return db

    @staticmethod
    def _tables(db: sqlite3.Connection) -> set[tuple[str, str]]:
        """(name, SQL) of tables and indexes, however the SQL was laid out."""
        rows = db.execute("SELECT name, sql FROM sqlite_master")
        return {(name, " ".join((sql or "").split())) for name, sql in rows}


class Facts:
    """What the journal remembers by name, and the clock, whose last time is one of these; any
    thread. `post` takes what is to be stored."""

    def __init__(self, files: JournalFiles):
        self._files = files
        self.post: typing.Callable[[typing.Any], None] = lambda message: None
        rows = files.read("SELECT name, value FROM facts")
        # one flipped bit makes a BLOB of a text
        self._facts = {
            name: value for name, value in rows if isinstance(name, str) and isinstance(value, str)
        }

    def fact(self, name: str) -> str:
        """What was remembered under this name, "" when nothing was."""
        return self._facts.get(name) or ""

    def learn(self, name: str, value: str) -> None:
        """Remember it; nobody waits until it is stored."""
        self._facts[name] = value
        self.post(Note(name, value))

    def forget_since(self, name: str) -> None:
        """Have `known_for` note it anew; a fact of this name stays."""
        self._facts.pop(f"since {name}", None)
        self.post(Note(f"since {name}", None))

    def known_for(self, name: str) -> float:
        """Seconds of the clock since this name was noted, which the first call does."""
        try:
            return self.clock.now() - float(self.fact(f"since {name}"))
        except ValueError:
            self.learn(f"since {name}", str(self.clock.now()))
            return 0.0

    def save_clock(self) -> None:
        """To be called from time to time: after a crash the clock goes on from what was stored
        last."""
        self.learn("clock", str(self.clock.now()))

    def _start_clock(self) -> None:
        [newest] = self._files.read("SELECT max(finished), max(accepted) FROM runs")
        saved = 0.0
        with contextlib.suppress(ValueError):  # the first start, or a damaged page
            saved = float(self.fact("clock"))
        # What came after the last save; a time from a damaged row must not age all others.
        most = max(saved, time.time()) + DEAD_AFTER
        known = [at for at in newest if isinstance(at, (int, float)) and at < most]
        self.clock = Clock(max([saved, *known]) or time.time())
        self.save_clock()


# --------------------------------------------------------------------------------------------------
# 9b runs and results
# --------------------------------------------------------------------------------------------------
class Unstored:
    """What has happened and is not stored yet; the core's thread."""

    def __init__(self) -> None:
        self.cancels: list[tuple[int | None, str | None, int]] = []
        self.results: list[tuple[int, str, str, int]] = []
        self.settled: list[Settled] = []
        self.notes: dict[str, str | None] = {}

    def __bool__(self) -> bool:
        return bool(self.cancels or self.results or self.settled or self.notes)

    def size(self) -> tuple[int, int]:
        """How many cancels and results there are now: a mark for `shorten`."""
        return len(self.cancels), len(self.results)

    def shorten(self, size: tuple[int, int]) -> None:
        """Forget what decisions have added."""
        cancels, results = size
        del self.cancels[cancels:], self.results[results:]

    def write(self, db: sqlite3.Connection, now: float) -> dict[str, int]:
        """Write all into the transaction; returns by how much the numbers of finished and of dead
        results change."""
        more = {"finished": 0, "dead": 0}
        if self.cancels:
            db.executemany(
                "UPDATE runs SET code = ?, message = ? WHERE log_id = ? AND state = 'running'",
                self.cancels,
            )
        if self.results:
            more["finished"] += db.executemany(
                "UPDATE runs SET finished = ?, state = 'finished', code = ?, message = ?, trigger ="
                " ? WHERE log_id = ? AND state IN ('accepted', 'running')",
                [(now, *row) for row in self.results],
            ).rowcount
        for settled in self.settled:
            count = self._settle(db, now, settled)
            if settled.before is RunState.FINISHED:
                more["finished"] -= count
                more["dead"] += count if settled.state is RunState.DEAD else 0
        for name, value in self.notes.items():
            if value is None:
                db.execute("DELETE FROM facts WHERE name = ?", (name,))
            else:
                db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
        return more

    @staticmethod
    def _settle(db: sqlite3.Connection, now: float, settled: Settled) -> int:
        """How many results are in another state now."""
        # Of what is only a memory the beginning will do: there may be very many.
        short = ", message = substr(message, 1, 500)"
        query = (
            "UPDATE runs SET state = ?, finished = ?"
            f"{short if settled.state is RunState.DELIVERED else ''}"
            " WHERE log_id = ? AND state = ?"
        )
        before = settled.before.value
        rows = [(settled.state.value, now, log_id, before) for log_id in settled.log_ids]
        return db.executemany(query, rows).rowcount


class JournalReader(Facts):
    """What others ask of the journal, and its pruning; any thread. How many results wait is counted
    as it changes."""

    def __init__(self, file: str):
        super().__init__(JournalFiles(file))
        self._file = file
        self._unstored = Unstored()
        counts = "SELECT state, count(*) FROM runs WHERE state <> 'delivered' GROUP BY state"
        numbers = dict(self._files.read(counts))
        self._counts = {state: numbers.get(state, 0) for state in ("finished", "dead")}
        states = ", ".join(f"'{state.value}'" for state in OWED)
        owed = f"SELECT log_id FROM runs WHERE state <> 'delivered' AND state IN ({states})"
        self._owed = [log_id for (log_id,) in self._files.read(owed)]  # of earlier lives

    def undelivered(self, limit: int) -> list[StoredResult]:
        """Results that wait for the admin, the oldest first."""
        rows = self._files.read(
            "SELECT log_id, log_date_time, code, message, finished FROM runs WHERE state <>"
            " 'delivered' AND state = 'finished' ORDER BY finished LIMIT ?",
            limit,
        )
        return list(itertools.starmap(_sound, rows))

    def acknowledged(
        self, state: RunState, since: float, until: float, limit: int
    ) -> list[StoredResult]:
        """Results that came into this state between two times of the clock, the oldest first."""
        rows = self._files.read(
            "SELECT log_id, log_date_time, code, message, finished FROM runs WHERE state <>"
            " 'delivered' AND state = ? AND finished >= ? AND finished < ? ORDER BY finished"
            " LIMIT ?",
            state.value,
            since,
            until,
            limit,
        )
        return list(itertools.starmap(_sound, rows))

    def owes(self) -> bool:
        """Whether the admin has yet to take a result of an earlier life; one thread."""
        with contextlib.suppress(JournalError):  # nobody can tell
            while self._owed and self.state(self._owed[-1]) not in OWED:
                self._owed.pop()
        return bool(self._owed)

    def state(self, log_id: int) -> RunState | None:
        """Of a run as it is stored; None for one that is not known, DEAD for a damaged page."""
        rows = self._files.read("SELECT state FROM runs WHERE log_id = ?", log_id)
        if not rows:
            return None
        with contextlib.suppress(ValueError):
            return RunState(rows[0][0])
        return RunState.DEAD

    def latest(self, before: float, handlers: typing.Collection[str]) -> list[PastRun]:
        """The RECENT latest runs of each handler that ended before the time `before`, the latest
        first, at least until all of `handlers` have so many; reads with a connection of its own.
        Raises JournalError."""
        missing, latest = dict.fromkeys(handlers, RECENT), []
        with contextlib.closing(read_journal(self._file)) as db:
            for run in itertools.islice(past_runs(db), LOOK_BACK):
                wanted = missing.get(run.handler, RECENT)
                if wanted and run.ended is not None and run.ended < before:
                    latest.append(run)
                    missing[run.handler] = wanted - 1
                    if wanted == 1 and not any(missing[name] for name in handlers):
                        break
        return latest

    def counts(self) -> dict[str, int]:
        """How many results are undelivered, held because they could not be stored, and dead."""
        held = len(self._unstored.results)
        return {
            "undelivered": self._counts["finished"] + held,
            "held": held,
            "dead": self._counts["dead"],
        }

    def oldest(self) -> float:
        """For how many seconds the oldest result waits for the admin, for `status` and the metrics;
        0 when none does."""
        rows = self.undelivered(1)
        return max(0.0, self.clock.now() - rows[0].since) if rows else 0.0

    def unfinished(self) -> list[Unfinished]:
        """Every run without a result, in the order of acceptance; read once, at start."""
        rows = self._files.read(
            "SELECT log_id, log_date_time, trigger, state, accepted, finished, starts, code,"
            " message FROM runs WHERE state <> 'delivered' AND state IN ('accepted', 'running')"
            " ORDER BY accepted"
        )
        runs, dropped = [], self._dropped()
        for log_id, date, stored, state, accepted, since, starts, code, message in rows:
            try:
                fields = json.loads(stored)
                moment_ = fields.pop("accepted")
                age, began = seconds_since(moment_), _began(moment_, accepted, since)
                trigger = Trigger(**{**fields, "log_id": log_id})  # a digit may be damaged
            except (ValueError, TypeError, AttributeError, LookupError):
                age, began = 0.0, round(time.time(), 3)  # a page may be damaged unnoticed
                trigger = Trigger(0, log_id, "(unknown)", log_date_time=date, glue_type="")
            cancelled = dropped.get(log_id) if code is None else Result(code, message or "")
            runs.append(Unfinished(trigger, RunState(state), age, began, starts, cancelled))
        return runs

    def _dropped(self) -> dict[int, Result]:
        """By logId: what was dropped in an earlier life and perhaps not finished."""
        dropped: dict[int, Result] = {}
        for name, value in self._facts.items():
            if name.startswith(_DROPPED):
                with contextlib.suppress(ValueError, TypeError):  # a page may be damaged unnoticed
                    log_ids, code, message = json.loads(value)
                    dropped.update(dict.fromkeys(log_ids, Result(code, message)))
        return dropped

    def forget_dropped(self) -> None:
        """Once every run that was dropped in an earlier life is finished; at start."""
        for name in [name for name in self._facts if name.startswith(_DROPPED)]:
            del self._facts[name]
            self.post(Note(name, None))

    def prune(
        self, stop: typing.Callable[[], bool] = lambda: False, keep: float = REPEAT_WINDOW
    ) -> int:
        """Forget delivered and acknowledged runs after `keep` seconds, sooner those that are older
        than the KEPT_RUNS latest delivered ones, but none within REPEAT_WINDOW; dead ones after
        four times DEAD_AFTER. Returns how many. Raises JournalError."""
        keep = max(keep, REPEAT_WINDOW)
        newest = self._files.read(
            "SELECT finished FROM runs WHERE state = 'delivered' ORDER BY finished DESC LIMIT 1"
            f" OFFSET {KEPT_RUNS}"
        )
        if newest and isinstance(newest[0][0], float):  # else a damaged row
            keep = min(keep, max(self.clock.now() - newest[0][0], REPEAT_WINDOW))
        removed = self._remove("state = 'delivered'", keep, stop)
        for state in (RunState.ACKNOWLEDGED, RunState.RESENT):
            condition = f"state <> 'delivered' AND state = '{state.value}'"
            removed += self._remove(condition, keep, stop)
        dead = self._remove("state <> 'delivered' AND state = 'dead'", 4 * DEAD_AFTER, stop)
        if dead:
            self._ask(self._count_dead)
        return removed + dead

    def _remove(self, state: str, age: float, stop: typing.Callable[[], bool]) -> int:
        """1,000 rows at a time: triggers wait for each."""
        query = (
            "DELETE FROM runs WHERE log_id IN"
            f" (SELECT log_id FROM runs WHERE {state} AND finished < ? LIMIT 1000)"
        )
        before, removed = (self.clock.now() - age,), 0
        while not stop():
            count = self._ask(lambda: self._files.db.execute(query, before).rowcount)
            if not count:
                break
            removed += count
        return removed

    def _count_dead(self) -> None:
        query = "SELECT count(*) FROM runs WHERE state <> 'delivered' AND state = 'dead'"
        self._counts["dead"] = self._files.db.execute(query).fetchone()[0]

    def _ask(self, work: typing.Callable[[], typing.Any]) -> typing.Any:
        """The value of `work` in the core's next transaction. Raises JournalError."""
        box: queue.SimpleQueue = queue.SimpleQueue()

        def attempt() -> typing.Any:
            try:
                return work()
            except sqlite3.OperationalError:  # a full disk, a lock: all of the transaction fails
                raise
            except sqlite3.DatabaseError as error:  # a damaged page that only this has met
                return JournalError(f"{self._file}: {error}")

        self.post(Work(attempt, box.put))
        try:
            value = box.get(timeout=PRUNE_PATIENCE)
        except queue.Empty:
            raise JournalError(f"{self._file}: the disk is too slow") from None
        if isinstance(value, Exception):
            raise value
        return value


class Journal(JournalReader):
    """Runs and undelivered results in SQLite; what writes is for the core's thread.

    begin, then decisions, then commit, which also stores what has happened since; or take_back,
    which keeps that for the next commit.
    """

    def __init__(self, file: str):
        super().__init__(file)
        self.post = self.hold
        self.reserve = self._files.reserve
        self._committed = Unstored()  # by the last commit, and not told yet
        self.on_results: typing.Callable[[], None] = lambda: None  # when results were committed
        self._told = False  # that results are held
        self._tainted = False  # a failed COMMIT may come back until something is written over it
        self._moved = False  # the files were made anew in this turn: its triggers are refused
        self._start_clock()
        self._commit_held()

    def begin(self) -> None:
        """Begin a transaction. Raises sqlite3.Error and OSError."""
        self._size_before = self._unstored.size()
        self._files.check()
        if self._tainted:
            self._untaint()
        self._files.db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Store what has happened, and commit. Raises sqlite3.Error and OSError."""
        db, counts = self._files.db, dict(self._counts)
        for state, change in self._unstored.write(db, self.clock.now()).items():
            counts[state] += change
        self._tainted = True  # if it fails
        db.execute("COMMIT")
        self._tainted = self._moved = False
        self._committed, self._unstored = self._unstored, Unstored()
        if self._told:
            log.info("stored %d held results", len(self._committed.results))
        self._counts, self._told = counts, False

    def take_back(self) -> None:
        """Undo the transaction that failed; what had happened before it is kept for the next."""
        self._unstored.shorten(self._size_before)
        with contextlib.suppress(sqlite3.Error):
            self._files.db.execute("ROLLBACK")

    def _untaint(self) -> None:
        """Write over what a failed COMMIT left in the write-ahead log, or a crash brings it back:
        without a sync, which may be what fails; if that fails too, empty the log."""
        row = ("tainted", secrets.token_hex(8))
        with contextlib.suppress(sqlite3.Error):
            self._files.db.execute("PRAGMA synchronous = OFF")
            self._files.db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", row)
            self._tainted = False
        self._files.db.execute("PRAGMA synchronous = FULL")
        if self._tainted:
            with contextlib.suppress(sqlite3.Error), self._files.reading:
                busy, _, _ = self._files.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                self._tainted = bool(busy)

    def mend(self, error: Exception) -> bool:
        """Make files anew or give up the reserve; whether what failed by `error` may work now."""
        if isinstance(error, FilesMoved):
            self._moved = self._files.renew()
            return self._moved
        full = isinstance(error, sqlite3.OperationalError) and _NO_SPACE.search(str(error))
        return bool(full) and self.reserve.give_up()

    def cannot_store(self, error: Exception) -> str:
        """Tell once an outage that results are held, and see that nothing of the failed commit
        comes back after a crash; returns the reason."""
        if self._tainted and not self._files.closed:
            self._untaint()
        if self._unstored.results and not self._told:  # an outage is told once
            self._told = True
            log.error(
                "cannot store results, holding them until it works again: %s: %s", self._file, error
            )
        self._moved = False
        return f"{self._file}: {error}"

    def publish(self) -> None:
        """Tell who waits for what was committed."""
        stored, self._committed = self._committed, Unstored()
        for settled in stored.settled:
            settled.on_stored(settled)
        if stored.results:
            self.on_results()
        if self.reserve.lost and not self._unstored.results:
            self.reserve.restore()

    def has_unstored(self) -> bool:
        """Whether something is still to be stored or mended."""
        return bool(self._unstored) or self._tainted or self._files.closed or self.reserve.lost

    def has(self, log_id: int) -> bool:
        """Whether the run is in the journal; to be asked within a transaction."""
        return bool(
            self._files.db.execute("SELECT 1 FROM runs WHERE log_id = ?", (log_id,)).fetchone()
        )

    def accept(self, trigger: Trigger) -> bool:
        """Store a new run; False when its logId is known. Raises Refused."""
        for reason, present in (
            ("the disk is full", self.reserve.lost),
            ("its files were removed or replaced while it was open: try again", self._moved),
            ("what it could not store cannot be removed", self._tainted),
        ):
            if present:
                told = f"the executor cannot store the trigger: {self._file}: {reason}"
                raise Refused(told, "journal")
        row = (
            trigger.log_id,
            trigger.log_date_time,
            RunState.ACCEPTED.value,
            self.clock.now(),
            self._as_json(trigger),
        )
        query = (
            "INSERT OR IGNORE INTO runs (log_id, log_date_time, state, accepted, trigger)"
            " VALUES (?, ?, ?, ?, ?)"
        )
        return self._files.db.execute(query, row).rowcount == 1

    def start(self, log_id: int) -> bool:
        """accepted -> running; committed before anything of the run starts, so that it never starts
        twice. Whether it was accepted."""
        query = (
            "UPDATE runs SET state = 'running', finished = ?, starts = starts + 1"
            " WHERE log_id = ? AND state = 'accepted'"
        )
        return self._files.db.execute(query, (self.clock.now(), log_id)).rowcount == 1

    def restart(self, trigger: Trigger) -> None:
        """running -> accepted, as if accepted now, for a run that a crash interrupted and that its
        job wants again. In a transaction, see `Resume`."""
        query = (
            "UPDATE runs SET state = 'accepted', finished = NULL, accepted = ?, trigger = ?"
            " WHERE log_id = ? AND state = 'running'"
        )
        self._files.db.execute(query, (self.clock.now(), self._as_json(trigger), trigger.log_id))

    @staticmethod
    def _as_json(trigger: Trigger) -> str:
        """A trigger with the moment of its acceptance."""
        return json.dumps({**vars(trigger), "accepted": moment()})

    def cancel(self, log_id: int, result: Result | None) -> None:
        """Note why a running run is being ended: its result, should a crash come before its end.
        None: it is not being ended after all."""
        code, message = (result.code, encodable(result.message)) if result else (None, None)
        self._unstored.cancels.append((code, message, log_id))

    def drop(self, log_ids: list[int], result: Result) -> str:
        """Store in one row with what result these waiting runs have ended; returns the name of the
        row, which is to be forgotten when each of them is finished."""
        name = f"{_DROPPED}{log_ids[0]}"
        value = json.dumps([log_ids, result.code, result.message])
        self._files.db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
        return name

    def finish(self, spans: typing.Sequence[Span], result: Result) -> None:
        """accepted | running -> finished, all with `result`; held while it cannot be stored. Of
        each trigger is kept what `runs` shows."""
        for trigger, began, took in spans:
            kept = {
                "handler": trigger.handler,
                "glue_type": trigger.glue_type,
                "shard_index": trigger.shard_index,
                "shard_total": trigger.shard_total,
                "began": began,
                "took": took,
                "ended": round(time.time(), 3),
            }
            # a text that cannot be stored would hold up every later commit
            row = (result.code, encodable(result.message), json.dumps(kept), trigger.log_id)
            self._unstored.results.append(row)

    def hold(self, message: Settled | Note | Work) -> None:
        """To be stored by the next commit; a Work is dropped, for there is no core to do it."""
        if isinstance(message, Settled):
            self._unstored.settled.append(message)
        elif isinstance(message, Note):
            self._unstored.notes[message.name] = message.value

    def close(self) -> None:
        """Once the core has ended."""
        self.post = self.hold
        self.save_clock()
        self._commit_held()
        self._files.close()

    def _commit_held(self) -> None:
        """What is held, while there is no core: if it cannot be stored, the next commit tries."""
        try:
            self.begin()
            self.commit()
        except (sqlite3.Error, OSError) as error:
            self.take_back()
            self.cannot_store(error)


def _sound(
    log_id: int, date: typing.Any, code: typing.Any, message: typing.Any, since: typing.Any
) -> StoredResult:
    """One flipped bit of a page makes a BLOB of a text or a number, unnoticed: that must not hold
    up the others."""
    if isinstance(message, bytes):
        message = message.decode("utf-8", "replace")
    return StoredResult(
        log_id,
        date if isinstance(date, int) else 0,
        code if isinstance(code, int) else FAILURE,
        message if isinstance(message, str) else "",
        float(since) if isinstance(since, (int, float)) else time.time(),
    )


def read_journal(file: str) -> sqlite3.Connection:
    """A connection that only reads, with or without an executor that uses the journal, for whoever
    may read the file. Raises JournalError."""
    # Without a write-ahead log nobody writes, and reading must not create one: it would belong to
    # who reads.
    mode = "mode=ro" if os.path.exists(file + "-wal") else "immutable=1"
    try:
        # Not opened to see whether it can be: closing it would drop the locks of this process, see
        # https://sqlite.org/howtocorrupt.html, 2.2.
        os.stat(file)
        uri = f"file:{urllib.parse.quote(os.fsencode(os.path.abspath(file)))}?{mode}"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=5.0)
        db.text_factory = lambda data: data.decode("utf-8", "replace")
        db.execute("SELECT 1 FROM runs LIMIT 1")
    except FileNotFoundError:
        raise JournalError(
            f"{file} does not exist: no executor has used this data_dir: name another one with"
            " --data-dir"
        ) from None
    except (OSError, sqlite3.Error) as error:
        told = getattr(error, "strerror", None) or error
        raise JournalError(
            f"{file}: cannot be read: {told}: this needs the executor's user or root"
        ) from None
    return db


def past_runs(db: sqlite3.Connection, log_id: int | None = None) -> typing.Iterator[PastRun]:
    """What is known of all runs, or of one, the one that was accepted last first. Raises
    JournalError."""
    where, values = ("", ()) if log_id is None else (" WHERE log_id = ?", (log_id,))
    query = (
        "SELECT log_id, log_date_time, state, trigger, accepted, finished, code, message FROM runs"
    )
    try:
        for row in db.execute(f"{query}{where} ORDER BY accepted DESC", values):
            yield _past_run(*row)
    except sqlite3.Error as error:
        raise JournalError(f"the journal cannot be read: {error}") from None


def _past_run(
    log_id: int,
    date: int,
    state: str,
    stored: str | None,
    accepted: float,
    since: float | None,
    code: int | None,
    message: str | None,
) -> PastRun:
    ended = state not in (RunState.ACCEPTED.value, RunState.RUNNING.value)
    _, date, code, message, _ = _sound(log_id, date, code, message, since)
    fields: dict = {}
    with contextlib.suppress(ValueError):  # a page may be damaged unnoticed
        fields = json.loads(stored or "{}")
    with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError):
        handler, took = str(fields["handler"]), fields.get("took")
        if "ended" not in fields and ended:  # by an earlier version
            fields["ended"] = fields["began"] + (took or 0.0)
        return PastRun(
            log_id,
            state,
            handler,
            handler if fields.get("glue_type") == "BEAN" else "glue",
            int(fields["shard_index"]),
            int(fields["shard_total"]),
            float(fields["began"]) if ended else _began(fields["accepted"], accepted, since),
            took,
            float(fields["ended"]) if ended else None,
            code if ended else None,  # else why it is being ended
            message if ended else "",
        )
    at = (date or 0) / 1000
    unknown = ("(unknown)", "(unknown)", 0, 1, at, None, at if ended else None)
    return PastRun(log_id, state, *unknown, code if ended else None, message)


def _began(accepted: list, clock: float, since: float | None) -> float:
    """`began` of a run without a result, see Span: that was accepted at this `moment`, when the
    journal's clock was at `clock`, and runs since that was at `since`, None for one that waits."""
    waited = 0.0 if since is None else since - clock
    waited = waited if 0.0 <= waited <= DEAD_AFTER else 0.0  # a page may be damaged unnoticed
    return round(float(accepted[2]) + waited, 3)


# --------------------------------------------------------------------------------------------------
# 10 callbacks
# --------------------------------------------------------------------------------------------------
BATCH = 100  # results in one request
MOST_REFUSED = 1000  # so many refused and none taken since: fresh results then go one at a time
PACE = 0.05  # seconds between two requests: what ends meanwhile goes into the next one
REFUSED_PACE = 0.25  # seconds between two results that are tried alone while none is taken
LAST_TRIES = 3  # attempts at an admin that does not answer while the executor stops
LAST_PAUSE = 0.5  # seconds between these, at most
# a result is sent again so many seconds after its first and after its second acknowledgement
RESEND_AFTER = (120.0, 1200.0)
SUSPECT = 90.0  # seconds: what an admin acknowledged this shortly before it was missed may be lost


class Part(typing.NamedTuple):
    """Results for one request, the state in which they are, and the one in which they will be once
    the admin has taken them; `was_split`: it was cut out of a batch that was not taken."""

    rows: list[StoredResult]
    before: RunState
    after: RunState
    was_split: bool = False


class RefusedResults:
    """Results that the admin has refused, or did not answer while it answered heartbeats, each with
    a backoff of its own; the callback thread."""

    def __init__(self) -> None:
        # by logId: its backoff, and the monotonic time of the next attempt
        self.results: dict[int, tuple[Backoff, float]] = {}
        self._refused_in_a_row, self._any_refused = 0, False  # since one was taken
        self._parts: list[Part] = []  # of batches that were not taken, the next one at the end
        self._ask_at = 0.0  # monotonic; not before

    def soonest(self, withheld: bool) -> float:
        """Monotonic time to look again; `withheld`: fresh results wait for it too."""
        if self._parts or withheld:
            return self._ask_at
        return min([at for _, at in self.results.values()], default=float("inf"))

    def split(self, part: Part) -> None:
        """It was not taken: try its halves, the one with the newer results first, for the admin
        may have deleted the logs of the oldest."""
        self._any_refused = True
        middle = len(part.rows) // 2
        halves = part.rows[:middle], part.rows[middle:]
        self._parts += [part._replace(rows=half, was_split=True) for half in halves]

    def next_part(self) -> Part | None:
        """What is left of a batch that was not taken and may be tried now."""
        return self._parts.pop() if self._parts and self.may_ask() else None

    def too_many(self) -> bool:
        """Whether MOST_REFUSED are refused or in parts, and none was taken since: then fresh
        results go one at a time."""
        return self._any_refused and len(self.results) + len(self.in_parts()) >= MOST_REFUSED

    def may_ask(self) -> bool:
        """Whether REFUSED_PACE is over, while the admin seems to refuse all."""
        return time.monotonic() >= self._ask_at

    def in_parts(self) -> set[int]:
        return {row.log_id for part in self._parts for row in part.rows}

    def add(self, log_id: int) -> None:
        backoff, _ = self.results.get(log_id, (Backoff(), 0.0))
        self.results[log_id] = (backoff, time.monotonic() + backoff.fail())
        self._refused_in_a_row, self._any_refused = self._refused_in_a_row + 1, True
        # More than three in a row: perhaps it refuses all, so ask it slowly.
        if self._refused_in_a_row > 3:
            self._ask_at = time.monotonic() + REFUSED_PACE

    def taken(self, rows: typing.Sequence[StoredResult]) -> None:
        """The admin has taken these."""
        self._refused_in_a_row, self._any_refused = 0, False
        self.forget(rows)

    def forget(self, rows: typing.Sequence[StoredResult]) -> None:
        """Keep no backoff for these: they were taken, or given up."""
        for row in rows:
            self.results.pop(row.log_id, None)

    def pardon(self) -> None:
        """Forget every refusal: the admin may have been wrong about all of them."""
        self.results.clear()
        self._parts.clear()
        self._refused_in_a_row, self._any_refused = 0, False


class Repeats:
    """Which acknowledged results are sent once more: each after some time, and at once those of an
    admin that went away right after its acknowledgement. The callback thread."""

    def __init__(self, journal: typing.Any, admin: typing.Any):
        self._journal, self._admin = journal, admin
        self._backoff, self._not_before = Backoff(), 0.0  # monotonic; see put_off
        # (from, to) by the journal's clock: acknowledged just before an admin went away
        self._suspects: tuple[float, float] | None = None
        self._missed_at = 0.0  # monotonic; the last such absence that was looked at

    def due(self, in_hand: set[int]) -> tuple[Part | None, float]:
        """What to send once more, without those `in_hand`; or None, and the seconds until then."""
        if time.monotonic() < self._not_before:
            return None, self._not_before - time.monotonic()
        now, wait = self._journal.clock.now(), float("inf")
        if self._admin.missed_at > self._missed_at:
            self._missed_at = self._admin.missed_at
            noticed = now - (time.monotonic() - self._missed_at)
            self._suspects = (noticed - SUSPECT, noticed)
        most = BATCH + len(in_hand)
        for before, after, age in (
            (RunState.ACKNOWLEDGED, RunState.RESENT, RESEND_AFTER[0]),
            (RunState.RESENT, RunState.DELIVERED, RESEND_AFTER[1]),
        ):
            rows = self._journal.acknowledged(before, *(self._suspects or (0.0, 0.0)), most)
            oldest = [] if rows else self._journal.acknowledged(before, 0.0, now, 1)
            # with them what would be due soon, to fill the batch
            if oldest and oldest[0].since <= now - age:
                rows = self._journal.acknowledged(before, 0.0, now - age / 2, most)
            elif oldest:
                wait = min(wait, oldest[0].since + age - now)
            rows = [row for row in rows if row.log_id not in in_hand][:BATCH]
            if rows:
                return Part(rows, before, after), wait
        self._suspects = None
        return None, wait

    def put_off(self) -> None:
        """It was not the admin that refused one, or nobody answered: no repeats for a while."""
        self._not_before = time.monotonic() + self._backoff.fail()

    def taken(self) -> None:
        self._backoff.succeed()


class Undelivered:
    """The results that wait for the admin, and what becomes of them in the journal; the callback
    thread."""

    def __init__(self, journal: typing.Any):
        self._journal, self._wake = journal, threading.Event()
        self._refused = RefusedResults()
        # logIds whose new state is on its way into the journal: a reader would show them as before
        self._settling: set[int] = set()

    def _undelivered(self, now: float) -> tuple[list[StoredResult], list[StoredResult]]:
        """What was never refused, and what was and is to be tried again."""
        while True:
            # Before reading: what is settled in between would be read in its old state.
            in_hand, refused = self._in_hand(), self._refused.results
            most = BATCH + len(refused) + len(in_hand)
            rows = [row for row in self._journal.undelivered(most) if row.log_id not in in_hand]
            alive = self._bury(rows)
            if len(alive) == len(rows):  # else read again: the dead took places of the limit
                fresh = [row for row in alive if row.log_id not in refused]
                again = [row for row in alive if row.log_id in refused]
                return fresh, [row for row in again if refused[row.log_id][1] <= now]

    def _in_hand(self) -> set[int]:
        """logIds of results in a part or on their way into the journal: to be left alone."""
        return self._settling | self._refused.in_parts()

    def _bury(self, rows: list[StoredResult]) -> list:
        """Give up what waits longer than DEAD_AFTER; returns the others."""
        oldest = self._journal.clock.now() - DEAD_AFTER
        dead = [row for row in rows if row.since < oldest]
        if dead:
            log.error(
                "giving up %s that the admin did not take for %d days: logId=%s",
                counted(len(dead), "result"),
                DEAD_AFTER // 86_400,
                ",".join(str(row.log_id) for row in dead),
            )
            self._settle(dead, RunState.FINISHED, RunState.DEAD)
            self._refused.forget(dead)
        return [row for row in rows if row.since >= oldest]

    def _settle(self, rows: list[StoredResult], before: RunState, after: RunState) -> None:
        """Have the journal remember their new state; they are left alone until it does."""
        log_ids = [row.log_id for row in rows]
        self._settling.update(log_ids)
        self._journal.post(Settled(log_ids, before, after, self._settled))

    def _settled(self, message: Settled) -> None:
        self._settling.difference_update(message.log_ids)
        self._wake.set()


class Callbacks(Undelivered, Watched):
    """One thread delivers finished results from the journal in batches and tries again until each
    is acknowledged, and sends it twice more later, because an admin may lose what it has
    acknowledged and not yet stored.

    wake, retry: any thread. A batch that the admin refuses is split until the bad results are
    alone; each of them is tried again with a backoff of its own. After each request for refused
    results go fresh ones, so that they hold back nobody.
    """

    def __init__(self, journal: typing.Any, admin: typing.Any, metrics: Metrics):
        super().__init__(journal)
        self._admin, self._metrics = admin, metrics
        self._closing, self._abandoned = threading.Event(), False
        self._close_by, self._last_tries = 0.0, LAST_TRIES  # when closing; monotonic
        self._withheld = False  # whether fresh results wait for their turn after refused ones
        self._next_at = 0.0  # monotonic
        self._repeats = Repeats(journal, admin)
        self._backoff = Backoff()
        self._pardoned = threading.Event()  # the admin takes again what it refused
        self._heard = threading.Event()  # anything was answered since the last failure
        self._retry_at = 0.0
        self.last_error = ""
        self._thread = threading.Thread(target=self._loop, name="callback", daemon=True)

    def start(self) -> None:
        if self._admin.addresses:
            self._retry_at = time.monotonic() + 1.0  # the first heartbeat goes first, see `retry`
        self._wake.set()
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def retry(self, pardon: bool) -> None:
        """The admin answers: do not wait for the end of a backoff. `pardon`: it did not before, so
        it may have refused good results."""
        self._retry_at = 0.0
        self._heard.set()
        if pardon:
            self._pardoned.set()
        self._wake.set()

    def close(
        self, timeout: float = 5.0, hurried: typing.Callable[[], bool] = lambda: False
    ) -> None:
        """Deliver what is left, for at most `timeout` seconds and until `hurried()`; the rest waits
        in the journal."""
        self._close_by = time.monotonic() + timeout
        self._retry_at = 0.0
        self._closing.set()
        self._wake.set()
        wait_for(self._thread, timeout, hurried)
        self._abandoned = True

    def _loop(self) -> None:
        share_cpu()
        wait: float | None = None
        while True:
            self._busy_since = 0.0
            self._wake.wait(wait)
            self._wake.clear()
            self._busy_since = time.monotonic()
            self._closing.wait(max(0.0, self._next_at - time.monotonic()))
            closing = self._closing.is_set()
            try:
                wait = self._deliver()
            except Exception as error:
                if self._abandoned:  # the daemon closes what this thread used
                    return
                wait = 1.0
                if isinstance(error, JournalError):
                    log.error("cannot read results: %s", error)
                else:
                    log.exception(
                        "the callback thread goes on after an unexpected error, please report it"
                    )
            if closing and self._no_more(wait):
                return

    def _no_more(self, wait: float | None) -> bool:
        """While closing: whether nothing is due in time but what was refused, or nobody answers."""
        unreachable = time.monotonic() < self._retry_at
        fresh = self._withheld or self._refused.in_parts()
        if wait is None or not (unreachable or fresh or wait == 0.0):
            return True
        late = time.monotonic() + wait > self._close_by
        return late or self._abandoned or not self._last_tries

    def _deliver(self) -> float | None:
        """Send what is due; returns the seconds until something else is, 0 when there may be more
        already, None when nothing waits."""
        taken_state = RunState.ACKNOWLEDGED if self._admin.addresses else RunState.DELIVERED
        while True:
            now = time.monotonic()
            if self._pardoned.is_set():
                self._pardoned.clear()
                self._refused.pardon()
            if now < self._retry_at:
                return self._retry_at - now
            fresh, again = self._undelivered(now)
            self._withheld = False
            if fresh and self._refused.too_many():
                self._withheld = not self._refused.may_ask()
                fresh = [] if self._withheld else fresh[:1]
            if len(fresh) >= BATCH:
                self._attempt(Part(fresh[:BATCH], RunState.FINISHED, taken_state))
                continue
            due = [Part(fresh, RunState.FINISHED, taken_state)] if fresh else []
            may_repeat = self._admin.addresses and not self._closing.is_set()
            in_hand = self._in_hand()  # before reading, and before next_part() takes one out
            repeat, wait = self._repeats.due(in_hand) if may_repeat else (None, float("inf"))
            part = self._refused.next_part()
            if part is not None:
                due.append(part)
            elif again and not self._refused.in_parts() and self._refused.may_ask():
                due.append(Part(again[:BATCH], RunState.FINISHED, taken_state))
            if repeat is not None:
                due.append(repeat)
            if not all(map(self._attempt, due)):
                continue
            if due and self._refused.in_parts() and self._refused.may_ask():
                continue
            if due:  # what ends meanwhile goes into the next request
                self._next_at = now + PACE
                return 0.0
            soonest = min(wait, self._refused.soonest(self._withheld) - now)
            return None if soonest == float("inf") else max(0.05, soonest)

    def _attempt(self, part: Part) -> bool:
        """Send `part`; whether the admin has answered, else nothing is sent for a while."""
        try:
            self._send(part)
        except AdminUnreachable as error:
            self._metrics.count("callback_failures_total")
            wait = self._backoff.fail()
            if self._closing.is_set():  # such as one reset of a connection that was idle
                wait, self._last_tries = min(wait, LAST_PAUSE), self._last_tries - 1
            self._retry_at = time.monotonic() + wait
            if str(error) != self.last_error:  # an outage is told once, not once a minute
                log.warning(
                    "cannot deliver %s, next attempt in %s: %s",
                    counted(len(part.rows), "result"),
                    seconds_text(wait),
                    error,
                )
            self.last_error = str(error)
            if (part.was_split or self._backoff.failures > 1) and self._heard.is_set():
                self._blame(part)
            self._heard.clear()
            return False
        self._backoff.succeed()
        self._heard.set()
        if not self._refused.results and not self._refused.in_parts():
            self.last_error = ""
        return True

    def _blame(self, part: Part) -> None:
        """Heartbeats are answered, and these results are not: one of them may be what a proxy
        blocks."""
        if len(part.rows) > 1:
            self._refused.split(part)
        elif part.before is RunState.FINISHED:
            self._refused.add(part.rows[0].log_id)
        else:
            self._repeats.put_off()

    def _send(self, part: Part) -> None:
        """Deliver `part`, and note what becomes of its results. A repeat (`before` is not FINISHED)
        was taken before: if the admin refuses one alone now, as when it has deleted its log, that
        counts as taken."""
        rows, before, after, _ = part
        self._busy_since = time.monotonic()
        try:
            self._admin.callback(rows)
        except AdminRefused as error:
            if before is not RunState.FINISHED and error.away:
                self._repeats.put_off()
                return
            if len(rows) > 1:
                self._refused.split(part)
                return
            if before is RunState.FINISHED:
                log_id, self.last_error = rows[0].log_id, str(error)
                if log_id not in self._refused.results:  # each is told once
                    told = "the admin refuses the result of logId=%d, trying again later: %s"
                    log.warning(told, log_id, error)
                self._refused.add(log_id)
                self._metrics.count("callback_failures_total")
                return
        # taken, or a repeat that is refused alone
        if before is not RunState.FINISHED:
            self._repeats.taken()
            self._metrics.count("results_resent_total", len(rows))
        elif self._admin.addresses:  # else nobody waits for them
            failpoint("sent")
            self._refused.taken(rows)
            log.info("delivered %s", " ".join(f"logId={row.log_id}" for row in rows))
        self._settle(rows, before, after)


# --------------------------------------------------------------------------------------------------
# 11 admin client
# --------------------------------------------------------------------------------------------------
REPLY_LIMIT = 64 << 10  # bytes of an admin's answer that are read
# the beginning of what `_verdict` says: what to do about it, and what to add without a token
_ADVICE = (
    (
        "HTTP status 404",
        "nothing is there: up to 3.4.0 the address ends with /xxl-job-admin unless the admin was"
        " told otherwise, from 3.4.1 it has no path",
        "",
    ),
    (
        "HTTP status 3..$",
        "that is a page: give the admin's root, such as http://HOST:8080/xxl-job-admin",
        "",
    ),
    (
        ".*accesstoken or appname",
        "a 3.5 wants the AccessToken of this AppName on its executor's page instead of"
        " xxl.job.accessToken, and takes 30 s to notice a new one",
        "; admin.access_token is empty here",
    ),
    (
        ".*access ?token",
        "give both the same: xxl.job.accessToken there, admin.access_token here",
        ", which is empty",
    ),
)


class Address:
    """One address of the admin and its health."""

    def __init__(self, url: str):
        self.url, self.backoff, self.last_error = url, Backoff(), ""
        self.not_before, self.tried_at = (
            0.0,
            float("-inf"),
        )  # monotonic: end of the backoff; when an attempt last began or failed
        self.well = False  # whether the last attempt brought an answer, be it a refusal
        self.last_success = 0.0  # seconds since the epoch


class _Link:
    """A requests session to one address, used by one thread, whose exchanges end in time whatever
    the other side does.

    requests limits each read, not the exchange, and its resolver obeys no limit at all: so names
    are resolved in a thread that can be left behind, and a timer shuts the socket down.
    """

    def __init__(self, url: str, connect_timeout: float, timeout: float):
        import requests
        import urllib3

        self._url, self._connect_timeout, self._timeout = url, connect_timeout, timeout
        self._errors = (
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            OSError,
            ValueError,
            RuntimeError,
        )  # the last: no thread for the timer
        self._socket: socket.socket | None = None
        self._expired = False
        self._session = requests.Session()
        # once, not for each request: the environment's proxies and CA bundle, but no .netrc
        self._session.trust_env = False
        here = is_loopback(urllib.parse.urlsplit(url).hostname or "")
        self._session.proxies = {} if here else requests.utils.get_environ_proxies(url)
        proxy = requests.utils.select_proxy(url, self._session.proxies) or ""
        proxy = proxy and requests.utils.prepend_scheme_if_needed(proxy, "http")
        # for messages, without a password
        self.via = f" (through the proxy {proxy.rpartition('@')[2]})" if proxy else ""
        self._session.verify = (
            os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        )
        link = self

        class Http(urllib3.connection.HTTPConnection):
            def _new_conn(self) -> socket.socket:
                return link._connect(self)

        class Https(urllib3.connection.HTTPSConnection):
            def _new_conn(self) -> socket.socket:
                return link._connect(self)

        class HttpPool(urllib3.HTTPConnectionPool):
            ConnectionCls = Http

        class HttpsPool(urllib3.HTTPSConnectionPool):
            ConnectionCls = Https

        pools = {"http": HttpPool, "https": HttpsPool}
        for prefix in ("http://", "https://"):
            adapter = requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=1)
            adapter.poolmanager.pool_classes_by_scheme = pools
            if proxy.partition(":")[0] in pools:  # SOCKS has its own
                adapter.proxy_manager_for(proxy).pool_classes_by_scheme = pools
            self._session.mount(prefix, adapter)

    def _connect(self, connection: typing.Any) -> socket.socket:
        """A socket for a connection of urllib3, which takes nothing but its own errors for a
        failure to connect."""
        import urllib3

        deadline = time.monotonic() + self._connect_timeout
        try:
            error: Exception = OSError(f"{connection.host} has no address")
            for family_, type_, protocol, _, target in resolve(
                connection.host, connection.port, self._connect_timeout
            ):
                sock = socket.socket(family_, type_, protocol)
                try:
                    sock.settimeout(max(0.01, deadline - time.monotonic()))
                    sock.connect(target)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                except OSError as failure:
                    sock.close()
                    error = failure
                    continue
                self._disconnect()
                self._socket = sock.dup()  # stays usable for the timer when TLS wraps the original
                return sock
            raise error
        except OSError as failure:
            raise urllib3.exceptions.NewConnectionError(connection, str(failure)) from failure

    def _expire(self) -> None:
        self._expired = True
        sock = self._socket  # once: its thread may close it meanwhile
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def post(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        """(HTTP status, at most REPLY_LIMIT + 1 bytes). Raises AdminUnreachable."""
        self._expired, ends_at = False, time.monotonic() + self._timeout
        timer = threading.Timer(self._timeout, self._expire)
        timer.daemon = True
        try:
            timer.start()
            with self._session.post(
                self._url + path,
                data=body,
                headers=headers,
                timeout=(self._connect_timeout, self._timeout),
                stream=True,
                allow_redirects=False,
            ) as reply:
                data = b""
                for part in reply.iter_content(8192):
                    data += part
                    if len(data) > REPLY_LIMIT:
                        self._disconnect()
                        break
            if self._expired:  # what was read may end in the middle
                raise TimeoutError
            return reply.status_code, data
        except self._errors as error:
            self._disconnect()
            reason = (
                f"no complete answer within {seconds_text(self._timeout)}"
                if self._expired or time.monotonic() >= ends_at  # the socket's own limit was first
                else root_cause(error)
            )
            if "WRONG_VERSION_NUMBER" in reason:
                reason += "; no TLS is spoken there: is it http:// instead of https://?"
            raise AdminUnreachable(f"{self._url}{path}{self.via}: {reason}") from None
        finally:
            timer.cancel()

    def _disconnect(self) -> None:
        """By its thread, or by the main thread at the end, perhaps at once."""
        sock, self._socket = self._socket, None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def close(self) -> None:
        self._session.close()
        self._disconnect()


def root_cause(error: BaseException) -> str:
    """What lies below the wrappings of requests and urllib3, in a few words."""
    while True:
        inner = [
            cause
            for cause in (getattr(error, "reason", None), error.__cause__, *error.args)
            if isinstance(cause, BaseException)
        ]
        if not inner:
            shown = "".join(char if char.isprintable() else " " for char in str(error))
            return " ".join(shown.split()) or type(error).__name__
        error = inner[0]


def resolve(host: str, port: int, seconds: float) -> list:
    """socket.getaddrinfo within `seconds`; a resolver that hangs keeps a thread of its own, not the
    caller's. Raises OSError."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host.partition("%")[0])
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    box: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            box.put(error)

    try:
        threading.Thread(target=work, name="resolver", daemon=True).start()
        answer = box.get(timeout=seconds)
    except RuntimeError as error:
        raise OSError(f"{host} was not resolved: {error}") from None
    except queue.Empty:
        raise OSError(f"{host} was not resolved within {seconds_text(seconds)}") from None
    if isinstance(answer, OSError):
        raise OSError(f"{host}: {answer.strerror or answer}")
    if isinstance(answer, UnicodeError):  # an empty label, or one of more than 63 characters
        raise OSError(f"{host} is no name of a host")
    return answer


class AdminClient:
    """Calls the admin at the first address that answers; any thread, each with connections of its
    own.

    Typed failures: AdminUnreachable when no address gave an answer, AdminRefused when one answered
    anything but code 200.
    """

    def __init__(self, config: Config, dialect: str, learn: typing.Callable[[str, str], None]):
        self.addresses = [Address(url) for url in config.admin.addresses]
        self._config, self._learn = config, learn
        self._dialect = dialect or "array"  # or "wrapper", from 3.5
        self._learned_at = float("-inf")  # monotonic; when a call last told
        self._turn, self._closing = threading.Lock(), threading.Event()  # it guards `tried_at`
        self._links: dict[tuple[int, str], _Link] = {}  # by thread and address
        self.missed_at = 0.0  # monotonic; when one that had answered did not any more
        self.use_token(config.admin.access_token)

    def use_token(self, token: str | None) -> None:
        """Send `token` from now on; all headers of requests to the admin are made here."""
        self._token = token
        self._headers = {
            "Content-Type": "application/json;charset=UTF-8",
            "XXL-JOB-APPNAME": self._config.executor.app_name,
            "XXL-JOB-ACCESS-TOKEN": token or "",
        }  # 3.3.0 insists on it, even when empty

    def registry(self, address: str, remove: bool = False, parked: bool = False) -> None:
        """Register `address`, or take it back. Tries every address of the admin until one answers,
        also those in a backoff. `parked`: under a key that no AppName can have, so that no trigger
        comes, and yet the admin does not take the runs of this address for lost."""
        key = self._config.executor.app_name + ("/draining" if parked else "")
        body = {"registryGroup": "EXECUTOR", "registryKey": key, "registryValue": address}
        self._call("/api/registryRemove" if remove else "/api/registry", body, eager=True)

    def callback(self, rows: typing.Sequence[StoredResult]) -> None:
        """Deliver results; returns only after an unambiguous acknowledgement, or when there is no
        admin at all. Whatever is refused is tried once more in the other dialect, at once."""
        if not self.addresses:
            return
        items = [
            {
                "logId": row.log_id,
                "logDateTim": row.log_date_time,
                "logDateTime": row.log_date_time,
                "handleCode": row.code,
                "handleMsg": row.message,
                "executeResult": {"code": row.code, "msg": row.message},
            }
            for row in rows
        ]  # all spellings, 2.2.0's too
        bodies = {"array": items, "wrapper": {"callbackList": items}}
        dialect = self._dialect
        try:
            self._call("/api/callback", bodies[dialect])
        except AdminRefused:
            other = "wrapper" if dialect == "array" else "array"
            with contextlib.suppress(AdminRefused, AdminUnreachable):
                self._call("/api/callback", bodies[other])
                self._set_dialect(other)
                return
            raise

    def learned(self, path: str) -> None:
        """Take the dialect from the path that the admin called: only a 3.5 calls /trigger. At most
        once a second: a caller of both must not fill the log and the journal."""
        dialect, now = "wrapper" if path == "/trigger" else "array", time.monotonic()
        if dialect != self._dialect and now >= self._learned_at + 1.0:
            self._learned_at = now
            self._set_dialect(dialect)

    def _set_dialect(self, dialect: str) -> None:
        if dialect != self._dialect:
            self._dialect = dialect
            log.info(
                "the admin speaks the dialect of version %s",
                "3.5" if dialect == "wrapper" else "3.4 or older",
            )
            self._learn("dialect", dialect)

    def _call(self, path: str, body: typing.Any, eager: bool = False) -> None:
        """POST to one address after the other until one answers with an envelope: an error page has
        the next one asked. Every request to the admin is made here. Raises AdminUnreachable and
        AdminRefused."""
        now = time.monotonic()
        candidates = [a for a in self.addresses if eager or now >= a.not_before]
        # else heartbeats that fail would put off results for ever, and those have a backoff of
        # their own
        if not candidates:
            candidates = [min(self.addresses, key=lambda a: a.not_before)]
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        waiting = sorted(candidates, key=lambda a: a.not_before > now)
        failure: ExecutorError
        while waiting:
            address, link = self._next(waiting)
            try:
                status, reply = link.post(path, self._headers, data)
            except AdminUnreachable as error:
                self._miss(address)
                address.well = False
                address.last_error = str(error)
                with self._turn:
                    address.tried_at = time.monotonic()
                address.not_before = address.tried_at + address.backoff.fail()
                failure = error
                continue
            address.backoff.succeed()
            address.not_before, address.well = 0.0, True
            code, message = self._verdict(status, reply)
            if code == SUCCESS:
                address.last_error, address.last_success = "", time.time()
                return
            if code is None and eager:  # a heartbeat; a callback may be refused for what it holds
                self._miss(address)
            for pattern, advice, empty in _ADVICE:
                if re.match(pattern, message, re.IGNORECASE | re.DOTALL):
                    message = f"{message.rstrip('.')}; {advice}{'' if self._token else empty}"
                    break
            # An error page, or a token that is wrong now, says nothing of what was sent; but a page
            # that a proxy shows to some requests may.
            shown = code is not None or status in (400, 403, 405, 406, 413, 422)
            away = not shown or re.search("access ?token", message, re.IGNORECASE) is not None
            failure = AdminRefused(f"{address.url}{path}{link.via}: {message}", away)
            address.last_error = str(failure)
            if code is not None:  # one cluster: the others would say the same
                break
        raise failure

    def _miss(self, address: Address) -> None:
        if not address.last_error:  # until now it was there
            self.missed_at = time.monotonic()

    def _next(self, waiting: list[Address]) -> tuple[Address, _Link]:
        """Take the first address from `waiting` that may be tried; wait until one may.

        One that does not answer, or has not yet, is tried once a second, by all threads together.
        Who comes in between waits for his turn: if he failed instead, with a backoff, heartbeats
        could stay away for as long as callbacks fail.
        """
        while True:
            for address in waiting:
                link = self._link(address.url)  # takes a while when it is the first
                with self._turn:
                    now = time.monotonic()
                    if address.well or now >= address.tried_at + 1.0:
                        address.tried_at = now
                        waiting.remove(address)
                        return address, link
            if self._closing.wait(
                max(0.0, min(a.tried_at for a in waiting) + 1.0 - time.monotonic())
            ):
                raise AdminUnreachable("the executor stops")

    @staticmethod
    def _verdict(status: int, reply: bytes) -> tuple[int | None, str]:
        """(code, reason) of an answer; code None when it is no envelope at all, as from a proxy or
        an error page."""
        if status != 200:
            return None, f"HTTP status {status}"
        if len(reply) > REPLY_LIMIT:
            return None, f"an answer of more than {REPLY_LIMIT} bytes"
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            answer = json.loads(reply)
            if type(answer["code"]) is int:
                return answer["code"], f"code {answer['code']}: {str(answer.get('msg'))[:500]}"
        return None, f"no XXL-JOB answer: {reply[:60]!r}"

    def _link(self, url: str) -> _Link:
        key, admin = (threading.get_ident(), url), self._config.admin
        if key not in self._links:
            self._links[key] = _Link(url, admin.connect_timeout, admin.timeout)
        return self._links[key]

    def close(self) -> None:
        """After the threads that call have ended, or were left behind."""
        self._closing.set()
        for link in list(self._links.values()):
            link.close()


# --------------------------------------------------------------------------------------------------
# 12 registration
# --------------------------------------------------------------------------------------------------
# Seconds between heartbeats, as RegistryConfig.BEAT_TIMEOUT of XXL-JOB. The admin forgets who was
# silent for 90 s, whatever stands here, and examples/prometheus-alerts.yaml warns after 120.
REGISTRY_INTERVAL = 30.0
MOST_PARKED = 10  # addresses of earlier lives
OUTAGE_INTERVAL = 600.0  # seconds between two lines of the log while the admin is away


def facing_address(url: str, seconds: float, families: tuple[int, ...]) -> str:
    """The IP address, of one of these `families`, of the interface that faces `url`. Raises OSError
    while it cannot be told."""
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    failure = OSError(f"{host} has no address of the kind that executor.bind listens on")
    for family_, _, _, _, target in resolve(host, port, seconds):
        if family_ in families:
            try:
                with socket.socket(family_, socket.SOCK_DGRAM) as probe:
                    probe.connect(target)  # sends nothing
                    return probe.getsockname()[0]
            except OSError as error:
                failure = error
    raise failure


class Registration:
    """The heartbeat thread: registers at start and every REGISTRY_INTERVAL, takes it back at the
    end; no failure ends it.

    An address to which runs were sent whose results have yet to come must stay known to the admin,
    or it takes them for lost: while this executor drains, and after a restart under another
    address, it is parked under a key to which no trigger is routed.
    """

    def __init__(
        self,
        config: Config,
        admin: typing.Any,
        metrics: Metrics,
        port: int,
        core: typing.Any,
        journal: typing.Any,
        answered: typing.Callable[[bool], None],
    ):
        """`answered(b)`: the admin answers; whether it did not before."""
        self._config, self._admin, self._metrics, self._port = config, admin, metrics, port
        self._core, self._journal, self._answered = core, journal, answered
        self._draining, self._closed = threading.Event(), threading.Event()
        self._backoff = Backoff()
        self._since, self._told_at = 0.0, 0.0  # monotonic: of the first failure, of the last line
        # once registered never changed: the admin compares it as text with where it sent its runs,
        # so the old one would have to be parked
        self.address = ""
        self._parked: list[str] = []  # other addresses, of earlier lives; when draining, this one
        self.registered = threading.Event()  # at the first success, and never cleared
        self._thread = threading.Thread(target=self._loop, name="registration", daemon=True)
        self._acknowledged_at = 0.0  # seconds since the epoch; the last heartbeat
        metrics.gauges["last_heartbeat_timestamp_seconds"] = lambda: self._acknowledged_at

    def start(self) -> None:
        if self._admin.addresses:
            self._thread.start()

    def drain(self) -> None:
        """Have the thread take the registration back, so that no trigger comes."""
        self._draining.set()

    def close(self, seconds: float, hurried: typing.Callable[[], bool]) -> None:
        """Nothing runs any more, and its results are delivered: take back the rest, within
        `seconds` and until `hurried()`."""
        self._draining.set()
        self._closed.set()
        wait_for(self._thread, seconds, hurried)

    def _loop(self) -> None:
        wait = 0.0
        while not self._draining.wait(wait):
            wait = self._try(self._register)
        if self.registered.is_set():
            if self._core.active():
                self._parked.insert(0, self.address)
            wait = self._try(self._park)  # first: it must not be unknown for a moment
            self._take_back(self.address, False)
            while not self._closed.wait(wait):
                wait = self._try(self._park)
            if not self._waiting():  # else the admin forgets them by itself, after 90 s
                for address in self._parked:
                    self._take_back(address, True)

    def _register(self) -> None:
        """A heartbeat, of earlier addresses that are still needed too; finds out this one first,
        until the admin has taken it."""
        if not self.registered.is_set():
            self.address = self._config.executor.address or self._own_address()
            with contextlib.suppress(ValueError):  # a damaged page, or the first start
                earlier = json.loads(self._journal.fact("addresses"))
                earlier = [address for address in earlier if address != self.address]
                self._parked = earlier[-MOST_PARKED:]
        self._admin.registry(self.address)
        self._acknowledged_at = time.time()
        if self._parked and not self._journal.owes():
            for address in self._parked:
                self._admin.registry(address, remove=True, parked=True)
            self._parked = []
        self._park()
        known = json.dumps([*self._parked, self.address])
        if known != self._journal.fact("addresses"):
            self._journal.learn("addresses", known)
        if self._backoff.failures or not self.registered.is_set():
            log.info("registered %s as %s", self.address, self._config.executor.app_name)
        self._answered(self._backoff.failures > 0)
        self.registered.set()

    def _park(self) -> None:
        """Keep parked addresses known."""
        for address in self._parked:
            self._admin.registry(address, parked=True)
            self._acknowledged_at = time.time()

    def _try(self, work: typing.Callable[[], None]) -> float:
        """Do `work`; returns the seconds until the next time, REGISTRY_INTERVAL at most."""
        began = time.monotonic()
        try:
            work()
        except Exception as error:
            return min(self._failed(error), REGISTRY_INTERVAL)
        self._backoff.succeed()
        return max(1.0, REGISTRY_INTERVAL - (time.monotonic() - began))

    def _take_back(self, address: str, parked: bool) -> None:
        try:
            self._admin.registry(address, remove=True, parked=parked)
            self._answered(False)
            what = "draining " if parked else ""
            log.info("took back the %sregistration of %s", what, address)
        except Exception as error:
            log.warning(
                "could not take back the registration of %s, the admin forgets it by itself: %s",
                address,
                error,
            )

    def _waiting(self) -> int:
        return self._journal.counts()["undelivered"]

    def _own_address(self) -> str:
        host = self._config.executor.bind[0]
        if host in ("0.0.0.0", "::"):
            # what listens on all IPv4 addresses is not found at one of IPv6
            families = (socket.AF_INET, *((socket.AF_INET6,) if host == "::" else ()))
            why = "no admin.addresses"
            for admin in self._admin.addresses:
                try:
                    host = facing_address(admin.url, self._config.admin.connect_timeout, families)
                    break
                except OSError as failure:
                    why = str(failure)
            else:
                raise OSError(f"{why}; executor.address can say where this executor is reached")
        return f"http://{authority(host, self._port)}/"

    def _failed(self, error: Exception) -> float:
        self._metrics.count("registration_failures_total")
        wait, now = self._backoff.fail(), time.monotonic()
        first = self._backoff.failures == 1
        if first:
            self._since = self._told_at = now
        if not isinstance(error, (OSError, ExecutorError)):
            log.exception(
                "the registration thread goes on after an unexpected error, please report it"
            )
        elif first:
            log.warning("cannot register at the admin, trying again until it works: %s", error)
        elif now >= self._told_at + OUTAGE_INTERVAL:
            self._told_at = now
            log.warning(
                "the admin has not taken a registration for %s, since %s; %s: %s",
                seconds_text(now - self._since),
                local_time(int(time.time() - (now - self._since))),
                f"{counted(self._waiting(), 'result')} waiting",
                error,
            )
        return wait


# --------------------------------------------------------------------------------------------------
# 13 systemd
# --------------------------------------------------------------------------------------------------
LISTEN_FDS_START = 3  # <systemd/sd-daemon.h>
STATUS_INTERVAL = 5.0  # seconds


def notify(state: str) -> None:
    """Tell systemd, as sd_notify(3) does; nothing happens without $NOTIFY_SOCKET."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] in ("/", "@"):
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.sendto(
                state.encode("utf-8", "replace"),
                "\0" + address[1:] if address[0] == "@" else address,
            )


class ServiceManager:
    """What systemd is told while the daemon runs, and the watchdog; main thread. `due` is None
    without $NOTIFY_SOCKET."""

    def __init__(self, status: typing.Callable[[], str], well: typing.Callable[[], bool]):
        """`status()` is shown by systemctl; the watchdog is fed only while `well()`."""
        self._status, self._well, self._shown = status, well, ""
        mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = os.environ.get("WATCHDOG_USEC", "") if mine else ""
        self._watched = usec.isdigit() and int(usec) > 0
        self._interval = min(STATUS_INTERVAL, int(usec) / 2e6) if self._watched else STATUS_INTERVAL
        self.due = time.monotonic() + self._interval if os.environ.get("NOTIFY_SOCKET") else None

    def tell(self) -> None:
        """Tell systemd the status, and feed the watchdog; to be called at `due`."""
        self.due = time.monotonic() + self._interval
        status = self._status()
        lines = [f"STATUS={status}"] if status != self._shown else []
        self._shown = status
        if self._watched:
            if self._well():
                lines.append("WATCHDOG=1")
            else:
                log.error(
                    "a thread of the executor makes no progress (HTTP, core, job processes or"
                    " delivery): systemd may restart this service"
                )
        if lines:
            notify("\n".join(lines))


def inherited_listener() -> socket.socket | None:
    """The socket that systemd listens on for this process, as sd_listen_fds(3) does. Raises
    ExecutorError."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS", "0") == "0":
        return None
    os.environ["LISTEN_PID"] = ""  # once
    os.set_inheritable(LISTEN_FDS_START, False)
    try:
        listener = socket.socket(fileno=LISTEN_FDS_START)
    except OSError as error:
        raise ExecutorError(f"the service manager passed no socket: {error.strerror}") from None
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or not listener.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        listener.close()
        raise ExecutorError(
            "the first socket that systemd passed does not listen for TCP: its unit needs"
            " ListenStream=<port>"
        )
    return listener


# --------------------------------------------------------------------------------------------------
# 14 daemon
# --------------------------------------------------------------------------------------------------
RESUME_WINDOW = 300.0  # seconds; an accepted run that is older is not started after a restart
# seconds that a stop with a socket unit keeps requests for the next executor; the admin waits 3
HOLD = 1.0
# of one run with on_crash: rerun; a job that brings the executor down must not do so for ever
MAX_STARTS = 3
FOLLOW_INTERVAL = 0.2  # seconds between two looks at a log that is followed
WATCH_INTERVAL = (
    1.0  # seconds between two looks at the files with executor.watch_config, and of status --watch
)
STALLED = 30.0  # seconds of one turn after which systemd may restart the service
DELIVER_LIMIT = 5.0  # seconds of a stop for what is left to be delivered, and to be taken back
HOUSEKEEPING = 3600.0  # seconds between two prunings of logs and journal


class Owner(typing.NamedTuple):
    """The executor that uses a data directory, or that used it last."""

    pid: int
    url: str  # where it listens, "" when it does not
    key: str  # shown to /status instead of the token
    started: int  # as /proc has it, so that another process with this PID is not taken for it
    since: float  # when that was written

    def alive(self) -> bool:
        with contextlib.suppress(OSError):
            process = process_stat(self.pid)
            return process is not None and process.alive and process.started == self.started
        return False


def refuse_planted(path: str) -> None:
    """Raises ExecutorError for what somebody else has put where this executor writes: a link could
    have root write anywhere."""
    files = [f"journal.db{part}" for part in ("", ".new", ".part")]
    files += [file + suffix for file in files for suffix in ("-wal", "-shm", "-journal")]
    names = ("lock", "reserve", *files, "logs", "run", "gluesource")
    places = [os.path.join(path, name) for name in names]
    if os.path.islink(path.rstrip("/")):  # of a directory HostCheck warns
        places.append(path.rstrip("/"))
    for place in places:
        with contextlib.suppress(OSError):
            owner = os.lstat(place).st_uid
            if owner not in (0, os.geteuid()):
                raise ExecutorError(
                    f"executor.data_dir: {place} belongs to user {owner}, who could have this"
                    " executor write where he wants: remove it, or give it to the executor's user"
                    " with chown -h"
                )


class DataDir:
    """The locked data directory: one daemon at a time, and an identity by which its processes are
    known after a crash."""

    def __init__(self, path: str):
        self.path = path
        make_directory(path)
        refuse_planted(path)
        try:
            self._fd = os.open(
                os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640
            )
        except OSError as error:
            raise unusable(error) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise ExecutorError(
                f"executor.data_dir: {path} is in use by another executor"
                f" (pid {self.owner(path).pid or 'unknown'}): stop it, or give this one a data_dir"
                " of its own"
            ) from None
        lock = os.fstat(self._fd)
        self._place = f"{lock.st_dev}:{lock.st_ino}"
        lines = os.pread(self._fd, 4096, 0).decode("ascii", "replace").splitlines()
        identity = lines[0].partition(" ")[0] if lines else ""
        copied = len(lines) > 1 and lines[1] != self._place  # of another one's, who may be running
        if copied:
            log.warning(
                "%s was copied, or its file system is mounted anew: what was started from the"
                " earlier place is left alone",
                path,
            )
        valid = re.fullmatch(r"[0-9a-f]{16}", identity) and not copied
        self.identity = identity if valid else secrets.token_hex(8)
        self.key, stat_ = secrets.token_hex(16), process_stat(os.getpid())
        self._started = stat_.started if stat_ is not None else 0
        try:
            self.publish("")
        except ExecutorError:
            os.close(self._fd)
            raise

    def publish(self, url: str) -> None:
        """Note this process and where it listens, for `status` and for whoever is refused by the
        lock. Raises ExecutorError."""
        words = self.identity, os.getpid(), url or "-", self.key, self._started
        data = f"{' '.join(map(str, words))}\n{self._place}\n".encode()
        try:
            os.pwrite(self._fd, data, 0)
            os.ftruncate(self._fd, len(data))
        except OSError as error:
            error.filename = os.path.join(self.path, "lock")
            raise unusable(error) from None

    def close(self) -> None:
        with contextlib.suppress(ExecutorError):  # a disk that has become read-only
            self.publish("")
        os.close(self._fd)

    @staticmethod
    def owner(path: str) -> Owner:
        """Of pid 0 when no executor has used `path`. Raises ExecutorError for who may not read
        it."""
        file = os.path.join(path, "lock")

        def opener(path: str, flags: int) -> int:  # it may be a FIFO
            return os.open(path, flags | os.O_NONBLOCK)

        try:
            with open(file, encoding="ascii", opener=opener) as stream:
                _, pid, url, key, started = stream.read(4096).split("\n")[0].split()
                since = os.fstat(stream.fileno()).st_mtime
            return Owner(int(pid), url if url != "-" else "", key, int(started), since)
        except (FileNotFoundError, ValueError):  # or by an earlier version, or being written
            return Owner(0, "", "", 0, 0.0)
        except OSError as error:
            raise ExecutorError(
                f"{file}: cannot be read: {error.strerror}: this needs the executor's user or root"
            ) from None


def end_leftovers(journal: Journal, identity: str) -> None:
    """End what an executor that crashed left running; what finished jobs were allowed to leave
    stays."""
    markers = [f"{identity}-"] + [
        f"{identity}+{trigger.log_id:020d}"
        for trigger, state, *_ in journal.unfinished()
        if state is RunState.RUNNING
    ]
    for marker in markers:
        leftovers = family(marker)
        if leftovers:
            log.warning("ending %d processes that jobs of an earlier executor left", len(leftovers))
            survivors = kill_family(marker)
            if survivors:
                log.error("processes %s cannot be ended: end them by hand", survivors)


RUN_AGAIN = "executor restarted while the job ran; it is run again"


def recover(
    journal: Journal,
    logs: JobLogs,
    core: Core,
    scripts: GlueScripts,
    find: typing.Callable[[str], JobConfig],
) -> None:
    """Runs that the last executor did not finish: start again, or report."""
    for run in journal.unfinished():
        trigger, job = run.trigger, None
        with contextlib.suppress(Refused):  # not enabled any more, or removed
            if trigger.glue_type in GLUE:
                job = scripts.job(trigger)
            elif trigger.glue_type == "BEAN":
                job = find(trigger.handler)
        rerun = job is not None and job.on_crash == "rerun" and run.starts < MAX_STARTS
        again = rerun and run.state is RunState.RUNNING and run.cancelled is None
        result = run.cancelled or Result(FAILURE, "" if again else why_lost(run, job))
        if run.state is RunState.RUNNING:
            told = f"failed: {result.message}" if result.message else RUN_AGAIN
            more = "; the executor restarted meanwhile" if run.cancelled else ""
            logs.open(trigger).end(told + more)
        if result.message or job is None:
            log.warning("failed %s: %s", trigger, result.message)
            core.put(Lost(Span(trigger, run.began, None), result))
        else:
            log.info("resumed %s", trigger)
            core.put(Resume(trigger, job, again))
    journal.forget_dropped()


def why_lost(run: Unfinished, job: JobConfig | None) -> str:
    """Why a run of an earlier life does not go on, "" when it does."""
    if run.state is RunState.RUNNING:
        return "executor restarted while the job ran, its outcome is unknown"
    if run.age > RESUME_WINDOW:
        return (
            f"accepted {seconds_text(run.age)} before the executor restarted, too long ago to"
            " start now"
        )
    if job is None and run.trigger.glue_type:
        told = "was removed or disabled before the run started"
        return f'job handler "{run.trigger.handler}" {told}'
    return "" if job is not None else "its trigger in the journal is broken"


class ConfigFiles:
    """The files that make up the configuration, and whether one was changed, replaced, added,
    removed, or is another one behind a symlink; used by the main thread only."""

    def __init__(self, config: Config):
        self._file, self._patterns = config.file, config.files
        self._seen = self._loaded = self._stamps()  # at the last look, and when they were read

    def _stamps(self) -> list:
        stamps = []
        for file in itertools.chain.from_iterable(map(glob.glob, self._patterns)):
            with contextlib.suppress(OSError):
                status = os.stat(file)
                stamps.append((file, status.st_mtime_ns, status.st_ino, status.st_size))
        return sorted(stamps)

    def changed(self) -> bool:
        """Whether files differ from those that `load` read, and were the same at the last two
        looks."""
        before, self._seen = self._seen, self._stamps()
        return self._seen == before and self._seen != self._loaded

    def load(self) -> Config:
        """Raises ConfigError. Read again when it names other files than before: each stamp must be
        taken before its file is read."""
        while True:
            self._seen = self._loaded = self._stamps()
            try:
                config = load_config(self._file)
            except ConfigError as error:
                if error.files == self._patterns:
                    raise
                self._patterns = error.files
            else:
                if config.files == self._patterns:
                    return config
                self._patterns = config.files


class Signals:
    """Where the main thread waits for signals and wake-ups. `_came` holds the signals too, for the
    pipe may be full. `wake`: any thread; the rest: the main thread."""

    def __init__(self, *numbers: int):
        self._wake_up = WakeUp()
        self.wake = self._wake_up.wake
        self._came: set[int] = set()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        signal.set_wakeup_fd(self._wake_up.write_end, warn_on_full_buffer=False)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        """The handler: CPython runs it before `wait` goes on from reading the signal's byte."""
        self._came.add(number)

    def mute(self, number: int) -> None:
        """Let a signal that does nothing by default wake nobody, until `unmute`."""
        # signal.signal() would complain of one that has come and that no handler has seen yet
        LIBC.signal(number, 0)

    def unmute(self, number: int) -> None:
        signal.signal(number, self._note)

    def wait(self, deadline: float | None = None) -> set[int]:
        """What came, 0 for a wake-up; the empty set at `deadline` (monotonic)."""
        data = self._wake_up.clear() if await_any([self._wake_up.fd], deadline) else b""
        came, self._came = self._came, set()
        return came | {0} if 0 in data else came

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._wake_up.close()


class Pruning:
    """Has a thread of its own remove what is old: there may be very much of it. start, join: the
    main thread."""

    def __init__(
        self, journal: Journal, logs: JobLogs, scripts: GlueScripts, core: Core, before: float
    ):
        """`before`: when this life of the executor began; the first time `core` is told what ran
        until then."""
        self._journal, self._logs, self._scripts, self._core = journal, logs, scripts, core
        self._before, self._remembered = before, False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, config: Config) -> None:
        """Begin to remove what is old, unless that still goes on."""
        if self._thread is None or not self._thread.is_alive():
            work = functools.partial(self._remove_old, config)
            thread = threading.Thread(target=work, name="pruning", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError as error:
                log.warning("cannot prune: %s", error)

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopping.set()

    def join(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def _remove_old(self, config: Config) -> None:
        """Logs, runs in the journal and scripts from the admin, by executor.log_retention; in a
        thread of its own."""
        journal, stop = self._journal, self._stopping.is_set
        keep = config.executor.log_retention
        try:
            if not self._remembered:
                with contextlib.suppress(JournalError):  # the next time, then
                    self._core.remember(journal.latest(self._before, config.jobs))
                    self._remembered = True
            journal.save_clock()
            logs = self._logs.prune(journal.known_for, journal.forget_since, stop)
            runs = journal.prune(stop, keep)
            self._scripts.prune(keep)
        except (OSError, JournalError) as error:
            log.warning("cannot prune: %s", error)
        except Exception:
            log.exception("cannot prune, please report it")
        else:
            if logs or runs:
                log.info("pruned %s and %s", counted(logs, "log"), counted(runs, "run"))


# --------------------------------------------------------------------------------------------------
# 14b wiring, start and stop
# --------------------------------------------------------------------------------------------------
def what_is_left(counts: dict[str, int], core_ended: bool) -> str:
    """What becomes of results that were not delivered, by Journal.counts()."""
    if not core_ended:
        return "the disk of the journal does not answer: the next start reports what is not on it"
    if counts["held"]:
        return (
            f"{counted(counts['held'], 'result')} could not be stored: the next start reports"
            " their outcome as unknown"
        )
    if counts["undelivered"]:
        return f"{counted(counts['undelivered'], 'result')} kept for the next start"
    return "every result is delivered"


class Wiring:
    """Builds every part of the daemon, and closes it; knows them all. The main thread, but for
    `status`: any thread."""

    def __init__(self, config: Config):
        self.config = config
        self._started, self._began = time.time(), time.monotonic()
        self._reload_error = ""  # why the last reload changed nothing
        self._stdout = Output(1) if config.executor.log_to_stdout else None
        self._inherited: tuple | None = None  # the address of a socket of the service manager
        self._core: Core

    def build(self) -> None:
        """Build all parts. Raises ExecutorError; then nothing of it is left."""
        with contextlib.ExitStack() as undo:
            listener, room = self._listen(undo)
            self.metrics = Metrics()
            self._open_data(undo)
            self._build_pipeline(undo)
            self._build_network(listener, room)
            self._add_gauges()
            undo.pop_all()

    def _listen(self, undo: contextlib.ExitStack) -> tuple[socket.socket, int]:
        """The listening socket, and how many connections it may have; `undo` gets what is to be
        closed when a later step fails."""
        listener = inherited_listener()
        if listener is not None:
            undo.callback(listener.close)
            self._inherited = listener.getsockname()[:2]
        self.config = self._bound(self.config)
        refuse_unsafe(self.config, self._inherited is not None)
        room = provide_limits(self.config.executor)
        if listener is None:
            listener = listen(self.config.executor.bind)
            undo.callback(listener.close)
        self.port = listener.getsockname()[1]
        host = self.config.executor.bind[0]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self.url = f"http://{authority(host, self.port)}/"
        return listener, room

    def _bound(self, config: Config) -> Config:
        """`config` with the address that is listened on: that of an inherited socket takes the
        place of `executor.bind`."""
        bind = self._inherited or config.executor.bind
        return dataclasses.replace(config, executor=dataclasses.replace(config.executor, bind=bind))

    def _open_data(self, undo: contextlib.ExitStack) -> None:
        config = self.config.executor
        self._data = DataDir(config.data_dir)
        undo.callback(self._data.close)
        self._journal = Journal(os.path.join(self._data.path, "journal.db"))
        undo.callback(self._journal.close)
        self._logs = JobLogs(
            os.path.join(self._data.path, "logs"),
            config.log_limit,
            config.log_retention,
            self._stdout.write if self._stdout is not None else None,
            lambda: self._journal.reserve.lost,
            functools.partial(self.metrics.count, "log_dropped_bytes_total"),
            config.log_format == "json",
        )
        undo.callback(self._logs.close)
        self._scripts = GlueScripts(
            os.path.join(self._data.path, "gluesource"),
            self.config.glue,
            self._journal.clock.now,
        )

    def _build_pipeline(self, undo: contextlib.ExitStack) -> None:
        """From the decisions to the delivered results."""
        most, post = self.config.executor.max_running, lambda message: self._core.put(message)
        scratch = os.path.join(self._data.path, "run")
        self._processes = Supervisor(self._logs, self._data.identity, scratch, post)
        undo.callback(self._processes.close, 0.0)
        end_leftovers(self._journal, self._data.identity)
        self._admin = AdminClient(self.config, self._journal.fact("dialect"), self._journal.learn)
        self._callbacks = Callbacks(self._journal, self._admin, self.metrics)
        self._journal.on_results = self._callbacks.wake
        self._slots = Slots(most, self._logs, self._processes.timers, post)
        self._core = Core(
            self._journal,
            self._processes,
            self._slots,
            self.metrics,
            most,
            self.config.executor.max_queued,
        )
        self._journal.post = self._core.put
        self._pruning = Pruning(self._journal, self._logs, self._scripts, self._core, self._started)

    def _build_network(self, listener: socket.socket, room: int) -> None:
        """What others reach, and what tells the admin of it."""
        self._registration = Registration(
            self.config,
            self._admin,
            self.metrics,
            self.port,
            self._core,
            self._journal,
            self._callbacks.retry,
        )
        self._api = Api(
            self.config,
            self._core,
            self._logs,
            self._scripts,
            self.metrics,
            self.status,
            self._admin.learned,
            self._data.key,
        )
        self._http = HttpServer(listener, self._api, room)

    def _prepare(self, config: Config) -> None:
        """Warm up what the jobs need."""
        self._processes.prepare(config.jobs.values())
        self._slots.prepare(config.jobs.values())

    def _add_gauges(self) -> None:
        journal = self._journal
        self.metrics.gauges.update(
            connections=lambda: self._http.connections,
            undelivered_results=lambda: journal.counts()["undelivered"],
            oldest_undelivered_seconds=journal.oldest,
            dead_results=lambda: journal.counts()["dead"],
            max_running=lambda: self.config.executor.max_running,
            config_last_reload_successful=lambda: int(not self._reload_error),
            output_dropped_bytes_total=lambda: sum(output.lost for output in Output.all),
        )

    def _well(self) -> bool:
        """For the watchdog: whether the threads that serve all runs make progress.
        ServiceManager.tell names them."""
        admin = self.config.admin
        patience = 30 + 4 * len(admin.addresses) * (admin.timeout + admin.connect_timeout)
        return (
            self._http.alive()
            and self._core.alive(STALLED)
            and self._processes.alive(STALLED)
            and self._callbacks.alive(patience)
        )

    def _systemd_status(self) -> str:
        runs, counts = self._core.snapshot(), self._journal.counts()
        failed = ""
        if self._reload_error:
            failed = f"RELOAD FAILED, the old jobs stay ({self._reload_error[:200]}), "
        return (
            f"{failed}{len(runs['running'])} running, {sum(runs['queued'].values())} queued,"
            f" {counts['undelivered']} undelivered"
        )

    def status(self) -> dict:
        """What `status` shows, else see `_look_back`; any thread. Raises JournalError."""
        now = time.monotonic()
        counts = self._journal.counts()
        addresses = [
            {
                "address": a.url,
                "ok": not a.last_error,
                "error": a.last_error,
                "lastSuccess": a.last_success or None,
                "nextAttempt": round(max(0.0, a.not_before - now), 1),
            }
            for a in self._admin.addresses
        ]
        return {
            "version": __version__,
            "pid": os.getpid(),
            "app": self.config.executor.app_name,
            "started": self._started,
            "uptime": round(now - self._began, 1),
            "address": self._registration.address or self.url,
            "draining": self._api.draining,
            "registered": self._registration.registered.is_set(),
            "jobs": sorted(self.config.jobs),
            **self._core.snapshot(),
            "undelivered": counts["undelivered"],
            "dead": counts["dead"],
            "connections": self._http.connections,
            "oldestUndelivered": round(self._journal.oldest(), 1) or None,
            "lastFailedDelivery": self._callbacks.last_error,
            "reloadError": self._reload_error,
            "admins": addresses,
        }

    def _close_all(self, core_ended: bool) -> None:
        """`core_ended`: else its thread still uses the journal, which stays open."""
        self._slots.close()
        self._processes.close(FLUSH_LIMIT)
        kill_family(f"{self._data.identity}-")
        self._admin.close()
        if core_ended:
            self._journal.close()
        self._logs.close()
        self._data.close()
        if self._stdout is not None:
            self._stdout.flush(FLUSH_LIMIT)


def log_stacks() -> None:
    """Log what every thread does just now (SIGUSR1): by the log, which waits for nobody who reads
    it. Not by `faulthandler.register`: it reads the frames of threads that go on running, and ended
    a busy daemon with a segmentation fault."""
    try:
        with open(os.memfd_create("stacks"), "w+", encoding="utf-8", errors="replace") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            log.info(Lines(stacks.read().splitlines()))
    except OSError as error:  # no descriptor is free
        log.error("cannot tell what the threads do: %s", error.strerror)


def check_host(config: Config) -> None:
    """Warn of what this host lacks, see HostCheck; in a thread of its own: it starts programs, and
    looks into directories that may not answer."""

    def check() -> None:
        try:
            for warning in HostCheck(config).warnings():
                log.warning("%s", warning)
        except Exception:
            log.exception("cannot look for what this host lacks, please report it")

    with contextlib.suppress(RuntimeError):  # no more threads: the first run will tell
        threading.Thread(target=check, name="host-check", daemon=True).start()


def listening_text(config: Config, port: int, inherited: bool) -> str:
    """What the log says at the start."""
    where = "the socket unit's " if inherited else ""
    admins = ", ".join(config.admin.addresses)
    return (
        f"listening on {where}{authority(config.executor.bind[0], port)},"
        f" {counted(len(config.jobs), 'job')}, {f'admin {admins}' if admins else 'no admin'}"
    )


def job_changes(old: dict[str, JobConfig], new: dict[str, JobConfig]) -> str:
    """What a reload has brought, on one line."""
    common = old.keys() & new.keys()
    names = {
        "added": new.keys() - old.keys(),
        "changed": {name for name in common if old[name] != new[name]},
        "removed": old.keys() - new.keys(),
    }
    parts = (f"{what} {', '.join(sorted(which)) or 'none'}" for what, which in names.items())
    return ", ".join([counted(len(new), "job"), *parts])


class Daemon(Wiring):
    """Starts everything in order, stops it without losing a result, acts on signals; the main
    thread, but for `_tell_stopping`, which a timer calls."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1)

    def __init__(self, config: Config, signals: Signals | None = None):
        """`signals`: what has come since the process began; else the daemon takes them later."""
        super().__init__(config)
        self._signals = signals
        self._reap_at: float | None = None
        self._hurry = False  # a stop is to wait for nothing any more but what killing takes
        self._housekeeping_at = time.monotonic()
        self._watch_at = self._housekeeping_at if config.executor.watch_config else None
        self._files = ConfigFiles(config)

    def start(self) -> None:
        """Build and start everything. Raises ExecutorError; nothing runs then."""
        self.build()
        self._start_threads()
        log.info("%s", listening_text(self.config, self.port, self._inherited is not None))
        trim_memory()
        check_host(self.config)
        notify(f"READY=1\nSTATUS=listening on {self.url}, {counted(len(self.config.jobs), 'job')}")
        self._manager = ServiceManager(self._systemd_status, self._well)

    def _start_threads(self) -> None:
        """In the order in which they need each other."""
        config = self.config
        self._processes.start_thread()
        self._prepare(config)
        find = functools.partial(find_job, config)
        recover(self._journal, self._logs, self._core, self._scripts, find)
        self._core.start()
        self._core.flush(STORE_LIMIT)
        self._http.start()
        self._data.publish(self.url)
        self._registration.start()
        self._callbacks.start()

    # -- the main thread's loop

    @property
    def signals(self) -> Signals:
        """The first use installs the handlers: from then on signals are kept for `wait`."""
        if self._signals is None:
            self._signals = Signals(*self.SIGNALS)
        return self._signals

    def wait(self) -> None:
        """Handle signals until one asks for the end."""
        while not self._next(None):
            pass

    def close(self) -> None:
        self.stop()
        self.signals.close()

    def _next(self, deadline: float | None) -> bool:
        """Wait for a signal or a wake-up until `deadline` (monotonic) and act on it; SIGHUP
        reloads, SIGUSR1 logs the stacks, SIGCHLD reaps; True for SIGTERM and SIGINT."""
        signals = self.signals
        due = (deadline, self._reap_at, self._watch_at, self._housekeeping_at, self._manager.due)
        got = signals.wait(min(limit for limit in due if limit is not None))
        now = time.monotonic()
        if self._manager.due is not None and now >= self._manager.due:
            self._manager.tell()
        if self._reap_at is not None and now >= self._reap_at:
            self._reap_at = None
            signals.unmute(signal.SIGCHLD)
            reap_orphans()
        elif signal.SIGCHLD in got and self._reap_at is None:
            # Each job that ends raises one, and the supervisor reaps those itself: once a second
            # is enough for orphans.
            self._reap_at = now + 1.0
            signals.mute(signal.SIGCHLD)
        if now >= self._housekeeping_at:
            self._housekeeping_at = now + HOUSEKEEPING
            self._pruning.start(self.config)
        if signal.SIGUSR1 in got:
            log_stacks()
        changed = signal.SIGHUP in got
        if self._watch_at is not None and now >= self._watch_at:
            self._watch_at = now + WATCH_INTERVAL
            changed = self._files.changed() or changed
        if changed and not self._api.draining:
            self.reload()
        return bool(got & {signal.SIGTERM, signal.SIGINT})

    def reload(self) -> None:
        """Read the configuration again and take over what a reload may change, see `_take_over`; a
        bad file changes nothing."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        old = self.config
        try:
            new = self._bound(self._files.load())
            meant = dataclasses.replace(new, executor=old.executor, glue=old.glue)
            refuse_unsafe(meant, self._inherited is not None)
        except Exception as error:  # no file may end what runs
            first, *more = str(error).splitlines() or [type(error).__name__]
            first += f" (and {len(more)} more, see check)" if more else ""
            unexpected = not isinstance(error, ConfigError)
            log.error("reload failed, the old jobs stay: %s", first, exc_info=unexpected)
            self._reload_error = printable(f"{local_time(int(time.time()))}: {first}")
        else:
            self._reload_error = ""
            self._take_over(old, new)
        notify("READY=1")

    def _take_over(self, old: Config, new: Config) -> None:
        """What a reload may change; warns of what it may not."""
        self._prepare(new)  # before the first trigger of a new job
        token, file = new.admin.access_token, new.admin.access_token_file
        admin = dataclasses.replace(old.admin, access_token=token, access_token_file=file)
        if token != old.admin.access_token:
            self._admin.use_token(admin.access_token)
            log.info("the access token has changed")
        taken = dataclasses.replace(old, admin=admin, jobs=new.jobs, scripts=new.scripts)
        for part in ("admin", "executor", "glue"):
            if getattr(taken, part) != getattr(new, part):
                log.warning(
                    "%s has changed in %s: that takes effect at a restart, a reload takes over"
                    " only jobs and the token",
                    part,
                    old.file,
                )
        self.config = self._api.config = taken
        check_host(new)
        log.info("reloaded %s: %s", old.file, job_changes(old.jobs, new.jobs))

    def _tell_stopping(self) -> None:
        """The next executor has not come in time: tell those who are held that this one stops."""
        self._api.draining = True
        self._http.release()

    def stop(self) -> None:
        """Drain, end what still runs, deliver, close. Another SIGTERM or SIGINT ends the draining.
        systemd is told nothing after `_end_runs`: TimeoutStopSec in the unit files allows for all
        of it."""
        log.info(
            "stopping: no new runs, up to %s for those that run",
            seconds_text(self.config.executor.drain_timeout),
        )
        notify("STOPPING=1")
        self._pruning.stop()
        self._registration.drain()
        if self._inherited:  # who comes now may wait for the next executor, if that is soon
            timer = threading.Timer(HOLD, self._tell_stopping)
            timer.daemon = True
            try:
                timer.start()
                self._http.hold(HOLD)
            except RuntimeError:  # no more threads: nobody could release them
                self._api.draining = True
        else:
            self._api.draining = True
        self._end_runs()
        storing = self._core.flush(STORE_LIMIT)
        self._callbacks.close(DELIVER_LIMIT, self._hurried)
        self._core.flush(STORE_LIMIT if storing else 0.0)  # that they were delivered
        self._registration.close(min(self.config.admin.timeout, DELIVER_LIMIT), self._hurried)
        self._pruning.join(FLUSH_LIMIT)
        if self._inherited:
            timer.cancel()
        self._http.close()
        core_ended = self._core.close(STORE_LIMIT)
        waiting = self._core.waiting()
        if waiting:
            log.info("%s that waited will be started by the next start", counted(waiting, "run"))
        left = what_is_left(self._journal.counts(), core_ended)
        self._close_all(core_ended)
        log.info("stopped, %s", left)

    def _hurried(self) -> bool:
        """Whether another signal has come that asks for the end, now or while runs ended."""
        got = self.signals.wait(time.monotonic())
        if signal.SIGUSR1 in got:
            log_stacks()
        self._hurry = self._hurry or bool(got & {signal.SIGTERM, signal.SIGINT})
        return self._hurry

    def _end_runs(self) -> None:
        """Let them end within drain_timeout, or end them."""
        idle = threading.Event()
        signals = self.signals

        def idle_hook() -> None:
            idle.set()
            signals.wake()

        self._core.put(Drain(idle_hook))
        deadline = time.monotonic() + self.config.executor.drain_timeout
        while not (idle.is_set() or self._hurry or time.monotonic() >= deadline):
            self._hurry = self._next(deadline)
        if not idle.is_set():
            deadline = time.monotonic() + self._core.grace()
            self._core.put(CancelAll(Result(FAILURE, "killed: the executor stopped")))
            # bounded, and needed: nothing may be left behind
            while not idle.is_set() and time.monotonic() < deadline:
                self._next(deadline)


def listen(bind: tuple[str, int]) -> socket.socket:
    """The listening socket. Raises ExecutorError."""
    remedies = {
        errno.EADDRINUSE: "stop what listens there (ss -ltnp), or choose a free port of this host",
        errno.EADDRNOTAVAIL: "0.0.0.0 or [::] takes all addresses of this host",
    }
    host, port = bind
    try:
        family_, type_, protocol, _, target = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family_, type_, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family_ == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(target)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ExecutorError(
            f"executor.bind: cannot listen on {authority(host, port)}: {error.strerror}:"
            f" {remedies.get(error.errno or 0, 'choose another address or port of this host')}"
        ) from None
    return listener


def provide_limits(config: ExecutorConfig) -> int:
    """Raise the soft limit of open files to what the configuration may need; says so when the hard
    one, or that of processes, is below, or when files may not be long. Returns how many connections
    leave enough for the jobs."""
    jobs = 8 * config.max_running + 64  # pipes, logs and pidfds; the journal, the admin
    needed, room = config.max_connections + jobs, config.max_connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        room = max(16, hard - jobs)
        log.warning(
            "at most %d files may be open; max_connections %d and max_running %d may need %d: raise"
            " the limit (systemd: LimitNOFILE=%d) or lower them; until then %d connections are"
            " served at once",
            hard,
            config.max_connections,
            config.max_running,
            needed,
            needed,
            room,
        )
        needed = hard
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    tasks = 2 * config.max_running + 32  # a thread and a process for each run
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if most != resource.RLIM_INFINITY and most < tasks and os.getuid():
        log.warning(
            "user %d may have %d processes and threads; max_running %d needs at least %d: raise the"
            " limit (systemd: LimitNPROC=%d) or lower it",
            os.getuid(),
            most,
            config.max_running,
            tasks,
            tasks,
        )
    longest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if longest != resource.RLIM_INFINITY:
        log.warning(
            "a file may have %d bytes here, and the journal and the logs of jobs no more: raise the"
            " limit (ulimit -f, systemd: LimitFSIZE=infinity)",
            longest,
        )
    return room


def refuse_unsafe(config: Config, inherited: bool = False) -> None:
    """Raises ConfigError when anybody on the network could run jobs; warns of the token that every
    attacker knows. `inherited`: the address is that of a socket unit."""
    token = config.admin.access_token
    host = config.executor.bind[0]
    if not token and not config.executor.allow_no_token and not is_loopback(host):
        bind, own = f"executor.bind {host}", "bind to 127.0.0.1"
        if inherited:
            bind, own = f"ListenStream {host} of the socket unit", "listen on 127.0.0.1 there"
        told = (
            f"is empty, and {bind} is open to the network: set a token, {own}, or set"
            " executor.allow_no_token: true when a firewall keeps others out"
        )
        raise ConfigError(config.told("admin.access_token", told, "executor.bind"))
    if config.glue.enabled and token in (None, "", "default_token"):
        told = (
            "whoever knows the token can run any script here, and admin.access_token is"
            f" {'the one that every attacker tries first' if token else 'empty'}: set another one"
            " there and in the admin, or set glue.enabled: false"
        )
        raise ConfigError(config.told("glue.enabled", told))
    if token == "default_token":
        log.warning(
            "ACCESS TOKEN IS default_token, which every attacker tries first: set another"
            " xxl.job.accessToken in the admin and admin.access_token here"
        )


# --------------------------------------------------------------------------------------------------
# 15 CLI
# --------------------------------------------------------------------------------------------------
class LoopbackAdmin:
    """An xxl-job-admin 3.5 on 127.0.0.1, as much of it as `demo` needs; it keeps what it received.
    Any thread may call any method; `changed` is notified of every request."""

    def __init__(self, port: int = 0, token: str = ""):
        self.token = token  # which both sides show; "": none is needed
        self.changed = threading.Condition()
        self.registry: list[str] = []  # addresses that get triggers
        self.results: dict[int, list[dict]] = {}  # by logId
        self._next_id = int(time.time() * 1000) % 1_000_000_000
        admin = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, reply = admin.answer(self.path, self.headers, body)
                head = (
                    f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length:"
                    f" {len(reply)}\r\n\r\n"
                )
                self.wfile.write(head.encode() + reply)

            def log_message(self, *arguments: typing.Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *arguments: typing.Any) -> None:
                pass  # a client that went away

        self._server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="loopback-admin", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, headers: typing.Any, body: bytes) -> tuple[int, bytes]:
        """(HTTP status, body) for a request of an executor."""
        if self.token and headers.get("XXL-JOB-ACCESS-TOKEN") != self.token:
            return 200, envelope(FAILURE, "the access token is wrong")
        fields = json.loads(body)
        if path == "/api/callback" and "callbackList" not in fields:
            return 200, envelope(FAILURE, "a 3.5 takes a callbackList")
        with self.changed:
            if path == "/api/callback":
                for item in fields["callbackList"]:
                    self.results.setdefault(item["logId"], []).append(item)
            elif path == "/api/registry" and fields["registryValue"] not in self.registry:
                self.registry.append(fields["registryValue"])
            self.changed.notify_all()
        return 200, envelope(SUCCESS)

    def call(self, address: str, path: str, body: typing.Any, **headers: str) -> dict:
        """POST to an executor; returns its envelope."""
        import requests

        headers = {"XXL-JOB-ACCESS-TOKEN": self.token, **headers}
        with requests.Session() as session:
            session.trust_env = False  # no proxy stands before this host
            url, data = address.rstrip("/") + path, json.dumps(body).encode()
            with session.post(url, data=data, headers=headers, timeout=10) as reply:
                return reply.json()

    def trigger(self, address: str, handler: str, **fields: typing.Any) -> tuple[int, dict]:
        """Trigger `handler` with defaults for all that `fields` leaves out; returns (logId, the
        executor's envelope)."""
        with self.changed:
            self._next_id += 1
            log_id = fields.get("logId", self._next_id)
        body = {
            "jobId": 1,
            "logId": log_id,
            "executorHandler": handler,
            "executorParams": "",
            "glueType": "BEAN",
            "executorTimeout": 0,
            "executorBlockStrategy": "SERIAL_EXECUTION",
            "logDateTime": int(time.time() * 1000),
            "broadcastIndex": 0,
            "broadcastTotal": 1,
            **fields,
        }
        return log_id, self.call(address, "/trigger", body)

    def wait(self, predicate: typing.Callable[[], typing.Any], seconds: float) -> typing.Any:
        """The first true value of `predicate`, looked at whenever a request came; None after
        `seconds`."""
        with self.changed:
            return self.changed.wait_for(predicate, seconds)


def columns(text: str) -> int:
    """How many columns of a terminal `text` takes: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def fit(text: str) -> str:
    """`text` cut to the width of the terminal, when stdout is one."""
    return cut(text, width())


def width() -> int:
    """Columns of a line on stdout."""
    return shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else sys.maxsize


def cut(text: str, most: int) -> str:
    """`text` in at most `most` columns."""
    beginning = text[: most + 1]  # of a long text more cannot fit
    if beginning == text and columns(text) <= most:
        return text
    while beginning and columns(beginning) > most - 3:
        beginning = beginning[:-1]
    return beginning + "..."


def short(name: str) -> str:
    """The name of a job in at most a quarter of a line: what is told of it matters."""
    return cut(name, max(12, width() // 4))


def table(
    head: typing.Sequence[str], rows: typing.Iterable[typing.Sequence[typing.Any]]
) -> list[str]:
    """Lines of aligned columns, the last of which may be long."""
    cells = [[printable(str(cell)) for cell in row] for row in [head, *rows]]
    widths = [max(columns(row[i]) for row in cells) for i in range(len(head))]
    return [
        "  ".join(cell + " " * (width - columns(cell)) for cell, width in zip(row, widths)).rstrip()
        for row in cells
    ]


def cmd_run(arguments: argparse.Namespace) -> int:
    signals = Signals(*Daemon.SIGNALS)  # first: what comes from now on waits for `wait`
    require_modules()
    config = load_config(find_config(arguments.config))
    if config.executor.log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_Json())
    daemon = Daemon(config, signals)
    daemon.start()
    try:
        daemon.wait()
    finally:  # whatever it failed by
        daemon.close()
    return 0


INSTALL = "apt install python3-requests python3-yaml, or pip install requests PyYAML"


def require_modules() -> None:
    """Raises ExecutorError when the client of the admin is missing: it is imported later."""
    if importlib.util.find_spec("requests") is None:
        raise ExecutorError(f"No module named 'requests': {INSTALL}")


def cmd_check(arguments: argparse.Namespace) -> int:
    """Show the jobs, then everything that is wrong."""
    require_kernel()
    require_modules()
    problems: list[str] = []
    file = find_config(arguments.config)
    try:
        config = load_config(file)
    except ConfigError as error:
        if error.config is None:
            raise
        config, problems = error.config, str(error).splitlines()
    jobs = [*config.jobs.values()]
    jobs += [job for job in config.scripts.look()[0].values() if job.name not in config.jobs]
    if jobs:
        print("\n".join(map(fit, table(("JOB", "KIND", "TIMEOUT", "DESCRIPTION"), _rows(jobs)))))
        sys.stdout.flush()
    try:
        if config.executor.bind is not None and "access_token" not in "".join(problems):
            refuse_unsafe(config)
    except ConfigError as error:
        problems.append(str(error))
        if ".access_token: is empty" in problems[-1] and "CREDENTIALS_DIRECTORY" not in os.environ:
            problems[-1] += (
                "; of a service with LoadCredential=token:FILE, check with"
                " CREDENTIALS_DIRECTORY=<the directory of FILE>"
            )
    warnings = HostCheck(config, deep=True).warnings() if jobs or not problems else []
    for warning in warnings:
        print(printable(f"warning: {warning}"), file=sys.stderr)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    verdict = f"has no mistakes, but {counted(len(warnings), 'warning')}" if warnings else "is fine"
    print(f"\n{config.file} {verdict}: {counted(len(jobs), 'job')}")
    return 0


def _rows(jobs: list[JobConfig]) -> list[tuple[str, ...]]:
    """The table of `check`."""
    kinds = [
        ("shell" if job.shell else "command" if job.command else f"python ({job.isolation})")
        + ("" if job.enabled else ", disabled")
        for job in jobs
    ]
    return [
        (
            short(job.name),
            kind,
            seconds_text(job.timeout) if job.timeout else "-",
            job.description or job.what,
        )
        for job, kind in zip(jobs, kinds)
    ]


class _Progress:
    """The demo's table: redrawn in place on a terminal that can hold it, a line an event
    elsewhere."""

    def __init__(self, names: typing.Sequence[str]):
        self.width = max(map(columns, names))
        self.live = (
            sys.stdout.isatty()
            and os.environ.get("TERM") != "dumb"
            and len(names) + 8 < shutil.get_terminal_size().lines
        )
        self.color = self.live and not os.environ.get("NO_COLOR")
        self.states: dict[str, str] = {}  # as shown

    def row(self, name: str, state: str, seconds: float, message: str) -> str:
        padding = " " * (self.width - columns(name))
        message = printable(" ".join(message.split()))
        shown = fit(f"{name}{padding}  {state:<9}  {seconds:6.1f} s  {message}".rstrip())
        tint = {"succeeded": "32", "running": "36", "queued": "2"}.get(state, "31")
        head, _, tail = shown.partition(padding + "  " + state)
        return f"{head}{padding}  \x1b[{tint}m{state}\x1b[0m{tail}" if self.color else shown

    def show(self, rows: list[tuple[str, str, float, str]]) -> None:
        up = f"\x1b[{len(self.states)}A" if self.live and self.states else ""
        if not self.live:
            rows = [row for row in rows if self.states.get(row[0]) != row[1]]
        self.states.update((name, state) for name, state, *_ in rows)
        erase = "\x1b[2K" if self.live else ""
        print(up + "".join(f"{erase}{self.row(*row)}\n" for row in rows), end="", flush=True)


def cmd_demo(arguments: argparse.Namespace) -> int:
    require_modules()
    config = load_config(find_config(arguments.config))
    names = [job.name for job in config.jobs.values() if job.enabled]
    if not names:
        raise ConfigError(f"{config.file}: jobs: expected at least one job to show")
    log_from(logging.WARNING)
    with (
        tempfile.TemporaryDirectory(prefix="xxl-demo-") as data_dir,
        contextlib.ExitStack() as cleanup,
    ):
        admin = LoopbackAdmin(token=secrets.token_hex(8))  # for who is on this host, but not here
        cleanup.callback(admin.close)
        daemon = Daemon(_demo_config(config, admin, data_dir))
        daemon.start()
        cleanup.callback(daemon.close)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, lambda *_: sys.exit(1))
        print(f"admin     {admin.url}/ (on this machine only)\nexecutor  {daemon.url}")
        if not admin.wait(lambda: admin.registry, 30):
            raise ExecutorError("the executor did not register within 30 s")
        print(
            f"\n{config.executor.app_name} has registered. {counted(len(names), 'job')} of"
            f" {config.file}:\n",
            flush=True,
        )
        runs = {}
        for number, name in enumerate(names, 1):
            log_id, reply = admin.trigger(daemon.url, name, jobId=number)
            if reply["code"] != SUCCESS:
                raise ExecutorError(f"the trigger of {name} was refused: {reply['msg']}")
            runs[name] = (log_id, time.monotonic())
        results = _demo_progress(admin, daemon, runs)
        print(
            f"\n{counted(len(results), 'run')}, {sum(code == SUCCESS for code in results)}"
            " succeeded, every result arrived at the admin."
        )
        if not arguments.once:
            _show_how_to_go_on(names[0], daemon.url, admin.token, data_dir)
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                threading.Event().wait()
    return 0


def _demo_config(config: Config, admin: LoopbackAdmin, data_dir: str) -> Config:
    """The same jobs, with nothing that others could reach or that stays."""
    bind = ("127.0.0.1", 0)
    return dataclasses.replace(
        config,
        admin=dataclasses.replace(config.admin, addresses=(admin.url,), access_token=admin.token),
        executor=dataclasses.replace(
            config.executor,
            bind=bind,
            address="",
            data_dir=data_dir,
            drain_timeout=min(config.executor.drain_timeout, 1.0),  # who ends it is watching
        ),
        glue=dataclasses.replace(config.glue, enabled=False),
    )


def _show_how_to_go_on(job: str, url: str, token: str, data_dir: str) -> None:
    started = os.path.abspath(sys.argv[0])  # this file, or what setup.cfg installs for it
    program = [sys.executable, started] if started.endswith(".py") else [started]
    command = shlex.join([*program, "status", "--data-dir", data_dir])
    trigger = json.dumps({"jobId": 1, "logId": 0, "executorHandler": job})
    trigger = trigger.replace("'", "\\u0027").replace('"logId": 0', "\"logId\": '$(date +%s)'")
    print(
        "Still serving; Ctrl-C ends it. In another terminal, to run a job again:\n"
        f"  curl -H 'XXL-JOB-ACCESS-TOKEN: {token}' -d '{trigger}' {url}run; echo\n"
        f"and to look:\n  {command}",
        flush=True,
    )


def _demo_progress(admin: LoopbackAdmin, daemon: Daemon, runs: dict) -> list[int]:
    """Show the runs until the admin has a result of each; returns their codes."""
    progress, ended, started = _Progress(list(runs)), {}, set()
    words = {SUCCESS: "succeeded", FAILURE: "failed", TIMEOUT: "timed out"}
    while True:
        running = {run["logId"]: run["seconds"] for run in daemon.status()["running"]}
        rows = []
        for name, (log_id, began) in runs.items():
            if log_id in admin.results and name not in ended:
                item = admin.results[log_id][0]
                ended[name] = (
                    name,
                    words[item["handleCode"]],
                    time.monotonic() - began,
                    item["handleMsg"],
                    item["handleCode"],
                )
            if log_id in running:
                started.add(log_id)
            state = "running" if log_id in started else "queued"
            rows.append(
                ended[name][:4]
                if name in ended
                else (name, state, running.get(log_id, time.monotonic() - began), "")
            )
        progress.show(rows)
        if len(ended) == len(runs):
            return [row[4] for row in ended.values()]
        admin.wait(
            lambda: sum(log_id in admin.results for log_id, _ in runs.values()) > len(ended),
            0.5 if progress.live else 5,
        )


class _Terminal:
    """The place of JobLogs for `exec`: output goes to stdout, notes to stderr."""

    class Log(RunLog):
        def _cannot_write(self, error: OSError) -> None:
            if error.errno == errno.EPIPE:
                self._tell("nobody reads the output any more, the job goes on: Ctrl-C ends it")
            else:
                super()._cannot_write(error)

        def _note(self, text: str) -> bytes:
            return b""  # they are told by these two

        def begin(self, text: str) -> None:
            self._tell(text)

        def end(self, text: str) -> None:
            super().end(text)
            self._tell(text)

        def _tell(self, text: str) -> None:
            # not by sys.stderr, which a job in a thread has for itself; nobody may read this either
            with contextlib.suppress(OSError):
                os.write(2, f"----- {text} -----\n".encode("utf-8", "backslashreplace"))

    def open(self, trigger: Trigger) -> RunLog:
        out = -1
        try:
            out = os.dup(1)
        except OSError as error:
            log.error("cannot show the output: %s", error.strerror)
        return self.Log(out, sys.maxsize)


def cmd_exec(arguments: argparse.Namespace) -> int:
    config = load_config(find_config(arguments.config))
    job = config.job(arguments.job)
    if job is None:
        known = ", ".join([*config.jobs, *config.scripts.look()[0]]) or "none"
        raise ConfigError(f'{config.file}: there is no job "{arguments.job}": known are {known}')
    log_from(logging.WARNING)
    job = dataclasses.replace(job, timeout=shortest(job.timeout, arguments.timeout))
    now, (shard, total) = int(time.time() * 1000), arguments.shard
    param = arguments.param
    result = run_here(
        Trigger(0, 0, job.name, param, "", 0, now, shard_index=shard, shard_total=total), job
    )
    if result.exit_status is not None:
        return result.exit_status
    return {SUCCESS: 0, TIMEOUT: 124}.get(result.code, 1)


def run_here(trigger: Trigger, job: JobConfig) -> Result:
    """Run it here, its output on the terminal, until it ends or a signal asks for it."""
    box: list[Result] = []
    # a terminal that is gone ends it too, unless `nohup` says that it may
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    signals = Signals(signal.SIGINT, signal.SIGTERM, *hangup)

    cancelled: list[Result] = []

    def cancel(result: Result) -> None:
        cancelled.append(result)
        place.cancel(trigger.log_id, result)

    def report(message: typing.Any) -> None:
        if isinstance(message, Expired):
            cancel(message.result)
        else:  # it has ended, or is stuck
            box.append(message.result if isinstance(message, Ended) else cancelled[0])
            signals.wake()

    with tempfile.TemporaryDirectory(prefix="xxl-exec-") as scratch:
        processes = Supervisor(_Terminal(), secrets.token_hex(8), scratch, report)
        slots = Slots(1, _Terminal(), processes.timers, report)
        place: typing.Any = slots if job.isolation == "thread" else processes
        processes.start_thread()
        slots.prepare([job])
        place.start(trigger, job)
        while not box:
            if signals.wait() - {0}:
                cancel(Result(FAILURE, "interrupted"))
        signals.close()
        slots.close()
        processes.close(FLUSH_LIMIT)
    return box[0]


# --------------------------------------------------------------------------------------------------
# 15b looking back
# --------------------------------------------------------------------------------------------------
def find_data(arguments: argparse.Namespace) -> tuple[str, Config | None]:
    """(data_dir, the configuration as far as it can be read): a mistake in it, or a token that is
    not set here, is no reason not to look. Raises ConfigError when nothing names the directory."""
    config, file, error = None, "", None
    try:
        file = find_config(arguments.config)
        config = load_config(file)
    except ConfigError as failure:
        config, error = failure.config, failure
    path = arguments.data_dir or config and config.executor.data_dir
    path = path or file and legible_data_dir(file)
    if not path:
        raise ConfigError(f"{error}\nThis command needs only executor.data_dir: --data-dir DIR")
    return path, config


def look(path: str, config: Config | None) -> dict:
    """What the running executor tells, or what the last one has left; then `trouble` is why.
    Raises ExecutorError."""
    owner = DataDir.owner(path)
    trouble = f"no executor has used data_dir {path}: name another one with --data-dir"
    if owner.url:
        try:
            return ask_status(owner)
        except ExecutorError as error:
            trouble = str(error)
    if owner.alive():
        trouble = trouble if owner.url else f"pid {owner.pid} is starting or stopping"
    elif owner.url:
        files = [os.path.join(path, name) for name in ("journal.db", "journal.db-wal")]
        last = max([os.stat(file).st_mtime for file in files if os.path.exists(file)], default=0.0)
        trouble = (
            f"it ended unexpectedly at about {local_time(int(max(last, owner.since)))},"
            f" pid {owner.pid} is gone"
        )
    elif owner.pid:
        trouble = f"not running, it stopped at {local_time(int(owner.since))}"
    state: dict = {
        "app": config and config.executor.app_name or path,
        "jobs": sorted(config.jobs) if config is not None else [],
        "trouble": trouble,
        "running": [],
        "queued": {},
        "recent": {},
        "failures": [],
        "undelivered": 0,
        "dead": 0,
    }
    if owner.pid:
        _look_back(path, state)
    return state


def _look_back(path: str, state: dict) -> None:
    """Complete `state` from the journal that an executor has left; how long its oldest result has
    waited is not told."""
    with contextlib.closing(read_journal(os.path.join(path, "journal.db"))) as db:
        for run in itertools.islice(past_runs(db), LOOK_BACK):
            state["undelivered"] += run.state == RunState.FINISHED.value
            state["dead"] += run.state == RunState.DEAD.value
            if run.code is not None:
                codes = state["recent"].setdefault(run.handler, [])
                if not codes and run.code != SUCCESS:
                    state["failures"].append(run.shown())
                if len(codes) < RECENT:
                    codes.insert(0, run.code)


def ask_status(owner: Owner) -> dict:
    """What the running daemon tells: without a proxy, and where `requests` may be missing. Raises
    ExecutorError."""
    try:
        place = urllib.parse.urlsplit(owner.url).netloc
        with contextlib.closing(http.client.HTTPConnection(place, timeout=5)) as connection:
            connection.request("GET", "/status", headers={"Authorization": f"Bearer {owner.key}"})
            answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise ExecutorError(f"pid {owner.pid} on {owner.url} does not answer: {told}") from None
    if (
        not isinstance(answer, dict)
        or answer.get("pid") != owner.pid
        or "reloadError" not in answer
    ):
        raise ExecutorError(f"what listens on {owner.url} is not the executor of pid {owner.pid}")
    return answer


def cmd_status(arguments: argparse.Namespace) -> int:
    """Fails when no executor runs or answers; not with --watch."""
    live = arguments.watch and not arguments.json and sys.stdout.isatty()
    if live:
        print("\x1b[2J", end="")
    path, config = find_data(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            state = look(path, config)
            if arguments.json:
                lines = [json_text(state, None if arguments.watch else 2)]
            else:
                most = shutil.get_terminal_size().lines - 1 if live else sys.maxsize
                lines = [fit(printable(line)) for line in status_lines(state, most)]
            # line by line, so that nothing flickers; then whatever an earlier one left below
            top, end, below = ("\x1b[H", "\x1b[K\n", "\x1b[J") if live else ("", "\n", "")
            print(top + "".join(line + end for line in lines) + below, end="", flush=True)
            if not arguments.watch or threading.Event().wait(WATCH_INTERVAL):
                return 1 if "trouble" in state else 0
    return 0


def status_lines(state: dict, most: int) -> list[str]:
    """What `status` shows, in at most `most` lines: first what runs and what has failed."""
    head, tail = _status_head(state), _status_tail(state)
    left = most - len(head) - len(tail) - _JOB_LINES
    running = _cut(_running_lines(state), left)
    failed = _cut(_failure_lines(state), left - len(running))
    jobs = _job_lines(state, left + _JOB_LINES - len(running) - len(failed))
    return (head + running + failed + jobs + tail)[:most]


_JOB_LINES = 4  # that the table of jobs takes at least


def _cut(lines: list[str], most: int) -> list[str]:
    if len(lines) <= most:
        return lines
    shown = max(0, most - 2)
    return [*lines[:shown], f"... and {len(lines) - 1 - shown} more", ""][: max(0, most)]


def _status_head(state: dict) -> list[str]:
    if "trouble" in state:
        return [f"{state['app']}  {state['trouble']}", ""]
    if state["draining"]:
        word = "stopping"
    elif not state["admins"]:
        word = "no admin"
    else:
        word = "registered" if state["registered"] else "not registered"
    place = f"{state['address']}  pid {state['pid']}  up {seconds_text(state['uptime'])}"
    lines = [f"{state['app']}  {word}", f"{place}  version {state['version']}"]
    if state.get("diskFull"):  # not from an earlier version
        lines.append("DISK FULL: triggers are refused, and output of jobs is dropped")
    if state["reloadError"]:
        lines.append(f"RELOAD FAILED, the old jobs stay: {state['reloadError']}")
    return [*lines, ""]


def _block(head: tuple, rows: list) -> list[str]:
    return [*table(head, rows), ""] if rows else []


def _running_lines(state: dict) -> list[str]:
    stuck = " (cancelled, but its thread does not return)"
    rows = [
        (
            short(run["job"]),
            run["logId"],
            seconds_text(run["seconds"]) + (stuck if run["stuck"] else ""),
        )
        for run in state["running"]
    ]
    return _block(("RUNNING", "LOGID", "FOR"), rows)


def _failure_lines(state: dict) -> list[str]:
    """Of each job whose latest run has failed."""
    rows = [
        (
            short(run["job"]),
            local_time(int(run.get("ended") or run["began"])),
            run["logId"],
            printable(run["message"]),
        )
        for run in sorted(state["failures"], key=lambda run: run.get("ended") or 0.0, reverse=True)
    ]
    return _block(("FAILED", "AT", "LOGID", "MESSAGE"), rows)


def _job_lines(state: dict, most: int) -> list[str]:
    """As many jobs as fit, those that wait first when not all do."""
    marks = {SUCCESS: ".", FAILURE: "F", TIMEOUT: "T"}
    running = collections.Counter(run["job"] for run in state["running"])
    failed = {run["job"] for run in state["failures"]}
    names = [*state["jobs"], *sorted(state["recent"].keys() - set(state["jobs"]))]
    room = max(0, most - 4)  # for the head, what is left out, an empty line and what marks mean
    left_out = ""
    if len(names) > room:
        names.sort(
            key=lambda name: (not state["queued"].get(name), name in failed or running[name])
        )
        left_out = f"... and {counted(len(names) - room, 'more job')}"
    rows = [
        (
            short(name),
            "".join(marks.get(code, "?") for code in state["recent"].get(name, [])) or "-",
            running[name],
            state["queued"].get(name, 0),
        )
        for name in names[:room]
    ]
    lines = table(("JOB", "LAST RESULTS", "RUNNING", "WAITING"), rows)
    return [
        *lines,
        *([left_out] if left_out else [""]),
        "last results, newest on the right: . succeeded, F failed, T timed out",
    ]


def _status_tail(state: dict) -> list[str]:
    oldest = state.get("oldestUndelivered")
    waits = f", the oldest for {seconds_text(oldest)}" if oldest else ""
    dead = f", {state['dead']} given up" if state["dead"] else ""
    lines = ["", f"{counted(state['undelivered'], 'result')} undelivered{waits}{dead}"]
    if state.get("lastFailedDelivery"):
        lines.append(f"last failed delivery: {state['lastFailedDelivery']}")
    for admin in state.get("admins", []):
        since = (
            f"last answer {seconds_text(time.time() - admin['lastSuccess'])} ago"
            if admin["lastSuccess"]
            else "no answer yet"
        )
        lines.append(f"admin {admin['address']}: {'ok' if admin['ok'] else 'FAILING'}, {since}")
        if admin["error"]:
            lines.append(f"  {admin['error'].replace(admin['address'], '', 1)}")
    return lines


def _outcome(run: PastRun, alive: bool) -> str:
    """How a run stands; `alive`: whether its executor is."""
    if run.code is None:
        waits = run.state == RunState.ACCEPTED.value
        return "waiting" if waits else "running" if alive else "interrupted"
    return {SUCCESS: "succeeded", FAILURE: "failed", TIMEOUT: "timed out"}.get(
        run.code, f"code {run.code}"
    )


def unknown_run(wanted: str, known: typing.Iterable[str], path: str) -> ExecutorError:
    return ExecutorError(f'no run of "{wanted}" is known in {path}{did_you_mean(wanted, known)}')


def cmd_runs(arguments: argparse.Namespace) -> int:
    path, config = find_data(arguments)
    alive, handlers = DataDir.owner(path).alive(), set(config.jobs if config else ())
    runs: list[PastRun] = []
    with contextlib.closing(read_journal(os.path.join(path, "journal.db"))) as db:
        for run in past_runs(db):
            handlers.add(run.handler)
            failed = run.code is not None and run.code != SUCCESS
            wanted = not arguments.job or run.handler == arguments.job
            if wanted and (failed or not arguments.failed):
                runs.append(run)
                if len(runs) == arguments.n:
                    break
    runs.reverse()
    if arguments.job and not runs and arguments.job not in handlers:
        raise unknown_run(arguments.job, handlers, path)
    if arguments.json:
        rows = [{**run.shown(), "outcome": _outcome(run, alive)} for run in runs]
        print(json_text(rows, 2))
    elif not runs:
        of = f' of "{arguments.job}"' if arguments.job else ""
        print(f"no {'failed ' if arguments.failed else ''}run{of} is known in {path}")
    else:
        print("\n".join(_run_lines(runs, alive)))
    return 0


def _run_lines(runs: list[PastRun], alive: bool) -> list[str]:
    """The table of `runs`; why a run has failed is below its line where that has no room for it."""
    shards = any(run.shard_total > 1 for run in runs)
    head = ("BEGAN", "JOB", "LOGID", *(["SHARD"] if shards else []), "RESULT", "TOOK", "MESSAGE")
    rows = [
        (
            local_time(int(run.began)),
            short(run.handler),
            run.log_id,
            *([f"{run.shard_index}/{run.shard_total}"] if shards and run.shard_total > 1 else []),
            *(["-"] if shards and run.shard_total <= 1 else []),
            _outcome(run, alive),
            _took(run, alive),
            " ".join(run.message.split()),
        )
        for run in runs
    ]
    first, *lines = table(head, rows)
    shown = [fit(first)]
    for run, line in zip(runs, lines):
        reason = printable(" ".join(run.message.split()))
        if run.code in (None, SUCCESS) or columns(line) <= width():
            shown.append(fit(line))
        else:
            shown += [fit(line.removesuffix(reason).rstrip()), fit(f"    {reason}")]
    return shown


def _took(run: PastRun, alive: bool) -> str:
    if run.took is not None:
        return seconds_text(run.took)
    running = run.state == RunState.RUNNING.value and alive
    return seconds_text(max(0.0, time.time() - run.began)) if running else "-"


def cmd_logs(arguments: argparse.Namespace) -> int:
    path, config = find_data(arguments)
    file = os.path.join(path, "journal.db")
    with contextlib.closing(read_journal(file)) as db:
        log_id = _find_run(arguments.run, path, config, db)
        place = os.path.join(glob.escape(os.path.join(path, "logs")), "????-??-??")

        def ended() -> bool:
            """Whether nothing will be added any more."""
            with contextlib.closing(read_journal(file)) as now:  # an executor may have started
                run = next(past_runs(now, log_id), None)
            return run is None or run.code is not None or not DataDir.owner(path).alive()

        while True:
            over = not arguments.follow or ended()  # before what is read then
            files = glob.glob(os.path.join(place, f"{log_id}.log"))
            if files or over:
                break
            threading.Event().wait(FOLLOW_INTERVAL)
        if not files and next(past_runs(db, log_id), None) is None:
            raise ExecutorError(f"no run {log_id} is known in {path}: a refused trigger is none")
        if not files:
            raise ExecutorError(
                f"run {log_id} has no log in {path}: it has not begun, or its log was removed, as"
                " after executor.log_retention, or moved"
            )
        try:
            with open(files[-1], "rb") as stream:
                show_log(stream, arguments.n, ended if arguments.follow else lambda: True)
        except PermissionError as error:
            raise ExecutorError(f"{files[-1]}: {error.strerror}") from None
    return 0


def _find_run(wanted: str, path: str, config: Config | None, db: sqlite3.Connection) -> int:
    """The logId of the latest run of a job that has begun, or the one that was given."""
    handlers = set(config.jobs if config is not None else ())
    for run in past_runs(db):
        handlers.add(run.handler)
        if run.handler == wanted and run.state != RunState.ACCEPTED.value:
            return run.log_id
    number = re.fullmatch(r"-?\d{1,19}", wanted, re.ASCII)
    if number and int(wanted) in INT64 and wanted not in handlers:
        return int(wanted)
    raise unknown_run(wanted, handlers, path)


def show_log(stream: typing.BinaryIO, most: int | None, ended: typing.Callable[[], bool]) -> None:
    """Write the last `most` lines to stdout, all for None, and what is added until `ended()`."""
    out = sys.stdout.buffer
    if most is not None:
        out.writelines(collections.deque(stream, most))
    while True:
        last = ended()  # before what is read then
        if os.fstat(stream.fileno()).st_size < stream.tell():
            print("----- the log was truncated -----", file=sys.stderr, flush=True)
            stream.seek(0)
        shutil.copyfileobj(stream, out)
        out.flush()
        if last:
            return
        threading.Event().wait(FOLLOW_INTERVAL)


# --------------------------------------------------------------------------------------------------
# 15c options, and the lines of the log
# --------------------------------------------------------------------------------------------------
def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f'expected index/total such as 0/3, got "{text}"')
    return int(match[1]), int(match[2])


def _lines(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not int(text):
        raise argparse.ArgumentTypeError(f'expected a number above 0, got "{text}"')
    return int(text)


def _seconds(text: str) -> float:
    value = amount(text, *_DURATION[:2])
    if value is None:
        raise argparse.ArgumentTypeError(f'expected {_DURATION[2]}, got "{text}"')
    return value


def _option_of(*names: str, **how: typing.Any) -> tuple[tuple[str, ...], dict]:
    """An option of a command, as argparse takes it; one with nothing but a help is a flag."""
    return names, how if how.keys() - {"help"} else {"action": "store_true", **how}


_DATA_DIR = _option_of(
    "--data-dir", metavar="DIR", help="instead of executor.data_dir of the configuration"
)
_FOR_PROGRAMS = _option_of("--json", help="for programs")
COMMANDS: tuple[tuple, ...] = (  # name, what it does, an example, the function, its options
    (
        "run",
        "serve until SIGTERM (the default)",
        "-c /etc/xxl-executor/config.yaml run",
        cmd_run,
    ),
    (
        "check",
        "validate the configuration and list the jobs",
        "-c config.yaml check",
        cmd_check,
    ),
    (
        "demo",
        "run every job once against an admin on this machine",
        "-c config.example.yaml demo --once",
        cmd_demo,
        _option_of(
            "--once", help="end when every result has arrived, instead of serving until Ctrl-C"
        ),
    ),
    (
        "exec",
        "run one job in the foreground; needs no admin and no daemon",
        "exec report --param day=monday --shard 0/3 --timeout 5m",
        cmd_exec,
        _option_of("job", metavar="JOB"),
        _option_of("--param", default="", help="the parameter, as the admin would send it"),
        _option_of(
            "--shard",
            type=_shard,
            default=(0, 1),
            metavar="I/N",
            help="shard index and total, default 0/1",
        ),
        _option_of(
            "--timeout",
            type=_seconds,
            default=0.0,
            metavar="T",
            help="such as 90, 90s or 10m; the job's own applies too",
        ),
    ),
    (
        "runs",
        "list the latest runs",
        "runs report --failed",
        cmd_runs,
        _DATA_DIR,
        _option_of("job", metavar="JOB", nargs="?", help="only those of this job"),
        _option_of("--failed", help="only those that did not succeed"),
        _option_of("-n", type=_lines, default=20, metavar="N", help="how many, default 20"),
        _FOR_PROGRAMS,
    ),
    (
        "logs",
        "show the output of a run",
        "logs report -f",
        cmd_logs,
        _DATA_DIR,
        _option_of("run", metavar="JOB|LOGID", help="the latest run of a job, or this one"),
        _option_of("-f", "--follow", help="go on until the run has ended, or Ctrl-C"),
        _option_of("-n", type=_lines, metavar="LINES", help="only so many lines, from the end"),
    ),
    (
        "status",
        "show what the executor does, or did last",
        "status --json",
        cmd_status,
        _DATA_DIR,
        _FOR_PROGRAMS,
        _option_of("--watch", help="again every second, until Ctrl-C; with --json a line each"),
    ),
)

EXAMPLES = """examples:
  xxl-executor -c config.yaml                  run the daemon
  xxl-executor -c config.yaml check            find mistakes, list the jobs
  xxl-executor -c config.example.yaml demo     see every job run
  xxl-executor exec report --param day=monday  one job in the foreground
  xxl-executor runs --failed                   what went wrong lately
  xxl-executor logs report -f                  the output of a job, as it comes

exit status: 0 fine, 1 failed, 2 bad usage or configuration"""


class _CommandLine(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        super().error(printable(message))


def parser() -> argparse.ArgumentParser:
    """The command line; what each command takes is in COMMANDS."""
    common = _CommandLine(add_help=False)
    common.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="configuration; default $XXL_EXECUTOR_CONFIG, " + ", ".join(CONFIG_PLACES),
    )
    top = _CommandLine(
        prog="xxl-executor",
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="An XXL-JOB executor for shell and Python jobs.",
        epilog=EXAMPLES,
    )
    top.add_argument("--version", action="version", version=f"xxl-executor {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, text, example, function, *options in COMMANDS:
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example:\n  xxl-executor {example}",
        )
        command.set_defaults(function=function)
        for names, how in options:
            command.add_argument(*names, **how)
    return top


class _Handler(logging.Handler):
    """One line an event to an Output; what a job in a thread logs goes into its run's log, but not
    what the executor itself logs there, such as that this very log cannot be written."""

    def __init__(self, output: Output):
        super().__init__()
        self.output, self._for_jobs = output, _OneLine(with_time=True)

    def handle(self, record: logging.LogRecord) -> bool:
        self.emit(record)  # without its lock: a run's log on a slow disk must not hold it
        return True

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr  # another one for a job in a thread
        own = record.name == log.name
        if not own and isinstance(stream, ThreadOutput) and stream.captures():
            stream.write(self._for_jobs.format(record) + "\n")
        else:
            self.output.write((self.format(record) + "\n").encode("utf-8", "backslashreplace"))


class _OneLine(logging.Formatter):
    """Without control characters: a name from the network must not forge lines."""

    def __init__(self, with_time: bool):
        """Without the time for systemd, whose journal has it, and with the priority instead."""
        head = "%(asctime)s.%(msecs)03d %(levelname)-7s " if with_time else ""
        super().__init__(head + "%(message)s", "%Y-%m-%d %H:%M:%S")
        self._with_time = with_time

    def formatMessage(self, record: logging.LogRecord) -> str:
        if isinstance(record.msg, Lines):
            record.message = ""
            before = super().formatMessage(record)
            return "\n".join(before + printable(line) for line in record.msg)
        return printable(super().formatMessage(record))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if self._with_time:
            return text
        level = 3 if record.levelno >= logging.ERROR else 4
        level = level if record.levelno >= logging.WARNING else 6
        return f"<{level}>" + text.replace("\n", f"\n<{level}>")


class _Json(logging.Formatter):
    """One object a line, for programs."""

    def format(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info else None
        lines = record.msg if isinstance(record.msg, Lines) else [record.getMessage()]
        head = {"time": timestamp(record.created), "level": record.levelname}
        shown = []
        for line in lines:
            fields = line.fields if isinstance(line, Event) else {}
            more = {**fields, "trace": trace} if trace else fields
            shown.append(json_text({**head, "message": line, **more}))
        return "\n".join(shown)


def log_from(level: int) -> None:
    """Log what is of this `level` or above, of the executor and of others."""
    for logger in (log, logging.root):
        logger.setLevel(level)


def set_up_logging(output: Output) -> None:
    """One line an event to `output`; under systemd with a priority and without the time. Names of
    threads are switched off here."""
    handler = _Handler(output)
    handler.setFormatter(_OneLine(with_time=not os.environ.get("JOURNAL_STREAM")))
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = (
        False  # not shown, so not looked up
    )
    # documented in the logging HOWTO, "Optimization": do not look for the caller of each line
    logging._srcfile = None
    log.addHandler(handler)  # of its own too: a job may take the root's away
    log.propagate = False
    logging.basicConfig(handlers=[handler])
    log_from(logging.INFO)
    logging.getLogger("urllib3").setLevel(logging.ERROR)


def show_command(arguments: typing.Sequence[str]) -> None:
    """Have ps, top and systemctl show this program with its arguments, in place of the longer
    command by which `run_compiled` and `run_as_module` start it; proc(5), arg_start."""
    words = [sys.executable, os.path.abspath(__file__), *arguments]
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = _read_proc("/proc/self/stat").rpartition(b") ")[2].split()
        start, end = int(fields[45]), int(fields[46])  # numbers 48 and 49 of the whole line
        shown = b"".join(os.fsencode(word) + b"\0" for word in words)
        if start > 0 and len(shown) <= end - start:
            ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)
            LIBC.prctl(PR_SET_NAME, b"xxl-executor", 0, 0, 0)


def main(argv: typing.Sequence[str] | None = None) -> int:
    open_closed_streams()  # as a console script this file is not run, but imported
    argv = sys.argv[1:] if argv is None else list(argv)
    sys.modules.setdefault("xxl_executor", sys.modules[__name__])  # for a job that imports Context
    if argv[:1] == ["--serve-python"]:
        with contextlib.suppress(ValueError):  # with PYTHONSAFEPATH it is not there
            sys.path.remove("")  # of -c
        server = socket.socket(fileno=int(argv[1]))
        if argv[2:]:
            import_first(server, argv[2])
        trim_memory()
        work = Forker(server).serve()
        return work() if work is not None else 0
    output = Output(2)
    if isinstance(sys.stdout, io.TextIOWrapper):  # of a locale that has not all characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = parser().parse_args(argv)
        arguments.config = getattr(arguments, "config", None)
        function = getattr(arguments, "function", cmd_run)
        if HANGUP is not None and function is not cmd_run:
            signal.signal(signal.SIGHUP, HANGUP)
        set_up_logging(output)
        status = function(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except ConfigError as error:
        print(printable_lines(str(error)), file=sys.stderr)
        return 2
    except OSError as error:  # /dev/full, a disk that is
        if not isinstance(error, BrokenPipeError):  # `status | head` has seen enough
            print(f"xxl-executor: {error}", file=sys.stderr)
        with contextlib.suppress(OSError):  # what is left to be written has no place
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except ExecutorError as error:
        print(f"xxl-executor: {printable_lines(str(error))}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"xxl-executor: {error}: {INSTALL}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        output.flush(FLUSH_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
