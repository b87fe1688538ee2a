"""One component of a safetensors file, handed over straight from the file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from . import limits
from .client.attachment import Attachment
from .client.client import Client
from .client.deadline import ShouldCancel
from .client.fill import RegionWriter
from .client.progress import OnProgress
from .errors import BadFile, SidecarError
from .fingerprint import fingerprint_file
from .manifest import TensorSpec, lay_out
from .messages import Component
from .regions.base import read_exactly
from .regions.cuda_driver import CudaError
from .regions.file_parts import FilePart
from .regions.views import torch_dtype
from .safetensors_file import FileTensor, SafetensorsFile

if TYPE_CHECKING:
    import torch

# Converting these changes the precision and nothing else; integers and fp8 have scales beside them.
_CONVERTIBLE = ("F64", "F32", "F16", "BF16")
_FLOATS = {*_CONVERTIBLE, "F8_E4M3", "F8_E5M2"}


class ComponentFile:
    """The tensors of ``file`` whose names begin with ``prefix``, as one component.

    ``component`` has their names without the prefix ("first_stage_model." selects the VAE of a
    whole checkpoint). ``dtype`` ("F32", "F16", "BF16"; None: as stored) is what floating tensors
    are converted to on the way, or single ones, fp8 among them, by their names in the file; only
    where it differs from the file's is torch needed.
    ``bytes_read`` counts the bytes of weights that were read. Raises BadFile.
    """

    def __init__(
        self,
        file: SafetensorsFile,
        *,
        role: str,
        label: str | None = None,
        prefix: str = "",
        dtype: str | Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(dtype, str) and dtype not in _CONVERTIBLE:
            raise BadFile(
                f"weights cannot be converted to {dtype!r}: choose from {', '.join(_CONVERTIBLE)}"
            )
        self.file = file
        self.bytes_read = 0
        self._sources = [t for t in file.tensors if t.spec.name.startswith(prefix)]
        if not self._sources:
            begins = f" whose name begins with {prefix!r}" if prefix else ""
            raise BadFile(f"{file.label!r} has no tensor{begins}; it cannot be the {role}")
        if any(t.spec.name == prefix for t in self._sources):
            raise BadFile(f"{file.label!r}: the prefix {prefix!r} is itself a tensor's name")
        dtypes = {spec.name: _converted(spec, dtype) for spec, _ in self._sources}
        # A file that has the wanted dtype already is the same component as one read as it is.
        changed = {s.name: dtypes[s.name] for s, _ in self._sources if dtypes[s.name] != s.dtype}
        specs = [
            msgspec.structs.replace(
                spec, name=spec.name.removeprefix(prefix), dtype=dtypes[spec.name]
            )
            for spec, _ in self._sources
        ]
        conversion = dtype if isinstance(dtype, str) else repr(sorted(changed.items()))
        self.component = Component(
            fingerprint=fingerprint_file(file, conversion if changed else None, prefix),
            role=role,
            label=_readable(label if label is not None else file.label),
            tensors=lay_out(specs),
        )

    def fill(self, writer: RegionWriter) -> None:
        """Read the weights into the region that ``writer`` has open for this component.

        Raises BadFile if the file cannot be read or is written meanwhile: such a fill must not be
        committed.
        """
        pairs = list(zip(self._sources, self.component.tensors, strict=True))
        as_stored = [
            FilePart(source.position, target.offset, target.nbytes)
            for source, target in pairs
            if source.spec.dtype == target.dtype
        ]
        try:
            writer.read_file_parts(self.file.descriptor, as_stored, self._count)
            for source, target in pairs:
                if source.spec.dtype != target.dtype:
                    self._convert(writer, source, target)
                    self._count(source.spec.nbytes)
                    writer.progressed(target.nbytes)
        except (EOFError, OSError) as error:
            self.file.check_unchanged()
            raise BadFile(f"reading {self.file.label!r} failed: {error}; try again") from None
        self.file.check_unchanged()

    def _count(self, nbytes: int) -> None:
        self.bytes_read += nbytes

    def _convert(self, writer: RegionWriter, source: FileTensor, target: TensorSpec) -> None:
        import torch

        if not source.spec.nbytes:
            return
        data = bytearray(source.spec.nbytes)
        read_exactly(self.file.descriptor, source.position, memoryview(data))
        stored = torch.frombuffer(data, dtype=torch_dtype(source.spec.dtype))
        view: torch.Tensor = writer.tensors()[target.name]
        view.copy_(stored.reshape(source.spec.shape))


def hand_over_file(
    client: Client,
    file: ComponentFile,
    device: str,
    *,
    timeout: float = 120.0,
    should_cancel: ShouldCancel | None = None,
    on_progress: OnProgress | None = None,
) -> Attachment:
    """Attach the component if it is resident; else make it so. Errors of Client.hand_over.

    Where somebody has it already only the file's header was read; what is resident on one GPU is
    copied from there to the next, so that N of them do not read N times. ``device`` is "cpu" or a
    GPU's UUID. ``timeout`` (seconds) counts from the last bytes that came, so that a slow disk has
    its time. ``on_progress`` is told bytes done and in all, also while another client fills.
    """

    def fill(writer: RegionWriter) -> None:
        if not _copy_from_peer(client, file, device, writer):
            file.fill(writer)

    began = time.monotonic()
    found = client.attach(
        file.component.fingerprint, device, timeout=timeout, should_cancel=should_cancel
    )
    if found is not None:
        return found
    return client.hand_over(
        file.component,
        device,
        fill,
        timeout=max(0.1, timeout - (time.monotonic() - began)),
        should_cancel=should_cancel,
        on_progress=on_progress,
    )


def _copy_from_peer(client: Client, file: ComponentFile, device: str, writer: RegionWriter) -> bool:
    """Fill from another GPU that has the component. False where none has, or it is out of reach."""
    for peer in client.devices():
        if "cpu" in (device, peer) or peer == device:
            continue
        try:
            found = client.attach(file.component.fingerprint, peer)
        except SidecarError:  # another process's GPU
            continue
        if found is None:
            continue
        with found:
            if found.component.tensors != writer.component.tensors:
                continue
            try:
                writer.copy_region(found.mapping)
                writer.mapping.synchronize()
            except CudaError:
                continue
            return True
    return False


def _converted(spec: TensorSpec, wanted: str | Mapping[str, str] | None) -> str:
    if not isinstance(wanted, Mapping):
        return wanted if wanted is not None and spec.dtype in _CONVERTIBLE else spec.dtype
    dtype = wanted.get(spec.name, spec.dtype)
    if dtype != spec.dtype and not {dtype, spec.dtype} <= _FLOATS:
        raise BadFile(f"{spec.name} is stored as {spec.dtype} and cannot be converted to {dtype}")
    return dtype


def _readable(label: str) -> str:
    # A file's name may hold bytes that are no text, and messages cannot carry those.
    return label.encode(errors="replace").decode()[: limits.NAME]
