"""Speed and quality against named peers, both sides measured in the same run on the same machine."""
