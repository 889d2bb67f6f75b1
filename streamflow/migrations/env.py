"""Runs the migrations on the connection that `warehouse.migrate` hands over, in its transaction."""

from alembic import context

from streamflow.contract import SCHEMA

context.configure(connection=context.config.attributes["connection"], version_table_schema=SCHEMA)
context.run_migrations()
