"""The admins of the tests: of every generation, with a token, and with answers that no admin should
give."""

import json

import requests

import xxl_executor

SUCCESS, FAILURE = xxl_executor.SUCCESS, xxl_executor.FAILURE


class Admin(xxl_executor.LoopbackAdmin):
    """An xxl-job-admin on 127.0.0.1 that answers as `version` does and keeps what it received.

    version: "2.2.0", "2.3" (to 3.2), "3.3" (to 3.4) or "3.5". `behave(path, body)` may return (HTTP
    status, bytes) to answer something else. Any thread may call any method; `changed` is notified
    of every request.
    """

    def __init__(self, version="3.5", token="", port=0):
        self.version = version
        self.behave = lambda path, body: None
        self.requests = []  # (path, headers in lower case, body)
        self.parked = []  # addresses of executors that drain
        super().__init__(port, token)
        if version != "3.5":
            self.url += "/xxl-job-admin"

    def answer(self, path, headers, body):
        given = {name.lower(): value for name, value in headers.items()}
        own = self.behave(path, body)
        if own is None:
            try:
                own = self._accept(path, given, body)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                invoked = "openapi invoke error: " if self.version == "3.5" else ""
                own = 200, self._envelope(FAILURE, f"{invoked}{error}")
        with self.changed:
            self.requests.append((path, given, body))
            self.changed.notify_all()
        return own

    def _envelope(self, code, message=None):
        payload = "data" if self.version >= "3.3" else "content"
        return json.dumps({"code": code, "msg": message, payload: None}).encode()

    def _accept(self, path, headers, body):
        if self.version == "3.3" and "xxl-job-access-token" not in headers:
            return 400, b""
        if headers.get("xxl-job-access-token", "") != self.token:
            return 200, self._envelope(FAILURE, "The access token is wrong.")
        if self.version == "3.5" and not headers.get("xxl-job-appname"):
            return 200, self._envelope(FAILURE, "The app name is missing.")
        fields = json.loads(body)
        call = path.rpartition("/")[2]
        if call == "callback":
            self._take_results(fields["callbackList"] if self.version == "3.5" else fields)
        elif call in ("registry", "registryRemove"):
            self._register(fields, call == "registry")
        else:
            return 404, b""
        return 200, self._envelope(SUCCESS)

    def _take_results(self, items):
        for item in [dict(item) for item in items]:
            old = self.version == "2.2.0"
            code = item["executeResult"]["code"] if old else item["handleCode"]
            with self.changed:
                self.results.setdefault(item["logId"], []).append({**item, "code": code})

    def _register(self, fields, known):
        place = self.parked if fields["registryKey"].endswith("/draining") else self.registry
        with self.changed:
            if fields["registryValue"] in place:
                place.remove(fields["registryValue"])
            if known:
                place.append(fields["registryValue"])

    def call(self, address, path, body=None, **headers):
        """POST to an executor as this version does; returns its envelope."""
        data = json.dumps(body).encode() if body is not None else b""
        if self.token:
            headers.setdefault("XXL-JOB-ACCESS-TOKEN", self.token)
        if path == "/trigger" and self.version != "3.5":
            path = "/run"
        with requests.Session() as session:
            session.trust_env = False  # no proxy stands before this host
            url = address.rstrip("/") + path
            with session.post(url, data=data, headers=headers, timeout=10) as reply:
                return reply.json()
