"""What a second reading of the callbacks, the registration and the daemon found: defects that no
other test would see come back."""

import collections
import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading

import pytest
import yaml
from conftest import LAUNCH, PROGRAM, alive, launch, run_job, wait_until
from tools import Proxy, items_of, stderr_lines

REFUSAL = json.dumps({"code": 500, "msg": "no such log"}).encode()
CONFIG = "executor: {bind: '127.0.0.1:0', data_dir: ./data, drain_timeout: 5s}\n"


def gate(directory):
    """(shell, open): a job that runs until `open()`."""
    file = directory / "gate"
    return f"until [ -e '{file}' ]; do sleep 0.05; done", file.touch


def begin_to_stop(daemon):
    """SIGTERM; returns once the registration is taken back, the only request of a stop that has no
    result to deliver."""
    daemon.signal(signal.SIGTERM)
    wait_until(
        lambda: "took back the registration" in daemon.log, 20, "the end of the registration"
    )


def log_or_end(daemon, told, before=0):
    """Wait until `told` is logged after the first `before` characters; the daemon may not end."""
    wait_until(
        lambda: told in daemon.log[before:] or daemon.process.poll() is not None, 20, repr(told)
    )
    assert daemon.process.poll() is None, daemon.log[before:]


def reload(daemon, told="reloaded"):
    """SIGHUP; returns what was logged until `told`."""
    before = len(daemon.log)
    daemon.signal(signal.SIGHUP)
    log_or_end(daemon, told, before)
    return daemon.log[before:]


# -- the address that is registered


@pytest.fixture
def ipv6():
    """A socket that listens on ::1."""
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("needs IPv6")
    with listener:
        yield listener


EVERYWHERE = {"bind": "0.0.0.0:0", "allow_no_token": True}


def test_no_address_of_ipv6_is_registered_of_what_listens_on_ipv4(executor, ipv6):
    """Nobody would be reached there: the log says what to do instead."""
    addresses = [f"http://[::1]:{ipv6.getsockname()[1]}"]
    daemon = executor(executor=EVERYWHERE, admin_options={"addresses": addresses})
    wait_until(lambda: "executor.address can say where" in daemon.log, 10, "a word of it")
    assert not select.select([ipv6], [], [], 0)[0], "the admin was asked"


def test_the_admin_that_has_an_address_of_ipv4_tells_it(executor, admin, ipv6):
    """As a name does that stands for an address of each kind, whichever comes first."""
    addresses = ["http://[::1]:1", admin.url]
    daemon = executor(executor=EVERYWHERE, admin_options={"addresses": addresses})
    assert admin.wait(lambda: admin.registry, 10)
    assert admin.registry == [f"http://127.0.0.1:{daemon.port}/"]


# -- proxies


@pytest.mark.parametrize("scheme", ["http://", ""], ids=["scheme", "none"])
def test_an_http_proxy_that_drips_is_given_up(executor, admin, scheme):
    """An exchange ends after admin.timeout, also where each byte comes in time."""
    with Proxy(admin, lambda number: "drip") as proxy:
        daemon = executor(
            admin_options={
                "addresses": ["http://10.99.99.1:8080"],
                "timeout": "1s",
                "connect_timeout": "1s",
            },
            env={
                **dict.fromkeys(("http_proxy", "HTTP_PROXY"), f"{scheme}127.0.0.1:{proxy.port}"),
                **dict.fromkeys(("no_proxy", "NO_PROXY"), ""),
            },
        )
        wait_until(lambda: "cannot register at the admin" in daemon.log, 10, "the end of it")
        proxy.plan = lambda number: "pass"
        wait_until(lambda: "registered" in daemon.log, 20, "a registration")


# -- results while the executor stops


def test_a_stop_asks_for_refused_results_no_more(executor, admin):
    """However many they are: each is asked for again at the next start."""
    asked = []

    def behave(path, body):
        if not path.endswith("callback"):
            return None
        asked.append(path)
        return 200, b'{"code": 500, "msg": "no such log"}'

    admin.behave = behave
    daemon = executor({"a": {"shell": "true"}}, admin=admin)
    for job_id in range(1, 41):
        admin.trigger(daemon.url, "a", jobId=job_id)
    wait_until(lambda: daemon.log.count("the admin refuses the result") == 40, 30, "the refusals")
    before = len(asked)
    assert daemon.stop() == 0
    assert len(asked) - before <= 3, "what was on its way"


def test_a_stop_delivers_although_the_first_attempt_is_reset(executor, admin, tmp_path):
    """As by what has forgotten an idle connection to the admin."""
    shell, open_gate = gate(tmp_path)
    with Proxy(admin) as proxy:
        daemon = executor(
            {"a": {"shell": shell}},
            admin_options={"addresses": [proxy.url]},
            executor={"drain_timeout": "60s"},
        )
        wait_until(lambda: "registered" in daemon.log, 10, "a registration")
        log_id, _ = admin.trigger(daemon.url, "a")
        begin_to_stop(daemon)
        first = proxy.requests
        proxy.plan = lambda number: "reset" if number == first else "pass"
        open_gate()
        assert daemon.wait() == 0
        assert proxy.requests > first and log_id in admin.results


def test_a_stop_delivers_although_a_backoff_runs(executor, admin):
    """The admin may be back: a stop asks once more instead of giving up."""
    with Proxy(admin) as proxy:
        daemon = executor({"a": {"shell": "true"}}, admin_options={"addresses": [proxy.url]})
        wait_until(lambda: "registered" in daemon.log, 10, "a registration")
        proxy.plan = lambda number: "reset"
        log_id, _ = admin.trigger(daemon.url, "a")
        wait_until(
            lambda: "cannot deliver 1 result, next attempt in" in daemon.log, 10, "a backoff"
        )
        proxy.plan = lambda number: "pass"
        assert daemon.stop() == 0
        assert log_id in admin.results


def test_a_stop_delivers_what_is_good_in_a_batch_that_is_refused(executor, admin):
    """It is split until what is bad is alone; then the next request waits a little, and the stop
    with it."""
    first, go_on = threading.Event(), threading.Event()
    bad = set()

    def behave(path, body):
        if not path.endswith("callback"):
            return None
        if not first.is_set():
            first.set()
            go_on.wait(20)
        return (200, REFUSAL) if bad & {item["logId"] for item in items_of(body)} else None

    admin.behave = behave
    daemon = executor(
        {"a": {"shell": "true"}}, admin=admin, program=LAUNCH, env=launch(DELIVER_LIMIT=60.0)
    )
    log_ids = [admin.trigger(daemon.url, "a")[0] for _ in range(24)]  # one after the other
    bad.update(log_ids[16:])
    wait_until(lambda: len(stderr_lines(daemon, " finished a ")) == 24, 20, "the runs")
    assert first.wait(10)
    begin_to_stop(daemon)
    go_on.set()
    assert daemon.wait(70) == 0
    assert sorted(admin.results) == log_ids[:16]


def test_a_second_signal_ends_a_stop_while_the_admin_hangs(executor, admin):
    """Whoever cannot wait for its answers need not send SIGKILL: one more signal is enough, whatever
    the stop waits for."""
    with Proxy(admin) as proxy:
        daemon = executor(
            {"a": {"shell": "true"}},
            admin_options={"addresses": [proxy.url], "timeout": "600s"},
            program=LAUNCH,
            env=launch(DELIVER_LIMIT=600.0),
        )
        wait_until(lambda: "registered" in daemon.log, 10, "a registration")
        before = proxy.requests
        proxy.plan = lambda number: "hang"
        admin.trigger(daemon.url, "a")
        wait_until(lambda: proxy.requests > before, 10, "the callback")
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: proxy.requests > before + 1, 10, "the end of the registration")
        daemon.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(20)
        ended = daemon.process.poll() is not None
        daemon.kill()
    assert ended


# -- signals


def test_a_report_of_the_threads_without_a_free_descriptor(executor, admin):
    """SIGUSR1 is for a daemon in trouble: it may not end it."""
    daemon = executor({"a": {"shell": "true"}}, admin=admin)
    wait_until(lambda: "registered" in daemon.log, 10, "a registration")
    pid = daemon.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    daemon.signal(signal.SIGUSR1)
    log_or_end(daemon, "cannot tell what the threads do")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    run_job(daemon, admin, "a")


@contextlib.contextmanager
def command(directory, config, *arguments):
    """A command in a session of its own that a hangup may end; with what it shows in `shown`, its
    temporary files in `scratch`, and the process of its job in `pid`."""
    (directory / "scratch").mkdir()
    file = directory / "config.yaml"
    file.write_text(
        f"{config}jobs: {{a: {{shell: 'echo $$ > pid.new; mv pid.new pid; {LONG}'}}}}\n"
    )
    with (directory / "shown").open("wb") as shown:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), "-c", str(file), *arguments],
            cwd=directory,
            env={**os.environ, "TMPDIR": str(directory / "scratch")},
            stdin=subprocess.DEVNULL,
            stdout=shown,
            stderr=shown,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
    try:
        wait_until((directory / "pid").exists, 20, "the start of the job")
        yield process
    finally:
        process.kill()
        process.wait(10)
        with contextlib.suppress(OSError):
            os.kill(int((directory / "pid").read_text()), signal.SIGKILL)


LONG = "exec sleep 600"


@pytest.mark.parametrize("arguments", [("exec", "a"), ("demo",)], ids=" ".join)
def test_a_terminal_that_goes_away_ends_what_runs_in_it(tmp_path, arguments):
    """With its job and its files: nobody would ever see or stop them."""
    with command(tmp_path, CONFIG, *arguments) as process:
        job = int((tmp_path / "pid").read_text())
        process.send_signal(signal.SIGHUP)
        process.wait(20)
        wait_until(lambda: not alive(job), 10, "the end of the job")
        assert list((tmp_path / "scratch").iterdir()) == []
        assert "Traceback" not in (tmp_path / "shown").read_text()


def test_demo_does_not_wait_for_its_runs(tmp_path):
    """Ctrl-C is by somebody who watches, whatever drain_timeout the daemon is to have."""
    config = CONFIG.replace("drain_timeout: 5s", "drain_timeout: 600s")
    with command(tmp_path, config, "demo") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130)


# -- reloads


def interpreter(file, *flags):
    """Make `file` an interpreter that is ours with these flags."""
    new = file.with_name("new")
    new.write_text(f"#!/bin/sh\nexec '{sys.executable}' {' '.join(flags)} \"$@\"\n")
    new.chmod(0o755)
    new.replace(file)


@pytest.fixture
def deployed(executor, admin, tmp_path):
    """(daemon, job, file): a daemon with a Python job `p` of the interpreter `file`, which has
    run."""
    (tmp_path / "entry.py").write_text(
        "import sys\n\n\ndef main():\n    return sys.flags.optimize\n"
    )
    file = tmp_path / "python"
    interpreter(file)
    job = {"python": "entry:main", "pythonpath": [str(tmp_path)], "interpreter": str(file)}
    daemon = executor({"p": job}, admin=admin)
    assert run_job(daemon, admin, "p")[1]["handleMsg"] == "0"
    return daemon, job, file


def change(daemon, **sections):
    daemon.write({**yaml.safe_load(daemon.file.read_text()), **sections})


def test_an_interpreter_that_nobody_names_any_more_is_given_up(deployed):
    """Else each deployment into a directory of its own would leave a server behind."""
    daemon, _, _ = deployed
    assert daemon.family()
    change(daemon, jobs={"a": {"shell": "true"}})
    reload(daemon)
    wait_until(lambda: not daemon.family(), 10, "the end of its server")


def test_a_reload_notices_an_interpreter_that_was_replaced(deployed, admin):
    """As where `interpreter` leads through a link to the release of the day."""
    daemon, _, file = deployed
    interpreter(file, "-O")
    reload(daemon)
    assert run_job(daemon, admin, "p")[1]["handleMsg"] == "1"


def test_a_file_that_loading_does_not_expect_ends_nothing(executor, admin):
    """Half of a surrogate is what YAML can write and no file name can have."""
    daemon = executor({"a": {"shell": "true"}}, admin=admin)
    good = daemon.file.read_text()
    daemon.file.write_text(CONFIG + 'admin: {access_token_file: "\\ud800"}\n')
    reload(daemon, "reload failed, the old jobs stay")
    run_job(daemon, admin, "a")
    daemon.file.write_text(good)
    reload(daemon)
    assert "admin.access_token_file: half of a character" in daemon.log


def test_a_token_that_moves_into_a_file_takes_no_restart(executor, loopback):
    """It was taken over all the same."""
    admin = loopback(token="old-token")
    daemon = executor({"a": {"shell": "true"}}, admin=admin)
    (daemon.directory / "token").write_text("new-token\n")
    change(daemon, admin={"addresses": [admin.url], "access_token_file": "token"})
    assert "restart" not in reload(daemon)
    admin.token = "new-token"
    run_job(daemon, admin, "a")


# -- results that are refused, and repeats


def test_a_refused_result_is_told_once(executor, admin):
    """It is tried for weeks; the log would hold nothing else."""
    tried = collections.Counter()

    def behave(path, body):
        if not path.endswith("callback"):
            return None
        items = items_of(body)
        if len(items) == 1:  # only then it is its own refusal
            tried[items[0]["logId"]] += 1
        return 404, b"<html>not found</html>"

    admin.behave = behave
    daemon = executor({"a": {"shell": "true"}}, admin=admin)
    log_ids = [admin.trigger(daemon.url, "a", jobId=number)[0] for number in (1, 2, 3)]
    wait_until(lambda: all(tried[log_id] >= 4 for log_id in log_ids), 20, "a second attempt")
    for log_id in log_ids:
        assert len(stderr_lines(daemon, f"refuses the result of logId={log_id},")) == 1


@pytest.mark.parametrize(
    "answer",
    [
        (404, b"<html>not found</html>"),
        (200, b'{"code":500,"msg":"The access token is wrong."}'),
    ],
    ids=["404", "token"],
)
def test_a_repeat_that_nobody_looked_at_is_sent_again(executor, admin, answer):
    """An error page or a wrong token says nothing of the result: the admin, which has lost it, gets
    it later."""
    callbacks = []

    def behave(path, body):
        if path.endswith("callback"):
            callbacks.append(path)
            if len(callbacks) in (2, 3):  # in both dialects
                return answer
        return None

    admin.behave = behave
    daemon = executor(
        {"a": {"shell": "true"}}, admin=admin, program=LAUNCH, env=launch(RESEND_AFTER=[0.3, 1000])
    )
    log_id, _ = run_job(daemon, admin, "a")
    assert admin.wait(lambda: len(admin.results[log_id]) == 2, 10), "it was not sent again"
