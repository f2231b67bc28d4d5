"""Job logs: what a file holds, how the admin reads it by page, caps, pruning, and that nothing else
can be read."""

import contextlib
import json
import os
import random
import re
import shutil
import socket
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
from conftest import LAUNCH, launch, result_of, run_job, wait_until

from xxl_executor import JobLogs, RunLog, Trigger

NOW = 1_790_000_000_000  # ms
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def trigger(log_id=1, date=NOW, **fields):
    return Trigger(job_id=7, log_id=log_id, handler="hello", log_date_time=date, **fields)


@pytest.fixture
def logs(tmp_path):
    with contextlib.closing(JobLogs(str(tmp_path / "logs"), 64 << 20, 86_400.0)) as logs:
        yield logs


def day_of(milliseconds):
    return datetime.fromtimestamp(milliseconds / 1000).strftime("%Y-%m-%d")


def place(logs, content, log_id=1):
    """Put `content` where the log of run `log_id` is read."""
    file = Path(logs.directory) / day_of(NOW) / f"{log_id}.log"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file


def numbered(count, seed=1):
    """`count` lines of various lengths, each one different."""
    rng = random.Random(seed)
    return b"".join(b"%d %s\n" % (i, b"x" * rng.randrange(60)) for i in range(1, count + 1))


def follow(read, first=1):
    """Read page after page as the admin does, until the end; yields each page, its shape
    checked."""
    while True:
        page = read(first)
        assert page["fromLineNum"] == first
        assert page["logContent"].count("\n") == page["toLineNum"] - first + 1
        yield page
        if page["isEnd"] or not page["logContent"]:
            return
        first = page["toLineNum"] + 1


class Gate:
    """A FIFO at which a job waits: `. gate` in its shell blocks until `open` is called."""

    def __init__(self, path):
        self.path = path
        os.mkfifo(path)

    def _enter(self):
        try:
            os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # ENXIO: the job is not here yet
            return False
        return True

    def open(self):
        wait_until(self._enter, 10, f"the job at {self.path}")


# -- what a file holds


def test_header_and_footer_tell_how_the_run_went(executor, admin):
    daemon = executor(
        {
            "good": {"shell": "echo work; echo done"},
            "bad": {"shell": "echo why; exit 3", "timeout": "5s"},
        },
        admin=admin,
    )
    log_id, _ = run_job(
        daemon,
        admin,
        "good",
        jobId=4,
        executorParams='a "b" 你好',
        executorTimeout=60,
        broadcastIndex=1,
        broadcastTotal=3,
    )
    lines = daemon.log_text(log_id).splitlines()
    assert re.fullmatch(
        rf"----- {STAMP} good logId={log_id} jobId=4 shard=1/3 timeout=60 s pid=\d+ "
        r'param="a \\"b\\" 你好" -----',
        lines[0],
    )
    assert lines[1:-1] == ["work", "done"]
    assert re.fullmatch(
        rf"----- {STAMP} succeeded after [\d.e-]+ s: code 200, done -----", lines[-1]
    )
    # The job's own limit is the smaller one here.
    log_id, _ = run_job(daemon, admin, "bad", jobId=5, executorTimeout=60)
    lines = daemon.log_text(log_id).splitlines()
    assert re.fullmatch(
        rf"----- {STAMP} bad logId={log_id} jobId=5 shard=0/1 timeout=5 s pid=\d+ param=\"\" -----",
        lines[0],
    )
    assert re.fullmatch(
        rf"----- {STAMP} failed after [\d.e-]+ s: code 500, exit status 3: why -----", lines[-1]
    )
    log_id, _ = run_job(daemon, admin, "good", jobId=4)
    assert f"logId={log_id} jobId=4 shard=0/1 timeout=none pid=" in daemon.log_text(log_id)


def test_output_without_a_newline_and_the_footer_are_two_lines(logs):
    out = logs.open(trigger())
    out.write(b"no newline")
    out.end("succeeded")
    assert re.fullmatch(rf"no newline\n----- {STAMP} succeeded -----\n", place_text(logs))


def place_text(logs, log_id=1):
    return (Path(logs.directory) / day_of(NOW) / f"{log_id}.log").read_text()


def test_day_directory_is_local_time_of_the_trigger(executor, admin):
    # 17:30 in London is the next day in Shanghai.
    date = int(datetime.fromisoformat("2026-01-01T17:30:00+00:00").timestamp() * 1000)
    zone = "Asia/Shanghai" if Path("/usr/share/zoneinfo/Asia/Shanghai").exists() else "CST-8"
    daemon = executor({"hello": {"shell": "echo hello"}}, admin=admin, env={"TZ": zone})
    log_id, _ = run_job(daemon, admin, "hello", logDateTime=date)
    assert [file.relative_to(daemon.data) for file in (daemon.data / "logs").glob("*/*")] == [
        Path(f"logs/2026-01-02/{log_id}.log")
    ]
    assert "\nhello\n" in daemon.page(log_id, date)["logContent"]


# -- pages of a run in progress


def test_polling_a_running_job(executor, admin, tmp_path):
    """The admin's page: from 1, then toLineNum + 1; whole lines only; no end before the end."""
    gates = [Gate(tmp_path / f"gate{i}") for i in range(4)]
    a, b, c, d = (gate.path for gate in gates)
    daemon = executor(
        {
            "slow": {
                "shell": (
                    f"echo one; . {a}; printf 'par'; . {b}; printf 'tial\\n'; . {c}; echo last;"
                    f" . {d}"
                )
            }
        },
        admin=admin,
    )
    date = int(time.time() * 1000)
    log_id, _ = admin.trigger(daemon.url, "slow", logDateTime=date)
    later, _ = admin.trigger(daemon.url, "slow", logDateTime=date)
    next_line, text = 1, ""

    def poll():
        nonlocal next_line, text
        page = daemon.page(log_id, date, next_line)
        assert page["fromLineNum"] == next_line
        assert (
            page["toLineNum"] == next_line + page["logContent"].count("\n") - 1
        )  # nothing new: from - 1
        assert page["logContent"] == "" or page["logContent"].endswith("\n")
        next_line, text = page["toLineNum"] + 1, text + page["logContent"]
        return page

    wait_until(lambda: poll() and text.endswith("\none\n"))
    for _ in range(3):
        assert poll() == {"fromLineNum": 3, "toLineNum": 2, "logContent": "", "isEnd": False}
    # One that waits behind it has no file yet, and that is not the end.
    assert daemon.page(later, date) == {
        "fromLineNum": 1,
        "toLineNum": 0,
        "logContent": "",
        "isEnd": False,
    }
    gates[0].open()
    wait_until(lambda: daemon.log_text(log_id).endswith("\npar"))
    assert poll() == {"fromLineNum": 3, "toLineNum": 2, "logContent": "", "isEnd": False}
    gates[1].open()
    wait_until(lambda: daemon.log_text(log_id).endswith("\npartial\n"))
    assert poll() == {"fromLineNum": 3, "toLineNum": 3, "logContent": "partial\n", "isEnd": False}
    gates[2].open()
    wait_until(lambda: daemon.log_text(log_id).endswith("\nlast\n"))
    # Everything that is there was sent, but the run goes on: no end.
    assert poll() == {"fromLineNum": 4, "toLineNum": 4, "logContent": "last\n", "isEnd": False}
    gates[3].open()
    result_of(admin, log_id)
    page = poll()
    assert (
        page["isEnd"] is True and page["logContent"].startswith("----- ") and page["toLineNum"] == 5
    )
    assert text == daemon.log_text(log_id)
    assert poll() == {"fromLineNum": 6, "toLineNum": 5, "logContent": "", "isEnd": True}
    # From line 1, and under both spellings of the date.
    whole = {"fromLineNum": 1, "toLineNum": 5, "logContent": text, "isEnd": True}
    for name in ("logDateTim", "logDateTime"):
        reply = daemon.post("/log", {"logId": log_id, name: date, "fromLineNum": 1})
        assert reply == {"code": 200, "msg": None, "content": whole, "data": whole}
    daemon.post("/kill", {"jobId": 1})


def test_unknown_run_says_so_and_ends(executor, admin):
    daemon = executor(admin=admin)
    page = daemon.page(987654321, NOW)
    place = daemon.data / "logs" / day_of(NOW) / "987654321.log"
    assert (
        page["logContent"]
        == f"no log: {place} on {socket.gethostname()}: No such file or directory; "
        "it may have been pruned after log_retention"
    )
    assert page["isEnd"] is True
    # The admin's page shows nothing of an answer whose toLineNum is smaller than its fromLineNum.
    assert page["fromLineNum"] == page["toLineNum"] == 1
    assert daemon.page(987654321, NOW, 2) == {
        "fromLineNum": 2,
        "toLineNum": 1,
        "logContent": "",
        "isEnd": True,
    }


# -- pages in detail


def test_joined_pages_are_the_file(logs):
    content = numbered(5000)
    place(logs, content)
    for limit in (80, 1000, 50_000, 4 << 20):
        first = 4990 if limit == 80 else 1

        def page_from(line):
            page = logs.page(1, NOW, line, ended=True, limit=limit)
            if line == 1 and page["isEnd"] and limit < len(content):  # the head and the tail
                return logs.page(1, NOW, line, ended=False, limit=limit)
            return page

        pages = list(follow(page_from, first))
        assert all(len(page["logContent"]) <= 1.2 * limit for page in pages)
        assert "".join(page["logContent"] for page in pages).encode() == b"".join(
            content.splitlines(True)[first - 1 :]
        )
        assert [page["isEnd"] for page in pages] == [False] * (len(pages) - 1) + [True]
    pages = list(follow(lambda line: logs.page(1, NOW, line, ended=False, limit=3000)))
    assert len(pages) > 30 and "".join(page["logContent"] for page in pages).encode() == content
    assert not any(page["isEnd"] for page in pages) and pages[-1]["logContent"] == ""


def test_a_log_that_grows_between_pages(logs):
    """What is remembered of a file's lines stays right while it grows, whatever the pieces are."""
    rng, content, text, first = random.Random(3), numbered(30_000, 3), "", 1
    file = place(logs, b"")
    done = 0
    while done < len(content):
        step = rng.choice((1, 100, 70_000))
        with open(file, "ab") as stream:
            stream.write(content[done : done + step])
        done += step
        page = logs.page(1, NOW, first, ended=False)
        assert page["toLineNum"] == first + page["logContent"].count("\n") - 1 and not page["isEnd"]
        assert page["logContent"] == "" or page["logContent"].endswith("\n")
        text, first = text + page["logContent"], page["toLineNum"] + 1
    assert text.encode() == content
    assert logs.page(1, NOW, first, ended=True) == {
        "fromLineNum": first,
        "toLineNum": first - 1,
        "logContent": "",
        "isEnd": True,
    }


@pytest.mark.parametrize("end", ["\n", ""], ids=["newline", "cut"])
def test_seek_equals_a_straight_split(logs, end):
    content = numbered(200_000)[:-1] + end.encode()
    lines = content.splitlines(True)
    place(logs, content)
    rng = random.Random(11)
    for limit in (300, 5000, 200_000, 4 << 20):
        for _ in range(60 if limit < 100_000 else 6):
            first = rng.choice((rng.randint(2, len(lines)), len(lines) - rng.randint(0, 20)))
            page = logs.page(1, NOW, first, ended=True, limit=limit)
            got = page["logContent"].encode()
            expected = b"".join(lines[first - 1 : page["toLineNum"]])
            assert got == expected and first <= page["toLineNum"] <= len(lines), first
            assert len(got) <= limit
            following = lines[page["toLineNum"] :]
            assert page["isEnd"] is (not following)
            assert not following or len(got) + len(following[0]) > limit, "the page could hold more"


def test_seek_among_long_lines(logs):
    """Lines longer than what is read at once; the order of the questions must not matter."""
    rng = random.Random(5)
    lines = [
        b"%d " % i + b"y" * rng.choice((0, 10, 65_530, 65_536, 200_000)) + b"\n" for i in range(60)
    ]
    place(logs, b"".join(lines))
    for _ in range(200):
        first = rng.randint(2, len(lines))
        page = logs.page(1, NOW, first, ended=True)
        shown = page["logContent"].encode()
        assert shown == b"".join(lines[first - 1 : page["toLineNum"]]), first


@pytest.mark.parametrize("first", [0, -1, -(2**63)])
def test_lines_before_the_first(logs, first):
    place(logs, b"a\nb\n")
    page = logs.page(1, NOW, first, ended=True)
    assert (page["toLineNum"], page["logContent"], page["isEnd"]) == (2, "a\nb\n", True)


@pytest.mark.parametrize("first", [3, 4, 2**31, 2**63 - 1])
@pytest.mark.parametrize("ended", [True, False])
def test_lines_after_the_last(logs, first, ended):
    place(logs, b"a\nb\n")
    page = logs.page(1, NOW, first, ended=ended)
    assert page == {"fromLineNum": first, "toLineNum": first - 1, "logContent": "", "isEnd": ended}


@pytest.mark.parametrize("ended", [True, False])
def test_empty_file(logs, ended):
    place(logs, b"")
    assert logs.page(1, NOW, 1, ended=ended) == {
        "fromLineNum": 1,
        "toLineNum": 0,
        "logContent": "",
        "isEnd": ended,
    }


def test_last_line_without_newline_is_sent_at_the_end_only(logs):
    place(logs, b"a\nb")
    assert logs.page(1, NOW, 1, ended=False) == {
        "fromLineNum": 1,
        "toLineNum": 1,
        "logContent": "a\n",
        "isEnd": False,
    }
    assert logs.page(1, NOW, 2, ended=False) == {
        "fromLineNum": 2,
        "toLineNum": 1,
        "logContent": "",
        "isEnd": False,
    }
    assert logs.page(1, NOW, 1, ended=True) == {
        "fromLineNum": 1,
        "toLineNum": 2,
        "logContent": "a\nb",
        "isEnd": True,
    }


# -- bytes that are no text


def test_bytes_that_are_no_text(logs):
    out = logs.open(trigger())
    for part in (
        b"cut \xe4\xb8",
        b"\xad here\n",
        b"bad \xff\xfe \xc3(\n",
        b"nul \0\n",
        b"half \xe4\xb8\n",
    ):
        out.write(part)
    page = logs.page(1, NOW, 1, ended=False)
    assert page["logContent"] == "cut 中 here\nbad \ufffd\ufffd \ufffd(\nnul \ufffd\nhalf \ufffd\n"
    assert page["toLineNum"] == 4
    assert out.last_line() == "half \ufffd"
    out.write(b"last \0\xff")
    assert out.last_line() == "last \ufffd\ufffd"
    out.end("done")


def test_bytes_that_are_no_text_through_http(executor, admin):
    daemon = executor(
        {"odd": {"shell": r"printf 'a\000b\377c\n\344\270'; printf '\255\n\377'"}}, admin=admin
    )
    date = int(time.time() * 1000)
    log_id, result = run_job(daemon, admin, "odd", logDateTime=date)
    assert daemon.page(log_id, date)["logContent"].splitlines()[1:-1] == [
        "a\ufffdb\ufffdc",
        "中",
        "\ufffd",
    ]
    assert result["handleMsg"] == "\ufffd"


# -- the budget of a page


def test_long_finished_log_has_head_notice_and_tail(logs):
    content = numbered(300_000)
    assert len(content) > 10 << 20
    content = content[: 10 << 20]
    content = content[: content.rfind(b"\n") + 1]
    file = place(logs, content)
    page = logs.page(1, NOW, 1, ended=True)
    total = content.count(b"\n")
    assert (page["fromLineNum"], page["toLineNum"], page["isEnd"]) == (1, total, True)
    text = page["logContent"].encode()
    assert len(text) < (4 << 20) + 1000
    notices = re.findall(
        rb"----- (\d+) bytes are left out here; the whole log is (\S+) on (\S+) -----\n", text
    )
    assert [(where, host) for _, where, host in notices] == [
        (str(file).encode(), socket.gethostname().encode())
    ]
    head, _, tail = text.partition(b"\n----- %s bytes" % notices[0][0])
    tail = tail.partition(b"-----\n")[2].lstrip(b"\n")
    assert content.startswith(head) and head.endswith(b"\n") and len(head) > 1 << 20
    assert content.endswith(b"\n" + tail) and len(tail) > 1 << 20
    assert int(notices[0][0]) == len(content) - len(head) - len(tail)


def test_long_running_log_gives_complete_lines_up_to_the_budget(logs):
    content = numbered(300_000)
    place(logs, content)
    pages = list(follow(lambda first: logs.page(1, NOW, first, ended=False)))
    assert len(pages) == len(content) // (4 << 20) + 2
    assert all((4 << 20) - 100 < len(page["logContent"]) <= 4 << 20 for page in pages[:-2])
    assert "".join(page["logContent"] for page in pages).encode() == content
    # A finished one that is not read from its beginning likewise.
    pages = list(follow(lambda first: logs.page(1, NOW, first, ended=True), 2))
    assert (
        "".join(page["logContent"] for page in pages).encode()
        == content[content.index(b"\n") + 1 :]
        and pages[-1]["isEnd"]
    )


@pytest.mark.parametrize("ended", [True, False])
def test_one_line_beyond_the_budget(logs, ended):
    long = b"z" * (5 << 20) + b"\n"
    place(logs, b"before\n" + long + b"after\n")
    page = logs.page(1, NOW, 2, ended=ended)
    shown = b"z" * (4 << 20) + b" ... [line of %d bytes, cut]\n" % len(long)
    assert page == {"fromLineNum": 2, "toLineNum": 2, "logContent": shown.decode(), "isEnd": False}
    assert logs.page(1, NOW, 3, ended=ended) == {
        "fromLineNum": 3,
        "toLineNum": 3,
        "logContent": "after\n",
        "isEnd": ended,
    }
    # Read again, from before it: what was learned about the file is still right.
    page = logs.page(1, NOW, 2, ended=ended)
    assert page["logContent"] == shown.decode()


def test_one_line_beyond_the_budget_that_has_not_ended(logs):
    file = place(logs, b"before\n" + b"z" * (5 << 20))
    nothing = {"fromLineNum": 2, "toLineNum": 1, "logContent": "", "isEnd": False}
    assert logs.page(1, NOW, 2, ended=False) == nothing
    with open(file, "ab") as stream:
        stream.write(b"z\nafter\n")
    page = logs.page(1, NOW, 2, ended=False)
    assert (
        page["logContent"].endswith(f" ... [line of {(5 << 20) + 2} bytes, cut]\n")
        and page["toLineNum"] == 2
    )
    assert logs.page(1, NOW, 3, ended=False)["logContent"] == "after\n"


@pytest.mark.parametrize(
    "content", [b"z" * (5 << 20), b"z" * (5 << 20) + b"\n"], ids=["cut", "newline"]
)
def test_a_finished_log_of_one_long_line(logs, content):
    file = place(logs, content)
    page = logs.page(1, NOW, 1, ended=True)
    assert (page["toLineNum"], page["isEnd"]) == (1, True)
    assert page["logContent"].startswith("z" * (2 << 20)) and str(file) in page["logContent"]
    assert len(page["logContent"]) < (4 << 20) + 1000


# -- the limit of a log


def test_output_beyond_the_limit_is_dropped_and_the_run_goes_on(executor, admin):
    jobs = {
        "chatty": {"shell": "seq 1 200000; echo the end"},
        "thread": {"python": "chatty:main", "isolation": "thread"},
    }
    daemon = executor(jobs, admin=admin, executor={"log_limit": "20KiB"}, start=False)
    (daemon.directory / "chatty.py").write_text(
        "def main():\n    for i in range(20_000):\n        print('line', i)\n    return 'the end'\n"
    )
    daemon.start()
    produced = {
        "chatty": len("".join(f"{i}\n" for i in range(1, 200_001)) + "the end\n"),
        "thread": len("".join(f"line {i}\n" for i in range(20_000))),
    }
    for job_id, name in enumerate(jobs, 1):
        log_id, result = run_job(daemon, admin, name, jobId=job_id)
        assert (result["handleCode"], result["handleMsg"]) == (200, "the end")
        text = daemon.log_text(log_id)
        assert (
            text.count("\n----- output beyond executor.log_limit (20480 bytes) is dropped -----\n")
            == 1
        )
        assert 20_480 <= len(text) <= 20_480 + 1024
        first_line, last_line = text.splitlines()[1], text.splitlines()[-1]
        assert first_line == ("1" if name == "chatty" else "line 0")
        assert re.fullmatch(
            rf"----- {STAMP} succeeded after [\d.e-]+ s: code 200, the end -----", last_line
        )
        metrics = daemon.session.get(daemon.url + "/metrics", timeout=10).text
        dropped = sum(produced[done] - 20_480 for done in list(jobs)[:job_id])
        assert f"\nxxl_executor_log_dropped_bytes_total {dropped}\n" in metrics


@pytest.mark.parametrize("pieces", [1, 7, 10, 20])
def test_limit_counts_bytes_whatever_the_pieces(tmp_path, pieces):
    with contextlib.closing(JobLogs(str(tmp_path / "logs"), 10, 60)) as logs:
        out = logs.open(trigger())
    data = b"0123456789abcdefghij"
    for at in range(0, 20, pieces):
        out.write(data[at : at + pieces])
    assert out.dropped == 10
    assert (
        place_text(logs)
        == "0123456789\n----- output beyond executor.log_limit (10 bytes) is dropped -----\n"
    )
    assert out.last_line() == data.decode()  # the result message is not dropped
    out.end("x")


def test_a_log_that_cannot_be_written_drops_and_counts(tmp_path, caplog):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    out = RunLog(os.open(file, os.O_RDONLY), 1000)
    out.write(b"one\n")
    out.write(b"two\n")
    assert (out.dropped, out.last_line()) == (8, "two")
    out.end("done")
    out.write(b"late")  # a thread of the job that is still there
    assert file.read_bytes() == b"old"
    assert [record.getMessage() for record in caplog.records] == [
        "cannot write a job log, output is dropped: Bad file descriptor"
    ]


def test_a_log_that_cannot_be_opened_drops_and_counts(logs, caplog):
    (Path(logs.directory) / day_of(NOW)).write_text("a file, where a directory is wanted")
    out = logs.open(trigger(5))
    out.write(b"one\n")
    out.write(b"two\n")
    out.end("done")
    assert [record.getMessage() for record in caplog.records] == [
        "cannot open the log of hello logId=5 jobId=7, its output is dropped: [Errno 20] Not a"
        f" directory: '{logs.directory}/{day_of(NOW)}'"
    ]
    assert out.last_line() == "two"
    assert out.dropped >= 8


# -- nothing else can be read or written

ODD = [
    -1,
    0,
    2**31,
    2**63 - 1,
    -(2**63),
    2**63,
    10**30,
    1.5,
    1e300,
    "1_0",
    " 7 ",
    "٣",
    "",
    "x",
    "../7",
    "7/../../7",
    "/etc/passwd",
    "../../7",
    "..",
    "7\0",
    True,
    [],
    {},
    [7],
    float("nan"),
    float("inf"),
]


def test_odd_numbers_never_reach_another_file(executor, admin):
    daemon = executor(admin=admin)
    logs = daemon.data / "logs"
    inside = logs / "1970-01-01"
    inside.mkdir()
    places = [
        daemon.data / "7.log",
        logs / "7.log",
        logs / "7",
        inside / "7",
        inside / "x.log",
        inside / ".log",
        inside / "..log",
        inside / "1_0.log",
        inside / " 7 .log",
        inside / "True.log",
        inside / "٣.log",
        inside / "None.log",
    ]
    for file in places:
        file.write_text("SECRET\n")
    bodies = [{"logId": value, "logDateTim": 3_600_000, "fromLineNum": 1} for value in ODD]
    bodies += [{"logId": 7, "logDateTim": value, "fromLineNum": 1} for value in ODD]
    bodies += [{"logId": 7, "logDateTim": 3_600_000, "fromLineNum": value} for value in ODD] + [
        {},
        {"logId": 7},
        {"logId": None},
    ]
    answered = 0
    for body in bodies:
        reply = daemon.post("/log", json.dumps(body).encode())
        assert "SECRET" not in json.dumps(reply), body
        assert reply["code"] in (200, 500), body
        answered += reply["code"] == 200
        if reply["code"] == 500:
            assert re.match("(logId|logDateTime?|fromLineNum): ", reply["msg"]), (body, reply)
    assert answered >= 10
    assert (
        daemon.post("/log", {"logId": "../7", "logDateTim": NOW, "fromLineNum": 1})["msg"]
        == 'logId: expected a whole number of 64 bits, got "../7"'
    )
    assert (
        daemon.post("/log", {"logId": 7, "logDateTim": 2**63 - 1})["msg"]
        == f"logDateTime: {2**63 - 1} is no time in ms since 1970"
    )


def test_symlinked_log_is_refused(executor, admin, tmp_path):
    daemon = executor({"hello": {"shell": "echo hello"}}, admin=admin)
    secret = tmp_path / "secret"
    secret.write_text("SECRET\n")
    date = int(time.time() * 1000)
    log_id, _ = run_job(daemon, admin, "hello", logDateTime=date)
    assert "\nhello\n" in daemon.page(log_id, date)["logContent"]
    file = next((daemon.data / "logs").glob("*/*.log"))
    file.unlink()
    file.symlink_to(secret)
    page = daemon.page(log_id, date)
    assert (
        page["logContent"]
        == f"no log: {file} on {socket.gethostname()}: Too many levels of symbolic links; "
        "it may have been pruned after log_retention"
    )
    # Nor is it written through.
    new = log_id + 1
    file.with_name(f"{new}.log").symlink_to(secret)
    assert run_job(daemon, admin, "hello", logId=new, logDateTime=date)[1]["handleCode"] == 200
    assert secret.read_text() == "SECRET\n"
    # The directory of a day.
    file.parent.rename(tmp_path / "moved")
    file.parent.symlink_to(tmp_path / "moved")
    (tmp_path / "moved" / f"{log_id + 2}.log").write_text("SECRET\n")
    page = daemon.page(log_id + 2, date)
    assert "SECRET" not in page["logContent"] and page["logContent"].startswith("no log: ")
    assert (
        run_job(daemon, admin, "hello", logId=log_id + 3, logDateTime=date)[1]["handleCode"] == 200
    )
    assert not (tmp_path / "moved" / f"{log_id + 3}.log").exists()
    assert len(re.findall("cannot open the log of hello logId=", daemon.log)) == 2


# -- pruning


def test_prune_removes_old_logs_only(logs, tmp_path):
    root, now = Path(logs.directory), time.time()
    old, young = now - 3 * 86_400, now - 3600
    long_ago = "2020-02-03"

    def make(name, age):
        file = root / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
        os.utime(file, (age, age))
        return file

    gone = [
        make(f"{long_ago}/1.log", old),
        make(f"{long_ago}/2.log", old),
        make(f"{day_of(old * 1000)}/3.log", old),
    ]
    kept = [
        make(f"{long_ago}-more/1.log", old),
        make("other/1.log", old),
        make("1.log", old),
        make("2020-01-01", old),
        make(f"{day_of(old * 1000)}/4.log", young),  # a run that began long ago and wrote lately
        make(f"{day_of(now * 1000)}/5.log", now),
    ]
    outside = tmp_path / "outside"
    outside.mkdir()
    for link in ("2020-05-05", "2020-05-06"):
        (root / link).symlink_to(outside)
    foreign = outside / "1.log"
    foreign.write_text("x")
    os.utime(foreign, (old, old))
    assert logs.prune() == len(gone)
    assert not any(file.exists() for file in gone) and not (root / long_ago).exists()
    assert all(file.exists() for file in [*kept, foreign, root / "2020-05-05"])
    assert logs.prune() == 0


def test_prune_leaves_foreign_files_of_a_day(logs):
    """Only what this program has made is its own to remove."""
    file = place(logs, b"x")
    day = file.parent.rename(file.parent.with_name("2020-02-03"))
    for name in ("notes.txt", "1.log.gz"):
        (day / name).write_text("x")
        os.utime(day / name, (1e9, 1e9))
    (day / "sub").mkdir()
    os.utime(day / "1.log", (1e9, 1e9))
    assert logs.prune() == 1
    assert sorted(entry.name for entry in day.iterdir()) == ["1.log.gz", "notes.txt", "sub"]


def test_the_daemon_prunes_what_is_too_old_by_both_clocks(executor, admin):
    daemon = executor(
        admin=admin,
        executor={"log_retention": "1s"},
        env=launch(HOUSEKEEPING=0.5, LEAST_RETENTION=1.0),
        program=LAUNCH,
        start=False,
    )
    file = daemon.data / "logs" / "2020-02-03" / "1.log"
    file.parent.mkdir(parents=True)
    file.write_text("x")
    os.utime(file, (1e9, 1e9))
    daemon.start()
    wait_until(lambda: not file.parent.exists())
    wait_until(lambda: "pruned 1 log and 0 runs" in daemon.log)


# -- threads


def test_writers_and_readers_at_once(logs):
    """Lines of several threads stay whole, and every page seen meanwhile is a prefix of the
    file."""
    out, errors = logs.open(trigger()), []

    def write(name):
        for i in range(300):
            out.write(b"%s %d\n" % (name, i))

    def read():
        text = ""
        while not done.is_set():
            page = logs.page(1, NOW, text.count("\n") + 1, ended=False)
            text += page["logContent"]
        if not place_text(logs).startswith(text):
            errors.append(text)

    done = threading.Event()
    writers = [threading.Thread(target=write, args=(b"w%d" % i,)) for i in range(4)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    out.end("end")
    assert not errors
    lines = place_text(logs).splitlines()
    assert sorted(lines[:-1]) == sorted(f"w{i} {j}" for i in range(4) for j in range(300))


def test_a_day_directory_that_somebody_removed_is_made_again(logs):
    for _ in range(2):
        out = logs.open(trigger(1))
        out.write(b"hello\n")
        out.end("done")
        assert "hello" in logs.page(1, NOW, 1, ended=True)["logContent"]
        shutil.rmtree(os.path.join(logs.directory, day_of(NOW)))
