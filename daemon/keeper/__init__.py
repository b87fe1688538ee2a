"""The keeper: one process per device that owns its regions. Imports no torch.

It answers the broker over one socket pair, in order, and does nothing else: nothing in it can
hang on a collective or crash on a kernel. It dies with the broker.
"""
