"""`python -m wstunnel` and the `wstunnel` command."""

from wstunnel.cli import main

if __name__ == "__main__":
    main()
