"""What a job says of its tensors is compared with what came."""

from __future__ import annotations

import pytest
from xdit_sidecar.daemon.broker.job_tensors import check_tensors
from xdit_sidecar.protocol import limits
from xdit_sidecar.protocol.errors import BadMessage
from xdit_sidecar.protocol.messages import TensorPart

MIB = limits.MIB


def part(name: str = "x", **fields: object) -> TensorPart:
    """64 KiB of numbers."""
    given = {"dtype": "F32", "shape": [1, 16, 32, 32], **fields}
    return TensorPart(name=name, **given)  # type: ignore[arg-type]


def placed(offset: int = 0, name: str = "x", **fields: object) -> TensorPart:
    return part(name, **{"inline": False, "offset": offset, **fields})


@pytest.mark.parametrize(
    ("parts", "frames", "scratch"),
    [
        ([part()], [65536], None),
        ([part(), part("y", shape=[0])], [65536, 0], None),
        ([part("y", inline=False, digest=b"." * 32)], [], None),
        ([placed()], [], 65536),
        ([placed(MIB - 65536)], [], MIB),
        ([placed(64, dtype="BF16"), part("timestep", shape=[1])], [4], MIB),
    ],
)
def test_what_fits(parts: list[TensorPart], frames: list[int], scratch: int | None) -> None:
    check_tensors(parts, [bytes(size) for size in frames], scratch)


@pytest.mark.parametrize(
    ("parts", "frames", "scratch", "words"),
    [
        ([part(), part()], [65536, 65536], None, "same name"),
        ([part()], [], None, "fill 1 frames, 0 came"),
        ([part()], [65536, 1], None, "fill 1 frames, 2 came"),
        ([part()], [65535], None, "65536 bytes by its shape, its frames 65535"),
        ([part(inline=False)], [], None, "neither bytes nor a digest"),
        (
            [part("a", shape=[limits.KEPT_BYTES], inline=False, digest=b"." * 32)],
            [],
            None,
            "exceed",
        ),
        ([placed()], [], None, "names none"),
        ([placed()], [], 65535, "does not lie"),
        ([placed(64)], [], 65536, "does not lie"),
        ([placed(limits.SCRATCH)], [], limits.SCRATCH, "does not lie"),
        ([placed(32)], [], MIB, "does not lie"),
        ([placed(inline=True)], [65536], MIB, "says twice"),
        ([placed(digest=b"." * 32)], [], MIB, "says twice"),
        # Others may change what lies there while the ranks read it.
        ([placed(name="timestep")], [], MIB, "may not lie"),
        ([placed(name="context")], [], MIB, "may not lie"),
        ([placed(dtype="I64")], [], MIB, "may not lie"),
        ([placed(dtype="U8")], [], MIB, "may not lie"),
    ],
)
def test_what_does_not(
    parts: list[TensorPart], frames: list[int], scratch: int | None, words: str
) -> None:
    with pytest.raises(BadMessage, match=words):
        check_tensors(parts, [bytes(size) for size in frames], scratch)
