"""Another account's attempts. Started as root, it imports, becomes nobody, and tries.

``nobody.py PACKAGES RUNTIME_DIR TOKEN FINGERPRINT COMMAND…``; answers as one JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
from pathlib import Path

_, _packages, _runtime_dir, _token, _fingerprint, *_commands = sys.argv
sys.path.insert(0, _packages)

import msgpack  # noqa: E402
import zmq  # noqa: E402
from xdit_sidecar.protocol.client.client import Client  # noqa: E402
from xdit_sidecar.protocol.endpoints import resolve_runtime_dir, zmq_address  # noqa: E402
from xdit_sidecar.protocol.errors import SidecarError  # noqa: E402
from xdit_sidecar.protocol.version import PREAMBLE_BYTES, encode_preamble  # noqa: E402

NOBODY = 65534
SECONDS = 2.0
CONTENT = bytes(range(256)) * 4


def ask_zmq(path: Path, body: dict[str, str]) -> str:
    """One request with somebody's token on a ZeroMQ socket."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger, dealer.rcvtimeo = 0, int(SECONDS * 1000)
        dealer.connect(zmq_address(path))
        dealer.send(msgpack.packb({"token": bytes.fromhex(_token), "id": 1, "body": body}))
        try:
            answer = msgpack.unpackb(dealer.recv_multipart()[0])["body"]
        except zmq.Again:
            return "no answer"
        return str(answer.get("code", answer["type"]))


def knock(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(SECONDS)
    sock.connect(str(path))
    return sock


def attempt(command: str) -> str:
    endpoints = resolve_runtime_dir(_runtime_dir)
    match command:
        case "list":
            return f"{len(os.listdir(_runtime_dir))} files"
        case "client":
            with Client(_runtime_dir, name="nobody") as client:
                client.ping(timeout=SECONDS)
            return "pong"
        case "attach":
            with Client(_runtime_dir, name="nobody") as client:
                attached = client.attach(_fingerprint, "cpu")
                assert attached is not None
                same = attached.mapping.read(0, len(CONTENT)) == CONTENT
                attached.release()
            return "same bytes" if same else "other bytes"
        case "raw-session":
            with knock(endpoints.session) as sock:
                with contextlib.suppress(BrokenPipeError):  # refused at once; it can be read
                    sock.sendall(encode_preamble())
                with sock.makefile("rb") as stream:
                    stream.read(PREAMBLE_BYTES)
                    (length,) = struct.unpack("!I", stream.read(4))
                    said = msgpack.unpackb(stream.read(length))
                return f"{said['type']} {said.get('code')}"
        case "raw-control":
            with knock(endpoints.control) as sock:
                return "greeted" if sock.recv(1) else "cut off"
        case "control":
            return ask_zmq(endpoints.control, {"type": "status"})
        case "bulk":
            return ask_zmq(endpoints.bulk, {"type": "echo"})
    raise ValueError(command)


def main() -> None:
    # Everything is imported: from here on files of the installation are out of reach.
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    answers = {}
    for command in _commands:
        try:
            answers[command] = attempt(command)
        except ConnectionError:
            answers[command] = "cut off"
        except (OSError, SidecarError) as error:
            answers[command] = type(error).__name__
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
