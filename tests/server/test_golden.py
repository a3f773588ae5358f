from pathlib import Path

import msgspec
import numpy as np
import pytest

from server.artifact import Golden, SessionOptions, Variant, read_artifact, read_golden
from server.errors import ArtifactError
from server.golden import require_golden, sqnr_db
from server.providers import CPU
from server.session import Session
from tests import models
from tests.artifacts import write_artifact


def tensors(**arrays: object) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in arrays.items()}


REFERENCE = tensors(y=np.full(100, 2.0, np.float32))


@pytest.mark.parametrize(("error", "decibel"), [(0.2, 20.0), (0.02, 40.0), (2.0, 0.0), (20.0, -20.0)])
def test_ratio_of_powers_in_decibel(error: float, decibel: float):
    assert sqnr_db(REFERENCE, {"y": REFERENCE["y"] + np.float32(error)}) == pytest.approx(decibel, abs=1e-3)


def test_equal_outputs_reach_the_cap():
    assert sqnr_db(REFERENCE, REFERENCE) == 200.0
    assert sqnr_db(tensors(y=[0.0]), tensors(y=[0.0])) == 200.0


def test_powers_are_summed_over_all_outputs():
    reference = tensors(a=[3.0, 4.0], b=[0.0])
    assert sqnr_db(reference, tensors(a=[3.0, 4.0], b=[0.5])) == pytest.approx(20.0)


def test_half_precision_does_not_overflow_on_the_way():
    reference = tensors(y=np.array([6e4, 6e4], np.float16))
    assert sqnr_db(reference, tensors(y=np.array([6e4, 5.4e4], np.float16))) == pytest.approx(23.0, abs=0.1)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_broken_candidate_is_the_worst(broken: float):
    assert sqnr_db(tensors(y=[1.0, 2.0]), tensors(y=[1.0, broken])) == -200.0


def test_elements_that_are_not_finite_in_the_reference_do_not_count():
    assert sqnr_db(tensors(y=[np.nan, -np.inf, 1.0]), tensors(y=[0.0, np.nan, 1.0])) == 200.0


@pytest.mark.parametrize("candidate", [{}, tensors(y=np.zeros((100, 1))), tensors(z=np.zeros(100))])
def test_missing_or_misshapen_output_is_the_worst(candidate: dict):
    assert sqnr_db(REFERENCE, candidate) == -200.0


def test_error_on_a_zero_reference_is_the_worst():
    assert sqnr_db(tensors(y=[0.0]), tensors(y=[1.0])) == -200.0


def test_other_outputs_do_not_enter_beside_floats():
    assert sqnr_db(tensors(y=[1.0], label=[1]), tensors(y=[1.0], label=[2])) == 200.0


@pytest.mark.parametrize("make", [np.array, lambda values: np.array([b"%d" % value for value in values], object)])
def test_outputs_without_floats_count_what_changed(make):
    assert sqnr_db({"label": make([1, 2])}, {"label": make([1, 2])}) == 200.0
    assert sqnr_db({"label": make([1] * 10)}, {"label": make([1] * 9 + [2])}) == pytest.approx(10.0)
    assert sqnr_db({"label": make([1, 2])}, {"label": make([2, 3])}) == 0.0


@pytest.fixture
def case(tmp_path: Path, mlp: Path) -> tuple[Session, Variant, Golden]:
    folder = write_artifact(tmp_path / "models", "mlp", "1", {"fp32": mlp}, min_sqnr_db=60.0)
    (variant,) = read_artifact(folder).variants
    return Session(folder / variant.file, CPU, SessionOptions()), variant, read_golden(folder)


def test_faithful_variant_passes(case):
    assert require_golden(*case) > 100.0


def test_bound_is_inclusive(case):
    session, variant, golden = case
    seen = require_golden(session, variant, golden)
    require_golden(session, msgspec.structs.replace(variant, golden_min_sqnr_db=seen), golden)


def test_unfaithful_variant_is_refused_with_both_numbers(case, tmp_path: Path):
    _, variant, golden = case
    other = Session(models.save_mlp(tmp_path / "other.onnx", seed=1), CPU, SessionOptions())
    with pytest.raises(ArtifactError, match=r"variant fp32 on cpu .* with -?\d+\.\d dB .* at least 60\.0 dB"):
        require_golden(other, variant, golden)


def test_variant_that_cannot_run_is_refused(case):
    session, variant, golden = case
    with pytest.raises(ArtifactError, match="variant fp32 cannot run its golden inputs"):
        require_golden(session, variant, Golden({"x": np.zeros((1, 3), np.float32)}, golden.outputs))
