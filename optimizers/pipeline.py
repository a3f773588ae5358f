"""From ``model.onnx`` to an artifact: load, ask, search, prove, race, choose, and a folder renamed into place.

The same model, data, recipe, tools and host give the same artifact: a second run finds it and does nothing. An artifact
is never changed; other content becomes the next version. Finished work is kept in a store, so that an interrupted run
goes on where it was.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import get_args

import msgspec

from optimizers.asking import Original, Parts, Place, ask, parts_of
from optimizers.budget import Budget
from optimizers.building import Built, Line, on_gpu
from optimizers.engine_forms import EngineForm, find_int8
from optimizers.engines import EnginePolicy, build_engines
from optimizers.evaluator import Evaluate, load_evaluator
from optimizers.evidence import HeldOut
from optimizers.exact import FUSED, build_exact
from optimizers.exam import Exam
from optimizers.explore import NO_SEARCH, Appraisal, Explorer, Found, Quest, part, unproven
from optimizers.forecast import Cost, Forecast
from optimizers.graph import load_model, op_counts, save_model, signature_of
from optimizers.isolation import Form, Probe, Workshop, nursery_of_passes
from optimizers.nursery import Nursery
from optimizers.pareto import Policy
from optimizers.passes import Pass, PassContext
from optimizers.passes.catalog import BY_NAME, EXACT, step_of
from optimizers.passes.cpu_build import DISABLED_OPTIMIZERS, CpuBuild
from optimizers.predictor import Experience, Features, add_experiences, features_of, in_order, read_experiences
from optimizers.profiles import profile_of, reaching_down
from optimizers.publish import ENGINES, Edition, move_into_place, publish
from optimizers.racing import Track
from optimizers.recipe import Compression, Precision, VariantPlan
from optimizers.records import UNTOUCHED, EngineRecord, mean_of
from optimizers.request import Digests, OptimizeRequest, digests_of, find_existing, versions_in
from optimizers.roots import roots_for
from optimizers.search import Gate
from optimizers.store import Store, key_of, sweep
from optimizers.trial import Outcome, Trial, TrialPlan, served_name
from optimizers.tuning import MEMORY_SHARE
from optimizers.uint8_input import require_same, with_uint8_inputs
from server.artifact import Artifact, Profile, read_artifact
from server.errors import ArtifactError
from server.host import HostFacts, available_memory_bytes, read_host
from server.providers import usable_devices
from server.tensors import Signature

Observe = Callable[[str, float], None]
"""Called with the current stage and the share of the whole that is done, 0 to 1."""

_CALIBRATION_ROWS = 8
_PROBE_SAMPLES = 4
_CACHE = ".cache"
_WORK = ".optimize-"
_HOST_BUILD = "fp32-host"
_ENGINES = (FUSED, "fp16")
_RACE_SHARE, _MOST_RACE_S = 0.15, 60.0
_WRITING_S = 2.0
_BASELINES = 2  # sessions of the original that are raced beside the exact forms


def existing(request: OptimizeRequest) -> Artifact | None:
    """Find the version that this request made before, on this host; cheap, no model is opened.

    Raises:
        OptimizerError: If a file cannot be read or the name cannot be served.
        ArtifactError: If ``request.version`` exists with other content.
    """
    return find_existing(request, digests_of(request, read_host(), _passes()))


def optimize(request: OptimizeRequest, observe: Observe = lambda _stage, _share: None) -> Artifact:
    """Make, prove and publish an artifact; or return the one that the same request made before.

    Blocks for seconds to minutes and runs passes in child processes. A failure leaves nothing behind but finished work
    in the cache.

    Args:
        request: What to do.
        observe: Told about the current stage.

    Raises:
        OptimizerError: If the model, the data, the recipe or the evaluator cannot be used.
        StartupError: If the original itself cannot be opened, or if the version exists with other content.
        InferenceFailed: If the original fails on the samples.
    """
    host = read_host()
    digests = digests_of(request, host, _passes())
    found = find_existing(request, digests)
    if found is not None:
        return found
    evaluate = load_evaluator(request.evaluator) if request.evaluator else None
    folder = request.repository / request.name
    version = request.version or max([0, *versions_in(folder)]) + 1
    try:
        request.repository.mkdir(parents=True, exist_ok=True)
        sweep(request.repository, _WORK)
        store = Store(request.cache or request.repository / _CACHE)
        store.sweep()
        # A hidden sibling on the same file system, so that the last step is a rename.
        with (
            tempfile.TemporaryDirectory(prefix=f"{_WORK}{os.getpid()}-", dir=request.repository) as work,
            closing(nursery_of_passes()) as nursery,
        ):
            run = _Run(request, host, digests, str(version), Path(work), _Tools(store, nursery, evaluate))
            move_into_place(run.execute(observe), folder / str(version))
        store.trim()
    except OSError as exc:
        raise ArtifactError(f"cannot write to {request.repository}: {exc.strerror or exc}") from exc
    return read_artifact(folder / str(version))


def _passes() -> list[Pass]:
    return [made() for made in BY_NAME.values()]


class _Searched(msgspec.Struct, frozen=True):
    """What the search leaves.

    Attributes:
        found: Its path.
        built: The candidates.
        form: What only engines are made of.
        form_record: What the report says of it; ``None`` when none was wanted.
        features: Of the model; none without a search.
    """

    found: Found
    built: tuple[Appraisal, ...]
    form: EngineForm | None = None
    form_record: EngineRecord | None = None
    features: Features = ()


class _Tools(msgspec.Struct, frozen=True):
    """What a run works with: the cache, the processes of passes, and the user's own metric."""

    store: Store
    nursery: Nursery
    evaluate: Evaluate | None


class _Run:
    """One run; each method is one stage, and ``execute`` is their order."""

    def __init__(
        self,
        request: OptimizeRequest,
        host: HostFacts,
        digests: Digests,
        version: str,
        work: Path,
        tools: _Tools,
    ) -> None:
        self.request, self.recipe, self.host, self.digests = request, request.recipe, host, digests
        self.version, self.work, self.store, self.tools = version, work, tools.store, tools
        self.budget = Budget(request.time_budget_s)
        self.gate = Gate(self.recipe.min_agreement, self.recipe.max_accuracy_drop)
        self.policy = Policy(self.recipe.objective, self.recipe.slo_ms)
        self.devices = tuple(d.kind for d in usable_devices("prefer") if d.kind in self.recipe.devices)

    def execute(self, observe: Observe) -> Path:
        """Return the finished artifact's folder."""
        observe("load", 0.0)
        original, signature = self._load()
        place = Place(self.work / "samples", original.sha256, self.digests.inputs)
        parts = parts_of(self.recipe, signature, self.request.calibration, self.request.labels, place)
        if self.recipe.uint8_inputs:
            self._prove_uint8(original, parts)
        observe("ask the original", 0.02)
        answered = ask(original, signature, parts, self.recipe, self.store, self.host)
        track = self._track(original, answered)
        try:
            line = Line(original, self._workshop(parts, answered))
            exam = self._exam("held-out", answered.held_out, answered, parts)
            searched = self._search(line, track, parts, answered, exam, part(observe, 0.05, 0.5))
            untouched = Built(UNTOUCHED, "fp32", "cpu", exact=True, form=original)
            trial = Trial(untouched, searched.built, exam, track, self._trial_plan(), part(observe, 0.55, 0.4))
            outcome = trial.run()
        finally:
            track.close()
        self._learn(searched, outcome)
        observe("write the artifact", 0.96)
        folder = self.work / "artifact"
        folder.mkdir()
        profile = reaching_down(profile_of(parts.held_out, answered.batching.max_rows), signature)
        engines = self._engines(searched, profile, folder)
        edition = Edition(
            request=self.request,
            version=self.version,
            digests=self.digests,
            host=self.host,
            signature=signature,
            original=answered,
            data=parts.record,
            passes=tuple(line.records),
            found=searched.found,
            outcome=outcome,
            engine_form=searched.form,
            engine_profile=profile,
            engines=engines,
            seconds=self.budget.elapsed_s,
        )
        publish(folder, edition)
        observe("done", 1.0)
        return folder

    def _load(self) -> tuple[Form, Signature]:
        """Copy the original into the work folder as one self-contained file, and read its signature.

        With UINT8 inputs the rewritten model takes the original's place.
        """
        model, source, inputs = load_model(self.request.model), self.digests.source, self.recipe.uint8_inputs
        if inputs:
            model = with_uint8_inputs(model, inputs)
            source = key_of("uint8", source, sorted(inputs.items()))
        path = self.work / "original" / "model.onnx"
        save_model(model, path)
        return Form(path, source), signature_of(model)

    def _prove_uint8(self, original: Form, parts: Parts) -> None:
        count = min(_PROBE_SAMPLES, parts.held_out.count)
        samples = [parts.held_out.batch(index, 1) for index in range(count)]
        require_same(self.request.model, original.model, self.recipe.uint8_inputs, samples)

    def _track(self, original: Form, answered: Original) -> Track:
        rows = answered.batching.max_rows if answered.batching.batchable else 1
        sizes = sorted({1, *(r for r in self.recipe.batch_rows if r <= rows)})
        source = original.model if self.recipe.uint8_inputs else self.request.model
        return Track(source, answered.held_out.singles, sizes, self.store, self.host.fingerprint)

    def _workshop(self, parts: Parts, answered: Original) -> Workshop:
        singles = answered.held_out.singles[:_PROBE_SAMPLES]
        probe = Probe(singles, {name: array[: len(singles)] for name, array in answered.held_out.reference.items()})
        limit = int(available_memory_bytes() * MEMORY_SHARE)
        return Workshop(
            self.store,
            self.tools.nursery,
            self._context(parts),
            probe,
            parts.digest,
            self.request.pass_timeout_s,
            limit,
            self.budget,
        )

    def _context(self, parts: Parts) -> PassContext:
        batches = parts.calibration.batches(_CALIBRATION_ROWS) if parts.calibration is not None else ()
        return PassContext(self.host, batches, self.recipe.seed, self.work)

    def _exam(self, name: str, samples: HeldOut, answered: Original, parts: Parts) -> Exam:
        rows = answered.batching.max_rows if answered.batching.batchable else 1
        digest = f"{parts.digest} {self.digests.recipe if self.request.evaluator else ''}"
        return Exam(
            samples, name, digest, rows, self.host.cores, self.store, self.host.fingerprint, self.tools.evaluate
        )

    def _search(
        self, line: Line, track: Track, parts: Parts, answered: Original, exam: Exam, observe: Observe
    ) -> _Searched:
        """Build the exact forms, then what the recipe names, or else what the exploration finds."""
        if self.recipe.variants:
            listed = tuple(self._listed(line, plan, observe) for plan in self.recipe.variants)
            source = next((a.built for a in listed if a.built.exact and not a.failure), None)
            return _Searched(Found((), (), {}), listed, *self._engine_form(line, source, parts, exam))
        fp32 = build_exact(line, track, EXACT, self.recipe.seed, part(observe, 0.0, 0.2))
        exact = [fp32] if self.recipe.portable else [fp32, self._host_build(line, fp32)]
        features = features_of(op_counts(load_model(fp32.model)), fp32.size_bytes, track.quick_ms(fp32))
        form = self._engine_form(line, fp32, parts, exam)  # before the time budget binds: it was asked for
        found = self._explore(line, track, parts, answered, exact, features, part(observe, 0.2, 0.8))
        on_cpu = [*(Appraisal(b, failure=b.failure) for b in exact), *found.appraised]
        gpu = on_gpu([a.built for a in on_cpu if not a.failure], self.devices)
        return _Searched(found, (*on_cpu, *map(Appraisal, gpu)), *form, features)

    def _engine_form(
        self, line: Line, exact: Built | None, parts: Parts, exam: Exam
    ) -> tuple[EngineForm | None, EngineRecord | None]:
        wanted = "tensorrt" in self.recipe.devices and "int8" in self.recipe.precisions
        if not wanted or exact is None or parts.no_proof:
            return None, None
        return find_int8(line, exact, exam, self.gate)

    def _host_build(self, line: Line, fp32: Built) -> Built:
        left_out = fp32.options.config.get(DISABLED_OPTIMIZERS, "")
        step = CpuBuild(disabled=tuple(left_out.split(";")) if left_out else ())
        return line.build(_HOST_BUILD, (*fp32.chain, step), "fp32", exact=True)

    def _listed(self, line: Line, plan: VariantPlan, observe: Observe) -> Appraisal:
        observe(f"build {plan.name}", 0.5)
        chain = tuple(step_of(settings) for settings in plan.passes)
        built = line.build(plan.name, chain, plan.precision, exact=plan.exact)
        return Appraisal(built, failure=built.failure)

    def _explore(  # noqa: PLR0913  (the stages' results, passed once)
        self,
        line: Line,
        track: Track,
        parts: Parts,
        answered: Original,
        exact: Sequence[Built],
        features: Features,
        observe: Observe,
    ) -> Found:
        fp32 = exact[0]
        roots = roots_for(self.recipe.precisions, self.recipe.compressions, self.devices)
        if parts.no_proof or answered.search is None:
            return unproven(line, fp32.chain, roots, parts.no_proof or NO_SEARCH)
        families = list(dict.fromkeys(root.family for root in roots))
        order = in_order(families, read_experiences(self._experience_file()), features)
        exam = self._exam("search", answered.search, answered, parts)
        forecast = Forecast(exam.count, len(answered.held_out.singles), exam.rows, exam.workers)
        self._begin_search(forecast, track.cost(track.enter(fp32)), len(exact))
        quest = Quest(
            base=fp32.chain,
            baseline=fp32,
            gate=self.gate,
            wants_speed=self.policy.objective in ("latency", "throughput"),
            budget=self.budget,
            forecast=forecast,
            seed=self.recipe.seed,
        )
        explorer = Explorer(line, exam, track, self._context(parts), quest, observe)
        return explorer.run(sorted(roots, key=lambda root: order.index(root.family)))

    def _begin_search(self, forecast: Forecast, cost: Cost, exact: int) -> None:
        """Reserve what the trial takes even when nothing lossy is found; from here on the time budget binds.

        Args:
            forecast: Predicts it.
            cost: Of the exact form.
            exact: Number of exact forms to prove.
        """
        raced_s = forecast.races_s([cost] * (exact + _BASELINES), self._races_s)
        self.budget.reserve("exact forms", exact * forecast.proof_s(cost) + raced_s)
        self.budget.reserve("writing", _WRITING_S)
        self.budget.begin()

    def _experience_file(self) -> Path:
        return self.store.folder / f"experience-{self.host.fingerprint}.jsonl"

    def _learn(self, searched: _Searched, outcome: Outcome) -> None:
        """Leave this run's measurements for the order of later ones."""
        families = {root.name: root.family for root in roots_for(get_args(Precision), get_args(Compression), ())}
        measured = [
            Experience(families[record.name], searched.features, mean_of(record.against_exact))
            for record in outcome.candidates
            if record.name in families and record.against_exact
        ]
        if searched.features:
            add_experiences(self._experience_file(), measured)

    def _trial_plan(self) -> TrialPlan:
        return TrialPlan(self.gate, self.policy, self.host.cores, self._races_s, self.recipe.seed)

    @property
    def _races_s(self) -> float:
        """Seconds for the races of the trial, unless they cannot be as short."""
        return min(self.request.time_budget_s * _RACE_SHARE, _MOST_RACE_S)

    def _engines(self, searched: _Searched, profile: Profile, folder: Path) -> tuple[EngineRecord, ...]:
        if "tensorrt" not in self.recipe.devices:
            return ()
        forms = [a.built for a in searched.built if a.built.name in _ENGINES and not a.built.failure]
        wanted = {served_name(form.name): form.model for form in forms}
        if searched.form is not None:
            wanted[searched.form.built.name] = searched.form.built.model
        # Hidden, or the store would take it for an entry of its own.
        policy = EnginePolicy((self.request.cache or self.request.repository / _CACHE) / ".engines")
        built = build_engines(wanted, profile, folder / ENGINES, self.request.pass_timeout_s, policy)
        return (searched.form_record, *built) if searched.form_record is not None else built
