"""Python entry points: in a process forked from a warm interpreter, and in a thread of the
daemon."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import LAUNCH, alive, launch, result_of, run_job, run_processes, wait_until

import xxl_executor

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start jobs as another user")
BOTH = pytest.mark.parametrize("isolation", ["process", "thread"])


def entry_points(directory, source, names, *, module="example_job", **options):
    """Write a module; returns `jobs`: a python job for each of its functions."""
    directory.mkdir(exist_ok=True)
    (directory / f"{module}.py").write_text(source, encoding="utf-8")
    return {
        name: {
            "python": f"{module}:{name}",
            "pythonpath": [str(directory)],
            "kill_grace": "0.3s",
            **options,
        }
        for name in names.split()
    }


def ending(daemon, admin, handler, **fields):
    """Run a job; returns (code, message)."""
    _, result = run_job(daemon, admin, handler, **fields)
    return result["code"], result["handleMsg"]


def pass_time(seconds):
    """Most likely something has happened by then that cannot be seen from outside; what is asserted
    is right in any case."""
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > end)


def server_of(daemon):
    """The pid of the daemon's Python server."""

    def found():
        for pid in daemon.family():
            with contextlib.suppress(OSError, TypeError):  # it has just ended
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                own = (daemon.process.pid, pid)  # what it forked has the same words
                if b"--serve-python" in words and xxl_executor.process_stat(pid)[1:3] == own:
                    return pid
        return None

    return wait_until(found)


# -- alike in a process and in a thread

ALIKE = """
import asyncio
import json
import sys
from xxl_executor import Context

def fields(context: Context):
    assert isinstance(context, Context)
    names = "job_id log_id handler param shard_index shard_total trigger_time timeout".split()
    return json.dumps([getattr(context, name) for name in names] + [context.cancelled.is_set()])

def no_argument():
    return "took nothing"

def optional(context=None):
    return context.handler

def number():
    return 0

def nothing(context):
    print("first")
    print("the last line")
    print()

def silent():
    pass

def logs(context):
    context.log("two words")
    print("printed")

async def coroutine(context):
    await asyncio.sleep(0)
    return f"awaited {context.param}"

class Own(Exception):
    pass

def fails():
    deeper()

def deeper():
    raise ValueError("boom")

def fails_own(context):
    raise Own("of two\\nlines")

def exits_well():
    print("before the exit")
    sys.exit(0)

def long():
    return "\\u6f22" * 20_000 + "end"

def parameters(context):
    return json.dumps(context.params(), sort_keys=True)
"""


@BOTH
def test_alike(executor, admin, tmp_path, isolation):
    names = (
        "fields no_argument optional number nothing silent logs coroutine fails fails_own"
        " exits_well long parameters nosuch"
    )
    jobs = entry_points(tmp_path / "source", ALIKE, names, isolation=isolation, timeout="90s")
    jobs["no_module"] = {"python": "no_such_module:main", "isolation": isolation}
    # `xxl_executor` must be importable without a PYTHONPATH of this kind.
    daemon = executor(jobs, admin=admin, env={"PYTHONPATH": ""})
    log_id, result = run_job(
        daemon,
        admin,
        "fields",
        jobId=9,
        executorParams="é \ud83d\ude00",
        broadcastIndex=2,
        broadcastTotal=5,
        executorTimeout=60,
        logDateTime=1_700_000_000_123,
    )
    assert (result["code"], json.loads(result["handleMsg"])) == (
        200,
        [9, log_id, "fields", "é 😀", 2, 5, 1_700_000_000_123, 60, False],
    )
    for handler, expected in {
        "no_argument": (200, "took nothing"),
        "optional": (200, "optional"),
        "number": (200, "0"),
        "nothing": (200, "the last line"),
        "silent": (200, ""),
        "coroutine": (200, "awaited p"),
        "fails": (500, "ValueError: boom"),
        "exits_well": (200, "before the exit"),
        "long": (200, "..." + "漢" * 14_994 + "end"),
        "no_module": (500, "ModuleNotFoundError: No module named 'no_such_module'"),
        "nosuch": (500, "AttributeError: module 'example_job' has no attribute 'nosuch'"),
    }.items():
        assert ending(daemon, admin, handler, executorParams="p") == expected, handler
    code, message = ending(daemon, admin, "fails_own")
    assert (code, message.startswith("example_job.Own: of two")) == (500, True)
    assert ending(daemon, admin, "parameters", executorParams='{"a": [1]}') == (200, '{"a": [1]}')
    assert ending(daemon, admin, "parameters", executorParams="no") == (
        500,
        (
            'ValueError: expected a JSON object, "id=1&active=true" or key=value words as'
            " parameter, got 'no'"
        ),
    )

    log_id, _ = run_job(daemon, admin, "fails")
    line = ALIKE.splitlines().index("    deeper()") + 1
    found = re.search(
        r'Traceback \(most recent call last\):\n  File "(.*)", line (\d+), in (\w+)\n',
        daemon.log_text(log_id),
    )
    # It begins in the job.
    assert found.groups() == (str(tmp_path / "source" / "example_job.py"), str(line), "fails")
    assert "\nValueError: boom\n" in daemon.log_text(log_id)
    log_id, _ = run_job(daemon, admin, "logs")
    assert re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d two words\nprinted$",
        daemon.log_text(log_id),
        re.MULTILINE,
    )


PARALLEL = """
import json
import logging
import sys
import threading
from pathlib import Path

def main(context):
    directory, own, other = json.loads(context.param)
    for number in range(200):
        print("printed", own)
        context.log(f"logged {own}")
        if number == 100:
            logging.getLogger("example").warning("warned %s", own)
            print("on stderr", own, file=sys.stderr)
            (Path(directory) / own).touch()  # from here on both are in the middle
            while not (Path(directory) / other).exists():
                threading.Event().wait(0.01)
    return own
"""


@BOTH
def test_output_goes_to_the_log_of_its_run(executor, admin, tmp_path, isolation):
    daemon = executor(
        entry_points(tmp_path / "source", PARALLEL, "main", isolation=isolation), admin=admin
    )
    pairs = {"one": "two", "two": "one"}
    ids = {
        own: admin.trigger(
            daemon.url, "main", jobId=number, executorParams=json.dumps([str(tmp_path), own, other])
        )[0]
        for number, (own, other) in enumerate(pairs.items())
    }
    for own, log_id in ids.items():
        assert result_of(admin, log_id)["handleMsg"] == own
        lines = [
            line for line in daemon.log_text(log_id).splitlines() if not line.startswith("-----")
        ]
        assert lines.count(f"printed {own}") == 200
        assert sum(line.endswith(f" logged {own}") for line in lines) == 200
        assert sum(line.endswith(f"warned {own}") for line in lines) == 1, "logging"
        assert lines.count(f"on stderr {own}") == 1
        assert len(lines) == 402, "nothing of the other"


# -- params(), without a daemon


def context(param):
    fields = {
        "job_id": 1,
        "log_id": 2,
        "handler": "h",
        "param": param,
        "shard_index": 0,
        "shard_total": 1,
        "log_date_time": 0,
        "timeout": 0,
    }
    return xxl_executor.Context(fields, lambda text: None)


@pytest.mark.parametrize(
    "param, expected",
    [
        ("", {}),
        (" \n", {}),
        ("{}", {}),
        (
            '{"id": 1, "active": true, "deep": {"a": [null]}}',
            {"id": 1, "active": True, "deep": {"a": [None]}},
        ),
        ("id=1&active=true", {"id": "1", "active": "true"}),
        ("name=a%20b+c", {"name": "a b c"}),
        ("empty=", {"empty": ""}),
        ("\tid=1\n", {"id": "1"}),
        ("a=b=c", {"a": "b=c"}),
        ("id=1 active=true", {"id": "1", "active": "true"}),
        ("name='a b' other=\"c & d\"", {"name": "a b", "other": "c & d"}),
        ("a=1\nb=2", {"a": "1", "b": "2"}),
        ("a=1 a=2", {"a": "2"}),
    ],
)
def test_params(param, expected):
    assert context(param).params() == expected


@pytest.mark.parametrize(
    "param", ["word", "[1, 2]", "5", "null", "a=1 word", "=1 a=2", 'a="open b=1', "{broken"]
)
def test_params_that_are_none(param):
    with pytest.raises(ValueError) as error:
        context(param).params()
    wanted = 'expected a JSON object, "id=1&active=true" or key=value words as parameter'
    assert str(error.value) == f"{wanted}, got {param!r}"


def test_context_log():
    written = []
    fields = vars(context("p"))
    job = xxl_executor.Context(
        {**{name: fields.get(name, 0) for name in fields}, "log_date_time": 0}, written.append
    )
    job.log(5)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d 5\n", "".join(written))


# -- in a process

ENDS = """
import json
import os
import signal
import sys

def ends(context):
    print("the last line")
    sys.stdout.flush()
    exec(context.param)

def where():
    own, handler = os.environ["OWN"], os.environ["XXL_JOB_HANDLER"]
    return json.dumps([os.getcwd(), own, handler, sys.argv, os.getsid(0) == os.getpid()])

def size(context):
    return f"{len(context.param)} {context.param[:2]} {context.param[-2:]}"

def state(context):
    seen = getattr(sys, "seen_by_a_job", None)
    sys.seen_by_a_job = context.log_id
    os.environ["LEFT_BEHIND"] = os.environ.get("LEFT_BEHIND", "") + "x"
    return f"{seen} {os.environ['LEFT_BEHIND']}"

def result_file():
    with open(os.environ["XXL_JOB_RESULT_FILE"], "w") as file:
        file.write("from the file")
"""


def test_ends_of_a_process(executor, admin, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    jobs = entry_points(
        tmp_path / "source",
        ENDS,
        "ends where size state result_file",
        cwd=str(inside),
        env={"OWN": "yes"},
    )
    jobs["nowhere"] = {**jobs["where"], "cwd": str(tmp_path / "nowhere")}
    daemon = executor(jobs, admin=admin)
    for code, expected in {
        "sys.exit()": (200, "the last line"),
        "sys.exit(3)": (500, "exit status 3: the last line"),
        "sys.exit(-1)": (500, "exit status 255: the last line"),
        "sys.exit(256)": (500, "SystemExit: 256"),
        "sys.exit('some text')": (500, "exit status 1: some text"),
        "os._exit(7)": (500, "exit status 7: the last line"),
        "os._exit(0)": (200, "the last line"),
        "raise KeyboardInterrupt": (500, "KeyboardInterrupt"),
        "raise KeyError('k')": (500, "KeyError: 'k'"),
        "raise ValueError": (500, "ValueError"),
        "os.kill(os.getpid(), signal.SIGSEGV)": (500, "killed by signal 11"),
        "os.kill(os.getpid(), signal.SIGKILL)": (500, "killed by signal 9"),
        "os.kill(os.getpid(), signal.SIGINT)": (500, "KeyboardInterrupt"),
        "import threading; threading.Thread(target=print, args=('from a thread',)).start()": (
            200,
            "from a thread",
        ),
    }.items():
        assert ending(daemon, admin, "ends", executorParams=code) == expected, code
    code, message = ending(daemon, admin, "where")
    assert (code, json.loads(message)) == (
        200,
        [str(inside), "yes", "where", ["example_job:where"], True],
    )
    assert ending(daemon, admin, "result_file") == (200, "from the file")
    for _ in range(2):  # runs do not see each other's globals and environment
        assert ending(daemon, admin, "state") == (200, "None x")
    # A parameter that no command line could carry.
    assert ending(daemon, admin, "size", executorParams="é" + "x" * 1_000_000 + "ü") == (
        200,
        "1000002 éx xü",
    )
    code, message = ending(daemon, admin, "nowhere")
    assert (code, str(tmp_path / "nowhere") in message) == (500, True)


def test_edited_modules_take_effect(executor, admin, tmp_path):
    source = tmp_path / "source"
    daemon = executor(entry_points(source, "import no_such_module_yet\n", "main"), admin=admin)
    assert ending(daemon, admin, "main") == (
        500,
        "ModuleNotFoundError: No module named 'no_such_module_yet'",
    )
    (source / "no_such_module_yet.py").write_text("value = 'helper'\n")
    (source / "example_job.py").write_text(
        "import no_such_module_yet\ndef main(): return no_such_module_yet.value\n"
    )
    assert ending(daemon, admin, "main") == (200, "helper")
    (source / "no_such_module_yet.py").write_text("value = 'another helper'\n")
    assert ending(daemon, admin, "main") == (200, "another helper")
    (source / "example_job.py").write_text("def main(:\n")
    assert ending(daemon, admin, "main") == (
        500,
        "SyntaxError: invalid syntax (example_job.py, line 1)",
    )
    (source / "example_job.py").write_text("def main(): return 'mended'\n")
    assert ending(daemon, admin, "main") == (200, "mended")


def test_modules_of_one_name(executor, admin, tmp_path):
    jobs = {}
    for place in ("one", "two"):
        jobs[place] = entry_points(tmp_path / place, f"def main(): return '{place}'\n", "main")[
            "main"
        ]
    # The directory of the configuration is searched too, after pythonpath.
    jobs["default"] = {"python": "beside:main"}
    (tmp_path / "executor").mkdir()
    (tmp_path / "executor" / "beside.py").write_text(
        "def main(): return 'beside the configuration'\n"
    )
    daemon = executor(jobs, admin=admin)
    for place in ("one", "two", "one"):
        assert ending(daemon, admin, place) == (200, place)
    assert ending(daemon, admin, "default") == (200, "beside the configuration")


MULTI = """
import concurrent.futures
import multiprocessing
import threading

def square(number):
    return number * number

def start(context):
    with multiprocessing.get_context(context.param).Pool(2) as pool:
        return sum(pool.map(square, range(10)))

def executors():
    with concurrent.futures.ProcessPoolExecutor(2) as pool, concurrent.futures.ThreadPoolExecutor(4) as threads:
        return sum(pool.map(square, range(10))) + sum(threads.map(square, range(10)))

def threads(context):
    found = []
    work = [threading.Thread(target=lambda: (context.log("in a thread"), found.append(1))) for _ in range(5)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    return len(found)
"""


def test_multiprocessing_and_threads(executor, admin, tmp_path):
    daemon = executor(
        entry_points(tmp_path / "source", MULTI, "start executors threads", timeout="30s"),
        admin=admin,
    )
    ids = [
        admin.trigger(daemon.url, "start", jobId=number, executorParams=method)[0]
        for number, method in enumerate(("fork", "spawn"))
    ]
    for log_id in ids:
        result = result_of(admin, log_id, 40)
        assert (result["code"], result["handleMsg"]) == (200, "285"), daemon.log_text(log_id)
    assert ending(daemon, admin, "executors", seconds=40) == (200, "570")
    assert ending(daemon, admin, "threads") == (200, "5")
    wait_until(lambda: not run_processes(daemon), what="the end of all that the jobs started")


FAMILY = '''
import os
import signal

def note():
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{os.getpid()}\\n")

def stay():
    """Forks a child, a grandchild in a session of its own, and an orphan; all ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    read, write = os.pipe()
    for depth in range(1, 4):
        if os.fork() == 0:
            if depth > 1:
                os.setsid()
            if depth == 3 and os.fork():
                os._exit(0)
            note()
            os.write(write, b"x")
            while True:
                signal.pause()
    for _ in range(3):
        os.read(read, 1)
    note()
    os.rename(os.environ["NOTES"], os.environ["NOTES"] + ".ready")
    while True:
        signal.pause()

def leave():
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note()
        os.rename(os.environ["NOTES"], os.environ["NOTES"] + ".ready")
        while True:
            signal.pause()
    while not os.path.exists(os.environ["NOTES"] + ".ready"):
        pass
    return "left"

def works():
    return "works"
'''


def noted(tmp_path):
    """The pids of the descendants, when all have started."""
    ready = tmp_path / "notes.ready"
    wait_until(ready.exists, 15)
    return list(map(int, ready.read_text().split()))


@pytest.mark.parametrize("how", ["timeout", "kill", "shutdown", "end"])
def test_nothing_of_a_process_survives(executor, admin, tmp_path, how):
    jobs = entry_points(
        tmp_path / "source",
        FAMILY,
        "stay leave",
        env={"NOTES": str(tmp_path / "notes")},
        timeout="2s" if how == "timeout" else 0,
    )
    daemon = executor(jobs, admin=admin, executor={"drain_timeout": "0.2s"})
    log_id, _ = admin.trigger(daemon.url, "leave" if how == "end" else "stay")
    pids = noted(tmp_path)
    if how == "kill":
        admin.call(daemon.url, "/kill", {"jobId": 1})
    elif how == "shutdown":
        assert daemon.stop() == 0
    result = result_of(admin, log_id)
    assert [pid for pid in pids if alive(pid)] == []
    assert (len(pids), result["code"], result["handleMsg"]) == {
        "timeout": (4, 502, "timed out after 2 s"),
        "kill": (4, 500, "killed by the admin"),
        "shutdown": (4, 500, "killed: the executor stopped"),
        "end": (1, 200, "left"),
    }[how]


@pytest.mark.parametrize("background", ["kill", "keep"])
def test_the_python_server_is_killed_while_a_job_runs(executor, admin, tmp_path, background):
    jobs = entry_points(
        tmp_path / "source",
        FAMILY,
        "stay works",
        env={"NOTES": str(tmp_path / "notes")},
        background=background,
    )
    daemon = executor(jobs, admin=admin)
    log_id, _ = admin.trigger(daemon.url, "stay", jobId=1)
    pids = noted(tmp_path)
    server = server_of(daemon)
    os.kill(server, signal.SIGKILL)
    try:
        result = result_of(admin, log_id)
        assert (result["code"], result["handleMsg"]) == (
            500,
            "the Python server of this job ended unexpectedly",
        )
        assert [pid for pid in pids if alive(pid)] == []
        assert ending(daemon, admin, "works", jobId=2) == (200, "works")
        assert server_of(daemon) != server
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_the_python_server_dies_before_it_forks(executor, admin, tmp_path):
    """A request that the server took with it to its grave: the run fails or starts anew, it does
    not hang."""
    daemon = executor(
        entry_points(tmp_path / "source", FAMILY, "works", timeout="10s"), admin=admin
    )
    server = server_of(daemon)
    assert ending(daemon, admin, "works", jobId=1) == (200, "works")
    os.kill(server, signal.SIGSTOP)
    try:
        log_id, _ = admin.trigger(daemon.url, "works", jobId=2)
        wait_until(lambda: daemon.status()["running"])
        pass_time(0.3)  # the request is sent
    finally:
        os.kill(server, signal.SIGKILL)
    result = result_of(admin, log_id)
    assert (result["code"], result["handleMsg"]) in [
        (200, "works"),
        (500, "the Python server of this job ended unexpectedly"),
    ]
    assert ending(daemon, admin, "works", jobId=3) == (200, "works")


def test_a_python_server_that_hangs_holds_back_neither_others_nor_the_stop(
    executor, admin, tmp_path
):
    jobs = entry_points(tmp_path / "source", FAMILY, "works")
    daemon = executor(
        {**jobs, "other": {"shell": "echo fine"}}, admin=admin, executor={"drain_timeout": "0.2s"}
    )
    server = server_of(daemon)
    os.kill(server, signal.SIGSTOP)
    try:
        assert ending(daemon, admin, "other") == (200, "fine")
        daemon.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(20)
        assert daemon.process.poll() == 0, "it has stopped"
        assert not alive(server)
    finally:
        if alive(server):
            os.kill(server, signal.SIGKILL)


@pytest.fixture(scope="module")
def another_interpreter(tmp_path_factory):
    """The python of a virtual environment that has neither requests nor yaml."""
    place = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(place)], check=True, timeout=60
    )
    return place / "bin" / "python"


def test_interpreter(executor, admin, tmp_path, another_interpreter):
    source = (
        "import importlib.util, json, sys\nfrom xxl_executor import Context\ndef main(context):\n  "
        "  assert isinstance(context, Context)\n    found = [importlib.util.find_spec(name) is not"
        " None for name in ('requests', 'yaml')]\n    return json.dumps([sys.prefix, found])\n"
    )
    jobs = entry_points(tmp_path / "source", source, "main", interpreter=str(another_interpreter))
    jobs["own"] = {**jobs["main"]}
    del jobs["own"]["interpreter"]
    daemon = executor(jobs, admin=admin, env={"PYTHONPATH": ""})
    _, result = run_job(daemon, admin, "main")
    assert result["code"] == 200, result
    assert json.loads(result["handleMsg"]) == [
        str(another_interpreter.parent.parent),
        [False, False],
    ]
    _, result = run_job(daemon, admin, "own")
    assert json.loads(result["handleMsg"]) == [sys.prefix, [True, True]]


# -- in a thread

THREAD = """
import os
import sys
import threading
from pathlib import Path

def waits(context):
    Path(context.param).touch()
    assert context.cancelled.wait(60)
    print("cleaned up")
    return "returned"

def pid():
    return os.getpid()

def ends(context):
    print("the last line")
    exec(context.param)

def stays():
    return threading.current_thread() is threading.main_thread()
"""


def test_cancelled_threads(executor, admin, tmp_path):
    jobs = entry_points(tmp_path / "source", THREAD, "waits", isolation="thread")
    jobs["limited"] = {**jobs["waits"], "timeout": "1s"}
    for job in jobs.values():
        job["kill_grace"] = "30s"
    daemon = executor(jobs, admin=admin, executor={"drain_timeout": "0.2s"})

    def begin(handler, number):
        log_id, _ = admin.trigger(
            daemon.url, handler, jobId=number, executorParams=str(tmp_path / f"mark{number}")
        )
        wait_until((tmp_path / f"mark{number}").exists)
        return log_id

    expected = {
        begin("waits", 1): (500, "killed by the admin"),
        begin("limited", 2): (502, "timed out after 1 s"),
        begin("waits", 3): (502, "timed out after 1 s"),
        begin("waits", 4): (500, "killed: the executor stopped"),
    }
    killed, _, limited_by_admin, stopped = expected
    del expected[limited_by_admin]
    assert admin.call(daemon.url, "/kill", {"jobId": 1})["code"] == 200
    assert admin.call(daemon.url, "/kill", {"jobId": 3})["code"] == 200
    log_id, result = run_job(
        daemon, admin, "waits", jobId=5, executorTimeout=1, executorParams=str(tmp_path / "mark5")
    )
    assert (result["code"], result["handleMsg"]) == (
        502,
        "timed out after 1 s",
    ), "the admin's timeout"
    assert "\ncleaned up\n" in daemon.log_text(log_id)
    result_of(admin, killed)
    assert stopped not in admin.results
    assert daemon.stop() == 0
    for log_id, wanted in expected.items():
        result = result_of(admin, log_id)
        assert (result["code"], result["handleMsg"]) == wanted
        assert "\ncleaned up\n" in daemon.log_text(log_id)


def test_ends_of_a_thread(executor, admin, tmp_path):
    daemon = executor(
        entry_points(tmp_path / "source", THREAD, "pid ends stays", isolation="thread"), admin=admin
    )
    assert ending(daemon, admin, "pid") == (200, str(daemon.process.pid))
    for code, expected in {
        "sys.exit()": (200, "the last line"),
        "sys.exit(0)": (200, "the last line"),
        "sys.exit(3)": (500, "SystemExit: 3"),
        "sys.exit('some text')": (500, "SystemExit: some text"),
        "raise KeyboardInterrupt": (500, "KeyboardInterrupt"),
        "raise GeneratorExit": (500, "GeneratorExit"),
    }.items():
        assert ending(daemon, admin, "ends", executorParams=code) == expected, code
    assert ending(daemon, admin, "stays") == (200, "False")
    assert daemon.process.poll() is None


# -- as another user


@ROOT_ONLY
def test_a_python_job_as_another_user(executor, admin):
    directory = Path(
        tempfile.mkdtemp(prefix="xxl-executor-test-")
    )  # pytest's own is closed to others
    try:
        directory.chmod(0o755)
        # It imports nothing that is not loaded: the interpreter itself may lie where nobody may
        # look.
        source = (
            "import os, signal\ndef main():\n    return f'{os.getresuid()} {os.getresgid()}"
            ' {os.getgroups()} {os.environ["HOME"]}\'\ndef waits():\n   '
            " signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    signal.pause()\n"
        )
        jobs = entry_points(
            directory / "source", source, "main waits", user="nobody", cwd=str(directory)
        )
        jobs["waits"]["timeout"] = "1s"
        jobs["nobody"] = {**jobs["main"], "user": "no-such-user"}
        daemon = executor(jobs, admin=admin, directory=directory)
        user, group = (
            int(subprocess.run(["id", option, "nobody"], capture_output=True, check=True).stdout)
            for option in ("-u", "-g")
        )
        assert ending(daemon, admin, "main") == (
            200,
            f"{(user,) * 3} {(group,) * 3} {[group]} /nonexistent",
        )
        assert ending(daemon, admin, "waits") == (502, "timed out after 1 s")
        assert ending(daemon, admin, "nobody") == (
            500,
            "cannot start: there is no user no-such-user on this host (jobs.nobody.user)",
        )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def test_a_server_that_falls_silent_is_replaced(executor, admin, tmp_path):
    """It is asked in vain for SERVER_LIMIT, which costs that one run; what it has started goes on,
    the next run gets a new server, and the silent one is not left behind."""
    (tmp_path / "jobs.py").write_text(
        "import os, time\n"
        "def quick():\n    return str(os.getppid())\n"
        "def waits():\n"
        "    print('started', flush=True)\n"
        "    while not os.path.exists('go'):\n        time.sleep(0.01)\n"
        "    return 'went on'\n"
    )
    where = {"pythonpath": [str(tmp_path)], "cwd": str(tmp_path)}
    daemon = executor(
        {
            "quick": {"python": "jobs:quick", **where},
            "waits": {"python": "jobs:waits", **where},
        },
        admin=admin,
        env=launch(SERVER_LIMIT=3.0),
        program=LAUNCH,
    )
    code, silent = ending(daemon, admin, "quick")
    assert code == 200
    log_id, reply = admin.trigger(daemon.url, "waits", jobId=2)
    assert reply["code"] == 200
    date = int(time.time() * 1000)
    wait_until(lambda: "started" in daemon.page(log_id, date)["logContent"], what="the start")
    os.kill(int(silent), signal.SIGSTOP)
    try:
        assert ending(daemon, admin, "quick", jobId=3) == (
            500,
            f"cannot start {sys.executable}: the Python server does not answer",
        )
        code, fresh = ending(daemon, admin, "quick", jobId=3)
        assert code == 200 and fresh != silent
    finally:
        os.kill(int(silent), signal.SIGCONT)
    (tmp_path / "go").touch()
    found = result_of(admin, log_id)
    assert (found["handleCode"], found["handleMsg"]) == (200, "went on")
    wait_until(lambda: not alive(int(silent)), what="the end of the silent server")


WHO = """
import os
def who():
    return str(os.getpid())
"""


def spare_of(server, *but):
    """The PID of the child that waits for the next run; `but`: not one of these."""

    def found():
        pids = map(int, Path(f"/proc/{server}/task/{server}/children").read_text().split())
        return [pid for pid in pids if alive(pid) and pid not in but]

    return wait_until(found, what="the spare child")[0]


def test_the_next_run_begins_in_a_process_that_is_there_already(executor, admin, tmp_path):
    daemon = executor(entry_points(tmp_path / "source", WHO, "who"), admin=admin)
    first = int(ending(daemon, admin, "who")[1])
    server = server_of(daemon)
    spare = spare_of(server, first)
    assert ending(daemon, admin, "who") == (200, str(spare))
    another = spare_of(server, first, spare)
    os.kill(another, signal.SIGKILL)  # a run does not suffer from it
    code, pid = ending(daemon, admin, "who")
    assert code == 200 and int(pid) not in (first, spare, another)
    orphan = spare_of(server, first, spare, another, int(pid))
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not alive(orphan), what="its end, with its server's")
    assert ending(daemon, admin, "who")[0] == 200


def test_a_process_that_ends_before_the_daemon_has_heard_of_it(executor, admin, tmp_path):
    """Its PID and its exit status are told at once."""
    daemon = executor(entry_points(tmp_path / "source", WHO, "who"), admin=admin)
    first = int(ending(daemon, admin, "who")[1])
    server = server_of(daemon)
    spare = spare_of(server, first)
    os.kill(spare, signal.SIGSTOP)
    os.kill(server, signal.SIGSTOP)
    try:
        log_id, _ = admin.trigger(daemon.url, "who")
        wait_until(lambda: daemon.status()["running"])
        pass_time(0.3)  # it asks for a child
        daemon.signal(signal.SIGSTOP)
        os.kill(server, signal.SIGCONT)
        pass_time(0.2)  # that is the spare
        os.kill(spare, signal.SIGKILL)
        pass_time(0.2)  # and its end is told
    finally:
        os.kill(server, signal.SIGCONT)
        daemon.signal(signal.SIGCONT)
    result = result_of(admin, log_id)
    assert (result["handleCode"], result["handleMsg"]) == (500, "killed by signal 9")


HOOKS = """
import atexit
import os
import threading
import time

def note():
    with open(os.environ["ENDS"], "a") as file:
        file.write(f"{os.getpid()}\\n")

atexit.register(note)
now = time.monotonic()

def keep():
    global now
    while True:
        time.sleep(0.01)
        now = time.monotonic()

if os.environ["KEEP"]:
    threading.Thread(target=keep, daemon=True).start()
"""
HOOKED = """
import os
import time
import hooks

def who():
    return f"{os.getpid()} {time.monotonic() - hooks.now}"
"""


@pytest.mark.parametrize("thread", ["", "yes"])
def test_what_is_preloaded_is_in_no_run_that_never_was(executor, admin, tmp_path, thread):
    """What ends unused runs no hook of it; and what it keeps up to date is so in each run."""
    source, ends = tmp_path / "source", tmp_path / "ends"
    jobs = entry_points(source, HOOKED, "who", preload=["hooks"])
    (source / "hooks.py").write_text(HOOKS)
    daemon = executor(jobs, admin=admin, env={"ENDS": str(ends), "KEEP": thread})
    runs = []
    for _ in range(2):
        code, message = ending(daemon, admin, "who")
        pid, age = message.split()
        runs.append(int(pid))
        assert code == 200 and not (thread and float(age) > 1), message
        server = server_of(daemon)
        if thread:
            pass_time(1.5)
        else:
            unused = spare_of(server, *runs)
    daemon.signal(signal.SIGHUP)  # imports it anew
    wait_until(lambda: not alive(server), what="the end of the server")
    if not thread:
        wait_until(lambda: not alive(unused), what="the end of the spare")
    assert ending(daemon, admin, "who")[0] == 200
    assert daemon.stop() == 0
    told = list(map(int, ends.read_text().split()))
    assert set(runs) <= set(told) and (thread or unused not in told)


def test_a_process_that_waits_for_a_run_does_not_wait_long(executor, admin, tmp_path):
    """Then ps would show a job as much older than its run."""
    daemon = executor(entry_points(tmp_path / "source", WHO, "who"), admin=admin)
    first = int(ending(daemon, admin, "who")[1])
    server = server_of(daemon)
    spare = spare_of(server, first)
    limit = xxl_executor.SPARE_TIME + 10
    wait_until(lambda: xxl_executor.process_stat(spare) is None, limit, "its end")
    code, pid = ending(daemon, admin, "who")
    assert code == 200 and int(pid) != spare


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_every_run_may_use_all_cores(executor, admin, tmp_path):
    """The threads of the daemon share one; what they start inherits where it may run."""
    source = "import os, time\ndef main():\n    time.sleep(0.2)\n    return sorted(os.sched_getaffinity(0))\n"
    jobs = {
        name: {"python": "cores:main", "pythonpath": [str(tmp_path)], "isolation": name}
        for name in ("thread", "process")
    }
    (tmp_path / "cores.py").write_text(source)
    jobs["command"] = {"command": [sys.executable, str(tmp_path / "cores.py")]}
    (tmp_path / "cores.py").write_text(source + "if __name__ == '__main__':\n    print(main())\n")
    daemon = executor(jobs, admin=admin)
    ids = [
        admin.trigger(daemon.url, name, jobId=job_id)[0]
        for job_id, name in enumerate(sorted(jobs) * 8)  # at once: more threads than one start them
    ]
    shown = {result_of(admin, log_id)["handleMsg"] for log_id in ids}
    assert shown == {str(sorted(os.sched_getaffinity(0)))}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_cores_that_an_operator_takes_away_are_not_used(executor, admin):
    """taskset -p while the executor runs: what it starts from then on obeys."""
    command = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    daemon = executor({"shows": {"command": command}}, admin=admin)
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(daemon.process.pid, {core})
    assert ending(daemon, admin, "shows") == (200, f"[{core}]")
