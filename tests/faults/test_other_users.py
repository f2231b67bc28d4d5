"""Jobs of another user under a daemon that is root: what they forge, plant, replace and look for
touches neither the daemon nor other jobs; and where Python jobs and their server may slip."""

import contextlib
import json
import os
import pwd
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import alive, result_of, run_job, wait_until
from tools import forget_peak, need_root, rss, run_processes

import xxl_executor

MIB = 1 << 20
NOBODY = "nobody"


@pytest.fixture
def place():
    """A directory that every user may enter (pytest's own is closed to others), with `temporary`
    for the daemon and `shared`, which belongs to nobody."""
    need_root()
    directory = Path(tempfile.mkdtemp(prefix="xxl-executor-test-"))
    directory.chmod(0o755)
    for name, mode in (("temporary", 0o1777), ("shared", 0o755), ("source", 0o755)):
        (directory / name).mkdir()
        (directory / name).chmod(mode)
    os.chown(directory / "shared", pwd.getpwnam(NOBODY).pw_uid, -1)
    yield directory
    # Not shutil.rmtree, which calls itself for each level and cannot remove deep directories.
    subprocess.run(["rm", "-rf", str(directory)], check=True, timeout=60)


@pytest.fixture
def start(place, admin, executor):
    """A factory: start(jobs, directory=name, temporary=name, ...), a daemon within `place`."""

    def begin(jobs, *, directory="daemon", temporary="temporary", **options):
        env = {"TMPDIR": str(place / temporary), **options.pop("env", {})}
        return executor(jobs, admin=admin, directory=place / directory, env=env, **options)

    return begin


def python_job(place, name, source, function="main", **options):
    """A Python process job of nobody: `function` of a module `name` with this source."""
    (place / "source" / f"{name}.py").write_text(source, encoding="utf-8")
    return {
        "python": f"{name}:{function}",
        "pythonpath": [str(place / "source")],
        "user": NOBODY,
        **options,
    }


THIEF = """
import os, time

def main():
    mine = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
    for _ in range(40):
        os.write(1, b"x")
        time.sleep(0.005)
        try:
            os.read(mine, 65536)
        except BlockingIOError:
            pass
    time.sleep(600)
"""


def test_who_takes_back_his_output_holds_nobody(start, admin, place):
    """The pipe is the job's, so it may read it: the executor, which saw that there is something,
    must not wait for what is not there any more."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    late = ["strace", "-D", "-f", "-qq", "-o", str(place / "calls"), "-e", "trace=poll"]
    daemon = start(
        {"thief": python_job(place, "thief", THIEF, timeout="1s", kill_grace="0.2s")},
        prefix=[*late, "-e", "inject=poll:delay_exit=10000"],
    )
    for number in range(3):
        _, reply = admin.trigger(daemon.url, "thief", jobId=number, logId=number + 1)
        assert reply["code"] == 200
    for number in range(3):
        item = result_of(admin, number + 1, 10)
        assert (item["handleCode"], item["handleMsg"]) == (502, "timed out after 1 s")


def ending(daemon, admin, handler, **fields):
    """Run a job; returns (code, message)."""
    _, result = run_job(daemon, admin, handler, **fields)
    return result["code"], result["handleMsg"]


def said(daemon, admin, log_id, word):
    """Wait until run `log_id` has printed `word`, or has ended."""

    def found():
        with contextlib.suppress(StopIteration):
            return log_id in admin.results or word in daemon.log_text(log_id)

    wait_until(found, 20, f"{word!r} in the log of run {log_id}")


def nothing_runs(daemon):
    wait_until(lambda: not run_processes(daemon), 5, "the end of every process of a run")


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def can_trace():
    return (
        shutil.which("strace") is not None
        and subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode
        == 0
    )


NEEDS_STRACE = pytest.mark.skipif(not can_trace(), reason="needs strace, and that it may trace")


def tracer_of(pid):
    return int(re.search(r"TracerPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def server_of(daemon):
    """The pid of the daemon's Python server, when no job runs."""
    nothing_runs(daemon)
    [server] = [
        pid for pid in daemon.family() if xxl_executor.process_stat(pid)[1] == daemon.process.pid
    ]
    return server


@contextlib.contextmanager
def slowed(pid, calls, milliseconds, *options):
    """Inside, process `pid` waits before each of these system calls, with -f also what it forks."""
    tracer = subprocess.Popen(
        ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e"]
        + [f"inject={calls}:delay_enter={milliseconds * 1000}", *options, "-p", str(pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(
            lambda: tracer_of(pid) == tracer.pid or tracer.poll() is not None, 20, "the tracer"
        )
        assert tracer.poll() is None
        yield
    finally:
        tracer.terminate()  # detaches
        tracer.wait(20)


# -- reports that a job forges

FORGER = """
import json, os, subprocess, threading, time

def channels():
    # Every pipe and socket that this process holds, but for its output.
    output = os.fstat(1).st_ino
    for name in os.listdir("/proc/self/fd"):
        try:
            target, number = os.readlink(f"/proc/self/fd/{name}"), os.fstat(int(name)).st_ino
        except OSError:
            continue
        if target.startswith(("pipe:", "socket:")) and number != output:
            yield int(name)

def forge(data):
    for fd in channels():
        try:
            os.write(fd, data)
        except OSError:
            pass

def main(context):
    forged, end = json.loads(context.param)
    print("process", os.getpid(), flush=True)
    forge(forged.encode("latin-1"))
    print("forged", flush=True)
    if end == "leaves":
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        print("process", child.pid, flush=True)
    print("the truth")
    if end in ("returns", "leaves"):
        return "the truth"
    if end == "raises":
        raise ValueError("the truth")
    if end == "exits":
        os._exit(3)
    if end == "says a lot":
        return "x" * 20_000 + "the truth"
    threading.Event().wait(60)

def flood(context):
    piece = json.loads(context.param).encode("latin-1") * 1000
    end = time.monotonic() + 10
    moved = [time.monotonic()]

    def write(fd):
        left = 100_000_000
        try:
            while time.monotonic() < end and (left > 0 or context.timeout):
                left -= os.write(fd, piece)
                moved[0] = time.monotonic()
        except OSError:
            pass

    print("process", os.getpid(), flush=True)
    threads = [threading.Thread(target=write, args=(fd,), daemon=True) for fd in channels()]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and time.monotonic() < moved[0] + 0.7:  # else nobody reads it
            thread.join(0.05)
    if context.timeout:
        threading.Event().wait(20)
    os._exit(0)

def at_once(context):
    print("process", os.getpid(), flush=True)
    threading.Event().wait(60)
"""
FORGED = {
    "another pid": '{"pid": STRANGER}\n{"pid": STRANGER, "message": "forged"}\n',
    "success": '{"status": 0}\n',
    "failure": '{"status": 7}\n',
    "garbage": 'garbage\n{"pid": \n[]\n7\nnull\n"text"\n\xff\xfe\0\n{"pid": "x"}\n{"status": "x"}\n'
    '{"status": 1e999}\n{"status": []}\n{"message": 7}\n' + "[" * 2000 + "\n\n"
    '{"message": "' + "x" * 30_000,  # a line without an end
}
ENDS = {  # how the run ends: its code, the end of its message
    "times out": (502, "timed out after 1 s"),
    "is killed": (500, "killed by the admin"),
    "returns": (200, "the truth"),
    "leaves": (200, "the truth"),
    "says a lot": (200, "the truth"),
    "raises": (500, "ValueError: the truth"),
    "exits": (500, ""),
}


def processes(daemon, log_id):
    """What a run says that it has started."""
    return [int(pid) for pid in re.findall(r"^process (\d+)$", daemon.log_text(log_id), re.M)]


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_forged_report_is_not_believed(start, place, admin, forged):
    """Whatever a Python job writes into the descriptors that it holds, its result is the true one,
    nothing of it outlives its end, and no stranger is signalled in its place: a daemon that is root
    must not be told by the job which process that is."""
    daemon = start({"job": python_job(place, "forger", FORGER, kill_grace="0.3s")})
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        ids = {
            end: admin.trigger(
                daemon.url,
                "job",
                jobId=number,
                executorTimeout=1 if end == "times out" else 0,
                executorParams=json.dumps([forged.replace("STRANGER", str(stranger.pid)), end]),
            )[0]
            for number, end in enumerate(ENDS, 1)
        }
        said(daemon, admin, ids["is killed"], "forged")
        daemon.post("/kill", {"jobId": list(ENDS).index("is killed") + 1})
        results = {end: result_of(admin, log_id) for end, log_id in ids.items()}
        assert stranger.poll() is None, "somebody else's process was ended"
        found = {
            end: (result["code"], result["handleMsg"][-len(ENDS[end][1]) :] if ENDS[end][1] else "")
            for end, result in results.items()
        }
        assert found == ENDS
        assert max(len(result["handleMsg"]) for result in results.values()) <= 15_000
        nothing_runs(daemon)
        started = {end: processes(daemon, log_id) for end, log_id in ids.items()}
        assert len(started["leaves"]) == 2
        assert not [pid for pids in started.values() for pid in pids if alive(pid)]
        assert stranger.poll() is None, "somebody else's process was ended"
    finally:
        stranger.kill()
        stranger.wait()


@NEEDS_STRACE
def test_garbage_before_the_first_report_makes_no_survivor(start, place, admin):
    """A job that writes before the server has told its pid is known all the same, and is ended when
    its time is up."""
    source = f"{FORGER}\nforge(b'garbage\\n[]\\n\\xff')\n"
    daemon = start(
        {
            "job": python_job(place, "early", source, "at_once", kill_grace="0.3s"),
            "warm": python_job(place, "warm", "def main():\n    return 'warm'\n"),
        }
    )
    assert ending(daemon, admin, "warm", jobId=2) == (200, "warm")
    with slowed(server_of(daemon), "write,writev,sendto,sendmsg", 300):
        log_id, result = run_job(daemon, admin, "job", executorTimeout=2)
        nothing_runs(daemon)
    assert (result["code"], result["handleMsg"]) == (502, "timed out after 2 s")
    assert len(processes(daemon, log_id)) == 1
    assert not any(map(alive, processes(daemon, log_id)))
    assert ending(daemon, admin, "warm", jobId=2) == (200, "warm")


FLOODS = {
    "one line": "x" * 64,
    "lines": '{"message": "' + "x" * 48 + '"}\n\n',
}


@pytest.mark.parametrize("piece", FLOODS.values(), ids=FLOODS)
def test_a_flood_of_reports_takes_no_memory(start, place, admin, piece):
    """Some 100 MB where a report of a few bytes belongs: the daemon grows by less than 32 MiB, a
    run that ends has its own exit status, and one that goes on is ended by its timeout."""
    daemon = start(
        {
            "job": python_job(place, "forger", FORGER, "flood", kill_grace="0.3s"),
            "fine": python_job(place, "fine", "def main():\n    return 'fine'\n"),
        }
    )
    assert ending(daemon, admin, "fine", jobId=2) == (200, "fine")
    forget_peak(daemon.process.pid)
    before = rss(daemon.process.pid)
    for timeout, code in ((0, 200), (1, 502)):
        log_id, result = run_job(
            daemon, admin, "job", executorParams=json.dumps(piece), executorTimeout=timeout
        )
        grown = rss(daemon.process.pid, "VmHWM") - before
        assert grown < 32 * MIB, f"the daemon grew by {grown / MIB:.1f} MiB"
        assert result["code"] == code and len(result["handleMsg"]) <= 15_000
        nothing_runs(daemon)
        assert not any(map(alive, processes(daemon, log_id)))
    assert ending(daemon, admin, "fine", jobId=2) == (200, "fine")


# -- result files

DEEP = """
import os

def main(context):
    file = os.environ["XXL_JOB_RESULT_FILE"]
    try:
        if os.path.exists(file):
            os.unlink(file)
        os.mkdir(file)
        os.chdir(file)
        for _ in range(1500):
            os.mkdir("n" * 100)
            os.chdir("n" * 100)
    except OSError as error:
        print(error)
    print("tried", flush=True)
    if context.param == "wait":
        os.execvp("sleep", ["sleep", "60"])
    os._exit(int(context.param))
"""
DEEP_SHELL = (
    'rm -rf "$XXL_JOB_RESULT_FILE"\n'
    "mkdir -p \"$XXL_JOB_RESULT_FILE/$(printf 'd/%.0s' $(seq 1500))\"\n"
    'echo tried; [ "$1" = wait ] && exec sleep 60; exit "$1"'
)


@pytest.mark.parametrize(("kind", "user"), [("shell", NOBODY), ("python", None)])
def test_a_deep_directory_in_place_of_the_result_file(start, place, admin, kind, user):
    """1,500 directories in each other fail neither the run that made them nor a start of the
    daemon, after a crash or not: what cleans up may find anything there."""
    job = python_job(place, "deep", DEEP) if kind == "python" else {"shell": DEEP_SHELL}
    job["user"] = user
    daemon = start({"deep": job, "fine": {"shell": "echo fine"}})
    assert ending(daemon, admin, "deep", executorParams="3") == (500, "exit status 3: tried")
    assert daemon.stop() == 0
    daemon.start()
    assert ending(daemon, admin, "fine") == (200, "fine")
    log_id, _ = admin.trigger(daemon.url, "deep", executorParams="wait")
    said(daemon, admin, log_id, "tried")
    daemon.kill()
    daemon.start()
    unknown = "executor restarted while the job ran, its outcome is unknown"
    assert result_of(admin, log_id)["handleMsg"] == unknown
    assert ending(daemon, admin, "fine") == (200, "fine")
    nothing_runs(daemon)


REPLACED = {
    "moved": 'mv -f secret "$F"',
    "a hard link": 'ln -f secret "$F"',
    "a symlink": 'ln -sfn "$PWD/secret" "$F"',
    "a FIFO": 'rm -f "$F" && mkfifo "$F"',
    "a directory": 'rm -f "$F" && mkdir "$F" && mv secret "$F"',
    "moved into another directory": 'mv "$D" "$PWD/away" && mkdir "$D" && mv secret "$F"',
    "moved behind a symlink": 'mv "$D" "$PWD/away" && mkdir in && mv secret "in/$B" && '
    'ln -s "$PWD/in" "$D"',
}


def test_a_file_of_root_is_not_read_as_a_result(start, place, admin):
    """A job that may move or link a file of root to the place of its result learns nothing of what
    is in it: the daemon could read it, but takes only what the job itself could."""
    secret, found = secrets.token_hex(16), {}
    script = (
        'F=$XXL_JOB_RESULT_FILE; D=$(dirname "$F"); B=$(basename "$F"); eval "$1" 2>/dev/null\n'
        'echo output; exit "$XXL_JOB_ID"'
    )
    daemon = start({"job": {"shell": script, "user": NOBODY, "cwd": str(place / "shared")}})
    for name, action in REPLACED.items():
        for status in (0, 3):
            subprocess.run(
                ["rm", "-rf", place / "shared" / "away", place / "shared" / "in"], check=True
            )
            file = place / "shared" / "secret"
            file.touch(0o600)
            file.chmod(0o600)
            file.write_text(secret)
            found[name, status] = ending(daemon, admin, "job", jobId=status, executorParams=action)
    assert found == {
        (name, status): (500, "exit status 3: output") if status else (200, "output")
        for name in REPLACED
        for status in (0, 3)
    }
    assert daemon.stop() == 0
    assert secret not in daemon.log
    assert os.listdir(place / "temporary") == []


def test_a_result_file_that_has_another_name_is_not_read(start, place, admin):
    """What is known under two names may be what somebody else wrote: the result of a job of another
    user is the last line of its output then, as without a file."""
    script = (
        'F=$XXL_JOB_RESULT_FILE; echo told > "$F"; [ "$1" = alone ] || ln "$F" "link-$1"\n'
        'echo output; [ "$1" = alone ] || [ -e "link-$1" ] && exit "$XXL_JOB_ID"'
    )
    daemon = start({"job": {"shell": script, "user": NOBODY, "cwd": str(place / "shared")}})
    found = {
        (name, status): ending(daemon, admin, "job", jobId=status, executorParams=name)
        for name, status in (("alone", 0), ("a", 0), ("b", 3))
    }
    assert found == {
        ("alone", 0): (200, "told"),
        ("a", 0): (200, "output"),
        ("b", 3): (500, "exit status 3: output"),
    }


PLANTED = {
    "file": 'echo forged > "$next"',
    "closed file": 'echo forged > "$next"; chmod 0 "$next"',
    "directory": 'mkdir "$next"',
    "symlink": 'ln -s /etc/passwd "$next"',
    "symlink to nothing": 'ln -s "$PWD/nowhere" "$next"',
    "FIFO": 'mkfifo "$next"',
}
ATTACK = r"""
ahead=0
while [ $ahead -lt "$1" ]; do
    ahead=$((ahead + 1))
    next=$(echo "$XXL_JOB_RESULT_FILE" | sed "s/$XXL_JOB_LOG_ID/$((XXL_JOB_LOG_ID + ahead))/g")
    [ "$next" = "$XXL_JOB_RESULT_FILE" ] && continue
    mkdir -p "$(dirname "$next")"
    case $((ahead % 6)) in
CASES
    esac
    echo "planted $next"
done 2>/dev/null
echo attacked
"""


def test_names_of_result_files_cannot_be_taken_in_advance(start, place, admin):
    """A job that knows the name of its own result file and creates those of the next runs holds
    none of them up, whoever they belong to: each has its own message."""
    cases = "\n".join(f"    {number}) {act};;" for number, act in enumerate(PLANTED.values()))
    speak = 'echo "by $(id -un)" > "$XXL_JOB_RESULT_FILE"; echo output'
    source = (
        "import os\ndef main():\n    with open(os.environ['XXL_JOB_RESULT_FILE'], 'w') as file:\n"
        "        file.write('by python')\n"
    )
    daemon = start(
        {
            "attack": {
                "shell": ATTACK.replace("CASES", cases),
                "user": NOBODY,
                "cwd": str(place / "shared"),
            },
            "nobody": {"shell": speak, "user": NOBODY},
            "python": python_job(place, "speaks", source),
            "daemon": {"shell": speak, "user": "daemon"},
            "root": {"shell": speak},
        }
    )
    first, runs = 7_000_000_000_001, {}
    for handler in ("nobody", "python", "daemon", "root"):
        for kind in PLANTED:
            runs[handler, kind] = first + len(runs) + 1
    count = str(len(runs))
    assert ending(daemon, admin, "attack", logId=first, executorParams=count) == (200, "attacked")
    for (handler, _), log_id in runs.items():
        admin.trigger(daemon.url, handler, logId=log_id, jobId=log_id - first + 1)
    found = {run: result_of(admin, log_id) for run, log_id in runs.items()}
    assert {run: (result["code"], result["handleMsg"]) for run, result in found.items()} == {
        run: (200, f"by {run[0]}") for run in runs
    }
    planted = re.findall(r"^planted (.+)$", daemon.log_text(first), re.M)
    assert daemon.stop() == 0
    temporary = place / "temporary"
    there = {
        Path(path).relative_to(temporary).parts[0] for path in planted if str(temporary) in path
    }
    assert set(os.listdir(temporary)) <= there


@pytest.mark.parametrize("user", [None, NOBODY])
def test_the_result_file_of_an_interrupted_start_under_an_odd_directory(start, place, admin, user):
    """In a directory whose name reads as a pattern, too, a crash leaves no message for the next
    start of the run."""
    (place / "odd[1]").mkdir()
    (place / "odd[1]").chmod(0o1777)
    script = (
        "[ -e started ] && { echo fresh; exit 0; }; "
        'echo stale > "$XXL_JOB_RESULT_FILE"; echo > started; sleep 60'
    )
    job = {"shell": script, "on_crash": "rerun", "cwd": str(place / "shared"), "user": user}
    daemon = start({"job": job}, directory="data[a-z]*", temporary="odd[1]")
    log_id, _ = admin.trigger(daemon.url, "job")
    wait_until((place / "shared" / "started").exists)
    daemon.kill()
    daemon.start()
    result = result_of(admin, log_id)
    assert (result["code"], result["handleMsg"]) == (200, "fresh")
    assert daemon.stop() == 0
    assert os.listdir(place / "odd[1]") == []


# -- what a Python job gets from its server

SEARCHER = """
import ctypes, os

def main(context):
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else /proc/self/mem is root's
    mem = os.open("/proc/self/mem", os.O_RDONLY)
    with open("/proc/self/maps") as stream:
        regions = [line.split() for line in stream]
    counts = []
    for pair in context.param.split():
        second, first = (half.encode() for half in pair.split(":"))
        counts.append(0)
        for region in regions:
            if not region[1].startswith("rw"):
                continue
            at, end = (int(address, 16) for address in region[0].split("-"))
            while at < end:
                try:
                    data = os.pread(mem, min(end - at, (1 << 20) + 64), at)
                except OSError:
                    break
                where = data.find(first)
                while where >= 0:
                    # Compared in place: nothing here ever holds the halves side by side.
                    counts[-1] += data.startswith(second, where + len(first))
                    where = data.find(first, where + 1)
                del data
                at += 1 << 20
    return " ".join("found" if count else "-" for count in counts)
"""


def test_the_environment_of_one_python_job_is_in_no_other(start, place, admin):
    """What `env` gives to one Python job is not in the memory of those that start before, while and
    after it runs: all of them come from one server, which must not know it."""
    values = {name: secrets.token_hex(16) for name in ("ended", "running", "own")}
    waits = "import os, time\ndef main():\n    print('runs', flush=True)\n"
    waits += "    while not os.path.exists('go'):\n        time.sleep(0.01)\n"
    ended = python_job(place, "ended", "def main():\n    return 'ended'\n")
    running = python_job(place, "running", waits, cwd=str(place))
    daemon = start(
        {
            "ended": {**ended, "env": {"SECRET": values["ended"]}},
            "running": {**running, "env": {"SECRET": values["running"]}},
            "search": python_job(place, "search", SEARCHER, env={"OWN": values["own"]}),
        }
    )
    halves = " ".join(f"{value[16:]}:{value[:16]}" for value in values.values())

    def search():
        return ending(daemon, admin, "search", jobId=3, executorParams=halves)

    clean = (200, "- - found")
    assert search() == clean, "before any other"
    assert ending(daemon, admin, "ended") == (200, "ended")
    assert search() == clean, "after one has ended"
    log_id, _ = admin.trigger(daemon.url, "running", jobId=2)
    said(daemon, admin, log_id, "runs")
    assert search() == clean, "while one runs"
    (place / "go").touch()
    assert result_of(admin, log_id)["code"] == 200
    assert search() == clean, "after all"


TELLS = """
def main(context):
    with open(context.param, "w") as stream:
        print("told", context.param, file=stream)
"""


def test_another_user_may_open_its_output(start, place, admin):
    """/dev/stdout and /dev/stderr, which scripts name, lead another user to the run's log too."""
    tells = 'echo "told $1" > "$1"'
    jobs = {
        "shell": {"shell": tells, "user": NOBODY},
        "command": {"command": ["sh", "-c", tells, "sh", "{param}"], "user": NOBODY},
        "python": python_job(place, "tells", TELLS),
    }
    daemon, found, expected = start(jobs), {}, {}
    for path in ("/dev/stderr", "/dev/stdout", "/proc/self/fd/2"):
        for kind in jobs:
            log_id, result = run_job(daemon, admin, kind, executorParams=path)
            lines = re.findall(rf"^told {path}$", daemon.log_text(log_id), re.M)
            found[kind, path] = (result["code"], result["handleMsg"], len(lines))
            expected[kind, path] = (200, f"told {path}", 1)
    assert found == expected


@NEEDS_STRACE
def test_a_failed_start_as_another_user_keeps_no_descriptor(start, place, admin):
    """Where files cannot be given to the job's user, each run has a result all the same, and the
    daemon holds nothing of it: else it would run out of descriptors."""
    calls = "fchown,chown,lchown,fchownat"
    prefix = ["strace", "-D", "-f", "-qq", "-o", str(place / "strace.txt"), "-e", f"trace={calls}"]
    daemon = start(
        {"job": {"shell": "true", "user": NOBODY}},
        prefix=[*prefix, "-e", f"inject={calls}:error=EPERM"],
    )
    tracer = tracer_of(daemon.process.pid)
    try:
        codes = {ending(daemon, admin, "job")[0] for _ in range(2)}
        before = descriptors(daemon.process.pid)
        codes |= {ending(daemon, admin, "job")[0] for _ in range(20)}
        assert len(codes) == 1
        wait_until(
            lambda: descriptors(daemon.process.pid) <= before, 5, "the closing of descriptors"
        )
        assert daemon.stop() == 0
        assert os.listdir(place / "temporary") == []
    finally:
        daemon.close()
        wait_until(lambda: not alive(tracer), 10, "the end of strace")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
def test_python_jobs_with_a_safe_path(executor, admin, tmp_path):
    """PYTHONSAFEPATH=1, as hardened hosts set it, takes nothing from Python jobs, though then there
    is no "" in sys.path to begin with."""
    (tmp_path / "own.py").write_text("import colorsys\ndef main():\n    return colorsys.__name__\n")
    daemon = executor(
        {"job": {"python": "own:main", "pythonpath": [str(tmp_path)]}},
        admin=admin,
        env={"PYTHONSAFEPATH": "1"},
    )
    assert [ending(daemon, admin, "job") for _ in range(2)] == [(200, "colorsys")] * 2


@pytest.mark.parametrize("how", ["killed", "covered"])
def test_a_python_job_that_is_ended_as_it_begins(executor, admin, tmp_path, how):
    """In its first milliseconds a forked process may not be known by its marker yet: its SIGTERM
    reaches it all the same, so that it does not run on until its grace is over."""
    (tmp_path / "waits.py").write_text("import time\ndef main():\n    time.sleep(60)\n")
    daemon = executor(
        {
            "waits": {
                "python": "waits:main",
                "pythonpath": [str(tmp_path)],
                "kill_grace": "15s",
            },
            "next": {"shell": "true"},
        },
        admin=admin,
    )

    def end(milliseconds):
        log_id, _ = admin.trigger(daemon.url, "waits")
        threading.Event().wait(milliseconds / 1000)
        if how == "killed":
            assert daemon.post("/kill", {"jobId": 1})["code"] == 200
        else:
            following, _ = admin.trigger(daemon.url, "next", executorBlockStrategy="COVER_EARLY")
            assert result_of(admin, following, 5)["code"] == 200
        assert result_of(admin, log_id, 5)["code"] == 500

    if can_trace():  # a process whose beginning takes longer
        with slowed(server_of(daemon), "close,rt_sigaction", 3, "-f"):
            for number in range(14):
                end(number % 7)
    for number in range(46):
        end(number % 7)
    nothing_runs(daemon)
