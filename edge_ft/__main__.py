"""`python -m edge_ft`: the same command line as `edge-ft`."""

from edge_ft.cli import main

if __name__ == "__main__":
    main()
