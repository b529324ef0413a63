"""Run by test_mlflow_serving.py in a private network: MLflow's own server with an exported model, asked over HTTP.

Arguments: the folder of programs, the model, and a folder that holds requests.json ({"cases": {name: [body, content
type]}, "load": [bodies]}) and gets answers.json. The server is ended before this process ends.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CLIENTS = 16


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(url, body=None, kind="application/json"):
    """[status, text]"""
    request = urllib.request.Request(url, data=None if body is None else body.encode(), headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [answer.status, answer.read().decode()]
    except urllib.error.HTTPError as error:
        return [error.code, error.read().decode()]


def main(programs, model, folder):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    environment |= {"PATH": f"{programs}:{environment['PATH']}", "DO_NOT_TRACK": "true"}
    command = [f"{programs}/mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "-h", "127.0.0.1", "-p", str(port)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 200
        while True:
            try:
                if ask(f"{url}/health")[0] == 200:
                    break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit((folder / "server.log").read_text()[-3000:])
                time.sleep(0.2)
        requests = json.loads((folder / "requests.json").read_text())
        cases = {name: ask(f"{url}/invocations", *request) for name, request in requests["cases"].items()}
        with ThreadPoolExecutor(CLIENTS) as clients:
            load = list(clients.map(lambda body: ask(f"{url}/invocations", body), requests["load"]))
        cases["afterwards"] = ask(f"{url}/invocations", *requests["cases"]["good"])
        (folder / "answers.json").write_text(json.dumps({"cases": cases, "load": load}))
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
