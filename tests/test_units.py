"""The units in systemd/: what the daemon relies on in them, and what systemd's own tools say about
them."""

import configparser
import os
import re
import shutil
import stat
import subprocess
import sys

import pytest
from conftest import PROGRAM, ROOT

import xxl_executor

UNITS = ROOT / "systemd"
SYSUSERS, TMPFILES = (
    UNITS / "sysusers.d" / "xxl-executor.conf",
    UNITS / "tmpfiles.d" / "xxl-executor.conf",
)
DROP_IN = UNITS / "xxl-executor.service.d" / "jobs-need-more.conf.example"
USER = "xxl-executor"
NAMES = ["xxl-executor.service", "xxl-executor.socket"]


def parse(file):
    """{section: {key: value}}; a key that stands twice is an error."""
    reader = configparser.ConfigParser(interpolation=None, delimiters="=", comment_prefixes="#")
    reader.optionxform = str
    reader.read_string(file.read_text(encoding="utf-8"))
    return {name: dict(reader[name]) for name in reader.sections()}


@pytest.fixture(scope="module")
def unit():
    return parse(UNITS / "xxl-executor.service")


def test_the_unit_of_several_executors_differs_in_nothing_but_names():
    one, several = ((UNITS / name).read_text() for name in (NAMES[0], "xxl-executor@.service"))
    changed = [
        (old, new)
        for old, new in zip(reversed(one.splitlines()), reversed(several.splitlines()))
        if old != new and "=" in old and not old.startswith("#")
    ]
    assert [new for _, new in reversed(changed)] == [
        "Description=XXL-JOB executor %i",
        "ExecStart=/usr/bin/python3 /opt/xxl-executor/xxl_executor.py -c /etc/xxl-executor/%i.yaml run",
        "StateDirectory=xxl-executor/%i",
        "LoadCredential=token:/etc/xxl-executor/%i.token",
        "EnvironmentFile=-/etc/xxl-executor/%i.environment",
    ]


@pytest.fixture(scope="module")
def service(unit):
    return unit["Service"]


def run(*command, **environment):
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env={
            **os.environ,
            "LC_ALL": "C",
            "SYSTEMD_PAGER": "",
            "SYSTEMD_COLORS": "0",
            **environment,
        },
    )


def tool(name, *options):
    """A tool of systemd; skips the test when it is missing, or has not all `options`."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    known = run(path, "--help").stdout
    for option in options:
        if option not in known:
            pytest.skip(f"this {name} has no {option}")
    return path


# -- what the daemon relies on


@pytest.mark.parametrize(
    "key, value",
    [
        ("Type", "notify"),
        ("ExecReload", "/bin/kill -HUP $MAINPID"),
        ("KillMode", "mixed"),
        ("WatchdogSec", "60"),
        ("OOMPolicy", "continue"),
        ("Restart", "always"),
        ("RestartPreventExitStatus", "2"),
        ("User", USER),
        ("StateDirectory", USER),
        ("LoadCredential", "token:/etc/xxl-executor/token"),
        ("CapabilityBoundingSet", ""),
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("SystemCallErrorNumber", "EPERM"),
    ],
)
def test_the_service_says(service, key, value):
    assert service[key] == value


def test_the_service_starts_the_daemon_with_the_usual_configuration(service):
    words = service["ExecStart"].split()
    assert words[1:] == [
        "/opt/xxl-executor/xxl_executor.py",
        "-c",
        xxl_executor.CONFIG_PLACES[1],
        "run",
    ]


def test_systemd_waits_longer_than_the_daemon_takes_to_stop(service, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text('jobs: {hello: {shell: "true"}}')
    config = xxl_executor.load_config(str(file))
    needed = config.executor.drain_timeout + config.jobs["hello"].kill_grace + 10 + 5
    assert int(service["TimeoutStopSec"]) > needed
    # In the worst case a tree resists twice and the admin hangs.
    assert int(service["TimeoutStopSec"]) > needed + config.admin.timeout + xxl_executor.KILL_LIMIT


def test_restarts_alone_never_reach_the_start_limit(unit):
    """Else an executor whose port is taken for a while would stay down."""
    limits = unit["Unit"]
    assert int(limits["StartLimitIntervalSec"]) / int(unit["Service"]["RestartSec"]) < int(
        limits["StartLimitBurst"]
    )


def test_the_limit_of_open_files_is_enough_for_the_defaults(service, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("jobs: {}")
    executor = xxl_executor.load_config(str(file)).executor
    assert int(service["LimitNOFILE"]) >= executor.max_connections + 8 * executor.max_running + 64


def test_the_daemon_may_use_the_sockets_and_calls_it_needs(service):
    assert {"AF_UNIX", "AF_INET", "AF_INET6"} <= set(service["RestrictAddressFamilies"].split())
    assert (
        service["SystemCallFilter"] == "@system-service"
    )  # and nothing taken out, such as ~@resources
    # Each hides from the executor what it must end, or breaks common jobs; the unit says which.
    left_out = {
        "ProtectProc",
        "ProcSubset",
        "MemoryDenyWriteExecute",
        "PrivateUsers",
        "PrivateNetwork",
    }
    assert not left_out & service.keys()


def test_the_filter_has_the_calls_of_the_daemon():
    """Names in the groups of the installed systemd; another group than @system-service would need
    them too."""
    text = run(tool("systemd-analyze", "syscall-filter"), "syscall-filter").stdout
    groups = {
        block.split("\n")[0]: re.findall(r"^ +([@\w-]+)$", block, re.M)
        for block in re.split(r"\n(?=@)", text)
    }
    allowed, left = set(), ["@system-service", "@default"]
    while left:
        names = groups.get(left.pop(), [])
        allowed.update(names)
        left += [name for name in names if name.startswith("@")]
    needed = {
        "pidfd_open",
        "pidfd_send_signal",
        "prctl",
        "setsid",
        "sched_setaffinity",
        "setpriority",
        "flock",
        "mmap",
        "prlimit64",
        "vfork",
        "clone3",
        "ppoll",
        "epoll_wait",
        "recvmsg",
        "kill",
    }
    assert sorted(needed - allowed) == []


@pytest.mark.parametrize(
    "key",
    [
        "ProtectSystem",
        "ProtectHome",
        "PrivateTmp",
        "PrivateDevices",
        "UMask",
        "NoNewPrivileges",
        "CapabilityBoundingSet",
        "RestrictSUIDSGID",
        "RestrictNamespaces",
        "RestrictAddressFamilies",
        "SystemCallFilter",
        "SystemCallArchitectures",
        "LockPersonality",
        "RestrictRealtime",
    ],
)
def test_what_a_job_may_trip_over_says_how_to_relax_it(key):
    text = (UNITS / "xxl-executor.service").read_text(encoding="utf-8")
    [comment] = re.findall(rf"((?:^#.*\n)+)^{key}=", text, re.M)
    assert "Relax: " in comment


def test_the_service_does_not_need_the_socket(unit):
    assert not any("socket" in value for key, value in unit["Unit"].items() if "." not in key)
    assert "Sockets" not in unit["Service"]


def test_the_socket_listens_where_the_daemon_does_by_default(tmp_path):
    socket = parse(UNITS / "xxl-executor.socket")
    file = tmp_path / "config.yaml"
    file.write_text("jobs: {}")
    assert socket["Socket"]["ListenStream"] == str(
        xxl_executor.load_config(str(file)).executor.bind[1]
    )
    assert (
        socket["Socket"].get("Accept", "no") == "no"
        and socket["Install"]["WantedBy"] == "sockets.target"
    )


def test_the_token_of_the_unit_is_found(tmp_path, monkeypatch):
    """With the configuration of the README's ten minutes as it stands, and with none at all; a
    token that is configured is another one's business."""
    for directory in ("credentials", "etc"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "token").write_text(directory + "\n")
    monkeypatch.delenv("XXL_JOB_ACCESS_TOKEN", raising=False)
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/here")
    file = tmp_path / "config.yaml"

    def found(admin):
        file.write_text(f"admin: {admin}\njobs: {{}}")
        config = xxl_executor.load_config(str(file))
        assert config.executor.data_dir == "/var/lib/here"
        return config.admin.access_token

    ten_minutes = "{access_token: '${XXL_JOB_ACCESS_TOKEN:-}'}"
    for admin in (ten_minutes, "{}"):
        monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
        assert not found(admin)
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
        assert found(admin) == "credentials"
    assert found(f"{{access_token_file: {tmp_path}/etc/token}}") == "etc"
    monkeypatch.setenv("XXL_JOB_ACCESS_TOKEN", "own")
    assert found(ten_minutes) == "own"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert not found("{}"), "there is none"


def test_jobs_do_not_inherit_where_the_token_is():
    for name in ("CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS"):
        assert xxl_executor.SECRETS.fullmatch(name)


# -- what systemd says


def install(directory, drop_in):
    """Copies of the units that start this file with this Python, and the drop-in with every option
    switched on."""
    for name in NAMES:
        text = (UNITS / name).read_text(encoding="utf-8")
        for old, new in (
            ("/usr/bin/python3", sys.executable),
            ("/opt/xxl-executor/xxl_executor.py", str(PROGRAM)),
            ("/bin/kill", shutil.which("kill") or sys.executable),
        ):
            text = text.replace(old, new)
        (directory / name).write_text(text)
    if drop_in:
        (directory / "xxl-executor.service.d").mkdir()
        (directory / "xxl-executor.service.d" / "jobs-need-more.conf").write_text(drop_in)


def complaints(directory):
    """What systemd says about the units in `directory`; about others of this host it may say what
    it likes."""
    ran = run(
        tool("systemd-analyze", "verify"),
        "verify",
        *(str(directory / name) for name in NAMES),
        SYSTEMD_UNIT_PATH=f"{directory}:",
    )
    return [line for line in (ran.stdout + ran.stderr).splitlines() if USER in line]


@pytest.mark.parametrize("options", ["none", "as it is", "every option"])
def test_verify_is_clean(tmp_path, options):
    text = DROP_IN.read_text(encoding="utf-8")
    opened = re.sub(r"^#(?=[A-Z]\w+=)", "", text, flags=re.M)
    install(tmp_path, {"none": "", "as it is": text, "every option": opened}[options])
    assert complaints(tmp_path) == []


def test_the_test_above_sees(tmp_path):
    """A mistake in the drop-in or in the unit is reported, although the exit status of verify may
    be 0."""
    install(tmp_path, "[Service]\nReadWritPaths=/srv\n")
    [line] = complaints(tmp_path)
    assert "ReadWritPaths" in line


def test_the_exposure_is_at_most_3():
    analyze = tool("systemd-analyze", "--offline", "--threshold")
    ran = run(
        analyze, "security", "--offline=true", "--threshold=30", str(UNITS / "xxl-executor.service")
    )
    assert ran.returncode == 0, ran.stdout[-300:] + ran.stderr


def test_the_drop_in_gives_root_what_other_users_jobs_take():
    text = DROP_IN.read_text(encoding="utf-8")
    options = dict(re.findall(r"^([A-Z]\w+)=(.*)$", text, re.M))
    assert sorted(options) == ["CapabilityBoundingSet", "User"] and options["User"] == "root"
    assert {"CAP_SETUID", "CAP_SETGID", "CAP_CHOWN", "CAP_SYS_PTRACE", "CAP_KILL"} <= set(
        options["CapabilityBoundingSet"].split()
    )
    offered = set(re.findall(r"^#([A-Z]\w+)=", text, re.M))
    assert {
        "ProtectHome",
        "ReadWritePaths",
        "DeviceAllow",
        "MemoryMax",
        "CPUQuota",
        "TasksMax",
    } <= offered


def test_sysusers_would_create_the_user():
    ran = run(
        tool("systemd-sysusers", "--dry-run", "--root"),
        "--dry-run",
        "--root=/nonexistent",
        str(SYSUSERS),
    )
    assert ran.returncode == 0 and f"Creating user '{USER}'" in ran.stdout + ran.stderr, ran.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to others")
def test_user_and_rights_in_an_empty_root(tmp_path):
    sysusers, tmpfiles = tool("systemd-sysusers", "--root"), tool("systemd-tmpfiles", "--root")
    (tmp_path / "etc" / "xxl-executor" / "jobs.d").mkdir(parents=True)
    for name in ("config.yaml", "token", "environment", "jobs.d/more.yaml"):
        (tmp_path / "etc" / "xxl-executor" / name).touch(0o666)
    for command in (
        [sysusers, f"--root={tmp_path}", str(SYSUSERS)],
        [tmpfiles, "--create", f"--root={tmp_path}", str(TMPFILES)],
    ):
        ran = run(*command)
        assert ran.returncode == 0, ran.stderr
    lines = (tmp_path / "etc" / "passwd").read_text().splitlines()
    [fields] = [line.split(":") for line in lines if line.startswith(USER)]
    assert fields[5] == "/var/lib/xxl-executor" and fields[6].endswith("nologin")
    group = int(fields[3])

    def rights(name):
        found = (tmp_path / "etc" / "xxl-executor" / name).stat()
        return oct(stat.S_IMODE(found.st_mode)), found.st_uid, found.st_gid

    expected = {
        "": ("0o750", 0, group),
        "config.yaml": ("0o640", 0, group),
        "jobs.d": ("0o750", 0, group),
        "jobs.d/more.yaml": ("0o640", 0, group),
        "token": ("0o600", 0, 0),
        "environment": ("0o600", 0, 0),
    }
    assert {name: rights(name) for name in expected} == expected
