"""Two processes hand over the same weights, and the daemon's ranks draw a picture with them.

Who maps which bytes, and how many copies there are. Exits with 1 unless one physical copy was
measured, before and after a client was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from pathlib import Path

from demo_files import WeightsFile, ensure_files
from demo_processes import ClientProcess, Daemon, DemoFailed, HandedOver
from demo_proof import DeviceProof, Holder, HostProof
from demo_report import MIB, Report, mib, ms
from xdit_sidecar.protocol import messages as m
from xdit_sidecar.protocol.errors import SidecarError
from xdit_sidecar.protocol.regions.cuda_driver import CudaDriver, CudaError, CudaUnavailable

_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "demo"
# What a client may read of a file that somebody else has loaded: its header, and messages.
_HEADER_BYTES = 1 * MIB
_RANKS = 2


def main() -> int:
    """Run the demo: 0 if everything was as promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--cache-dir", type=Path, default=_CACHE, help="where the weights lie")
    arguments = parser.parse_args()
    # Else the daemon would be left running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    report = Report()
    start = time.monotonic()
    try:
        run(report, arguments.device, arguments.cache_dir)
    except (DemoFailed, SidecarError, CudaError, OSError) as error:
        report.check(False, str(error))
    except KeyboardInterrupt:
        report.check(False, "interrupted")
    report.say(f"\n{time.monotonic() - start:.1f} s in all.")
    if report.failures:
        report.say(
            f"The demo failed: {len(report.failures)} things were not as promised, see above."
        )
        return 1
    report.say("One copy, whoever uses it.")
    return 0


def run(report: Report, wanted: str, cache: Path) -> None:
    """The story. Whatever happens, no process and no file of it remains."""
    *files, transformer = ensure_files(cache)
    for file in [*files, transformer]:
        report.say(f"{file.role}: {file.path} ({mib(file.path.stat().st_size)}, random weights)")
    free_before = _free_memory_per_device()
    with contextlib.ExitStack() as cleanup:
        start = time.monotonic()
        daemon = Daemon(wanted, _RANKS)
        cleanup.callback(daemon.close)
        status = daemon.wait_until_ready()
        device = choose_device(report, status, wanted)
        report.say(
            f"daemon {status.pid} serves {device.name} ({device.device}), "
            f"up in {ms(time.monotonic() - start)}"
        )

        def start_client(name: str) -> ClientProcess:
            client = ClientProcess(daemon, device.device, name)
            cleanup.callback(client.close)
            return client

        clients = [start_client("client 1"), start_client("client 2")]
        for client in clients:
            client.wait_until_ready()
        if device.kind != "memfd":  # the driver counts the contexts of ranks that come later, too
            daemon.wait_for_ranks()
        proof = (
            HostProof(status, clients)
            if device.kind == "memfd"
            else DeviceProof(device.device, free_before[device.device])
        )
        holders = hand_over_together(report, clients, files)
        proof.show(report, holders)

        victim, survivor = sorted(holders, key=weights_read, reverse=True)
        start = time.monotonic()
        victim.process.kill()
        report.say(f"\n{victim.process.name}, which had loaded weights, is killed with SIGKILL.")
        newcomer = start_client("client 3")
        newcomer.wait_until_ready()
        (holder,) = hand_over([newcomer], files)
        show_hand_over(report, [holder])
        report.check(
            weights_read(holder) == 0 and process_read(holder) < _HEADER_BYTES,
            f"{newcomer.name} has every tensor after "
            f"{ms(sum(c['seconds'] for c in holder.components))} and read no weights",
        )
        compare_bytes(report, [survivor, holder])
        proof.show(report, [survivor, holder])

        survivor.process.stop()
        draw(report, daemon, newcomer, transformer)
        draw_digits(report, daemon, newcomer, cache / "picture.png")
        whole = hand_over([newcomer], [*files, transformer])[0]
        ranks = {rank.pid: f"rank {rank.rank}" for rank in daemon.status().ranks if rank.pid}
        proof.show_ranks(report, whole, ranks)

        report.say("\nEverything is stopped.")
        finish(report, daemon, [newcomer])
        proof.show_end(report)


def draw(report: Report, daemon: Daemon, client: ClientProcess, transformer: WeightsFile) -> None:
    """The client brings the transformer, the ranks draw."""
    (holder,) = hand_over([client], [transformer])
    show_hand_over(report, [holder])
    client.send(do="draw")
    times: dict[str, float] = client.receive()
    ranks = daemon.status().ranks
    rows = [[what, ms(seconds)] for what, seconds in times.items()]
    report.table(f"A picture of 256 x 256 pixels by {len(ranks)} ranks", ["part", "took"], rows)
    check_ranks(report, daemon, "it was drawn (random weights draw noise, so it is not kept)")


def draw_digits(report: Report, daemon: Daemon, client: ClientProcess, out: Path) -> None:
    """The client brings a small model that was trained, the ranks draw the ten digits."""
    out.unlink(missing_ok=True)
    client.send(do="draw digits", out=str(out))
    seconds: float = client.receive()
    report.check(out.is_file(), f"ten handwritten digits, in {ms(seconds)}, are in {out}")
    check_ranks(report, daemon, "no rank had to be started again")


def check_ranks(report: Report, daemon: Daemon, what: str) -> None:
    """Check that the ranks that drew are those that were started at first."""
    report.check(all(rank.starts == 1 for rank in daemon.status().ranks), what)


def choose_device(report: Report, status: m.Status, wanted: str) -> m.DeviceStatus:
    """The first device that is ready. Raises DemoFailed if none of the wanted kind is."""
    for device in status.devices:
        if device.state == "ready" and (wanted != "cuda" or device.device != "cpu"):
            return device
        report.say(f"{device.device} cannot be used: {device.error}")
    raise DemoFailed(f"no device for --device {wanted}")


def hand_over(clients: list[ClientProcess], files: list[WeightsFile]) -> list[Holder]:
    """All clients hand the files over at the same moment, then read every byte of them."""
    for client in clients:
        client.send(do="hand-over", files=[[file.role, str(file.path)] for file in files])
    answers: list[list[HandedOver]] = [client.receive() for client in clients]
    return [Holder(client, answer) for client, answer in zip(clients, answers, strict=True)]


def hand_over_together(
    report: Report, clients: list[ClientProcess], files: list[WeightsFile]
) -> list[Holder]:
    """Let two clients race, and check that each file was read by one of them only."""
    holders = hand_over(clients, files)
    show_hand_over(report, holders)
    for number, file in enumerate(files):
        pair = [holder.components[number] for holder in holders]
        pair.sort(key=lambda component: component["weights_read"])
        attached, filled = pair
        report.check(
            attached["weights_read"] == 0
            and attached["process_read"] < _HEADER_BYTES
            and filled["weights_read"] == filled["payload"],
            f"{file.role}: read once ({mib(filled['weights_read'])}); the other client read "
            f"{attached['weights_read']} bytes of weights",
        )
    compare_bytes(report, holders)
    return holders


def show_hand_over(report: Report, holders: list[Holder]) -> None:
    """What each client did."""
    rows = [
        [
            f"{holder.process.name}: {component['role']}",
            "filled" if component["weights_read"] else "attached",
            mib(component["weights_read"]),
            mib(component["process_read"]),
            ms(component["seconds"]),
            str(component["tensors"]),
        ]
        for holder in holders
        for component in holder.components
    ]
    columns = ["hand-over", "", "weights read", "all reads (rchar)", "took", "tensors"]
    report.table("Who read what", columns, rows)


def compare_bytes(report: Report, holders: list[Holder]) -> None:
    """Have every byte summed up in each client; this also brings the pages into its tables."""
    for holder in holders:
        holder.process.send(do="use")
    sums = [holder.process.receive() for holder in holders]
    outside = [name for h in holders for c in h.components for name in c["outside"]]
    report.check(
        sums[0] == sums[1] and not outside,
        f"{holders[0].process.name} and {holders[1].process.name} see the same bytes in place",
    )


def finish(report: Report, daemon: Daemon, clients: list[ClientProcess]) -> None:
    """Stop everybody in order, and check that nothing stays."""
    status = daemon.status()
    children = [*(d.keeper_pid for d in status.devices), *(rank.pid for rank in status.ranks)]
    pids = [status.pid, *(pid for pid in children if pid is not None)]
    ends = [client.stop() for client in clients]
    end, left = daemon.stop()
    alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    report.check(
        not any(ends) and end == 0 and not left and not alive,
        f"exit statuses {[*ends, end]}; processes of the daemon left: {len(alive)}; "
        f"files left in its directory: {len(left)}",
    )


def weights_read(holder: Holder) -> int:
    """Bytes of weights that a client read from files."""
    return sum(component["weights_read"] for component in holder.components)


def process_read(holder: Holder) -> int:
    """Bytes of anything that a client read during its hand-overs."""
    return sum(component["process_read"] for component in holder.components)


def _free_memory_per_device() -> dict[str, int]:
    """UUID → bytes; makes this process's contexts, so that their cost is not counted later."""
    try:
        driver = CudaDriver.load()
    except (CudaUnavailable, CudaError):
        return {}
    return {
        driver.device_uuid(ordinal): driver.memory_info(ordinal)[0]
        for ordinal in range(driver.device_count())
    }


if __name__ == "__main__":
    sys.exit(main())
