"""Where the command `wanrt` begins: a plan is there before torch would be, the rest needs torch."""

import sys


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["plan"]:
        from wanrt.cli_plan import main as verb
    else:
        from wanrt.cli import main as verb
    verb(args)


if __name__ == "__main__":
    main()
