"""Packages that diffusers and transformers import if they are there, for what ranks never do.

They cost a rank's start a third of its CPU seconds, and a start is what a client waits for when a
rank has died.
"""

from __future__ import annotations

import sys

UNUSED = {
    "accelerate": "device maps and offloading; a rank's weights are views of regions",
    "peft": "LoRA; a rank has branches of its own",
    "scipy": "losses and schedulers; a rank trains nothing and has schedules of its own",
    "sklearn": "measures of assisted generation; it imports scipy",
}


def hide_unused_packages() -> None:
    """Have this process take them for not installed, as long as none of them is imported yet."""
    for name in UNUSED:
        # None in sys.modules is Python's word for "not to be imported"; find_spec says so, too.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
