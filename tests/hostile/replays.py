"""Tokens and ids that belong to somebody else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hostile.attack import Attack, Dealer, Target, expect_refusal
from hostile.victim import small_component

_VICTIM = Path(__file__).with_name("victim.py")


class Replays(Attack):
    """Another process's token, region and lease; our own token after its session ended."""

    name = "replays"
    count = 10_000

    def run(self, target: Target, count: int) -> int:
        victim = subprocess.Popen(
            [sys.executable, str(_VICTIM), str(target.endpoints.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with victim, Dealer(target) as dealer:
            assert victim.stdin is not None
            assert victim.stdout is not None
            stolen = json.loads(victim.stdout.readline())
            token = bytes.fromhex(stolen["token"])
            target.secrets.append(token)
            with target.session() as ended:
                dead = ended.token
            with target.session() as session:
                theirs = self._theirs(stolen)
                for sent in range(count - 1):
                    if sent % 3 == 0:
                        body = theirs[sent // 3 % len(theirs)]
                        expect_refusal(dealer.ask(token, body), "unauthorized")
                    elif sent % 3 == 1:
                        codes = ("unknown-component", "in-use", "bad-message", "fill-lost")
                        answer = dealer.ask(session.token, theirs[sent // 3 % len(theirs)])
                        expect_refusal(answer, *codes)
                    else:
                        expect_refusal(dealer.ask(dead, {"type": "status"}), "unauthorized")
                victim.stdin.write("\n")
                victim.stdin.close()
                assert victim.stdout.readline() == "intact\n", "the victim lost something"
                victim.wait()
                expect_refusal(dealer.ask(token, {"type": "ping"}), "unauthorized")
        return count

    def _theirs(self, stolen: dict[str, str]) -> list[dict[str, object]]:
        region, lease = stolen["region"], stolen["lease"]
        resident = small_component(1).fingerprint
        return [
            {"type": "commit", "region": region},
            {"type": "abandon", "region": region},
            {"type": "probe", "region": region, "length": 32},
            {"type": "probe", "region": region, "length": 4, "write": b"gone"},
            {"type": "release", "lease": lease},
            {"type": "evict", "device": "cpu", "fingerprint": resident},
            {"type": "commit", "region": stolen["resident"]},
            {"type": "release", "lease": region},
        ]
