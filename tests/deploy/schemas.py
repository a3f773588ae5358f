"""Checking manifests against the schemas of Kubernetes and of the operators."""

import functools
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from referencing import Registry, Resource

from deploy.fetch_schemas import fetch_schemas

NEWEST = "1.37"
# The oldest one that the chart allows.
OLDEST = "1.25"

_NAME = {"type": "string", "minLength": 1}
# The Gateway API's classes are in no Python package: the fields that the chart uses, from its specification.
_HTTP_ROUTE: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["parentRefs", "rules"],
    "properties": {
        "parentRefs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name"],
                "properties": {
                    **dict.fromkeys(("name", "namespace", "sectionName", "group", "kind"), _NAME),
                    "port": {"type": "integer"},
                },
            },
        },
        "hostnames": {"type": "array", "items": _NAME},
        "rules": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "matches": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {
                                "path": {
                                    "type": "object",
                                    "additionalProperties": False,
                                    "properties": {
                                        "type": {"enum": ["Exact", "PathPrefix", "RegularExpression"]},
                                        "value": {"type": "string", "pattern": "^/"},
                                    },
                                }
                            },
                        },
                    },
                    "backendRefs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["name", "port"],
                            "properties": {"name": _NAME, "port": {"type": "integer"}, "weight": {"type": "integer"}},
                        },
                    },
                    "timeouts": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"request": {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}},
                    },
                },
            },
        },
    },
}


def check(manifest: dict[str, Any], kubernetes: str = NEWEST) -> None:
    """Refuse a manifest that its schema does not allow, and a kind without a schema.

    Raises:
        Exception: A validation error of the library that checks the kind.
    """
    if manifest["apiVersion"] == "gateway.networking.k8s.io/v1" and manifest["kind"] == "HTTPRoute":
        _validator(json.dumps(_HTTP_ROUTE)).validate(manifest["spec"])
    elif manifest["kind"] in _custom():
        _validator(_custom()[manifest["kind"]].read_text()).validate(manifest)
        # Metadata are the same for all kinds, and checked with one that Kubernetes knows.
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]}, kubernetes, strict=True
        )
    else:
        kubernetes_validate.validate(manifest, kubernetes, strict=True)


@functools.cache
def _custom() -> dict[str, Path]:
    return fetch_schemas()


@functools.cache
def _validator(schema: str) -> jsonschema.Draft202012Validator:
    core = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{NEWEST}.0-local-strict" / "_definitions.json"
    definitions = Resource.from_contents(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", **json.loads(core.read_text())}
    )
    registry: Registry[Any] = Registry().with_resource("_definitions.json", definitions)
    return jsonschema.Draft202012Validator(json.loads(schema), registry=registry)
