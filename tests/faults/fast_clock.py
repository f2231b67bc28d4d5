"""Run the daemon with a clock that runs $FAST_CLOCK times as fast, until SIGUSR2 has it go on at
real speed.

Fast are time.time, time.monotonic, Event.wait (so threading.Timer too) and select.poll, which is
all that the backoffs, the heartbeats, the deadlines of an exchange and the housekeeping wait with.
Not fast are sockets, joins and the HTTP server's epoll. Its patience with a client and the time to
kill a tree are stretched: clients and processes live in real time. The file $FAST_CLOCK_ATTEMPTS
gets a line "time thread port", in the daemon's own time, for each connection it tries to open, and
one of thread "real" when the speed changed. Constants come as in ../launch.py.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

real_time, real_wait, real_poll = time.monotonic, threading.Event.wait, select.poll
since_epoch = time.time() - real_time()
speed = float(os.environ.pop("FAST_CLOCK"))
pace = (
    real_time(),
    real_time(),
    speed,
)  # from which real moment on, the fast clock at that moment, its speed


def clock():
    now = (
        real_time()
    )  # first: if the pace changes before the next line, the clock stands rather than jumps
    began, shown, factor = pace
    return shown + (now - began) * factor


def fast_wait(self, timeout=None):
    if timeout is None:
        return real_wait(self)
    deadline = clock() + timeout
    while True:  # again when the pace has changed meanwhile
        left = deadline - clock()
        if real_wait(self, max(0.0, left) / pace[2]) or left <= 0:
            return self.is_set()


class Poll:
    """select.poll; its object cannot be derived from."""

    def __init__(self):
        self._poll = real_poll()
        self.register, self.unregister, self.modify = (
            self._poll.register,
            self._poll.unregister,
            self._poll.modify,
        )

    def poll(self, milliseconds=None):
        if milliseconds is None or milliseconds < 0:
            return self._poll.poll(milliseconds)
        deadline = clock() + milliseconds / 1000
        while True:
            left = deadline - clock()
            found = self._poll.poll(max(0.0, left) * 1000 / pace[2])
            if found or left <= 0:
                return found


time.monotonic, time.time = clock, lambda: since_epoch + clock()
threading.Event.wait, select.poll = fast_wait, Poll

import xxl_executor  # noqa: E402

attempts = os.open(
    os.environ.pop("FAST_CLOCK_ATTEMPTS", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666
)


def note(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        os.write(
            attempts,
            f"{clock():.6f} {threading.current_thread().name} {arguments[1][1]}\n".encode(),
        )


def back_to_real(*_):
    global pace
    now = real_time()
    pace = (now, pace[1] + (now - pace[0]) * pace[2], 1.0)
    os.write(attempts, f"{clock():.6f} real 0\n".encode())


for name in ("REQUEST_TIMEOUT", "IDLE_TIMEOUT", "KILL_LIMIT"):
    vars(xxl_executor)[name] *= speed
vars(xxl_executor).update(json.loads(os.environ.pop("LAUNCH_CONSTANTS", "{}")))
sys.addaudithook(note)
signal.signal(signal.SIGUSR2, back_to_real)
sys.exit(xxl_executor.main())
