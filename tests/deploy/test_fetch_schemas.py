"""Reading schemas out of generated classes: what is required, typed, named otherwise, and unknown."""

import ast
import json
import textwrap
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from deploy import fetch_schemas as fetching
from deploy.fetch_schemas import SOURCES, SchemaUnavailable, fetch_schemas, schema_of
from deploy.quickstart.packages import QuickstartError
from tests.deploy.schemas import NEWEST, check

PYDANTIC = """
class Thing(Resource):
    api_version: Annotated[Optional[Literal['example.com/v1']], Field(alias='apiVersion')] = 'example.com/v1'
    metadata: Optional[apimachinery.ObjectMeta] = None
    spec: Spec

class Spec(BaseModel):
    max_count: Annotated[Optional[int], Field(alias='maxCount', ge=1)] = None
    port: Optional[Union[int, str]] = None
    labels: Optional[Dict[str, str]] = None
    parts: List['Part']
    size: Optional[Size] = None

class Part(BaseModel):
    name: Annotated[str, Field(min_length=1)]

class Size(RootModel[str]):
    root: Annotated[str, Field(pattern='^[0-9]+Gi$')]
"""
OPENAPI = """
class V1alpha1Thing(object):
    openapi_types = {'pod_labels': 'dict(str, str)', 'containers': 'list[V1Container]', 'inner': 'V1alpha1Inner',
                     'strategy': 'K8sIoApiAppsV1DeploymentStrategy'}
    attribute_map = {'pod_labels': 'podLabels', 'containers': 'containers', 'inner': 'inner', 'strategy': 'strategy'}

    @containers.setter
    def containers(self, containers):
        if self.local_vars_configuration.client_side_validation and containers is None:
            raise ValueError
        self._containers = containers

class V1alpha1Inner(object):
    openapi_types = {'more': 'int'}
    attribute_map = {'more': 'more'}
"""


def classes(text: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(textwrap.dedent(text))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


GOOD = {"apiVersion": "example.com/v1", "metadata": {"name": "x"}, "spec": {"parts": [{"name": "p"}], "port": "http"}}


@pytest.mark.parametrize(
    ("spec", "allowed"),
    [
        ({}, True),
        ({"maxCount": 1, "labels": {"a": "b"}, "size": "3Gi"}, True),
        ({"max_count": 1}, False),
        ({"maxCount": 0}, False),
        ({"maxCount": "1"}, False),
        ({"port": 1.5}, False),
        ({"labels": {"a": 1}}, False),
        ({"size": "3"}, False),
        ({"parts": [{}]}, False),
        ({"parts": [{"name": ""}]}, False),
        ({"bogus": 1}, False),
    ],
)
def test_pydantic_classes_become_a_strict_schema(spec: dict[str, object], allowed: bool) -> None:
    validator = jsonschema.Draft202012Validator(schema_of("Thing", classes(PYDANTIC)))
    assert validator.is_valid({**GOOD, "spec": {**GOOD["spec"], **spec}}) is allowed
    assert not validator.is_valid({"apiVersion": "example.com/v1"})


def test_openapi_classes_become_a_strict_schema() -> None:
    schema = schema_of("V1alpha1Thing", classes(OPENAPI))
    thing = schema["$defs"]["V1alpha1Thing"]
    assert thing["required"] == ["containers"]
    assert thing["additionalProperties"] is False
    assert thing["properties"]["podLabels"] == {"type": "object", "additionalProperties": {"type": "string"}}
    assert thing["properties"]["containers"]["items"]["$ref"].endswith("io.k8s.api.core.v1.Container")
    assert thing["properties"]["strategy"]["$ref"].endswith("io.k8s.api.apps.v1.DeploymentStrategy")
    assert schema["$defs"]["V1alpha1Inner"]["properties"] == {"more": {"type": "integer"}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class Thing(BaseModel):\n    spec: Missing", "class Missing is missing"),
        ("class Thing(BaseModel):\n    spec: Tuple[int]", r"annotation Tuple\[int\]"),
        ("class Thing:\n    openapi_types = {'a': 'Odd'}\n    attribute_map = {'a': 'a'}", "type Odd"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, words: str) -> None:
    with pytest.raises(SchemaUnavailable, match=words):
        schema_of("Thing", classes(text))


def test_every_reference_of_the_fetched_schemas_leads_somewhere() -> None:
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{NEWEST}.0-local-strict"
    kubernetes = json.loads((folder / "_definitions.json").read_text())["$defs"]
    for path in fetch_schemas().values():
        schema = json.loads(path.read_text())
        for reference in fetching._references(schema):
            known = schema["$defs"] if reference.startswith("#") else kubernetes
            assert reference.rsplit("/", 1)[1] in known, f"{path.stem}: {reference}"


def test_fetched_schemas_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in SOURCES:
        folder = tmp_path / f"{source.package.name}-{source.package.version}"
        folder.mkdir()
        for kind in source.kinds:
            (folder / f"{kind}.json").write_text("{}")
    monkeypatch.setattr(fetching, "download", lambda package, folder: pytest.fail("fetched again"))
    assert fetch_schemas(tmp_path).keys() == {kind for source in SOURCES for kind in source.kinds}


def test_failed_download_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(package: object, folder: Path) -> Path:
        raise QuickstartError("pip could not download it")

    monkeypatch.setattr(fetching, "download", fail)
    with pytest.raises(SchemaUnavailable, match="pip could not download it"):
        fetch_schemas(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_kinds_and_unknown_fields_are_refused() -> None:
    good = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}
    check(good)
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        check({**good, "kind": "ConfigMapp"})
    with pytest.raises(kubernetes_validate.ValidationError):
        check({**good, "metadata": {"nam": "x"}})
