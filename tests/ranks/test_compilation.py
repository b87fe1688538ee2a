"""Which forwards may run compiled: every way through the states, without torch."""

from __future__ import annotations

from xdit_sidecar.daemon.ranks.flux.compilation import Compilation, Sizes

SMALL, LARGE, TWO_ROWS = Sizes(1, 64, 16), Sizes(1, 256, 16), Sizes(2, 64, 16)


def compiled() -> Compilation:
    """For SMALL."""
    compilation = Compilation()
    assert compilation.want(SMALL)
    for kind in ("double", "single"):
        assert compilation.next_piece == kind
        compilation.piece_agreed()
    return compilation


def test_nothing_runs_compiled_before_all_pieces_agreed() -> None:
    compilation = Compilation()
    assert (compilation.state, compilation.choose(SMALL)) == ("eager", "eager")
    assert compilation.want(SMALL)
    assert (compilation.state, compilation.choose(SMALL)) == ("compiling", "eager")
    compilation.piece_agreed()
    assert (compilation.state, compilation.choose(SMALL)) == ("compiling", "eager")
    compilation.piece_agreed()
    assert (compilation.state, compilation.choose(SMALL)) == ("compiled", "compiled")
    assert compilation.next_piece is None


def test_one_wish_at_a_time() -> None:
    compilation = Compilation()
    assert compilation.want(SMALL)
    assert not compilation.want(LARGE)
    for _ in range(2):
        compilation.piece_agreed()
    assert compilation.choose(LARGE) == "compared"


def test_other_sizes_are_compared_first() -> None:
    compilation = compiled()
    assert compilation.choose(LARGE) == "compared"
    compilation.agree(LARGE)
    assert compilation.choose(LARGE) == "compiled"


def test_sizes_that_need_code_of_their_own() -> None:
    compilation = compiled()
    compilation.leave_uncovered(TWO_ROWS)
    assert compilation.choose(TWO_ROWS) == "eager"
    assert compilation.want(TWO_ROWS)
    assert compilation.state == "compiling"
    assert compilation.choose(SMALL) == "compiled"  # meanwhile
    for _ in range(2):
        compilation.piece_agreed()
    assert compilation.choose(TWO_ROWS) == "compiled"


def test_code_that_never_fits_is_not_compiled_for_ever() -> None:
    compilation = compiled()
    for _ in range(10):
        compilation.leave_uncovered(SMALL)
        if not compilation.want(SMALL):
            break
        for _ in range(2):
            compilation.piece_agreed()
    else:
        raise AssertionError("it goes on")
    assert compilation.choose(SMALL) == "eager"
    assert compilation.state != "compiling"


def test_a_piece_that_cannot_be_judged_is_wanted_again() -> None:
    compilation = Compilation()
    assert compilation.want(SMALL)
    compilation.put_off()
    assert (compilation.state, compilation.next_piece) == ("eager", None)
    assert compilation.want(SMALL)


def test_refused_is_for_good() -> None:
    for compilation in (Compilation(), compiled()):
        compilation.want(LARGE)
        compilation.refuse("it is wrong")
        assert (compilation.state, compilation.reason) == ("refused", "it is wrong")
        assert compilation.next_piece is None
        assert not compilation.want(SMALL)
        assert compilation.choose(SMALL) == "eager"


def test_what_is_remembered_is_bounded() -> None:
    compilation = compiled()
    for tokens in range(1000):
        compilation.agree(Sizes(1, tokens, 1))
    assert compilation.choose(Sizes(1, 999, 1)) == "compiled"
    assert compilation.choose(SMALL) == "compared"
