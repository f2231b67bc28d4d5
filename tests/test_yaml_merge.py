"""Merge keys (`<<`) in the configuration mean what YAML says, with every version of PyYAML that may
be installed."""

import os
import re
import subprocess
import sys

import pytest
from conftest import command_line

INSTALLED = "the installed one"
HEAD = 'executor: {bind: "127.0.0.1:9999"}\n'
LIMIT = 30  # seconds; a program that hangs fails


def fetch(version, target):
    """Unpack PyYAML into `target`. Its wheel for one fixed Python serves all of them: what is
    compiled in it is optional, and nothing of it is built or executed here."""
    wheel = ["--only-binary", ":all:", "--python-version", "3.9", "--implementation", "cp"]
    if version:
        for platform in ("manylinux1_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64"):
            wheel += ["--platform", platform]
    else:
        wheel = ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "0"]
    command += ["--disable-pip-version-check", "--no-cache-dir", *wheel, "--target", str(target)]
    command.append(f"PyYAML=={version}" if version else "PyYAML")
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip did not fetch PyYAML {version} in time")
    if ran.returncode:
        pytest.skip(f"pip cannot fetch PyYAML {version}: {ran.stderr.strip()[-200:]}")


@pytest.fixture(
    scope="session",
    params=[INSTALLED, "5.4.1", "6.0.1", ""],
    ids=["installed", "5.4.1", "6.0.1", "newest"],
)
def library(request, tmp_path_factory):
    """The environment of a program that finds this version of PyYAML."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if request.param == INSTALLED:
        return env
    target = tmp_path_factory.mktemp("pyyaml")
    fetch(request.param, target)
    return {**env, "PYTHONPATH": str(target)}


@pytest.fixture
def call(library, tmp_path):
    """call(text, argument, ...): (exit status, stdout, stderr) of the program with a config.yaml of
    `text`."""

    def call(text, *arguments):
        file = tmp_path / "config.yaml"
        file.write_text(text, encoding="utf-8")
        ran = subprocess.run(
            command_line("-c", "config.yaml", *arguments),
            cwd=tmp_path,
            env=library,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        return ran.returncode, ran.stdout, ran.stderr

    return call


MERGES = (
    HEAD
    + """\
x-base: &base {shell: echo base, timeout: 1s, description: base}
x-more: &more {shell: echo more, timeout: 2s, kill_grace: 3s}
x-last: &last {shell: echo last, timeout: 3s, description: last, env: {A: last}}
x-nested: &nested
  <<: *base
  timeout: 4s
x-deep: &deep
  description: deep
  <<: [*more, *nested]
x-all: &all [*more, *base]
x-jobs: &jobs
  merged: {<<: *last, description: merged}
  own: {<<: *base, description: never}
x-environment: &environment {A: environment, B: environment}
jobs:
  mapping: {<<: *base}
  earlier: {<<: [*more, *base]}
  later: {<<: [*base, *more]}
  three: {<<: [*more, *last, *base]}
  list: {<<: *all}
  own:
    timeout: 9s
    <<: [*more, *base]
    description: own
  nested: {<<: *nested}
  deep: {<<: *deep}
  both: {<<: [*deep, *last]}
  same: {<<: [*base, *base]}
  inline: {<<: [{timeout: 5s}, *base]}
  job: &job
    <<: *more
    description: job
    timeout: 6s
  alias: *job
  of-job: {<<: *job, timeout: 7s}
  again: {<<: *base}
  empty: {<<: [], shell: echo, description: empty}
  nothing: {<<: {}, shell: echo, description: nothing}
  environment:
    shell: echo $A $B $C
    description: environment
    env:
      C: own
      <<: [{B: first}, *environment]
  whole:
    <<: *last
    shell: echo $A $B $C
    env: {B: whole}
  <<: *jobs
"""
)
MERGED = {  # job: (limit of time, description)
    "mapping": ("1 s", "base"),
    "earlier": ("2 s", "base"),
    "later": ("1 s", "base"),
    "three": ("2 s", "last"),
    "list": ("2 s", "base"),
    "own": ("9 s", "own"),
    "nested": ("4 s", "base"),
    "deep": ("2 s", "deep"),
    "both": ("2 s", "deep"),
    "same": ("1 s", "base"),
    "inline": ("5 s", "base"),
    "job": ("6 s", "job"),
    "alias": ("6 s", "job"),
    "of-job": ("7 s", "job"),
    "again": ("1 s", "base"),
    "empty": ("-", "empty"),
    "nothing": ("-", "nothing"),
    "environment": ("-", "environment"),
    "whole": ("3 s", "last"),
    "merged": ("3 s", "merged"),
}


def test_what_is_merged(call):
    """A job's own keys win, then the mappings of the list in their order, each with what is merged
    into it; an anchor means the same wherever it is used."""
    status, out, err = call(MERGES, "check")
    assert (status, err) == (0, "")
    rows = re.findall(r"^(\S+) +shell +(- |[\d.]+ s) *(\S+)$", out, re.MULTILINE)
    assert {name: (limit.strip(), text) for name, limit, text in rows} == MERGED


@pytest.mark.parametrize(
    "job, wanted", [("deep", "more"), ("environment", "environment first own"), ("whole", "whole")]
)
def test_what_a_job_with_merged_keys_runs(call, job, wanted):
    """What runs is what was merged; a key whose value is a mapping is taken as a whole."""
    status, out, err = call(MERGES, "exec", job)
    assert (status, out.split()) == (0, wanted.split()), err


MISTAKES = (
    HEAD
    + """\
x-base: &base {shell: echo base, timeout: 1s}
x-bad: &bad
  shell: echo bad
  <<: 7            # no mapping
jobs:
  first: *bad
  second: {<<: *bad}
  text:
    shell: echo
    <<: some text  # no mapping
  item:
    shell: echo
    <<: [*base, 5] # no mapping
  inner:
    shell: echo
    <<: [[*base]]  # no mapping
  variables:
    shell: echo
    env:
      A: 1
      <<: text     # no mapping
  twice:
    <<: *base
    timeout: 1s
    description: twice
    timeout: 2s    # duplicate
  fine:
    <<: [*base, {timeout: 3s}, *base]
    timeout: 2s
    shell: echo fine
"""
)


def test_mistakes_around_merge_keys(call):
    """Each is told once, with the line on which it stands; a key that is both a job's own and
    merged is none."""
    status, out, err = call(MISTAKES, "check")
    assert status == 2 and "is fine" not in out
    found = [re.fullmatch(r"config\.yaml:(\d+): (\S.*)", line) for line in err.splitlines()]
    assert all(found), err
    lines = MISTAKES.splitlines()
    for comment, words in (("no mapping", "<<.*mapping"), ("duplicate", "timeout.*duplicate")):
        wanted = [number for number, line in enumerate(lines, 1) if line.endswith(f"# {comment}")]
        told = [int(match[1]) for match in found if re.search(words, match[2])]
        assert told == wanted, err
    assert len(found) == 6, err


CYCLES = {  # name of the file: text
    "itself": "x-a: &a\n  shell: echo\n  <<: *a\njobs: {itself: *a}\n",
    "list": "x-a: &a\n  shell: echo\n  <<: [{timeout: 1s}, *a]\njobs: {list: {<<: *a}}\n",
    "mapping": "x-a: &a\n  shell: echo\n  <<: {timeout: 1s, <<: *a}\njobs: {mapping: *a}\n",
    "variables": "jobs:\n  variables:\n    shell: echo\n    env: &a {A: 1, <<: {<<: [*a]}}\n",
    "jobs": "jobs: &a\n  some: {shell: echo}\n  <<: *a\n",
}


def test_an_anchor_that_merges_itself(call, tmp_path):
    """It means nothing, so it is told with file and line, and the program comes to its end."""
    wanted = []
    for name, text in CYCLES.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        line = next(n for n, line in enumerate(text.splitlines(), 1) if "<<" in line)
        wanted.append((f"{name}.yaml", str(line)))
    status, out, err = call(HEAD + "include: ['[!c]*.yaml']\n", "check")
    assert status == 2 and "is fine" not in out, err
    told = [re.fullmatch(r"(?:.*/)?(\w+\.yaml):(\d+): .*<<.+", text) for text in err.splitlines()]
    assert all(told) and sorted(match.groups() for match in told) == sorted(wanted), err
