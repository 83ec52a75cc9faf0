"""`python -m services.coordinator`: serve until SIGTERM or SIGINT; settings come from the environment (GRANQ_…)."""

from services.common.rpc import run
from services.coordinator.server import create_server
from services.coordinator.settings import CoordinatorSettings

if __name__ == "__main__":
    run("coordinator", CoordinatorSettings(), create_server)
