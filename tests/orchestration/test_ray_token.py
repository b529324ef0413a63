"""The token file: private, made once, refused when others could read it."""

import os
import stat
import subprocess
import sys

import pytest
from namespaces import clean_environment

from coe_dist.errors import InputError
from coe_dist.orchestration.ray_token import client_environment, default_token_file, ensure_token_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "coe_dist" / "ray-token"


def test_modes_and_content(path):
    before = os.umask(0)  # the modes must not depend on it
    try:
        assert ensure_token_file(path) == path
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    token = path.read_text()
    assert len(bytes.fromhex(token)) == 32
    assert ensure_token_file(path).read_text() == token
    assert os.listdir(path.parent) == [path.name]
    other = path.parent.parent / "other" / "ray-token"
    assert ensure_token_file(other).read_text() != token


def test_processes_that_start_together_agree_on_one_token(tmp_path):
    code = "from coe_dist.orchestration.ray_token import ensure_token_file; print(ensure_token_file().read_text())"
    environment = clean_environment(XDG_STATE_HOME=str(tmp_path))
    starting = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    tokens = {process.communicate(timeout=60)[0] for process in starting}
    assert len(tokens) == 1
    assert tokens == {(tmp_path / "coe_dist" / "ray-token").read_text() + "\n"}


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_token_file() == tmp_path / "coe_dist" / "ray-token"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_token_file() == tmp_path / ".local" / "state" / "coe_dist" / "ray-token"


def test_a_clients_token_is_the_environments_then_rays_then_ours(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert "RAY_AUTH_TOKEN_PATH" not in client_environment()
    ours = ensure_token_file()
    assert client_environment()["RAY_AUTH_TOKEN_PATH"] == str(ours)
    rays = tmp_path / ".ray" / "auth_token"
    rays.parent.mkdir()
    rays.write_text("0" * 64)
    assert "RAY_AUTH_TOKEN_PATH" not in client_environment()  # Ray finds its own
    rays.unlink()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "1" * 64)
    assert "RAY_AUTH_TOKEN_PATH" not in client_environment()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_file_others_can_read_is_refused(path, mode):
    ensure_token_file(path).chmod(mode)
    with pytest.raises(InputError, match=f"ray-token: mode {mode:04o} is not allowed; .*chmod 0600"):
        ensure_token_file(path)


def test_open_folder_is_refused(path):
    ensure_token_file(path).parent.chmod(0o755)
    with pytest.raises(InputError, match=r"coe_dist: mode 0755 is not allowed; .*chmod 0700"):
        ensure_token_file(path)


def test_link_in_its_place_is_refused(path, tmp_path):
    path.parent.mkdir(parents=True, mode=0o700)
    (tmp_path / "elsewhere").write_text("token")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="a regular file is needed"):
        ensure_token_file(path)


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"ray-token: the Ray token cannot be created .*set XDG_STATE_HOME"):
        ensure_token_file(tmp_path / "file" / "coe_dist" / "ray-token")
