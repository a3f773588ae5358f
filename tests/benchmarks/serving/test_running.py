"""Starting, loading and comparing servers: real ones that need no other environment."""

import json
import py_compile
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks.open_loop import OpenOutcome
from benchmarks.servers import RunningServer, ServerFailed, offer_open
from benchmarks.serving import __main__ as command
from benchmarks.serving import install, loads, systems
from benchmarks.serving.ablated import IDEAS, replace
from benchmarks.serving.ablations import ABLATIONS, ablated
from benchmarks.serving.comparing import Run, order
from benchmarks.serving.loads import open_load, open_loops
from benchmarks.serving.material import Material, tiny, wide
from benchmarks.serving.results import Comparison
from benchmarks.serving.systems import SYSTEMS, System, Tuning, setup_of, started, workload_of
from tests.benchmarks.serving.examples import rate

PEERS = Path(loads.__file__).parent / "peers"
SLIPSTREAM = SYSTEMS[0]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return tiny(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("path", sorted(PEERS.glob("*.py")), ids=lambda path: path.stem)
def test_servers_of_peers_compile(path: Path, tmp_path: Path) -> None:
    py_compile.compile(str(path), cfile=str(tmp_path / "compiled"), doraise=True)


def test_every_peer_has_an_environment_and_a_module() -> None:
    assert {system.peer for system in SYSTEMS if system.peer} == set(install.PEERS)
    assert all((PEERS / f"{system.module}.py").is_file() for system in SYSTEMS if system.module)


def test_peer_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    system = next(system for system in SYSTEMS if system.peer == "ray")
    assert "python -m benchmarks.serving.install ray" in system.missing
    assert SLIPSTREAM.missing == ""


def test_peer_that_cannot_be_installed_is_left_out(tmp_path: Path, monkeypatch, capsys) -> None:
    def create(folder: Path, *, with_pip: bool) -> None:  # a real one takes seconds
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(install.venv, "create", create)
    monkeypatch.setitem(install.PEERS, "litserve", install.Packages(("no-such-package==1",), same=()))
    assert install.main(["litserve", "--into", str(tmp_path), "--no-index"]) == 1
    assert "left out" in (said := capsys.readouterr().out)
    assert "no-such-package" in said


def test_unknown_peer_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        install.main(["gunicorn"])
    assert "unknown: gunicorn" in capsys.readouterr().err


def test_settings_of_a_model_go_before_those_of_the_rest() -> None:
    system = System("s", (), "", tuning={"": Tuning(2.0), "tiny": Tuning(0.0, 1)})
    assert system.tuned("tiny") == Tuning(0.0, 1)
    assert system.tuned("other") == Tuning(2.0)
    assert System("s", (), "").tuned("tiny") == Tuning()


def test_cores_are_divided_among_the_sessions(material: Material, monkeypatch) -> None:
    monkeypatch.setattr(systems, "usable_cores", lambda: 4)
    told = System("s", (), "", deadline="setup", tuning={"": Tuning(2.0), "tiny": Tuning(1.0, 1)})
    setup = setup_of(told, material, 1, "folder", 50.0)
    assert (setup.instances, setup.threads, setup.window_ms, setup.deadline_ms) == (1, 4, 1.0, 50.0)
    setup = setup_of(System("s", (), ""), material, 1, "folder", 50.0)
    assert (setup.instances, setup.threads, setup.window_ms, setup.deadline_ms) == (4, 1, 0.0, 0.0)


def test_order_is_reversed_in_every_other_round() -> None:
    assert order(SYSTEMS, 0) == list(SYSTEMS)
    assert order(SYSTEMS, 1) == list(SYSTEMS)[::-1]


def test_model_that_was_not_optimized_cannot_be_served_so(material: Material) -> None:
    with pytest.raises(ServerFailed, match="tiny was not optimized"):
        workload_of(SYSTEMS[1], material)


def test_connections_do_not_limit_what_can_be_late() -> None:
    assert open_load(rate("s", 1, 0.0), [b""], 1.0).connections == 64
    assert open_load(rate("s", 10, 0.0), [b""], 1.0).connections == 500  # 1,000/s, each late by 2 x 250 ms
    assert open_load(rate("s", 1000, 0.0), [b""], 1.0).connections == 4096


class Sweep:
    """Answers so many requests per second in time, and recovers or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capacity: float, *, recovers: bool = True) -> None:
        self.offered: list[float] = []
        self._capacity = capacity
        monkeypatch.setattr(loads, "offer_open", self.offer)
        monkeypatch.setattr(loads, "recovers", lambda *_: recovers)

    def offer(self, server: object, load) -> OpenOutcome:
        self.offered.append(load.rate)
        good = int(min(self._capacity, load.rate))
        return OpenOutcome(int(load.rate), {"ok": good}, [1.0] * good, 1.0, 0.1, 0.1, 0.0)


def test_hopeless_server_is_not_offered_more(material: Material, monkeypatch) -> None:
    sweep = Sweep(monkeypatch, capacity=4)
    found = list(open_loops(SLIPSTREAM, material, None, 1000.0, 1.0))
    assert sweep.offered == [250.0, 500.0]  # the first of each kind of arrivals
    assert len(found) == 8
    assert {entry.skipped for entry in found} == {"", "almost nothing was in time at a lower rate"}


def test_generator_that_fails_costs_one_rate(material: Material, monkeypatch) -> None:
    sweep = Sweep(monkeypatch, capacity=1e9)

    def offer(server: object, load) -> OpenOutcome:
        if load.rate == 500.0 and load.burst == 1:
            raise ServerFailed("the load generator ended with 1: no")
        return sweep.offer(server, load)

    monkeypatch.setattr(loads, "offer_open", offer)
    found = list(open_loops(SLIPSTREAM, material, None, 1000.0, 1.0))
    assert [entry.skipped for entry in found] == ["", "the load generator ended with 1: no", *[""] * 6]


def test_generator_says_why_it_failed() -> None:
    with pytest.raises(ServerFailed, match=r"ended with 1: .*nothing listens on"):
        offer_open(RunningServer(1, 1, 0.0), open_load(rate("s", 1, 0.0), [b""], 1.0))


def test_server_that_does_not_recover_is_not_offered_more(material: Material, monkeypatch) -> None:
    sweep = Sweep(monkeypatch, capacity=1e9, recovers=False)
    found = list(open_loops(SLIPSTREAM, material, None, 1000.0, 1.0))
    assert sweep.offered == []
    assert all("did not recover" in entry.skipped for entry in found)


def test_rates_beyond_the_generator_are_left_out(material: Material, monkeypatch) -> None:
    sweep = Sweep(monkeypatch, capacity=1e9)
    list(open_loops(SLIPSTREAM, material, None, 20_000.0, 1.0))
    assert sweep.offered == [5_000.0, 10_000.0, 20_000.0, 10_000.0]


def test_server_that_fails_is_noted_and_the_run_goes_on(material: Material) -> None:
    said: list[str] = []
    broken = System("broken", SLIPSTREAM.dialects, "", module="no_such_module")
    missing = System("missing", SLIPSTREAM.dialects, "", peer="no-such-peer", module="bare")
    run = Run([broken, missing], 1, 0.05, said.append)
    run.closed([material])
    run.open([material])
    found = run.comparison({})
    assert [(failure.model, failure.system) for failure in found.failures] == [
        ("every model", "missing"),
        ("tiny", "broken"),
    ]
    assert "No module named" in found.failures[1].what
    assert "tiny: no open loop, no server of tiny was measured" in said
    assert {summary.case.system for summary in found.summaries} == {"raw"}


def test_wrong_answer_at_the_start_is_a_failure(material: Material) -> None:
    swapped = [material.workload.expected[1], material.workload.expected[0]]
    wrong = msgspec.structs.replace(
        material,
        workload=msgspec.structs.replace(material.workload, expected=[*swapped, *material.workload.expected[2:]]),
    )
    with pytest.raises(ServerFailed, match="the first answer is wrong"), started(SLIPSTREAM, wrong):
        pass


def test_servers_are_compared(tmp_path: Path, capsys) -> None:
    arguments = ["--only", "slipstream", "bare", "--models", "tiny", "--rounds", "1", "--seconds", "0.05"]
    command.main([*arguments, "--no-ablations", "--out", str(tmp_path)])
    found = msgspec.json.decode((tmp_path / "results.json").read_bytes(), type=Comparison)
    assert found.failures == []
    served = [summary for summary in found.summaries if summary.case.system == "slipstream"]
    assert {(s.case.kind, s.case.connections) for s in served} == {
        (k, c) for k in ("json", "binary") for c in (1, 16, 64)
    }
    assert sum(s.failed + s.wrong for s in served) == 0
    assert {start.system for start in found.starts} == {"slipstream", "bare"}
    assert all(start.pss_mb > 5 and start.start_s > 0 for start in found.starts)
    assert {entry.system for entry in found.rates} == {"slipstream"}
    assert sum(entry.answered.get("ok", 0) for entry in found.rates) > 0
    assert {bar.text[:2] for bar in found.bars} == {"1.", "2."}
    assert "## tiny: closed loop" in capsys.readouterr().out
    page = (tmp_path / "results.md").read_text()
    assert "![tiny-cpu](tiny-cpu.svg)" in page
    assert (tmp_path / "tiny-goodput-poisson.svg").is_file()


def test_unknown_system_is_refused(capsys) -> None:
    assert command.main(["--only", "nginx"]) == 2
    assert "no system nginx" in capsys.readouterr().err


@pytest.mark.parametrize("idea", list(IDEAS))
def test_server_answers_right_without_an_idea(idea: str, material: Material, tmp_path: Path) -> None:
    served = wide(tmp_path) if idea == "json-slices" else material
    with ablated(served, idea, ()) as server:
        assert server.start_s > 0  # its first answer was compared


def test_idea_that_is_no_longer_there_is_an_error() -> None:
    with pytest.raises(AttributeError):
        replace(json, "no_such_function", None)


def test_ablations_name_ideas_and_models_that_there_are() -> None:
    assert {ablation.patch for ablation in ABLATIONS} - {""} == set(IDEAS)
    names = {"tiny", "wide", "minilm-l6", "efficientnet-lite0"}
    assert {model for ablation in ABLATIONS for model in ablation.models} <= names
