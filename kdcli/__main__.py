"""``python -m kdcli``: the same as the ``kdcli`` command, and what torchrun starts."""

from kdcli.cli.main import main

if __name__ == "__main__":
    main()
