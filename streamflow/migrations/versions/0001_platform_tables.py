"""What each month holds, the registered versions and the promotion ledger."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE streamflow.month_writes (
        relation text NOT NULL,
        month text NOT NULL,
        revision integer NOT NULL CHECK (revision > 0),
        digest text NOT NULL,
        rows bigint NOT NULL CHECK (rows >= 0),
        sources jsonb NOT NULL,
        facts jsonb NOT NULL,
        written_at timestamptz NOT NULL,
        PRIMARY KEY (relation, month)
    )
    """,
    """
    COMMENT ON TABLE streamflow.month_writes IS
    'What each (relation, month) holds now: written in the transaction that wrote its rows'
    """,
    """
    CREATE TABLE streamflow.model_versions (
        version integer PRIMARY KEY,
        run_id text NOT NULL UNIQUE,
        as_of date NOT NULL,
        service text NOT NULL,
        threshold double precision NOT NULL CHECK (threshold > 0 AND threshold < 1),
        artifact_path text NOT NULL,
        artifact_sha256 text NOT NULL,
        dataset_digest text NOT NULL,
        predictions_digest text NOT NULL,
        metrics jsonb NOT NULL,
        gates jsonb NOT NULL,
        lineage jsonb NOT NULL,
        registered_at timestamptz NOT NULL
    )
    """,
    """
    CREATE TABLE streamflow.promotion_ledger (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at timestamptz NOT NULL,
        action text NOT NULL CHECK (action IN ('promote', 'rollback', 'refuse')),
        version integer NOT NULL REFERENCES streamflow.model_versions,
        previous integer REFERENCES streamflow.model_versions,
        by text NOT NULL CHECK (by <> ''),
        reason text NOT NULL CHECK (reason <> ''),
        policy text NOT NULL,
        override boolean NOT NULL,
        gates jsonb NOT NULL
    )
    """,
    """
    CREATE FUNCTION streamflow.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP;
    END $$
    """,
    *(
        f"""
        CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON streamflow.{table}
        FOR EACH STATEMENT EXECUTE FUNCTION streamflow.refuse_change()
        """
        for table in ("model_versions", "promotion_ledger")
    ),
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
