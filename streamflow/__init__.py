"""StreamFlow's core: pure Python under the three faces Dagster, Litestar and Feast."""
