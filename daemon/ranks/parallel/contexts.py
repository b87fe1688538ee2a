"""Parallel contexts: several configs alive at once around one set of weights.

xfuser keeps the groups of a config in module globals. Destroying and making them again takes long
and leaves four process groups behind each time, so each config is made once and its globals are
put in place when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from .attention import LocalExchange
from .config import ParallelConfig
from .peer_copies import PeerCopies
from .process_group import CONTEXT_GROUPS, RankGroup, groups_within, sequence_groups
from .ulysses import HeadExchange

#: Of the ranks of a process group, if they can.
MakeCopies = Callable[[Any], PeerCopies | None]


@dataclass(frozen=True, eq=False)
class ParallelContext:
    """The process groups and the runtime state of one config."""

    config: ParallelConfig
    group: RankGroup
    _globals: dict[str, Any]
    _sequence_groups: tuple[Any, Any]  # ulysses, ring
    _runtime: Any
    _copies: PeerCopies | None = None

    @classmethod
    def build(
        cls, config: ParallelConfig, group: RankGroup, make_copies: MakeCopies | None = None
    ) -> ParallelContext:
        """Make the groups of ``config``: all ranks together, in the same order of configs.

        ``make_copies``: for exchanges of ranks that share tokens, which without it are by
        ``group``. Raises ConfigError if the degrees do not fit the group, RuntimeError past its
        deadline. The context is active afterwards.
        """
        config.check_world(group.world_size)
        config.check_transport(group.backend, group.device.type)
        from xfuser.config import xFuserArgs
        from xfuser.core.distributed import initialize_model_parallel, parallel_state
        from xfuser.core.distributed import runtime_state as runtime

        for name in CONTEXT_GROUPS:
            setattr(parallel_state, name, None)
        with groups_within(group.deadline):
            initialize_model_parallel(
                ulysses_degree=config.ulysses,
                ring_degree=config.ring,
                sequence_parallel_degree=config.sequence,
                classifier_free_guidance_degree=config.cfg,
                pipeline_parallel_degree=config.pipefusion,
                backend=group.backend,
            )
        arguments = xFuserArgs(
            model="resident",  # never opened
            ulysses_degree=config.ulysses,
            ring_degree=config.ring,
            use_cfg_parallel=config.cfg == 2,
            pipefusion_parallel_degree=config.pipefusion,
            # Each attention call names its own; this one only has to be allowed with the degrees.
            attention_backend="SDPA" if config.ring == 1 else "SDPA_FLASH",
        )
        engine, _ = arguments.create_config()
        # A context is not bound to a model: the check of the heads is ParallelConfig's.
        heads = SimpleNamespace(num_attention_heads=config.ulysses)
        any_model = SimpleNamespace(transformer=SimpleNamespace(config=heads))
        groups = sequence_groups()
        return cls(
            config=config,
            group=group,
            _globals={name: getattr(parallel_state, name) for name in CONTEXT_GROUPS},
            _sequence_groups=(groups.ULYSSES_PG, groups.RING_PG),
            _runtime=runtime.DiTRuntimeState(any_model, engine),
            _copies=make_copies(groups.ULYSSES_PG) if make_copies and config.ulysses > 1 else None,
        )._activated()

    def activate(self) -> None:
        """Make this the config that xfuser works with; microseconds, no communication."""
        from xfuser.core.distributed import parallel_state, runtime_state

        vars(parallel_state).update(self._globals)
        groups = sequence_groups()
        groups.ULYSSES_PG, groups.RING_PG = self._sequence_groups
        runtime_state._RUNTIME = self._runtime

    def make_heads(self, nbytes: int) -> HeadExchange:
        """The exchange of one forward whose packed tensors have as many bytes.

        All ranks that share the tokens call it together.
        """
        attend = LocalExchange().attend
        copied = None if self._copies is None else self._copies.heads(nbytes, attend)
        return copied or HeadExchange(self._sequence_groups[0], attend)

    @property
    def no_copies(self) -> str | None:
        """Why exchanges are by the group, and not by copies as they were to be."""
        return None if self._copies is None else self._copies.refusal

    def give_up(self) -> None:
        """Free what exchanges keep; all ranks together, and no recording of one may be left."""
        if self._copies is not None:
            self._copies.close()

    def _activated(self) -> ParallelContext:
        self.activate()
        return self

    @property
    def sequence_rank(self) -> int:
        """This rank's place among those that share the tokens."""
        return int(self._globals["_SP"].rank_in_group)

    @property
    def cfg_rank(self) -> int:
        """This rank's place among those that share the batch."""
        return int(self._globals["_CFG"].rank_in_group)

    @property
    def stage(self) -> int:
        """This rank's place in the pipeline."""
        return int(self._globals["_PP"].rank_in_group)

    @property
    def sequence_group(self) -> Any:
        """xfuser's coordinator of the ranks that share the tokens."""
        return self._globals["_SP"]

    @property
    def cfg_group(self) -> Any:
        """xfuser's coordinator of the ranks that share the batch."""
        return self._globals["_CFG"]

    @property
    def pipeline_group(self) -> Any:
        """xfuser's coordinator of the stages."""
        return self._globals["_PP"]


def process_groups() -> list[list[int]]:
    """The ranks of each process group alive in this process: switching makes none."""
    return [sorted(ranks) for ranks in dist.distributed_c10d._world.pg_group_ranks.values()]
