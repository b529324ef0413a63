from __future__ import annotations

from pathlib import Path

import pytest

from coe_dist.config import NetworkConfig, parse_config
from coe_dist.errors import InputError
from coe_dist.training.run_folder import check_network, evaluation_file, locked


def test_a_run_is_trained_by_one_command_at_a_time(tmp_path: Path) -> None:
    config = parse_config({"name": "only", "runs_dir": str(tmp_path / "runs")})
    with locked(config):
        with (
            pytest.raises(InputError, match="name: only is not allowed; that run is being trained right now"),
            locked(config),
        ):
            pass
        with locked(parse_config({"name": "other", "runs_dir": str(tmp_path / "runs")})):
            pass
    with locked(config):  # free again
        pass


def test_a_baseline_folder_keeps_its_network(tmp_path: Path) -> None:
    narrow, wide = (NetworkConfig(network="small_cnn", options={"width": width}) for width in (0.2, 0.3))
    check_network(tmp_path, narrow)
    check_network(tmp_path, narrow)
    with pytest.raises(InputError, match="it has trained another network"):
        check_network(tmp_path, wide)


def test_a_question_has_a_file_of_its_own() -> None:
    assert evaluation_file("test", stored=True) == "evaluation-test.json"
    assert evaluation_file("test", stored=False) == "asked-test.json"
