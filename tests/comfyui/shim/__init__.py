"""TEST ONLY, a custom node pack: stock loaders accept tiny FLUX.1 files, and nodes that report.

Nothing here may know of this project: what tests compare with it must be ComfyUI's own result.
"""

from . import memory, state, tiny_sizes, tokenizers
from .nodes import NODE_CLASS_MAPPINGS

tiny_sizes.accept()
state.count()
memory.pretend()
tokenizers.keep()

__all__ = ["NODE_CLASS_MAPPINGS"]
