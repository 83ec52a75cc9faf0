"""Runs the quantizer: `python -m services.quantizer`, configured by GRANQ_… variables."""

from services.common.rpc.server import run
from services.quantizer.server import create_server
from services.quantizer.settings import QuantizerSettings

if __name__ == "__main__":
    run("quantizer", QuantizerSettings(), create_server)
