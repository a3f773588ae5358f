"""``slipstream doctor``: what the server would find on this machine, and what to mend before it is started."""

import json
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import click
import msgspec

from server import listing
from server.artifact import read_artifact
from server.cores import usable_cores
from server.errors import SlipstreamError, StartupError
from server.host import available_memory_bytes, read_host
from server.native import obstacle_of
from server.providers import CPU, Device, check_environment, find_devices
from server.settings import PREFIX, Settings, read_settings

State = Literal["ok", "warn", "fix"]

_FEW_FILES = 4096
_LITTLE_BYTES = 1 << 30
_SHARED = Path("/dev/shm")  # noqa: S108  (the system's shared memory, not a file of ours)


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at.

    Attributes:
        what: Its name.
        state: ``ok``; ``warn``, the server runs but could run better; ``fix``, it does not run as it is set.
        seen: What was found.
        cure: What to do about it; empty when all is well.
    """

    what: str
    state: State
    seen: str
    cure: str = ""


@click.command()
@click.argument("repository", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(repository: Path | None, as_json: bool) -> None:
    """Look at this machine as the server would: libraries, devices, cores, limits, settings, the folder REPOSITORY.

    Exits with 1 if something must be mended before the server can run as it is set. Settings are those of the
    SLIPSTREAM_* variables.
    """
    findings = list(examine(repository))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(findings), indent=1))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            cure = f"\n{'':{width + 6}}{finding.cure}" if finding.cure else ""
            click.echo(f"{finding.state:<4}  {finding.what:<{width}}  {finding.seen}{cure}")
    sys.exit(any(finding.state == "fix" for finding in findings))


def examine(repository: Path | None) -> Iterator[Finding]:
    """Look at everything.

    Args:
        repository: Folder of models; by default that of the settings.
    """
    try:
        settings = read_settings({"repository": repository})
        yield Finding("settings", "ok", _changed(settings))
    except StartupError as exc:
        settings = Settings() if repository is None else Settings(repository=repository)
        yield Finding(
            "settings", "fix", str(exc), f"unset the variable, or spell it as {PREFIX}... of `slipstream serve --help`"
        )
    yield from _hardware()
    yield from _libraries(settings)
    yield from _limits(settings)
    yield from _models(settings.repository)


def _changed(settings: Settings) -> str:
    plain = Settings()
    changed = [
        f"{name}={getattr(settings, name)}"
        for name in settings.__struct_fields__
        if getattr(settings, name) != getattr(plain, name)
    ]
    return f"Python {platform.python_version()}; {', '.join(changed) or 'all defaults'}"


def _hardware() -> Iterator[Finding]:
    host, cores = read_host(), usable_cores()
    yield Finding("cores", "ok", f"{cores} of {os.cpu_count()} may be used (affinity, cgroup quota); {host.cpu}")
    if host.has_int8_dot:
        yield Finding("INT8", "ok", "the CPU has INT8 dot products")
    else:
        yield Finding(
            "INT8", "warn", "the CPU has no INT8 dot products", "INT8 gains little here; optimize on this host"
        )
    memory = available_memory_bytes()
    state: State = "warn" if 0 < memory < _LITTLE_BYTES else "ok"
    yield Finding(
        "memory", state, f"{memory / 1e9:.1f} GB may still be taken", "raise the limit" if state == "warn" else ""
    )


def _libraries(settings: Settings) -> Iterator[Finding]:
    try:
        yield Finding("onnxruntime", "ok", check_environment())
    except StartupError as exc:
        yield Finding("onnxruntime", "fix", *_split(str(exc)))
        return
    try:
        found = find_devices(settings.gpu)
    except StartupError as exc:
        yield Finding("devices", "fix", *_split(str(exc)))
        return
    yield Finding("devices", "ok", ", ".join(device.name for device in found.usable))
    for name, obstacle in found.unused.items():
        # No driver is no accident; a GPU that is there and cannot be used is one.
        state: State = "ok" if name == "gpu" and obstacle.code in ("cpu_build", "no_driver", "no_device") else "warn"
        yield Finding(name, state, f"not used: {obstacle.text}")
    for gpu in (device for device in found.usable if device.kind == "cuda"):
        engines = obstacle_of(Device("tensorrt", gpu.index))
        yield Finding(f"engines {gpu.index}", "warn" if engines else "ok", engines.text if engines else "can be run")
    if found.usable == (CPU,) and settings.gpu == "off":
        yield Finding("gpu", "ok", "not looked for, the setting gpu is off")


def _limits(settings: Settings) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < _FEW_FILES
    cure = f"ulimit -n {min(hard, 65536)}: each client takes one" if few else ""
    yield Finding("open files", "warn" if few else "ok", f"{soft} at a time", cure)
    if settings.workers > 1:
        needed, free = 2 * settings.workers * settings.slab_bytes, shutil.disk_usage(_SHARED).free
        state: State = "fix" if free < needed else "ok"
        seen = f"{free / 1e6:.0f} MB free in {_SHARED}, up to {needed / 1e6:.0f} MB for {settings.workers} workers"
        yield Finding(
            "shared memory", state, seen, "a larger --shm-size, or smaller --slab-bytes" if state == "fix" else ""
        )
    yield _port(settings.host, settings.port)


def _port(host: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            return Finding(
                "port", "fix", f"{host}:{port}: {exc.strerror or exc}", "another --port, or stop what listens there"
            )
    return Finding("port", "ok", f"{host}:{port} is free")


def _models(folder: Path) -> Iterator[Finding]:
    try:
        found = listing.scan(folder)
    except OSError as exc:
        yield Finding(
            "repository", "fix", f"{folder}: {exc.strerror or exc}", "slipstream optimize MODEL.onnx --repository ..."
        )
        return
    if not found.models:
        cure = f"slipstream optimize MODEL.onnx --repository {folder} --name NAME"
        yield Finding("repository", "fix", f"no models in {folder}", cure)
    for name in found.ignored:
        yield Finding(
            "repository", "warn", f"{name} is no model", "a model is NAME/NUMBER/ with manifest.json or model.onnx"
        )
    for name in found.models:
        newest = listing.newest(found.versions(name))
        if newest is not None:
            yield _model(f"{name}/{newest}", found.versions(name)[newest])


def _model(title: str, folder: Path) -> Finding:
    try:
        artifact = read_artifact(folder)
    except (SlipstreamError, OSError) as exc:
        return Finding(title, "fix", str(exc), "copy the folder again, or optimize the model again")
    if artifact.manifest is None:
        return Finding(title, "warn", "a plain model, unoptimized", "slipstream optimize proves and speeds it up")
    measured_here = artifact.manifest.host.get("fingerprint") == read_host().fingerprint
    names = ", ".join(variant.name for variant in artifact.variants)
    if measured_here:
        return Finding(title, "ok", f"whole, optimized on this kind of host: {names}")
    return Finding(
        title, "warn", f"whole, optimized on another kind of host: {names}", "optimize it here for the best choice"
    )


def _split(text: str) -> tuple[str, str]:
    """Part a message into what is wrong and what to do, where it says so."""
    for mark in ("; run: ", ". Cure that", "; install one form: "):
        if mark in text:
            seen, _, cure = text.partition(mark)
            return seen, f"{mark.strip(';. ')} {cure}".strip(" ,")
    return text, ""
