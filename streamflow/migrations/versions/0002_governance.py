"""The evidence of versions; thresholds, waits and flags in the ledger; how far MLflow's stages follow it."""

from alembic import op

from streamflow.errors import ConfigurationError

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    ALTER TABLE streamflow.model_versions
        DROP COLUMN metrics,
        DROP COLUMN gates,
        ADD COLUMN evidence jsonb NOT NULL
    """,
    "COMMENT ON COLUMN streamflow.model_versions.threshold IS 'As registered; the ledger has the later ones'",
    """
    ALTER TABLE streamflow.promotion_ledger
        DROP CONSTRAINT promotion_ledger_action_check,
        ADD CHECK (action IN ('promote', 'rollback', 'wait', 'refuse', 'threshold', 'flag')),
        ADD COLUMN threshold double precision CHECK (threshold > 0 AND threshold < 1),
        ADD CHECK ((action = 'threshold') = (threshold IS NOT NULL)),
        ADD COLUMN evidence jsonb CHECK ((threshold IS NULL) = (evidence IS NULL)),
        DROP CONSTRAINT promotion_ledger_version_fkey,
        ADD COLUMN registered_version integer
            GENERATED ALWAYS AS (CASE WHEN action <> 'flag' THEN version END) STORED
            REFERENCES streamflow.model_versions
    """,
    """
    COMMENT ON COLUMN streamflow.promotion_ledger.registered_version IS
    'The version, but for flags: one may be about a version that only MLflow knows'
    """,
    "CREATE TABLE streamflow.stages_followed (entry bigint PRIMARY KEY)",
    """
    COMMENT ON TABLE streamflow.stages_followed IS
    'The newest row of the ledger, each time that MLflow''s stages have been brought in line with it'
    """,
)


def upgrade() -> None:
    if op.get_bind().exec_driver_sql("SELECT EXISTS (SELECT FROM streamflow.model_versions)").scalar():
        raise ConfigurationError(
            "the versions of this database were registered without evidence, which no migration can make up; "
            "start with another database, or with another STREAMFLOW_HOME where the embedded one is used"
        )
    for statement in STATEMENTS:
        op.execute(statement)
