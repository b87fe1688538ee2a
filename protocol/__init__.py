"""What the daemon and its clients share: messages, limits, versions, regions, the blocking client.

Nothing here imports torch at module level, nothing needs more than pyzmq, msgpack and msgspec, and
everything imports cleanly where there is neither a daemon nor a GPU.
"""
