"""`python -m services.evaluator`: serves the evaluator, configured by the environment (GRANQ_…)."""

from services.common.rpc import run
from services.evaluator.server import create_server
from services.evaluator.settings import EvaluatorSettings


def main() -> None:
    """Serve until SIGTERM."""
    run("evaluator", EvaluatorSettings(), create_server)


if __name__ == "__main__":
    main()
