-- What the superuser does once, when the server is new; afterwards nobody logs in as it. The same two roles and rights as
-- on the embedded server (streamflow/embedded.py): neither is superuser nor member of the other.
\getenv platform_password STREAMFLOW_PLATFORM_PASSWORD
\getenv owner_password STREAMFLOW_OWNER_PASSWORD

CREATE ROLE streamflow LOGIN PASSWORD :'platform_password';
CREATE ROLE streamflow_owner LOGIN PASSWORD :'owner_password';

CREATE DATABASE streamflow OWNER streamflow_owner;
REVOKE ALL ON DATABASE streamflow FROM PUBLIC;
GRANT CONNECT, CREATE, TEMPORARY ON DATABASE streamflow TO streamflow;
