"""The tensors of one component of a file, how they are checked, and the sentences of a refusal.

For text encoders and VAEs. Whoever accepts a component here has seen every tensor of it: it can be
loaded strictly, and nothing in the file stays unused without being known to be of no use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from ...protocol.errors import UnsupportedModel
from ...protocol.manifest import TensorSpec
from .flux_layers import FP8_MARKER, UNUSED_LEAVES, WEIGHT_SCALES
from .other_models import recognise_diffusion_model

_SCALE_DTYPES = ("F32", "F16", "BF16")
_NAMED = 3


class ComponentTensors:
    """The tensors behind the first of ``prefixes`` that the file has; without one, all of them.

    ``kind`` is what the component is called ("a T5 text encoder"), ``supported`` the end of every
    refusal. ``rename`` gives tensors the one name under which they are known here.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        label: str,
        *,
        kind: str,
        supported: str,
        prefixes: Sequence[str],
        rename: Callable[[str], str] = str,
    ) -> None:
        self._label = shorten_label(label)
        self._kind, self._supported = kind, supported
        self.prefix = find_prefix(specs, prefixes)
        self.by_name: dict[str, TensorSpec] = {}
        for spec in specs:
            if spec.name.startswith(self.prefix):
                name = rename(spec.name.removeprefix(self.prefix))
                if name in self.by_name:
                    raise self.refusal(f"has {_short(name)} twice")
                self.by_name[name] = spec

    # --- what it is

    def recognise(
        self, own: tuple[str, ...], others: Iterable[tuple[str, tuple[str, ...]]]
    ) -> None:
        """Raise :class:`UnsupportedModel` unless some name begins with one of ``own``.

        Before that for what is in ``others``, a table of what a file may be instead → parts of
        its tensors' names; the first match counts.
        """
        everything = "\n".join(self.by_name)
        for what, parts in others:
            if any(part in everything for part in parts):
                raise self.refusal(f"is {what}")
        if any(name.startswith(own) for name in self.by_name):
            return
        other = recognise_diffusion_model(self.by_name)
        if other is not None:
            raise self.refusal(f"is {other}")
        names = ", ".join(_short(name) for name in sorted(self.by_name)[:_NAMED])
        raise self.refusal(f"is not {self._kind} (its tensors: {names or 'none'})")

    # --- sizes

    def shape(self, name: str, dimensions: int) -> list[int]:
        """Of a tensor that must be there, not empty, with so many dimensions."""
        spec = self.by_name.get(name)
        if spec is None:
            raise self.incomplete([name])
        if len(spec.shape) != dimensions or 0 in spec.shape:
            raise self.refusal(f"has the tensor {name} in the impossible shape {spec.shape}")
        return spec.shape

    def count(self, before: str) -> int:
        """How many numbers there are in ``<before><number>.…``; they must be 0, 1, 2 and so on."""
        tails = (name[len(before) :] for name in self.by_name if name.startswith(before))
        numbers = {tail.partition(".")[0] for tail in tails}
        missing = [f"{before}{i}.*" for i in range(len(numbers)) if str(i) not in numbers]
        if missing or not numbers:
            raise self.incomplete(missing or [f"{before}0.*"])
        return len(numbers)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """safetensors names, the one with the most bytes first."""
        sizes: Counter[str] = Counter()
        for spec in self.by_name.values():
            sizes[spec.dtype] += spec.nbytes
        return tuple(dtype for dtype, nbytes in sizes.most_common() if nbytes)

    @property
    def nbytes(self) -> int:
        """Of all tensors of the component, those that are not used included."""
        return sum(spec.nbytes for spec in self.by_name.values())

    # --- checks

    def check(self, shapes: Mapping[str, list[int]], dtypes: Sequence[str]) -> None:
        """Every tensor of ``shapes`` is there, in that shape, row-major, in one of ``dtypes``."""
        missing = [name for name in shapes if name not in self.by_name]
        if missing:
            raise self.incomplete(missing)
        for name, shape in shapes.items():
            found = self.by_name[name]
            if found.shape != shape:
                raise self.refusal(
                    f"has the tensor {name} in shape {found.shape}, the others need {shape}"
                )
            if found.strides is not None:
                raise self.refusal(f"has the tensor {name} in another order than row-major")
            if found.dtype not in dtypes:
                raise self.refusal(f"has the tensor {name} in the dtype {found.dtype}")

    def check_the_rest(
        self, known: Iterable[str], unused: Iterable[str] = (), scaled: Iterable[str] = ()
    ) -> None:
        """Nothing but ``known`` and ``unused``, and where there are ``scaled`` layers their scales
        and the marker of scaled fp8."""
        layers, seen, unknown = set(scaled), set(), []
        accepted = {*known, *unused, *((FP8_MARKER,) if layers else ())}
        for name, spec in self.by_name.items():
            layer, _, leaf = name.rpartition(".")
            if name in accepted or (layer in layers and leaf in UNUSED_LEAVES):
                continue
            if layer not in layers or leaf not in WEIGHT_SCALES:
                unknown.append(name)
                continue
            if spec.shape not in ([], [1]) or spec.dtype not in _SCALE_DTYPES:
                raise self.refusal(
                    f"has the fp8 scale {name} as {spec.dtype} {spec.shape}: only one number for "
                    "a whole tensor is known here"
                )
            if layer in seen:
                raise self.refusal(f"has two fp8 scales for {layer}")
            seen.add(layer)
        if unknown:
            raise self.refusal(f"has tensors that {self._kind} does not have: {_list(unknown)}")

    # --- sentences

    def refusal(self, what: str) -> UnsupportedModel:
        """``what`` follows the file's name."""
        return UnsupportedModel(f"{self._label} {what}; {self._supported}")

    def incomplete(self, missing: list[str]) -> UnsupportedModel:
        """For tensors that should be there."""
        return UnsupportedModel(
            f"{self._label} is {self._kind}, but incomplete: without {_list(missing)}; copy or "
            "download the whole file again (a shard of a split model cannot be loaded)"
        )


def shorten_label(label: str) -> str:
    """A file's name as errors show it."""
    shown = repr(label)
    return shown if len(shown) <= 160 else f"{shown[:100]}…{shown[-50:]}"


def find_prefix(specs: Iterable[TensorSpec], prefixes: Iterable[str]) -> str:
    """The first of ``prefixes`` that some tensor's name begins with; "" if none does."""
    names = [spec.name for spec in specs]
    return next((p for p in prefixes if any(name.startswith(p) for name in names)), "")


def _list(names: list[str]) -> str:
    shown = ", ".join(_short(name) for name in names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:50]}…{name[-25:]}"
