"""Defaults of the contract that more than one service needs; the protos document them."""

EPOCHS = 6
LAMBDA_LOWER = 0.1
LAMBDA_UPPER = 0.8


def warmup_epochs(epochs: int) -> int:
    """Return how many of ``epochs`` belong to the generator alone when the request does not say: half of them."""
    return epochs // 2
