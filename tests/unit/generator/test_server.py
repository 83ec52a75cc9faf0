import subprocess
import sys


def test_server_does_not_load_torch() -> None:
    """It is ready at once, and small beside its trainings."""
    code = "import sys, services.generator.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
