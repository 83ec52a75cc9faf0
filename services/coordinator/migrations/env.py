"""What alembic runs for every command: the revisions, on the connection and in the transaction that it is given."""

from alembic import context

from services.coordinator.schema import migration_options

context.configure(connection=context.config.attributes["connection"], **migration_options())
context.run_migrations()
