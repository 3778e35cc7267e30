"""The devices that a plan can be made for: a table in `devices.yaml` that a user's own file extends."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

__all__ = ["Device", "load_devices", "ready_device"]

TABLE = Path(__file__).with_name("devices.yaml")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Device:
    """One device; units as in `devices.yaml`. None: to be measured on this machine (`ready_device`)."""

    name: str
    memory: int | None
    flops: Mapping[str, float | None]
    bandwidth: float | None
    interconnect: float
    price: float
    reserve: int = 0
    kernels: Literal["accelerator", "host"] = "accelerator"

    @property
    def usable(self) -> int:
        """Bytes that a run can have."""
        assert self.memory is not None, "measure the device first"
        return self.memory - self.reserve


def load_devices(extra: str | None = None) -> dict[str, Device]:
    """The package's table with the entries of the user's file over it.

    Raises:
        ValueError: the file cannot be read, or an entry lacks a field or has one too many.
    """
    table: dict[str, dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    if extra is not None:
        try:
            own = yaml.safe_load(Path(extra).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"--device_table {extra}: cannot be read ({error})") from error
        if not isinstance(own, dict) or not all(isinstance(entry, dict) for entry in own.values()):
            raise ValueError(f"--device_table {extra}: must map names to fields, like {TABLE.name} of lit_palm")
        for name, entry in own.items():
            table[str(name)] = {**table.get(str(name), {}), **entry}
    return {name: _device(name, entry) for name, entry in table.items()}


def _device(name: str, entry: dict[str, Any]) -> Device:
    fields = {field.name: field for field in dataclasses.fields(Device) if field.name != "name"}
    unknown, missing = sorted(entry.keys() - fields.keys()), []
    for key, field in fields.items():
        if key not in entry and field.default is dataclasses.MISSING:
            missing.append(key)
    if unknown or missing:
        what = f"has unknown {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
        raise ValueError(f"device table: {name} {what}; a device has {', '.join(fields)}")
    flops = entry["flops"]
    if not isinstance(flops, dict) or not flops.keys() <= set(PRECISIONS):
        raise ValueError(f"device table: {name}.flops must map some of {', '.join(PRECISIONS)} to FLOP/s")
    numbers = ("memory", "bandwidth", "interconnect", "price", "reserve")
    read = {key: _number(name, key, entry[key]) for key in numbers if key in entry}
    speeds = {key: _number(name, f"flops.{key}", value) for key, value in flops.items()}
    return Device(**{"name": name, **entry, **read, "flops": speeds})


def _number(name: str, key: str, value: Any) -> float | int | None:
    """A number; YAML takes 312e12 without a dot and a sign for a text."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    optional = key in ("memory", "bandwidth") or key.startswith("flops.")
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"device table: {name}.{key} is {value!r}; it must be a number of at least 0")
    return int(value) if key in ("memory", "reserve") else value


def ready_device(name: str, extra: str | None, precision: str) -> Device:
    """A device by name, with what is null measured on this machine for the given type of matrix products.

    Raises:
        ValueError: there is no such device; the message lists those that exist.
    """
    devices = load_devices(extra)
    if name not in devices:
        raise ValueError(
            f"--device {name}: not in the table; choose one of {', '.join(devices)}, or add it with --device_table"
        )
    device = devices[name]
    changes: dict[str, Any] = {}
    if device.memory is None:
        changes["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.flops.get(precision) is None:
        import torch

        from lit_palm.models.hardware import measure_peak_flops

        here = torch.get_default_device()
        changes["flops"] = {**device.flops, precision: measure_peak_flops(here, getattr(torch, precision))}
    if device.bandwidth is None:
        changes["bandwidth"] = _measured_bandwidth()
    return dataclasses.replace(device, **changes)


def _measured_bandwidth(size: int = 2**27) -> float:
    """Bytes a second that a copy of a large array reads and writes."""
    import torch

    source = torch.ones(size // 4)
    target, best = torch.empty_like(source), 0.0
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * size / max(time.perf_counter() - start, 1e-9))
    return best
