"""`python -m flowscale_lite` is the command `flowscale`."""

from flowscale import main

if __name__ == "__main__":
    main()
