"""Regions: one contiguous piece of shareable memory on one device.

``base`` has the two roles, owner (the keeper) and mapping (clients and ranks); one module per kind
implements both; ``table`` opens each region once per process; ``views`` turns a mapping into
tensors and is the only place that needs torch.
"""
