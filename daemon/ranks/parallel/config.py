"""How many ranks work on each dimension of one forward."""

from __future__ import annotations

from dataclasses import dataclass, fields

LARGEST_CFG = 2  # conditional and unconditional; xfuser knows no more


class ConfigError(ValueError):
    """Degrees that cannot work together, or not with this model or these devices."""


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism; all 1 is a single rank.

    ``ulysses`` splits attention heads, ``ring`` the keys and values, ``cfg`` the batch, and
    ``pipefusion`` the blocks. Ulysses and ring split the tokens, too. Hashable: the key of a
    context.
    """

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1
    pipefusion: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            degree = getattr(self, field.name)
            if type(degree) is not int or degree < 1:
                raise ConfigError(f"{field.name}={degree!r}: degrees are whole numbers from 1 up")
        if self.cfg > LARGEST_CFG:
            raise ConfigError(f"cfg={self.cfg}: at most {LARGEST_CFG}; raise ulysses or ring")
        if self.pipefusion > 1 and self.sequence > 1:
            raise ConfigError(
                f"{self}: pipefusion works with cfg only; set ulysses and ring to 1, or "
                f"pipefusion to 1 and ulysses to {self.ulysses * self.pipefusion}"
            )

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens of one row."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.sequence * self.cfg * self.pipefusion

    def check_world(self, world_size: int) -> None:
        """Raise ConfigError unless exactly ``world_size`` ranks are needed."""
        if self.world_size != world_size:
            raise ConfigError(
                f"{self} needs {self.world_size} ranks, the group has {world_size}: "
                "choose degrees whose product is the number of ranks"
            )

    def check_model(self, heads: int, blocks: int) -> None:
        """Raise ConfigError if a model of that many attention heads and blocks cannot be split."""
        if heads % self.ulysses:
            fitting = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ConfigError(
                f"ulysses={self.ulysses} does not divide the model's {heads} heads: "
                f"use one of {fitting}, or ring"
            )
        if self.pipefusion > blocks:
            raise ConfigError(
                f"pipefusion={self.pipefusion} stages for {blocks} blocks: a stage would be empty"
            )

    def check_transport(self, backend: str, device_type: str) -> None:
        """Raise ConfigError where ``backend`` cannot carry this config's messages."""
        # torch's ring attention over gloo with CUDA tensors ends both ranks with a segmentation
        # fault, and gloo's send and receive take host memory only.
        if device_type == "cuda" and backend != "nccl" and (self.ring > 1 or self.pipefusion > 1):
            raise ConfigError(
                f"{self}: ring and pipefusion on CUDA need NCCL, so each rank a GPU of its own; "
                "ranks that share a GPU can use ulysses and cfg"
            )

    def __str__(self) -> str:
        degrees = {field.name: getattr(self, field.name) for field in fields(self)}
        return "×".join(f"{name}{n}" for name, n in degrees.items() if n > 1) or "single"
