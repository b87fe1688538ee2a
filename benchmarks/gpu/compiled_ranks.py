"""Waiting for the ranks' idle moments in which they compile."""

from __future__ import annotations

import time

from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.client import Client


def wait_until_compiled(client: Client, seconds: float = 240.0) -> list[m.TransformerStatus]:
    """How the ranks' transformers run, once nothing waits to be compiled any more."""
    told: list[m.TransformerStatus] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        told = [told for rank in client.status().ranks for told in rank.transformers]
        if told and all(one.state in ("compiled", "refused") for one in told):
            break
        time.sleep(0.1)
    return told
