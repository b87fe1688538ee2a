"""One attack on one daemon, and whether it is as well afterwards as before."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from daemon_process import DaemonProcess
from xdit_sidecar.protocol import limits

from hostile import vitals
from hostile.attack import Attack
from hostile.victim import CONTENT, small_component

# How much the broker may grow. Attacks that fill its queues take it to UNREAD_MEMORY before it
# sheds them, and by MARGIN further until it has looked and ZeroMQ's thread has let go; the others
# have the margin only.
MARGIN = 512 * limits.MIB
AFTERWARDS = 96 * limits.MIB  # what the allocator may keep
PING_P99 = 1.0  # seconds, during the attack, beyond what the machine itself makes them wait
_ATTACKER = Path(__file__).with_name("attacker.py")


@dataclass
class Outcome:
    """Figures of one siege; sizes in bytes, times in seconds."""

    inputs: int
    seconds: float
    rss_before: int
    rss_peak: int
    rss_after: int
    descriptors_before: int
    descriptors_after: int
    pings: int
    pings_failed: int
    ping_p50: float
    ping_p99: float
    ping_max: float
    ping_slow: int  # how many took longer than PING_P99 and the slowest before the attack
    log_bytes: int

    def to_json(self) -> dict[str, float]:
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(self).items()}


def serve_honestly(daemon: DaemonProcess) -> list[bytes]:
    """An honest client pings, hands over and attaches. Returns secrets that it learned."""
    component = small_component(secrets.randbits(255))
    with daemon.client("honest") as client, daemon.client("second") as second:
        client.ping(timeout=10)
        filled = client.hand_over(component, "cpu", lambda writer: writer.write(0, CONTENT))
        attached = second.attach(component.fingerprint, "cpu")
        assert attached is not None, "what was handed over is not resident"
        for attachment in (filled, attached):
            assert attachment.mapping.read(0, len(CONTENT)) == CONTENT
            attachment.release()
        daemon.wait_for_status(
            lambda status: (
                not any(
                    c.sessions for c in status.components if c.fingerprint == component.fingerprint
                )
            )
        )
        client.evict(component.fingerprint, "cpu")
        known = [session._session.welcome.token for session in (client, second)]
        return [*known, attached.region.encode()]


def besiege(
    daemon: DaemonProcess, attack: Attack, count: int, *, seed: int = 0, seconds: float = 80.0
) -> Outcome:
    """Run the attack in its own process; AssertionError if the daemon took harm."""
    serve_honestly(daemon)
    pid, log_before = daemon.pid, len(daemon.log)
    rss, fds = vitals.memory(pid), vitals.steady(lambda: vitals.descriptors(pid))
    vitals.reset_peak(pid)
    with vitals.Pinger(daemon) as calm:
        time.sleep(0.5)
    with vitals.Pinger(daemon) as pinger:
        done = subprocess.Popen(
            [
                *(sys.executable, str(_ATTACKER), attack.name),
                *(str(daemon.runtime_dir), str(count), str(seed)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = done.communicate(timeout=seconds)
        finally:
            done.kill()
            done.wait()
    assert done.returncode == 0, f"{attack.name}: {err}\n{daemon.log[-3000:]}"
    report = json.loads(out)
    assert daemon.process is not None
    assert daemon.process.poll() is None, f"the daemon ended:\n{daemon.log[-3000:]}"
    known = serve_honestly(daemon)
    outcome = Outcome(
        inputs=report["inputs"],
        seconds=report["seconds"],
        rss_before=rss,
        rss_peak=vitals.memory(pid, "VmHWM"),
        rss_after=vitals.settle(lambda: vitals.memory(pid), rss + AFTERWARDS),
        descriptors_before=fds,
        descriptors_after=vitals.settle(lambda: vitals.descriptors(pid), fds),
        pings=len(pinger.seconds),
        pings_failed=len(pinger.failures),
        ping_p50=pinger.percentile(50),
        ping_p99=pinger.percentile(99),
        ping_max=max(pinger.seconds),
        ping_slow=sum(took > PING_P99 + max(calm.seconds) for took in pinger.seconds),
        log_bytes=len(daemon.log) - log_before,
    )
    known += [bytes.fromhex(secret) for secret in report["secrets"]]
    check(daemon, attack, outcome, known, attacker=done.pid)
    return outcome


def check(
    daemon: DaemonProcess, attack: Attack, outcome: Outcome, known: list[bytes], attacker: int
) -> None:
    """What must hold after every attack."""
    most = MARGIN + (limits.UNREAD_MEMORY if attack.fills_memory else 0)
    grown = outcome.rss_peak - outcome.rss_before
    assert grown <= most, f"grew by {grown >> 20} MiB, may by {most >> 20}"
    kept = outcome.rss_after - outcome.rss_before
    assert kept <= AFTERWARDS, f"kept {kept >> 20} MiB, may keep {AFTERWARDS >> 20}"
    assert outcome.descriptors_after <= outcome.descriptors_before, "descriptors are left"
    assert not outcome.pings_failed, f"an honest client's question failed: {outcome}"
    # In a short test one percent is less than a ping.
    assert outcome.ping_slow <= max(2, outcome.pings // 100), f"pings were slow: {outcome}"
    log = daemon.log
    for secret in known:
        forms = (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1])
        assert not any(form in log for form in forms), "a secret is in the log"
    assert "Traceback" not in log, log[-3000:]
    if attack.logged:
        words = (attack.logged, f"uid={os.geteuid()}", f"pid={attacker}")
        lines = [line for line in log.splitlines() if all(word in line for word in words)]
        assert lines, f"no log line has {words}:\n{log[-3000:]}"
