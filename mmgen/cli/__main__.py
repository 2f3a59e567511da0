"""`python -m mmgen.cli`."""

from mmgen.cli import main

if __name__ == "__main__":
    main()
