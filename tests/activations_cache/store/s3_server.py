"""A real S3-speaking server, moto's, on loopback; `s3_server.py LATENCY` prints its port and serves until killed.

Moto looks for an object and stores the new one in two steps, so two conditional puts at once could both succeed. S3
compares and stores in one: here puts wait for one another, once their bodies have arrived. A latency, in seconds,
goes before the answer to every read.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def serve(latency: float) -> None:
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import make_server

    app, one_at_a_time = create_backend_app("s3"), threading.Lock()

    def atomic(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "PUT":
            time.sleep(latency)
            return app(environ, start)
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        with one_at_a_time:
            return app({**environ, "wsgi.input": io.BytesIO(body)}, start)

    server = make_server("127.0.0.1", 0, atomic, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextmanager
def running_server(latency: float = 0.0) -> Iterator[dict[str, str]]:
    """Start the server in a process of its own; yield the environment in which clients find it."""
    command = [sys.executable, str(Path(__file__)), str(latency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            yield {
                "AWS_ENDPOINT_URL": url,
                "AWS_ALLOW_HTTP": "true",
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "secret",
                "AWS_REGION": "us-east-1",
            }
        finally:
            process.kill()


def new_bucket() -> str:
    """Make a bucket on the server of the environment and return its URL."""
    name = f"b{uuid.uuid4().hex}"
    request = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/{name}", method="PUT")
    with urllib.request.urlopen(request, timeout=30):
        return f"s3://{name}"


if __name__ == "__main__":
    serve(float(sys.argv[1]))
