"""The `streamflow` command."""


def main(): ...
