"""The code that travels with a model: all that answering needs, nothing of training, under a name of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coe_dist.exports.packaged_code import package_code, rename_imports, requirements, write_code


def test_only_what_answering_needs_travels() -> None:
    code = package_code("coe_dist.inference")
    assert {"__init__.py", "inference.py", "config/run.py", "errors.py", "coe/trunks.py", "preparation.py"} <= set(
        code.files
    )
    assert not [path for path in code.files if path.startswith(("training", "data", "tracking", "cli", "parallel"))]
    assert {"torch", "timm", "torchvision", "safetensors", "pydantic"} <= code.libraries
    assert not {"ray", "deepspeed", "ffcv", "mlflow"} & code.libraries


def test_the_copy_imports_itself_alone(tmp_path: Path) -> None:
    """Each module is imported where this package cannot be found, also what functions import later."""
    code = package_code("coe_dist.inference")
    package = write_code(code, tmp_path)
    assert package == tmp_path / code.name
    modules = [
        ".".join((code.name, *Path(path).with_suffix("").parts)).removesuffix(".__init__") for path in code.files
    ]
    program = (
        "import importlib, sys\n"
        "sys.modules['coe_dist'] = None\n"  # any import of it fails
        f"[importlib.import_module(name) for name in {modules}]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    assert "coe_dist." not in "".join(
        line
        for text in code.files.values()
        for line in text.splitlines()
        if line.lstrip().startswith(("from", "import"))
    )


def test_the_name_follows_the_content() -> None:
    one, other = package_code("coe_dist.inference"), package_code("coe_dist.errors")
    assert one == package_code("coe_dist.inference")
    assert one.name != other.name
    assert sorted(other.files) == ["__init__.py", "errors.py"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from coe_dist.coe import trunks\n", "from new.coe import trunks\n"),
        ("    import coe_dist\n", "    import new\n"),
        ("import coe_dist.errors as e, os\n", "import new.errors as e, os\n"),
        ("from coe_distant import x\n", "from coe_distant import x\n"),
        ("text = 'coe_dist.coe'\n", "text = 'coe_dist.coe'\n"),
    ],
)
def test_only_imports_are_renamed(before: str, after: str) -> None:
    assert rename_imports(before, "new") == after


def test_requirements_are_those_of_this_package() -> None:
    assert [line.split("<")[0] for line in requirements(frozenset({"torch", "timm", "pandas"}))] == ["timm", "torch"]
    assert all("<" in line and ">=" in line for line in requirements(frozenset({"torch", "mlflow", "numpy"})))
