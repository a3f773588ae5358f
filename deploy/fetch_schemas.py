"""Fetch the schemas of the custom resources that the chart and the KServe manifests use, and keep them in ``.cache``.

Kubernetes' own schemas come with ``kubernetes-validate``. Those of operators are in no package as such, but client
classes are generated from them: for pydantic (cloudcoil) and by the OpenAPI generator (KServe). Their source is read,
not run, and turned into JSON Schema that refuses unknown fields. The wheels are pinned by digest.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

from deploy.quickstart.packages import Package, QuickstartError, download

ROOT = Path(__file__).resolve().parent.parent
DESTINATION = ROOT / ".cache" / "schemas"

Schema = dict[str, Any]

# Kubernetes' own types inside KServe's: the file of kubernetes-validate that holds them, and the prefix of their names.
KUBERNETES = "_definitions.json#/$defs/io.k8s.api."
_SCALARS: dict[str, Schema] = {
    "str": {"type": "string"},
    "datetime": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "object": {},
    "Any": {},
    "ResourceQuantity": {"type": ["string", "number"]},
    "V1beta1MetricQuantity": {"type": ["string", "number"]},
    # Checked where the object is rendered: every kind has the same.
    "ObjectMeta": {"type": "object"},
    "V1ObjectMeta": {"type": "object"},
}
_LIMITS = {"ge": "minimum", "le": "maximum", "pattern": "pattern", "min_length": "minLength", "max_length": "maxLength"}


class SchemaUnavailable(Exception):
    """The schemas could not be fetched, or a package does not hold what it held when it was tested."""


@dataclass(frozen=True, slots=True)
class Source:
    """One wheel and the kinds to take from it.

    Attributes:
        package: The wheel.
        modules: Folder or file of the generated classes inside the wheel.
        kinds: Kind -> name of its class.
    """

    package: Package
    modules: str
    kinds: dict[str, str]


SOURCES = (
    Source(
        Package(
            "cloudcoil-models-prometheus-operator",
            "0.80.1.0",
            "a139a60cc0114caace847a34275d7a7cd899ec2dad4120504d8e1cf6a8de0270",
            1,
        ),
        "cloudcoil/models/prometheus_operator/v1.py",
        {"ServiceMonitor": "ServiceMonitor", "PrometheusRule": "PrometheusRule"},
    ),
    Source(
        Package(
            "cloudcoil-models-keda",
            "2.16.1.0",
            "9ec4a118def872b68216d9057ef386701b32fcb0ec2173f49c6214d309176b46",
            1,
        ),
        "cloudcoil/models/keda/v1alpha1.py",
        {"ScaledObject": "ScaledObject"},
    ),
    Source(
        Package("kserve", "0.21.0", "df9bc5888704d9085015e08f1a8fced5ff0698f3becc6212d4e7b8234c71623b", 1),
        "kserve/models/",
        {"ClusterServingRuntime": "V1alpha1ClusterServingRuntime", "InferenceService": "V1beta1InferenceService"},
    ),
)


def fetch_schemas(destination: Path = DESTINATION) -> dict[str, Path]:
    """Put the schema of every kind in place; what is there is kept.

    Args:
        destination: Folder for the schemas. The versions of the packages are part of the folders' names inside.

    Returns:
        Kind -> path of its JSON Schema.

    Raises:
        SchemaUnavailable: If pip cannot deliver a pinned wheel, or if a wheel lacks a class.
    """
    found: dict[str, Path] = {}
    for source in SOURCES:
        folder = destination / f"{source.package.name}-{source.package.version}"
        paths = {kind: folder / f"{kind}.json" for kind in source.kinds}
        if not all(path.is_file() for path in paths.values()):
            classes = _read_classes(source)
            folder.mkdir(parents=True, exist_ok=True)
            for kind, path in paths.items():
                schema = schema_of(source.kinds[kind], classes)
                with TemporaryDirectory(dir=folder) as scratch:
                    whole = Path(scratch, path.name)
                    whole.write_text(json.dumps(schema, indent=1, sort_keys=True), encoding="utf-8")
                    whole.replace(path)
        found.update(paths)
    return found


def _read_classes(source: Source) -> dict[str, ast.ClassDef]:
    try:
        with TemporaryDirectory() as scratch, ZipFile(download(source.package, Path(scratch))) as wheel:
            files = [name for name in wheel.namelist() if name.startswith(source.modules) and name.endswith(".py")]
            trees = [ast.parse(wheel.read(name)) for name in files]
    except QuickstartError as exc:
        raise SchemaUnavailable(str(exc)) from exc
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def schema_of(name: str, classes: dict[str, ast.ClassDef]) -> Schema:
    """Turn a generated class, and those it names, into a JSON Schema that refuses unknown fields.

    Args:
        name: The class.
        classes: Name -> class, pydantic or OpenAPI generator's.

    Raises:
        SchemaUnavailable: If a class is missing, or if a type is written in a way that is not known here.
    """
    definitions: dict[str, Schema] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in definitions:
            continue
        if current not in classes:
            raise SchemaUnavailable(f"class {current} is missing in the package")
        definition = definitions[current] = _class_schema(classes[current], classes)
        waiting += [reference.rsplit("/", 1)[1] for reference in _references(definition) if reference.startswith("#")]
    return {"$ref": f"#/$defs/{name}", "$defs": definitions}


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _class_schema(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Schema:
    if any(_assigned(statement) == "openapi_types" for statement in node.body):
        return _openapi_class(node, classes)
    properties: dict[str, Schema] = {}
    required: list[str] = []
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            schema, alias = _annotation(statement.annotation)
            name = alias or statement.target.id
            if name == "root":
                return schema
            properties[name] = schema
            if statement.value is None:
                required.append(name)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _annotation(node: ast.expr) -> tuple[Schema, str | None]:
    """Return the schema of a pydantic annotation, and its alias."""
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
        kind, field = node.slice.elts
        schema, options = _annotation(kind)[0], {}
        if isinstance(field, ast.Call):
            options = {
                word.arg: ast.literal_eval(word.value) for word in field.keywords if word.arg != "default_factory"
            }
        limits = {_LIMITS[key]: value for key, value in options.items() if key in _LIMITS}
        return ({**schema, **limits} if limits else schema), options.get("alias")
    return _kind(node), None


def _kind(node: ast.expr) -> Schema:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _kind(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value)
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if name == "Optional":
            return _kind(inner[0])
        if name == "Union":
            return {"anyOf": [_kind(part) for part in inner]}
        if name == "List":
            return {"type": "array", "items": _kind(inner[0])}
        if name == "Dict":
            return {"type": "object", "additionalProperties": _kind(inner[1])}
        if name == "Literal":
            return {"enum": [ast.literal_eval(part) for part in inner]}
        if name == "Annotated":
            return _annotation(node)[0]
    if isinstance(node, ast.Name | ast.Attribute):
        name = ast.unparse(node).rsplit(".", 1)[-1]
        return _SCALARS.get(name, {"$ref": f"#/$defs/{name}"})
    raise SchemaUnavailable(f"no schema is known for the annotation {ast.unparse(node)}")


def _openapi_class(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Schema:
    tables = {
        _assigned(statement): ast.literal_eval(statement.value)
        for statement in node.body
        if isinstance(statement, ast.Assign) and _assigned(statement) in ("openapi_types", "attribute_map")
    }
    names: dict[str, str] = tables["attribute_map"]
    # The setter of a required field refuses None.
    required = re.findall(r"client_side_validation and (\w+) is None", ast.unparse(node))
    return {
        "type": "object",
        "properties": {names[key]: _openapi_kind(kind, classes) for key, kind in tables["openapi_types"].items()},
        "required": sorted({names[key] for key in required}),
        "additionalProperties": False,
    }


def _openapi_kind(kind: str, classes: dict[str, ast.ClassDef]) -> Schema:
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        return {"type": "array", "items": _openapi_kind(match[1], classes)}
    if match := re.fullmatch(r"dict\(str, (.+)\)", kind):
        return {"type": "object", "additionalProperties": _openapi_kind(match[1], classes)}
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind in classes:
        return {"$ref": f"#/$defs/{kind}"}
    if match := re.fullmatch(r"V1([A-Z]\w+)", kind):
        return {"$ref": f"{KUBERNETES}core.v1.{match[1]}"}
    if match := re.fullmatch(r"K8sIoApi([A-Z][a-z]+)V(\d)([A-Z]\w+)", kind):
        return {"$ref": f"{KUBERNETES}{match[1].lower()}.v{match[2]}.{match[3]}"}
    # The package names a few classes that it does not hold: anything is let through there.
    if re.match(r"V\d(alpha|beta)\d|Knative", kind):
        return {}
    raise SchemaUnavailable(f"no schema is known for the type {kind}")


def _assigned(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return ""


def main() -> int:
    """Fetch the schemas and print their paths."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--destination", type=Path, default=DESTINATION)
    try:
        paths = fetch_schemas(parser.parse_args().destination)
    except SchemaUnavailable as exc:
        sys.stderr.write(f"fetch_schemas: {exc}\n")
        return 1
    sys.stdout.writelines(f"{path}\n" for path in paths.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
