"""Section 15: the program as an operator uses it; each test runs it as a subprocess."""

import contextlib
import fcntl
import itertools
import json
import os
import pty
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import urllib.request
import uuid
from pathlib import Path

import pytest
from conftest import PROGRAM, alive, result_of, run_job, wait_until

import xxl_executor

program = PROGRAM  # as a user does
OPEN = (
    "admin.access_token: is empty, and executor.bind {} is open to the network: set a token, bind"
    " to 127.0.0.1, or set executor.allow_no_token: true when a firewall keeps others out\n"
)
OPEN_CHECKED = OPEN.replace(
    "\n",
    "; of a service with LoadCredential=token:FILE, check with CREDENTIALS_DIRECTORY=<the directory"
    " of FILE>\n",
)
COMMANDS = ("run", "check", "demo", "exec", "runs", "logs", "status")
PYTHON_JOBS = """
import sys, threading
def main(context):
    print("hi", context.param, context.shard_index, context.shard_total, context.timeout)
    return "done"
def fail():
    raise ValueError("bad day")
def leave():
    sys.exit(4)
def cooperative(context):
    context.cancelled.wait()
    print("cancelled")
def stuck():
    print("stuck", flush=True)
    threading.Event().wait()
"""
JOBS = """\
admin: {access_token: secret}
executor: {bind: "127.0.0.1:0", data_dir: ./data}
jobs:
  hello: {shell: 'echo "out [$1] [$2] [$3]"; echo err >&2'}
  words: {command: [echo, "{param}", "{shard_index}/{shard_total}"], timeout: 10m, description: 两个词}
  environment: {shell: 'env | grep ^XXL_JOB_ | grep -v -e RESULT_FILE -e TRIGGER_TIME | sort'}
  three: {shell: exit 3}
  signalled: {shell: 'kill -TERM $$'}
  month: {shell: echo long, timeout: 30d}
  slow: {shell: 'echo before; sleep 600', kill_grace: 0.3}
  limited: {shell: sleep 600, timeout: 0.3s, kill_grace: 0.3}
  patient: {shell: 'sleep 600 & echo left', kill_grace: 30d}
  leaves: {shell: 'sleep 600 & setsid sleep 600 & echo left'}
  tree: {shell: 'trap "" TERM; sleep 600 & setsid sleep 600 & echo ready; wait; wait', kill_grace: 0.3}
  py: {python: "mod:main", pythonpath: [.]}
  py-fail: {python: "mod:fail", pythonpath: [.]}
  py-leave: {python: "mod:leave", pythonpath: [.]}
  th: {python: "mod:main", pythonpath: [.], isolation: thread}
  th-fail: {python: "mod:fail", pythonpath: [.], isolation: thread}
  th-cooperative: {python: "mod:cooperative", pythonpath: [.], isolation: thread}
  th-stuck: {python: "mod:stuck", pythonpath: [.], isolation: thread, kill_grace: 0.2}
"""
DEMO = """\
executor: {bind: "127.0.0.1:0", data_dir: /dev/null/none, app_name: shown}
jobs:
  good: {shell: echo fine}
  bad: {shell: 'echo "went wrong"; exit 3'}
  slow: {shell: sleep 600, timeout: 0.4s, kill_grace: 0.3}
  py: {python: "mod:main", pythonpath: [.]}
"""


class Place:
    """A directory with a configuration, and the program run in it; all its processes carry one
    variable."""

    def __init__(self, directory):
        self.directory, self.mark = directory, uuid.uuid4().hex
        self.scratch = directory / "scratch"
        self.scratch.mkdir()
        other = re.compile(
            r"XXL_|JOURNAL_STREAM|CREDENTIALS_DIRECTORY|NO_COLOR|TERM$|COLUMNS|LINES"
        )
        kept = {name: value for name, value in os.environ.items() if not other.match(name)}
        self.env = {
            **kept,
            "XXL_TEST_MARK": self.mark,
            "TMPDIR": str(self.scratch),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def write(self, text, name="config.yaml"):
        (self.directory / name).write_text(text, encoding="utf-8")
        (self.directory / "mod.py").write_text(PYTHON_JOBS, encoding="utf-8")
        return self

    def start(self, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **env):
        command = [sys.executable, "-W", "error", "-X", "dev", str(PROGRAM), *arguments]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            encoding="utf-8",
            cwd=self.directory,
            env={**self.env, **env},
            start_new_session=True,
        )

    def run(self, *arguments, **env):
        """(exit status, stdout, stderr)"""
        with self.ended(self.start(*arguments, **env)) as process:
            out, err = process.communicate(timeout=60)
            return process.returncode, out, err

    @contextlib.contextmanager
    def ended(self, process):
        """`process`, which is killed when the test did not end it."""
        with process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def processes(self):
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                pid, environment = int(directory.name), (directory / "environ").read_bytes()
                if f"XXL_TEST_MARK={self.mark}\0".encode() in environment and alive(pid):
                    found.append(pid)
        return found


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    left = made.processes()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "processes were left behind"
    assert os.listdir(made.scratch) == [], "temporary files were left behind"


# -- usage


def test_version(place):
    assert place.run("--version") == (0, f"xxl-executor {xxl_executor.__version__}\n", "")


def test_help(place):
    status, out, err = place.run("--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: xxl-executor [-h] [-c FILE] [--version] COMMAND ...\n")
    for command in COMMANDS:
        assert re.search(rf"^    {command} +\w", out, re.MULTILINE)
    assert "examples:\n  xxl-executor " in out and out.endswith(
        "exit status: 0 fine, 1 failed, 2 bad usage or configuration\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(place, command):
    status, out, err = place.run(command, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: xxl-executor {command} ")
    example = re.search(r"\nexample:\n  xxl-executor (.+)\n$", out)[1]
    parsed = xxl_executor.parser().parse_args(example.split())
    assert parsed.command == command, "the example is one that works"


@pytest.mark.parametrize(
    "arguments",
    [
        ["zzz"],
        ["--zzz"],
        ["check", "--zzz"],
        ["check", "more"],
        ["exec"],
        ["exec", "a", "b"],
        ["-c"],
        ["demo", "--once=1"],
        ["status", "--once"],
        ["exec", "a", "--shard", "3/3"],
        ["exec", "a", "--shard", "1"],
        ["exec", "a", "--shard", "a/b"],
        ["exec", "a", "--shard=-1/3"],
        ["exec", "a", "--shard", "٠/٣"],
        ["exec", "a", "--timeout", "5x"],
        ["exec", "a", "--timeout=-5"],
        ["exec", "a", "--timeout", ""],
    ],
    ids=" ".join,
)
def test_bad_usage(capsys, arguments):
    """In this process: argparse ends it before anything else begins."""
    with pytest.raises(SystemExit) as caught:
        xxl_executor.main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith("usage: xxl-executor") and "\nxxl-executor" in err


def test_bad_shard_says_what_was_expected(place):
    status, out, err = place.write(JOBS).run("exec", "hello", "--shard", "3/3")
    assert (status, out) == (2, "")
    assert err.endswith(
        "\nxxl-executor exec: error: argument --shard: expected index/total such as 0/3, got"
        ' "3/3"\n'
    )


@pytest.mark.skipif(
    os.path.exists("/etc/xxl-executor/config.yaml"), reason="this host has a configuration"
)
@pytest.mark.parametrize(
    "arguments",
    [[], ["run"], ["check"], ["demo"], ["exec", "a"], ["status"], ["runs"], ["logs", "a"]],
    ids=" ".join,
)
def test_no_configuration(place, arguments):
    looks = arguments[:1] in (["status"], ["runs"], ["logs"])
    assert place.run(*arguments) == (
        2,
        "",
        "no configuration: none of ./config.yaml, /etc/xxl-executor/config.yaml exists: give one"
        " with -c FILE\n"
        + ("This command needs only executor.data_dir: --data-dir DIR\n" if looks else ""),
    )


def test_where_the_configuration_is_taken_from(place):
    place.write("jobs: {here: {shell: x}}\nexecutor: {bind: '127.0.0.1:0'}\n")
    place.write("jobs: {other: {shell: x}}\nexecutor: {bind: '127.0.0.1:0'}\n", "other.yaml")
    assert "\nhere " in place.run("check")[1]
    assert "\nother " in place.run("check", XXL_EXECUTOR_CONFIG="other.yaml")[1]
    places = (
        ("-c", "config.yaml", "check"),
        ("check", "-c", "config.yaml"),
        ("check", "--config=config.yaml"),
    )
    for arguments in places:
        assert "\nhere " in place.run(*arguments, XXL_EXECUTOR_CONFIG="other.yaml")[1]


# -- check


def test_check(place):
    place.write("""\
executor: {bind: "127.0.0.1:9999"}
include: [none*.yaml]
jobs:
  hello: {shell: "echo hello\\n  echo again"}
  cleanup: {command: [find, /var/tmp/a b], timeout: 10m, description: Removes old files}
  report: {python: "reports:main", timeout: 90}
  ticker: {python: "ticks:main", isolation: thread, description: 滴答}
  短: {shell: x, timeout: 2h}
""")
    assert place.run("check") == (
        0,
        """\
JOB      KIND              TIMEOUT  DESCRIPTION
hello    shell             -        echo hello echo again
cleanup  command           10m      Removes old files
report   python (process)  90 s     reports:main
ticker   python (thread)   -        滴答
短       shell             2h       x

./config.yaml has no mistakes, but 2 warnings: 5 jobs
""",
        "".join(
            f"warning: ./config.yaml:{line}: jobs.{job}.python: there is no module {module} in"
            " pythonpath, cwd or the interpreter's own path\n"
            for line, job, module in ((6, "report", "reports"), (7, "ticker", "ticks"))
        ),
    )
    assert sorted(os.listdir(place.directory)) == [
        "config.yaml",
        "mod.py",
        "scratch",
    ], "check makes nothing"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_takes_no_configuration_of_somebody_else_unasked(place):
    file = place.write(JOBS).directory / "config.yaml"
    os.chown(file, 65534, 65534)
    told = (
        f"./config.yaml: others than root can change {file}, and so what root runs: if that is"
        " meant, name it with -c ./config.yaml\n"
    )
    for command in ("check", "demo", "run", "exec"):
        assert place.run(command, *(["hello"] if command == "exec" else [])) == (2, "", told)
    assert place.run("-c", "config.yaml", "check")[0] == 0


def test_check_leaves_a_running_executor_alone(executor, place):
    """It asks nobody and opens nothing of the data_dir: an audit hook in the program sees both."""
    daemon = executor({"hello": {"shell": "echo hello"}})
    daemon.file.write_text(daemon.file.read_text().replace("hello", "other"))
    daemon.status()  # by now the lock is written
    # The journal is written once more by itself soon after the start.
    before = {
        file: file.stat().st_mtime_ns
        for file in daemon.data.rglob("*")
        if not file.name.startswith("journal.db")
    }
    hook = place.directory / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\ndef seen(event, arguments):\n    if event.startswith('socket.') or event in"
        f" ('open', 'os.listdir') and str(arguments[0]).startswith({str(daemon.data)!r}):\n       "
        " print('SEEN', event, arguments)\nsys.addaudithook(seen)\n"
    )
    status, out, err = place.run("-c", str(daemon.file), "check", PYTHONPATH=str(hook))
    assert (status, err) == (0, "") and "\nother " in out and "SEEN" not in out
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert daemon.status()["jobs"] == ["hello"]
    assert "SEEN socket" in place.run("-c", str(daemon.file), "status", PYTHONPATH=str(hook))[1], (
        "the hook sees"
    )


@pytest.mark.parametrize(
    "arguments", [["check"], ["run"], [], ["demo"], ["exec", "hello"]], ids=" ".join
)
def test_broken_configuration(place, arguments):
    place.write(
        "executor:\n  bind: 0.0.0.0:9999\n  max_running: 0\njobs:\n  hello:\n    timout: 5\n"
        "    shell: x\n  good: {shell: x}\n"
    )
    status, out, err = place.run("-c", "config.yaml", *arguments)
    problems = """\
config.yaml:3: executor.max_running: expected a whole number from 1 to 1024, got the number 0
config.yaml:6: jobs.hello.timout: unknown key, did you mean "timeout"?
"""
    if arguments == ["check"]:  # it shows the jobs, and whatever else is wrong
        assert out == "JOB   KIND   TIMEOUT  DESCRIPTION\ngood  shell  -        x\n"
        problems += f"config.yaml:2: {OPEN_CHECKED.format('0.0.0.0')}"
    assert (status, err) == (2, problems) and (out == "" or arguments == ["check"])


@pytest.mark.parametrize("arguments", [["check"], ["--help"], ["check", "--help"]], ids=" ".join)
def test_broken_pipe(place, arguments):
    """`check | head -0`: the reader has gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    with place.ended(place.write(JOBS).start(*arguments, stdout=write)) as process:
        os.close(write)
        _, err = process.communicate(timeout=60)
    assert not re.search("Traceback|Exception|Error", err), err


# -- what may not start


@pytest.mark.parametrize(
    "bind, host, arguments",
    [
        ("0.0.0.0:0", "0.0.0.0", "run"),
        ("0.0.0.0:0", "0.0.0.0", ""),
        ("0.0.0.0:0", "0.0.0.0", "check"),
        ("'[::]:0'", "::", "check"),
        ("':0'", "0.0.0.0", "check"),
        ("10.1.2.3:0", "10.1.2.3", "check"),
        # These only begin as a loopback address does.
        ("'[::1:2]:0'", "::1:2", "check"),
        ("localhost.example:0", "localhost.example", "check"),
        ("127.example:0", "127.example", "check"),
    ],
)
def test_unsafe_start_is_refused(place, bind, host, arguments):
    place.write(f"executor: {{bind: {bind}}}\njobs: {{hello: {{shell: x}}}}\n")
    status, out, err = place.run("-c", "config.yaml", *arguments.split())
    told = OPEN_CHECKED if arguments == "check" else OPEN
    assert (status, err) == (2, f"config.yaml:1: {told.format(host)}")
    assert out.startswith("JOB ") if arguments == "check" else out == ""
    assert not (place.directory / "data").exists()


@pytest.mark.parametrize(
    "options",
    [
        "executor: {bind: '127.0.0.1:1'}",
        "executor: {bind: '127.9.9.9:1'}",
        "executor: {bind: 'localhost:1'}",
        "executor: {bind: '[::1]:1'}",
        "executor: {bind: '0.0.0.0:1', allow_no_token: true}",
        "admin: {access_token: x}",
    ],
)
def test_safe_start_is_not_refused(place, options):
    status, _, err = place.write(options + "\njobs: {hello: {shell: x}}\n").run("check")
    assert (status, err) == (0, "")


def test_check_of_a_service_that_systemd_gives_its_token(place):
    """In a shell there is no CREDENTIALS_DIRECTORY: what is said names the way to check all the
    same, which then works; and it is not said where the variable is set already."""
    place.write("executor: {bind: '0.0.0.0:0'}\njobs: {hello: {shell: x}}\n")
    assert place.run("check")[::2] == (2, f"./config.yaml:1: {OPEN_CHECKED.format('0.0.0.0')}")
    credentials = place.directory / "credentials"
    credentials.mkdir()
    status, _, err = place.run("check", CREDENTIALS_DIRECTORY=str(credentials))
    assert (status, err) == (2, f"./config.yaml:1: {OPEN.format('0.0.0.0')}"), "it holds no token"
    (credentials / "token").write_text("s3cret\n")
    assert place.run("check", CREDENTIALS_DIRECTORY=str(credentials))[::2] == (0, "")


def test_a_token_of_systemd_that_cannot_be_read_is_no_missing_one(place):
    """A start without a token would let everybody on this host in."""
    place.write("executor: {bind: '127.0.0.1:0'}\njobs: {hello: {shell: x}}\n")
    assert place.run("check", CREDENTIALS_DIRECTORY=str(place.directory))[::2] == (0, "")
    (place.directory / "token").symlink_to("token")
    status, _, err = place.run("check", CREDENTIALS_DIRECTORY=str(place.directory))
    assert status == 2 and "Too many levels of symbolic links" in err


def test_default_token_is_warned_of(executor, loopback, place):
    text = (
        "ACCESS TOKEN IS default_token, which every attacker tries first: set another"
        " xxl.job.accessToken in the admin and admin.access_token here"
    )
    daemon = executor({}, admin=loopback(token="default_token"))
    assert re.search(rf"^\S+ \S+ WARNING {re.escape(text)}$", daemon.log, re.MULTILINE)
    place.write("admin: {access_token: default_token}\njobs: {hello: {shell: x}}\n")
    status, _, err = place.run("check", JOURNAL_STREAM="8:1")
    assert (status, err) == (
        0,
        f"<4>{text}\n",
    ), "under systemd with a priority and without the time"


def test_a_second_daemon_is_refused(executor, place):
    first = executor({})
    place.write(f"executor: {{bind: '127.0.0.1:0', data_dir: {first.data}}}\n")
    for arguments in ([], ["run"]):
        assert place.run(*arguments) == (
            1,
            "",
            (
                f"xxl-executor: executor.data_dir: {first.data} is in use by another executor (pid"
                f" {first.process.pid}): stop it, or give this one a data_dir of its own\n"
            ),
        )
    assert first.status()["pid"] == first.process.pid, "the first one goes on"
    assert first.stop() == 0
    second = executor({}, executor={"data_dir": str(first.data)}, start=False)
    second.data = first.data
    second.start()
    assert second.status()["pid"] == second.process.pid


def test_a_port_in_use_is_refused(place):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place.write(f"executor: {{bind: '127.0.0.1:{port}'}}\n")
        assert place.run() == (
            1,
            "",
            (
                f"xxl-executor: executor.bind: cannot listen on 127.0.0.1:{port}: Address already"
                " in use: stop what listens there (ss -ltnp), or choose a free port of this"
                " host\n"
            ),
        )


@pytest.mark.parametrize(
    "data_dir, reason",
    [
        ("file", "{}/file: File exists"),
        ("file/data", "{}/file/data: Not a directory"),
        pytest.param(
            "closed/data",
            "{}/closed/data: Permission denied",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write"),
        ),
    ],
)
def test_data_dir_that_cannot_be_used(place, data_dir, reason):
    (place.directory / "file").touch()
    (place.directory / "closed").mkdir(0o500)
    place.write(f"executor: {{bind: '127.0.0.1:0', data_dir: {data_dir}}}\n")
    assert place.run() == (
        1,
        "",
        (
            f"xxl-executor: executor.data_dir: {reason.format(place.directory)}: choose a directory"
            " with space that this user may write\n"
        ),
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_is_the_default_and_ends_on_a_signal(place, number):
    place.write("executor: {bind: '127.0.0.1:0'}\njobs: {py: {python: 'mod:main'}}\n")
    with place.ended(place.start(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)) as process:
        for line in process.stdout:
            if " listening on 127.0.0.1:" in line:
                break
        os.killpg(process.pid, number)  # as Ctrl-C does: the Python server gets it too
        rest = process.stdout.read()
        assert process.wait(30) == 0
    assert not re.search("Traceback|KeyboardInterrupt", rest), rest


# -- exec


def notes(err):
    """The notes on stderr without what differs from run to run."""
    return re.sub(
        r"pid=\d+|after [\d.e-]+ s(?=: code)",
        lambda found: found[0].split("=")[0].split(" ")[0],
        err,
    )


@pytest.mark.parametrize(
    "arguments, status, out, first, last",
    [
        (
            ["hello"],
            0,
            "out [] [0] [1]\nerr\n",
            'shard=0/1 timeout=none pid param=""',
            "succeeded after: code 200, err",
        ),
        (
            ["hello", "--param", "a b", "--shard", "1/3", "--timeout", "5m"],
            0,
            "out [a b] [1] [3]\nerr\n",
            'shard=1/3 timeout=5m pid param="a b"',
            "succeeded after: code 200, err",
        ),
        (
            ["words", "--param=参数", "--timeout", "0"],
            0,
            "参数 0/1\n",
            'shard=0/1 timeout=10m pid param="参数"',
            "succeeded after: code 200, 参数 0/1",
        ),
        (
            ["words", "--timeout", "1h"],
            0,
            " 0/1\n",
            'shard=0/1 timeout=10m pid param=""',
            "succeeded after: code 200, 0/1",
        ),
        (
            ["three"],
            3,
            "",
            'shard=0/1 timeout=none pid param=""',
            "failed after: code 500, exit status 3",
        ),
        (
            ["signalled"],
            143,
            "",
            'shard=0/1 timeout=none pid param=""',
            "failed after: code 500, killed by signal 15",
        ),
        (
            ["month"],
            0,
            "long\n",
            'shard=0/1 timeout=720h pid param=""',
            "succeeded after: code 200, long",
        ),
        (
            ["slow", "--timeout", "0.3"],
            124,
            "before\n",
            'shard=0/1 timeout=0.3 s pid param=""',
            "failed after: code 502, timed out after 0.3 s",
        ),
        (
            ["limited", "--timeout", "1h"],
            124,
            "",
            'shard=0/1 timeout=0.3 s pid param=""',
            "failed after: code 502, timed out after 0.3 s",
        ),
        (
            ["patient"],
            0,
            "left\n",
            'shard=0/1 timeout=none pid param=""',
            "succeeded after: code 200, left",
        ),
        (
            ["leaves"],
            0,
            "left\n",
            'shard=0/1 timeout=none pid param=""',
            "succeeded after: code 200, left",
        ),
        (
            ["py", "--param", "p", "--shard", "1/3", "--timeout", "9"],
            0,
            "hi p 1 3 9\n",
            'shard=1/3 timeout=9 s pid param="p"',
            "succeeded after: code 200, done",
        ),
        (
            ["py-leave"],
            4,
            "",
            'shard=0/1 timeout=none pid param=""',
            "failed after: code 500, exit status 4",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_exec(place, arguments, status, out, first, last):
    found, printed, err = place.write(JOBS).run("exec", *arguments)
    assert (found, printed, notes(err)) == (
        status,
        out,
        f"----- {arguments[0]} logId=0 jobId=0 {first} -----\n----- {last} -----\n",
    ), err
    assert sorted(os.listdir(place.directory)) == [
        "config.yaml",
        "mod.py",
        "scratch",
    ], "no journal, no log"


@pytest.mark.parametrize(
    "arguments, status, out, last",
    [
        (
            ["th", "--param", "p", "--shard", "1/3"],
            0,
            "hi p 1 3 0\n",
            "succeeded after: code 200, done",
        ),
        (
            ["th-cooperative", "--timeout", "0.3"],
            124,
            "cancelled\n",
            "failed after: code 502, timed out after 0.3 s",
        ),
        (["th-stuck", "--timeout", "0.3"], 124, "stuck\n", None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_exec_in_a_thread(place, arguments, status, out, last):
    with place.ended(place.write(JOBS).start("exec", *arguments)) as process:
        try:
            printed, err = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            pytest.fail("a thread that does not return holds exec beyond timeout and kill_grace")
    assert (process.returncode, printed) == (status, out)
    assert last is None or notes(err).endswith(f"\n----- {last} -----\n")


@pytest.mark.parametrize("job", ["py-fail", "th-fail"])
def test_exec_of_a_python_job_that_raises(place, job):
    status, out, err = place.write(JOBS).run("exec", job)
    assert status == 1
    assert out.startswith(
        f'Traceback (most recent call last):\n  File "{place.directory}/mod.py", line '
    )
    assert out.endswith("\nValueError: bad day\n") and out.count("  File ") == 1, (
        "only the frames of the job"
    )
    assert notes(err).endswith("\n----- failed after: code 500, ValueError: bad day -----\n")


def test_exec_gives_the_environment(place):
    arguments = ("--param", "a b", "--shard", "1/3", "--timeout", "2m")
    status, out, _ = place.write(JOBS).run(
        "exec", "environment", *arguments, XXL_JOB_ACCESS_TOKEN="secret"
    )
    assert status == 0
    assert (
        out
        == """\
XXL_JOB_HANDLER=environment
XXL_JOB_ID=0
XXL_JOB_LOG_ID=0
XXL_JOB_PARAM=a b
XXL_JOB_SHARD_INDEX=1
XXL_JOB_SHARD_TOTAL=3
XXL_JOB_TIMEOUT=120
"""
    )


def test_a_timeout_is_written_as_in_the_daemon(place, executor, admin):
    """A shell cannot compare 120.0 with -gt: whole seconds are written whole."""
    daemon = executor(
        {
            "t": {"shell": "echo $XXL_JOB_TIMEOUT", "timeout": "2m"},
            "p": {"shell": "echo $XXL_JOB_TIMEOUT", "timeout": "2.5s"},
        },
        admin=admin,
    )
    assert run_job(daemon, admin, "t")[1]["handleMsg"] == "120"
    assert run_job(daemon, admin, "p")[1]["handleMsg"] == "2.5"
    status, out, _ = place.run("-c", str(daemon.file), "exec", "t", "--timeout", "1m")
    assert (status, out) == (0, "60\n")


def test_exec_of_an_unknown_job(place):
    place.write("jobs: {a: {shell: x}, b: {shell: x}}\n")
    assert place.run("-c", "config.yaml", "exec", "c") == (
        2,
        "",
        'config.yaml: there is no job "c": known are a, b\n',
    )
    place.write("jobs: {}\n")
    assert place.run("-c", "config.yaml", "exec", "c") == (
        2,
        "",
        'config.yaml: there is no job "c": known are none\n',
    )


def test_exec_needs_no_data_dir(place):
    place.write("executor: {data_dir: /dev/null/none}\njobs: {a: {shell: echo fine}}\n")
    assert place.run("exec", "a")[:2] == (0, "fine\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_exec_a_signal_ends_the_whole_tree(place, number):
    with place.ended(place.write(JOBS).start("exec", "tree")) as process:
        assert process.stdout.readline() == "ready\n"
        wait_until(
            lambda: len(place.processes()) >= 4, what="the program, the shell and two that sleep"
        )
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 137, "its shell ignores SIGTERM"
    assert (out, notes(err).splitlines()[-1]) == (
        "",
        "----- failed after: code 500, interrupted -----",
    )
    assert not place.processes()


def test_exec_of_a_stuck_thread_ends_on_a_signal(place):
    with place.ended(place.write(JOBS).start("exec", "th-stuck")) as process:
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 1


# -- status


def test_status(executor, loopback, place, tmp_path):
    admin, gate = loopback(token="s3cret"), tmp_path / "gate"
    os.mkfifo(gate)
    jobs = {
        "ok": {"shell": "echo fine"},
        "bad": {"shell": "exit 3"},
        "never": {"shell": "x"},
        "late": {"shell": "sleep 60", "timeout": "0.2s", "kill_grace": "0.2s"},
        "waits": {"shell": f"cat {gate}"},
    }
    daemon = executor(jobs, admin=admin, executor={"app_name": "shown"})
    assert admin.wait(lambda: admin.registry, 10)
    triggers = (("ok", 1), ("bad", 2), ("late", 3), ("ok", 1))
    ran = [run_job(daemon, admin, handler, jobId=job)[0] for handler, job in triggers]
    held = [admin.trigger(daemon.url, "waits", jobId=4)[0] for _ in range(3)]
    token = {"XXL-JOB-ACCESS-TOKEN": "s3cret"}
    wait_until(
        lambda: daemon.status(**token)["running"] and not daemon.status(**token)["undelivered"]
    )

    def status(*arguments):
        status, out, err = place.run("-c", str(daemon.file), "status", *arguments)
        assert (status, err) == (0, "")
        return out

    head, place_line, *table = status().split("\n")
    version, pid = re.escape(xxl_executor.__version__), daemon.process.pid
    assert head == "shown  registered"
    assert re.fullmatch(rf"{daemon.url}/  pid {pid}  up [\d.]+ s  version {version}", place_line)
    text = "\n".join(table)
    at = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(
        rf"""
RUNNING  LOGID +FOR
waits    {held[0]}  [\d.e-]+ s

FAILED  AT +LOGID +MESSAGE
late    {at}  {ran[2]}  timed out after 0.2 s
bad     {at}  {ran[1]}  exit status 3

JOB    LAST RESULTS  RUNNING  WAITING
bad    F             0        0
late   T             0        0
never  -             0        0
ok     ..            0        0
waits  -             1        2

last results, newest on the right: \. succeeded, F failed, T timed out

0 results undelivered
admin {re.escape(admin.url)}: ok, last answer [\d.e-]+ s ago
""",
        text,
    ), text
    found = json.loads(status("--json"))
    wanted = {
        "app": "shown",
        "pid": pid,
        "registered": True,
        "draining": False,
        "undelivered": 0,
        "dead": 0,
    }
    assert {key: found[key] for key in wanted} == wanted
    assert (
        found["recent"]["ok"] == [200, 200]
        and found["recent"]["bad"] == [500]
        and found["recent"]["late"] == [502]
    )
    assert [(run["job"], run["jobId"], run["logId"]) for run in found["running"]] == [
        ("waits", 4, held[0])
    ]
    assert (found["queued"], found["jobs"]) == (
        {"waits": 2},
        ["bad", "late", "never", "ok", "waits"],
    )
    # Another configuration of the same data_dir, with another token and a mistake.
    place.write(f"admin: {{acces_token: x}}\nexecutor: {{data_dir: {daemon.data}}}\n")
    code, out, err = place.run("status")
    assert (code, err) == (0, "") and out.startswith("shown  registered\n")
    for log_id in held:
        gate.write_text("")  # opens when the run reads it
        result_of(admin, log_id)


def test_status_of_an_undelivered_result(executor, place):
    with socket.socket() as closed:  # bound and not listening: every connection is refused
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/admin"
        daemon = executor(
            {"ok": {"shell": "echo fine"}},
            admin_options={"addresses": [url], "timeout": "1s"},
            executor={"drain_timeout": "0"},
        )
        trigger = {
            "jobId": 1,
            "logId": 7,
            "executorHandler": "ok",
            "glueType": "BEAN",
            "logDateTime": 1,
        }
        assert daemon.post("/run", trigger)["code"] == 200
        wait_until(
            lambda: daemon.status()["undelivered"] == 1 and daemon.status()["lastFailedDelivery"]
        )
        status, out, err = place.run("-c", str(daemon.file), "status")
        assert (status, err) == (0, "")
        assert out.split("\n")[0].endswith("  not registered")
        assert re.search(r"^1 result undelivered, the oldest for [\d.e-]+ s$", out, re.MULTILINE)
        assert re.search(
            rf"^last failed delivery: .*{re.escape(url)}.*[Rr]efused", out, re.MULTILINE
        ), out
        assert re.search(
            rf"^admin {re.escape(url)}: FAILING, no answer yet\n  /api/\w+: .*[Rr]efused",
            out,
            re.MULTILINE,
        ), out
        daemon.kill()  # what it has not delivered waits in the journal
    status, out, err = place.run("-c", str(daemon.file), "status")
    assert (status, err) == (1, "") and "\n1 result undelivered\n" in out


@pytest.mark.parametrize("arguments", [["--watch"], ["--watch", "--json"]], ids=" ".join)
def test_status_again_and_again(executor, arguments):
    """What runs is shown anew every second, until Ctrl-C."""
    daemon = executor({"ok": {"shell": "echo fine"}})
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(PROGRAM), "-c", str(daemon.file), "status", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as watching:
        begins = '{"version"' if "--json" in arguments else "xxl-job-executor-sample"
        assert (
            len(
                [
                    line
                    for line in (
                        watching.stdout.readline() for _ in range(40 if begins[0] == "x" else 3)
                    )
                    if line.startswith(begins)
                ]
            )
            >= 3
        )
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=20)
        assert (watching.returncode, err) == (0, "")


# -- demo


def demo_in_a_terminal(place, *arguments, size=(30, 100), **env):
    """(exit status, all that a terminal of `size` gets)"""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    got = []
    env = {"TERM": "xterm", **env}
    with place.ended(place.start("demo", *arguments, stdout=slave, stderr=slave, **env)) as process:
        os.close(slave)
        with contextlib.suppress(OSError):  # EIO: the last one that had it open has gone
            while True:
                data = os.read(master, 65536)
                if not data:
                    break
                got.append(data)
        os.close(master)
        status = process.wait(60)
    return status, b"".join(got).decode().replace("\r\n", "\n")


def screen(text):
    """The lines that a terminal shows at the end: understands newline, cursor up and erase line."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[\d*[A-Za-z]|\n)", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif re.fullmatch(r"\x1b\[\d+A", part):
            row -= int(part[2:-1])
            assert row >= 0
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b["):
            lines[row] += part
    return lines


def rows_of_the_demo(lines):
    """{job: (state, message)}; each job has one row."""
    found = {}
    for line in lines:
        states = "queued|running|succeeded|failed|timed out"
        row = re.fullmatch(rf"(good|bad|slow|py) +({states}) +\d+\.\d s(?:  (.*))?", line)
        if row:
            assert row[1] not in found
            found[row[1]] = (row[2], row[3])
    return found


RESULTS = {
    "good": ("succeeded", "fine"),
    "bad": ("failed", "exit status 3: went wrong"),
    "slow": ("timed out", "timed out after 0.4 s"),
    "py": ("succeeded", "done"),
}


def test_demo_in_a_terminal(place):
    status, text = demo_in_a_terminal(place.write(DEMO), "--once")
    assert status == 0
    assert rows_of_the_demo(screen(text)) == RESULTS
    assert "\x1b[4A" in text, "redrawn in place"
    assert "\x1b[32msucceeded\x1b[0m" in text and "\x1b[31mfailed\x1b[0m" in text
    assert text.endswith("\n4 runs, 2 succeeded, every result arrived at the admin.\n")
    assert sorted(os.listdir(place.directory)) == ["config.yaml", "mod.py", "scratch"]


def test_demo_without_color(place):
    status, text = demo_in_a_terminal(place.write(DEMO), "--once", NO_COLOR="1")
    assert status == 0
    assert rows_of_the_demo(screen(text)) == RESULTS
    assert "\x1b[4A" in text and not re.search(r"\x1b\[[\d;]*m", text)


@pytest.mark.parametrize(
    "env, size",
    [({"TERM": "dumb"}, (30, 100)), ({}, (10, 100))],
    ids=["dumb terminal", "too few lines"],
)
def test_demo_where_nothing_can_be_redrawn(place, env, size):
    status, text = demo_in_a_terminal(place.write(DEMO), "--once", size=size, **env)
    assert status == 0 and "\x1b" not in text
    assert "\nslow  timed out " in text


def test_demo_in_a_narrow_terminal(place):
    """A row that the terminal wraps would spoil the redrawing."""
    place.write(DEMO.replace("went wrong", "很长 " * 30))
    status, text = demo_in_a_terminal(place, "--once", size=(30, 50), NO_COLOR="1")
    assert status == 0
    table = [line for line in screen(text) if line.startswith("bad ")]
    assert len(table) == 1 and table[0].endswith("...")
    assert sum(2 if char in "很长" else 1 for char in table[0]) < 50


def test_demo_into_a_pipe(place):
    status, out, err = place.write(DEMO).run("-c", "config.yaml", "demo", "--once", TERM="xterm")
    assert (status, err) == (0, ""), "0 although a job failed"
    assert "\x1b" not in out and "\r" not in out
    lines = out.split("\n")
    assert re.fullmatch(r"admin     http://127\.0\.0\.1:\d+/ \(on this machine only\)", lines[0])
    assert re.fullmatch(r"executor  http://127\.0\.0\.1:\d+/", lines[1])
    assert lines[3] == "shown has registered. 4 jobs of config.yaml:"
    assert lines[-3:] == ["", "4 runs, 2 succeeded, every result arrived at the admin.", ""]
    table = lines[5:-3]
    states = {tuple(re.split(" {2,}", line)[:2]) for line in table}
    assert len(table) == len(states), "a line for each change of a state"
    assert (
        rows_of_the_demo([line for line in table if not re.match(r"\w+ +(queued|running) ", line)])
        == RESULTS
    )


def test_demo_needs_jobs(place):
    place.write("jobs: {}\n")
    assert place.run("-c", "config.yaml", "demo", "--once") == (
        2,
        "",
        "config.yaml: jobs: expected at least one job to show\n",
    )


def lines_until(text, lines):
    """All lines to the first one that holds `text`, after which no more may come."""
    found = []
    for line in lines:
        found.append(line)
        if text in line:
            break
    return found


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 0), (signal.SIGTERM, None)])
def test_demo_serves_until_ctrl_c(place, number, status):
    with place.ended(place.write(DEMO).start("demo")) as process:
        # The lines work as they are, from any directory.
        lines = itertools.dropwhile(
            lambda line: not line.startswith("Still serving"), process.stdout
        )
        *others, look = lines_until(" status --data-dir ", lines)
        assert others[::2] == [
            "Still serving; Ctrl-C ends it. In another terminal, to run a job again:\n",
            "and to look:\n",
        ]
        trigger = others[1]
        words = shlex.split(trigger.replace("$(date +%s)", "12345"))
        assert words[:2] == ["curl", "-H"] and words[3] == "-d"
        name, token = words[2].split(": ")
        for given, code in (("", 500), (token, 200)):  # a stranger on this host may not
            request = urllib.request.Request(
                words[5].rstrip(";"), words[4].encode(), headers={name: given}
            )
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request) as reply:
                assert json.load(reply)["code"] == code
        words = shlex.split(look)
        assert words[:3] == [sys.executable, str(PROGRAM), "status"]
        ran = subprocess.run(words, cwd="/", env=place.env, capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert ran.stdout.startswith("shown  registered\n")
        os.killpg(process.pid, number)  # a terminal sends it to all of them
        out, err = process.communicate(timeout=20)
    wrong = r".* WARNING refused a trigger: The access token is wrong: .*\n"
    assert out == "" and re.fullmatch(wrong, err), err
    assert status is None or process.returncode == status


def test_demo_interrupted_while_a_job_runs(place):
    """Ctrl-C at any time leaves nothing (see the fixture) and shows no traceback."""
    place.write(
        "executor: {bind: '127.0.0.1:0', drain_timeout: 0.3s}\n"
        "jobs: {long: {shell: sleep 600, kill_grace: 0.3}}\n"
    )
    with place.ended(place.start("demo")) as process:
        for line in process.stdout:
            if re.match("long +running ", line):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode in (0, 130) and not re.search(
        "Traceback|Error|KeyboardInterrupt", err
    ), err
