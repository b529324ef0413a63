"""Run by test_token_between_networks.py: a local Ray that announces its address and stays until it is told to end."""

import sys
import time
from pathlib import Path

from coe_dist.config import parse_config
from coe_dist.orchestration.ray_session import local_ray

if __name__ == "__main__":
    node_ip, announcement = sys.argv[1], Path(sys.argv[2])
    with local_ray(parse_config({"name": "head", "workers": {"device": "cpu"}}), node_ip=node_ip) as session:
        draft = announcement.with_suffix(".draft")
        draft.write_text(session.address)
        draft.rename(announcement)
        time.sleep(10_000)
