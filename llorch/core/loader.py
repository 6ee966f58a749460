"""From tensors of a model file to weights on a device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Literal

import numpy as np

from llorch.core.config import ModelConfig
from llorch.core.gguf import GGUFFile
from llorch.core.models import ARCHITECTURES
from llorch.core.models.weights import WeightSpec
from llorch.core.plan import BoundWeight
from llorch.core.quant import dequantize
from llorch.errors import BindError, GGUFError
from llorch.providers.spec import Device, HostWeight, Use

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
    """Uploads every tensor the graph reads. Raises GGUFError where one is missing or has another shape."""
    loaded = LoadedWeights()
    pending: list[HostWeight] = []
    converted_bytes = 0
    for spec, uses in _wanted(file, config):
        weight = _host_weight(file, spec.name, uses)
        if spec.use == "host":
            loaded.host[spec.name] = dequantize(weight.data, weight.type, weight.shape)
            continue
        if any(weight.type not in device.weight_types[use] for use in uses):
            plain = _convert(weight, device)
            converted_bytes += plain.nbytes - weight.nbytes
            weight = plain
        pending.append(weight)
    if note := device.expect(pending):
        loaded.notes.append(note)
    if converted_bytes:
        loaded.notes.append(f"weights: types this device does not take were converted, {converted_bytes:+,} bytes")
    _upload(pending, device, loaded, progress)
    return loaded


def _upload(pending: list[HostWeight], device: Device, loaded: LoadedWeights, progress: Progress) -> None:
    total, done = sum(weight.nbytes for weight in pending), 0
    for weight in pending:
        progress(done / total, f"loading {weight.name}")
        handle = device.weight(weight)
        done += weight.nbytes
        loaded.bound[weight.name] = BoundWeight(handle, weight.type, weight.shape)
        size = device.weight_bytes(handle)
        loaded.device_bytes += size
        loaded.matmul_bytes += size if "matmul" in weight.uses else 0


def _wanted(file: GGUFFile, config: ModelConfig) -> Iterator[tuple[WeightSpec, frozenset[Use]]]:
    """Each tensor once, with the set of all its uses: a tied embedding is `embed` and `matmul`."""
    specs: list[WeightSpec] = list(architecture(config).weights(config))
    uses: dict[str, set[Use | Literal["host"]]] = {}
    for spec in specs:
        if spec.name in file.tensors:
            uses.setdefault(spec.name, set()).add(spec.use)
        elif spec.tied is not None:
            uses.setdefault(spec.tied, set()).add(spec.use)
        elif not spec.optional:
            raise GGUFError(
                f"{file.path}: tensor {spec.name} is missing: this is not a whole {config.architecture} model"
            )
    for spec in specs:
        if spec.name in file.tensors:
            shape = file.tensors[spec.name].shape
            if shape != spec.shape:
                raise GGUFError(f"{file.path}: tensor {spec.name} has shape {shape}, metadata asks for {spec.shape}")
            yield spec, frozenset(uses[spec.name])  # type: ignore[arg-type]


def _host_weight(file: GGUFFile, name: str, uses: frozenset[Use]) -> HostWeight:
    info = file.tensors[name]
    return HostWeight(name=name, shape=info.shape, type=info.type, data=file.data(name), uses=uses)


def _convert(weight: HostWeight, device: Device) -> HostWeight:
    """The same values in the smallest plain type that the device takes for every use of the tensor."""
    taken = frozenset.intersection(*(device.weight_types[use] for use in weight.uses))
    values = dequantize(weight.data, weight.type, weight.shape)
    for name, dtype in (("F16", np.float16), ("F32", np.float32)):
        if name in taken and (name == "F32" or np.abs(values).max(initial=0) < np.finfo(np.float16).max):
            data = values.astype(dtype).reshape(-1).view(np.uint8)
            return HostWeight(name=weight.name, shape=weight.shape, type=name, data=data, uses=weight.uses)
    raise BindError(
        f"{weight.name} is {weight.type}, used as {', '.join(sorted(weight.uses))}; the device takes "
        f"{', '.join(sorted(taken)) or 'no type'} for that, and neither F16 nor F32 to convert it to"
    )
