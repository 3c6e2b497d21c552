"""Asks /health ten times a second until its input ends, then prints how long each answer took, in ms.

A process of its own: in the one that has the clients it would wait for them.
"""

import http.client
import json
import sys
import threading
import time
import urllib.parse


def main(url: str) -> None:
    is_over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
    connection, times = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60), []
    while not is_over.wait(0.1):
        start = time.perf_counter()
        connection.request("GET", "/health")
        response = connection.getresponse()
        assert response.status == 200 and json.loads(response.read()) == {"status": "ok"}
        times.append(1000 * (time.perf_counter() - start))
    print(json.dumps(times))


if __name__ == "__main__":
    main(sys.argv[1])
