"""The book of what the ranks keep: bounded, by session, the same as the ranks' own."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from xdit_sidecar.daemon.broker.kept_tensors import KeptKey, KeptTensors
from xdit_sidecar.protocol.messages import TensorPart


def part(name: str, nbytes: int = 10, *, inline: bool = True, digest: bool = True) -> TensorPart:
    """A tensor that is known by its name."""
    key = name.encode().ljust(32, b".") if digest else None
    return TensorPart(name=name, dtype="U8", shape=[nbytes], digest=key, inline=inline)


def key(session: str, name: str) -> KeptKey:
    found = part(name).digest
    assert found is not None
    return KeptKey(session, found)


def test_what_was_sent_is_not_missing() -> None:
    kept = KeptTensors()
    named = part("a", inline=False)
    assert kept.missing("s1", [named]) == [named.digest]
    assert kept.use("s1", [part("a")]) == []
    assert kept.missing("s1", [named]) == []
    assert (len(kept), kept.nbytes) == (1, 10)


def test_a_digest_counts_for_its_session_alone() -> None:
    kept = KeptTensors()
    kept.use("s1", [part("a")])
    assert kept.missing("s2", [part("a", inline=False)]) == [part("a").digest]


def test_tensors_without_a_digest_are_not_kept() -> None:
    kept = KeptTensors()
    kept.use("s1", [part("a", digest=False)])
    assert (len(kept), kept.nbytes) == (0, 0)
    assert kept.missing("s1", [part("a", digest=False)]) == []


def test_the_least_recently_used_goes_first() -> None:
    kept = KeptTensors(most=2)
    kept.use("s1", [part("a")])
    kept.use("s2", [part("b")])
    kept.use("s1", [part("a", inline=False)])
    assert kept.use("s3", [part("c")]) == [key("s2", "b")]


def test_bytes_are_bounded() -> None:
    kept = KeptTensors(most_bytes=25)
    kept.use("s1", [part("a"), part("b")])
    assert kept.use("s1", [part("c")]) == [key("s1", "a")]
    assert kept.nbytes == 20


def test_what_is_too_much_is_not_kept_at_all() -> None:
    kept = KeptTensors(most_bytes=25)
    assert kept.use("s1", [part("a", 30)]) == [key("s1", "a")]
    assert (len(kept), kept.nbytes) == (0, 0)


def test_other_bytes_under_the_same_digest_are_counted() -> None:
    # A client that lies about its digests must not make the ranks keep more than is in the book.
    kept = KeptTensors(most_bytes=1000)
    kept.use("s1", [part("a", 1)])
    kept.use("s1", [part("a", 900)])
    assert kept.nbytes == 900
    assert kept.use("s1", [part("b", 200)]) == [key("s1", "a")]
    kept.use("s1", [part("b", 3)])
    assert kept.nbytes == 3


def test_a_size_that_is_only_claimed_counts_for_nothing() -> None:
    kept = KeptTensors()
    kept.use("s1", [part("a", 10)])
    kept.use("s1", [part("a", 1, inline=False)])
    assert kept.nbytes == 10
    # Lost between the question and the use: the ranks have just been restarted.
    assert kept.use("s1", [part("never sent", inline=False)]) == []
    assert len(kept) == 1


def test_a_session_s_end_and_a_restart() -> None:
    kept = KeptTensors()
    kept.use("s1", [part("a"), part("b")])
    kept.use("s2", [part("a", 7)])
    kept.end_session("s1")
    kept.end_session("s1")
    assert (len(kept), kept.nbytes) == (1, 7)
    kept.clear()
    assert (len(kept), kept.nbytes) == (0, 0)


parts = st.builds(
    part, st.sampled_from("abcdef"), st.integers(0, 40), inline=st.booleans(), digest=st.booleans()
)
uses = st.lists(st.tuples(st.sampled_from(["s1", "s2", "s3"]), st.lists(parts, max_size=4)))


@settings(max_examples=200)
@given(uses)
def test_the_ranks_hold_what_is_in_the_book(given: list[tuple[str, list[TensorPart]]]) -> None:
    kept = KeptTensors(most=4, most_bytes=60)
    held: dict[KeptKey, int] = {}  # as a rank does it
    for session, brought in given:
        if kept.missing(session, brought):
            continue
        forgotten = kept.use(session, brought)
        for one in brought:
            if one.digest is not None and one.inline:
                held[KeptKey(session, one.digest)] = one.nbytes
            elif one.digest is not None:
                assert KeptKey(session, one.digest) in held
        for gone in forgotten:
            held.pop(gone, None)
        assert len(kept) == len(held) <= 4
        assert kept.nbytes == sum(held.values()) <= 60
