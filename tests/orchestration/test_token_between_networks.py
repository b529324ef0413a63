"""A Ray started by us, asked from another network: with the token it answers, without it does not."""

import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import clean_environment, machines, python
from waiting import until

SCENARIO = Path(__file__).with_name("scenario_head.py")
CLIENT = "import sys, ray; print(len(ray._raylet.GcsClient(address=sys.argv[1]).get_all_node_info()), 'node')"
CONNECT = """
import sys
from coe_dist.errors import InputError
from coe_dist.orchestration.ray_session import connect
try:
    with connect(sys.argv[1]):
        print("connected")
except InputError as error:
    print("refused:", error)
"""


@pytest.fixture
def networks():
    with machines(2) as pair:
        yield pair


def test_only_the_token_opens_a_session_to_another_machine(networks, tmp_path):
    state, announcement = tmp_path / "state", tmp_path / "address"
    head = subprocess.Popen(
        networks.command(0, python(SCENARIO, networks.addresses[0], str(announcement))),
        env=clean_environment(XDG_STATE_HOME=str(state)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(announcement.exists, "the head's start", process=head)
        address = announcement.read_text()
        assert address.startswith(networks.addresses[0])
        token = state / "coe_dist" / "ray-token"

        def ask(number, code, **environment):
            command = networks.command(number, [sys.executable, "-c", code, address])
            full = clean_environment(HOME=str(tmp_path), **environment)
            return subprocess.run(command, env=full, capture_output=True, text=True, timeout=90, check=False)

        with_token = ask(1, CLIENT, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        assert with_token.stdout.strip() == "1 node", with_token.stderr
        without = ask(1, CLIENT)
        assert without.returncode != 0
        assert "InvalidAuthToken" in without.stderr
        wrong = ask(1, CLIENT, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64)
        assert wrong.returncode != 0
        assert "InvalidAuthToken" in wrong.stderr

        accepted = ask(0, CONNECT, XDG_STATE_HOME=str(state))
        assert accepted.stdout.strip() == "connected", accepted.stderr
        refused = ask(0, CONNECT, XDG_STATE_HOME=str(tmp_path / "nobody"), RAY_AUTH_TOKEN="0" * 64)
        assert refused.stdout.startswith(f"refused: address: {address} is not usable; "), refused.stderr
        missing = ask(0, CONNECT, XDG_STATE_HOME=str(tmp_path / "nobody"))
        assert missing.stdout.startswith(f"refused: address: {address} is not usable; "), missing.stderr
    finally:
        head.terminate()
        head.wait(30)
