"""Model artifacts: fetched from MLflow over HTTP, kept in a local cache, never trusted without their digest."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import httpx

from serving.logs import log
from streamflow.errors import ArtifactRefused, RegistryUnavailable
from streamflow.scoring import sha256

PROBE_S = 2.0
DOWNLOAD_S = 30.0
KEPT = 8
"""Artifacts in the cache; of more, those that were not used for longest are removed."""
NOT_CONFIGURED = "no MLflow server is configured; set STREAMFLOW_MLFLOW_URI"


class Artifacts:
    """The registry's artifacts by digest: from ``cache`` if there, else from the MLflow server at ``uri``."""

    def __init__(self, uri: str | None, cache: Path) -> None:
        self._client = httpx.AsyncClient(base_url=uri, timeout=PROBE_S, trust_env=False) if uri else None
        self._cache = cache

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client:
            await self._client.aclose()

    async def probe(self) -> None:
        """Raise RegistryUnavailable when MLflow does not answer."""
        await self._get("/health", {}, PROBE_S)

    async def load(self, run_id: str, path: str, digest: str) -> bytes:
        """The artifact's bytes, whose SHA-256 is ``digest``.

        Raises RegistryUnavailable when it is neither cached nor to be had, ArtifactRefused when MLflow has other bytes.
        """
        cached = self._cache / digest
        data = await asyncio.to_thread(_read, cached)
        if sha256(data) == digest:
            return data
        data = await self._get("/get-artifact", {"run_uuid": run_id, "path": path}, DOWNLOAD_S)
        if (found := sha256(data)) != digest:
            raise ArtifactRefused(f"MLflow's artifact of run {run_id} has SHA-256 {found}; the ledger says {digest}")
        await asyncio.to_thread(self._keep, cached, data)
        return data

    async def _get(self, path: str, parameters: dict[str, str], limit_s: float) -> bytes:
        async with _registry_errors(), asyncio.timeout(limit_s):
            if self._client is None:
                raise RegistryUnavailable(NOT_CONFIGURED)
            answer = await self._client.get(path, params=parameters)
            answer.raise_for_status()
            return answer.content

    def _keep(self, cached: Path, data: bytes) -> None:
        partial = cached.with_name(f"{cached.name}.{os.getpid()}.partial")
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.replace(cached)
            for least_used in sorted(self._cache.iterdir(), key=_used_at, reverse=True)[KEPT:]:
                least_used.unlink(missing_ok=True)
        except OSError as failure:
            log(logging.ERROR, "artifact_not_cached", path=cached, reason=str(failure))


def _used_at(cached: Path) -> float:
    try:
        return cached.stat().st_mtime
    except FileNotFoundError:  # another worker was quicker
        return 0.0


def _read(cached: Path) -> bytes:
    """What is cached, noted as used; nothing, which has no model's digest, if nothing can be read."""
    try:
        data = cached.read_bytes()
    except OSError as failure:
        log(logging.INFO, "artifact_not_in_cache", path=cached, reason=failure.strerror)
        return b""
    with contextlib.suppress(OSError):  # a cache that may only be read
        os.utime(cached)
    return data


@contextlib.asynccontextmanager
async def _registry_errors() -> AsyncIterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as failure:
        answer = failure.response
        raise RegistryUnavailable(f"MLflow answers {answer.status_code} to {answer.request.url.path}") from failure
    except (httpx.HTTPError, TimeoutError) as failure:
        raise RegistryUnavailable("MLflow does not answer; the log says why") from failure
