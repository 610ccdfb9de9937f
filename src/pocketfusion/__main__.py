"""`python -m pocketfusion` is the command line."""

from pocketfusion.cli import main

if __name__ == "__main__":
    main()
