"""The router process as a child of rank 0, and rank 0's Channel to it over a pair of sockets.

Rank 0 starts `python -m coe_dist.parallel.router_process DESCRIPTOR PARENT`. The child ends when its parent closes the
pair or is gone, however that came about; it does not use multiprocessing's spawn, which would run the parent's main
module (a worker, torchrun's or a user's script) a second time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from coe_dist.children import ending, search_path
from coe_dist.errors import TrainingError
from coe_dist.parallel.process_solver import Array, answer
from coe_dist.parallel.solvers import Problems

_LOOK_SECONDS = 1.0  # how often an idle child looks for its parent


class ChildChannel:
    """A Channel (see process_solver.py) to a child process.

    Starting does not wait: the child imports torch and compiles while rank 0 builds its engines. A thread of its own
    writes the requests and reads the answers, so that submit() returns at once whatever the size of the request.
    """

    def __init__(self, problems: Problems) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", "coe_dist.parallel.router_process", str(theirs.fileno()), str(os.getpid())]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path()}
        self._process = subprocess.Popen(
            command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=environment
        )
        theirs.close()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="router channel")
        self._thread.submit(self._connection.send, problems)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def submit(self, kind: str, arrays: tuple[Array, ...]) -> Future[Array]:
        return self._thread.submit(self._ask, kind, arrays)

    def result(self, ticket: Future[Array], timeout_seconds: float) -> Array:
        try:
            return ticket.result(timeout_seconds)
        except TimeoutError:
            raise TrainingError(f"router process (pid {self.pid}) gave no answer in {timeout_seconds:g} s") from None

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()  # it holds nothing that could be lost
            self._process.wait()
        self._thread.shutdown()  # whatever it still had to ask has failed with the process
        self._connection.close()

    def _ask(self, kind: str, arrays: tuple[Array, ...]) -> Array:
        try:
            self._connection.send((kind, arrays))
            reply: Array | str = self._connection.recv()
        except (EOFError, OSError):
            raise TrainingError(f"router process (pid {self.pid}) ended: {ending(self._process)}") from None
        if isinstance(reply, str):
            raise TrainingError(f"router process (pid {self.pid}) failed: {reply}")
        return reply


def serve(connection: Connection, parent: int) -> None:
    """The child's work: requests in, answers (an error as one line of text) out, until the parent is gone."""
    import torch

    from coe_dist.coe.warm_up import warm_up

    torch.set_num_threads(1)
    warm_up()
    if not _wait(connection, parent):
        return
    problems: Problems = connection.recv()
    while _wait(connection, parent):
        kind, arrays = connection.recv()
        reply: Array | str
        try:
            reply = answer(problems, kind, arrays)
        except Exception as error:
            reply = " ".join(f"{type(error).__name__}: {error}".split())
        connection.send(reply)


def _wait(connection: Connection, parent: int) -> bool:
    """Whether there is something to read. Another child of a dead parent may still hold its end of the pair, therefore
    the end of the file alone does not tell of the parent's death."""
    while not connection.poll(_LOOK_SECONDS):
        if os.getppid() != parent:
            return False
    return True


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
    with suppress(EOFError, ConnectionError):  # the parent is gone
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
