import msgspec
import numpy as np
import pytest

from server.errors import SignatureMismatch, UnsupportedModel
from server.tensors import (
    DATATYPE_OF_NUMPY,
    DATATYPE_OF_ORT,
    NUMPY_DTYPE,
    Signature,
    TensorSpec,
    spec_of_ort,
)

SIGNATURE = Signature(
    (TensorSpec("ids", "INT64", ("batch", None)), TensorSpec("scale", "FP32", ("batch", 1))),
    (TensorSpec("y", "FP32", ("batch", 3)),),
)


def good() -> dict[str, np.ndarray]:
    return {"ids": np.zeros((2, 5), np.int64), "scale": np.zeros((2, 1), np.float32)}


def test_datatype_tables_agree():
    assert len(NUMPY_DTYPE) == 13
    assert {dtype: name for name, dtype in NUMPY_DTYPE.items()} == DATATYPE_OF_NUMPY
    assert sorted(DATATYPE_OF_ORT.values()) == sorted(NUMPY_DTYPE)
    assert NUMPY_DTYPE["FP16"] == np.float16
    assert DATATYPE_OF_ORT["tensor(double)"] == "FP64"


def test_what_fits_passes():
    SIGNATURE.check(good())
    SIGNATURE.check({name: array[:0] for name, array in good().items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": None}, r"missing input 'scale'; the model takes \['ids', 'scale'\]"),
        ({"extra": np.zeros(1)}, r"unexpected inference input 'extra'; the model takes \['ids', 'scale'\]"),
        ({"ids": np.zeros((2, 5), np.int32)}, "input 'ids' has datatype INT32; the model takes INT64"),
        ({"ids": np.zeros((2, 5), np.complex64)}, "datatype complex64"),
        ({"ids": np.zeros((2, 5), ">i8")}, "datatype"),
        ({"ids": np.zeros(5, np.int64)}, r"input 'ids': got \[5\], the model takes \[-1, -1\]"),
        ({"scale": np.zeros((2, 2), np.float32)}, r"input 'scale': got \[2, 2\], the model takes \[-1, 1\]"),
        ({"scale": np.zeros((2, 1, 1), np.float32)}, r"got \[2, 1, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, message: str):
    inputs = {name: array for name, array in {**good(), **changes}.items() if array is not None}
    with pytest.raises(SignatureMismatch, match=message):
        SIGNATURE.check(inputs)


def test_unknown_output_is_refused():
    SIGNATURE.check_outputs(())
    SIGNATURE.check_outputs(("y",))
    with pytest.raises(SignatureMismatch, match=r"unexpected inference output 'z'; the model gives \['y'\]"):
        SIGNATURE.check_outputs(("y", "z"))


@pytest.mark.parametrize(
    ("inputs", "outputs", "shares"),
    [
        ([("n", 4)], [("n",)], True),
        ([("n", 4), ("n",)], [("n", 2), ("n", "m")], True),
        ([("n", 4)], [("m",)], False),
        ([("n", 4), ("m", 4)], [("n",)], False),
        ([(None, 4)], [(None, 4)], False),
        ([(1, 4)], [(1, 4)], False),
        ([("n", 4)], [(2, "n", 4)], False),
        ([("n", 4)], [()], False),
        ([("n", 4), ()], [("n",)], False),
    ],
)
def test_batch_axis_must_be_one_named_axis_of_all_tensors(inputs: list, outputs: list, shares: bool):
    signature = Signature(
        tuple(TensorSpec(f"i{number}", "FP32", shape) for number, shape in enumerate(inputs)),
        tuple(TensorSpec(f"o{number}", "FP32", shape) for number, shape in enumerate(outputs)),
    )
    assert signature.shares_batch_axis == shares


def test_spec_of_onnxruntime():
    assert spec_of_ort("x", "tensor(float16)", ["batch", 3, None]) == TensorSpec("x", "FP16", ("batch", 3, None))
    assert spec_of_ort("x", "tensor(string)", []) == TensorSpec("x", "BYTES", ())
    assert TensorSpec("x", "FP16", ("batch", 3, None)).protocol_shape == [-1, 3, -1]


@pytest.mark.parametrize("kind", ["tensor(bfloat16)", "seq(tensor(float))", "map(int64,tensor(float))"])
def test_type_that_is_not_served_is_unsupported(kind: str):
    with pytest.raises(UnsupportedModel, match=r"'x' is a .*; served types are"):
        spec_of_ort("x", kind, [1])


def test_signature_survives_json():
    assert msgspec.json.decode(msgspec.json.encode(SIGNATURE), type=Signature) == SIGNATURE
