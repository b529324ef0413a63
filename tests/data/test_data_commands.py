"""`coe-dist data ...` as a person types it: what is printed, and the exit codes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from coe_dist.data.stored import StoredImages


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from coe_dist.cli import main; sys.argv[0] = 'coe-dist'; main()"
    command = [sys.executable, "-c", code, "data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_write_verify_and_show(image_tree: Path, tmp_path: Path) -> None:
    tree, out = Path(shutil.copytree(image_tree, tmp_path / "tree")), tmp_path / "out"
    (tree / "train" / "ant" / "broken.jpg").write_bytes(b"")
    options = ("--source", "imagefolder", "--max-resolution", 500, "--jpeg-fraction", 0.5)

    done = cli("write", *options, tree / "train", "--out", out / "train.beton", "--max-bad", 1, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert "written" in done.stdout
    assert "1 files that cannot be read were left out of" in done.stdout
    assert done.stdout.rstrip().endswith(f"listed in {out / 'train.quarantine.tsv'}")
    assert "train: checking" in done.stderr  # the progress display
    done = cli("write", *options, tree / "val", "--out", out / "val.beton", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["splits"]["validation"]["count"] == 6
    assert "already there" in cli("write", *options, tree / "val", "--out", out / "val.beton").stdout

    done = cli("write", *options, tree / "train", "--out", out / "other.beton", "--split", "train", "--max-bad", 0)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("coe-dist: max_bad: 0 is less than the 1 images that cannot be read")

    done = cli("show", out / "train.beton", "--n", 5, "--out", tmp_path / "grid.png")
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "grid.png"))
    assert (tmp_path / "grid.png").is_file()

    done = cli("verify", out / "train.beton")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{out / 'train.beton'}: 24 images, all whole"]
    stored = StoredImages(out / "train.beton")
    index = next(i for i in range(24) if stored.is_jpeg(i))
    content, found = bytearray((out / "train.beton").read_bytes()), stored.bytes_of(index).tobytes()
    place = content.index(found)
    content[place : place + 50] = bytes(50)
    (out / "train.beton").write_bytes(content)
    done = cli("verify", out / "train.beton")
    assert done.returncode == 1
    assert done.stdout.startswith(f"sample {index} (")
    assert "24 images, 1 damaged" in done.stdout.splitlines()[-1]
    done = cli("verify", out / "train.beton", "--json")
    assert done.returncode == 1
    assert [item["sample"] for item in json.loads(done.stdout)["damaged"]] == [index]
    done = cli("verify", out / "nothing.beton")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
