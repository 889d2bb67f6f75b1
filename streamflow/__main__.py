"""``python -m streamflow`` is the `streamflow` command."""

from streamflow.cli import main

if __name__ == "__main__":
    main()
