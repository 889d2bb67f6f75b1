"""The platform's own tables, versioned by alembic. Contract tables follow `contract.py` instead (see warehouse.py)."""
