"""`python -m services.generator`: serves the generator, configured by the environment (GRANQ_…)."""

from services.common.rpc import run
from services.generator.server import create_server
from services.generator.settings import GeneratorSettings


def main() -> None:
    """Serve until SIGTERM."""
    run("generator", GeneratorSettings(), create_server)


if __name__ == "__main__":
    main()
