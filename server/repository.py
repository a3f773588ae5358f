"""The repository: a folder of models in service, found by name and version, and watched for new versions."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from server import listing as folder_listing
from server.errors import Draining, ModelNotReady, StartupError, UnknownModel
from server.listing import Key, Listing
from server.metrics import Metrics
from server.model import Model
from server.opening import Opener
from server.settings import Settings
from server.versions import State, Versions

logger = logging.getLogger(__name__)

_PROTOCOL_STATES: dict[State, str] = {
    "ready": "READY",
    "loading": "LOADING",
    "shadowed": "LOADING",
    "draining": "UNLOADING",
}
_TOLD: dict[State, str] = {
    "loading": "is loading",
    "shadowed": "is being compared",
    "failed": "failed to load, the server's log says why",
    "rolled_back": "was rolled back",
    "unloaded": "was unloaded",
}


OnLeft = Callable[[str, str], None]
"""Called with the name and the version of what has left for good."""


class IndexEntry(msgspec.Struct, frozen=True):
    """One version in the protocol's repository index.

    Attributes:
        state: ``READY``, ``LOADING``, ``UNLOADING`` or ``UNAVAILABLE``.
        reason: Why it is not ready; empty when it is.
    """

    name: str
    version: str
    state: str
    reason: str


class Repository:
    """The models of one folder.

    Use it on the event loop. Versions are opened in the background, one at a time, and each serves as soon as it is
    ready.

    Args:
        settings: The folder, and how to serve.
        metrics: The process's metrics.

    Attributes:
        on_left: Called after a version has left; set it before ``open``.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.on_left: OnLeft = lambda _name, _version: None
        self._opener = Opener(settings, metrics)
        self._models: dict[str, Versions] = {}
        self._required: set[str] = set()  # the models that were there at the start
        self._is_open = False
        self._watching: asyncio.Task[None] | None = None
        self._ignored: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether each model that was there at the start, and was not unloaded or removed since, has a lane that works.

        A new version that fails does not change that, nor does a new model: the replicas would all leave at once.
        """
        defaults = [self._models[name].default for name in self._required]
        return self._is_open and all(model is not None and model.serves for model in defaults)

    @property
    def failures(self) -> dict[Key, str]:
        """Return (name, version) -> why it cannot be served."""
        return {
            (name, version): failure.reason
            for name, versions in self._models.items()
            for version, failure in versions.failed.items()
        }

    @property
    def lanes_down(self) -> dict[Key, tuple[str, ...]]:
        """Return (name, version) -> lanes of it that get no work because they fail, as ``variant on device``."""
        return {(model.name, model.version): model.lanes_down for model in self._opened() if model.lanes_down}

    @property
    def unused_devices(self) -> dict[str, str]:
        """Return device, or ``gpu`` for all GPUs -> why it is not used though it may be."""
        return {name: obstacle.text for name, obstacle in self._opener.devices.unused.items()}

    # Look-up.

    def names(self) -> list[str]:
        """Return the names of all models, also of those that do not serve, in alphabetical order."""
        return sorted(self._models)

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model that are ready, ascending.

        Raises:
            UnknownModel: If there is no model of that name.
        """
        return [version for version, (state, _) in self._known(name).states().items() if state == "ready"]

    def find(self, name: str, version: str = "") -> Model | None:
        """Return a model that is ready, as ``get`` does; ``None`` where that raises."""
        versions = self._models.get(name)
        if versions is None:
            return None
        model = versions.served.get(version) if version else versions.default
        return model if model is not None and model.ready else None

    def get(self, name: str, version: str = "") -> Model:
        """Return a model that is ready; without a version, the default, which is the highest that serves.

        A model that is taken out of service after this call serves for ``versions.LINGER_S`` more.

        Raises:
            UnknownModel: If there is no such name or version.
            ModelNotReady: If it loads, failed, was unloaded or rolled back, or stops.
        """
        if (model := self.find(name, version)) is not None:
            return model
        states = self._known(name).states()
        if version and version not in states:
            raise UnknownModel(f"Request for unknown model: '{name}' version {version} is not found")
        told = [
            f"version {key} {_TOLD.get(state, f'is {state}')}"
            for key, (state, _) in states.items()
            if version in ("", key)
        ]
        raise ModelNotReady(f"model '{name}' is not ready: {', '.join(told) or 'no version of it is loaded'}")

    def index(self) -> list[IndexEntry]:
        """Return the versions that serve, are on the way in or out, or failed, by name and version."""
        return [
            IndexEntry(name, version, _PROTOCOL_STATES.get(state, "UNAVAILABLE"), reason)
            for name in self.names()
            for version, (state, reason) in self._models[name].states().items()
        ]

    # Life cycle.

    async def open(self) -> None:
        """Open the newest versions of all models, then begin to watch; one that fails does not stop the others.

        Raises:
            StartupError: If the folder is missing or holds no model.
            ProviderUnavailable: If a GPU is required and none works.
        """
        folder = self._settings.repository
        try:
            listing = await self._scan()
        except OSError as exc:
            raise _no_models(folder) from exc
        if not listing.models:
            raise _no_models(folder)
        for name in listing.models:
            self._add(name).expect(listing)
        self._required = set(listing.models)
        await self._opener.find_devices()
        for name in listing.models:
            await self._models[name].update(listing)
        self._is_open = True
        served = sum(len(versions.served) for versions in self._models.values())
        logger.info("%d models ready, %d failed", served, len(self.failures))
        if self._settings.watch_interval_s:
            self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Change nothing from here on: end the watch and what it has begun. Models serve until ``drain``."""
        await self._opener.stop()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        await asyncio.gather(*(versions.stop() for versions in self._models.values()))

    async def drain(self) -> None:
        """Take no more requests and finish those that wait, for at most ``drain_timeout_s``."""
        timeout_s = self._settings.drain_timeout_s
        await asyncio.gather(*(model.drain(timeout_s) for model in self._opened()))

    def close(self) -> None:
        """Stop all lanes and release all sessions."""
        self._opener.is_stopping = True
        if self._watching is not None:
            self._watching.cancel()
        self._opener.background.close()
        for versions in self._models.values():
            versions.close()

    # Control.

    async def load(self, name: str) -> None:
        """Bring a model's newest versions into service now, see ``Versions.load``; return when they serve.

        Raises:
            UnknownModel: If the folder holds no complete version of such a model.
            LoadFailed: If its newest version cannot be served; what serves stays.
            Draining: If the server is stopping.
        """
        listing = await self._listing()
        if not listing.versions(name):
            raise UnknownModel(f"Request for unknown model: '{name}' is not found in the repository")
        versions = self._models.get(name) or self._add(name)
        await versions.load(listing)

    async def unload(self, name: str) -> None:
        """Take a model out of service until it is loaded again; what it was asked is still answered.

        Raises:
            UnknownModel: If there is no model of that name.
            Draining: If the server is stopping.
        """
        self._require_not_stopping()
        versions = self._known(name)
        self._required.discard(name)
        await versions.unload()

    async def rollback(self, name: str) -> str:
        """Go back to the version that served before, see ``Versions.rollback``; return it when it serves.

        Raises:
            UnknownModel: If there is no model of that name.
            NothingToRollBack: If no version serves, or there is none to go back to.
            LoadFailed: If that version cannot be served; what serves stays.
            Draining: If the server is stopping.
        """
        listing = await self._listing()
        return await self._known(name).rollback(listing)

    # The watch.

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._settings.watch_interval_s)
            try:
                await self.refresh()
            except OSError as exc:
                logger.warning("cannot look for new versions in %s: %s", self._settings.repository, exc)

    async def refresh(self) -> None:
        """Look at the folder once: new versions come in, versions whose folder is gone leave, changed ones are retried.

        Raises:
            OSError: If the folder cannot be listed, which changes nothing: network file systems come back.
            Draining: If the server is stopping.
        """
        listing = await self._scan()
        for name in listing.models:
            if name not in self._models:
                self._add(name)
        for name, versions in tuple(self._models.items()):
            await versions.forget_changed_failures(listing)
            await versions.update(listing)
            if not versions.states() and not listing.versions(name):
                del self._models[name]
                self._required.discard(name)

    async def _listing(self) -> Listing:
        self._require_not_stopping()
        try:
            return await self._scan()
        except OSError as exc:
            raise StartupError(f"cannot list the repository: {exc}") from exc

    async def _scan(self) -> Listing:
        listing = await asyncio.to_thread(folder_listing.scan, self._settings.repository)
        if listing.ignored and listing.ignored != self._ignored:
            logger.warning(
                "ignored in %s: %s; a model is NAME/NUMBER/ with manifest.json or model.onnx",
                self._settings.repository,
                ", ".join(listing.ignored),
            )
        self._ignored = listing.ignored
        return listing

    def _add(self, name: str) -> Versions:
        added = Versions(name, self._settings, self._metrics, self._opener, self._is_busy, self._left)
        self._models[name] = added
        return added

    def _left(self, name: str, version: str) -> None:
        self.on_left(name, version)

    def _known(self, name: str) -> Versions:
        if name not in self._models:
            raise UnknownModel(f"Request for unknown model: '{name}' is not found")
        return self._models[name]

    def _opened(self) -> list[Model]:
        return [model for versions in self._models.values() for model in versions.models()]

    def _is_busy(self) -> bool:
        return any(model.waiting_rows for model in self._opened())

    def _require_not_stopping(self) -> None:
        if self._opener.is_stopping:
            raise Draining("the server is stopping; ask another replica")


def _no_models(folder: Path) -> StartupError:
    return StartupError(
        f"no models in {folder}: run `slipstream optimize MODEL.onnx --repository {folder} --name NAME`"
    )
