"""The versions of one model in service: opened, compared, swapped, drained, rolled back.

A version comes in like this: opened, verified against its golden outputs and warmed up in the background; compared on
live requests if the settings say so; started; the default from one step of the loop to the next. What it replaces takes
no new look-ups from then on, answers the requests that had found it, and is closed.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

import msgspec

from server import listing as folder_listing
from server.errors import Draining, LoadFailed, NothingToRollBack, SlipstreamError
from server.listing import Listing, Stamp, newest
from server.metrics import Metrics
from server.model import Model
from server.opening import Opener
from server.settings import Settings
from server.shadow import Shadow

logger = logging.getLogger(__name__)

LINGER_S = 5.0
"""What requests that have found a version get to arrive at it after it left; they may still be sending their body."""

State = Literal["ready", "loading", "shadowed", "draining", "failed", "rolled_back", "unloaded"]
_STATES: tuple[State, ...] = ("ready", "loading", "shadowed", "draining", "failed", "rolled_back", "unloaded")


class Failure(msgspec.Struct, frozen=True):
    """Why a version cannot be served, and the files it had then: it is tried again when they change."""

    reason: str
    stamp: Stamp


class Versions:
    """The versions of one model.

    Use it on the event loop. ``update``, ``load``, ``unload`` and ``rollback`` take turns.

    Args:
        name: Name of the model.
        settings: How many versions to keep, whether to compare.
        metrics: The process's metrics.
        opener: Opens version folders.
        is_busy: Whether requests wait anywhere in the process.
        left: Called with the name and a version that is closed for good.

    Attributes:
        served: Version -> the model that takes requests for it.
        default: The highest of them; ``None`` without any.
        failed: Version -> why it cannot be served.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        metrics: Metrics,
        opener: Opener,
        is_busy: Callable[[], bool],
        left: Callable[[str, str], None],
    ) -> None:
        self._name, self._settings, self._metrics = name, settings, metrics
        self._opener, self._is_busy, self._left = opener, is_busy, left
        self.served: dict[str, Model] = {}
        self.default: Model | None = None
        self.failed: dict[str, Failure] = {}
        self._loading: set[str] = set()
        self._candidate: _Candidate | None = None
        self._retiring: dict[str, tuple[Model, asyncio.Task[None]]] = {}
        self._barred: set[str] = set()  # rolled back
        self._unloaded: set[str] | None = None  # the versions that served when the model was unloaded
        self._history: list[str] = []  # former defaults
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def states(self) -> dict[str, tuple[State, str]]:
        """Return version -> state and its reason, ascending; versions of the folder that do not serve are left out."""
        found: dict[str, tuple[State, str]] = dict.fromkeys(self._unloaded or (), ("unloaded", "unloaded"))
        found |= dict.fromkeys(self._barred, ("rolled_back", "rolled back; load it to bring it back"))
        found |= {version: ("failed", failure.reason) for version, failure in self.failed.items()}
        found |= dict.fromkeys(self._retiring, ("draining", ""))
        found |= dict.fromkeys(self._loading, ("loading", ""))
        if self._candidate is not None:
            tally = self._candidate.shadow.tally
            found[self._candidate.model.version] = ("shadowed", f"compared on live requests: {tally}")
        found |= {v: ("ready", "") if model.ready else ("draining", "") for v, model in self.served.items()}
        return dict(sorted(found.items(), key=lambda entry: int(entry[0])))

    def models(self) -> list[Model]:
        """Return all opened models, also those that no longer or not yet serve."""
        candidate = [self._candidate.model] if self._candidate is not None else []
        return [*self.served.values(), *(model for model, _ in self._retiring.values()), *candidate]

    def expect(self, listing: Listing) -> None:
        """Count the versions that will be opened as loading."""
        self._loading.update(self._wanted(listing))

    # Changes.

    async def update(self, listing: Listing, *, compare: bool = True) -> None:
        """Open the versions that should serve and do not; retire those that serve and should not.

        A version that fails is recorded, and one below it takes its place if too few serve. What serves is retired
        only when that is done.

        Args:
            listing: What the folder holds.
            compare: Whether a new version is compared on live requests first, if the settings say so.

        Raises:
            Draining: If the server is stopping.
        """
        async with self._turn:
            await self._update(listing, compare)

    async def forget_changed_failures(self, listing: Listing) -> None:
        """Let versions be tried again whose files have changed since they failed."""
        folders = listing.versions(self._name)
        for version, failure in tuple(self.failed.items()):
            if version in folders and await asyncio.to_thread(folder_listing.stamp, folders[version]) != failure.stamp:
                self.failed.pop(version, None)

    async def load(self, listing: Listing) -> None:
        """Bring the newest versions into service now, without a comparison; return when they serve.

        Forgets that versions failed or were rolled back, and that the model was unloaded.

        Raises:
            LoadFailed: If the newest version cannot be served; what serves stays.
            Draining: If the server is stopping.
        """
        async with self._turn:
            self._unloaded = None
            self._barred.clear()
            self.failed.clear()
            if self._candidate is not None and self._candidate.model.version in self._wanted(listing):
                self._promote(self._candidate)
            await self._update(listing, compare=False)
            latest = newest(listing.versions(self._name))
            if latest in self.failed:
                raise LoadFailed(f"failed to load '{self._name}': version {latest}: {self.failed[latest].reason}")

    async def unload(self) -> None:
        """Take all versions out of service until ``load``; what they were asked is still answered."""
        async with self._turn:
            self._drop_candidate()
            self._unloaded = set(self.served) | (self._unloaded or set())
            self._retire(*self.served)
            logger.info("%s: unloaded", self._name)

    async def rollback(self, listing: Listing) -> str:
        """Go back to the version that served before, or to the next lower one; return it when it serves.

        Higher versions leave, and ``update`` does not bring them back.

        Raises:
            NothingToRollBack: If no version serves, or there is none to go back to.
            LoadFailed: If that version cannot be served; what serves stays.
            Draining: If the server is stopping.
        """
        async with self._turn:
            if self.default is None:
                raise NothingToRollBack(f"model '{self._name}' does not serve; load it first")
            current, found = self.default.version, listing.versions(self._name)
            target = folder_listing.rollback_target(current, self._history, found, self.failed)
            if target is None:
                raise NothingToRollBack(f"model '{self._name}' has no version below {current} to go back to")
            if target not in self.served and not await self._open(target, found[target], compare=False):
                raise LoadFailed(f"failed to load '{self._name}': version {target}: {self.failed[target].reason}")
            self._drop_candidate()
            self._barred.update(version for version in (*found, *self.served) if int(version) > int(target))
            self._history = [version for version in self._history if int(version) < int(target)]
            self._retire(*(self._barred & self.served.keys()))
            self._metrics.model_swaps.labels(self._name, "rolled_back").inc()
            logger.warning("%s: rolled back from version %s to %s", self._name, current, target)
            return target

    async def stop(self) -> None:
        """End comparisons and retirements, wherever they are; models go on as they are until they are closed."""
        for task in (tasks := tuple(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Close all models."""
        for task in self._tasks:
            task.cancel()
        for model in self.models():
            model.close()

    # Opening.

    async def _update(self, listing: Listing, compare: bool) -> None:
        name = self._name
        if name in listing.unreadable:
            return
        present = {version for known, version in listing.present if known == name}
        self._barred &= present
        self._history = [version for version in self._history if version in present]
        self.failed = {version: failure for version, failure in self.failed.items() if version in present}
        if self._unloaded is not None:
            self._unloaded &= present
        else:
            await self._open_wanted(listing, compare)
            if self._candidate is None:  # else what serves is needed until the comparison ends
                self._retire(*(self.served.keys() - self._wanted(listing)))
        self._report()

    async def _open_wanted(self, listing: Listing, compare: bool) -> None:
        found = listing.versions(self._name)
        self._loading.intersection_update(found)
        while True:
            wanted = self._wanted(listing)
            if self._candidate is not None and self._candidate.model.version not in wanted:
                self._drop_candidate()
            opened = {*self.served, *([self._candidate.model.version] if self._candidate is not None else [])}
            missing = [version for version in wanted if version not in opened]
            if not missing:
                return
            await self._open(missing[0], found[missing[0]], compare=compare)

    def _wanted(self, listing: Listing) -> list[str]:
        # A version in service whose files are only half there is being touched by someone; it needs no files.
        half_there = [version for version in self.served if (self._name, version) in listing.present]
        excluded = self._barred | self.failed.keys()
        return folder_listing.wanted(
            {*listing.versions(self._name), *half_there}, excluded, self._settings.keep_versions
        )

    async def _open(self, version: str, folder: Path, *, compare: bool) -> bool:
        """Open a version and serve or compare it; return whether it opened."""
        if await self._bring_back(version):
            return True
        self._loading.add(version)
        self._report()
        stamp: Stamp = ()
        try:
            stamp = await asyncio.to_thread(folder_listing.stamp, folder)
            model = await self._opener.open(folder)
        except Draining:
            raise
        except Exception as exc:  # Whatever a file on disk makes fail must not harm what serves.
            if isinstance(exc, (SlipstreamError, OSError)):
                logger.warning("%s/%s cannot be served: %s", self._name, version, exc)
            else:
                logger.exception("%s/%s cannot be served", self._name, version)
            self._fail(version, Failure(str(exc) or type(exc).__name__, stamp), "failed")
            return False
        finally:
            self._loading.discard(version)
            self._report()
        if compare and self._settings.shadow_share and self.default is not None:
            self._compare(model, stamp)
        else:
            self._serve(model)
        return True

    async def _bring_back(self, version: str) -> bool:
        """Serve a version again that has just left, if it still takes requests; else wait until it is closed."""
        if version not in self._retiring:
            return False
        model, task = self._retiring[version]
        if model.ready:
            task.cancel()
            del self._retiring[version]
            self.served[version] = model
            self._publish()
            return True
        await asyncio.wait({task})
        return False

    def _fail(self, version: str, failure: Failure, result: str) -> None:
        self.failed[version] = failure
        self._metrics.model_swaps.labels(self._name, result).inc()

    def _serve(self, model: Model) -> None:
        self._opener.start(model)
        self.served[model.version] = model
        self._publish()

    # Comparing.

    def _compare(self, model: Model, stamp: Stamp) -> None:
        settings = self._settings
        shadow = Shadow(model, settings.shadow_share, self._opener.background, self._is_busy, self._metrics)
        self._candidate = candidate = _Candidate(model, shadow, stamp)
        if self.default is not None:
            self.default.tap = shadow.offer
        self._start_task(self._finish_comparison(candidate))
        logger.info("%s: comparing version %s for %g s", self._name, model.version, settings.shadow_s)
        self._report()

    async def _finish_comparison(self, candidate: "_Candidate") -> None:
        tally = await candidate.shadow.run(self._settings.shadow_s)
        async with self._turn:
            if self._candidate is not candidate:
                return
            version, most = candidate.model.version, self._settings.shadow_max_disagreement
            logger.info("%s: version %s compared: %s", self._name, version, tally)
            if tally.mean_disagreement > most:
                reason = f"refused after the comparison on live requests ({tally}; allowed {most:g})"
                logger.warning("%s/%s %s", self._name, version, reason)
                self._drop_candidate()
                self._fail(version, Failure(reason, candidate.stamp), "refused")
                self._report()
            else:
                self._promote(candidate)
                self._retire(*sorted(self.served, key=int)[: -self._settings.keep_versions])

    def _promote(self, candidate: "_Candidate") -> None:
        self._forget_candidate()
        self._serve(candidate.model)

    def _drop_candidate(self) -> None:
        if self._candidate is not None:
            model = self._candidate.model
            self._forget_candidate()
            model.close()
            model.forget()

    def _forget_candidate(self) -> None:
        self._candidate = None
        for model in self.models():
            model.tap = None

    # Leaving.

    def _retire(self, *leaving: str) -> None:
        for version in leaving:
            model = self.served.pop(version)
            self._retiring[version] = (model, self._start_task(self._finish(model)))
        self._publish()

    async def _finish(self, model: Model) -> None:
        await asyncio.sleep(LINGER_S)
        while not await model.drain(self._settings.drain_timeout_s):
            pass  # A batch that runs cannot be stopped, and closing would wait for it on the loop.
        model.close()
        model.forget()
        self._left(self._name, model.version)
        del self._retiring[model.version]
        logger.info("%s/%s: drained and closed", self._name, model.version)
        self._report()

    def _publish(self) -> None:
        """Make the highest version the default."""
        before, highest = self.default, newest(self.served)
        self.default = self.served[highest] if highest is not None else None
        if before is not None and self.default is not None and int(before.version) < int(self.default.version):
            self._history.append(before.version)
            self._metrics.model_swaps.labels(self._name, "swapped").inc()
            logger.info("%s: version %s serves in place of %s", self._name, highest, before.version)
        self._report()

    def _report(self) -> None:
        counts = dict.fromkeys(_STATES, 0)
        for state, _ in self.states().values():
            counts[state] += 1
        for state, count in counts.items():
            self._metrics.model_versions.labels(self._name, state).set(count)

    def _start_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Candidate(msgspec.Struct, frozen=True):
    """A version that is being compared."""

    model: Model
    shadow: Shadow
    stamp: Stamp
