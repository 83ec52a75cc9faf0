"""`python -m granq.cli` is the granq command."""

from granq.cli import main

if __name__ == "__main__":
    main()
