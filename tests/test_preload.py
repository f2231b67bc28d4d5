"""`preload`, and what a Python job finds without setting it up: logging, and errors that say what to
do."""

import contextlib
import os
import re
import signal
import stat
import textwrap
from pathlib import Path

import pytest
from conftest import PROGRAM, result_of, run_job, wait_until

JOBS = """
import logging, os, sys, time

def loaded():
    return f"{'heavy' in sys.modules} {os.getppid()}"

def mark():
    import heavy
    return heavy.MARK

def logs():
    logging.getLogger("mine").debug("too fine")
    logging.getLogger("mine").info("of interest")
    logging.warning("careful")
    return "done"

def own_logging():
    logging.basicConfig(format="own %(message)s", level=logging.DEBUG, stream=sys.stdout)
    logging.debug("fine")

def generator():
    yield 1

async def asynchronous():
    yield 1

def waits(context):
    print("pid", os.getpid(), flush=True)
    while not os.path.exists(context.param):
        time.sleep(0.05)
"""


@pytest.fixture
def modules(tmp_path):
    place = tmp_path / "modules"
    place.mkdir()
    (place / "mine.py").write_text(JOBS)
    (place / "heavy.py").write_text("import time\ntime.sleep(0.5)\nMARK = 'one'\n")
    return place


def job(modules, function, **fields):
    return {"python": f"mine:{function}", "pythonpath": [str(modules)], **fields}


def log_of(daemon, log_id):
    (file,) = daemon.data.glob(f"logs/*/{log_id}.log")
    return file.read_text()


def test_a_preloaded_module_is_there_at_once(executor, admin, modules):
    heavy = {"preload": ["heavy"]}
    daemon = executor(
        {
            "with": job(modules, "loaded", **heavy),
            "same": job(modules, "loaded", **heavy),
            "without": job(modules, "loaded"),
            "mark": job(modules, "mark", **heavy),
        },
        admin=admin,
    )
    found = {
        name: run_job(daemon, admin, name)[1]["handleMsg"] for name in ("with", "same", "without")
    }
    assert found["with"].startswith("True ") and found["without"].startswith("False ")
    assert found["with"] == found["same"], "they share one interpreter"
    assert found["with"].split()[1] != found["without"].split()[1]
    # Imported once, so an edit counts only after a reload.
    (modules / "heavy.py").write_text("MARK = 'two'\n")
    assert run_job(daemon, admin, "mark")[1]["handleMsg"] == "one"
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "reloaded" in daemon.log)
    assert run_job(daemon, admin, "mark")[1]["handleMsg"] == "two"


def test_a_start_waits_for_what_is_preloaded(executor, admin, modules):
    (modules / "heavy.py").write_text("import time\ntime.sleep(12)\n")
    daemon = executor({"with": job(modules, "loaded", preload=["heavy"])}, admin=admin)
    assert run_job(daemon, admin, "with", seconds=40)[1]["handleMsg"].startswith("True ")


def test_what_cannot_be_preloaded_is_told_with_the_job(executor, admin, modules):
    (modules / "broken.py").write_text("raise ValueError('bad day')\n")
    (modules / "ends.py").write_text("raise SystemExit(3)\n")
    fields = {"preload": ["broken", "missing_module", "ends", "heavy"]}
    daemon = executor({"with": job(modules, "loaded", **fields)}, admin=admin)
    assert run_job(daemon, admin, "with")[1]["handleMsg"].startswith("True "), (
        "the others are there"
    )
    for told in (
        "cannot import broken: ValueError: bad day",
        "cannot import missing_module: ModuleNotFoundError: No module named 'missing_module'",
        "cannot import ends: SystemExit: 3",
    ):
        assert f"WARNING jobs.with.preload: {told}" in daemon.log


def test_a_preloading_interpreter_that_is_gone_is_started_again(executor, admin, modules):
    daemon = executor({"with": job(modules, "loaded", preload=["heavy"])}, admin=admin)
    first = run_job(daemon, admin, "with")[1]["handleMsg"]
    os.kill(int(first.split()[1]), signal.SIGKILL)
    second = run_job(daemon, admin, "with")[1]["handleMsg"]
    assert second.startswith("True ") and second != first


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_what_a_job_logs_is_in_its_log(executor, admin, modules, isolation):
    daemon = executor({"logs": job(modules, "logs", isolation=isolation)}, admin=admin)
    log_id, found = run_job(daemon, admin, "logs")
    assert found["handleMsg"] == "done"
    text = log_of(daemon, log_id)
    at = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
    assert re.search(rf"^{at} INFO    of interest$", text, re.M), text
    assert re.search(rf"^{at} WARNING careful$", text, re.M), text
    assert "too fine" not in text


def test_a_job_that_sets_up_logging_itself(executor, admin, modules):
    daemon = executor({"own": job(modules, "own_logging")}, admin=admin)
    log_id, _ = run_job(daemon, admin, "own")
    assert "\nown fine\n" in log_of(daemon, log_id)


def test_a_job_that_sets_up_a_logger(executor, admin, modules):
    (modules / "mine.py").write_text(
        "import logging, sys\n"
        "def main():\n"
        "    logger = logging.getLogger('mine')\n"
        "    handler = logging.StreamHandler(sys.stdout)\n"
        "    handler.setFormatter(logging.Formatter('own %(message)s'))\n"
        "    logger.addHandler(handler)\n"
        "    logger.info('once')\n"
    )
    daemon = executor({"own": job(modules, "main")}, admin=admin)
    log_id, _ = run_job(daemon, admin, "own")
    assert log_of(daemon, log_id).count("once") == 1 + 1, "its line, and the result"


def test_a_threads_log_has_no_priority_of_the_journal(executor, admin, modules):
    job_ = job(modules, "logs", isolation="thread")
    daemon = executor({"logs": job_}, admin=admin, env={"JOURNAL_STREAM": "8:1"})
    log_id, _ = run_job(daemon, admin, "logs")
    assert "<" not in log_of(daemon, log_id)


@pytest.mark.parametrize("isolation", ["process", "thread"])
@pytest.mark.parametrize(
    "function, kind",
    [("generator", "a generator"), ("asynchronous", "an asynchronous generator")],
    ids=["generator", "asynchronous"],
)
def test_a_generator_is_an_error(executor, admin, modules, function, kind, isolation):
    """Its log shows no line of the executor, where its author would look in vain."""
    daemon = executor({"a": job(modules, function, isolation=isolation)}, admin=admin)
    log_id, found = run_job(daemon, admin, "a")
    told = (
        f"TypeError: mine:{function} is {kind}, of which nothing has run: take out the yield, or"
        " iterate over it in the function"
    )
    assert (found["handleCode"], found["handleMsg"]) == (500, told)
    text = log_of(daemon, log_id)
    assert f"\n{told}\n" in text and PROGRAM.name not in text, text


def test_ps_shows_which_run_it_is(executor, admin, modules, tmp_path):
    """Of two processes, which are forked from one, which has to be ended."""
    go = tmp_path / "go"
    daemon = executor({"a": job(modules, "waits"), "b": job(modules, "waits")}, admin=admin)
    runs = {
        admin.trigger(daemon.url, name, jobId=number, executorParams=str(go))[0]: name
        for number, name in enumerate("ab", 1)
    }
    for log_id in runs:
        wait_until(lambda: list(daemon.data.glob(f"logs/*/{log_id}.log")), what="the log")
        told = wait_until(lambda: re.search(r"^pid (\d+)$", log_of(daemon, log_id), re.M))
        words = Path(f"/proc/{told[1]}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
        assert words[1:] == [str(PROGRAM), "mine:waits", f"logId={log_id}"]
    go.touch()
    for log_id in runs:
        assert result_of(admin, log_id)["handleCode"] == 200


def test_an_interpreter_that_is_too_old(executor, admin, modules, tmp_path):
    """It runs `-c` code, which sees its version; one that answers as such does for the test."""
    old = tmp_path / "python3.6"
    old.write_text(
        textwrap.dedent("""\
            #!/usr/bin/env python3
            import sys
            sys.version_info = (3, 6, 8, "final", 0)
            code = sys.argv[2]
            sys.argv = ["-c", *sys.argv[3:]]
            exec(code)
        """)
    )
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    daemon = executor({"a": job(modules, "loaded", interpreter=str(old))}, admin=admin)
    _, found = run_job(daemon, admin, "a")
    assert (found["handleCode"], found["handleMsg"]) == (
        500,
        f"cannot start: {old} is too old a Python, a python job needs 3.9: use command:"
        " [python, script] for it",
    )


@pytest.fixture
def small():
    """A control group with 150 MiB, of version 1 or 2: what puts a process into it."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    groups = {names: path for _, names, path in (line.split(":", 2) for line in lines)}
    if "memory" in groups:
        place = Path(f"/sys/fs/cgroup/memory{groups['memory']}", f"xxl-test-{os.getpid()}")
        limit = place / "memory.limit_in_bytes"
    else:
        place = Path(f"/sys/fs/cgroup{groups.get('', '')}", f"xxl-test-{os.getpid()}")
        limit = place / "memory.max"
    if not os.path.ismount("/sys/fs/cgroup") or not place.parent.joinpath("cgroup.procs").exists():
        pytest.skip("needs the file system of control groups")
    try:
        place.mkdir()
        limit.write_text(str(150 << 20))
    except OSError as error:
        with contextlib.suppress(OSError):
            place.rmdir()
        pytest.skip(f"needs a control group with a memory limit: {error}")
    procs = place / "cgroup.procs"
    yield ["sh", "-c", f'echo $$ > {procs} && exec "$@"', "sh"]
    wait_until(lambda: not procs.read_text(), what="the end of the group")
    place.rmdir()


def test_killed_for_want_of_memory(small, executor, admin):
    eats = "x = bytearray(10)\nwhile len(x) < 1 << 30: x += bytes(1 << 20)"
    daemon = executor(
        {"eats": {"command": ["python3", "-c", eats]}, "nine": {"shell": "kill -9 $$"}},
        admin=admin,
        prefix=small,
    )
    _, found = run_job(daemon, admin, "eats")
    assert found["handleMsg"] == (
        "killed by signal 9: the kernel ended it for want of memory, of the host or of this"
        " service or container"
    )
    assert run_job(daemon, admin, "nine")[1]["handleMsg"] == "killed by signal 9"
