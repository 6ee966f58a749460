"""From tensors of a model file to weights on a device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from types import ModuleType
from typing import Literal

import numpy as np
import numpy.typing as npt

from llorch.core.config import RECONVERT, ModelConfig
from llorch.core.finite import first_not_finite
from llorch.core.gguf import GGUFFile, TensorInfo, shown
from llorch.core.models import ARCHITECTURES
from llorch.core.models.weights import WeightSpec
from llorch.core.plan import BoundWeight
from llorch.core.quant import DEQUANTIZABLE, dequantize, row_bytes
from llorch.errors import BindError, GGUFError, UnsupportedModelError
from llorch.providers.device import Device, HostWeight
from llorch.providers.spec import Use

Progress = Callable[[float, str], None]


@dataclass
class LoadedWeights:
    bound: dict[str, BoundWeight] = field(default_factory=dict)
    host: dict[str, np.ndarray] = field(default_factory=dict)  # what the graph computes with before it is bound
    device_bytes: int = 0
    matmul_bytes: int = 0  # what the products of one step read
    notes: list[str] = field(default_factory=list)


def architecture(config: ModelConfig) -> ModuleType:
    """The module with the family's `weights` and `build`."""
    return importlib.import_module(ARCHITECTURES[config.architecture])


def load_weights(file: GGUFFile, config: ModelConfig, device: Device, progress: Progress) -> LoadedWeights:
    """Uploads every tensor the graph reads.

    Raises GGUFError where one is missing, has another shape or holds a NaN, UnsupportedModelError where the file has
    one that the graph does not read.
    """
    loaded = LoadedWeights()
    pending: list[_Pending] = []
    for spec, uses in _wanted(file, config):
        if spec.use == "host":
            loaded.host[spec.name] = _host_values(file, spec.name)
        else:
            pending.append(_Pending(file.tensors[spec.name], uses, _type_on(device, file.tensors[spec.name], uses)))
    if note := device.expect([p.expected for p in pending]):
        loaded.notes.append(note)
    _upload(file, pending, device, loaded, progress)
    if note := _conversions(pending):
        loaded.notes.append(note)
    return loaded


def expected_weights(file: GGUFFile, config: ModelConfig, device: Device) -> list[HostWeight]:
    """The weights as the device would get them, without their data. Raises as `load_weights` does, but for NaNs."""
    wanted = [(file.tensors[spec.name], uses) for spec, uses in _wanted(file, config) if spec.use != "host"]
    return [_Pending(info, uses, _type_on(device, info, uses)).expected for info, uses in wanted]


@dataclass
class _Pending:
    """A tensor on its way, and the type in which the device gets it."""

    info: TensorInfo
    uses: frozenset[Use]
    type: str

    @property
    def nbytes(self) -> int:
        """In the device's type."""
        rows = prod(self.info.shape[:-1])
        return rows * row_bytes(self.type, self.info.shape[-1])

    @property
    def expected(self) -> HostWeight:
        """The weight as it will come, without its data: a zero that takes no memory stands for each byte."""
        data = np.broadcast_to(np.uint8(0), self.nbytes)
        return HostWeight(self.info.name, self.info.shape, self.type, data, self.uses)


def _upload(file: GGUFFile, pending: list[_Pending], device: Device, loaded: LoadedWeights, progress: Progress) -> None:
    total, done = sum(weight.nbytes for weight in pending), 0
    for wanted in pending:
        name = wanted.info.name
        progress(done / total, f"loading {name}")
        weight = _converted(_host_weight(file, name, wanted.uses), wanted.type)
        handle = device.weight(weight)
        done += wanted.nbytes
        wanted.type = weight.type
        loaded.bound[name] = BoundWeight(handle, weight.type, weight.shape)
        size = device.weight_bytes(handle)
        loaded.device_bytes += getattr(device, "held_bytes", device.weight_bytes)(handle)
        loaded.matmul_bytes += size if "matmul" in weight.uses else 0


def _wanted(file: GGUFFile, config: ModelConfig) -> list[tuple[WeightSpec, frozenset[Use]]]:
    """Each tensor once, with the set of all its uses: a tied embedding is `embed` and `matmul`."""
    found: dict[str, WeightSpec] = {}
    uses: dict[str, set[Use | Literal["host"]]] = {}
    for spec in architecture(config).weights(config):
        name = spec.tied if spec.name not in file.tensors and spec.tied is not None else spec.name
        if name not in file.tensors:
            if spec.optional:
                continue
            raise GGUFError(
                f"{file.path}: tensor {name} is missing: this is not a whole {config.architecture} model of "
                f"{config.n_layers} layers; the file holds {len(file.tensors)} tensors"
            )
        uses.setdefault(name, set()).add(spec.use)
        found.setdefault(name, spec)
        if name == spec.name:
            _check_shape(file, spec)
    if unread := [name for name in file.tensors if name not in found]:
        raise UnsupportedModelError(
            f"{file.file_of(unread[0])}: tensor {shown(unread[0])} at offset {file.tensors[unread[0]].offset} has no "
            f"place in a {config.architecture} model of {config.n_layers} layers, which uses {len(found)} of the "
            f"file's {len(file.tensors)} tensors: what it computes is not known here; use another file of this model"
        )
    return [(spec, frozenset(uses[name])) for name, spec in found.items()]  # type: ignore[arg-type]


def _check_shape(file: GGUFFile, spec: WeightSpec) -> None:
    info = file.tensors[spec.name]
    if info.shape != spec.shape:
        raise GGUFError(
            f"{file.file_of(spec.name)}: tensor {spec.name} at offset {info.offset} has shape {info.shape}, the "
            f"metadata asks for {spec.shape}; {RECONVERT}"
        )
    if info.type not in DEQUANTIZABLE:
        raise UnsupportedModelError(
            f"{file.file_of(spec.name)}: tensor {spec.name} at offset {info.offset} has type {info.type}, which cannot "
            f"be expanded; convert the model to one of: {', '.join(sorted(DEQUANTIZABLE))}"
        )


def _data(file: GGUFFile, name: str) -> npt.NDArray[np.uint8]:
    """The blocks of a tensor. Raises GGUFError where they hold something else than numbers."""
    info, data = file.tensors[name], file.data(name)
    if (wrong := first_not_finite(data, info.type)) is not None:
        at, value = wrong
        raise GGUFError(
            f"{file.file_of(name)}: tensor {name} at offset {info.offset + at}: the weight is {value}, byte {at} of "
            f"{info.nbytes}, expected finite numbers: the model is damaged; fetch or convert the file again"
        )
    return data


def _host_values(file: GGUFFile, name: str) -> npt.NDArray[np.float32]:
    """RoPE's factors: frequencies are divided by them."""
    info = file.tensors[name]
    values = dequantize(_data(file, name), info.type, info.shape)
    if not (values > 0).all():
        raise GGUFError(
            f"{file.file_of(name)}: tensor {name} at offset {info.offset} holds {values.min()}, expected numbers above "
            f"0; {RECONVERT}"
        )
    return values


def _host_weight(file: GGUFFile, name: str, uses: frozenset[Use]) -> HostWeight:
    info = file.tensors[name]
    return HostWeight(name=info.name, shape=info.shape, type=info.type, data=_data(file, name), uses=uses)


def _converted(weight: HostWeight, kind: str) -> HostWeight:
    """The same values as F16 (F32 where one is too large for it) or F32."""
    if kind == weight.type:
        return weight
    values = dequantize(weight.data, weight.type, weight.shape)
    if kind == "F16" and np.abs(values).max(initial=0) >= np.finfo(np.float16).max:
        kind = "F32"
    data = values.astype(np.float16 if kind == "F16" else np.float32).reshape(-1).view(np.uint8)
    return HostWeight(name=weight.name, shape=weight.shape, type=kind, data=data, uses=weight.uses)


def _type_on(device: Device, info: TensorInfo, uses: frozenset[Use]) -> str:
    """The tensor's own type, else the smallest plain one that the device takes for every use of the tensor."""
    taken = frozenset.intersection(*(frozenset(device.weight_types[use]) for use in uses))
    for name in (info.type, "F16", "F32"):
        if name in taken:
            return name
    raise BindError(
        f"{info.name} is {info.type}, used as {', '.join(sorted(uses))}; the device takes "
        f"{', '.join(sorted(taken)) or 'no type'} for that, and neither F16 nor F32 to convert it to"
    )


def _conversions(pending: list[_Pending]) -> str:
    """What was converted: types, tensors, bytes."""
    counts: dict[tuple[str, str], list[int]] = {}
    for weight in pending:
        if weight.type != weight.info.type:
            counts.setdefault((weight.info.type, weight.type), []).append(weight.nbytes - weight.info.nbytes)
    parts = [
        f"{len(extra)} tensor{'s' if len(extra) > 1 else ''} from {old} to {new} ({sum(extra):+,} bytes)"
        for (old, new), extra in counts.items()
    ]
    return f"weights converted, as the device does not take their types: {', '.join(parts)}" if parts else ""
