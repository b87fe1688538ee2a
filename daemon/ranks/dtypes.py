"""What the ranks can compute in."""

from __future__ import annotations

import torch

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
