"""Section 2: every key, every problem with its file, line and path, and all problems at once."""

import dataclasses
import os

import pytest

from xxl_executor import (
    GLUE,
    AdminConfig,
    Config,
    ConfigError,
    ExecutorConfig,
    GlueConfig,
    JobConfig,
    find_config,
    load_config,
)

ONE_OF = "expected exactly one of shell, command and python, got"
DURATION = "expected a duration such as 90, 90s, 10m, 2h or 30d, got"
SIZE = "expected a size such as 4096, 512KiB or 64MiB, got"
ADDRESS = "expected an address such as http://10.0.0.5:8080/xxl-job-admin, got"
BIND = 'expected host:port such as "0.0.0.0:9999" or "[::]:9999", got'
JOB_KEYS = (
    "description, enabled, shell, command, python, isolation, timeout, kill_grace, cwd, env, user,"
    " interpreter, pythonpath, preload, max_delay, queue_limit, on_crash, background"
)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(text): the Config of a config.yaml in tmp_path, which is the current directory."""
    monkeypatch.chdir(tmp_path)

    def load(text):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        return load_config("config.yaml")

    return load


@pytest.fixture
def problems(load, tmp_path):
    """problems(text): the lines of its ConfigError, without the path of tmp_path."""

    def problems(text):
        with pytest.raises(ConfigError) as caught:
            load(text)
        return str(caught.value).replace(f"{tmp_path}/", "").split("\n")

    return problems


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# -- every key

KEYS = [  # (section, key, default, as written, value); {} is the directory of the file
    ("admin", "addresses", (), "[http://a:1/x, 'https://b/']", ("http://a:1/x", "https://b")),
    ("admin", "access_token", "", "secret", "secret"),
    ("admin", "access_token_file", None, "token", "{}/token"),
    ("admin", "connect_timeout", 3, "1.5s", 1.5),
    ("admin", "timeout", 10, "1m", 60),
    ("executor", "app_name", "xxl-job-executor-sample", "orders", "orders"),
    ("executor", "bind", ("0.0.0.0", 9999), "127.0.0.1:0", ("127.0.0.1", 0)),
    ("executor", "address", None, "http://10.1.2.3:80/x/", "http://10.1.2.3:80/x/"),
    ("executor", "data_dir", "{}/data", "/var/lib/x", "/var/lib/x"),
    ("executor", "max_running", 32, "1024", 1024),
    ("executor", "max_queued", 10_000, "1", 1),
    ("executor", "drain_timeout", 30, "0", 0),
    ("executor", "max_connections", 1024, "8", 8),
    ("executor", "log_limit", 64 << 20, "4KiB", 4096),
    ("executor", "log_format", "text", "json", "json"),
    ("executor", "log_retention", 30 * 86_400, "2d", 2 * 86_400),
    ("executor", "allow_no_token", False, "true", True),
    ("executor", "log_to_stdout", False, "true", True),
    ("executor", "watch_config", False, "true", True),
    ("glue", "enabled", False, "true", True),
    ("glue", "languages", tuple(GLUE), "[GLUE_SHELL, GLUE_PYTHON]", ("GLUE_SHELL", "GLUE_PYTHON")),
    ("glue", "timeout", 0, "10m", 600),
]


@pytest.mark.parametrize(
    "section, key, default, written, value",
    KEYS,
    ids=lambda value: None if isinstance(value, tuple) else str(value),
)
def test_key(load, tmp_path, section, key, default, written, value):
    def here(wanted):
        return wanted.replace("{}", str(tmp_path)) if isinstance(wanted, str) else wanted

    (tmp_path / "token").write_text("from-a-file\n", encoding="utf-8")
    assert getattr(getattr(load("{}"), section), key) == here(default)
    assert getattr(getattr(load(f"{section}:"), section), key) == here(default), (
        "an empty section has the defaults"
    )
    assert getattr(getattr(load(f"{section}: {{{key}: }}"), section), key) == here(default), (
        "an empty key has its default"
    )
    found = getattr(getattr(load(f"{section}: {{{key}: {written}}}"), section), key)
    assert (found, type(found)) == (here(value), type(here(value)))


JOB = [  # (other keys, key, default, as written, value)
    ("shell: x", "description", None, "Says hello", "Says hello"),
    ("shell: x", "enabled", True, "false", False),
    ("python: a:b", "preload", (), "[json, xml.dom]", ("json", "xml.dom")),
    ("", "shell", None, "echo hello", "echo hello"),
    (
        "",
        "command",
        None,
        "[find, /var/tmp, -mtime, 7, 1.5, '+7']",
        ("find", "/var/tmp", "-mtime", "7", "1.5", "+7"),
    ),
    ("", "python", None, "reports.daily:main", "reports.daily:main"),
    ("python: a:b", "isolation", "process", "thread", "thread"),
    ("shell: x", "timeout", 0, "10m", 600),
    ("shell: x", "kill_grace", 5, "0.25s", 0.25),
    ("shell: x", "cwd", "{}", "sub/../other", "{}/other"),
    (
        "shell: x",
        "env",
        {},
        "{A: text, B_2: 7, _c: true, D: 1.5, E: ''}",
        {"A": "text", "B_2": "7", "_c": "true", "D": "1.5", "E": ""},
    ),
    ("shell: x", "user", None, "nobody", "nobody"),
    ("python: a:b", "interpreter", None, "python3.12", "python3.12"),
    ("python: a:b", "interpreter", None, "venv/bin/python", "{}/venv/bin/python"),
    ("python: a:b", "pythonpath", (), "[lib, /opt/x]", ("{}/lib", "/opt/x")),
    ("shell: x", "max_delay", 0, "1h", 3600),
    ("shell: x", "queue_limit", 1000, "5", 5),
    ("shell: x", "on_crash", "fail", "rerun", "rerun"),
    ("shell: x", "background", "kill", "keep", "keep"),
]


@pytest.mark.parametrize(
    "others, key, default, written, value", JOB, ids=[f"{entry[1]}-{entry[3]}" for entry in JOB]
)
def test_job_key(load, tmp_path, others, key, default, written, value):
    def here(wanted):
        if isinstance(wanted, tuple):
            return tuple(map(here, wanted))
        return wanted.replace("{}", str(tmp_path)) if isinstance(wanted, str) else wanted

    def job(*keys):
        return load(f"jobs: {{hello: {{{', '.join(filter(None, keys))}}}}}").jobs["hello"]

    found = getattr(job(others, f"{key}: {written}"), key)
    assert (found, type(found)) == (here(value), type(here(value)))
    plain = others or ("command: [x]" if key != "command" else "shell: x")
    assert getattr(job(plain), key) == here(default)
    assert getattr(job(plain, f"{key}: "), key) == here(default), "an empty key has its default"


def test_the_tables_above_hold_every_key():
    def keys(kind):
        return {field.name for field in dataclasses.fields(kind) if field.metadata}

    for section, kind in (
        ("admin", AdminConfig),
        ("executor", ExecutorConfig),
        ("glue", GlueConfig),
    ):
        assert keys(kind) <= {key for name, key, *_ in KEYS if name == section}
    assert keys(JobConfig) == {key for _, key, *_ in JOB}
    assert JOB_KEYS.split(", ") == [
        field.name for field in dataclasses.fields(JobConfig) if field.metadata
    ]


def test_whole_example(load, tmp_path):
    config = load("""\
admin:
  addresses: [http://127.0.0.1:8080/xxl-job-admin]
executor: {app_name: sample}
glue: {enabled: false}
jobs:
  hello:
    shell: echo "hello $1, shard $2 of $3"
  cleanup:
    command: [find, /var/tmp/app, -mtime, "+7", -delete]
    timeout: 10m
  report:
    python: reports.daily:main
  2024:
    shell: x
""")
    assert isinstance(config, Config) and config.file == "config.yaml"
    assert list(config.jobs) == ["hello", "cleanup", "report", "2024"], "in the order of the file"
    assert config.jobs["2024"].name == "2024"
    assert [job.what for job in config.jobs.values()] == [
        'echo "hello $1, shard $2 of $3"',
        "find /var/tmp/app -mtime +7 -delete",
        "reports.daily:main",
        "x",
    ]
    assert config.jobs["cleanup"] == JobConfig(
        "cleanup",
        command=("find", "/var/tmp/app", "-mtime", "+7", "-delete"),
        isolation="process",
        timeout=600,
        enabled=True,
        preload=(),
        kill_grace=5,
        cwd=str(tmp_path),
        env={},
        pythonpath=(),
        max_delay=0,
        queue_limit=1000,
        on_crash="fail",
        background="kill",
    )


@pytest.mark.parametrize(
    "written, seconds",
    [
        ("90", 90),
        ("90s", 90),
        ("10m", 600),
        ("2h", 7200),
        ("30d", 2_592_000),
        ("'90'", 90),
        ("0", 0),
        ("0.5", 0.5),
        ("1.5h", 5400),
        ("0.001s", 0.001),
        ("36500d", 3_153_600_000),
        ("999999999d", 3_153_600_000),  # for ever
    ],
)
def test_durations(load, written, seconds):
    assert load(f"executor: {{drain_timeout: {written}}}").executor.drain_timeout == seconds


@pytest.mark.parametrize(
    "written, size",
    [
        ("4096", 4096),
        ("'4096'", 4096),
        ("10B", 10),
        ("512KiB", 512 << 10),
        ("64MiB", 64 << 20),
        ("2GiB", 2 << 30),
    ],
)
def test_sizes(load, written, size):
    assert load(f"executor: {{log_limit: {written}}}").executor.log_limit == size


# -- wrong values


@pytest.mark.parametrize(
    "written, got",
    [
        ("1:30", "the number 1:30"),
        ("-5s", 'the text "-5s"'),
        ("-5", "the number -5"),
        ("+5", "the number +5"),
        ("5x", 'the text "5x"'),
        ("1e3", 'the text "1e3"'),
        ("1.0e+3", "the number 1.0e+3"),
        ('""', 'the text ""'),
        ("10 m", 'the text "10 m"'),
        ("٣s", 'the text "٣s"'),
        ("٣", 'the text "٣"'),
        ("1_0", "the number 1_0"),
        ("' 7 '", 'the text " 7 "'),
        ("5S", 'the text "5S"'),
        ("5ms", 'the text "5ms"'),
        ("1h30m", 'the text "1h30m"'),
        (".5s", 'the text ".5s"'),
        ("5.", "the number 5."),
        ("0x10", "the number 0x10"),
        (".inf", "the number .inf"),
        (".nan", "the number .nan"),
        ("'5s\n\n'", 'the text "5s\n"'),
        ("true", "the truth value true"),
        ("[5]", "a list"),
        ("{s: 5}", "a mapping"),
        ("2024-01-01", "the date 2024-01-01"),
        ("12345678901d", 'the text "12345678901d"'),
        ("s", 'the text "s"'),
    ],
)
def test_bad_duration(problems, written, got):
    assert (
        "\n".join(problems(f"\njobs:\n  hello:\n    shell: x\n    timeout: {written}\n"))
        == f"config.yaml:5: jobs.hello.timeout: {DURATION} {got}"
    )


@pytest.mark.parametrize(
    "written, got",
    [
        ("64MB", 'the text "64MB"'),
        ("64mib", 'the text "64mib"'),
        ("64 MiB", 'the text "64 MiB"'),
        ("-1", "the number -1"),
        ("1.5GiB", 'the text "1.5GiB"'),
        ("1_000", "the number 1_000"),
        ("64K", 'the text "64K"'),
        ("٣MiB", 'the text "٣MiB"'),
        ('""', 'the text ""'),
        ("true", "the truth value true"),
        ("[]", "a list"),
    ],
)
def test_bad_size(problems, written, got):
    assert problems(f"executor:\n  log_limit: {written}\n") == [
        f"config.yaml:2: executor.log_limit: {SIZE} {got}"
    ]


@pytest.mark.parametrize(
    "text, lines",
    [
        # out of range
        (
            "executor: {max_running: 0}",
            ["1: executor.max_running: expected a whole number from 1 to 1024, got the number 0"],
        ),
        (
            "executor: {max_running: 1025}",
            [
                "1: executor.max_running: expected a whole number from 1 to 1024, got the number"
                " 1025"
            ],
        ),
        (
            "executor: {max_queued: 1000001}",
            [
                "1: executor.max_queued: expected a whole number from 1 to 1000000, got the number"
                " 1000001"
            ],
        ),
        (
            "executor: {max_connections: 7}",
            [
                "1: executor.max_connections: expected a whole number from 8 to 100000, got the"
                " number 7"
            ],
        ),
        ("executor: {log_limit: 0}", ["1: executor.log_limit: expected more than 0, got 0"]),
        (
            "executor: {log_retention: 0d}",
            ["1: executor.log_retention: expected more than 0, got 0d"],
        ),
        ("admin: {timeout: 0}", ["1: admin.timeout: expected more than 0, got 0"]),
        (
            "admin: {connect_timeout: 0s}",
            ["1: admin.connect_timeout: expected more than 0, got 0s"],
        ),
        # wrong types
        (
            "executor: {max_running: true}",
            [
                "1: executor.max_running: expected a whole number from 1 to 1024, got the truth"
                " value true"
            ],
        ),
        (
            "executor: {max_running: '8'}",
            ['1: executor.max_running: expected a whole number from 1 to 1024, got the text "8"'],
        ),
        (
            "executor: {max_running: 8.0}",
            ["1: executor.max_running: expected a whole number from 1 to 1024, got the number 8.0"],
        ),
        (
            "executor: {max_running: 1_0}",
            ["1: executor.max_running: expected a whole number from 1 to 1024, got the number 1_0"],
        ),
        (
            "executor: {max_running: 0x8}",
            ["1: executor.max_running: expected a whole number from 1 to 1024, got the number 0x8"],
        ),
        (
            "executor: {max_running: [8]}",
            ["1: executor.max_running: expected a whole number from 1 to 1024, got a list"],
        ),
        (
            "executor: {allow_no_token: 1}",
            ["1: executor.allow_no_token: expected true or false, got the number 1"],
        ),
        (
            "executor: {allow_no_token: 'true'}",
            ['1: executor.allow_no_token: expected true or false, got the text "true"'],
        ),
        (
            "executor: {app_name: 5}",
            ["1: executor.app_name: expected text, got the number 5: put it in quotes"],
        ),
        (
            "executor: {app_name: yes}",
            ["1: executor.app_name: expected text, got the truth value yes: put it in quotes"],
        ),
        (
            "executor: {app_name: 2024-01-01}",
            ["1: executor.app_name: expected text, got the date 2024-01-01: put it in quotes"],
        ),
        ("executor: {app_name: [a]}", ["1: executor.app_name: expected text, got a list"]),
        (
            "admin: {access_token: 12345}",
            ["1: admin.access_token: expected text: put it in quotes"],
        ),
        (
            "admin: {access_token: a b}",
            [
                "1: admin.access_token: expected printable ASCII without spaces, as an HTTP header"
                " carries it"
            ],
        ),
        (
            'admin: {access_token: "a\\nb"}',
            [
                "1: admin.access_token: expected printable ASCII without spaces, as an HTTP header"
                " carries it"
            ],
        ),
        ("admin: [a]", ["1: admin: expected a mapping, got a list"]),
        (
            "admin: {addresses: [http://admin..corp:1/x]}",
            [
                "1: admin.addresses: expected an address such as http://10.0.0.5:8080/xxl-job-admin,"
                ' got the text "http://admin..corp:1/x"'
            ],
        ),
        (
            f"executor: {{bind: '{'a' * 64}.corp:9999'}}",
            [f"1: executor.bind: {'a' * 64}.corp is no name of a host"],
        ),
        (
            'jobs: {"caf\\udce9": {shell: x}}',
            ["1: jobs.caf?: holds half of a character: write all of it"],
        ),
        (
            'jobs: {a: {shell: "caf\\udce9"}}',
            ["1: jobs.a.shell: half of a character (a lone surrogate): write all of it"],
        ),
        ("executor: 5", ["1: executor: expected a mapping, got the number 5"]),
        ("glue: true", ["1: glue: expected a mapping, got the truth value true"]),
        (
            "jobs: [hello]",
            [
                "1: jobs: expected a mapping of job names, got a list: write NAME: {shell: ...} for"
                " each job"
            ],
        ),
        ("include: jobs.d/*.yaml", ['1: include: expected a list, got the text "jobs.d/*.yaml"']),
        ("include: [7]", ["1: include: expected text, got the number 7: put it in quotes"]),
        (
            "jobs: {hello: echo}",
            ['1: jobs.hello: expected a mapping, got the text "echo": write {shell: ...}'],
        ),
        ("jobs: {hello: [shell, x]}", ["1: jobs.hello: expected a mapping, got a list"]),
        (
            "jobs: {hello: {shell: true}}",
            ["1: jobs.hello.shell: expected text, got the truth value true: put it in quotes"],
        ),
        ("jobs: {hello: {shell: [a, b]}}", ["1: jobs.hello.shell: expected text, got a list"]),
        (
            "jobs: {hello: {command: ls -l}}",
            [
                "1: jobs.hello.command: expected a list such as [python3, report.py], got the text"
                ' "ls -l": for a line of the shell write shell:'
            ],
        ),
        (
            "jobs: {hello: {command: {a: b}}}",
            ["1: jobs.hello.command: expected a list, got a mapping"],
        ),
        (
            "jobs: {hello: {command: []}}",
            [
                "1: jobs.hello.command: expected a list with a program and its arguments, got an"
                " empty one"
            ],
        ),
        (
            "jobs: {hello: {command: ['', x]}}",
            [
                "1: jobs.hello.command: expected a list with a program and its arguments, got an"
                " empty one"
            ],
        ),
        (
            "jobs: {hello: {command: [ls, true]}}",
            ["1: jobs.hello.command: expected text or a number, got the truth value true"],
        ),
        (
            "jobs: {hello: {command: [ls, [a]]}}",
            ["1: jobs.hello.command: expected text or a number, got a list"],
        ),
        (
            "jobs: {hello: {shell: x, env: [A=b]}}",
            ["1: jobs.hello.env: expected NAME: value pairs, got a list"],
        ),
        (
            "jobs: {hello: {shell: x, env: {A: [b]}}}",
            ["1: jobs.hello.env.A: expected text or a number, got a list"],
        ),
        (
            "jobs: {hello: {shell: x, on_crash: retry}}",
            ['1: jobs.hello.on_crash: expected fail or rerun, got the text "retry"'],
        ),
        (
            "jobs: {hello: {shell: x, background: true}}",
            ["1: jobs.hello.background: expected kill or keep, got the truth value true"],
        ),
        (
            "jobs: {hello: {python: a:b, isolation: fork}}",
            ['1: jobs.hello.isolation: expected process or thread, got the text "fork"'],
        ),
        (
            "jobs: {hello: {python: a:b, pythonpath: lib}}",
            ['1: jobs.hello.pythonpath: expected a list, got the text "lib"'],
        ),
        (
            "jobs: {hello: {shell: x, queue_limit: 0}}",
            [
                "1: jobs.hello.queue_limit: expected a whole number from 1 to 1000000, got the"
                " number 0"
            ],
        ),
        # what a job runs
        ("jobs:\n  a:\n    timeout: 5", [f"2: jobs.a: {ONE_OF} none"]),
        ("jobs: {a: }", [f"1: jobs.a: {ONE_OF} none"]),
        ("jobs: {a: {shell: ''}}", [f"1: jobs.a: {ONE_OF} none"]),
        ("jobs: {a: {shell: x, command: [x]}}", [f"1: jobs.a: {ONE_OF} shell and command"]),
        (
            "jobs: {a: {shell: x, command: [x], python: a:b}}",
            [f"1: jobs.a: {ONE_OF} shell and command and python"],
        ),
        (
            (
                "jobs:\n  a:\n    shell: x\n    interpreter: python3\n    isolation: process\n   "
                " pythonpath: []\n"
            ),
            [
                "4: jobs.a.interpreter: only a python job has it: remove it",
                "5: jobs.a.isolation: only a python job has it: remove it",
                "6: jobs.a.pythonpath: only a python job has it: remove it",
            ],
        ),
        (
            "jobs: {a: {command: [x], interpreter: python3}}",
            ["1: jobs.a.interpreter: only a python job has it: remove it"],
        ),
        (
            (
                "jobs:\n  a:\n    python: a:b\n    isolation: thread\n    user: nobody\n    cwd:"
                " .\n    env: {}\n    interpreter: x\n    background: kill\n"
            ),
            [
                f"{line}: jobs.a.{key}: has no effect with isolation: thread: remove it, or use"
                " process"
                for line, key in enumerate(("user", "cwd", "env", "interpreter", "background"), 5)
            ],
        ),
        # env names
        (
            "jobs: {a: {shell: x, env: {1A: b}}}",
            ['1: jobs.a.env: "1A" is no name of an environment variable'],
        ),
        (
            "jobs: {a: {shell: x, env: {A-B: b}}}",
            ['1: jobs.a.env: "A-B" is no name of an environment variable'],
        ),
        (
            "jobs: {a: {shell: x, env: {'': b}}}",
            ['1: jobs.a.env: "" is no name of an environment variable'],
        ),
        (
            "jobs: {a: {shell: x, env: {A=B: b}}}",
            ['1: jobs.a.env: "A=B" is no name of an environment variable'],
        ),
        (
            "jobs: {a: {shell: x, env: {Ä: b}}}",
            ['1: jobs.a.env: "Ä" is no name of an environment variable'],
        ),
        (  # each is told
            "jobs:\n  a:\n    shell: x\n    env:\n      A-B: b\n      C: [d]\n      1E: f\n",
            [
                '5: jobs.a.env: "A-B" is no name of an environment variable',
                "6: jobs.a.env.C: expected text or a number, got a list",
                '7: jobs.a.env: "1E" is no name of an environment variable',
            ],
        ),
    ],
)
def test_wrong_value(problems, text, lines):
    assert problems(text) == [f"config.yaml:{line}" for line in lines]


def test_a_problem_names_the_line_of_its_item(problems):
    """A list or an `env` may be long."""
    assert problems("""\
admin:
  addresses:
    - http://a
    - nonsense
jobs:
  hello:
    command:
      - ls
      - true
    env:
      A: 1
      B: [2]
      C-D: 3
""") == [
        f'config.yaml:4: admin.addresses: {ADDRESS} the text "nonsense"',
        ("config.yaml:9: jobs.hello.command: expected text or a number, got the truth value true"),
        "config.yaml:12: jobs.hello.env.B: expected text or a number, got a list",
        'config.yaml:13: jobs.hello.env: "C-D" is no name of an environment variable',
    ]


def test_a_missing_value_is_named(problems):
    assert problems("jobs:\n  hello:\n    shell: x\n    env: {A: }\n") == [
        "config.yaml:4: jobs.hello.env.A: expected text or a number, got nothing"
    ]


@pytest.mark.parametrize(
    "value",
    [
        "reports",
        "reports.daily",
        ":main",
        "a:",
        "a:b:c",
        "a-b:c",
        "a:b.c",
        "1a:b",
        "a..b:c",
        ".a:b",
        "a :b",
        "a:b()",
        "",
    ],
)
def test_bad_entry_point(problems, value):
    assert problems(f'jobs:\n  hello:\n    python: "{value}"\n') == [
        'config.yaml:3: jobs.hello.python: expected module:function such as "reports.daily:main", '
        f'got the text "{value}"'
    ]


@pytest.mark.parametrize("value", ["a:b", "a.b_2.c:_d", "模块:函数"])
def test_entry_point(load, value):
    assert load(f"jobs: {{hello: {{python: '{value}'}}}}").jobs["hello"].python == value


# -- unknown and duplicate keys


@pytest.mark.parametrize(
    "text, lines",
    [
        ("executr: {}", ['1: executr: unknown key, did you mean "executor"?']),
        ("jbs: {}", ['1: jbs: unknown key, did you mean "jobs"?']),
        (
            "zzz: {}",
            ["1: zzz: unknown key, known keys: admin, executor, glue, scripts, include, jobs"],
        ),
        (
            "admin:\n  adresses: []\n  zzz: 5",
            [
                '2: admin.adresses: unknown key, did you mean "addresses"?',
                (
                    "3: admin.zzz: unknown key, known keys: addresses, access_token,"
                    " access_token_file, connect_timeout, timeout"
                ),
            ],
        ),
        ("executor: {appname: a}", ['1: executor.appname: unknown key, did you mean "app_name"?']),
        ("glue: {enable: true}", ['1: glue.enable: unknown key, did you mean "enabled"?']),
        (
            "jobs:\n  hello:\n    shell: x\n    timout: 5",
            ['4: jobs.hello.timout: unknown key, did you mean "timeout"?'],
        ),
        (
            "jobs: {hello: {shell: x, zzz: 5}}",
            [f"1: jobs.hello.zzz: unknown key, known keys: {JOB_KEYS}"],
        ),
        (
            "jobs: {hello: {shell: x, x-note: 5}}",
            [f"1: jobs.hello.x-note: unknown key, known keys: {JOB_KEYS}"],
        ),
        ("jobs: {}\nadmin: {}\njobs: {}", ["3: jobs: duplicate key, first on line 1: remove one"]),
        (
            "admin:\n  timeout: 5\n  timeout: 6\n  timeout: 7",
            [
                "3: admin.timeout: duplicate key, first on line 2: remove one",
                "4: admin.timeout: duplicate key, first on line 2: remove one",
            ],
        ),
        (
            "jobs:\n  a: {shell: x}\n  b: {shell: y}\n  a: {shell: z}",
            ["4: jobs.a: duplicate key, first on line 2: remove one"],
        ),
        (
            "jobs:\n  a:\n    shell: x\n    'shell': y",
            ["4: jobs.a.shell: duplicate key, first on line 3: remove one"],
        ),
        (
            "jobs:\n  a:\n    shell: x\n    env:\n      A: 1\n      A: 2",
            ["6: jobs.a.env.A: duplicate key, first on line 5: remove one"],
        ),
        ("[a]: 5", ["1: expected a name as key, got a list"]),
        ("jobs:\n  ? {a: b}\n  : {shell: x}", ["2: jobs: expected a name as key, got a mapping"]),
    ],
)
def test_unknown_and_duplicate_keys(problems, text, lines):
    assert problems(text) == [f"config.yaml:{line}" for line in lines]


def test_all_problems_at_once_in_the_order_of_the_lines(problems):
    assert problems("""\
jobs:
  b:
    timeout: 5x
    shel: y
  a:
    shell: x
    command: [x]
executor:
  max_running: true
  max_runing: 5
admin:
  access_token: [a]
  timeout: 1
  timeout: 0
""") == [
        f'config.yaml:3: jobs.b.timeout: {DURATION} the text "5x"',
        'config.yaml:4: jobs.b.shel: unknown key, did you mean "shell"?',
        f"config.yaml:5: jobs.a: {ONE_OF} shell and command",
        (
            "config.yaml:9: executor.max_running: expected a whole number from 1 to 1024, got"
            " the truth value true"
        ),
        'config.yaml:10: executor.max_runing: unknown key, did you mean "max_running"?',
        "config.yaml:12: admin.access_token: expected text, got a list",
        "config.yaml:14: admin.timeout: duplicate key, first on line 13: remove one",
        "config.yaml:14: admin.timeout: expected more than 0, got 0",
    ]


# -- environment variables


@pytest.fixture
def variables(monkeypatch):
    for name, value in {
        "T_TEXT": "word",
        "T_NUMBER": "12",
        "T_FLAG": "true",
        "T_EMPTY": "",
        "T_URLS": "http://a/x/, http://b",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("T_UNSET", raising=False)


@pytest.mark.usefixtures("variables")
def test_variables(load, tmp_path):
    config = load("""\
admin:
  addresses: ${T_URLS}
  access_token: ${T_UNSET:-}
executor:
  app_name: a-${T_TEXT}-${T_UNSET:-b}-${T_EMPTY:-c}-${T_TEXT:-d}
  data_dir: ${T_TEXT}/data
  max_running: ${T_NUMBER}
  max_queued: ${T_UNSET:-77}
  drain_timeout: ${T_NUMBER}m
  allow_no_token: ${T_FLAG}
jobs:
  raw:
    description: $${T_TEXT} $T_TEXT ${} ${T_TEXT
    shell: echo ${T_TEXT} ${T_UNSET} $${T_TEXT}
  more:
    description: "${T_UNSET:-a:b-c \\"d\\"}"
    command: ["echo", "${T_TEXT}", "${T_NUMBER}", "$${T_TEXT}"]
    env: {A: "${T_TEXT}", B: "x${T_UNSET:-}y", C: "${T_NUMBER}"}
    timeout: ${T_NUMBER}
    on_crash: ${T_UNSET:-rerun}
""")
    assert config.admin.addresses == ("http://a/x", "http://b")
    assert not config.admin.access_token
    executor = config.executor
    assert (executor.app_name, executor.data_dir) == (
        "a-word-b-c-word",
        str(tmp_path / "word/data"),
    )
    assert (
        executor.max_running,
        executor.max_queued,
        executor.drain_timeout,
        executor.allow_no_token,
    ) == (12, 77, 720, True)
    raw, more = config.jobs.values()
    assert raw.description == "${T_TEXT} $T_TEXT ${} ${T_TEXT"
    assert raw.shell == "echo ${T_TEXT} ${T_UNSET} $${T_TEXT}", (
        "the shell expands it when the job runs"
    )
    assert more.description == 'a:b-c "d"'
    assert more.command == ("echo", "word", "12", "${T_TEXT}")
    assert more.env == {"A": "word", "B": "xy", "C": "12"}
    assert (more.timeout, more.on_crash) == (12, "rerun")


@pytest.mark.usefixtures("variables")
def test_bad_variables(problems):
    missing = "the environment variable {0} is empty or not set: set it, or write ${{{0}:-default}}"
    assert problems("""\
admin:
  access_token: ${T_UNSET}
  addresses: ["${T_EMPTY}"]
executor:
  app_name: a${T_EMPTY}b
  max_running: ${T_TEXT}
  drain_timeout: ${T_FLAG}
  max_queued: "${T_NUMBER}"
jobs:
  a:
    command: [echo, "${T_UNSET}"]
  b:
    shell: ${T_UNSET}
    env: {A: "${T_UNSET}"}
""") == [
        f"config.yaml:2: admin.access_token: {missing.format('T_UNSET')}",
        f"config.yaml:3: admin.addresses: {missing.format('T_EMPTY')}",
        f"config.yaml:5: executor.app_name: {missing.format('T_EMPTY')}",
        (
            "config.yaml:6: executor.max_running: expected a whole number from 1 to 1024, got"
            ' the text "word"'
        ),
        f"config.yaml:7: executor.drain_timeout: {DURATION} the truth value true",
        (
            "config.yaml:8: executor.max_queued: expected a whole number from 1 to 1000000, got"
            ' the text "12"'
        ),
        f"config.yaml:11: jobs.a.command: {missing.format('T_UNSET')}",
        f"config.yaml:14: jobs.b.env.A: {missing.format('T_UNSET')}",
    ]


@pytest.mark.parametrize(
    "value",
    ["123456", "1e5", "0x1F", "true", "null", "~", "2024-01-01", "1:30", "=", "<<", "-", "word"],
)
def test_a_variable_is_text_where_text_is_needed(load, monkeypatch, value):
    """A token of digits is a token; one that reads "null" must not mean that there is none."""
    monkeypatch.setenv("T_TOKEN", value)
    config = load("""\
admin:
  access_token: ${T_TOKEN}
jobs:
  a:
    shell: x
    description: ${T_TOKEN}
    env:
      A: ${T_TOKEN}
""")
    assert (config.admin.access_token, config.jobs["a"].description, config.jobs["a"].env) == (
        value,
        value,
        {"A": value},
    )


# -- the admin's addresses, bind, the token


@pytest.mark.parametrize(
    "written, addresses",
    [
        ("[]", ()),
        ("''", ()),
        ("http://a:8080/xxl-job-admin/", ("http://a:8080/xxl-job-admin",)),
        ("[http://a///]", ("http://a",)),
        (
            "http://a/x/,https://b/y ,, http://[::1]:80/ ,",
            ("http://a/x", "https://b/y", "http://[::1]:80"),
        ),
        ("\n  - http://a\n  - http://b/", ("http://a", "http://b")),
    ],
)
def test_addresses(load, written, addresses):
    assert load(f"admin:\n  addresses: {written}\n").admin.addresses == addresses


@pytest.mark.parametrize(
    "url",
    [
        "10.0.0.5:8080",
        "ftp://a/x",
        "http://",
        "http:///x",
        "http://a:0/",
        "http://a:99999",
        "http://a:x/",
        "http://:80",
        "//a/x",
        "http://a:1 http://b:2",
        "http://[::1",
    ],
)
def test_bad_address(problems, url):
    assert problems(f"admin:\n  timeout: 5\n  addresses: ['{url}']\n") == [
        f'config.yaml:3: admin.addresses: {ADDRESS} the text "{url}"'
    ]
    assert problems(f"admin:\n  addresses: 'http://good,{url}'\n") == [
        f'config.yaml:2: admin.addresses: {ADDRESS} the text "{url}"'
    ]
    assert problems(f"executor:\n  address: '{url}'\n") == [
        f'config.yaml:2: executor.address: {ADDRESS} the text "{url}"'
    ]


def test_address_of_another_type(problems):
    assert problems("admin: {addresses: 5}") == [
        "config.yaml:1: admin.addresses: expected a list, got the number 5"
    ]
    assert problems("admin: {addresses: [5]}") == [
        "config.yaml:1: admin.addresses: expected text, got the number 5: put it in quotes"
    ]


@pytest.mark.parametrize(
    "written, bind",
    [
        ("0.0.0.0:9999", ("0.0.0.0", 9999)),
        ("'[::]:9999'", ("::", 9999)),
        ("'[::1]:0'", ("::1", 0)),
        ("':9999'", ("0.0.0.0", 9999)),
        ("localhost:65535", ("localhost", 65535)),
        ("my-host.example:1", ("my-host.example", 1)),
    ],
)
def test_bind(load, written, bind):
    assert load(f"executor: {{bind: {written}}}").executor.bind == bind


@pytest.mark.parametrize(
    "value",
    [
        "host:99999",
        "host:65536",
        "host:",
        "host",
        "9999",
        "::1:9999",
        "[::1]",
        "[host]:1",
        "host:+5",
        "host:1_0",
        "host:٣",
        "host:-1",
        "",
        "[]:1",
        "http://host:1",
        "host:1/",
    ],
)
def test_bad_bind(problems, value):
    assert problems(f"executor:\n  bind: '{value}'\n") == [
        f'config.yaml:2: executor.bind: {BIND} the text "{value}"'
    ]


@pytest.mark.parametrize("written", ['""', '"a\\nb"', '"a\\rb"', "执行器", '"a b "'])
def test_app_name_must_fit_into_a_header(problems, written):
    """It is sent as XXL-JOB-APPNAME with every call; a bad one would fail every heartbeat."""
    [line] = problems(f"executor:\n  app_name: {written}\n")
    assert line.startswith("config.yaml:2: executor.app_name: expected ")


def test_access_token_file(load, problems, tmp_path):
    write(tmp_path / "secrets/token", "  s3cret \n")
    admin = load("admin: {access_token_file: secrets/token}").admin
    assert (admin.access_token, admin.access_token_file) == (
        "s3cret",
        str(tmp_path / "secrets/token"),
    )
    assert (
        load("admin: {access_token: '', access_token_file: secrets/token}").admin.access_token
        == "s3cret"
    )
    assert problems("admin:\n  access_token: a\n  access_token_file: secrets/token\n") == [
        "config.yaml:3: admin.access_token_file: access_token is set too: keep one of them"
    ]


@pytest.mark.parametrize(
    "content",
    [None, b"\xff\xfe", b"a b", "密".encode(), b""],
    ids=["missing", "not UTF-8", "space", "not ASCII", "empty"],
)
def test_bad_access_token_file(problems, tmp_path, content):
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    [line] = problems("admin:\n  timeout: 5\n  access_token_file: token\n")
    assert line.startswith("config.yaml:3: admin.access_token_file: ")


@pytest.mark.parametrize(
    "text",
    [
        "admin:\n  access_token_file: {}\n",
        "executor:\n  data_dir: {}\n",
        "executor:\n  app_name: {}\n",
        "jobs:\n  a: {{shell: {}}}\n",
        "jobs:\n  a: {{command: [{}]}}\n",
        "jobs:\n  a: {{shell: x, cwd: {}}}\n",
        "jobs:\n  a: {{shell: x, env: {{A: {}}}}}\n",
    ],
)
def test_nul_is_refused(problems, text):
    """No path, argument or variable of Linux can hold one; found now, not when the job runs at
    night."""
    [line] = problems(text.format('"a\\0b"'))
    assert line.startswith("config.yaml:2: ")


# -- includes and relative paths


def test_includes(load, tmp_path):
    write(
        tmp_path / "jobs.d/20.yaml",
        "x-base: &base {timeout: 5}\njobs:\n  late: {<<: *base, shell: x}\n",
    )
    write(tmp_path / "jobs.d/10.yaml", "jobs:\n  early: {shell: x}\n  middle: {shell: y}\n")
    write(tmp_path / "jobs.d/note.txt", "not YAML: [")
    write(tmp_path / "other/one.yaml", "jobs:\n")
    config = load("include: [jobs.d/*.yaml, other/one.yaml]\njobs: {own: {shell: x}}\n")
    assert list(config.jobs) == ["own", "early", "middle", "late"]
    assert config.jobs["late"].timeout == 5


def test_an_include_without_a_file(load):
    """A pattern may match none; a file that is named must be there."""
    include = "jobs: {own: {shell: x}}\ninclude:\n  - jobs.d/*.yaml\n"
    assert list(load(include).jobs) == ["own"]
    with pytest.raises(ConfigError) as caught:
        load(include + "  - one.yaml\n")
    told = "include: one.yaml does not exist: remove it, or write it"
    assert str(caught.value) == f"config.yaml:4: {told}"


def test_relative_paths_count_from_the_file_that_names_them(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    write(
        tmp_path / "a/b/jobs.yaml",
        """\
jobs:
  deep: {python: "m:f", pythonpath: [., ../lib], cwd: work, interpreter: ./venv/bin/python}
  plain: {shell: x}
  home: {shell: x, cwd: ~/work}
  absolute: {shell: x, cwd: /srv}
""",
    )
    load(
        "jobs: {own: {shell: x, cwd: work}}\ninclude: [a/b/*.yaml]\nexecutor: {data_dir: ../data}\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for config in (load_config("../config.yaml"), load_config(str(tmp_path / "config.yaml"))):
        assert config.executor.data_dir == str(tmp_path.parent / "data")
        assert config.jobs["own"].cwd == str(tmp_path / "work")
        deep = config.jobs["deep"]
        assert deep.cwd == str(tmp_path / "a/b/work")
        assert deep.pythonpath == (str(tmp_path / "a/b"), str(tmp_path / "a/lib"))
        assert deep.interpreter == str(tmp_path / "a/b/venv/bin/python")
        assert config.jobs["plain"].cwd == str(tmp_path / "a/b")
        assert config.jobs["home"].cwd == "/home/somebody/work"
        assert config.jobs["absolute"].cwd == "/srv"


def test_problems_in_included_files(problems, tmp_path):
    write(tmp_path / "jobs.d/1.yaml", "jobs:\n  own: {shell: x}\n  two: {shel: y}\n")
    write(tmp_path / "jobs.d/2.yaml", "jobs:\n  two: {shell: x}\nadmin: {}\ninclude: [x]\nzzz: 5\n")
    write(tmp_path / "jobs.d/3.yaml", "jobs:\n  three: [\n")
    assert problems(
        "jobs:\n  own: {shell: x}\ninclude: [jobs.d/*]\nexecutor: {max_running: 0}\n"
    ) == [
        "jobs.d/1.yaml:2: jobs.own: defined twice, first at config.yaml:2: rename or remove one",
        'jobs.d/1.yaml:3: jobs.two.shel: unknown key, did you mean "shell"?',
        "jobs.d/2.yaml:2: jobs.two: defined twice, first at jobs.d/1.yaml:3: rename or remove one",
        "jobs.d/2.yaml:3: admin: an included file may hold only jobs: move it to config.yaml",
        "jobs.d/2.yaml:4: include: an included file may hold only jobs: move it to config.yaml",
        "jobs.d/2.yaml:5: zzz: an included file may hold only jobs: move it to config.yaml",
        (
            "jobs.d/3.yaml:3: not YAML: expected the node content, but found '<stream end>': close"
            " the quotes or brackets that are open here"
        ),
        (
            "config.yaml:4: executor.max_running: expected a whole number from 1 to 1024, got the"
            " number 0"
        ),
    ]


@pytest.mark.parametrize("content", ["", "[a]", "text"])
def test_an_included_file_that_holds_no_mapping(problems, tmp_path, content):
    write(tmp_path / "more.yaml", content)
    [line] = problems("include: [more.yaml]")
    assert line.startswith("more.yaml:1: expected a mapping with the key")


# -- files that cannot be read, and YAML


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "none.yaml"))
    assert (
        str(caught.value)
        == f"{tmp_path}/none.yaml: cannot be read: No such file or directory: give a readable file"
        " with -c FILE"
    )


def test_directory_as_file(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path))
    assert (
        str(caught.value)
        == f"{tmp_path}: cannot be read: Is a directory: give a readable file with -c FILE"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path):
    (tmp_path / "config.yaml").touch(0o000)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "config.yaml"))
    assert (
        str(caught.value)
        == f"{tmp_path}/config.yaml: cannot be read: Permission denied: give a readable file with"
        " -c FILE"
    )


def test_not_utf8(tmp_path):
    """The line is told however far behind it is."""
    text = "# größe\n" * 5000
    (tmp_path / "config.yaml").write_bytes(
        text.encode() + "jobs: {大小: {shell: x}}\n".encode("gbk") + text.encode()
    )
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "config.yaml"))
    assert (
        str(caught.value)
        == f"{tmp_path}/config.yaml:5001: this is not UTF-8: save the file as UTF-8"
    )


def test_byte_order_mark_and_crlf(load):
    assert list(load("\ufeffjobs:\r\n  hello:\r\n    shell: x\r\n").jobs) == ["hello"]


@pytest.mark.parametrize(
    "text, line",
    [
        ("", "1: expected a mapping with the keys admin, executor and jobs, got an empty file"),
        (
            "# only a comment\n",
            "1: expected a mapping with the keys admin, executor and jobs, got an empty file",
        ),
        ("- jobs\n", "1: expected a mapping with the keys admin, executor and jobs, got a list"),
        (
            "hello\n",
            '1: expected a mapping with the keys admin, executor and jobs, got the text "hello"',
        ),
        (
            "jobs:\n\thello: {}\n",
            (
                "2: not YAML: found character '\\t' that cannot start any token: write spaces"
                " instead of tabs"
            ),
        ),
        (
            "jobs:\n  a: {shell: x}\n b: {shell: x}\n",
            (
                "3: not YAML: expected <block end>, but found '<block mapping start>': indent the"
                " lines of one level alike, and put a value with special characters into quotes or"
                ' below a "|"'
            ),
        ),
        (
            "jobs:\n  a: [\n",
            (
                "3: not YAML: expected the node content, but found '<stream end>': close the quotes"
                " or brackets that are open here"
            ),
        ),
        (
            "jobs:\n  a: 'open\n",
            (
                "3: not YAML: found unexpected end of stream: close the quotes or brackets that are"
                " open here"
            ),
        ),
        (
            "jobs:\n  a: {shell: echo: b: c}\n",
            (
                "2: not YAML: expected ',' or '}', but got ':': close the brackets that are open"
                " here, or put a value with special characters into quotes"
            ),
        ),
        (
            "jobs:\n  a:\n    shell: echo a: b\n",
            (
                '3: not YAML: mapping values are not allowed here: put a value with ": " in it into'
                ' quotes or below a "|", or look for a missing colon or a wrong indent here or in'
                " the line above"
            ),
        ),
        (
            "jobs:\n  a:\n    shell: x\n    timeout 3\n",
            """5: not YAML: could not find expected ':': put a value with ": " in it into """
            'quotes or below a "|", or look for a missing colon or a wrong indent here or in the'
            " line above",
        ),
        (
            "jobs: *none\n",
            """1: not YAML: found undefined alias 'none': put a value with special characters into quotes or below a "|\"""",
        ),
        (
            "jobs:\n  a:\n    shell: @x\n",
            """3: not YAML: found character '@' that cannot start any token: put a value with special """
            'characters into quotes or below a "|"',
        ),
        (
            'jobs:\n  a:\n    shell: "\\d"\n',
            (
                "3: not YAML: found unknown escape character 'd': take single quotes, in which a"
                " backslash is only a backslash"
            ),
        ),
        ("jobs: {}\n---\njobs: {}\n", '2: not YAML: found another document: remove the line "---"'),
        (
            "jobs: {}\nx: {a: \x01}\n",
            "2: not YAML: it holds the control character #x0001: remove it",
        ),
    ],
    ids=lambda value: None,
)
def test_not_yaml(problems, text, line):
    assert problems(text) == [f"config.yaml:{line}"]


def test_endless_nesting(problems):
    assert problems("jobs: " + "[" * 5000) == [
        "config.yaml: not YAML: it is nested too deeply: look for brackets that are never closed"
    ]


def test_anchors_and_merge_keys(load):
    config = load("""\
x-base: &base {timeout: 5, kill_grace: 1, env: &env {A: 1}}
x-more: &more {timeout: 7, max_delay: 9}
jobs:
  plain: {<<: *base, shell: x}
  own: {<<: *base, shell: x, timeout: 6}
  before: {timeout: 6, <<: *base, shell: x}
  both: {<<: [*more, *base], shell: x}
  chain: &chain
    <<: *base
    shell: x
    timeout: 8
    env: {<<: *env, B: 2}
  again: *chain
  last: {<<: *chain, description: d}
""")
    assert {
        name: (job.timeout, job.kill_grace, job.max_delay, job.env)
        for name, job in config.jobs.items()
    } == {
        "plain": (5, 1, 0, {"A": "1"}),
        "own": (6, 1, 0, {"A": "1"}),
        "before": (6, 1, 0, {"A": "1"}),
        "both": (7, 1, 9, {"A": "1"}),
        "chain": (8, 1, 0, {"A": "1", "B": "2"}),
        "again": (8, 1, 0, {"A": "1", "B": "2"}),
        "last": (8, 1, 0, {"A": "1", "B": "2"}),
    }


def test_a_merged_env_serves_many_jobs(load):
    """An override is no duplicate, however often the mapping is used."""
    config = load("""\
x-base: &base {A: 1, B: 1}
x-env: &env {<<: *base, B: 2}
jobs:
  one: {shell: x, env: *env}
  two: {shell: x, env: *env}
""")
    assert [job.env for job in config.jobs.values()] == [{"A": "1", "B": "2"}] * 2


def test_problem_in_a_merged_mapping_names_its_own_line(problems):
    assert problems(
        "x-base: &base\n  timeot: 5\njobs:\n  a: {<<: *base, shell: x}\n  b: {<<: *base, shell:"
        " x}\n"
    ) == [
        'config.yaml:2: jobs.a.timeot: unknown key, did you mean "timeout"?',
        'config.yaml:2: jobs.b.timeot: unknown key, did you mean "timeout"?',
    ]


def test_merge_of_no_mapping(problems):
    assert problems("jobs:\n  a: {<<: 5, shell: x}\n") == [
        "config.yaml:2: jobs.a.<<: expected a mapping, or a list of mappings, to merge, got the"
        " number 5"
    ]


@pytest.mark.parametrize(
    "text, lines",
    [
        ("jobs: &all\n  a: *all\n", ["2: jobs.a.a: unknown key, " + f"known keys: {JOB_KEYS}"]),
        (
            "jobs:\n  a:\n    command: &all [ls, *all]\n",
            ["3: jobs.a.command: expected text or a number, got a list"],
        ),
        (
            "jobs:\n  a:\n    shell: x\n    env: &all {A: *all}\n",
            ["4: jobs.a.env.A: expected text or a number, got a mapping"],
        ),
    ],
)
def test_recursive_alias(problems, text, lines):
    assert problems(text) == [f"config.yaml:{line}" for line in lines]


def test_a_recursive_merge_is_a_mistake(problems):
    assert problems("jobs:\n  a: &all {<<: *all, shell: x}\n") == [
        "config.yaml:2: jobs.a.<<: merges what it is a part of: remove it"
    ]


# -- where the file is looked for


def test_find_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XXL_EXECUTOR_CONFIG", raising=False)
    import xxl_executor

    assert xxl_executor.CONFIG_PLACES == ("./config.yaml", "/etc/xxl-executor/config.yaml")
    etc = str(tmp_path / "etc.yaml")
    monkeypatch.setattr(xxl_executor, "CONFIG_PLACES", ("./config.yaml", etc))
    with pytest.raises(ConfigError) as caught:
        find_config(None)
    assert (
        str(caught.value)
        == f"no configuration: none of ./config.yaml, {etc} exists: give one with -c FILE"
    )
    write(tmp_path / "etc.yaml", "{}")
    assert find_config(None) == etc
    write(tmp_path / "config.yaml", "{}")
    assert find_config(None) == "./config.yaml"
    monkeypatch.setenv("XXL_EXECUTOR_CONFIG", "")
    assert find_config(None) == "./config.yaml", "an empty variable is none"
    monkeypatch.setenv("XXL_EXECUTOR_CONFIG", "from-environment.yaml")
    assert find_config(None) == "from-environment.yaml", (
        "also when it does not exist: that is the error to show"
    )
    assert find_config("given.yaml") == "given.yaml"


def test_many_includes_do_not_get_mixed_up(load, tmp_path):
    """Nodes of one file must not be taken for those of an earlier one that is gone from memory."""
    for number in range(200):
        write(
            tmp_path / f"jobs.d/{number:03d}.yaml",
            f"jobs:\n  job{number}:\n    shell: echo {number}\n    env: {{A: {number}}}\n",
        )
    jobs = load("include: ['jobs.d/*.yaml']").jobs
    assert {name: (job.shell, job.env) for name, job in jobs.items()} == {
        f"job{number}": (f"echo {number}", {"A": str(number)}) for number in range(200)
    }


# -- what people write instead


@pytest.mark.parametrize(
    "text, told",
    [
        (
            "executor: {log_retention: 30}",
            "1: executor.log_retention: expected 1h or more, got 30 s, did you mean 30d?",
        ),
        (
            "executor: {log_retention: 5m}",
            "1: executor.log_retention: expected 1h or more, got 5m",
        ),
        (
            "jobs: {a: {command: [echo, {param}]}}",
            '1: jobs.a.command: expected text or a number: put it in quotes, "{param}"',
        ),
        ("jobs: {a: {cmd: x}}", '1: jobs.a.cmd: unknown key, did you mean "command"?'),
        ("jobs: {a: {script: x}}", '1: jobs.a.script: unknown key, did you mean "shell"?'),
        ("admin: {token: x}", '1: admin.token: unknown key, did you mean "access_token"?'),
        (
            "jobs: {a: {python: /opt/x.py}}",
            '1: jobs.a.python: expected module:function such as "reports.daily:main"; for a script'
            " write command: [python3, /opt/x.py]",
        ),
    ],
)
def test_what_people_write_instead(problems, text, told):
    assert problems(text + "\n")[0] == f"config.yaml:{told}"


@pytest.mark.parametrize(
    "text, line",
    [
        ("jobs:\n  a：{shell: x}\n", 2),
        ("jobs:\n  a:\n    shell：echo\n", 3),
        ("jobs:\n  a:\n    timeout：5\n    shell: x\n", 3),
    ],
)
def test_a_full_width_colon_is_named(problems, text, line):
    found = problems(text)
    assert found[0].endswith(f'; line {line} has the full-width colon "：": write ": "'), found
    assert (
        "colon" not in problems("jobs: {a: {shell: x, description: 每天：一次, timout: 1}}")[0][:60]
    )
