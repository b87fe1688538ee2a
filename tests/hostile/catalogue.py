"""All attacks, by name."""

from __future__ import annotations

from hostile import crowds, floods, noise, replays
from hostile.attack import Attack

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        noise.RandomBytes(),
        noise.WrongTypes(),
        noise.Mutations(),
        noise.Bombs(),
        replays.Replays(),
        floods.ManyParts(),
        floods.EndlessMessages(),
        floods.EndlessFromSession(),
        floods.Requests(),
        floods.Oversized(),
        floods.Deaf(),
        crowds.IdleConnections(),
        crowds.GreetedConnections(),
        crowds.SessionChurn(),
        crowds.RoutingIds(),
        crowds.SentDescriptors(),
        crowds.Scratches(),
        crowds.SlowHello(),
    )
}
