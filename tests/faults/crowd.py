"""A crowd that asks for metrics over and over; a program of its own, see `clients`."""

import os
import threading
import time

from client import Client, run_as_program


def ask_for_metrics(port, count, over, seconds):
    """`count` connections at a time, each with three requests under way, until the file `over`
    exists, for `seconds` at most; returns how many answers came."""
    deadline, answers = time.monotonic() + seconds, []
    request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"

    def going():
        return not os.path.exists(over) and time.monotonic() < deadline

    def ask():
        while going():
            try:
                with Client(port, 5) as client:
                    client.sock.sendall(request * 2)
                    while going():
                        client.sock.sendall(request)
                        if client.answer() is None:
                            break
                        answers.append(1)
            except (OSError, ValueError):  # it had to go
                pass

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(answers)


if __name__ == "__main__":
    run_as_program(ask_for_metrics)
