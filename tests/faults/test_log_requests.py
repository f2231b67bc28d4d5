"""Paths and numbers in /log: nothing but logs is opened (row 26)."""

import contextlib
import datetime
import json
import os
import re
import socket
from pathlib import Path

import pytest
from client import Client, post
from tools import Ledger, stderr_lines, traced

AUDIT = Path(__file__).with_name("audit.py")


DAY = datetime.datetime(2024, 5, 6, 12)
ODD_NUMBERS = [
    '"../../etc/passwd"',
    '"/etc/passwd"',
    '"../1"',
    '"1/../../../secret"',
    '"..%2f..%2fsecret"',
    '"1.log"',
    '"1\\u0000"',
    '"\\ud800"',
    '"~"',
    '"*"',
    '"-"',
    '""',
    '" 1 "',
    '"1_0"',
    '"\u0661"',
    "-1",
    "-9223372036854775808",
    "9223372036854775807",
    "9223372036854775808",
    "9" * 60,
    "9" * 5000,
    "1.5",
    "1.0",
    "-0.0",
    "1e300",
    "1e400",
    "NaN",
    "-Infinity",
    "true",
    "null",
    "[]",
    "[1]",
    "{}",
    '{"a":1}',
    "[" * 100 + "]" * 100,
    '["../../etc/passwd"]',
]


def at(days):
    """The time in ms of `DAY` and some days."""
    return int((DAY + datetime.timedelta(days)).timestamp() * 1000)


def plant(logs, outside):
    """One log in earnest and all that must not be opened as one; returns [(what, logId, days after
    DAY)]."""
    secret = outside / "secret"
    outside.mkdir()
    secret.write_text("SECRET\n")
    for name in ("1.log", "etc", "passwd", "None.log", "..log"):
        (outside / name).write_text("SECRET\n")
    for file in (logs / "1.log", logs / "passwd", logs.parent / "1.log", logs.parent / "secret"):
        file.write_text("SECRET\n")
    day = logs / f"{DAY:%Y-%m-%d}"
    day.mkdir()
    (day / "1.log").write_text("hello\n")
    (day / "2.log").symlink_to(secret)
    (day / "3.log").symlink_to(os.path.relpath(secret, day))
    (day / "4.log").symlink_to("1.log")
    (day / "5.log").symlink_to("nowhere")
    (day / "6.log").symlink_to("6.log")
    os.mkfifo(day / "7.log")
    (day / "8.log").mkdir()
    with socket.socket(socket.AF_UNIX) as sock, contextlib.ExitStack() as stack:
        stack.callback(os.chdir, os.getcwd())
        os.chdir(day)  # the name of a socket must be short
        sock.bind("9.log")
    places = [
        *(("a symlink", number, 0) for number in range(2, 7)),
        ("a FIFO", 7, 0),
        ("a directory", 8, 0),
        ("a socket", 9, 0),
    ]
    whats = (
        "a day that is a symlink",
        "one to another day",
        "a day that is a file",
        "a day that is a FIFO",
    )
    for days, what in enumerate(whats, 1):
        place = logs / f"{DAY + datetime.timedelta(days):%Y-%m-%d}"
        if days < 3:
            place.symlink_to(outside if days == 1 else day.name)
        elif days == 3:
            place.write_text("SECRET\n")
        else:
            os.mkfifo(place)
        places.append((what, 1, days))
    return places


@contextlib.contextmanager
def audited(daemon, directory):
    """The list that is yielded holds at the end (path, flags) of what the daemon opened meanwhile.

    Without the main thread: it answers no request, and looks into /proc for orphans whenever a run
    has ended.
    """
    notes, found = directory / "audit.txt", []
    before = notes.stat().st_size
    yield found
    lines = map(json.loads, notes.read_bytes()[before:].splitlines())
    found += [(path, flags) for path, flags, main in lines if not main]


@contextlib.contextmanager
def straced(daemon, directory):
    """As `audited`, as the kernel sees it; the path of a descriptor that was opened counts as
    well."""
    out, found = directory / "strace.txt", []
    options = ("-f", "-s", "4096", "-e", "trace=open,openat,openat2", "-y", "-o", str(out))
    with traced(daemon, [daemon.process.pid], *options):
        yield found
    for line in out.read_text().splitlines():
        if int(line.split()[0]) == daemon.process.pid:  # the main thread
            continue
        named = re.findall(r'open(?:at2?)?\((?:[^"]*, )?"((?:[^"\\]|\\.)*)"', line)
        found += [(path, line) for path in named + re.findall(r"= \d+<([^>]*)>$", line)]


WATCHES = {"audit": audited, "strace": straced}


@pytest.mark.parametrize("watch", WATCHES)
def test_log_requests_open_nothing_but_logs(executor, admin, tmp_path, watch):
    """Whatever /log is asked for, only directories of days and numbered files in them are
    opened."""
    ledger = Ledger(admin, tmp_path)
    notes = tmp_path / "audit.txt"
    daemon = executor(
        {"job": ledger.job()}, admin=admin, program=AUDIT, env={"AUDIT_FILE": str(notes)}
    )
    logs = daemon.data / "logs"
    places = plant(logs, tmp_path / "outside")
    ledger.trigger(daemon)
    ledger.settle(daemon)
    assert b"journal.db" in notes.read_bytes(), "the hook sees nothing"
    answers, pages = [], {}
    with WATCHES[watch](daemon, tmp_path) as opened:
        for key in ("logId", "logDateTim", "logDateTime", "fromLineNum"):
            for odd in ODD_NUMBERS:
                fields = {"logId": "1", "logDateTim": str(at(0)), "fromLineNum": "1", key: odd}
                if key == "logDateTime":
                    del fields["logDateTim"]
                body = "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"
                answers.append((body, daemon.post("/log", body.encode())))
        for what, number, days in places:
            pages[what, number] = daemon.post(
                "/log", {"logId": number, "logDateTim": at(days), "fromLineNum": 1}
            )
            daemon.post("/log", {"logId": number, "logDateTim": at(days), "fromLineNum": 2})
        for target in (
            "/log/../../../etc/passwd",
            "/log/2024-05-06/1.log",
            "/log?file=/etc/passwd",
            "/log/%2e%2e/secret",
            "//log//..//secret",
        ):
            with Client(daemon.port) as client:
                client.sock.sendall(post(target, b'{"logId":1,"logDateTim":0}'))
                answers.append((target, client.answer()[2].decode()))
        legitimate = daemon.page(1, at(0))
    assert legitimate["logContent"] == "hello\n"
    for body, answer in [*answers, *pages.items()]:
        assert not re.search("SECRET|root:", json.dumps(answer)), (body, answer)
        fault = "" if isinstance(answer, str) or answer["code"] == 200 else answer["msg"]
        assert not fault or re.match("(logId|logDateTime?|fromLineNum): |the body ", fault), (
            body,
            answer,
        )
    for place, answer in pages.items():
        assert answer["code"] == 200 and answer["content"]["logContent"].startswith("no log: "), (
            place,
            answer,
        )
    days, names, others = [], [], []
    for path, how in opened:
        day = re.fullmatch(re.escape(str(logs)) + r"/\d{4}-\d\d-\d\d", path)
        name = re.fullmatch(r"-?\d{1,19}\.log", path)
        inside = watch == "strace" and re.fullmatch(
            re.escape(str(logs)) + r"/\d{4}-\d\d-\d\d/-?\d{1,19}\.log", path
        )
        (days if day else names if name else [] if inside else others).append((path, how))
    assert len(names) >= 20 and len(days) > 1, opened  # that of the last day is kept open
    assert not others, others
    if watch == "audit":
        for _, flags in days:
            assert flags & os.O_DIRECTORY and flags & os.O_NOFOLLOW, flags
        for _, flags in names:
            assert (
                flags & os.O_NOFOLLOW
                and not flags & os.O_CREAT
                and flags & os.O_ACCMODE == os.O_RDONLY
            ), flags
    assert not stderr_lines(daemon, "please report")
    ledger.settle(daemon)


def test_what_is_no_file_in_place_of_a_log(executor, admin, tmp_path):
    """A FIFO holds no http thread, and no run whose log it stands for; nor does anything else fail
    one."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job("echo output")}, admin=admin, executor={"max_running": 2})
    logs = daemon.data / "logs"
    places = plant(logs, tmp_path / "outside")
    body = json.dumps({"logId": 7, "logDateTim": at(0), "fromLineNum": 1}).encode()
    fifo = logs / f"{DAY:%Y-%m-%d}" / "7.log"
    with contextlib.ExitStack() as stack:
        waiting = [
            stack.enter_context(Client(daemon.port)) for _ in range(20)
        ]  # more than there are http threads
        # Let go whoever waits for the other end.
        stack.callback(lambda: os.close(os.open(fifo, os.O_RDWR | os.O_NONBLOCK)))
        for client in waiting:
            client.sock.sendall(post("/log", body))
        beat = stack.enter_context(Client(daemon.port, 10))
        beat.sock.sendall(post("/beat"))
        assert json.loads(beat.answer()[2])["code"] == 200
        for client in waiting:
            assert json.loads(client.answer()[2])["content"]["logContent"].startswith("no log: ")
        # And to write to.
        for what, number, days in places:
            log_id = ledger.trigger(
                daemon, jobId=number + 100 * days, logId=number + 1000 * days, logDateTime=at(days)
            )
            assert ledger.result(log_id, 10) == (200, "output"), what
    assert (tmp_path / "outside" / "secret").read_text() == "SECRET\n"
    assert not list((tmp_path / "outside").glob("1001.log"))
    assert not stderr_lines(daemon, "please report")
    ledger.settle(daemon)
    assert sorted(ledger.started()) == sorted(ledger.accepted) and len(ledger.accepted) == len(
        places
    )
