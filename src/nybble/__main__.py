"""`python -m nybble` is the command `nybble`."""

from nybble.cli.main import app

if __name__ == "__main__":
    app(prog_name="nybble")
