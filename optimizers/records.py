"""What one optimizer run leaves on record: the structure of ``report.json``."""

from collections.abc import Sequence

import msgspec

from optimizers.measurement import Comparison
from optimizers.pareto import Standing
from optimizers.search import Gate, KnobChoice, mean_speedup
from optimizers.sensitivity import LayerSensitivity
from server.artifact import Batching, Fidelity, LatencyTable, Padding, Source
from server.host import HostFacts

ORIGINAL = "original"
"""The untouched file in a session with onnxruntime's defaults."""

UNTOUCHED = "original-1thread"
"""The untouched file in a session as the server opens it."""


class Speed(msgspec.Struct, frozen=True):
    """A ``Comparison`` with its verdict spelled out."""

    rows: int
    speedup: float
    low: float
    high: float
    pairs: int
    cpu_ratio: float
    verdict: str

    @classmethod
    def of(cls, comparison: Comparison) -> "Speed":
        """Spell a comparison out."""
        return cls(**msgspec.structs.asdict(comparison), verdict=comparison.verdict)


class PassRecord(msgspec.Struct, frozen=True):
    """What one pass did.

    Attributes:
        name: The pass with its settings.
        status: ``applied``, ``unchanged``, ``refused``, or ``slower``: right, and left out for its speed.
        reason: Why it was refused, or the pass's own note.
        after: The passes that made its input.
        cached: Whether its result came from the cache.
        speed: The result against the form before it, for exact passes, which are kept one by one.
        counts: What was fused, removed or converted, as the pass counts it.
        ops_before: Node count per operator of the pass's input; ``ops_after`` of its result.
        sqnr_db: Of the pass's result against the original on a few samples; ``None`` when it never ran.
    """

    name: str
    version: int
    effect: str
    status: str
    reason: str
    seconds: float
    after: tuple[str, ...] = ()
    cached: bool = False
    speed: tuple[Speed, ...] = ()
    counts: dict[str, int] = {}
    ops_before: dict[str, int] = {}
    ops_after: dict[str, int] = {}
    sqnr_db: float | None = None


class CandidateRecord(msgspec.Struct, frozen=True):
    """One candidate: evidence, measurements, verdict.

    Attributes:
        threads: Threads of its session in the race; 0 is onnxruntime's default, all cores.
        verdict: ``served``, ``proven`` (passes every gate, and others serve), ``refused`` or ``baseline``.
        reason: Why, with numbers.
        latency: Measured in the race of all candidates.
        cpu_ms: CPU milliseconds of the process per run, for each batch size of ``latency``.
        against_original: Speed against the original with onnxruntime's defaults.
        against_exact: Speed against the best exact FP32 form with the same threads; decides for lossy candidates.
        passes: The chain that made it.
        standing: Where it stands in what the policy weighs; ``None`` when it was not raced.
        search_fidelity: On the search samples, which decide only what is tried.
        placement: Execution provider -> operator -> count, as the session placed the nodes.
        pareto: Whether no other faithful candidate is at least as good in everything.
        host_bound: Whether it opens on this kind of CPU only.
    """

    name: str
    precision: str
    provider: str
    threads: int
    verdict: str
    reason: str
    size_bytes: int = 0
    fidelity: Fidelity | None = None
    latency: LatencyTable | None = None
    cpu_ms: tuple[float, ...] = ()
    against_original: tuple[Speed, ...] = ()
    against_exact: tuple[Speed, ...] = ()
    passes: tuple[str, ...] = ()
    standing: Standing | None = None
    search_fidelity: Fidelity | None = None
    placement: dict[str, dict[str, int]] = {}
    pareto: bool = False
    host_bound: bool = False


class StepRecord(msgspec.Struct, frozen=True):
    """One step of the search.

    Attributes:
        what: What was tried.
        outcome: ``tried``, ``kept``, ``dropped``, ``pruned``, ``not repaired`` or ``not tried``.
        reason: Why, with numbers.
        seconds: How long it took.
    """

    what: str
    outcome: str
    reason: str
    seconds: float


class ServedRecord(msgspec.Struct, frozen=True):
    """One served variant as it is served, beside the original with onnxruntime's defaults.

    Attributes:
        variant: Its name in the manifest.
        candidate: The candidate behind it.
        knobs: How its session is set.
        latency: With that setting.
        cpu_ms: CPU milliseconds of the process per run, for each batch size of ``latency``.
        against_original: Its speed.
    """

    variant: str
    candidate: str
    knobs: str
    latency: LatencyTable
    cpu_ms: tuple[float, ...]
    against_original: tuple[Speed, ...]


class DataRecord(msgspec.Struct, frozen=True):
    """The samples that the evidence rests on."""

    origin: str
    samples: int
    calibration: int
    search: int
    held_out: int
    labels: bool
    sha256: str


class EngineRecord(msgspec.Struct, frozen=True):
    """The outcome of a TensorRT engine build."""

    status: str
    reason: str
    facts: dict[str, str] = {}


class Report(msgspec.Struct, frozen=True):
    """Everything that one run found out.

    Attributes:
        chosen: The preferred variant.
        headline: One sentence with the result.
        policy: The rule that chose, in words.
        promise: What the number of held-out samples can prove.
        passes: What each pass did, in the order of their first run.
        steps: The path of the search.
        sensitivity: Candidate -> its layers, the most sensitive first.
        knobs: How the sessions of the served variants are set, and why.
        replay: The recipe, as TOML, that makes the served variants again without a search.
        command: The command line that replays the run.
        written: UTC time in ISO 8601.
    """

    name: str
    version: str
    headline: str
    chosen: str
    source: Source
    gate: Gate
    recipe: dict[str, object]
    recipe_sha256: str
    data: DataRecord
    batching: Batching
    padding: Padding
    policy: str
    promise: str
    passes: tuple[PassRecord, ...]
    steps: tuple[StepRecord, ...]
    sensitivity: dict[str, tuple[LayerSensitivity, ...]]
    candidates: tuple[CandidateRecord, ...]
    served: tuple[ServedRecord, ...]
    knobs: tuple[KnobChoice, ...]
    engines: tuple[EngineRecord, ...]
    host: HostFacts
    command: str
    replay: str
    seconds: float
    written: str


def mean_of(speeds: Sequence[Speed]) -> float:
    """Return the geometric mean of speed-ups; 1 without any."""
    return mean_speedup([Comparison(s.rows, s.speedup, s.low, s.high, s.pairs, s.cpu_ratio) for s in speeds])
