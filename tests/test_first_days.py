"""What an operator meets in the first days: each is told in words, and nothing hangs."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROGRAM, run_job, wait_until

from xxl_executor import unstartable

QUIET = {"XXL_JOB_ACCESS_TOKEN": "", "ON_THE_HOST": "1"}
HEAD = "executor: {bind: '127.0.0.1:0', data_dir: ./data}\nadmin: {addresses: []}\n"


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


class Place:
    def __init__(self, directory):
        self.directory = directory

    def write(self, text, encoding="utf-8"):
        (self.directory / "config.yaml").write_text(text, encoding=encoding)
        return self

    def command(self, *arguments, before=""):
        words = [sys.executable, "-W", "error", str(PROGRAM), *arguments]
        return ["bash", "-c", f'{before}exec "$@"', "-", *words] if before else words

    def run(self, *arguments, before="", stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        """(exit status, stdout, stderr); `before`: what the shell does first."""
        done = subprocess.run(
            self.command(*arguments, before=before),
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            encoding="utf-8",
            timeout=60,
            env={**os.environ, **QUIET},
        )
        return done.returncode, done.stdout, done.stderr

    def script(self, name, data):
        (self.directory / name).write_bytes(data)
        (self.directory / name).chmod(0o755)


# -- the configuration


@pytest.mark.parametrize(
    "text, told",
    [
        (
            "admin: {addresses: ['http://a:1/x，http://b:1/x']}",
            '1: admin.addresses: "，" in an address: write ,',
        ),
        (
            "admin: {addresses: []}\njobs:\n  a:\n    shell: x\n\u3000\u3000timeout: 5\n",
            '; line 5 has "\\u3000": write " "',
        ),
        ("jobs:\n  a: “x\n b: y”\n", '; line 3 has "”": write """'),
        (
            "executor: {bind: 9999}",
            '1: executor.bind: expected host:port such as "0.0.0.0:9999" or "[::]:9999", got the'
            " number 9999",
        ),
        (
            "admin: {access_token: $ON_THE_HOST}",
            "1: admin.access_token: $ON_THE_HOST stays as it is: write ${ON_THE_HOST}",
        ),
        ("jobs:\tx\n", "write spaces instead of tabs"),
        (
            "jobs:\n  a:\n    shell: x  # 超时，单位秒\n    timeuot: 5  # 超时，单位秒\n",
            '4: jobs.a.timeuot: unknown key, did you mean "timeout"?\n',
        ),
    ],
)
def test_a_mistake_in_the_configuration(place, text, told):
    status, _, err = place.write(text).run("check")
    assert status == 2 and told in err, err


@pytest.mark.parametrize(
    "address, page",
    [
        ("http://a:1/xxl-job-admin/toLogin", "/toLogin"),
        ("http://a:1/api", "/api"),
        ("http://a:1/apis", None),
        ("http://login:1/x", None),
    ],
)
def test_an_address_of_a_page(place, address, page):
    text = f"admin:\n  access_token: x\n  addresses: ['http://b:1/x', '{address}/']\n"
    status, _, err = place.write(text + "jobs: {a: {shell: x}}\n").run("check")
    told = f"config.yaml:3: admin.addresses: {address} is asked at {address}/api/registry: should"
    assert status == 0 and (f"{told} it end before {page}?\n" in err if page else err == ""), err


def test_a_data_directory_that_is_none(place):
    text = "executor: {allow_no_token: true, data_dir: ./config.yaml}\njobs: {a: {shell: x}}\n"
    told = f"executor.data_dir: {place.directory}/config.yaml is no directory: name another one\n"
    status, _, err = place.write(text).run("check")
    assert status == 0 and f"config.yaml:1: {told}" in err
    assert place.write(text.replace("./config.yaml", "./new")).run("check")[2] == ""


@pytest.mark.parametrize(
    "job, told",
    [
        ("{command: [bash, ./gone.sh]}", "command: the script {}/gone.sh does not exist"),
        ("{command: [bash, -eu, ./gone.sh, x]}", "command: the script {}/gone.sh does not exist"),
        ("{command: [python3, -u, gone.py]}", "command: the script {}/gone.py does not exist"),
        (
            "{command: [sh, ./crlf.sh]}",
            "command: {0}/crlf.sh has the line ends of Windows: dos2unix",
        ),
        ("{command: [bash, -c, ./gone.sh]}", None),
        ("{command: [python3, -m, json.tool]}", None),
        ("{command: [bash, '{param}']}", None),
        ("{command: [bash, ./good.sh]}", None),
        ("{command: [echo, ./gone.sh]}", None),
    ],
)
def test_a_script_behind_its_interpreter(place, job, told):
    place.script("crlf.sh", b"set -e\r\nfalse\r\n")
    place.script("good.sh", b"set -e\n")
    status, out, err = place.write(f"{HEAD}jobs:\n  a: {job}\n").run("check")
    assert status == 0
    if told:
        assert f"config.yaml:4: jobs.a.{told.format(place.directory)}" in err, err
    else:
        assert "jobs.a" not in out + err


@pytest.mark.parametrize(
    "word, told",
    [
        ("${1:-x} ${#a}", None),
        ("$${KEEP:-7}", None),
        (
            "${XXL_JOB_PARAM:-x}",
            "4: jobs.a.command: ${XXL_JOB_PARAM} is known in the job only: write"
            " $${XXL_JOB_PARAM:-x}",
        ),
        ("${A:-${B:-x}}", "4: jobs.a.command: ${A:-${B:-x}...: a default cannot hold another ${}"),
    ],
)
def test_what_the_shell_is_to_replace(place, word, told):
    status, _, err = place.write(f"{HEAD}jobs:\n  a: {{command: [echo, '{word}']}}\n").run("check")
    assert (status, told or "") == (2 if told else 0, err.partition("config.yaml:")[2].strip())


def test_included_files_that_are_not_read(place):
    """A pattern that matches nothing beside files that look as if they were meant, and a directory
    that cannot be listed: neither looks as if there were no jobs."""
    (place.directory / "jobs.d").mkdir()
    place.write(f"{HEAD}include: [jobs.d/*.yml]\njobs: {{a: {{shell: x}}}}\n")
    assert "include" not in place.run("check")[2]
    (place.directory / "jobs.d/more.yaml").write_text("jobs: {b: {shell: x}}\n")
    told = f"config.yaml:3: include: {place.directory}/jobs.d/*.yml matches no file, and not "
    assert f"{told}{place.directory}/jobs.d/more.yaml\n" in place.run("check")[2]
    (place.directory / "jobs.d/more.yaml").unlink()
    (place.directory / "jobs.d").rmdir()
    (place.directory / "jobs.d").write_text("")
    status, _, err = place.run("check")
    assert status == 2 and "include: " in err and "cannot be read: Not a directory" in err


def test_line_ends_of_windows_beside_a_mistake(place):
    """What names only the data directory is read nevertheless."""
    text = f"executor:\n  data_dir: {place.directory}/gone\njobs: [\n".replace("\n", "\r\n")
    (place.directory / "config.yaml").write_bytes(text.encode())
    status, _, err = place.run("runs")
    assert (status, "/gone/journal.db does not exist" in err) == (1, True), err


def test_a_closed_stdout(place):
    place.write(f"{HEAD}jobs: {{a: {{shell: x}}}}\n")
    for command in ("check", "status"):
        status, _, err = place.run(command, before="exec >&-; ")
        assert status in (0, 1) and "Traceback" not in err


@pytest.mark.parametrize(
    "bind, shown", [("[::0]:0", "[::]"), ("0:0", "0.0.0.0"), ("127.1:0", "127.0.0.1")]
)
def test_other_spellings_of_an_address(executor, bind, shown):
    daemon = executor({}, executor={"bind": bind, "allow_no_token": True})
    wait_until(lambda: f"listening on {shown}:" in daemon.log)


def test_a_locale_that_is_not_utf_8(place):
    place.write(f"{HEAD}jobs: {{a: {{shell: 'echo \U0001f680'}}}}\n")
    locale = "LC_ALL=en_US.ISO-8859-1 PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 "
    probe = f"{locale} {sys.executable} -c 'import sys; print(sys.getfilesystemencoding())'"
    if "8859" not in subprocess.run(["sh", "-c", probe], capture_output=True, text=True).stdout:
        pytest.skip("this host has no such locale")
    status, _, err = place.run("check", before=f"export {locale}; ")
    assert status == 0 and "start it with LANG=C.UTF-8" in err and "Traceback" not in err


def test_https_where_http_is_spoken(executor, admin):
    address = admin.url.replace("http", "https")
    daemon = executor(admin=admin, admin_options={"addresses": [address]})
    told = "wrong version number (_ssl.c"
    wait_until(lambda: told in daemon.log)
    assert "; no TLS is spoken there: is it http:// instead of https://?" in daemon.log


def test_a_file_that_is_no_configuration(place):
    status, _, err = place.run("check", "-c", "/dev/zero")
    assert (status, err) == (
        2,
        "/dev/zero: cannot be read: it is larger than 16 MiB: give a readable file with -c FILE\n",
    )
    # by its bytes, of which some characters take more than one: never only a part of it is read
    text = f"{HEAD}jobs: {{a: {{shell: x}}}}\n" + ("# " + "字" * 1000 + "\n") * 5700
    status, _, err = place.write(text + "jobs: {b: {shell: x}}\n").run("check")
    assert status == 2 and "it is larger than 16 MiB" in err


@pytest.mark.parametrize(
    "job, told",
    [
        (
            "{shell: x, env: {PATH: '/opt/x:$ON_THE_HOST'}}",
            "env.PATH: $ON_THE_HOST stays as it is, did you mean ${ON_THE_HOST}?",
        ),
        ("{shell: x, env: {PRICE: '5$ON_NO_HOST'}}", None),
        ("{shell: '“echo” x'}", "shell: “ is no quote for the shell: write ' or \""),
        ("{shell: 'echo “x”'}", None),
        ("{shell: x, env: {LATER: 'cd $ON_THE_HOST && ls', PASS: 'x$_!', NOTE: '5$价格'}}", None),
    ],
)
def test_what_means_something_else_than_it_looks_like(place, job, told):
    status, out, err = place.write(f"{HEAD}jobs:\n  a: {job}\n").run("check")
    assert status == 0
    assert f"config.yaml:4: jobs.a.{told}" in out + err if told else "jobs.a" not in out + err


@pytest.mark.skipif(
    os.path.basename(os.path.realpath("/bin/sh")) != "dash", reason="/bin/sh is not dash"
)
@pytest.mark.parametrize(
    "shell, word",
    [
        ("source ./env; x", "source"),
        ("cd /\n  source ./env", "source"),
        ("if [[ -e x ]]; then true; fi", "[["),
        ("[[ -e x ]] && true", "[["),
        (". ./source; echo source x", None),
        ("mysql <<SQL\nsource dump.sql\nSQL", None),
        ("ssh host '\nsource /etc/profile; x'", None),
        ("# formerly\n# if [[ -e x ]]; then", None),
        ("sed -E 's/([[ ]x)/y/' z", None),
        ("psql -c 'select\n  source , n from t'", None),
        ('source () { . "$@"; }', None),
        ("grep '[[:space:]]' x; resource x", None),
    ],
)
def test_words_of_bash(place, shell, word):
    text = f"{HEAD}jobs:\n  a:\n    shell: |\n" + "".join(
        f"      {line}\n" for line in shell.split("\n")
    )
    _, out, err = place.write(text).run("check")
    remedy = 'write ". FILE"' if word == "source" else "write [ ]"
    told = f'/bin/sh has no "{word}" here: {remedy}, or command: [bash, -c, ...]'
    assert told in out + err if word else "/bin/sh has no" not in out + err


# -- scripts

SCRIPTS = {
    "crlf.sh": (b"#!/bin/sh\r\necho x\r\n", "has the line ends of Windows: dos2unix {}"),
    "nowhere.sh": (b"#!/usr/bin/nosuch\n", "begins with #!/usr/bin/nosuch: there is none"),
    "bom.sh": (
        b"\xef\xbb\xbf#!/bin/sh\necho x\n",
        r"has a byte order mark before its #! line: sed -i '1s/^\xef\xbb\xbf//' {}",
    ),
    "plain.sh": (b"echo x\n", 'has no "#!" line: let it begin with #!/bin/sh or the like'),
}


def test_scripts_that_cannot_be_started(executor, admin, place):
    for name, (data, _) in SCRIPTS.items():
        place.script(name, data)
    place.script("program", Path("/bin/true").read_bytes())
    here = str(place.directory)
    jobs = {name: {"command": [f"./{name}"], "cwd": here} for name in [*SCRIPTS, "program"]}
    daemon = executor(jobs, admin=admin)
    for name, (_, told) in SCRIPTS.items():
        file = place.directory / name
        why = f"{file} {told.format(file)}"
        wait_until(lambda name=name, why=why: f"jobs.{name}.command: {why}" in daemon.log)
        result = run_job(daemon, admin, name)[1]
        assert (result["code"], result["handleMsg"]) == (500, f"cannot start ./{name}: {why}")
    assert run_job(daemon, admin, "program")[1]["code"] == 200
    assert "jobs.program" not in daemon.log


def test_the_advice_for_a_byte_order_mark(place):
    data, told = SCRIPTS["bom.sh"]
    for locale in ("C", "C.UTF-8"):
        place.script("bom.sh", data)
        advice = told.format(place.directory / "bom.sh").partition(": ")[2]
        subprocess.run(["sh", "-c", advice], check=True, env={**os.environ, "LC_ALL": locale})
        assert (place.directory / "bom.sh").read_bytes() == data[3:]


def test_what_can_be_started_or_cannot_be_told(place):
    place.script("interpreter", Path("/bin/sh").read_bytes())
    place.script("relative.sh", b"#!./interpreter\n")
    place.script("options.pl", b"#!/usr/bin/perl -w\r\n")
    place.script("spaces.sh", b"#! \t/bin/sh -e\n")
    os.mkfifo(place.directory / "fifo")
    for name in ("interpreter", "relative.sh", "options.pl", "spaces.sh", "fifo", "none"):
        assert unstartable(str(place.directory / name)) == ""
    place.script("colour.sh", b"#!/\x1b[31m\n")
    assert "\x1b" not in unstartable(str(place.directory / "colour.sh"))


# -- limits of the shell it is started from


@pytest.mark.parametrize("job", ["{shell: echo hi}", "{python: 'os:getcwd', isolation: thread}"])
def test_exec_without_descriptors(place, job):
    """It says so, and does not wait for a run that has not begun."""
    place.write(f"{HEAD}jobs:\n  a: {job}\n")
    for limit in (8, 11, 12, 13, 14, 16, 20):
        status, _, err = place.run("exec", "a", before=f"ulimit -n {limit}; ")
        assert status == 0 or "Too many open files" in err, (limit, status, err)
        assert "Traceback" not in err, err


@pytest.mark.parametrize("limit", [0, 1, 10])
def test_files_that_may_not_be_long(place, limit):
    place.write(f"{HEAD}jobs: {{a: {{shell: x}}}}\n")
    status, out, err = place.run("run", before=f"ulimit -f {limit}; ")
    assert status == 1 and "Traceback" not in out + err, err
    assert f"a file may have {1024 * limit} bytes here" in err, err


def test_an_address_of_another_host(place):
    place.write(f"{HEAD.replace('127.0.0.1', '192.0.2.1')}jobs: {{a: {{shell: x}}}}\n")
    place.write(
        (place.directory / "config.yaml")
        .read_text()
        .replace("{bind", "{allow_no_token: true, bind")
    )
    status, _, err = place.run("run")
    assert status == 1
    assert err.splitlines()[-1] == (
        "xxl-executor: executor.bind: cannot listen on 192.0.2.1:0: Cannot assign requested"
        " address: 0.0.0.0 or [::] takes all addresses of this host"
    )


# -- looking at output


def test_a_followed_log_that_is_emptied(executor, admin, place):
    go = place.directory / "go"
    shell = f"echo first; until [ -e {go} ]; do sleep 0.05; done; echo second; sleep 60"
    daemon = executor({"a": {"shell": shell, "kill_grace": 0}}, admin=admin)
    log_id, _ = admin.trigger(daemon.url, "a")
    shown = place.directory / "shown"
    with shown.open("wb") as out:
        follower = subprocess.Popen(
            place.command("logs", "-c", str(daemon.file), str(log_id), "-f"), stdout=out, stderr=out
        )
    try:
        wait_until(lambda: b"first\n" in shown.read_bytes())
        os.truncate(next((daemon.data / "logs").glob(f"*/{log_id}.log")), 0)
        wait_until(lambda: b"----- the log was truncated -----\n" in shown.read_bytes())
        go.touch()
        wait_until(lambda: b"second\n" in shown.read_bytes())
    finally:
        follower.send_signal(signal.SIGINT)
        follower.wait(10)


def test_exec_whose_output_nobody_reads(place):
    go = place.directory / "go"
    shell = f"echo one; until [ -e {go} ]; do sleep 0.05; done; echo two; echo three >&2"
    place.write(f"{HEAD}jobs: {{a: {{shell: '{shell}'}}}}\n")
    process = subprocess.Popen(
        place.command("exec", "a"),
        cwd=place.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=0,
    )
    with contextlib.ExitStack() as undo:
        undo.callback(process.wait)
        undo.callback(process.kill)
        assert process.stdout.readline() == "one\n"
        process.stdout.close()
        go.touch()
        told = process.stderr.read()
        assert process.wait(10) == 0
        process.stderr.close()
    told_of = "----- nobody reads the output any more, the job goes on: Ctrl-C ends it -----"
    assert told.splitlines()[1] == told_of and "succeeded" in told.splitlines()[2], told


@pytest.mark.parametrize("job", ["shell: seq 3 && echo x >&2", "python: 'mod:main'"])
def test_exec_whose_stderr_nobody_reads_either(place, job):
    """The job goes on to its end."""
    (place.directory / "mod.py").write_text(
        "def main():\n"
        "    for number in range(3):\n        print(number)\n"
        "    open('done', 'w').close()\n"
    )
    job = f"{{{job} && touch done}}" if "shell" in job else f"{{{job}, isolation: thread}}"
    place.write(f"{HEAD}jobs:\n  a: {job}\n")
    read, write = os.pipe()
    os.close(read)
    try:
        status, _, _ = place.run("exec", "a", stdout=write, stderr=write)
    finally:
        os.close(write)
    assert status == 0 and (place.directory / "done").exists()


def test_exec_of_a_thread_whose_output_cannot_be_written(place):
    """What is told of that is not for the log that cannot be written."""
    (place.directory / "mod.py").write_text("def main():\n    print('x')\n    return 'done'\n")
    place.write(f"{HEAD}jobs:\n  a: {{python: 'mod:main', isolation: thread}}\n")
    with open("/dev/full", "wb") as full:
        status, _, err = place.run("exec", "a", stdout=full)
    assert status == 0
    assert "cannot write a job log, output is dropped: No space left on device" in err


def test_exec_of_output_without_a_last_newline(place):
    place.write(f"{HEAD}jobs: {{a: {{shell: printf 5%%}}}}\n")
    _, out, _ = place.run("exec", "a", stderr=subprocess.STDOUT)
    lines = out.splitlines()
    assert lines[1] == "5%" and lines[2].startswith("----- succeeded after"), lines
