"""What a month's customers were scored with, the reports on drift and decay, and what was trained again and why."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE streamflow.churn_scores (
        month text NOT NULL,
        user_id text COLLATE "C" NOT NULL,
        model_version integer NOT NULL REFERENCES streamflow.model_versions,
        probability double precision NOT NULL CHECK (probability BETWEEN 0 AND 1),
        threshold double precision NOT NULL,
        decision boolean NOT NULL,
        expected_value double precision NOT NULL,
        rank integer NOT NULL CHECK (rank > 0),
        PRIMARY KEY (month, user_id)
    )
    """,
    """
    COMMENT ON TABLE streamflow.churn_scores IS
    'Each month''s customers as they were scored last; every scoring is kept as Parquet under its digest'
    """,
    """
    CREATE TABLE streamflow.reports (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        kind text NOT NULL CHECK (kind IN ('drift_report', 'performance_report')),
        month text NOT NULL,
        model_version integer NOT NULL REFERENCES streamflow.model_versions,
        digest text NOT NULL,
        content json NOT NULL,
        made_at timestamptz NOT NULL
    )
    """,
    "CREATE INDEX ON streamflow.reports (kind, month, id DESC)",
    """
    COMMENT ON TABLE streamflow.reports IS
    'Every report as it was made; the newest of a kind and month is the one in force'
    """,
    """
    CREATE TABLE streamflow.retraining_attempts (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        cause text NOT NULL,
        month text NOT NULL,
        reason text NOT NULL,
        by text NOT NULL CHECK (by <> ''),
        at timestamptz NOT NULL,
        failure text
    )
    """,
    """
    COMMENT ON TABLE streamflow.retraining_attempts IS
    'What a model is trained again for: a row when it is begun, and another with the failure if it fails'
    """,
    """
    CREATE VIEW streamflow.retrainings AS
    SELECT cause, min(month) AS month, min(reason) AS reason, min(by) AS by, min(at) AS started_at,
        count(*) FILTER (WHERE failure IS NULL) AS attempts, max(failure) AS failure
    FROM streamflow.retraining_attempts GROUP BY cause
    """,
    "COMMENT ON VIEW streamflow.retrainings IS 'What a model is trained again for: a row for each cause'",
    *(
        f"""
        CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON streamflow.{table}
        FOR EACH STATEMENT EXECUTE FUNCTION streamflow.refuse_change()
        """
        for table in ("reports", "retraining_attempts")
    ),
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
