"""The migrations as Alembic runs them."""

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection


def revisions() -> list[str]:
    """Every revision there is, the newest first."""
    return [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()]


def to_newest(connection: Connection) -> None:
    """Run what is missing, in the transaction of this connection."""
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "relay.adapters:migrations")
    config.set_main_option("path_separator", "os")
    return config
