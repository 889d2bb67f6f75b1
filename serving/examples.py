"""What the API's description says beyond the types of the routes: the headers of answers, an example of each body."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import OpenAPI

HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-ID": {
        "description": "The id of this request: ours, and unique.",
        "required": True,
        "schema": {"type": "string", "format": "uuid"},
    },
    "X-Caller-Request-ID": {
        "description": "The X-Request-ID that the request had, where that was 1 to 64 of A-Z a-z 0-9 . _ -",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
    },
    "Retry-After": {
        "description": "Seconds after which to ask again.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {
        "description": "How to show a key.",
        "required": True,
        "schema": {"type": "string"},
    },
}
ALWAYS = ("X-Request-ID", "X-Caller-Request-ID")
BY_STATUS = {"401": ("WWW-Authenticate",), "503": ("Retry-After",)}
BY_FORMAT = {"date": "2024-01-31", "date-time": "2024-03-01T12:30:00Z"}
BY_TYPE: dict[str, Any] = {"boolean": False, "integer": 1, "number": 0.5}

Described = dict[str, Any]


@dataclass
class CompletedOpenAPI(OpenAPI):
    """The description of the API with headers and examples."""

    def to_schema(self) -> Described:
        """The description as it goes over the wire."""
        description = super().to_schema()
        components = description["components"]
        components["headers"] = HEADERS
        for methods in description["paths"].values():
            for operation in methods.values():
                _give_examples(operation.get("requestBody", {}), components["schemas"])
                for status, answer in operation["responses"].items():
                    answer["headers"] = _headers(status)
                    _give_examples(answer, components["schemas"])
        return description


@dataclass
class CompletedOpenAPIConfig(OpenAPIConfig):
    """Litestar's configuration, for a description with headers and examples."""

    def to_openapi_schema(self) -> OpenAPI:
        """The description before it has paths."""
        bare = super().to_openapi_schema()
        return CompletedOpenAPI(**{field.name: getattr(bare, field.name) for field in fields(bare)})


def _headers(status: str) -> Described:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in (*ALWAYS, *BY_STATUS.get(status, ()))}


def _give_examples(body: Described, schemas: Mapping[str, Described]) -> None:
    for content in body.get("content", {}).values():
        for example in content.get("examples", {}).values():
            example.pop("id", None)  # Litestar tells it, and OpenAPI has no such field
        if "examples" not in content:
            content["example"] = _example(content["schema"], schemas)


def _example(schema: Described, schemas: Mapping[str, Described]) -> Any:
    """An example of what a schema describes, made of those that it has; KeyError where it lacks one."""
    if "$ref" in schema:
        return _example(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if "examples" in schema:
        return schema["examples"][0]
    if choices := _choices(schema):
        null = any(choice.get("type") == "null" for choice in choices)
        return None if null else _example(choices[0], schemas)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if "properties" in schema:
        return {name: _example(schema["properties"][name], schemas) for name in schema["required"]}
    if "items" in schema:
        return [_example(item, schemas) for item in _choices(schema["items"]) or [schema["items"]]]
    if "format" in schema:
        return BY_FORMAT[schema["format"]]
    return schema.get("minimum", BY_TYPE[schema["type"]])


def _choices(schema: Described) -> Sequence[Described]:
    choices: Sequence[Described] | None = schema.get("oneOf") or schema.get("anyOf")
    return choices or ()
