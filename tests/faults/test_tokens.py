"""Wrong tokens are refused everywhere, in constant time (row 27)."""

import ast
import dataclasses
import functools
import hmac
import json
import re
from pathlib import Path

from client import Client
from tools import Ledger

import xxl_executor

POST_PATHS = ("/beat", "/idleBeat", "/run", "/trigger", "/kill", "/log")
WRONG_TOKEN = (
    "The access token is wrong: give admin and executor the same xxl.job.accessToken /"
    " admin.access_token."
)


TOKEN = "correct-Horse.Battery~42"
RIGHT = ("XXL-JOB-ACCESS-TOKEN", TOKEN)


def flipped(text, at):
    return "".join(
        chr(ord(char) ^ 1) if i == at % len(text) else char for i, char in enumerate(text)
    )


SINGLE = {  # one wrong token
    "empty": "",
    "first byte": flipped(TOKEN, 0),
    "last byte": flipped(TOKEN, -1),
    "a prefix": TOKEN[:-1],
    "one byte": TOKEN[:1],
    "longer": TOKEN + "x",
    "twice as long": TOKEN * 2,
    "very long": TOKEN * 200,
    "lower case": TOKEN.lower(),
    "upper case": TOKEN.upper(),
    "Latin-1 bytes": b"\xe9" + TOKEN.encode(),
    "UTF-8 bytes": TOKEN.encode() + "é".encode(),
    "a byte 0xff": b"\xff" * len(TOKEN),
    "a full-width letter": TOKEN.replace("c", "ｃ").encode(),
    "quoted": f'"{TOKEN}"',
    "bearer": f"Bearer {TOKEN}",
    "a list": f"{TOKEN},{TOKEN}",
    "NUL": TOKEN.encode() + b"\0",
    "null": "null",
    "percent": TOKEN.replace("~", "%7E"),
}
WRONG = {  # [(name, value)] of headers
    **{what: [(RIGHT[0], value)] for what, value in SINGLE.items()},
    "missing": [],
    "doubled, equal": [RIGHT, RIGHT],
    "doubled, right first": [RIGHT, (RIGHT[0], "wrong")],
    "doubled, right last": [(RIGHT[0], "wrong"), RIGHT],
    "doubled, one empty": [(RIGHT[0], ""), RIGHT],
    "doubled, other case": [RIGHT, (RIGHT[0].lower(), TOKEN)],
    "three": [RIGHT] * 3,
    **{
        f"in {name}": [(name, value)]
        for name, value in [
            ("XXL-JOB-ACCESSTOKEN", TOKEN),
            ("XXL_JOB_ACCESS_TOKEN", TOKEN),
            ("X-XXL-JOB-ACCESS-TOKEN", TOKEN),
            ("XXL-JOB-ACCESS-TOKEN2", TOKEN),
            ("XXL-JOB-ACCESS-TOKEN ", TOKEN),
            ("Authorization", f"Bearer {TOKEN}"),
            ("Cookie", f"XXL-JOB-ACCESS-TOKEN={TOKEN}"),
            ("X", f"y\rXXL-JOB-ACCESS-TOKEN : {TOKEN}"),
        ]
    },
}


# what no head may hold: these get no further than that
NO_REQUEST = {"NUL", "in XXL-JOB-ACCESS-TOKEN ", "in X"}


def ask(client, method, path, body=b"", headers=()):
    """(HTTP status, body) on a connection of its own; any headers, any number of times, in
    bytes."""
    lines = [
        f"{method} {path} HTTP/1.1".encode(),
        b"Host: x",
        b"Content-Length: %d" % len(body),
        b"Connection: close",
    ]
    for name, value in headers:
        lines.append(
            name.encode("latin-1")
            + b": "
            + (value if isinstance(value, bytes) else value.encode("latin-1"))
        )
    with Client(client) as connection:
        connection.sock.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        status, _, answer = connection.answer()
    return status, answer.decode()


def test_wrong_tokens(executor, loopback, tmp_path):
    """Only the right token, once, in its header, is taken; /health and /metrics need none and tell
    no secret."""
    admin = loopback(token=TOKEN)
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job('echo "OUTPUT-of-a-run $1"')}, admin=admin)
    ask_daemon = functools.partial(ask, daemon.port)
    for number, (what, headers) in enumerate(WRONG.items()):
        trigger = json.dumps(
            {"jobId": 1, "logId": 1000 + number, "executorHandler": "job"}
        ).encode()
        for path in (*POST_PATHS, f"/run?XXL-JOB-ACCESS-TOKEN={TOKEN}", "//beat"):
            status, body = ask_daemon("POST", path, trigger, headers)
            refusal = (400, 500) if what in NO_REQUEST else (200, 500)
            assert (status, json.loads(body)["code"]) == refusal, (what, path)
            assert what in NO_REQUEST or json.loads(body)["msg"] == WRONG_TOKEN, (what, path)
        status, body = ask_daemon("GET", "/status", headers=headers)
        assert status == (400 if what in NO_REQUEST else 403), what
        assert what in NO_REQUEST or json.loads(body)["msg"] == WRONG_TOKEN, what
    assert not ledger.started()
    log_id = ledger.trigger(daemon, executorParams="PARAMETER-of-a-run")  # with the right one
    assert log_id in ledger.accepted and ledger.result(log_id) == (
        200,
        "OUTPUT-of-a-run PARAMETER-of-a-run",
    )
    for name in (RIGHT[0], RIGHT[0].lower(), "Xxl-Job-Access-Token"):
        for path, body in {
            "/beat": b"",
            "/idleBeat": b'{"jobId":1}',
            "/kill": b'{"jobId":1}',
            "/log": b'{"logId":1}',
        }.items():
            assert json.loads(ask_daemon("POST", path, body, [(name, TOKEN)])[1])["code"] == 200, (
                name,
                path,
            )
        assert ask_daemon("GET", "/status", headers=[(name, TOKEN)])[0] == 200
    for path in ("/health", "/metrics"):
        for headers in ([], [RIGHT], [(RIGHT[0], "wrong")]):
            status, body = ask_daemon("GET", path, headers=headers)
            assert status == 200 and body
            assert not re.search("PARAMETER|OUTPUT|" + re.escape(TOKEN), body), body
    assert TOKEN not in daemon.log
    ledger.settle(daemon)
    assert ledger.started() == [log_id]


def fields_of(*pairs):
    """As the HTTP server gives them to the API."""
    fields = {}
    for name, value in pairs:
        value = value if isinstance(value, bytes) else value.encode()
        fields.setdefault(name.lower().encode(), []).append(value.strip(b" \t"))
    return fields


def test_tokens_are_compared_in_constant_time(executor, admin, tmp_path, monkeypatch):
    """hmac.compare_digest sees the whole of every token that comes, and nothing else compares
    it."""
    ledger = Ledger(admin, tmp_path)
    daemon = executor({"job": ledger.job()}, admin=admin, start=False)
    config = xxl_executor.load_config(str(daemon.file))
    config = dataclasses.replace(
        config, admin=dataclasses.replace(config.admin, access_token=TOKEN)
    )

    class Core:
        def busy(self, job_id):
            return False

        def put(self, message):
            message.ticket.give(None)  # as the core does with what it takes

    class Ticket:
        def give(self, reply):
            self.reply = reply

    api = xxl_executor.Api(
        config, Core(), None, None, xxl_executor.Metrics(), dict, lambda path: None
    )
    compared, real = [], hmac.compare_digest

    def spy(one, other):
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(xxl_executor.hmac, "compare_digest", spy)
    for what, headers in {**WRONG, "right": [RIGHT]}.items():
        given = [value for name, value in headers if name.lower() == RIGHT[0].lower()]
        for method, path in [*(("POST", path) for path in POST_PATHS), ("GET", "/status")]:
            compared.clear()
            request = xxl_executor.Request(method, path, fields_of(*headers), "")
            request.body, request.trusted = b'{"jobId":1}', api.trusts(request)
            ticket = Ticket()
            body = json.loads((api.answer(request, ticket) or ticket.reply).body)
            assert (body.get("msg") == WRONG_TOKEN) == (what != "right"), (what, body)
            seen = [value if isinstance(value, bytes) else value.encode() for value in given]
            seen = [value.strip(b" \t") for value in seen]
            expected = (
                [sorted((seen[0], TOKEN.encode()))] if len(seen) == 1 else []
            )  # two are refused as two
            assert [sorted(pair) for pair in compared] == expected, what
    # Nor is there another way: no other method looks at the token.
    source = Path(xxl_executor.__file__).read_text(encoding="utf-8")
    users = {
        function.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Api"
        for function in node.body
        if isinstance(function, ast.FunctionDef)
        if any(
            isinstance(name, ast.Attribute) and name.attr == "access_token"
            for name in ast.walk(function)
        )
    }
    assert users == {"trusts"}
    daemon.start()
    ledger.trigger(daemon)
    ledger.settle(daemon)
