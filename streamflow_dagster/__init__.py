"""The asset graph: a thin face of Dagster over the core."""
