"""The repository: a folder of models, opened one after the other and found by name and version.

::

    models/<name>/<version>/        the version is a number without leading zeros; ``artifact`` says what is inside

Hidden entries and plain files are ignored, other folders are ignored with a warning.
"""

import asyncio
import logging
import re
from pathlib import Path

from server.artifact import is_complete, read_artifact
from server.errors import ModelNotReady, SlipstreamError, StartupError, UnknownModel
from server.metrics import Metrics
from server.model import Model
from server.providers import Device, usable_cores, usable_devices
from server.scheduler import Cores
from server.settings import Settings

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_VERSION = re.compile(r"[1-9][0-9]*")

Key = tuple[str, str]
"""Name and version of a model."""


class Repository:
    """The models of one folder.

    Use it on the event loop. Only ``open`` works in a thread, on one model at a time; each model is found as soon as it
    is ready.

    Args:
        settings: The folder, and how to serve.
        metrics: The process's metrics.

    Attributes:
        failures: (name, version) -> why it cannot be served.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._models: dict[Key, Model] = {}
        self._latest: dict[str, Model] = {}  # the highest version that became ready
        self._loading: list[Key] = []
        self._is_open = False
        self._cores = Cores(usable_cores())
        self.failures: dict[Key, str] = {}

    @property
    def ready(self) -> bool:
        """Whether every model of the folder, and at least one, is ready."""
        if not self._is_open or self.failures or not self._models:
            return False
        return all(model.ready for model in self._models.values())

    async def open(self) -> None:
        """Open all models; one that fails is recorded in ``failures`` and does not stop the others.

        Raises:
            StartupError: If the folder is missing or holds no model.
            ProviderUnavailable: If a GPU is required and none works.
        """
        folders = await asyncio.to_thread(_scan, self._settings.repository)
        self._loading = list(folders)
        devices = await asyncio.to_thread(usable_devices, self._settings.gpu)
        for key, folder in folders.items():
            await self._open_model(key, folder, devices)
        self._is_open = True
        logger.info("%d models ready, %d failed", len(self._models), len(self.failures))

    def names(self) -> list[str]:
        """Return the names of all models, also of those that load or failed, in alphabetical order."""
        return sorted({name for name, _ in self._keys()})

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that are ready, ascending.

        Raises:
            UnknownModel: If there is no model of that name.
        """
        self._require_known(name, "")
        ready = [version for (key, version), model in self._models.items() if key == name and model.ready]
        return sorted(ready, key=int)

    def get(self, name: str, version: str = "") -> Model:
        """Return a model that is ready; without a version, the highest one.

        Raises:
            UnknownModel: If there is no such name or version.
            ModelNotReady: If it loads, failed, or stops.
        """
        model = self._models.get((name, version)) if version else self._latest.get(name)
        if model is not None and model.ready:
            return model
        self._require_known(name, version)
        keys = [key for key in self._keys() if key[0] == name and version in ("", key[1])]
        states = ", ".join(f"version {key[1]} {self._state_of(key)}" for key in keys)
        raise ModelNotReady(f"model '{name}' is not ready: {states}")

    async def drain(self) -> None:
        """Take no more requests and finish those that wait, for at most ``drain_timeout_s``."""
        timeout_s = self._settings.drain_timeout_s
        await asyncio.gather(*(model.drain(timeout_s) for model in self._models.values()))

    def close(self) -> None:
        """Stop all lanes and release all sessions."""
        for model in self._models.values():
            model.close()

    async def _open_model(self, key: Key, folder: Path, devices: tuple[Device, ...]) -> None:
        try:
            model = await asyncio.to_thread(_load, folder, devices, self._settings, self._metrics)
        except (SlipstreamError, OSError) as exc:
            logger.warning("%s/%s cannot be served: %s", *key, exc)
            self.failures[key] = str(exc)
        else:
            model.start(self._cores)
            self._models[key] = model
            latest = self._latest.get(model.name)
            if latest is None or int(latest.version) < int(model.version):
                self._latest[model.name] = model
        self._loading.remove(key)

    def _keys(self) -> list[Key]:
        return [*self._models, *self.failures, *self._loading]

    def _require_known(self, name: str, version: str) -> None:
        keys = self._keys()
        if not any(known == name for known, _ in keys):
            raise UnknownModel(f"Request for unknown model: '{name}' is not found")
        if version and (name, version) not in keys:
            raise UnknownModel(f"Request for unknown model: '{name}' version {version} is not found")

    def _state_of(self, key: Key) -> str:
        if key in self.failures:
            return "failed to load, the server's log says why"
        return "is loading" if key in self._loading else f"is {self._models[key].state}"


def _load(folder: Path, devices: tuple[Device, ...], settings: Settings, metrics: Metrics) -> Model:
    if not _NAME.fullmatch(folder.parent.name):
        raise StartupError(f"the name {folder.parent.name!r} has characters other than letters, digits, '.', '_', '-'")
    return Model.load(read_artifact(folder), devices, settings, metrics)


def _scan(repository: Path) -> dict[Key, Path]:
    """Find the version folders, ordered by name and by number.

    Raises:
        StartupError: If there is none.
    """
    found: dict[Key, Path] = {}
    ignored: list[str] = []
    for name in _folders(repository):
        versions = _folders(name)
        complete = {
            int(folder.name): folder for folder in versions if _VERSION.fullmatch(folder.name) and is_complete(folder)
        }
        found.update({(name.name, complete[number].name): complete[number] for number in sorted(complete)})
        ignored += [f"{name.name}/{folder.name}" for folder in versions if folder not in complete.values()]
        ignored += [] if versions else [name.name]
    if ignored:
        logger.warning(
            "ignored in %s: %s; a model is NAME/NUMBER/ with manifest.json or model.onnx",
            repository,
            ", ".join(ignored),
        )
    if not found:
        raise StartupError(
            f"no models in {repository}: run `slipstream optimize MODEL.onnx --repository {repository} --name NAME`"
        )
    return found


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(entry for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:  # missing, a file, or closed to us, as lost+found is
        return []
