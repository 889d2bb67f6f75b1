"""Databases of a real Redis for tests; without a Redis its tests are skipped and say so."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

CLAIM = "streamflow-tests:claimed"
CLAIMED_FOR_S = 3_600


@contextmanager
def redis_database() -> Iterator[str]:
    """The address of an empty database of the test Redis, claimed for its user and emptied afterwards."""
    address = os.environ.get("STREAMFLOW_TEST_REDIS_URL", "redis://127.0.0.1:6379")
    try:
        databases = range(1, int(redis.Redis.from_url(address).config_get("databases")["databases"]))
    except redis.ConnectionError as failure:
        pytest.skip(f"no Redis at STREAMFLOW_TEST_REDIS_URL ({address}): {failure}")
    for number in databases:
        url = urlsplit(address)._replace(path=f"/{number}").geturl()
        with redis.Redis.from_url(url) as client:
            if not _claims(client):
                continue
            try:
                yield url
            finally:
                client.flushdb()
            return
    pytest.skip(f"no database of the Redis at STREAMFLOW_TEST_REDIS_URL ({address}) is empty")


def _claims(client: Any) -> bool:
    """Take a database that is empty, or was left by a session that died."""
    left = float(client.get(CLAIM) or "inf") < time.time() - CLAIMED_FOR_S
    if left:
        client.flushdb()
    if not client.set(CLAIM, time.time(), nx=True):
        return False
    if client.dbsize() == 1:
        return True
    client.delete(CLAIM)
    return False
