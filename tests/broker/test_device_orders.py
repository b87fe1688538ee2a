"""The order of what a keeper is told, however long ranks take to let go of a region."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from xdit_sidecar.daemon.broker.device_orders import DeviceOrders


class Told:
    """Orders that write down that they were carried out."""

    def __init__(self) -> None:
        self.orders = DeviceOrders()
        self.done: list[str] = []

    def give(self, name: str, device: str = "cpu", *, hold: bool = False) -> None:
        def order() -> None:
            self.done.append(name)
            if hold:
                self.orders.hold(device)

        self.orders.give(device, order)


def test_at_once_where_nothing_is_held() -> None:
    told = Told()
    told.give("a")
    told.give("b")
    assert told.done == ["a", "b"]


def test_what_follows_waits_until_the_release() -> None:
    told = Told()
    told.give("free", hold=True)
    told.give("allocate")
    told.give("elsewhere", "other")
    assert told.done == ["free", "elsewhere"]
    told.orders.release("cpu")
    assert told.done == ["free", "elsewhere", "allocate"]


def test_an_order_that_waited_may_hold_again() -> None:
    told = Told()
    told.give("first", hold=True)
    told.give("second", hold=True)
    told.give("third")
    told.orders.release("cpu")
    told.give("fourth")
    assert told.done == ["first", "second"]
    told.orders.release("cpu")
    assert told.done == ["first", "second", "third", "fourth"]


def test_a_keeper_that_dies_takes_its_orders_along() -> None:
    told = Told()
    told.give("free", hold=True)
    told.give("allocate for nobody")
    told.orders.forget("cpu")
    told.give("allocate from the next keeper")
    assert told.done == ["free"]
    told.orders.release("cpu")
    assert told.done == ["free", "allocate from the next keeper"]
    told.orders.forget("cpu")  # nothing waits, nothing is held
    told.orders.release("cpu")


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["give", "hold", "release"]), st.sampled_from("xy"))))
def test_never_out_of_order(steps: list[tuple[str, str]]) -> None:
    told, given_to = Told(), {"x": [], "y": []}
    for number, (step, device) in enumerate(steps):
        if step == "release":
            told.orders.release(device)
            continue
        given_to[device].append(f"{device}{number}")
        told.give(f"{device}{number}", device, hold=step == "hold")
    finish: Callable[[str], None] = told.orders.release
    for _ in steps:
        finish("x")
        finish("y")
    for device, names in given_to.items():
        assert [name for name in told.done if name[0] == device] == names
