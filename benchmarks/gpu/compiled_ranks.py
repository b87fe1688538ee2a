"""Waiting for the ranks' idle moments in which they compile."""

from __future__ import annotations

import time

from xdit_sidecar.daemon.commands.status import describe_transformer
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.client.client import Client


def wait_until_compiled(client: Client, seconds: float = 240.0) -> int:
    """How many of the ranks' transformers are not compiled when nothing waits for it any more.

    1 where the ranks tell of no transformer. Prints how each of them runs, and why.
    """
    told: list[m.TransformerStatus] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        told = [told for rank in client.status().ranks for told in rank.transformers]
        if told and all(one.state != "compiling" for one in told):
            break
        time.sleep(0.1)
    for one in told:
        print(describe_transformer(one), flush=True)
    return sum(one.state != "compiled" for one in told) if told else 1
