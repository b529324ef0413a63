"""What the documents say can be done: commands exist, examples run, links lead somewhere, error lines are ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer
import yaml
from document_blocks import DOCUMENTS, MARKS, ROOT, Block, blocks, links, own_commands
from namespaces import clean_environment, in_private_network
from small_data import write_small

from coe_dist.cli import app

ARCHITECTURE = blocks(ROOT / "docs/architecture.md")


def one(language: str, mark: str | None = None) -> Block:
    found = [b for b in ARCHITECTURE if b.language == language and (mark in b.marks if mark else not b.marks)]
    (block,) = found
    return block


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_say_what_they_are(path: Path) -> None:
    for block in blocks(path):
        assert block.language in ("", "sh", "python", "toml", "yaml"), str(block)
        assert block.marks <= MARKS, f"{block}: {set(block.marks)}"
        if block.language == "python":
            compile(block.text, str(block), "exec")
        if block.language == "toml":
            tomllib.loads(block.text)
        if block.language == "yaml":
            list(yaml.safe_load_all(block.text))


def test_every_command_and_option_exists() -> None:
    root = typer.main.get_command(app)
    checked = 0
    for where, words in own_commands():
        command: click.Command = root
        context = click.Context(command)
        while isinstance(command, click.Group):
            assert words, f"{where}: no command is named"
            name, *words = words
            found = command.get_command(context, name)
            assert found is not None, f"{where}: there is no {name}"
            command, context = found, click.Context(found, parent=context, info_name=name)
        try:
            command.make_context(command.name, list(words), parent=context.parent)
        except click.ClickException as error:
            pytest.fail(f"{where}: {error.format_message()}")
        checked += 1
    assert checked > 30


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    for link in links(path):
        assert (path.parent / link).exists(), f"{path.name}: {link}"


@pytest.mark.parametrize(
    "block",
    [b for b in ARCHITECTURE if b.language == "python" and not b.marks and b.file is None],
    ids=lambda block: f"line {block.line}",
)
def test_examples_of_architecture_run(block: Block) -> None:
    exec(compile(block.text, str(block), "exec"), {"__name__": "example"})


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The plug-in of architecture.md as pip would install it."""
    (file,) = (b for b in ARCHITECTURE if b.file)
    assert file.file is not None
    (tmp_path / file.file).write_text(file.text)
    named = tomllib.loads(one("toml").text)["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in named.items()]
    metadata = tmp_path / "stripes-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: stripes\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("".join(lines))
    return tmp_path


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    bin_folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([bin_folder, os.environ["PATH"]])
    env = clean_environment(**{"PATH": path, **environment})
    return in_private_network(["bash", "-euc", script], cwd=ROOT, env=env)


def test_a_package_adds_a_backbone(package: Path) -> None:
    command = one("sh", "plugin").text
    done = run(command.strip() + " --json", PYTHONPATH=f"{package}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    # stride 2 on 28 x 28: 14 rows, (28 - 7) // 2 + 1 = 11 columns, 24 x 1 x 7 weights each; the head 24 x 10
    assert yaml.safe_load(done.stdout)["expert_macs"] == [14 * 11 * 24 * 7 + 24 * 10] * 4
    (package / "stripes.py").write_text("raise RuntimeError('no stripes today')\n")
    refused = run(command, PYTHONPATH=f"{package}{os.pathsep}{ROOT}")
    assert refused.returncode == 2
    assert "the plug-in stripes (stripes) cannot be imported (RuntimeError no stripes today)" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_the_launcher_of_architecture_trains(tmp_path: Path) -> None:
    small = write_small(tmp_path / "data")
    text = one("python", "processes").text
    shown = '["configs/smoke.yaml", "name=launched"'
    assert shown in text
    there = f'{shown}, "data.folder={small}", "data.limit=96", "training.global_batch=32", "runs_dir={tmp_path}"'
    script = tmp_path / "launcher.py"
    script.write_text(text.replace(shown, there))
    done = run(f"python {script}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "launched/evaluation-test.json").is_file()


SOURCE = "".join(path.read_text() for path in [*ROOT.glob("coe_dist/**/*.py"), ROOT / "cluster/setup.sh"])
# as one text: pieces of a message that are joined, values left out
PLAIN = re.sub(r"\{[^{}]*\}|%[sg]|\$\{[^}]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", SOURCE))


def test_error_lines_of_troubleshooting_are_real() -> None:
    lines = re.findall(r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(lines) > 15
    for line in lines:
        pieces = [piece.strip(" :(),;") for piece in line.split("…")]
        for piece in (piece for piece in pieces if len(piece) > 8):
            assert piece in PLAIN, f"{line!r}: {piece!r} is in no message"


def test_the_citation_is_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
