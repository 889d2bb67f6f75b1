"""The API's description: features listed from the contract, and a page that needs no internet."""

import json
from collections.abc import Iterator
from html import escape
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response, Router
from litestar._openapi.schema_generation.plugins.struct import StructSchemaPlugin
from litestar.exceptions import NotFoundException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Components, OpenAPIType, Schema
from litestar.plugins import OpenAPISchemaPlugin
from litestar.typing import FieldDefinition

from serving.auth import EITHER, SECURITY_SCHEMES
from serving.examples import BY_STATUS, HEADERS, CompletedOpenAPIConfig
from serving.schemas import Features, Outcome, Prediction, Problem
from streamflow.contract import Column, Contract, FeatureService

TYPES = {
    "category": OpenAPIType.STRING,
    "boolean": OpenAPIType.BOOLEAN,
    "integer": OpenAPIType.INTEGER,
    "float": OpenAPIType.NUMBER,
}


def openapi_config(*, with_keys: bool) -> OpenAPIConfig:
    """Where the description is served: the page at /schema, JSON at /schema/openapi.json; says if keys are on."""
    return CompletedOpenAPIConfig(
        title="StreamFlow",
        version="1",
        description="Churn predictions by the Production model, with the features that they came from.",
        use_handler_docstrings=True,
        openapi_router=Router(
            "/schema", route_handlers=[], include_in_schema=False, after_request=_refuse_unknown_page
        ),
        render_plugins=[OfflinePage(path="/")],
        components=SECURITY_SCHEMES if with_keys else Components(),
        security=EITHER if with_keys else None,
    )


def _refuse_unknown_page(response: Response[Any]) -> Response[Any]:
    """Litestar answers unknown pages of the description with HTML; here as elsewhere they are a problem."""
    if response.status_code == HTTPStatus.NOT_FOUND:
        raise NotFoundException
    return response


class ContractSchemas(OpenAPISchemaPlugin):
    """Describes feature values by the contract, for each feature service its features, and what a batch has."""

    __slots__ = ("_contract",)

    def __init__(self, contract: Contract) -> None:
        self._contract = contract

    @staticmethod
    def is_plugin_supported_type(value: Any) -> bool:
        """Whether this plugin describes the type."""
        return value in (Features, Outcome)

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: Any) -> Schema:
        """One schema for each feature service, or for each outcome."""
        if field_definition.annotation is Outcome:
            outcomes = map(FieldDefinition.from_annotation, (Prediction, Problem))
            return Schema(one_of=[schema_creator.for_field_definition(outcome) for outcome in outcomes])
        services = [_service_schema(service) for service in self._contract.services]
        return services[0] if len(services) == 1 else Schema(any_of=services)


class ClosedSchemas(StructSchemaPlugin):
    """Says of a request body that refuses unknown fields that it does."""

    def is_plugin_supported_field(self, field_definition: FieldDefinition) -> bool:
        """Whether this plugin describes the field."""
        return (
            super().is_plugin_supported_field(field_definition)
            and field_definition.type_.__struct_config__.forbid_unknown_fields
        )

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: Any) -> Schema:
        """The struct's schema, closed."""
        schema = super().to_openapi_schema(field_definition, schema_creator)
        schema.additional_properties = False
        return schema


def _service_schema(service: FeatureService) -> Schema:
    return Schema(
        type=OpenAPIType.OBJECT,
        title=service.name,
        description=service.description,
        properties={column.name: _column_schema(column) for column in service.columns},
        required=service.names,
        additional_properties=False,
    )


def _column_schema(column: Column) -> Schema:
    return Schema(
        type=TYPES[column.kind],
        description=f"{column.description} [{column.unit}]" if column.unit else column.description,
        enum=column.categories or None,
        minimum=column.low,
        maximum=column.high,
    )


class OfflinePage(OpenAPIRenderPlugin):
    """A page without scripts: every route, and every schema with its fields."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The page as HTML."""
        description = msgspec.to_builtins(openapi_schema, enc_hook=str)
        schemas = description["components"]["schemas"]
        info = description["info"]
        return PAGE.format(
            title=escape(info["title"]),
            description=escape(info["description"]),
            json=self.get_openapi_json_route(request),
            routes="".join(
                _route(path, method, operation)
                for path, operations in description["paths"].items()
                for method, operation in operations.items()
            ),
            headers=_table(("header", "when", "meaning"), [_header(name, about) for name, about in HEADERS.items()]),
            schemas="".join(_schema(name, schemas[name]) for name in sorted(schemas)),
        ).encode()


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><link rel="icon" href="data:,">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h2 {{ margin-top: 2.5rem }} h3 {{ margin: 2rem 0 .5rem }} h3 code {{ font-size: 16px }} p {{ margin: .5rem 0 }}
code, pre {{ font-size: 14px }} pre {{ background: #f5f5f5; padding: .75rem; overflow-x: auto; margin: .25rem 0 }}
summary {{ cursor: pointer }} table {{ border-collapse: collapse; width: 100%; table-layout: fixed }}
td, th {{ border-bottom: 1px solid #ddd; padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top }}
td {{ overflow-wrap: anywhere }}
th:first-child {{ width: 33% }} th:nth-child(2) {{ width: 22% }} .answers th:first-child {{ width: 10% }}
</style>
<h1>{title}</h1><p>{description} <a href="{json}">OpenAPI as JSON</a></p>
<h2>Routes</h2>{routes}
<h2>Headers of answers</h2>{headers}
<h2>Schemas</h2>{schemas}
</html>
"""


def _route(path: str, method: str, operation: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {})
    answers = [
        (status, _content_type(answer.get("content", {})), answer["description"])
        for status, answer in sorted(operation["responses"].items())
    ]
    answer = _examples(operation["responses"]["200"]["content"])
    takes = f"<p>Body: {_content_type(body)}</p>{_examples(body)}" if body else ""
    return (
        f"<h3><code>{method.upper()} {escape(path)}</code></h3><p>{escape(operation.get('description', ''))}</p>"
        f'{takes}<div class="answers">{_table(("status", "answer", "meaning"), answers)}</div>'
        f"<details><summary>Example of an answer</summary>{answer}</details>"
    )


def _examples(content: dict[str, Any]) -> str:
    return "".join(
        f"<pre>{escape(example if isinstance(example, str) else json.dumps(example, indent=2))}</pre>"
        for entry in content.values()
        for example in ([each["value"] for each in entry.get("examples", {}).values()] or [entry["example"]])
    )


def _header(name: str, about: dict[str, Any]) -> tuple[str, str, str]:
    statuses = [status for status, names in BY_STATUS.items() if name in names]
    when = f"status {', '.join(statuses)}" if statuses else "always" if about.get("required") else "where sent"
    return name, when, about["description"]


def _content_type(content: dict[str, Any]) -> str:
    return " ".join(_type(entry.get("schema", {})) for entry in content.values())


def _schema(name: str, schema: dict[str, Any]) -> str:
    fields = [(field, _type(about), about.get("description", "")) for field, about in _fields(schema)]
    return f'<h3 id="{escape(name)}"><code>{escape(name)}</code></h3>{_table(("field", "type", "meaning"), fields)}'


def _fields(schema: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field once, also where there are several schemas to choose from; it is then said which have it."""
    choices = [choice.get("properties", {}) for choice in schema.get("anyOf", [schema])]
    for name in dict.fromkeys(name for fields in choices for name in fields):
        about = next(fields[name] for fields in choices if name in fields)
        if not all(name in fields for fields in choices):
            having = [choice["title"] for choice in schema["anyOf"] if name in choice["properties"]]
            about = {**about, "description": f"{about['description']} Only of {', '.join(having)}."}
        yield f"{prefix}{name}", about
        yield from _fields(about, f"{prefix}{name}.")


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    if choices := schema.get("oneOf", schema.get("anyOf")):
        return " or ".join(map(_type, choices))
    if "items" in schema:
        return f"array of {_type(schema['items'])}"
    kind = schema.get("type", "")
    if kind == OpenAPIType.OBJECT.value and "title" in schema:
        return escape(schema["title"])
    return escape(" or ".join(kind) if isinstance(kind, list) else str(kind))


def _table(heads: tuple[str, ...], rows: list[tuple[str, str, str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td><td>{escape(meaning)}</td></tr>"
        for name, kind, meaning in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
