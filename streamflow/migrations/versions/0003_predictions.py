"""The prediction log: partitioned by the UTC month of the answer; partitions are made by whoever writes.

The platform's role may insert, read, and have a month's partition made, which takes a function that runs as the owner.
Months are dropped by the owner alone (streamflow/predictions.py): a role that may only add cannot make anything vanish.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE streamflow.predictions (
        request_id uuid NOT NULL,
        answered_at timestamptz NOT NULL,
        caller_request_id text,
        user_id text NOT NULL,
        features_as_of date NOT NULL,
        features json NOT NULL,
        probability double precision NOT NULL,
        threshold double precision NOT NULL,
        decision boolean NOT NULL,
        model_version integer NOT NULL,
        run_id text NOT NULL,
        artifact_sha256 text NOT NULL,
        PRIMARY KEY (request_id, answered_at)
    ) PARTITION BY RANGE (answered_at)
    """,
    """
    COMMENT ON COLUMN streamflow.predictions.features IS
    'By name, as scored; json and not jsonb, which would not give -0.0 and 1e16 back as they were written'
    """,
    "CREATE INDEX ON streamflow.predictions USING brin (answered_at)",
    # Attached, not made as a partition: that would lock out whoever reads or writes the log.
    """
    CREATE FUNCTION streamflow.make_predictions_partition(month date) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    DECLARE
        first date := date_trunc('month', month::timestamp);
        name text := to_char(first, '"predictions_"YYYY_MM');
    BEGIN
        PERFORM pg_advisory_xact_lock(hashtextextended('streamflow make_predictions_partition', 0));
        IF to_regclass(format('streamflow.%I', name)) IS NOT NULL THEN
            RETURN;
        END IF;
        EXECUTE format('CREATE TABLE streamflow.%I (LIKE streamflow.predictions INCLUDING ALL)', name);
        EXECUTE format(
            'CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON streamflow.%I '
            'FOR EACH STATEMENT EXECUTE FUNCTION streamflow.refuse_change()', name
        );
        EXECUTE format(
            'ALTER TABLE streamflow.predictions ATTACH PARTITION streamflow.%I FOR VALUES FROM (%L) TO (%L)', name,
            to_char(first, 'YYYY-MM-DD" 00:00:00+00"'),
            to_char(first + interval '1 month', 'YYYY-MM-DD" 00:00:00+00"')
        );
    END $$
    """,
    "REVOKE EXECUTE ON FUNCTION streamflow.make_predictions_partition FROM PUBLIC",
    """
    CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON streamflow.predictions
    FOR EACH STATEMENT EXECUTE FUNCTION streamflow.refuse_change()
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
