"""The entry point of `python -m mmgen.cli`, which is the same program as `mmgen`."""

from mmgen.cli import main

if __name__ == "__main__":
    main()
