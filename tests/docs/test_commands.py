"""`make docs-check`: the commands of README.md and docs/, one after another, in one folder, as a reader would.

Only their size is changed: trainings get few images and one epoch, studies begin no training. Marked blocks that need a
cluster or hours are left to the checks that their mark names (document_blocks.py).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from document_blocks import DOCUMENTS, ROOT, Block, blocks, commands, table_commands
from namespaces import clean_environment, in_private_network
from PIL import Image

from coe_dist.data.beton import write_dataset

pytestmark = [pytest.mark.docs, pytest.mark.timeout(900)]

README = ROOT / "README.md"
LIMIT = 512
SMALLER = f"training.epochs=1 data.limit={LIMIT} training.optimizer.warmup_epochs=0"
ELSEWHERE = {
    "launch": "tests/orchestration/test_jobs.py, on a Ray head of its own",
    "rehearsal": "tests/orchestration/test_rehearsal.py",
    "bench": "tests/bench runs each benchmark in its smallest form",
    "storage": "tests/storage, on an S3 server of its own",
    "doctor": "tests/orchestration; it asks for free cores",
}


def smaller(command: str) -> str:
    if re.match(r"coe-dist (train|demo) |torchrun .*coe_dist.training.worker ", command):
        less = SMALLER if "fashion_mnist" in command else f"{SMALLER} training.global_batch=16 data.limit=48"
        return f"{command} {less}"
    if command.startswith("coe-dist study ") and "--dry-run" not in command:
        return f"{command} --max-runs 0"
    if command == "coe-dist data write --out data/fashion-mnist":
        return "true"  # there already: the whole set takes half a minute
    return command.replace("--min-accuracy 0.84", "--min-accuracy 0.05")  # two steps reach little more


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as after cloning, with a data set, and with a reader's images in the home folder."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "coe_dist", "docs", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    write_dataset("fashion-mnist", folder / "data/fashion-mnist")
    home = folder / "home"
    generator = np.random.default_rng(0)

    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(path)

    for root, split in [
        ("pictures", "train"),
        ("pictures", "val"),
        *(("mine", part) for part in ("train", "val", "test")),
    ]:
        for kind in ("cats", "dogs"):
            for number in range(24):
                picture(home / root / split / kind / f"{number}.jpg")
    for kind in ("n01440764", "n01443537"):
        for number in range(12):
            picture(home / "imagenet/train" / kind / f"{kind}_{number}.JPEG")
    lines = ["ImageId,PredictionString"]
    for number in range(8):
        picture(home / f"imagenet/val/ILSVRC2012_val_{number:08d}.JPEG")
        lines.append(f"ILSVRC2012_val_{number:08d},{('n01440764', 'n01443537')[number % 2]} 1 2 3 4 ")
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    for number in range(3):
        picture(folder / f"photos/{number}.jpg")
        picture(folder / f"more/{number}.png")
    picture(folder / "photo.jpg")
    picture(folder / "other.png")
    return folder


def run(place: Path, script: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = clean_environment(PATH=path, HOME=str(place / "home"))
    done = in_private_network(["bash", "-euo", "pipefail", "-c", script], cwd=place, env=environment, timeout=880)
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def waiting_for(server: str, rest: list[str]) -> str:
    """A script that starts the server, gives the other commands once it listens, and ends it."""
    port = re.search(r"--port (\d+)", server)
    number = port[1] if port else "5000"
    listening = f"python -c \"import socket; socket.create_connection(('127.0.0.1', {number}), 1)\" 2>/dev/null"
    return "\n".join(
        [
            f"setsid {server} & server=$!",
            "trap 'kill -- -$server; wait $server || true' EXIT",
            f"for i in $(seq 200); do {listening} && break || sleep 1; done; {listening}",
            *rest,
        ]
    )


TABLE = [command for command in table_commands(README) if command.split()[1] not in ELSEWHERE]


@pytest.mark.parametrize("command", TABLE)
def test_commands_of_the_table(place: Path, command: str) -> None:
    command = command.replace("data/mine", "data/table").replace("--root DIR", "--root ~/pictures")
    run(place, waiting_for(command, []) if command.startswith("coe-dist ui") else smaller(command))


BLOCKS = [
    block
    for path in [README, *(path for path in DOCUMENTS if path != README)]
    for block in blocks(path)
    if block.language == "sh" and not block.marks & {"elsewhere", "cluster", "downloads", "long", "plugin"}
]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks_of_commands(place: Path, block: Block) -> None:
    lines = commands(block.text)
    if "server" in block.marks:
        run(place, waiting_for(lines[0], lines[1:]))
    else:
        run(place, "\n".join(smaller(line) for line in lines))


def test_python_of_the_readme(place: Path) -> None:
    """Blocks follow one another."""
    text = "\n".join(block.text for block in blocks(README) if block.language == "python")
    assert "images_NCHW" in text
    (place / "reader.py").write_text(text)
    run(place, "python reader.py")
