"""``python -m deltacontrol``: the command line."""

from deltacontrol.experiments.cli.main import main

if __name__ == "__main__":
    main()
