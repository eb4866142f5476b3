from tests.adapters.test_rabbit_faults import proxy
from tests.programs.conftest import empty_database, world

__all__ = ["empty_database", "proxy", "world"]  # fixtures
