"""Job processes and logs, looked at a second time: finalizers that write, first threads that end,
time zones, loggers and directories that a job or somebody takes away."""

import shutil
import sys

import pytest
from conftest import children_of, result_of, run_job, wait_until

JOBS = """
import gc, logging, logging.config, sys, time

class Own:
    def __init__(self):
        self.itself = self  # a cycle: the collector comes for it, wherever it is

    def __del__(self):
        print("not closed")

def finalizers(context):
    before = gc.get_threshold()
    gc.set_threshold(1, 1000, 1000)  # it comes at once
    try:
        for number in range(300):
            Own()
            print("line", number)
    finally:
        gc.set_threshold(*before)
    return "done"

def zone():
    return time.strftime("%H:%M %Z", time.localtime(0))

def configures():
    logging.config.dictConfig({"version": 1, "root": {"level": "INFO"}})

def forces():
    logging.basicConfig(level=logging.INFO, force=True)

def lines():
    sys.stdout.writelines(["one\\n", "two\\n"])

def notes():
    error = ValueError("the amount is negative")
    error.add_note("row 7 of orders.csv")
    raise error
"""


@pytest.fixture
def job(tmp_path):
    """A factory: job(function of JOBS, option=...), as a Python job of a configuration."""
    (tmp_path / "mine.py").write_text(JOBS)
    return lambda name, **options: {
        "python": f"mine:{name}",
        "pythonpath": [str(tmp_path)],
        **options,
    }


# -- logs


def test_a_finalizer_that_prints(executor, admin, job):
    """In the middle of a line of its thread job, a finalizer may print one more: the log does not
    wait for itself, and neither do the runs beside it."""
    daemon = executor(
        {"finalizers": job("finalizers", isolation="thread"), "shell": {"shell": "echo ok"}},
        admin=admin,
        executor={"log_to_stdout": True},
    )
    log_id, reply = admin.trigger(daemon.url, "finalizers")
    assert reply["code"] == 200
    assert run_job(daemon, admin, "shell")[1]["handleMsg"] == "ok"
    assert result_of(admin, log_id)["handleMsg"] == "done"
    wait_until(lambda: "line 299" in daemon.log_text(log_id), what="the last line")
    assert daemon.log_text(log_id).count("not closed\n") > 200


@pytest.mark.parametrize("name", ["configures", "forces"])
def test_a_job_that_sets_up_logging(executor, admin, job, name):
    """What a thread job does to the loggers of its process, as django.setup() does, does not
    silence the executor."""
    daemon = executor(
        {"job": job(name, isolation="thread"), "shell": {"shell": "echo ok"}}, admin=admin
    )
    assert run_job(daemon, admin, "job")[1]["handleCode"] == 200
    log_id, _ = run_job(daemon, admin, "shell")
    wait_until(lambda: str(log_id) in daemon.log, what="a line about the run after it")


def test_the_directory_of_the_logs_is_removed(executor, admin):
    """Somebody frees the disk while the executor runs: the next run has a log."""
    daemon = executor({"job": {"shell": "echo ok"}}, admin=admin)
    run_job(daemon, admin, "job")
    shutil.rmtree(daemon.data / "logs")
    log_id, result = run_job(daemon, admin, "job")
    assert result["handleMsg"] == "ok"
    assert "ok\n" in daemon.page(log_id, result["logDateTim"])["logContent"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs add_note")
def test_an_exception_with_a_note(executor, admin, job):
    """The result is its type and its text; a note may be anything and stands in the log."""
    daemon = executor({"job": job("notes")}, admin=admin)
    log_id, result = run_job(daemon, admin, "job")
    assert result["handleMsg"] == "ValueError: the amount is negative"
    assert "row 7 of orders.csv" in daemon.log_text(log_id)


def test_lines_of_a_thread_job(executor, admin, job):
    """sys.stdout.writelines, too, goes to the log of its run."""
    daemon = executor({"job": job("lines", isolation="thread")}, admin=admin)
    log_id, _ = run_job(daemon, admin, "job")
    assert "one\ntwo\n" in daemon.log_text(log_id)
    assert "two" not in daemon.log.splitlines()


def test_the_limit_of_a_log_within_a_character(executor, admin):
    """executor.log_limit ends the log before the character that it would cut."""
    text = "x" + "\u20ac" * 700
    daemon = executor(
        {"job": {"command": ["printf", "%s", text]}}, admin=admin, executor={"log_limit": "1KiB"}
    )
    log_id, result = run_job(daemon, admin, "job")
    data = next((daemon.data / "logs").glob(f"*/{log_id}.log")).read_bytes()
    assert "\u20ac\n----- output beyond executor.log_limit" in data.decode("utf-8")


# -- processes

HEADLESS = """
import ctypes, threading
threading.Thread(target=threading.Event().wait, args=(600,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_first_thread_has_ended(executor, admin):
    """The kernel shows it as a zombie, while its other threads go on: it is ended by its
    timeout."""
    daemon = executor(
        {
            "job": {
                "command": [sys.executable, "-c", HEADLESS],
                "timeout": "1s",
                "kill_grace": "0.5s",
            }
        },
        admin=admin,
    )
    log_id, reply = admin.trigger(daemon.url, "job")
    assert reply["code"] == 200
    main = wait_until(lambda: children_of(daemon.process.pid, "Z"), what="the end of its thread")
    result = result_of(admin, log_id)
    assert (result["handleCode"], result["handleMsg"]) == (502, "timed out after 1 s")
    assert not children_of(daemon.process.pid, "Z"), main


def test_the_time_zone_of_a_python_job(executor, admin, job):
    """env TZ holds from its first moment, although the Python server has another."""
    daemon = executor(
        {"there": job("zone", env={"TZ": "XYZ-9"}), "here": job("zone")},
        admin=admin,
        env={"TZ": "UTC"},
    )
    for name, zone in (("there", "09:00 XYZ"), ("here", "00:00 UTC")):
        assert run_job(daemon, admin, name)[1]["handleMsg"] == zone
