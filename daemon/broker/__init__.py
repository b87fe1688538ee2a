"""The broker: one asyncio process that knows who holds what. Imports no torch.

``catalog``, ``sessions`` are pure state machines (events in, instructions out); the other modules
do their I/O.
"""
