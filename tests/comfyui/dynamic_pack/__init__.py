"""TEST ONLY, a custom node pack: modules are built as where dynamic VRAM is on.

That needs a GPU. What loaders meet of it does not: layers without parameters until a file's are
assigned to them, in the file's dtype.
"""

from __future__ import annotations

import comfy.memory_management
import comfy.model_patcher


class PagingPatcher(comfy.model_patcher.ModelPatcher):
    """Says that it pages, and does not."""

    def is_dynamic(self) -> bool:
        return True


comfy.memory_management.aimdo_enabled = True
comfy.model_patcher.CoreModelPatcher = PagingPatcher

NODE_CLASS_MAPPINGS: dict[str, type] = {}
