"""Run by test_ray_train.py in a process of its own: a Ray whose raylet hangs as it starts, at the first so many tries;
prints what came of it."""

import json
import logging
import sys
import threading
import time

import psutil
from heard import Heard

from coe_dist.config import parse_config
from coe_dist.errors import TrainingError
from coe_dist.orchestration.processes import marked_processes, marking, new_mark
from coe_dist.orchestration.ray_session import local_ray


def hang_raylets(count):
    hanging = set()
    while len(hanging) < count:
        for process in psutil.Process().children(recursive=True):
            if process not in hanging and process.name() == "raylet":
                process.suspend()
                hanging.add(process)
        time.sleep(0.005)


if __name__ == "__main__":
    mark, heard = new_mark(), Heard()
    logging.getLogger("coe_dist").addHandler(heard)
    threading.Thread(target=hang_raylets, args=(int(sys.argv[1]),), daemon=True).start()
    found = {"message": None}
    with marking(mark):
        try:
            with local_ray(parse_config({"name": "hangs", "workers": {"device": "cpu"}})) as session:
                found["cpus"] = session.cpus
        except TrainingError as error:
            found["message"] = str(error)
    found |= {"left": [process.name() for process in marked_processes(mark)], "heard": heard.lines}
    json.dump(found, sys.stderr)
