"""What an operator meets: formats of the log, ps, systemd's directories, reloads that fail, proxies,
and what the admin's refusals mean."""

import contextlib
import fcntl
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import LAUNCH, PROGRAM, launch, result_of, run_job, wait_until

HELLO = {"hello": {"shell": "echo one; echo 'tw\"o'"}}


# -- the log


def test_json_lines(executor, admin):
    daemon = executor(HELLO, admin=admin, executor={"log_format": "json", "log_to_stdout": True})
    log_id, _ = run_job(daemon, admin, "hello")
    assert daemon.stop() == 0
    lines = [json.loads(line) for line in daemon.log.splitlines()]
    at = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"
    assert all(re.fullmatch(at, line["time"]) for line in lines)
    own = [line["message"] for line in lines if line.get("level") == "INFO"]
    assert any(text.startswith(f"finished hello logId={log_id} ") for text in own)
    told = {line["message"].split()[0]: line for line in lines if "jobId" in line}
    assert {(line["job"], line["jobId"], line["logId"]) for line in told.values()} == {
        ("hello", 1, log_id)
    }
    assert list(told) == ["accepted", "started", "finished"]
    assert told["finished"]["code"] == 200 and 0 <= told["finished"]["seconds"] < 10
    output = [line for line in lines if "jobId" not in line and line.get("job") == "hello"]
    assert [(line["logId"], line["message"]) for line in output] == [
        (log_id, "one"),
        (log_id, 'tw"o'),
    ]


def test_json_lines_hold_no_character_on_which_a_terminal_acts(executor, admin):
    """What callers and jobs send is escaped where it would clear a screen, end a line or turn the
    direction of the text, and whoever reads the JSON has it as it was."""
    odd = "caf\u00e9 \x9b2J \x90 \x7f \u2028 \u202e end"
    daemon = executor(
        {"say": {"shell": 'printf "%s\\n" "$1"'}},
        admin=admin,
        executor={"log_format": "json", "log_to_stdout": True},
    )
    body = {"jobId": 9, "logId": 9, "executorHandler": odd, "glueType": "BEAN"}
    assert daemon.post("/run", body)["code"] == 500
    log_id, _ = run_job(daemon, admin, "say", executorParams=odd)
    assert daemon.stop() == 0
    text = daemon.stderr.read_bytes().decode("utf-8")
    raw = set(re.findall(r"[^\n -~\u00e9]", text))
    assert not raw, f"{raw} in {text!r}"
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    messages = [line["message"] for line in lines]
    assert any(odd in message for message in messages if message.startswith("refused ")), messages
    assert odd in [line["message"] for line in lines if line.get("logId") == log_id]


def test_stacks_on_sigusr1(executor, admin):
    daemon = executor(HELLO, admin=admin)
    run_job(daemon, admin, "hello")
    daemon.signal(signal.SIGUSR1)
    wait_until(lambda: daemon.log.count("Thread 0x") + daemon.log.count("Current thread") >= 4)
    wait_until(lambda: "in _loop" in daemon.log)
    run_job(daemon, admin, "hello")


def test_a_busy_daemon_outlives_many_sigusr1(executor, admin):
    daemon = executor(HELLO, admin=admin)
    for _ in range(100):
        log_id, reply = admin.trigger(daemon.url, "hello")
        assert reply["code"] == 200
        for _ in range(4):
            daemon.signal(signal.SIGUSR1)
    wait_until(lambda: result_of(admin, log_id))
    assert daemon.stop() == 0
    assert "Fatal Python error" not in daemon.log


# -- ps


def test_ps_shows_a_command_that_a_person_recognises(executor, admin, tmp_path):
    (tmp_path / "mine.py").write_text("def main(): pass\n")
    jobs = {"py": {"python": "mine:main", "pythonpath": [str(tmp_path)]}}
    daemon = executor(jobs, admin=admin, program=PROGRAM)
    run_job(daemon, admin, "py")

    def shown(pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        return words.rstrip(b"\0").decode().split("\0")

    words = shown(daemon.process.pid)
    assert words[1:] == [str(PROGRAM), "-c", str(daemon.file), "run"], words
    (server,) = [pid for pid in children(daemon.process.pid)]
    assert shown(server)[1:3] == [str(PROGRAM), "--serve-python"]
    ps = subprocess.run(
        ["ps", "-o", "comm=", "-p", str(daemon.process.pid)], capture_output=True, text=True
    )
    assert ps.stdout.strip() == "xxl-executor"


def children(pid):
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


# -- systemd's directories


def test_the_ten_minute_configuration_under_systemd(executor, loopback, tmp_path):
    """Without data_dir and token: they are where the unit puts them."""
    admin = loopback(token="s3cret")
    credentials, state = tmp_path / "credentials", tmp_path / "state"
    credentials.mkdir()
    (credentials / "token").write_text("s3cret\n")
    daemon = executor(
        HELLO,
        admin=admin,
        env={"CREDENTIALS_DIRECTORY": str(credentials), "STATE_DIRECTORY": str(state)},
        start=False,
    )
    text = daemon.file.read_text()
    text = re.sub(r"\n *(data_dir|access_token): .*", "", text)
    daemon.file.write_text(text)
    daemon.data.symlink_to(state)
    daemon.start()
    assert admin.wait(lambda: admin.registry, 10)
    assert (state / "journal.db").exists()
    assert daemon.post("/beat")["code"] == 500, "the token is required"
    (credentials / "token").write_text("other")
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: "the access token has changed" in daemon.log)


# -- reloads


def test_a_reload_that_failed_is_seen(executor):
    daemon = executor(HELLO)
    good = daemon.file.read_text()

    def metric():
        text = daemon.session.get(daemon.url + "/metrics", timeout=20).text
        return re.search(r"^xxl_executor_config_last_reload_successful (\d)$", text, re.M)[1]

    assert metric() == "1"
    daemon.file.write_text(good.replace("shell:", "shel:"))
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: metric() == "0")
    told = 'jobs.hello.shel: unknown key, did you mean "shell"?'
    assert told in daemon.status()["reloadError"]
    arguments = [sys.executable, str(PROGRAM), "status", "--data-dir", str(daemon.data)]
    shown = subprocess.run(arguments, text=True, capture_output=True).stdout
    assert re.search(rf"^RELOAD FAILED, the old jobs stay: .*{re.escape(told)}$", shown, re.M)
    daemon.file.write_text(good)
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: metric() == "1")
    assert daemon.status()["reloadError"] == ""


# -- proxies


@pytest.fixture
def proxy():
    """Somebody who listens and answers nothing but 503."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}", listener


def test_loopback_goes_through_no_proxy(executor, admin, tmp_path):
    closed = "http://127.0.0.1:9"
    env = {"http_proxy": closed, "HTTP_PROXY": closed, "https_proxy": closed}
    daemon = executor(HELLO, admin=admin, env=env)
    run_job(daemon, admin, "hello")
    arguments = [sys.executable, str(PROGRAM), "-c", str(daemon.file)]
    own = {**os.environ, **env}
    shown = subprocess.run([*arguments, "status"], text=True, capture_output=True, env=own)
    assert (shown.returncode, shown.stderr) == (0, "")
    shown = subprocess.run([*arguments, "demo", "--once"], text=True, capture_output=True, env=own)
    assert (shown.returncode, shown.stderr) == (0, ""), shown


def test_an_error_through_a_proxy_names_it(executor, proxy):
    address, listener = proxy
    daemon = executor(
        HELLO,
        admin_options={"addresses": ["http://admin.invalid:8080"], "timeout": "2s"},
        executor={"address": "http://127.0.0.1:1/", "drain_timeout": "0"},
        env={"http_proxy": address},
    )
    listener.settimeout(10)
    peer, _ = listener.accept()
    with peer:
        peer.recv(65536)
        peer.sendall(b"HTTP/1.1 503 no\r\nContent-Length: 0\r\n\r\n")
        via = f"(through the proxy {address.rpartition('@')[2]}): "
        wait_until(lambda: via in daemon.log)
    assert "secret" not in daemon.log


# -- what the admin's refusals mean


@pytest.mark.parametrize(
    "status, reply, told",
    [
        (404, b"", "nothing is there: up to 3.4.0 the address ends with /xxl-job-admin unless"),
        (302, b"", "that is a page: give the admin's root, such as http://HOST:8080/xxl-job-admin"),
        (
            200,
            b'{"code":500,"msg":"accessToken or appname invalid"}',
            "a 3.5 wants the AccessToken of this AppName on its executor's page instead of"
            " xxl.job.accessToken, and takes 30 s to notice a new one; admin.access_token is empty",
        ),
        (
            200,
            b'{"code":500,"msg":"The access token is wrong."}',
            "The access token is wrong; give both the same: xxl.job.accessToken there,"
            " admin.access_token here, which is empty",
        ),
    ],
    ids=["404", "302", "3.5", "older"],
)
def test_a_refusal_comes_with_what_to_do(executor, admin, status, reply, told):
    admin.behave = lambda path, body: (status, reply)
    daemon = executor(HELLO, admin=admin)
    wait_until(lambda: told in daemon.log)
    admin.behave = lambda path, body: None


def test_an_outage_is_told_again_from_time_to_time(executor, port):
    daemon = executor(
        HELLO,
        admin_options={"addresses": [f"http://127.0.0.1:{port}"], "timeout": "1s"},
        executor={"drain_timeout": "0"},
        env=launch(OUTAGE_INTERVAL=2.0),
        program=LAUNCH,
    )
    trigger = {"jobId": 1, "logId": 7, "executorHandler": "hello", "glueType": "BEAN"}
    assert daemon.post("/run", trigger)["code"] == 200
    line = (
        r"the admin has not taken a registration for [\d.]+ s, since [\d-]+ [\d:]+; 1 result waiting:"
        r" http://127.0.0.1:"
    )
    wait_until(lambda: len(re.findall(line, daemon.log)) >= 2, 20)
    assert daemon.log.count("cannot register at the admin") == 1


# -- what a hostile reader tried


@pytest.mark.parametrize("as_script", [True, False], ids=["script", "imported"])
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_with_a_stream_closed(executor, admin, tmp_path, closed, as_script):
    """It starts, runs jobs of each kind and ends well with stdin, stdout or stderr closed."""
    (tmp_path / "mod.py").write_text("def main():\n    print('printed')\n")
    jobs = {**HELLO, "python": {"python": "mod:main", "pythonpath": [str(tmp_path)]}}
    prefix = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    program = PROGRAM if as_script else LAUNCH  # as a console script, which imports it
    daemon = executor(jobs, admin=admin, prefix=prefix, program=program, env=launch())
    run_job(daemon, admin, "hello")
    assert run_job(daemon, admin, "python", jobId=2)[1]["handleMsg"] == "printed"
    assert daemon.stop() == 0


def test_stacks_for_a_reader_who_does_not_read(executor, admin, tmp_path):
    """SIGUSR1 holds up nothing, be the pipe full."""
    read, write = os.pipe()
    fcntl.fcntl(write, getattr(fcntl, "F_SETPIPE_SZ", 1031), 4096)  # <linux/fcntl.h>, before 3.10
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 64)
    os.set_blocking(write, True)
    daemon = executor(
        HELLO, admin=admin, prefix=["bash", "-c", f'exec "$@" 2>&{write}', "bash"], start=False
    )
    daemon.pass_fds = (write,)
    try:
        daemon.start()
        daemon.signal(signal.SIGUSR1)
        run_job(daemon, admin, "hello")
        assert daemon.stop() == 0
    finally:
        os.close(read)
        os.close(write)


def test_stacks_for_a_socket_that_nobody_reads(executor, admin):
    """What systemd gives as stderr is a stream socket, which cannot be opened anew without
    waiting: SIGUSR1 holds up nobody for it."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    daemon = executor(
        HELLO,
        admin=admin,
        prefix=["bash", "-c", f'exec "$@" 2>&{theirs.fileno()}', "bash"],
        start=False,
    )
    daemon.pass_fds = (theirs.fileno(),)
    with ours:
        with theirs:
            daemon.start()
        for _ in range(20):  # more than the socket takes
            daemon.signal(signal.SIGUSR1)
            run_job(daemon, admin, "hello")
        ours.settimeout(10)
        told = b""
        while told.count(b"Thread 0x") < 4:
            told += ours.recv(65536)
        daemon.signal(signal.SIGTERM)
        while ours.recv(65536):
            pass
        assert daemon.wait() == 0


def test_the_start_time_stays(executor):
    daemon = executor(HELLO)

    def began():
        text = daemon.session.get(daemon.url + "/metrics", timeout=20).text
        return re.search(r"^process_start_time_seconds (\S+)$", text, re.M)[1]

    assert len({began() for _ in range(30)}) == 1


@pytest.mark.parametrize("answer", ["[1]", '{"version": 1}', '{"pid": 1, "reloadError": ""}'])
def test_status_believes_no_stranger_on_the_port(executor, port, answer):
    daemon = executor(HELLO, executor={"bind": f"127.0.0.1:{port}"})
    daemon.kill()

    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", port), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        arguments = [sys.executable, str(PROGRAM), "-c", str(daemon.file), "status"]
        shown = subprocess.run(arguments, text=True, capture_output=True)
        server.shutdown()
        thread.join()
    assert (shown.returncode, shown.stderr) == (1, "")
    assert "it ended unexpectedly at about" in shown.stdout


def test_a_number_that_no_run_can_have(executor):
    daemon = executor(HELLO)
    arguments = [sys.executable, str(PROGRAM), "-c", str(daemon.file), "logs", "9" * 19]
    shown = subprocess.run(arguments, text=True, capture_output=True)
    assert shown.returncode == 1 and shown.stderr.startswith("xxl-executor: no run of "), shown


def test_an_output_that_is_full(executor):
    daemon = executor(HELLO)
    arguments = [sys.executable, str(PROGRAM), "-c", str(daemon.file), "status"]
    with open("/dev/full", "w") as full:
        shown = subprocess.run(arguments, text=True, stdout=full, stderr=subprocess.PIPE)
    assert shown.returncode == 1 and shown.stderr == (
        "xxl-executor: [Errno 28] No space left on device\n"
    )
