"""`python -m conversion` is the command `diff-llama`."""

from conversion.cli import main


if __name__ == "__main__":
    main()
